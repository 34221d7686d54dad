"""Downloads, from a server on this machine that serves small archives made here."""

import http.server
import io
import json
import threading
import zipfile
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

import voxloom as vx
from voxloom.datasets import downloads
from voxloom.errors import DownloadError, MissingDependencyError, SizeError

SHAPE = (6, 5, 4)
AFFINE = np.diag([0.5, 0.5, 0.5, 1])


def nifti(array):
    return nib.Nifti1Image(array, AFFINE).to_bytes()


def archive_1998(shape=SHAPE, prefix="", leave_out=None):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as content:
        content.writestr("README.txt", "hello")
        for name in downloads.SOURCES["colin27-1998"].files:
            if name != leave_out:
                content.writestr(prefix + name, nifti(np.ones(shape, dtype=np.uint8)))
    return buffer.getvalue()


def archive_2008():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as content:
        for name in downloads.SOURCES["colin27-2008"].files:
            array = np.full(SHAPE, 2.9999998 if "cls" in name else 7.5, dtype=np.float32)
            content.writestr(f"folder/{name}", nifti(array))
    return buffer.getvalue()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server whose answers the test sets: `answers` is a list of (status, body), the last of which is repeated."""

    class Handler(http.server.BaseHTTPRequestHandler):
        answers, requests = [], []

        def do_GET(self):
            status, body = Handler.answers.pop(0) if len(Handler.answers) > 1 else Handler.answers[0]
            Handler.requests.append(self.path)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("VOXLOOM_CACHE", str(tmp_path / "cache"))
    for name, source in downloads.SOURCES.items():
        url = f"http://127.0.0.1:{httpd.server_address[1]}/{name}.zip"
        monkeypatch.setitem(downloads.SOURCES, name, replace(source, url=url, shape=SHAPE))
    monkeypatch.setattr("pooch.core.time.sleep", lambda seconds: None)
    yield Handler
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def entries(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").iterdir())


def test_colin27_is_downloaded_once(server, tmp_path):
    server.answers[:] = [(200, archive_1998())]
    subject = vx.datasets.Colin27()
    assert repr(subject) == "Colin27(Keys: ('t1', 'head', 'brain'); images: 3)"
    assert subject.spatial_shape == SHAPE
    assert subject.brain.type == "label"
    assert repr(vx.datasets.Colin27(version=1998)) == repr(subject)
    assert len(server.requests) == 1
    assert entries(tmp_path) == ["colin27-1998", "hashes.json"]


def test_the_classes_of_2008_become_whole_numbers(server):
    server.answers[:] = [(200, archive_2008())]
    subject = vx.datasets.Colin27(2008)
    assert list(subject) == ["t1", "t2", "pd", "cls"]
    assert subject.cls.data.unique().tolist() == [3]
    assert not subject.cls.dtype.is_floating_point
    assert subject.t1.data.unique().tolist() == [7.5]
    subject.check_space()


def test_a_server_that_fails_is_asked_again(server):
    server.answers[:] = [(500, b""), (503, b""), (200, archive_1998())]
    assert vx.datasets.Colin27().spatial_shape == SHAPE


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ((404, b""), "cannot be downloaded, after 3 tries"),
        ((200, b"no archive"), "no archive that can be unpacked"),
        ((200, archive_1998()[:-300]), "no archive that can be unpacked"),
        ((200, archive_1998(shape=(6, 5, 3))), r"has \(6, 5, 3\) voxels: it should have \(6, 5, 4\)"),
        ((200, archive_1998(leave_out="colin27_t1_tal_lin_mask.nii")), "holds no colin27_t1_tal_lin_mask.nii, only"),
    ],
)
def test_what_is_not_right_is_refused_and_nothing_of_it_kept(server, tmp_path, answer, reason):
    server.answers[:] = [answer]
    with pytest.raises(DownloadError, match=reason):
        vx.datasets.Colin27()
    assert entries(tmp_path) == []
    server.answers[:] = [(200, archive_1998())]
    assert vx.datasets.Colin27().spatial_shape == SHAPE


def test_an_archive_cannot_write_outside_of_its_folder(server, tmp_path):
    server.answers[:] = [(200, archive_1998(prefix="../../../"))]
    vx.datasets.Colin27()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]
    assert len(list((tmp_path / "cache" / "colin27-1998").iterdir())) == 3


def test_the_first_download_is_compared_with_those_that_follow(server, tmp_path):
    import shutil

    server.answers[:] = [(200, archive_1998())]
    vx.datasets.Colin27()
    (known,) = json.loads((tmp_path / "cache" / "hashes.json").read_text()).values()
    assert len(known) == 64
    shutil.rmtree(tmp_path / "cache" / "colin27-1998")
    server.answers[:] = [(200, archive_1998(prefix="other/"))]
    with pytest.raises(DownloadError, match="not the file that it was"):
        vx.datasets.Colin27()
    assert entries(tmp_path) == ["hashes.json"]


def test_a_damaged_record_and_a_damaged_image_are_named(server, tmp_path, monkeypatch):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "hashes.json").write_text("{")
    server.answers[:] = [(200, archive_1998())]
    with pytest.raises(DownloadError, match="hashes.json is damaged"):
        vx.datasets.Colin27()
    (tmp_path / "cache" / "hashes.json").unlink()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as content:
        for name in downloads.SOURCES["colin27-1998"].files:
            content.writestr(name, b"no image")
    server.answers[:] = [(200, buffer.getvalue())]
    with pytest.raises(DownloadError, match=r"colin27-1998\.zip holds a file that cannot be read"):
        vx.datasets.Colin27()
    assert entries(tmp_path) == []


def test_twice_at_once(server, tmp_path):
    server.answers[:] = [(200, archive_1998())]
    results = []
    threads = [threading.Thread(target=lambda: results.append(vx.datasets.Colin27().spatial_shape)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [SHAPE] * 4
    assert entries(tmp_path) == ["colin27-1998", "hashes.json"]


def test_versions_that_do_not_exist_and_a_missing_extra(server, monkeypatch):
    with pytest.raises(SizeError, match="versions 1998 and 2008"):
        vx.datasets.Colin27(1999)
    monkeypatch.setitem(__import__("sys").modules, "pooch", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'voxloom\[datasets\]'"):
        vx.datasets.Colin27()


def test_the_table_says_what_is_known():
    source = downloads.SOURCES["colin27-1998"]
    assert source.url == "http://packages.bic.mni.mcgill.ca/mni-models/colin27/mni_colin27_1998_nifti.zip"
    assert source.shape == (181, 217, 181)
    assert downloads.SOURCES["colin27-2008"].shape == (362, 434, 362)
