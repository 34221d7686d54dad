"""Files with damaged headers: whatever the damage, an image or an error that names the file."""

import contextlib
import gzip
import os
import re
import struct
import tracemalloc
import warnings
import zlib

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

import voxloom as vx
from voxloom.errors import CorruptImageError, UnsupportedImageError, VoxloomError
from voxloom.io.itk import isolated

from strategies import examples

HEADERS = {".nii": 352, ".mgh": 120, ".nrrd": 300, ".mha": 300}


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("intact")
    array = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    nib.save(nib.Nifti1Image(array, np.eye(4)), folder / "x.nii")
    nib.save(nib.MGHImage(array, np.eye(4)), folder / "x.mgh")
    for ending in (".nrrd", ".mha"):
        vx.ScalarImage(torch.from_numpy(array)[None]).save(folder / f"x{ending}")
    return {ending: (folder / f"x{ending}").read_bytes() for ending in HEADERS}


@examples(400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(HEADERS)), st.data())
def test_damaged_headers_never_surprise(intact, tmp_path, ending, data):
    content = bytearray(intact[ending])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(HEADERS[ending], len(content)) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / f"x{ending}"
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of nibabel's: it mends what it can, and says so
        try:
            image = vx.ScalarImage(path)
            shape = image.shape
            repr(image)
            if np.prod(shape, dtype=object) < 10**6:
                assert image.data.shape == shape
                image[:, :1].data.sum()
        except VoxloomError as error:
            assert "x." in str(error) or "affine" in str(error)


@pytest.mark.parametrize("ending", [".nii.gz", ".mgz", ".mha", ".nrrd"])
def test_damaged_compressed_data_are_never_taken_for_values(tmp_path, ending):
    path = tmp_path / f"x{ending}"
    data = torch.from_numpy(np.random.default_rng(0).integers(0, 50, (1, 16, 16, 16), dtype=np.int16))
    vx.ScalarImage(data).save(path)
    intact = path.read_bytes()
    noticed = 0
    for number in range(60):
        content = bytearray(intact)
        place = len(content) // 3 + number * (len(content) // 2 // 60)
        content[place] ^= 0x5A
        path.write_bytes(content)
        try:
            assert torch.equal(vx.ScalarImage(path).data, data)
        except VoxloomError as error:
            noticed += 1
            assert path.name in str(error)
    assert noticed >= 55  # a few bytes of a compressed stream mean nothing


def test_a_truncated_stack_of_pages_is_noticed(tmp_path):
    path = tmp_path / "x.tif"
    pages = np.random.default_rng(0).integers(0, 255, (20, 30, 40), dtype=np.uint8)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(pages), str(path))
    assert vx.ScalarImage(path).shape == (1, 40, 30, 20)
    assert torch.equal(vx.ScalarImage(path).data[0], torch.from_numpy(pages.transpose(2, 1, 0).copy()))
    intact = path.read_bytes()
    noticed = 0
    for length in range(len(intact) // 10, len(intact) - 1, len(intact) // 10):
        path.write_bytes(intact[:length])
        try:
            # What the end of a file holds may be a remark.
            assert torch.equal(vx.ScalarImage(path).data[0], torch.from_numpy(pages.transpose(2, 1, 0).copy()))
        except VoxloomError as error:
            noticed += 1
            assert "x.tif" in str(error)
    assert noticed >= 9


@pytest.mark.parametrize("tag", [256, 257, 258, 259, 277])
def test_a_page_that_says_nothing_of_its_size_is_an_error(tmp_path, tag):
    path = tmp_path / "x.tif"
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(np.zeros((3, 4, 5), dtype=np.uint8)), str(path))
    content = bytearray(path.read_bytes())
    (first,) = struct.unpack("<I", content[4:8])
    (entries,) = struct.unpack("<H", content[first : first + 2])
    places = [first + 2 + 12 * number for number in range(entries)]
    (place,) = [each for each in places if struct.unpack("<H", content[each : each + 2]) == (tag,)]
    content[place + 4 : place + 8] = bytes(4)  # of how many numbers the entry is
    path.write_bytes(content)
    with pytest.raises(CorruptImageError, match=r"x\.tif.*0 numbers"):
        vx.ScalarImage(path).load()


# MetaImage and NRRD, in one part or more, are compared with their headers


SCAN = np.random.default_rng(1).integers(0, 500, (20, 24, 28), dtype=np.int16)


def detached(folder, ending, compressed):
    """Write a header and a file of voxels; give both."""
    raw = SCAN.tobytes()
    if ending == ".mhd":
        data = folder / ("x.zraw" if compressed else "x.raw")
        data.write_bytes(zlib.compress(raw) if compressed else raw)
        header = (
            "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\n"
            + ("CompressedData = True\n" if compressed else "")
            + f"ElementSpacing = 1 1 1\nDimSize = 28 24 20\nElementType = MET_SHORT\nElementDataFile = {data.name}\n"
        )
    else:
        data = folder / ("x.raw.gz" if compressed else "x.raw")
        data.write_bytes(gzip.compress(raw) if compressed else raw)
        header = (
            "NRRD0004\ntype: short\ndimension: 3\nsizes: 28 24 20\nendian: little\n"
            f"encoding: {'gzip' if compressed else 'raw'}\ndata file: {data.name}\n\n"
        )
    path = folder / f"x{ending}"
    path.write_text(header)
    return path, data


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("ending", [".mhd", ".nhdr"])
def test_voxels_in_a_file_of_their_own(tmp_path, ending, compressed):
    path, data = detached(tmp_path, ending, compressed)
    assert torch.equal(vx.ScalarImage(path).data[0], torch.from_numpy(SCAN.transpose(2, 1, 0).copy()))
    intact = data.read_bytes()
    for damaged in (intact[: len(intact) // 2], intact[:-1], b""):
        data.write_bytes(damaged)
        with pytest.raises(CorruptImageError, match=f"x{ending}.*(early|should be in)"):
            vx.ScalarImage(path).load()
    if compressed:
        noticed = 0
        for place in range(20, len(intact) - 4, len(intact) // 30):
            content = bytearray(intact)
            content[place] ^= 1
            data.write_bytes(content)
            with contextlib.suppress(CorruptImageError):
                vx.ScalarImage(path).load()
                noticed -= 1
            noticed += 1
        assert noticed == len(range(20, len(intact) - 4, len(intact) // 30))
    data.unlink()
    with pytest.raises(CorruptImageError, match=data.name):
        vx.ScalarImage(path).load()


@pytest.mark.parametrize("ending", [".mha", ".nrrd", ".mhd", ".nhdr"])
def test_more_is_claimed_than_there_is(tmp_path, ending):
    if ending in (".mha", ".nrrd"):
        path = tmp_path / f"x{ending}"
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(SCAN), str(path))
    else:
        path, _ = detached(tmp_path, ending, compressed=False)
    intact = path.read_bytes()
    for claim in (b"28 24 21", b"1600 1600 1600", b"99999999999 99999999999 20"):
        assert b"28 24 20" in intact
        path.write_bytes(intact.replace(b"28 24 20", claim))
        with pytest.raises(CorruptImageError, match=f"x{ending} is damaged or truncated"):
            vx.ScalarImage(path).load()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("NDims = 3", "NDims = 1e300"),
        ("NDims = 3", "NDims = -1"),
        ("NDims = 3", "NDims = 4"),
        ("MET_SHORT", "MET_NONSENSE"),
        ("DimSize = 28 24 20", "DimSize = 28 24"),
        ("DimSize = 28 24 20", "DimSize = 28 0 20"),
        ("ElementDataFile = x.raw", "ElementDataFile = x%s%s%s%n.raw 1 3 1"),
        ("ElementDataFile = x.raw", "ElementDataFile = x%d.raw 1 999999999 1"),
        ("ElementDataFile = x.raw", ""),
    ],
)
def test_headers_that_end_the_process_of_itk(tmp_path, old, new):
    path, _ = detached(tmp_path, ".mhd", compressed=False)
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(CorruptImageError, match="x.mhd"):
        vx.ScalarImage(path).load()


def test_lists_and_patterns_of_files(tmp_path):
    path, data = detached(tmp_path, ".mhd", compressed=False)
    raw, size = data.read_bytes(), SCAN[0].nbytes
    for number in range(20):
        (tmp_path / f"slice{number + 1:02d}.raw").write_bytes(raw[number * size : (number + 1) * size])
    expected = torch.from_numpy(SCAN.transpose(2, 1, 0).copy())
    names = "\n".join(f"slice{number + 1:02d}.raw" for number in range(20))
    metaimage = path.read_text()
    nrrd = detached(tmp_path, ".nhdr", compressed=False)[0].read_text()
    for name, text in {
        "a.mhd": metaimage.replace("= x.raw", f"= LIST\n{names}"),
        "b.mhd": metaimage.replace("= x.raw", "= slice%02d.raw 1 20 1"),
        "c.nhdr": nrrd.replace("data file: x.raw\n\n", f"data file: LIST\n{names}\n"),
        "d.nhdr": nrrd.replace("data file: x.raw", "data file: slice%02d.raw 1 20 1"),
    }.items():
        (tmp_path / name).write_text(text)
        assert torch.equal(vx.ScalarImage(tmp_path / name).data[0], expected), name
    (tmp_path / "slice07.raw").write_bytes(b"")
    for name in ("a.mhd", "b.mhd", "c.nhdr", "d.nhdr"):
        with pytest.raises(CorruptImageError, match=r"slice07\.raw"):
            vx.ScalarImage(tmp_path / name).load()


def test_voxels_as_text(tmp_path):
    values = SCAN[:2, :3, :4]
    path = tmp_path / "x.nrrd"
    text = "NRRD0004\ntype: short\ndimension: 3\nsizes: 4 3 2\nencoding: text\n\n" + " ".join(map(str, values.ravel()))
    path.write_text(text)
    assert torch.equal(vx.ScalarImage(path).data[0], torch.from_numpy(values.transpose(2, 1, 0).copy()))
    path.write_text(text.rsplit(" ", 1)[0])
    with pytest.raises(CorruptImageError, match="23 of 24 numbers"):
        vx.ScalarImage(path).load()


def saved(path, affine=None):
    """Save the scan, and give the path."""
    vx.ScalarImage(torch.from_numpy(SCAN[None].copy()), affine=affine).save(path)
    return path


@pytest.mark.parametrize("size", [None, 0, "half", "more"])
def test_compressed_metaimages_say_how_many_bytes_there_are(tmp_path, size):
    """Where they do not, or say another number, ITK gives what is in memory."""
    path = saved(tmp_path / "x.mha")
    head, _, packed = path.read_bytes().partition(b"ElementDataFile = LOCAL\n")
    kept = b"".join(line for line in head.splitlines(True) if not line.startswith(b"CompressedDataSize"))
    assert len(kept) < len(head)
    said = {"half": len(packed) // 2, "more": len(packed) + 1}.get(size, size)
    line = b"" if said is None else f"CompressedDataSize = {said}\n".encode()
    path.write_bytes(kept + line + b"ElementDataFile = LOCAL\n" + packed)
    with pytest.raises(CorruptImageError, match=rf"x\.mha is damaged.*({said} bytes are|CompressedDataSize|end too early)"):
        vx.ScalarImage(path).load()


def test_what_follows_compressed_voxels_does_not_matter(tmp_path):
    path = saved(tmp_path / "x.mha")
    path.write_bytes(path.read_bytes() + b"\n\n")
    assert np.array_equal(vx.ScalarImage(path).data[0], SCAN)


@pytest.mark.parametrize(
    ("lines", "spacing"),
    [
        ('sizes: 3 4 5\nkinds: RGB-color domain domain\nspacings: 1 0.5 0.5\nunits: "" "um" "um"', (5e-4, 5e-4, 1)),
        ('sizes: 3 4 5 6\nkinds: vector domain domain domain\nspacings: nan 1 2 3\nunits: "" "cm" "cm" "m"', (10, 20, 3e3)),
        ('sizes: 3 4 5 6\nspacings: 1 2 3 1.5\nunits: "mm" "cm" "mm" "s"', (1, 20, 3)),
        ('sizes: 3 4 5\nspacings: 1 2 3\nunits: "pixel" "pixel" "pixel"', (1, 2, 3)),
    ],
    ids=["colours", "vectors", "times", "pixels"],
)
def test_units_of_axes_belong_to_their_axes(tmp_path, lines, spacing):
    count = np.prod([int(size) for size in lines.splitlines()[0].split()[1:]])
    head = f"NRRD0004\ntype: uint8\ndimension: {len(lines.splitlines()[0].split()) - 1}\n{lines}\nencoding: raw\n\n"
    (tmp_path / "x.nrrd").write_bytes(head.encode() + bytes(int(count)))
    assert vx.ScalarImage(tmp_path / "x.nrrd").spacing == pytest.approx(spacing)


def test_compressed_metaimages_are_one_stream(tmp_path):
    path = saved(tmp_path / "x.mha")
    head, _, packed = path.read_bytes().partition(b"ElementDataFile = LOCAL\n")
    values = zlib.decompress(packed)
    packed = zlib.compress(values[:1000]) + zlib.compress(values[1000:])
    head = re.sub(rb"CompressedDataSize = \d+", f"CompressedDataSize = {len(packed)}".encode(), head)
    path.write_bytes(head + b"ElementDataFile = LOCAL\n" + packed)
    with pytest.raises(CorruptImageError, match=r"x\.mha has 1000 of \d+ bytes"):
        vx.ScalarImage(path).load()


def test_metaimages_whose_voxels_would_begin_in_their_header(tmp_path):
    path = saved(tmp_path / "x.mha")
    path.write_bytes(path.read_bytes().replace(b"ElementDataFile", b"HeaderSize = 4\nElementDataFile"))
    with pytest.raises(CorruptImageError, match=r"x\.mha is damaged.*4 bytes \(HeaderSize\)"):
        _ = vx.ScalarImage(path).shape


@pytest.mark.parametrize(
    ("ending", "line", "factor"),
    [
        (".nrrd", 'space units: "um" "um" "um"', 1e-3),
        (".nrrd", 'space units: "mm" "mm" "mm"', 1),
        (".nrrd", 'space units: "cm" "cm" "cm"', 10),
        (".mha", "DistanceUnits = um", 1e-3),
        (".mha", "DistanceUnits = ?", 1),
    ],
)
def test_units_of_lengths_count(tmp_path, ending, line, factor):
    affine = np.diag([0.5, 0.6, 0.7, 1])
    affine[:3, 3] = (1, 2, 3)
    path = saved(tmp_path / f"x{ending}", affine)
    before = b"ElementDataFile" if ending == ".mha" else b"endian:"
    path.write_bytes(path.read_bytes().replace(before, f"{line}\n".encode() + before, 1))
    read = vx.ScalarImage(path)
    assert np.allclose(read.affine[:3], affine[:3] * factor)
    assert np.array_equal(read.data[0], SCAN)


def test_a_unit_that_is_no_length_is_named(tmp_path):
    path = saved(tmp_path / "x.nrrd")
    path.write_bytes(path.read_bytes().replace(b"endian:", b'space units: "ell" "ell" "ell"\nendian:'))
    with pytest.raises(UnsupportedImageError, match=r"x\.nrrd has space units 'ell', which is no length that is known \(pixel, "):
        _ = vx.ScalarImage(path).shape


def test_an_encoding_that_cannot_be_read_is_not_called_damage(tmp_path):
    path, _ = detached(tmp_path, ".nhdr", compressed=False)
    path.write_text(path.read_text().replace("encoding: raw", "encoding: bzip2"))
    with pytest.raises(UnsupportedImageError, match=r"x\.nhdr has the encoding bzip2: raw, .*save it as gzip"):
        vx.ScalarImage(path).load()


def test_what_shrinks_to_almost_nothing_is_whole(tmp_path):
    """Many output bytes wait in the decompressor when the file has ended."""
    values = np.zeros((64, 128, 128), np.int16)
    for packed in (gzip.compress(values.tobytes(), 9), gzip.compress(bytes(10**6)) + gzip.compress(values.tobytes()[10**6 :])):
        (tmp_path / "x.raw.gz").write_bytes(packed)
        header = "NRRD0004\ntype: short\ndimension: 3\nsizes: 128 128 64\nendian: little\nencoding: gzip\ndata file: x.raw.gz\n\n"
        (tmp_path / "x.nhdr").write_text(header)
        assert not vx.ScalarImage(tmp_path / "x.nhdr").data.any()


@pytest.mark.parametrize("ending", [".nrrd", ".mha", ".nii", ".mgz"])
def test_a_file_is_found_by_a_path_that_begins_in_the_working_folder(tmp_path, monkeypatch, ending):
    (tmp_path / "scans").mkdir()
    monkeypatch.chdir(tmp_path)
    volume = torch.rand(1, 5, 6, 7)
    vx.ScalarImage(volume).save(f"scans/a{ending}")
    assert vx.ScalarImage(f"scans/a{ending}").data.equal(volume)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_what_stands_between_header_and_voxels_is_not_read_into_memory(tmp_path, ending):
    image = nib.Nifti1Image(np.arange(60, dtype=np.int16).reshape(3, 4, 5), np.eye(4))
    image.header.extensions.append(nib.nifti1.Nifti1Extension(6, bytes(2**25)))
    nib.save(image, tmp_path / f"x{ending}")
    tracemalloc.start()
    try:
        assert vx.ScalarImage(tmp_path / f"x{ending}").data.sum() == 1770
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def test_a_reader_that_crashes_or_fills_the_memory_is_an_error(tmp_path, monkeypatch):
    """Files that only ITK knows are read by a process of their own: here it is told to end, and to take too much."""
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(np.zeros((200, 200, 200), np.uint8)), str(tmp_path / "x.vtk"))
    assert vx.ScalarImage(tmp_path / "x.vtk").data.sum() == 0
    monkeypatch.setattr(isolated, "SPARE_BYTES", 2**20)
    monkeypatch.setattr(isolated, "COPIES", 0)
    with pytest.raises(CorruptImageError, match="x.vtk"):
        vx.ScalarImage(tmp_path / "x.vtk").load()
    monkeypatch.undo()
    script = tmp_path / "crash.py"
    script.write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    monkeypatch.setattr(isolated, "SCRIPT", script)
    with pytest.raises(CorruptImageError, match=r"x\.vtk ended the process that read it"):
        vx.ScalarImage(tmp_path / "x.vtk").load()
    script.write_text("import time; time.sleep(60)")
    monkeypatch.setattr(isolated, "SECONDS", 0.2)
    with pytest.raises(CorruptImageError, match=r"x\.vtk was not read within"):
        vx.ScalarImage(tmp_path / "x.vtk").load()


@pytest.mark.slow
def test_what_a_process_of_its_own_cannot_read_says_why(tmp_path, monkeypatch):
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(np.zeros((3, 4, 5), np.uint8)), str(tmp_path / "x.vtk"))
    (tmp_path / "stored").write_bytes((tmp_path / "x.vtk").read_bytes())
    (tmp_path / "link.vtk").symlink_to("stored")  # as stores of data have it: the name of the link counts
    assert vx.ScalarImage(tmp_path / "link.vtk").data.equal(torch.zeros(1, 5, 4, 3, dtype=torch.uint8))
    odd = tmp_path / os.fsdecode(b"odd_\xff.vtk")
    odd.write_bytes((tmp_path / "x.vtk").read_bytes())
    with pytest.raises(UnsupportedImageError, match="not UTF-8"):
        vx.ScalarImage(odd).load()
    for executable in ("", str(tmp_path / "nothing")):
        monkeypatch.setattr("sys.executable", executable)
        with pytest.raises(UnsupportedImageError, match=r"x\.vtk is read by a process of its own"):
            vx.ScalarImage(tmp_path / "x.vtk").load()
