"""Cases that nnU-Net has preprocessed are read patch by patch, without running what their pickles bring."""

import os
import pickle

import blosc2
import numpy as np
import pytest
import torch
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

import voxloom as vx
from voxloom.errors import CorruptImageError, ImageFileError, ImageNotFoundError, SubjectError
from voxloom.integrations.nnunet_cases import preprocessed_cases, properties_of


@pytest.fixture
def folder(tmp_path):
    for number in range(2):
        rng = np.random.default_rng(number)
        data = rng.normal(size=(2, 40, 36, 30)).astype(np.float32)
        seg = (data[:1] > 1).astype(np.int8)
        seg[:, 0] = -1
        properties = {"spacing": [2.0, 1.5, 1.0], "class_locations": {1: np.argwhere(seg == 1)[:50]}, "shape": (40, 36, 30)}
        name = str(tmp_path / f"case_{number:03d}")
        nnUNetDatasetBlosc2.save_case(
            data,
            seg,
            properties,
            name,
            chunks=(2, 20, 18, 15),
            blocks=(1, 10, 9, 8),
            chunks_seg=(1, 20, 18, 15),
            blocks_seg=(1, 10, 9, 8),
        )
    return tmp_path


def test_cases_are_as_nnunet_wrote_them(folder):
    subjects = preprocessed_cases(folder).dry_iter()
    theirs = nnUNetDatasetBlosc2(str(folder))
    assert [subject.case for subject in subjects] == ["case_000", "case_001"]
    for subject in subjects:
        data, seg, _, properties = theirs.load_case(subject.case)
        assert not subject["image"].is_loaded
        assert subject["image"].spacing == tuple(properties["spacing"])
        assert np.array_equal(subject["image"].data.numpy(), data[:])
        assert np.array_equal(subject.labels.data.numpy(), seg[:])
        assert subject.labels.dtype == torch.int8
    assert [subject.case for subject in preprocessed_cases(folder, ["case_001"])] == ["case_001"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_queue_reads_only_the_patches_that_it_draws(folder, workers):
    cases = preprocessed_cases(folder)
    mixed = vx.MixedSampler([(1, vx.LabelSampler(12, "labels", {1: 1})), (2, vx.UniformSampler(12))])
    queue = vx.Queue(cases, 8, 6, mixed, seed=0, num_workers=workers)
    theirs = nnUNetDatasetBlosc2(str(folder))
    count = 0
    for patch in queue:
        data, seg, _, _ = theirs.load_case(patch.case)
        slices = (slice(None), *patch.patch_location.box.slices)
        assert np.array_equal(patch["image"].data.numpy(), data[slices])
        assert np.array_equal(patch.labels.data.numpy(), seg[slices])
        count += 1
    queue.close()
    assert count == 12
    assert not any(image.is_loaded for subject in cases.dry_iter() for image in subject.images.values())


def test_properties_run_nothing(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    (tmp_path / "evil.pkl").write_bytes(pickle.dumps({"spacing": Evil()}))
    with pytest.raises(CorruptImageError, match=r"evil.pkl cannot be read: it holds posix.system"):
        properties_of(tmp_path / "evil.pkl")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "list.pkl").write_bytes(pickle.dumps([1]))
    with pytest.raises(CorruptImageError, match="holds a list"):
        properties_of(tmp_path / "list.pkl")


def test_what_is_missing_or_damaged_is_named(folder, tmp_path_factory):
    with pytest.raises(SubjectError, match="no case of nnU-Net's"):
        preprocessed_cases(tmp_path_factory.mktemp("empty"))
    with pytest.raises(ImageNotFoundError, match=r"the case 'case_009' has no .*case_009.b2nd; there are case_000, case_001"):
        preprocessed_cases(folder, ["case_009"])
    path = folder / "case_000.b2nd"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ImageFileError, match=r"case_000.b2nd"):
        preprocessed_cases(folder)[0]["image"].load()
    blosc2.asarray(np.zeros((2, 3)), urlpath=str(folder / "flat.b2nd"))
    with pytest.raises(ImageFileError, match=r"shape \(2, 3\)"):
        _ = vx.ScalarImage(folder / "flat.b2nd").shape
