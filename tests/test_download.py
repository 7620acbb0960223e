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


@pytest.fixture
def server():
    """Sends `share` of what is asked of `content`; `asked` lists the Range of each request."""
    state = SimpleNamespace(content=ARCHIVE, share=1.0, ranges=True, asked=[])

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            state.asked.append(self.headers["Range"])
            start = int(state.asked[-1][len("bytes=") : -1]) if state.ranges else 0
            rest = state.content[start:]
            self.send_response(206 if state.ranges else 200)
            self.send_header("Content-Length", str(len(rest)))
            self.end_headers()
            self.wfile.write(rest[: int(len(rest) * state.share)])

        def log_message(self, *_): ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        state.url = f"http://127.0.0.1:{http.server_port}/mvtec.tar.xz"
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        yield state
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
            assert names(tmp_path / "root") == sorted(MVTEC)
        return printed

    return call


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_goes_on_where_it_stopped(download, server, ranges):
    server.share, server.ranges = 0.5, ranges  # without ranges the server sends all of it again
    printed = download(server.url, code=2)
    for words in ("CC BY-NC-SA 4.0", "broke off; the same command goes on", "URL= takes a mirror"):
        assert words in printed
    server.share = 1
    download(server.url)
    assert server.asked == ["bytes=0-", f"bytes={len(ARCHIVE) // 2}-"]
    assert "nothing to do" in download(server.url) and len(server.asked) == 2


def test_a_wrong_mirror_is_refused(download, server, tmp_path):
    server.content = b"<html>not found</html>"
    assert "not MVTec AD's archive" in download(server.url, code=2)
    assert not names(tmp_path / "root")
    server.content = ARCHIVE[:-1] + b"?"
    assert "its sha256 is not" in (text := download(server.url, code=2)) and "remove it" in text


def test_after_a_killed_unpacking_nothing_is_fetched(download, server, tmp_path, monkeypatch):
    def kill(self, folder, **_):
        (folder / "bottle/train/good").mkdir(parents=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "extractall", kill)
        download(server.url, code=130)
    assert names(tmp_path / "root") == [".mvtec_anomaly_detection.tar.xz"]
    (tmp_path / "root/.unpacking/cable/train").mkdir(parents=True)  # as kill -9 leaves it
    download(server.url)
    assert len(server.asked) == 1


def test_a_local_file_is_kept_and_adds_what_is_missing(download, tmp_path):
    root, archive = tmp_path / "root", tmp_path / "mine.tar.xz"
    assert "no such file" in download(archive, code=2)
    archive.write_bytes(b"?")
    assert "its sha256 is not" in (text := download(archive, code=2)) and "name another" in text
    archive.write_bytes(ARCHIVE)
    (root / "bottle/train/good").mkdir(parents=True)
    (root / "cable").mkdir()
    assert "root/cable: there, but without train/good" in download(archive, code=2)
    (root / "cable").rmdir()
    assert "GB are free" in download(archive, code=2, free=1000)
    assert "14 categories added" in download(archive)
    assert archive.exists() and not list((root / "bottle/train/good").iterdir())


def test_no_file_of_an_archive_leads_out_of_the_folder(download, tmp_path):
    archive = tmp_path / "mine.tar.xz"
    archive.write_bytes(packed(*IMAGES, "../../evil.txt"))
    with pytest.raises(tarfile.FilterError, match="evil.txt"):
        download(archive, authors=archive.read_bytes())
    assert not names(tmp_path / "root")
