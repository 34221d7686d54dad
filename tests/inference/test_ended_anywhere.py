"""A prediction whose process ends before any change of the file system: the same call gives the same bits, and leaves nothing."""

import shutil

import pytest
import torch

import voxloom as vx
from ended import is_ended_at
from parts_models import three
from slow import slow
from voxloom.errors import TargetExistsError

OPTIONS = {"patch_size": 16, "patch_overlap": 8, "reduce": "argmax", "model_name": "three"}
SOME = [("a.nii.gz", False, 4), ("a.ome.zarr", True, 53)]
MORE = [
    ("a.nii", True, 5),
    ("a.ome.zarr", True, 29),
    ("a.nii.gz", True, 1),
    ("a.seg.nrrd", False, 2),
    ("a.ome.zarr", False, 7),
    ("scan.ome.zarr/labels/a", False, 23),
]


@pytest.mark.parametrize(("name", "replaces", "every"), SOME + [slow(*each) for each in MORE])
@pytest.mark.filterwarnings("ignore:.*an unfinished run is resumed")
def test_the_same_call_goes_on(tmp_path, name, replaces, every):
    image = vx.ScalarImage(torch.rand(1, 40, 18, 16, generator=torch.Generator().manual_seed(0)))
    expected = vx.predict(three, image, **OPTIONS).data
    folder, kept = tmp_path / "folder", tmp_path / "kept"
    folder.mkdir()
    vx.convert(image, folder / "scan.ome.zarr", levels=2, chunks=8)
    path, predictor = folder / name, vx.Predictor(three, **OPTIONS)
    if replaces:
        vx.predict(three, image, 16, 4, reduce="argmax", model_name="three", output=path)

    def call():
        output = vx.ZarrStore(path, overwrite=replaces, chunks=8) if ".zarr" in name else path
        predictor(image, output=output, overwrite=replaces)

    folder.rename(kept)
    ended = 0
    for step in range(0, 1000, every):
        shutil.copytree(kept, folder)
        if not is_ended_at(step, call):
            break
        ended += 1
        try:
            is_made = predictor.is_made(image, output=path)
        except TargetExistsError:
            assert replaces  # what was there before
            is_made = False
        if not is_made:
            call()
        assert predictor.is_made(image, output=path)
        assert torch.equal(vx.LabelMap(path).data, expected)
        assert [each.name for each in path.parent.iterdir() if each.name.startswith(".")] == []
        shutil.rmtree(folder)
    assert ended > 3
