"""Scripts in processes that have done nothing but import: forked from one that has, which is 20 times as quick as a new one."""

import functools
import json
import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

MODULES = "import torch, voxloom as vx; [getattr(vx, name) for name in vx.__all__]"

LOOP = """
import json, os, sys
for request in sys.stdin:
    request = json.loads(request)
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
else:
    sys.exit()
os.chdir(request["cwd"])
sys.argv = ["-c", *request["arguments"]]
for descriptor, path in ((0, os.devnull), (1, request["out"]), (2, request["errors"])):
    os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), descriptor)
exec(compile(request["script"], "<script>", "exec"), {"__name__": "__main__"})
"""


@functools.cache
def _server(process):
    """Start what is forked from, once for each process that runs tests."""
    # Dask leaves a variable of this kind behind where it has started a cluster.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": inherited}
    return subprocess.Popen([sys.executable, "-c", f"{MODULES}\n{LOOP}"], **pipes)


def run(script, *arguments, cwd=None):
    """Run a script, and give its exit code, what it printed, and what it printed as errors."""
    server = _server(os.getpid())
    with tempfile.TemporaryDirectory() as folder:
        out, errors = Path(folder) / "out", Path(folder) / "errors"
        request = {"script": textwrap.dedent(script), "arguments": list(map(str, arguments)), "cwd": str(cwd or Path.cwd())}
        server.stdin.write(json.dumps(request | {"out": str(out), "errors": str(errors)}) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        return code, out.read_text(), errors.read_text()


def printed(script, *arguments, cwd=None):
    """Run a script that ends well, and give what it printed."""
    code, out, errors = run(script, *arguments, cwd=cwd)
    assert code == 0, errors
    return out
