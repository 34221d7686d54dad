"""The scripts of docs/scale.md on a cluster of SLURM of one node, which the tests start themselves."""

import getpass
import os
import re
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

import voxloom as vx
from parts_models import three

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
PAGE = Path(__file__).parents[2] / "docs" / "scale.md"
SECONDS = 150

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(shutil.which, PROGRAMS)), reason="SLURM is not installed: apt-get install slurmctld slurmd slurm-client munge"
    ),
    pytest.mark.skipif(getpass.getuser() != "root", reason="a node of SLURM's is started by root alone"),
    pytest.mark.xdist_group("slurm"),
]

CONFIGURATION = """
    ClusterName=test
    SlurmctldHost={host}(127.0.0.1)
    SlurmUser=root
    SlurmdUser=root
    SlurmctldPort={ports[0]}
    SlurmdPort={ports[1]}
    AuthType=auth/munge
    AuthInfo=socket={folder}/munge.socket
    StateSaveLocation={folder}/state
    SlurmdSpoolDir={folder}/spool
    SlurmctldPidFile={folder}/slurmctld.pid
    SlurmdPidFile={folder}/slurmd.pid
    SlurmctldLogFile={folder}/slurmctld.log
    SlurmdLogFile={folder}/slurmd.log
    ProctrackType=proctrack/linuxproc
    TaskPlugin=task/none
    SelectType=select/cons_tres
    SelectTypeParameters=CR_Core
    JobAcctGatherType=jobacct_gather/none
    MpiDefault=none
    ReturnToService=2
    SchedulerParameters=batch_sched_delay=0,sched_interval=1,requeue_delay=0
    NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=4000 State=UNKNOWN
    PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    found = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return found


def run(*command, check=True):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


def wait_for(condition, what):
    ends = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < ends, what()
        time.sleep(0.2)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A controller and one node; what talks to them finds them by SLURM_CONF."""
    folder, host = tmp_path_factory.mktemp("slurm"), socket.gethostname().partition(".")[0]
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o600)
    text = textwrap.dedent(CONFIGURATION).format(folder=folder, host=host, ports=free_ports(2))
    (folder / "slurm.conf").write_text(text)
    environment = pytest.MonkeyPatch()
    environment.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    files = [f"--{name}={folder}/munge.{ending}" for name, ending in (("socket", "socket"), ("key-file", "key"))]
    files += [f"--{name}={folder}/munge.{ending}" for name, ending in (("pid-file", "pid"), ("log-file", "log"))]
    daemons = [
        ["munged", "--foreground", "--force", f"--seed-file={folder}/munge.seed", *files],
        ["slurmctld", "-D", "-c"],
        ["slurmd", "-D", "-N", host],
    ]
    started = []
    try:
        for command in daemons:
            with (folder / f"{command[0]}.out").open("wb") as out:
                started.append(subprocess.Popen(command, stdout=out, stderr=out))
            if command[0] == "munged":
                wait_for((folder / "munge.socket").exists, (folder / "munged.out").read_text)
        wait_for(lambda: "idle" in run("sinfo", "-h", "-o", "%t", check=False), lambda: run("sinfo", check=False))
        yield folder
        run("scancel", "--full", "--user=root", check=False)
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(20)
        environment.undo()


@pytest.fixture
def here(tmp_path, monkeypatch, cluster):
    """A folder with an image, a model and the command as a cluster would find it."""
    monkeypatch.chdir(tmp_path)
    data = torch.rand(1, 60, 52, 44, generator=torch.Generator().manual_seed(1))
    vx.convert(vx.ScalarImage(data), "big.ome.zarr", chunks=16)
    (tmp_path / "models.py").write_text(
        "import time\nimport parts_models\n\ndef three(batch):\n    time.sleep(0.01)\n    return parts_models.three(batch)\n"
    )
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "voxloom"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m voxloom "$@"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[1]}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


OPTIONS = ("--patch-size", "16", "--shard-size", "32")


def adapted(text):
    """Put the models and options of the tests into a line of the documentation."""
    text = text.replace("model.pt2", "models:three").replace("--device cuda ", "")
    return text.replace("--labels ", f"--labels {' '.join(OPTIONS)} ")


def data_of(path):
    return vx.LabelMap(path).data


def expected():
    return vx.predict(three, "big.ome.zarr", patch_size=16, reduce="argmax").data


def ended(job):
    return not run("squeue", "-h", "--jobs", job, "--states=all", "-o", "%T", check=False).replace("COMPLETED", "").strip()


def test_the_script_for_array_jobs_runs_and_may_be_requeued(here):
    (script,) = re.findall(r"```bash\n(#!/bin/bash\n.*?)```", PAGE.read_text(), re.DOTALL)
    Path("job.sh").write_text(adapted(script))
    # What the node of the tests has no more of.
    less = ("--array=0-3", "--gres=none", "--cpus-per-task=1", "--mem=100M")
    job = run("sbatch", "--parsable", *less, "--output=%a.log", "job.sh")
    logs = lambda: "\n".join(f"{path.name}: {path.read_text()}" for path in here.glob("*.log"))  # noqa: E731
    records = lambda: list(here.rglob("*.json"))  # noqa: E731
    before = len(records())
    wait_for(lambda: len(records()) > before + 2 or ended(job), logs)
    run("scontrol", "requeue", f"{job}_1", check=False)  # in the midst of it, or not yet begun
    wait_for(lambda: ended(job), lambda: logs() + run("squeue", "--states=all"))
    made = here / "big.ome.zarr" / "labels" / "organs"
    assert made.exists(), logs()
    assert torch.equal(data_of(made), expected())
    assert not [path.name for path in made.parent.iterdir() if path.name.startswith(".")]
    assert "all" in run("voxloom", "status", made) or "complete" in run("voxloom", "status", made)


def test_workers_of_dask_are_jobs(here, monkeypatch):
    (line,) = [line.strip() for line in PAGE.read_text().splitlines() if line.strip().endswith("--dask slurm:16")]
    (here / "dask").mkdir()
    (here / "dask" / "jobqueue.yaml").write_text(
        textwrap.dedent(f"""
            jobqueue:
              slurm:
                cores: 1
                memory: 1GB
                processes: 1
                walltime: "00:10:00"
                interface: lo
                python: {sys.executable}
                death-timeout: 60
                log-directory: {here}
        """)
    )
    monkeypatch.setenv("DASK_CONFIG", str(here / "dask"))
    command = adapted(line.removeprefix("voxloom ").replace("slurm:16", "slurm:2"))
    done = subprocess.run(["voxloom", *command.split()], capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stdout + done.stderr + "\n".join(path.read_text() for path in here.glob("*.out"))
    assert torch.equal(data_of("out.ome.zarr"), expected())
    assert len(list(here.glob("dask-worker-*.out"))) == 2  # as many jobs ran
