"""Rooms import one way, the public names are known, and a light import stays light."""

import ast
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

import voxloom as vx
from voxloom import errors

PACKAGE = Path(vx.__file__).parent
ROOT = Path(__file__).parent.parent
LEVELS = {
    "errors": 0,
    "_version": 0,
    "core": 1,
    "runtime": 2,
    "io": 3,
    "volumes": 4,
    "sampling": 5,
    "datasets": 5,
    "aggregation": 6,
    "training": 6,
    "models": 6,
    "runs": 7,
    "inference": 8,
    "integrations": 9,
    "plotting": 9,
    "testing": 9,
    "data": 10,
    "loader": 10,
    "plot": 10,
    "cli": 10,
    "__main__": 11,
    "__init__": 11,
}
# What touches the process, and so has no place in the room that is pure.
IMPURE = ("ctypes", "mmap", "multiprocessing", "os", "subprocess", "tempfile", "threading", "concurrent", "pathlib", "socket")


def imported_rooms(source, parts):
    """Rooms that a module imports, given its path in the package as parts."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = list(parts[: len(parts) - node.level])
            path = base + (node.module.split(".") if node.module else [])
            yield from [path[0]] if path else [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "voxloom":
            yield from node.module.split(".")[1:2] or [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "voxloom":
                    yield [*alias.name.split("."), "__init__"][1]


def violations(source, parts):
    room = parts[0].removesuffix(".py")
    for other in imported_rooms(source, parts):
        if other.startswith("__") and other != "__init__":
            continue
        if other != room and LEVELS[other] >= LEVELS[room]:
            yield f"{'/'.join(parts)} imports {other}"


def test_rooms_import_one_way():
    found = []
    for path in PACKAGE.rglob("*.py"):
        found += violations(path.read_text(), path.relative_to(PACKAGE).parts)
    assert found == []


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("from ..volumes.image import Image", ("core", "grids.py")),
        ("from voxloom.cli import main", ("core", "grids.py")),
        ("import voxloom.inference", ("volumes", "image.py")),
        ("def f():\n    from ...sampling import grid", ("volumes", "inner", "base.py")),
        ("from . import cli", ("data.py",)),
        ("from ..training import queue", ("models", "running.py")),
        ("from ..volumes.image import Image", ("io", "formats.py")),
        ("from ..io.protocols import VolumeSource", ("runtime", "limits.py")),
        ("from ..inference.plan import PredictionPlan", ("runs", "log.py")),
    ],
)
def test_the_test_of_rooms_can_fail(source, parts):
    assert list(violations(source, parts))


def impure_imports(source):
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
        yield from (name for name in names if name.split(".")[0] in IMPURE)


def test_the_core_is_pure():
    found = {path.name: list(impure_imports(path.read_text())) for path in (PACKAGE / "core").rglob("*.py")}
    assert {name: names for name, names in found.items() if names} == {}


@pytest.mark.parametrize("source", ["import os", "from threading import Lock", "import multiprocessing.connection as c"])
def test_the_test_of_purity_can_fail(source):
    assert list(impure_imports(source))


@pytest.mark.skipif(not (ROOT / "ARCHITECTURE.md").exists(), reason="the source distribution has not all documents")
def test_files_that_the_documents_name_are_there():
    files = [path.as_posix() for folder in ("src", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    for document in ("ARCHITECTURE.md", "CONTRIBUTING.md"):
        named = re.findall(r"`([a-z0-9_/]+\.py)`", (ROOT / document).read_text(encoding="utf-8"))
        assert named
        assert [name for name in named if not any(path.endswith(f"/{name}") for path in files)] == []


def test_public_names():
    assert sorted(vx.__all__, key=lambda name: (not name.isupper(), not name[0].isupper(), name)) == [
        "AFFINE",
        "CHANNELS_DIMENSION",
        "DATA",
        "INTENSITY",
        "LABEL",
        "LOCATION",
        "PATH",
        "SAMPLING_MAP",
        "STEM",
        "TYPE",
        "ArraySource",
        "Compose",
        "Crop",
        "Gaussian",
        "GridAggregator",
        "GridSampler",
        "Image",
        "ImagesBatch",
        "Intensity",
        "Label",
        "LabelMap",
        "LabelSampler",
        "MixedSampler",
        "ModelSpec",
        "PatchAggregator",
        "PatchGrid",
        "PatchLocation",
        "PatchSampler",
        "PredictionPlan",
        "Predictor",
        "Queue",
        "Regions",
        "ScalarImage",
        "SpaceCodes",
        "Subject",
        "SubjectsBatch",
        "SubjectsCache",
        "SubjectsDataset",
        "SubjectsLoader",
        "UniformSampler",
        "VolumeSource",
        "VolumeSpec",
        "VolumeStore",
        "WeightedSampler",
        "ZarrStore",
        "__version__",
        "as_image",
        "build_index",
        "convert",
        "data",
        "datasets",
        "errors",
        "inference",
        "integrations",
        "kept_memory",
        "load_model",
        "loader",
        "open_zarr",
        "plan",
        "plot",
        "predict",
        "save_model",
        "set_chunk_cache",
        "split_labels",
        "stored_dicom",
        "write_label_table",
    ]
    for name in vx.__all__:
        assert getattr(vx, name) is not None


HEAVY = ("matplotlib", "zarr", "dask", "distributed", "torchio", "monai", "nnunetv2", "pooch", "tensorstore", "lightning")


def heavy_imports(statement):
    code = f"import sys; {statement}; print([name for name in {HEAVY!r} if name in sys.modules])"
    return ast.literal_eval(subprocess.check_output([sys.executable, "-c", code], text=True))


def test_a_light_import_stays_light():
    assert heavy_imports("import voxloom, voxloom.cli") == []


def test_a_loop_by_hand_does_not_wait_for_what_predict_needs():
    used = "import sys, voxloom as vx; vx.GridSampler, vx.GridAggregator, vx.SubjectsLoader"
    code = f"{used}; print('voxloom.inference' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"


NAMING = """
import json, os, sys, torch, voxloom as vx

readers = ("nibabel", "pydicom", "SimpleITK")
image = vx.ScalarImage(torch.zeros(1, 8, 8, 8))
vx.Predictor(torch.nn.Identity(), 4)(image)
vx.Predictor(torch.nn.Identity(), 4)(vx.Subject(t1=image, name="x"))
for name in ["", *sys.argv[1:]]:
    sys.stdout.flush()
    if not os.fork():
        if name:
            vx.ScalarImage(name)
        print(json.dumps([name, [each for each in readers if each in sys.modules]]), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process for each name is forked")
def test_libraries_that_read_files_are_imported_when_a_file_is_named(tmp_path):
    """Workers that are forked later have them then, and need not import them each."""
    folders = ("series", "zarr", "x.ome.zarr/labels/organs")
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
    for folder in ("zarr", "x.ome.zarr"):
        (tmp_path / folder / "zarr.json").touch()
    files = ("x.nii.gz", "x.nii.zarr", "x.nrrd", "x.dcm", "x.png", "x")
    for name in files:
        (tmp_path / name).touch()
    command = [sys.executable, "-c", NAMING, *files, *folders]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    found = dict(map(json.loads, told.splitlines()))
    nibabel, itk = ["nibabel", "pydicom"], ["SimpleITK"]
    assert found == {
        "": [],
        "x.nii.gz": nibabel,
        "x.nii.zarr": nibabel,
        "x.nrrd": itk,
        **{name: ["pydicom", *itk] for name in ("x.dcm", "x.png", "x", "series")},
        **{name: [] for name in ("zarr", "x.ome.zarr/labels/organs")},
    }


def test_the_test_of_light_imports_can_fail():
    assert heavy_imports("import voxloom, matplotlib") == ["matplotlib"]


@pytest.mark.parametrize("name", errors.__all__)
def test_every_error_crosses_processes_with_its_type_and_message(name):
    kind = getattr(errors, name)
    error = kind("what, value, rule\nand the way out")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert str(again) == str(error) == "what, value, rule\nand the way out"
    assert issubclass(kind, errors.VoxloomError)
    # Dask, or whatever uses tblib, makes the error anew without calling it.
    anew = kind.__new__(kind, *error.args)
    assert (type(anew), str(anew)) == (kind, str(error))
    # A loader's worker makes the error anew from its type and one text.
    assert str(kind("text")) == "text"


def test_the_table_of_errors_names_all_of_them_and_what_else_they_are():
    for name in errors.__all__:
        line = next(line for line in errors.__doc__.splitlines() if f" {name}" in f" {line.strip('│├└─ ')}")
        kind = getattr(errors, name)
        for builtin in ("ValueError", "TypeError", "KeyError", "RuntimeError", "OSError", "ImportError", "FileNotFoundError"):
            if f" {builtin}" in line:
                assert issubclass(kind, getattr(__builtins__, builtin, None) or __builtins__[builtin])


COLLECTING = """
import gc, torch

found = []
gc.callbacks.append(lambda phase, info: found.append(info) if phase == "start" and info["generation"] == 2 else None)
import voxloom as vx

vx.predict, vx.Queue, vx.GridAggregator
assert gc.isenabled()
gc.callbacks.clear()
print(found)
"""


def test_importing_does_not_look_for_garbage_among_all_that_there_is():
    assert subprocess.check_output([sys.executable, "-c", COLLECTING], text=True) == "[]\n"
