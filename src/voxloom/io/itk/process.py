"""Reads one file with SimpleITK, in a process of its own: run by `isolated.py`, and imports nothing of voxloom.

It takes a line of JSON: the path, the bytes of memory that it may take beyond what it begins with, and a file to write the
voxels to, or null for the header alone. It answers with a line of JSON.
"""

import json
import sys
from pathlib import Path
from typing import Any

import SimpleITK


def bound_memory(spare: int) -> None:
    """Let requests for more than this fail, where the system can do that."""
    try:
        import resource
    except ImportError:
        return
    try:
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:
        return
    resource.setrlimit(resource.RLIMIT_AS, (held + spare, resource.getrlimit(resource.RLIMIT_AS)[1]))


def answer(path: str, spare: int, target: str | None) -> dict[str, Any]:
    """Read the header, and write the voxels into the target if there is one."""
    SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    bound_memory(spare)
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(path)
    reader.ReadImageInformation()
    header = {
        "kind": reader.GetImageIOFromFileName(path),
        "size": reader.GetSize(),
        "components": reader.GetNumberOfComponents(),
        "pixel": SimpleITK.GetPixelIDValueAsString(reader.GetPixelID()),
        "direction": reader.GetDirection(),
        "spacing": reader.GetSpacing(),
        "origin": reader.GetOrigin(),
    }
    if target is not None:
        image = reader.Execute()
        voxels = SimpleITK.GetArrayViewFromImage(image)  # of memory that is the image's
        header["dtype"] = str(voxels.dtype)
        voxels.tofile(target)
    return header


if __name__ == "__main__":
    try:
        said = answer(**json.loads(sys.stdin.readline()))
    except (RuntimeError, MemoryError, ValueError, OSError) as error:
        said = {"error": str(error) or type(error).__name__}
    print(json.dumps(said))
