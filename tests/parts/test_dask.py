"""Parts on a Dask cluster of real processes: the same bytes, also where workers are lost, hang, or the client is gone."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_parts import OPTIONS, fails, hashes, leftovers, store

import voxloom as vx
from parts_models import Hangs, Slow, three
from voxloom.errors import ModeError, ShardError
from voxloom.integrations import dask
from voxloom.integrations.dask import DaskLauncher, client_of
from voxloom.runs.parts import status_of

pytestmark = pytest.mark.filterwarnings("ignore")  # of Dask's own, where workers are killed


@pytest.fixture(scope="module")
def cluster():
    from distributed import LocalCluster

    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as running:
        yield running


@pytest.fixture
def client(cluster):
    from distributed import Client

    with Client(cluster) as connected:
        yield connected


@pytest.fixture
def scan(tmp_path):
    vx.ScalarImage(torch.rand(1, 44, 40, 36, generator=torch.Generator().manual_seed(0))).save(tmp_path / "scan.nii")
    vx.predict(three, tmp_path / "scan.nii", output=store(tmp_path / "serial.ome.zarr"), **OPTIONS)
    return tmp_path / "scan.nii"


def predicted(scan, executor, model=three):
    target = scan.with_name("parts.ome.zarr")
    vx.predict(model, scan, output=store(target), executor=executor, **OPTIONS)
    assert hashes(target) == hashes(scan.with_name("serial.ome.zarr"))
    assert leftovers(scan.parent) == []


def test_a_client_is_an_executor(scan, client):
    predicted(scan, client)


@pytest.mark.slow
def test_another_model_on_the_same_workers(scan, client):
    for factor in (2.0, 3.0):
        model = torch.nn.Conv3d(1, 1, 1, bias=False)
        torch.nn.init.constant_(model.weight, factor)
        options = {"patch_size": 12, "model_name": "same", "overlap_mode": "crop", "output": scan.with_name("o.nii")}
        made = vx.predict(model, scan, overwrite=True, executor=client, **options)
        assert torch.equal(made.data, vx.ScalarImage(scan).data * factor)


@pytest.mark.slow
def test_many_images_are_spread_over_the_workers(cluster, client, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NOTES", str(tmp_path))
    client.wait_for_workers(2, timeout=60)
    client.run(lambda: os.environ.update(NOTES=str(tmp_path)))
    (tmp_path / "scans").mkdir()
    images = [torch.rand(1, 12, 12, 10 + number) for number in range(4)]
    for number, data in enumerate(images):
        vx.ScalarImage(data).save(tmp_path / "scans" / f"{number}.nii")
    options = ["-o", "out", "--patch-size", 8, "--dask", cluster.scheduler_address]
    states = json.loads(run("predict", "--json", "parts_models:noted", "scans", *options).out)
    assert [each["state"] for each in states] == ["done"] * 4
    for number, data in enumerate(images):
        assert torch.allclose(vx.ScalarImage(tmp_path / "out" / f"{number}.nii.gz").data, data * 2)
    # What fails where nothing is computed yet is said as well.
    client.run(lambda: os.environ.pop("NOTES"))
    failed = json.loads(run("predict", "--json", "parts_models:noted", "scans", *options, "--overwrite", code=1).out)
    assert all("KeyError: 'NOTES'" in each["error"] for each in failed)
    computed = {int(path.name) for path in tmp_path.iterdir() if path.name.isdecimal()} - {os.getpid()}
    assert len(computed) == 2  # both workers


@pytest.mark.slow
def test_workers_that_are_killed(scan, cluster, client):
    stopping, killed = threading.Event(), []

    def kill():
        for number in range(3):
            if stopping.wait(4):  # a nanny starts another worker, which takes a while
                return
            worker = list(cluster.workers.values())[number % 2]
            if worker.pid is not None:
                killed.append(worker.pid)
                os.kill(worker.pid, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        predicted(scan, DaskLauncher(client, attempts=30, shard_size=16), Slow())
    finally:
        stopping.set()
        thread.join()
    assert killed


@pytest.mark.slow
def test_a_worker_that_hangs(scan, client, tmp_path):
    predicted(scan, DaskLauncher(client, timeout=20, shard_size=16), Hangs(str(tmp_path / "hung")))
    assert (tmp_path / "hung").exists()


class Sent:
    """A part that is answered, or of which nothing is ever heard."""

    def __init__(self, key, is_answered):
        self.key, self.status, self.was_ended = key, "finished" if is_answered else "pending", False

    def done(self):
        return self.status == "finished"

    def cancelled(self):
        return False

    def cancel(self, force):
        self.was_ended = True

    def release(self):
        pass


class Silent:
    """A client that answers for a part only when it is sent again, and never says that one was cancelled."""

    def __init__(self):
        self.numbers, self.sent = [], []

    def scheduler_info(self, n_workers):
        return {"workers": {"only": {}}}

    def processing(self):
        return {}

    def submit(self, function, path, number, *, key, **options):
        self.sent.append(Sent(key, is_answered=number in self.numbers))
        self.numbers.append(number)
        return self.sent[-1]


def test_a_part_whose_cancelling_is_never_told_is_sent_again(tmp_path, monkeypatch):
    client, finished = Silent(), []
    job = SimpleNamespace(folder=tmp_path, name="job")
    monkeypatch.setattr(dask, "_distributed", lambda: SimpleNamespace(wait=lambda *arguments, **options: time.sleep(0.01)))
    DaskLauncher(client, timeout=0.05).launch(job, [0, 1], finished.append)
    assert client.numbers == [0, 0, 1, 1]
    assert [each.was_ended for each in client.sent] == [True, False, True, False]
    assert finished == [0, 1]


@pytest.mark.slow
def test_a_part_that_fails_everywhere(scan, client):
    with pytest.raises(ShardError, match="a voxel that the model does not like"):
        vx.predict(fails, scan, output=store(scan.with_name("f.zarr")), executor=DaskLauncher(client, shard_size=16), **OPTIONS)
    status = status_of(scan.with_name("f.zarr"))
    assert 0 < len(status.failed) < status.total
    assert status.done + len(status.failed) == status.total


@pytest.mark.slow
def test_a_client_that_is_killed_is_taken_up(scan, client, cluster):
    target = scan.with_name("parts.ome.zarr")
    script = f"""
        import sys
        sys.path[:0] = {sys.path!r}
        from distributed import Client
        from parts_models import Slow
        from test_parts import OPTIONS, store
        from voxloom.integrations.dask import DaskLauncher
        import voxloom as vx
        with Client({cluster.scheduler_address!r}) as client:
            launcher = DaskLauncher(client, shard_size=16)
            vx.predict(Slow(), {str(scan)!r}, output=store({str(target)!r}), executor=launcher, **OPTIONS)
    """
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)])
    deadline = time.monotonic() + 60
    while (status_of(target) is None or status_of(target).done < 2) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    done = status_of(target).done
    assert 2 <= done < status_of(target).total
    predicted(scan, DaskLauncher(client, shard_size=16), Slow())


@pytest.mark.slow
def test_addresses():
    for wrong in ("local:0", "slurm:x"):
        with pytest.raises(ModeError, match="a number of workers must follow"):
            client_of(wrong)


def ended(groups, seconds):
    """Wait until groups of processes have ended, and end those that do not; give these."""
    until, left = time.monotonic() + seconds, groups
    while left and time.monotonic() < until:
        time.sleep(0.1)
        left = [each for each in left if is_there(each)]
    for each in left:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(each, signal.SIGKILL)
    return left


def is_there(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


SUBMIT = """#!/bin/bash
# Stands for a scheduler that has room: runs the job, a file or what is piped in, and says its number.
cat "${1:-/dev/stdin}" > job-$$.sh
setsid bash job-$$.sh > job-$$.log 2>&1 < /dev/null &
echo $! | tee -a jobs
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("setsid") is None, reason="jobs are started by setsid, of Linux")
@pytest.mark.parametrize(("kind", "submit", "cancel"), [("pbs", "qsub", "qdel"), ("lsf", "bsub", "bkill")])
def test_workers_are_jobs_of_other_schedulers(scan, tmp_path, monkeypatch, kind, submit, cancel):
    """As dask-jobqueue submits them; the schedulers' own commands are stood in for."""
    import dask
    import dask_jobqueue  # noqa: F401 - brings what is usual for each

    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in ((submit, SUBMIT), (cancel, "#!/bin/bash\nkill -- -$1\n")):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    monkeypatch.chdir(tmp_path)
    job = {"cores": 1, "memory": "1GB", "processes": 1, "interface": "lo", "python": sys.executable, "death-timeout": 60}
    asked = {f"jobqueue.{kind}.{name}": value for name, value in job.items()}
    asked |= {"jobqueue.lsf.use-stdin": True, "jobqueue.lsf.lsf-units": "MB"}
    with dask.config.set(asked), client_of(f"{kind}:2") as client:
        try:
            predicted(scan, client)
            client.wait_for_workers(2, timeout=60)
        finally:
            client.cluster.close()
            jobs = list(map(int, (tmp_path / "jobs").read_text().split()))
            left = ended(jobs, seconds=20)
    assert len(jobs) == 2
    assert left == []


@pytest.mark.slow
def test_two_clusters_on_one_machine_do_not_get_in_each_others_way():
    with socket.socket() as taken, warnings.catch_warnings():
        warnings.filterwarnings("error", "Port .* is already in use")
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):  # something else has taken it
            taken.bind(("", 8787))  # the usual port of a dashboard
            taken.listen()
        client = client_of("local:1")
        assert client.submit(abs, -3).result() == 3
        client.cluster.close()
        client.close()
