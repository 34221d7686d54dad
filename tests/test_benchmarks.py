"""Benchmarks run, at a small size; what they measure is no matter of tests."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(f"{name}_benchmark", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_benchmark_for_gpus_runs_on_the_cpu_and_agrees_with_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--device", "cpu", "--size", "24", "--patch", "16", "--width", "2", "--classes", "5", "--rounds", "1"]
    found = load("gpu").main(options)
    assert set(found) == {"dense", "labels"}
    for results in found.values():
        assert set(results) == {"voxloom", "MONAI"}
        assert all(result["seconds"][0] > 0 for result in results.values())
        assert all(result["unlike_cpu"] < 0.01 for result in results.values())
    assert "| voxloom |" in capsys.readouterr().out
    assert (tmp_path / "bench" / "gpu.json").exists()


@pytest.mark.slow
def test_the_benchmark_of_stores_runs(tmp_path):
    options = "--size 64 --patches 2 --patch 24 --patch-sizes 16 --rounds 1 --subjects 2 --draws 2 --parts patches networks"
    subprocess.run([sys.executable, BENCHMARKS / "stores.py", *options.split()], cwd=tmp_path, check=True, timeout=300)
    measured = json.loads((tmp_path / "bench" / "stores.json").read_text())["results"]
    assert set(measured) == {"patches", "networks"}
    assert set(measured["patches"]) >= {"voxloom, Zarr", "voxloom, cache", "tensorstore, Zarr"}


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux says what a tree of processes holds")
def test_the_benchmark_of_efficiency_runs(tmp_path):
    options = "--rounds 1 --sizes tiny --patch 16 --width 2 --steps 1 --systems voxloom --threads 1"
    subprocess.run([sys.executable, BENCHMARKS / "efficiency.py", *options.split()], cwd=tmp_path, check=True, timeout=300)
    (case,) = json.loads((tmp_path / "bench" / "efficiency.json").read_text())["results"].values()
    (found,) = case["voxloom"]
    assert found["dice"] == 1
    assert found["peak MB"] > 100
    assert found["curve"][-1][0] == pytest.approx(found["seconds"], abs=1e-3)
    assert (tmp_path / "bench" / "efficiency.png").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux says what a tree of processes holds")
def test_the_benchmark_of_machines_runs(tmp_path):
    options = "--shape 64 32 32 --part 32 32 32 --patch 16 --overlap 8 --width 2 --free 128 --rounds 1"
    command = [sys.executable, BENCHMARKS / "machines.py", *options.split(), "--systems", "one process", "array jobs, 1"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=300)
    found = json.loads((tmp_path / "bench" / "machines.json").read_text())
    (alone,), (jobs,) = found["rounds"].values()
    assert alone["patches"] == 7 * 3 * 3
    assert found["planned"][1] <= jobs["patches"] <= found["planned"][1] + 1
    assert found["parts"].keys() == {"array jobs, 1"}
    assert jobs["difference"] == alone["difference"] < 0.5


def test_the_figures_of_scale_follow_from_the_plan(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    found = load("scale").main([])
    assert found["results"]["a hundred teravoxels"]["parts"] > 700_000
    assert found["planning"]["parts"] > 10**7
    assert found["planning"]["megabytes"] < 50


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux says what the peak of a process was")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("aggregation", "--size 64 --patch 32 --overlap 16 --rounds 1 --modes gaussian --systems voxloom voxloom.predict"),
        ("prediction", "--size 48 --patch 32 --overlap 16 --rounds 1 --classes 3 --systems voxloom"),
        ("prediction", "--large --large-shape 40 48 64 --patch 32 --large-classes 3"),
        ("network", "--network 2 --shape 40 40 40 --patch 32 --overlap 16 --batch 2 --rounds 1 --systems voxloom.predict"),
    ],
)
def test_benchmarks_that_compare_processes_run(tmp_path, name, options):
    subprocess.run([sys.executable, BENCHMARKS / f"{name}.py", *options.split()], cwd=tmp_path, check=True)
    measured = json.loads((tmp_path / "bench" / f"{name}.json").read_text())["results"]
    if "large" in measured:
        assert measured["large"]["megabytes"] <= 1.15 * measured["large"]["planned"]
    elif name == "network":
        assert [call["patches"] for call in measured["voxloom.predict"][0]] == [8, 8]
    elif name == "prediction":
        assert [found["wrong"] for found in measured["labels"]["voxloom"]] == [0]
    else:
        assert all(found[0]["error"] < 1e-5 for found in measured["gaussian"].values())
