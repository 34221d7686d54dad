"""Benchmarks run, at a small size; what they measure is no matter of tests."""

import importlib.util
from pathlib import Path

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(f"{name}_benchmark", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
