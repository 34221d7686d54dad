"""Volumes in Zarr as they are written by others and by us: the same voxels and place as in NIfTI, and nothing read twice."""

import functools
import http.server
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
import zipfile

import fsspec
import nibabel as nib
import numcodecs
import numpy as np
import pytest
import torch
import zarr

import voxloom as vx
from voxloom.core.boxes import Box
from voxloom.errors import (
    CorruptImageError,
    ImageError,
    ImageFileError,
    ImageNotFoundError,
    ModeError,
    NoSuchIndexError,
    SaveError,
    UnsupportedImageError,
)
from voxloom.runtime.chunk_cache import CHUNKS
from voxloom.testing import check_source
from zarr_samples import AFFINE, SHAPE


def made(path, values, **more):
    """Write an array in the order that Zarr usually has."""
    array = zarr.create_array(path, shape=values.shape, dtype=values.dtype, **more)
    array[...] = values
    return path


ZSTD = zarr.codecs.ZstdCodec(level=1)
BLOSC = zarr.codecs.BloscCodec(cname="lz4", typesize=2)
KINDS = {
    "v3": {"chunks": (8, 16, 16), "compressors": BLOSC},
    "v3 of several codecs": {"chunks": (7, 9, 11), "compressors": [ZSTD, zarr.codecs.Crc32cCodec()]},
    "v3 gzip": {"chunks": (20, 30, 40), "compressors": zarr.codecs.GzipCodec()},
    "v3 plain": {"chunks": (8, 16, 16), "compressors": None},
    "v3 big endian": {"chunks": (8, 16, 16), "serializer": zarr.codecs.BytesCodec(endian="big")},
    "v3 transposed": {"chunks": (8, 16, 20), "filters": [zarr.codecs.TransposeCodec(order=(2, 0, 1))]},
    "v3 sharded": {"chunks": (4, 8, 8), "shards": (8, 16, 16), "compressors": BLOSC},
    "v2": {"chunks": (8, 16, 16), "zarr_format": 2},
    "v2 in Fortran's order": {"chunks": (8, 16, 16), "zarr_format": 2, "order": "F"},
    "v2 plain": {"chunks": (8, 16, 16), "zarr_format": 2, "compressors": None, "dtype": ">u2"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_arrays_of_every_kind(tmp_path, voxels, tensor, kind):
    options = dict(KINDS[kind])
    stored = np.ascontiguousarray(voxels.T).astype(options.pop("dtype", voxels.dtype))
    made(tmp_path / "a.zarr", stored, **options)
    source = vx.open_zarr(tmp_path / "a.zarr", axes="zyx", affine=AFFINE)
    check_source(source, tensor, AFFINE)
    assert source.array._decode is not None  # by numcodecs


def test_what_numcodecs_does_not_know_zarr_python_decodes(tmp_path, voxels, tensor, monkeypatch):
    made(tmp_path / "a.zarr", np.ascontiguousarray(voxels.T), chunks=(8, 16, 16))
    monkeypatch.setattr("voxloom.io.zarr.chunks._step", lambda name, options: None)
    source = vx.open_zarr(tmp_path / "a.zarr", axes="zyx", affine=AFFINE)
    assert source.array._decode is None
    check_source(source, tensor, AFFINE)


@pytest.mark.parametrize("order", ["big", "little"])
def test_shards_whose_codecs_zarr_python_alone_knows(tmp_path, voxels, tensor, order):
    index = [zarr.codecs.BytesCodec(endian=order), zarr.codecs.Crc32cCodec()]
    stored = np.ascontiguousarray(voxels.T)
    for name, codecs in (("plain", []), ("turned", [zarr.codecs.TransposeCodec(order=axes) for axes in ((1, 0, 2), (2, 1, 0))])):
        serializer = zarr.codecs.ShardingCodec(
            chunk_shape=(4, 8, 8), codecs=[*codecs, zarr.codecs.BytesCodec(), ZSTD], index_codecs=index
        )
        made(tmp_path / f"{name}.zarr", stored, chunks=(8, 16, 16), serializer=serializer, compressors=None)
        source = vx.open_zarr(tmp_path / f"{name}.zarr", axes="zyx", affine=AFFINE)
        check_source(source, tensor, AFFINE)
        assert (source.array._decode is None) == bool(codecs)
    with pytest.raises(UnsupportedImageError, match="leave out missing='error'"):
        vx.open_zarr(tmp_path / "turned.zarr", axes="zyx", missing="error")


@pytest.mark.parametrize("version", ["0.4", "0.5", "0.6"])
@pytest.mark.parametrize("ending", [".ome.zarr", ".nii.zarr", ".zarr"])
def test_a_patch_is_that_of_the_same_image_in_nifti(tmp_path, tensor, version, ending):
    image = vx.ScalarImage(tensor, affine=AFFINE)
    image.save(tmp_path / "scan.nii.gz")
    vx.convert(image, tmp_path / f"scan{ending}", version=version)
    ours, theirs = vx.ScalarImage(tmp_path / f"scan{ending}"), vx.ScalarImage(tmp_path / "scan.nii.gz")
    assert np.array_equal(ours.affine, theirs.affine)
    assert ours.codes == theirs.codes
    assert torch.equal(ours[:, 3:17, 5:9, 2:20].data, theirs[:, 3:17, 5:9, 2:20].data)
    assert ours.stem == "scan"


@pytest.mark.slow
def test_images_of_ngff_zarr(tmp_path, voxels, tensor):
    import ngff_zarr

    image = ngff_zarr.to_ngff_image(
        np.ascontiguousarray(voxels.T),
        dims="zyx",
        scale={"z": 3.0, "y": 2.0, "x": 1.5},
        translation={"z": 5.0, "y": 6.0, "x": 7.0},
    )
    image.axes_units = dict.fromkeys("zyx", "millimeter")
    image.axes_orientations = ngff_zarr.LPS
    for version in ("0.4", "0.5", "0.6"):
        levels = ngff_zarr.to_multiscales(image, scale_factors=[2], chunks=16)
        ngff_zarr.to_ngff_zarr(str(tmp_path / f"{version}.zarr"), levels, version=version)
        check_source(
            vx.open_zarr(tmp_path / f"{version}.zarr"), tensor, [[-1.5, 0, 0, -7], [0, -2, 0, -6], [0, 0, 3, 5], [0, 0, 0, 1]]
        )


@pytest.mark.filterwarnings("ignore:Call to deprecated class Scaler:DeprecationWarning")
def test_images_of_ome_zarr(tmp_path, voxels, tensor):
    from ome_zarr.format import FormatV04, FormatV05
    from ome_zarr.writer import write_image

    for form in (FormatV04(), FormatV05()):
        path = tmp_path / f"{form.version}.zarr"
        group = zarr.open_group(path, mode="w", zarr_format=form.zarr_format)
        write_image(voxels.T, group, axes="zyx", fmt=form, scaler=None, scale={"z": 3.0, "y": 2.0, "x": 1.5})
        check_source(vx.open_zarr(path), tensor, np.diag([1.5, 2, 3, 1]))


def test_images_of_nifti_zarr(tmp_path, tensor):
    import niizarr

    for codes in ((0, 2), (1, 1)):
        data = tensor[0].numpy().astype(np.int16)
        image = nib.Nifti1Image(data, AFFINE)
        image.header["qform_code"], image.header["sform_code"] = codes
        image.header.set_slope_inter(0.5, 10)
        nib.save(image, tmp_path / "scan.nii")
        theirs = vx.ScalarImage(tmp_path / "scan.nii")
        niizarr.nii2zarr(str(tmp_path / "scan.nii"), str(tmp_path / f"{codes[0]}.nii.zarr"))
        source = vx.open_zarr(tmp_path / f"{codes[0]}.nii.zarr")
        check_source(source, theirs.data, AFFINE)
        assert (source.codes.qform, source.codes.sform) == codes
    data = np.arange(9 * 8 * 10 * 2 * 3, dtype=np.int16).reshape(9, 8, 10, 2, 3)
    nib.save(nib.Nifti1Image(data, AFFINE), tmp_path / "five.nii")
    niizarr.nii2zarr(str(tmp_path / "five.nii"), str(tmp_path / "five.nii.zarr"))
    check_source(vx.open_zarr(tmp_path / "five.nii.zarr", time=1), torch.from_numpy(data[..., 1, :]).permute(3, 0, 1, 2), AFFINE)


def test_arrays_of_tensorstore(tmp_path, voxels, tensor):
    np.save(tmp_path / "voxels.npy", np.ascontiguousarray(voxels.T))
    script = f"""
        import numpy as np, tensorstore as ts
        voxels = np.load("voxels.npy")
        codec = {{"name": "zstd", "configuration": {{"level": 1}}}}
        sharding = {{"name": "sharding_indexed", "configuration": {{"chunk_shape": [4, 8, 8], "codecs": [{{"name": "bytes",
            "configuration": {{"endian": "little"}}}}, codec], "index_location": "start"}}}}
        for driver, more in (("zarr", {{"chunks": [8, 16, 16]}}), ("zarr3", {{"chunk_grid": {{"name": "regular", "configuration":
            {{"chunk_shape": [8, 16, 16]}}}}, "codecs": [sharding]}})):
            spec = {{"driver": driver, "kvstore": {{"driver": "file", "path": driver}}, "metadata": more}}
            ts.open(spec, create=True, dtype=ts.uint16, shape={list(reversed(SHAPE))}).result()[...] = voxels
    """
    lines = "\n".join(line[8:] for line in script.strip("\n").split("\n"))
    subprocess.run([sys.executable, "-c", lines], cwd=tmp_path, check=True, timeout=120)
    for driver in ("zarr", "zarr3"):
        check_source(vx.open_zarr(tmp_path / driver, axes="zyx"), tensor, np.eye(4))


def five(tmp_path, **more):
    """An image with three times and two channels."""
    values = np.arange(3 * 2 * 8 * 9 * 10, dtype=np.int32).reshape(3, 2, 8, 9, 10)
    group = zarr.create_group(tmp_path / "five.zarr")
    kinds = {"t": "time", "c": "channel"}
    axes = [{"name": name, "type": kinds.get(name, "space")} for name in "tczyx"]
    datasets = [{"path": "0", "coordinateTransformations": [{"type": "scale", "scale": [1, 1, 4, 2, 1]}]}]
    group.attrs["ome"] = {
        "version": "0.5",
        "multiscales": [{"axes": axes, "datasets": datasets}],
        "omero": {"channels": [{"label": "nuclei"}, {"label": "walls"}]},
    }
    group.create_array("0", data=values, chunks=(1, 2, 4, 4, 4))
    return tmp_path / "five.zarr", torch.from_numpy(values)


def test_times_and_channels_are_chosen(tmp_path):
    path, values = five(tmp_path)
    whole = values.permute(0, 1, 4, 3, 2)
    affine = np.diag([1.0, 2, 4, 1])
    check_source(vx.open_zarr(path, time=1), whole[1], affine)
    check_source(vx.open_zarr(path, time=-1, channel="walls"), whole[2, 1:], affine)
    check_source(vx.open_zarr(path, time=0, channel=[1, 0]), whole[0, [1, 0]], affine)
    check_source(vx.open_zarr(path, channel=0), whole[:, 0], affine)
    with pytest.raises(ImageError, match=r"3 times and 2 channels: say which"):
        vx.ScalarImage(path).load()
    with pytest.raises(NoSuchIndexError, match="no time 3, only 3"):
        vx.open_zarr(path, time=3)
    with pytest.raises(NoSuchIndexError, match="'blood', only 'nuclei', 'walls'"):
        vx.open_zarr(path, channel="blood")


def test_a_level_by_number_by_spacing_and_by_path(tmp_path, tensor):
    vx.convert(vx.ScalarImage(tensor, affine=AFFINE), tmp_path / "scan.ome.zarr", levels=3, chunks=8)
    shapes = [vx.open_zarr(tmp_path / "scan.ome.zarr", level=level).shape for level in range(3)]
    assert shapes == [(1, 40, 30, 20), (1, 20, 15, 20), (1, 10, 8, 10)]
    coarse = vx.open_zarr(tmp_path / "scan.ome.zarr", spacing=5.9)
    assert coarse.shape == shapes[1]
    by_path = vx.ScalarImage(tmp_path / "scan.ome.zarr" / "1")
    assert by_path.shape == shapes[1]
    assert np.array_equal(by_path.affine, coarse.affine)
    assert np.allclose(coarse.affine @ [-0.5, -0.5, -0.5, 1], AFFINE @ [-0.5, -0.5, -0.5, 1])
    with pytest.raises(NoSuchIndexError, match="no level 7, only 3"):
        vx.open_zarr(tmp_path / "scan.ome.zarr", level=7)


def renamed(folder, change):
    """Change the attributes of a group."""
    group = zarr.open_group(folder, mode="r+")
    told = json.loads(json.dumps(dict(group.attrs)))
    change(told)
    group.attrs.put(told)


def test_a_level_by_path_wherever_the_image_is(tmp_path, tensor):
    """Also where folders in between are no groups, where a name does not say what is Zarr, and of a second image in a group."""
    vx.convert(vx.ScalarImage(tensor, affine=AFFINE), tmp_path / "scan.ome.zarr", levels=2, chunks=16)
    expected = vx.open_zarr(tmp_path / "scan.ome.zarr", level=1).affine
    (tmp_path / "scan.ome.zarr/res").mkdir()
    (tmp_path / "scan.ome.zarr/1").rename(tmp_path / "scan.ome.zarr/res/1")
    renamed(tmp_path / "scan.ome.zarr", lambda told: told["ome"]["multiscales"][0]["datasets"][1].update(path="res/1"))
    shutil.copytree(tmp_path / "scan.ome.zarr", tmp_path / "scan")

    def with_second(told):
        first = told["ome"]["multiscales"][0]
        told["ome"]["multiscales"] = [first | {"datasets": first["datasets"][:1]}, first | {"datasets": first["datasets"][1:]}]

    shutil.copytree(tmp_path / "scan.ome.zarr", tmp_path / "two.ome.zarr")
    renamed(tmp_path / "two.ome.zarr", with_second)
    renamed(tmp_path / "two.ome.zarr", lambda told: told.pop("voxloom"))
    shape = vx.open_zarr(tmp_path / "scan.ome.zarr", level=1).shape
    for place in (tmp_path / "scan.ome.zarr/res/1", tmp_path / "scan/res/1", f"file://{tmp_path}/scan/res/1"):
        np.testing.assert_allclose(vx.ScalarImage(place).affine, expected)
        assert vx.open_zarr(place, affine=AFFINE).shape == shape  # its axes are known from the group
    assert vx.ScalarImage(tmp_path / "two.ome.zarr/res/1").spacing == pytest.approx(np.linalg.norm(expected[:3, :3], axis=0))


def steps_of(told):
    """The scale and the translation of the finest level."""
    steps = told.get("ome", told)["multiscales"][0]["datasets"][0]["coordinateTransformations"]
    scale, translation = steps[0].get("transformations", steps)
    return scale["scale"], translation["translation"]


def other_scale(told):
    steps_of(told)[0][-3] *= 1.01


def other_place(told):
    steps_of(told)[1][-1] += 0.02


def opposite_place(told):
    steps_of(told)[1][:] = [-value for value in steps_of(told)[1]]


def exchanged_place(told):
    steps_of(told)[1].reverse()


def other_side(told):
    image = told.get("ome", told)["multiscales"][0]
    axis = (image.get("axes") or image["coordinateSystems"][0]["axes"])[-1]
    before, _, after = axis["orientation"]["value"].split("-")
    axis["orientation"]["value"] = f"{after}-to-{before}"


@pytest.mark.parametrize("version", ["0.4", "0.5", "0.6"])
@pytest.mark.parametrize("change", [other_scale, other_place, opposite_place, exchanged_place, other_side])
def test_metadata_that_others_have_changed_since_are_not_passed_over(tmp_path, tensor, version, change):
    path = tmp_path / "scan.ome.zarr"
    vx.convert(vx.ScalarImage(tensor, affine=AFFINE), path, levels=2, version=version)
    assert np.array_equal(vx.ScalarImage(path).affine, AFFINE)
    renamed(path, change)
    for place in (path, path / "1"):
        with pytest.raises(UnsupportedImageError, match="attribute 'voxloom' .* differ in where voxels lie"):
            vx.open_zarr(place)
    assert np.array_equal(vx.open_zarr(path, affine=AFFINE).affine, AFFINE)
    renamed(path, lambda told: told.pop("voxloom"))
    assert not np.allclose(vx.ScalarImage(path).affine, AFFINE, atol=1e-4)


@pytest.mark.parametrize("version", ["0.4", "0.5", "0.6"])
def test_oblique_axes_are_known_by_what_voxloom_has_written(tmp_path, tensor, version):
    """Also where another program has left out what is said of directions."""
    oblique = AFFINE @ np.array([[0.8, -0.6, 0, 1], [0.6, 0.8, 0, 2], [0, 0, 1, 3], [0, 0, 0, 1]])
    vx.convert(vx.ScalarImage(tensor, affine=oblique), tmp_path / "scan.ome.zarr", version=version)
    np.testing.assert_array_equal(vx.ScalarImage(tmp_path / "scan.ome.zarr").affine, oblique)

    def plain(told):
        for axis in told.get("ome", told)["multiscales"][0].get("axes", ()):
            axis.pop("orientation")

    renamed(tmp_path / "scan.ome.zarr", plain)
    np.testing.assert_array_equal(vx.ScalarImage(tmp_path / "scan.ome.zarr").affine, oblique)


@pytest.mark.parametrize("images", [[], {}, None, 5, True])
def test_a_level_of_an_image_that_is_none_is_an_error(tmp_path, tensor, images):
    vx.ScalarImage(tensor).save(tmp_path / "scan.ome.zarr")
    renamed(tmp_path / "scan.ome.zarr", lambda told: told["ome"].update(multiscales=images))
    for place in ("scan.ome.zarr", "scan.ome.zarr/0"):
        with pytest.raises(CorruptImageError, match="no multiscales of OME-Zarr"):
            vx.open_zarr(tmp_path / place)


def test_a_header_is_of_the_first_image_alone(tmp_path, tensor):
    path = tmp_path / "scan.nii.zarr"
    vx.convert(vx.ScalarImage(tensor, affine=AFFINE), path)
    group = zarr.open_group(path, mode="r+")
    group.create_array("other", shape=(4, 5, 6), dtype="u1")
    steps = [{"type": "scale", "scale": [7, 7, 7]}, {"type": "translation", "translation": [50, 50, 50]}]

    def with_other(told):
        images = told["ome"]["multiscales"]
        axes = [{"name": name, "type": "space", "unit": "millimeter"} for name in "zyx"]
        images.append({"axes": axes, "datasets": [{"path": "other", "coordinateTransformations": steps}]})

    renamed(path, with_other)
    assert np.array_equal(vx.ScalarImage(path).affine, AFFINE)
    np.testing.assert_allclose(vx.ScalarImage(path / "other").affine, [[7, 0, 0, 50], [0, 7, 0, 50], [0, 0, 7, 50], [0, 0, 0, 1]])


def test_names_of_channels_and_dimensions_that_are_not_clear(tmp_path):
    path, _ = five(tmp_path)
    renamed(path, lambda told: told["ome"]["omero"].update(channels=[{"label": "A"}, {"label": "A"}]))
    with pytest.raises(NoSuchIndexError, match="several channels 'A': give the number"):
        vx.open_zarr(path, time=0, channel="A")
    renamed(path, lambda told: told["ome"]["omero"].update(channels=[{}, {}]))
    with pytest.raises(NoSuchIndexError, match="no channel ''"):
        vx.open_zarr(path, time=0, channel="")
    told = json.loads((path / "0/zarr.json").read_text())
    (path / "0/zarr.json").write_text(json.dumps(told | {"dimension_names": list("tcxyz")}))
    with pytest.warns(RuntimeWarning, match="dimensions named t, c, x, y, z, but the axes .* t, c, z, y, x, which count"):
        vx.open_zarr(path, time=0)


def zipped(folder, target):
    with zipfile.ZipFile(target, "w") as file:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                file.write(path, path.relative_to(folder))
    return target


def test_zip_files(tmp_path, tensor):
    vx.LabelMap(tensor, affine=AFFINE).save(tmp_path / "scan.ome.zarr")
    for name in ("scan.zarr.zip", "scan.ozx"):
        path = zipped(tmp_path / "scan.ome.zarr", tmp_path / name)
        check_source(vx.open_zarr(path), tensor, AFFINE)
        assert torch.equal(vx.ScalarImage(path).data, tensor)
        assert torch.equal(vx.ScalarImage(path / "0").data, tensor)
    with zipfile.ZipFile(tmp_path / "within.zip", "w") as file:
        file.write(tmp_path / "scan.ome.zarr/zarr.json", "scan.ome.zarr/zarr.json")
    with pytest.raises(ImageNotFoundError, match=r"in it there is scan\.ome\.zarr: name what is meant"):
        vx.open_zarr(tmp_path / "within.zip")
    (tmp_path / "bad.ozx").write_bytes(b"PK no")
    with pytest.raises(ImageFileError, match=r"bad\.ozx is no zip file"):
        vx.ScalarImage(tmp_path / "bad.ozx").load()


def test_workers_that_are_forked_read_a_zip_file_side_by_side(tmp_path):
    data = (torch.rand(1, 64, 64, 64) * 255).to(torch.uint8)
    vx.convert(data, tmp_path / "scan.zarr", chunks=16)
    path = zipped(tmp_path / "scan.zarr", tmp_path / "scan.zarr.zip")
    subject = vx.Subject(image=vx.ScalarImage(path))
    _ = subject.image[:, :4].data  # the file is open before workers are forked
    queue = vx.Queue([subject] * 4, 20, 10, vx.UniformSampler(24, seed=0), num_workers=2, seed=0)
    for batch in vx.SubjectsLoader(queue, 5):
        for patch, location in zip(batch.image.data, batch.patch_location, strict=True):
            assert torch.equal(patch, data[(slice(None), *location.box.slices)])


@pytest.fixture
def server(tmp_path):
    """Serves the folder: what has a name with `late` in it is never answered, and what a list has, given with it, not at once."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            if "late" in self.path:
                stop.wait(20)
                return
            for name in list(busy):
                if self.path.endswith(name):
                    busy.remove(name)
                    self.send_error(503)
                    return
            super().do_GET()

        def log_message(self, *arguments):
            pass

    stop, busy = threading.Event(), []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(tmp_path))) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", busy
        stop.set()
        running.shutdown()


@pytest.mark.filterwarnings("ignore:.*unclosed.*:ResourceWarning")
def test_urls(tmp_path, tensor, server, monkeypatch):
    server, _ = server
    vx.convert(vx.ScalarImage(tensor, affine=AFFINE), tmp_path / "scan.ome.zarr", levels=2, chunks=16)
    source = vx.open_zarr(f"{server}/scan.ome.zarr")
    assert torch.equal(source.read(Box((3, 3, 3), (20, 20, 20))), tensor[:, 3:20, 3:20, 3:20])
    assert np.array_equal(source.affine, AFFINE)
    assert source.paths == ()
    assert pickle.loads(pickle.dumps(source)).fingerprint() == source.fingerprint()
    image = vx.ScalarImage(f"{server}/scan.ome.zarr/1")
    assert image.shape == (1, 20, 15, 20)
    made = vx.predict(torch.nn.Identity(), f"{server}/scan.ome.zarr", patch_size=16, overlap_mode="crop")
    assert torch.equal(made.data, tensor)
    with pytest.raises(ImageNotFoundError, match=r"nothing\.zarr"):
        vx.open_zarr(f"{server}/nothing.zarr")
    monkeypatch.setattr("voxloom.io.zarr.patient_store.PAUSE_SECONDS", 0.01)
    source = vx.open_zarr(f"{server}/scan.ome.zarr", timeout=0.2)
    source.array._encode_key = lambda place: "late"
    CHUNKS.clear()
    with pytest.raises(ImageFileError, match=r"scan\.ome\.zarr/0/late gave no answer within 0\.2 s, 3 times"):
        source.read(Box((0, 0, 0), (4, 4, 4)))


@pytest.mark.filterwarnings("ignore:.*unclosed.*:ResourceWarning")
def test_metadata_at_urls_are_asked_for_again_though_not_for_ever(tmp_path, tensor, server, monkeypatch):
    server, busy = server
    monkeypatch.setattr("voxloom.io.zarr.patient_store.PAUSE_SECONDS", 0.01)
    vx.convert(vx.ScalarImage(tensor, affine=AFFINE), tmp_path / "scan.ome.zarr", chunks=16)
    busy += ["scan.ome.zarr/zarr.json", "0/zarr.json", "0/c/0/0/0", "0/c/0/0/0"]
    assert torch.equal(vx.ScalarImage(vx.open_zarr(f"{server}/scan.ome.zarr")).data, tensor)
    assert not busy
    busy += ["0/zarr.json"] * 3
    with pytest.raises(ImageFileError, match=r"scan\.ome\.zarr/0/zarr\.json could not be read: .*503.*, 3 times"):
        vx.open_zarr(f"{server}/scan.ome.zarr")
    (tmp_path / "scan.ome.zarr").rename(tmp_path / "late.ome.zarr")
    with pytest.raises(ImageFileError, match=r"late\.ome\.zarr/zarr\.json gave no answer within 0\.2 s, 3 times"):
        vx.open_zarr(f"{server}/late.ome.zarr", timeout=0.2)


@pytest.mark.parametrize("url", ["memory://{}", "file://{}", "simplecache::memory://{}"])
def test_urls_of_other_kinds(tmp_path, tensor, url):
    folder = tmp_path / "scan.ome.zarr"
    vx.convert(vx.ScalarImage(tensor, affine=AFFINE), folder, chunks=16)
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), str(folder), recursive=True)
    image = vx.ScalarImage(url.format(folder))
    assert torch.equal(image[:, 3:20].data, tensor[:, 3:20])
    assert np.array_equal(image.affine, AFFINE)
    assert torch.equal(vx.predict(torch.nn.Identity(), image, patch_size=16, overlap_mode="crop").data, tensor)


def test_urls_of_a_folder_in_an_archive(tmp_path, tensor):
    folder = tmp_path / "all"
    folder.mkdir()
    vx.convert(vx.ScalarImage(tensor, affine=AFFINE), folder / "scan.ome.zarr", chunks=16)
    zipped(folder, tmp_path / "all.zip")
    image = vx.ScalarImage(f"zip://scan.ome.zarr::file://{tmp_path}/all.zip")
    assert torch.equal(image[:, 3:20].data, tensor[:, 3:20])


# What is read


def counted(tmp_path, shards=None):
    values = np.random.default_rng(0).integers(0, 255, (96, 96, 96), dtype=np.uint8)
    made(tmp_path / "a.zarr", values, chunks=(16, 16, 16), shards=shards, compressors=None)
    return vx.open_zarr(tmp_path / "a.zarr"), values


@pytest.mark.parametrize("shards", [None, (48, 48, 48)])
def test_a_patch_reads_only_the_chunks_that_it_touches_and_each_once(tmp_path, shards, small_cache):
    source, values = counted(tmp_path, shards)
    box = Box((10, 17, 33), (20, 30, 47))  # in 2 × 1 × 1 chunks
    assert np.array_equal(source.read(box)[0].numpy(), values[box.slices])
    index = 0 if shards is None else 16 * 27 + 4
    assert source.bytes_read == 2 * 16**3 + index
    source.read(box)
    assert source.bytes_read == 2 * 16**3 + index


def test_a_grid_with_half_overlap_fetches_few_bytes_twice(tmp_path, small_cache):
    source, values = counted(tmp_path)
    made = vx.predict(torch.nn.Identity(), source, patch_size=32, patch_overlap=0.5, overlap_mode="crop")
    assert np.array_equal(made.data[0].numpy(), values)
    assert source.bytes_read == values.size
    # A cache that holds a third of the volume is as good: what patches share of two layers of chunks.
    source = vx.open_zarr(tmp_path / "a.zarr")
    vx.set_chunk_cache(values.size // 3 + 16**3)
    vx.predict(torch.nn.Identity(), source, patch_size=32, patch_overlap=0.5, overlap_mode="crop")
    assert source.bytes_read <= 1.3 * values.size


def test_the_cache_holds_no_more_than_it_may(tmp_path, small_cache):
    source, values = counted(tmp_path)
    vx.set_chunk_cache(5 * 16**3)
    source.read(source.spec.box)
    assert CHUNKS.num_bytes == 5 * 16**3
    vx.set_chunk_cache(0)
    assert CHUNKS.num_bytes == 0
    assert np.array_equal(source.read(source.spec.box)[0].numpy(), values)


def test_another_file_under_the_same_name_is_read_anew(tmp_path, small_cache):
    source, values = counted(tmp_path)
    assert np.array_equal(source.read(source.spec.box)[0].numpy(), values)
    shutil.rmtree(tmp_path / "a.zarr")
    made(tmp_path / "a.zarr", 255 - values, chunks=(16, 16, 16))
    assert np.array_equal(vx.open_zarr(tmp_path / "a.zarr").read(source.spec.box)[0].numpy(), 255 - values)


def test_samplers_and_the_queue(tmp_path, tensor):
    labels = (tensor % 5 == 0).to(torch.uint8)
    vx.ScalarImage(tensor, affine=AFFINE).save(tmp_path / "scan.ome.zarr")
    vx.LabelMap(labels, affine=AFFINE).save(tmp_path / "labels.ome.zarr")
    lazy = vx.Subject(t1=vx.ScalarImage(tmp_path / "scan.ome.zarr"), seg=vx.LabelMap(tmp_path / "labels.ome.zarr"))
    held = vx.Subject(t1=vx.ScalarImage(tensor, affine=AFFINE), seg=vx.LabelMap(labels, affine=AFFINE))
    for kind, names in ((vx.UniformSampler, []), (vx.WeightedSampler, ["seg"]), (vx.LabelSampler, ["seg"])):
        drawn = [kind(8, *names, seed=3)(each, num_patches=20) for each in (lazy, held)]
        for ours, theirs in zip(*drawn, strict=True):
            assert ours.patch_location == theirs.patch_location
            assert torch.equal(ours.t1.data, theirs.t1.data)
    assert not lazy.t1.is_loaded
    batches = [
        [
            batch.t1.data
            for batch in vx.SubjectsLoader(vx.Queue([each] * 3, 12, 6, vx.UniformSampler(8), num_workers=2, seed=0), 4)
        ]
        for each in (lazy, held)
    ]
    assert all(torch.equal(*pair) for pair in zip(*batches, strict=True))


# Bad input


def test_missing_chunks_are_the_fill_value_or_an_error(tmp_path):
    values = np.ones((8, 8, 8), np.float32)
    made(tmp_path / "a.zarr", values, chunks=(4, 8, 8), fill_value=7)
    (tmp_path / "a.zarr/c/1/0/0").unlink()
    assert vx.open_zarr(tmp_path / "a.zarr").read(Box((0, 0, 0), (8, 8, 8))).unique().tolist() == [1, 7]
    source = vx.open_zarr(tmp_path / "a.zarr", missing="error")
    assert source.read(Box((0, 0, 0), (4, 8, 8))).unique().tolist() == [1]
    with pytest.raises(CorruptImageError, match=r"a\.zarr has no chunk c/1/0/0"):
        source.read(Box((0, 0, 0), (8, 8, 8)))
    with pytest.raises(ModeError, match="'fill' or 'error'"):
        vx.open_zarr(tmp_path / "a.zarr", missing="guess")


@pytest.mark.parametrize("shards", [None, (8, 8, 8)])
def test_a_damaged_chunk_is_named(tmp_path, shards):
    values = np.random.default_rng(0).integers(0, 255, (8, 8, 8), dtype=np.uint8)
    made(tmp_path / "a.zarr", values, chunks=(4, 8, 8), shards=shards, compressors=[ZSTD, zarr.codecs.Crc32cCodec()])
    path = tmp_path / ("a.zarr/c/1/0/0" if shards is None else "a.zarr/c/0/0/0")
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2 if shards is None else len(raw) * 3 // 4 - 30] ^= 255
    path.write_bytes(raw)
    source = vx.open_zarr(tmp_path / "a.zarr")
    with pytest.raises(CorruptImageError, match=r"chunk c/.*a\.zarr is damaged.*checksum"):
        source.read(Box((0, 0, 0), (8, 8, 8)))
    path.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(CorruptImageError, match=r"c/.*is damaged"):
        vx.open_zarr(tmp_path / "a.zarr").read(Box((0, 0, 0), (8, 8, 8)))


def test_what_is_no_image_is_named(tmp_path):
    group = zarr.create_group(tmp_path / "group.zarr")
    group.create_array("data", shape=(4, 4, 4), dtype="u1")
    with pytest.raises(UnsupportedImageError, match=r"no multiscales.*there is data"):
        vx.ScalarImage(tmp_path / "group.zarr").load()
    assert vx.ScalarImage(tmp_path / "group.zarr/data").shape == (1, 4, 4, 4)
    (tmp_path / "empty.zarr").mkdir()
    with pytest.raises(ImageFileError, match=r"empty\.zarr"):
        vx.ScalarImage(tmp_path / "empty.zarr").load()
    with pytest.raises(ImageNotFoundError, match="nowhere"):
        vx.open_zarr(tmp_path / "nowhere.zarr")
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": [{"name": "z"}, {"name": "y"}, {"name": "x"}], "datasets": [
        {"path": "gone", "coordinateTransformations": []}]}]}  # fmt: skip
    with pytest.raises(CorruptImageError, match="no array 'gone'"):
        vx.ScalarImage(tmp_path / "group.zarr").load()
    (tmp_path / "group.zarr/zarr.json").write_text("{")
    with pytest.raises(CorruptImageError, match="cannot be opened as Zarr"):
        vx.ScalarImage(tmp_path / "group.zarr").load()
    zarr.create_array(tmp_path / "flat.zarr", shape=(4, 4), dtype="u1")
    with pytest.raises(ImageError, match="say what its axes are"):
        vx.ScalarImage(tmp_path / "flat.zarr").load()
    assert vx.open_zarr(tmp_path / "flat.zarr", axes="yx").shape == (1, 4, 4, 1)


@pytest.mark.parametrize("version", [2, 3])
def test_a_chunk_of_blosc_that_was_cut_off_is_damaged(tmp_path, version):
    # Noise is stored as it is, of which Blosc reads as much as the chunk should have, whatever lies behind it in memory.
    noise = np.random.default_rng(0).integers(0, 2**16, (32, 32, 32)).astype("uint16")
    codec = {2: numcodecs.Blosc("lz4"), 3: zarr.codecs.BloscCodec(cname="lz4", shuffle="noshuffle")}[version]
    zarr.create_array(tmp_path / "a.zarr", data=noise, chunks=noise.shape, compressors=codec, zarr_format=version)
    (chunk,) = (tmp_path / "a.zarr").rglob("0.0.0" if version == 2 else "c/0/0/0")
    whole = chunk.read_bytes()
    assert len(whole) > noise.nbytes
    for count in (len(whole) - 1, len(whole) // 2, 16, 3):
        chunk.write_bytes(whole[:count])
        with pytest.raises(CorruptImageError, match=f"has {count} bytes"):
            vx.ScalarImage(vx.open_zarr(tmp_path / "a.zarr")).load()


def test_a_store_is_not_replaced_by_a_level_of_its_own(tmp_path, tensor):
    store = tmp_path / "scan.ome.zarr"
    vx.convert(vx.ScalarImage(tensor, affine=AFFINE), store, chunks=16, levels=2)
    with pytest.raises(SaveError, match="over itself, or over what holds it"):
        vx.convert(store / "1", store, overwrite=True)
    with pytest.raises(SaveError, match="would replace the input"):
        vx.predict(torch.nn.Identity(), store / "1", 8, output=store, overwrite=True)
    with pytest.raises(SaveError, match="would replace the input"):
        vx.predict(torch.nn.Identity(), tensor, 8, mask=store / "0", output=store, overwrite=True)
    for name in ("0/x.nii", "x.nii.gz", "y.ome.zarr"):
        with pytest.raises(SaveError, match=r"scan\.ome\.zarr"):
            vx.convert(vx.ScalarImage(tensor), store / name)
    assert torch.equal(vx.ScalarImage(store).data, tensor)
    assert sorted(path.name for path in store.iterdir()) == ["0", "1", "zarr.json"]


def test_metadata_of_levels_that_are_damaged_are_named(tmp_path, tensor):
    vx.convert(vx.ScalarImage(tensor, affine=AFFINE), tmp_path / "scan.nii.zarr", chunks=16)
    for name, said in (("0/zarr.json", "0"), ("nifti/zarr.json", "nifti"), ("nifti/c/0", "the NIfTI header")):
        file = tmp_path / "scan.nii.zarr" / name
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(CorruptImageError, match=rf"{said} (in|of) .*scan\.nii\.zarr is damaged"):
            vx.open_zarr(tmp_path / "scan.nii.zarr")
        file.write_bytes(whole)


def test_a_damaged_member_of_a_zip_file_is_named(tmp_path, tensor):
    vx.convert(vx.ScalarImage(tensor, affine=AFFINE), tmp_path / "scan.ome.zarr", chunks=16)
    with zipfile.ZipFile(tmp_path / "scan.zarr.zip", "w") as file:
        for each in (tmp_path / "scan.ome.zarr").rglob("*"):
            file.write(each, each.relative_to(tmp_path / "scan.ome.zarr"))
        at = file.getinfo("0/c/0/0/0").header_offset
    raw = bytearray((tmp_path / "scan.zarr.zip").read_bytes())
    raw[at + 60] ^= 1
    (tmp_path / "scan.zarr.zip").write_bytes(raw)
    with pytest.raises(CorruptImageError, match=r"0/c/0/0/0 in .*scan\.zarr\.zip cannot be unpacked: Bad CRC-32"):
        vx.ScalarImage(tmp_path / "scan.zarr.zip").load()


def test_the_time_step_of_a_nifti_zarr_stays(tmp_path):
    image = nib.Nifti1Image(np.arange(240, dtype="int16").reshape(4, 5, 6, 2), np.eye(4))
    image.header["pixdim"][4] = 2.5
    image.header.set_xyzt_units("mm", "sec")
    nib.save(image, tmp_path / "a.nii")
    vx.convert(tmp_path / "a.nii", tmp_path / "a.nii.zarr")
    vx.convert(tmp_path / "a.nii.zarr", tmp_path / "b.nii")
    assert nib.load(tmp_path / "b.nii").header.get_zooms() == (1, 1, 1, 2.5)


def test_a_damaged_note_of_ours_is_an_error(tmp_path, tensor):
    vx.ScalarImage(tensor).save(tmp_path / "scan.ome.zarr")
    path = tmp_path / "scan.ome.zarr/zarr.json"
    told = json.loads(path.read_text())
    told["attributes"]["voxloom"]["affine"] = [[1, 2]]
    path.write_text(json.dumps(told))
    with pytest.raises(CorruptImageError, match="attribute 'voxloom'"):
        vx.ScalarImage(tmp_path / "scan.ome.zarr").load()


def test_a_store_that_changes_has_another_fingerprint(tmp_path, tensor):
    vx.ScalarImage(tensor).save(tmp_path / "scan.ome.zarr")
    before = vx.open_zarr(tmp_path / "scan.ome.zarr").fingerprint()
    chunk = next(path for path in (tmp_path / "scan.ome.zarr/0/c").rglob("*") if path.is_file())
    os.utime(chunk, ns=(0, chunk.stat().st_mtime_ns + 10**9))
    assert vx.open_zarr(tmp_path / "scan.ome.zarr").fingerprint() != before


# Other arrays in parts


@pytest.mark.slow
def test_hdf5_npy_and_dask(tmp_path, voxels, tensor, monkeypatch):
    import dask.array
    import h5py

    with h5py.File(tmp_path / "scan.h5", "w") as file:
        file.create_dataset("group/data", data=voxels, chunks=(8, 8, 8), compression="gzip")
    check_source(vx.ScalarImage(f"{tmp_path}/scan.h5:/group/data", affine=AFFINE), tensor, AFFINE)
    with pytest.raises(ImageNotFoundError, match=r"no data set /data, only /group/data"):
        vx.ScalarImage(f"{tmp_path}/scan.h5:/data")
    for order in "CF":
        np.save(tmp_path / "scan.npy", np.asarray(voxels, order=order))
        check_source(vx.ScalarImage(tmp_path / "scan.npy", affine=AFFINE), tensor, AFFINE)
    with h5py.File(tmp_path / "parts.h5", "w") as file:
        layout = h5py.VirtualLayout(voxels.shape, voxels.dtype)
        layout[...] = h5py.VirtualSource("scan.h5", "group/data", voxels.shape)
        file.create_virtual_dataset("data", layout)
    whole = vx.ScalarImage(f"{tmp_path}/parts.h5:/data", affine=AFFINE)
    check_source(whole, tensor, AFFINE)
    assert tmp_path / "scan.h5" in whole.paths
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/link.h5").symlink_to(tmp_path / "parts.h5")
    check_source(vx.ScalarImage(f"{tmp_path}/elsewhere/link.h5:/data", affine=AFFINE), tensor, AFFINE)
    shutil.copy(tmp_path / "scan.h5", tmp_path / "elsewhere/scan.h5")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert vx.ScalarImage(f"{tmp_path}/parts.h5:/data").paths[1] == tmp_path / "scan.h5"  # the one that HDF5 reads
    monkeypatch.chdir(tmp_path)
    with h5py.File(tmp_path / "deep.h5", "w") as file:
        layout = h5py.VirtualLayout(voxels.shape, voxels.dtype)
        layout[...] = h5py.VirtualSource("sub/scan.h5", "group/data", voxels.shape)
        file.create_virtual_dataset("data", layout)
    with pytest.raises(ImageNotFoundError, match=r"sub/scan\.h5 is not there"):  # the one beside it is another
        vx.ScalarImage(f"{tmp_path}/deep.h5:/data")
    monkeypatch.setenv("HDF5_VDS_PREFIX", "/nowhere:${ORIGIN}/elsewhere")
    assert vx.ScalarImage(f"{tmp_path}/parts.h5:/data").paths[1] == tmp_path / "elsewhere/scan.h5"
    monkeypatch.delenv("HDF5_VDS_PREFIX")
    (tmp_path / "scan.h5").rename(tmp_path / "elsewhere.h5")
    with pytest.raises(ImageNotFoundError, match=r"put together from other files, of which .*scan\.h5 is not there"):
        vx.ScalarImage(f"{tmp_path}/parts.h5:/data")
    (tmp_path / "bad.npy").write_bytes(b"\x93NUMPY?")
    with pytest.raises(ImageFileError, match=r"bad\.npy"):
        vx.ScalarImage(tmp_path / "bad.npy").load()
    check_source(vx.ScalarImage(vx.ArraySource(dask.array.from_array(voxels, chunks=10), affine=AFFINE)), tensor, AFFINE)
    unknown = dask.array.from_array(voxels, chunks=10)
    with pytest.raises(ImageError, match="compute_chunk_sizes"):
        vx.ArraySource(unknown[unknown[:, 0, 0] > 10])


def test_masked_values_are_not_taken_for_data(voxels):
    masked = np.ma.masked_greater(voxels, 100)
    for make in (vx.ArraySource, vx.ScalarImage):
        with pytest.raises(ImageError, match=r"masked.*filled\(VALUE\)"):
            make(masked)
    assert vx.ScalarImage(np.ma.masked_greater(voxels, 10**4)).data.max() == int(voxels.max())
