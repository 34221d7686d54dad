"""Examples in docstrings and in the README run as they stand."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import voxloom as vx

ROOT = Path(__file__).parent.parent
MODULES = [module.name for module in pkgutil.walk_packages(vx.__path__, "voxloom.") if not module.name.endswith("__main__")]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    try:
        module = importlib.import_module(name)
    except vx.errors.MissingDependencyError as error:
        pytest.skip(f"{error}; `make test-second` has it")
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert result.failed == 0


@pytest.mark.parametrize("name", vx.__all__)
def test_public_classes_have_an_example(name):
    thing = getattr(vx, name)
    if isinstance(thing, type) and name not in ("ScalarImage", "LabelMap"):
        assert ">>>" in thing.__doc__
        for attribute, value in vars(thing).items():
            if not attribute.startswith("_") and callable(value):
                assert value.__doc__, f"{name}.{attribute} has no docstring"


def test_examples_in_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    phantom = vx.datasets.HeadPhantom((96, 80, 72))
    phantom.t1.save("brain.nii.gz")
    namespace = {}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 9
    for block in blocks:
        exec(block, namespace)
    assert vx.LabelMap("labels.nii.gz").data.unique().tolist() == [0, 1]
    assert vx.LabelMap("lungs.seg.nrrd").spatial_shape == (96, 80, 72)
    assert set(namespace["results"]) == {"labels", "doubt"}
    assert vx.ScalarImage("output.nii.gz").shape == (2, 96, 80, 72)
    assert namespace["embedding"].shape == (1, 12, 10, 9)
    assert int(namespace["partial"].sum()) == 32**3
    assert namespace["checkpoint"] == {"seed": 42, "epoch": 2, "position": 0}


def test_links_in_documents_lead_somewhere():
    for document in ROOT.glob("*.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            assert target.startswith("http") or (ROOT / target).exists(), f"{document.name} links to {target}"


def test_documents_hold_no_placeholders():
    for document in ROOT.glob("*.md"):
        for line in document.read_text().splitlines():
            assert not re.fullmatch(r"[A-Z_]{4,}", line.strip()), f"{document.name}: {line}"
