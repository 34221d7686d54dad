"""What benchmarks share: systems side by side, each in a process of its own, in rounds that alternate between them."""

import compileall
import contextlib
import functools
import importlib.util
import multiprocessing
import os
import platform
from pathlib import Path

import torch


def machine():
    """Say what the numbers were measured on."""
    return f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, PyTorch {torch.__version__}"


@functools.cache
def compile_as_installed():
    """Compile voxloom where it is used from its source, as pip compiles what it installs: first calls are measured, too."""
    for folder in importlib.util.find_spec("voxloom").submodule_search_locations:
        compileall.compile_dir(folder, quiet=2)


def start(serve, *arguments):
    """Start `serve(*arguments, connection)` in a process, and wait until it sends "ready"; give it, and the pipe to it."""
    compile_as_installed()
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=_serve_with_forks, args=(serve, *arguments, theirs))
    process.start()
    theirs.close()  # so that a process that ends is noticed
    assert pipe.recv() == "ready"
    return process, pipe


def _serve_with_forks(serve, *arguments):
    # As a script on Linux would: workers inherit "spawn" otherwise, and each then takes seconds to import PyTorch.
    multiprocessing.set_start_method("fork", force=True)
    serve(*arguments)


def end(process, pipe):
    """Let a process end that waits for the next round."""
    with contextlib.suppress(OSError):  # it has ended
        pipe.send(False)
    process.join()


def side_by_side(names, rounds, serve, *arguments):
    """Give a list of measurements for each system, in the order of the rounds.

    `serve(name, *arguments, connection)` sends what it measured whenever it receives True, and ends when it receives False.
    """
    started = {name: start(serve, name, *arguments) for name in names}
    results = {name: [] for name in names}
    try:
        for number in range(rounds):
            for name in names if number % 2 else reversed(names):
                started[name][1].send(True)
                results[name].append(started[name][1].recv())
    finally:
        for process, pipe in started.values():
            end(process, pipe)
    return results


def memory_in_kilobytes(entry):
    """Give what the system says of this process, such as its "VmRSS"."""
    with Path("/proc/self/status").open() as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(entry))


def forget_peak():
    """Begin "VmHWM" anew."""
    Path("/proc/self/clear_refs").write_text("5")
