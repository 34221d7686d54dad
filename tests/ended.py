"""Processes that are gone before some change of the file system, as after a kill: without any cleaning up."""

import multiprocessing
import os
import threading

from voxloom.io.zarr import writing

CHANGES = ("open", "fsync", "rename", "replace", "link", "unlink", "rmdir", "mkdir", "utime")


def is_ended_at(step, call):
    """Call a function in a process that is gone before the change of this number; whether there were so many."""
    process = multiprocessing.get_context("fork").Process(target=_ended_at, args=(step, call))
    process.start()
    process.join(120)
    assert process.exitcode in (0, 9)
    return process.exitcode == 9


def _ended_at(step, call):
    count, lock = 0, threading.Lock()
    writing.MOST_AT_ONCE = 1  # or each run would make its changes in another order

    def until(function):
        def counted(*arguments, **more):
            nonlocal count
            with lock:
                if count == step:
                    os._exit(9)
                count += 1
            return function(*arguments, **more)

        return counted

    for name in CHANGES:
        setattr(os, name, until(getattr(os, name)))
    call()
    os._exit(0)
