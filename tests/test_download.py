"""make download, from local servers that misbehave."""

import hashlib
import io
import os
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from ganomaly.data import MVTEC
from ganomaly.errors import guard

from .conftest import load_script


def packed(*names: str) -> bytes:
    """A .tar.xz of files of noise, which do not pack to nothing."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 2000
            tar.addfile(member, io.BytesIO(os.urandom(2000)))
    return buffer.getvalue()


IMAGES = [f"{name}/train/good/000.png" for name in MVTEC]
ARCHIVE = packed(*IMAGES)


class Handler(BaseHTTPRequestHandler):
    """Sends `share` of what is asked of `content`; `asked` lists the Range of each request."""

    content, share, ranges, asked = ARCHIVE, 1.0, True, []

    def do_GET(self):
        self.asked.append(self.headers["Range"])
        rest = self.content[int(self.asked[-1][len("bytes=") : -1]) if self.ranges else 0 :]
        self.send_response(206 if self.ranges else 200)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        self.wfile.write(rest[: int(len(rest) * self.share)])

    def log_message(self, *_): ...


@pytest.fixture
def server():
    """A handler's class to set; `url` is its server's."""
    own = type("Own", (Handler,), {"asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), own) as http:
        own.url = f"http://127.0.0.1:{http.server_port}/mvtec.tar.xz"
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield own
        http.shutdown()


@pytest.fixture
def download(capsys, monkeypatch, tmp_path):
    """download(url, the expected exit code) -> what is printed; into tmp_path/root."""
    module = load_script("download")

    def call(url, code=0, authors: bytes = ARCHIVE, free: float = 1e12) -> str:
        monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
        module.SIZE, module.SHA256 = len(authors), hashlib.sha256(authors).hexdigest()
        done = guard(module.main, ["--data-root", str(tmp_path / "root"), "--url", str(url)])
        printed = "".join(capsys.readouterr())
        assert done == code and ("error: " in printed) == (code == 2), printed
        if code == 0:
            assert sorted(path.name for path in (tmp_path / "root").iterdir()) == sorted(MVTEC)
        return printed

    return call


def test_a_broken_download_goes_on_where_it_stopped(download, server, tmp_path):
    server.share = 0.5  # the rest is half of the half, and so on, until an answer is empty
    printed = download(server.url, code=2)
    for words in ("CC BY-NC-SA 4.0", "the same command goes on", "URL= takes a mirror or a local"):
        assert words in printed
    assert server.asked[:2] == ["bytes=0-", f"bytes={len(ARCHIVE) // 2}-"]
    server.share = 1
    download(server.url)
    assert server.asked[-1] == server.asked[-2]
    asked = [*server.asked]
    assert "nothing to do" in download(server.url) and server.asked == asked


def test_a_server_that_ignores_ranges_sends_all_of_it_again(download, server, tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root/.mvtec_anomaly_detection.tar.xz").write_bytes(ARCHIVE[:1000])
    server.ranges = False
    download(server.url)
    assert server.asked == ["bytes=1000-"]


@pytest.mark.parametrize("wrong", [ARCHIVE[:-1] + b"?", b"<html>not found</html>"])
def test_wrong_bytes_are_refused_and_not_kept(download, server, tmp_path, wrong):
    server.content = wrong
    assert "URL= takes a mirror" in download(server.url, code=2) and not list(tmp_path.iterdir())


def test_after_a_killed_unpacking_nothing_is_fetched(download, server, tmp_path, monkeypatch):
    def kill(self, folder, **_):
        (folder / "bottle/train/good").mkdir(parents=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "extractall", kill)
        download(server.url, code=130)
    assert [path.name[:6] for path in (tmp_path / "root").iterdir()] == [".mvtec"]
    (tmp_path / "root/.unpacking/cable/train").mkdir(parents=True)  # as kill -9 leaves it
    download(server.url)
    assert len(server.asked) == 1


def test_a_local_file_is_kept_and_adds_what_is_missing(download, tmp_path):
    root, archive = tmp_path / "root", tmp_path / "mine.tar.xz"
    archive.write_bytes(ARCHIVE)
    (root / "bottle/train/good").mkdir(parents=True)
    (root / "cable").mkdir()
    assert "root/cable: there, but without train/good" in download(archive, code=2)
    (root / "cable").rmdir()
    assert "sha256" in download(archive, code=2, authors=b"others")
    assert "GB are free" in download(archive, code=2, free=1000)
    assert "14 categories added" in download(f"file://{archive}")
    assert archive.exists() and not list((root / "bottle/train/good").iterdir())


def test_another_archive_is_refused(download, tmp_path):
    archive = tmp_path / "mine.tar.xz"
    evil = [*IMAGES, "../../evil.txt"]
    for names, reason in ((IMAGES[:1], "has no cable, capsule"), (evil, "evil.txt")):
        archive.write_bytes(packed(*names))
        assert reason in download(archive, code=2, authors=archive.read_bytes())
        assert [*tmp_path.iterdir()] == [archive]
    assert "no such file" in download(tmp_path / "none", code=2)
