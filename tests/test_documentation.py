"""Examples in docstrings and in the README run as they stand."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import voxloom as vx
from slow import slow

ROOT = Path(__file__).parent.parent
MODULES = [module.name for module in pkgutil.walk_packages(vx.__path__, "voxloom.") if not module.name.endswith("__main__")]


@pytest.mark.parametrize("name", [slow(name) if name == "voxloom.testing" else name for name in MODULES])
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


PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


def blocks_of(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


def run(page, folder, monkeypatch):
    """Run the blocks of a page one after the other, as a reader would, in a folder with a scan."""
    monkeypatch.chdir(folder)
    vx.datasets.HeadPhantom((96, 80, 72)).t1.save("brain.nii.gz")
    namespace = {"__name__": "page"}
    for block in blocks_of(page):
        exec(block, namespace)
    return namespace


@pytest.mark.filterwarnings("ignore")  # of the peers' own
@pytest.mark.parametrize("page", [page if page == "README.md" else slow(page) for page in PAGES if blocks_of(page)])
def test_examples_on_pages(page, tmp_path, monkeypatch):
    if any("needs lightning" in block for block in blocks_of(page)):
        pytest.importorskip("lightning", reason="Lightning is in an environment of its own: make test-second")
    run(page, tmp_path, monkeypatch)


@pytest.mark.slow
def test_examples_give_what_the_text_says(tmp_path, monkeypatch):
    run("README.md", tmp_path, monkeypatch)
    assert vx.LabelMap("labels.nii.gz").data.unique().tolist() == [0, 1]
    found = run("docs/howto/patches.md", tmp_path, monkeypatch)
    assert vx.ScalarImage("output.nii.gz").shape == (2, 96, 80, 72)
    assert found["embedding"].shape == (1, 12, 10, 9)
    assert int(found["partial"].sum()) == 32**3
    assert run("docs/tutorials/training.md", tmp_path, monkeypatch)["checkpoint"] == {"seed": 42, "epoch": 2, "position": 0}
    assert set(run("docs/predict.md", tmp_path, monkeypatch)["results"]) == {"labels", "doubt"}
    run("docs/howto/specs.md", tmp_path, monkeypatch)
    assert vx.LabelMap("lungs.seg.nrrd").spatial_shape == (96, 80, 72)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_every_page_is_in_the_contents():
    contents = (ROOT / "docs" / "index.md").read_text()
    for page in PAGES:
        name = page.removeprefix("docs/").removesuffix(".md")
        assert page in ("README.md", "docs/index.md") or f"\n{name}\n" in contents, name


def test_every_public_name_is_in_the_reference():
    reference = (ROOT / "docs" / "reference.md").read_text()
    modules = {"data", "datasets", "errors", "inference", "integrations", "loader", "plot"}
    names = [name for name in vx.__all__ if not name.isupper() and not name.startswith("_") and name not in modules]
    assert [name for name in names if f"voxloom.{name}\n" not in reference] == []


def test_links_in_documents_lead_somewhere():
    for document in ROOT.glob("*.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            assert target.startswith("http") or (ROOT / target).exists(), f"{document.name} links to {target}"


def test_documents_hold_no_placeholders():
    for document in ROOT.glob("*.md"):
        for line in document.read_text().splitlines():
            assert not re.fullmatch(r"[A-Z_]{4,}", line.strip()), f"{document.name}: {line}"
