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


def packed(names, extra=()) -> bytes:
    """A .tar.xz of categories, with some noise so that it does not pack to nothing."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz") as tar:
        for name in (*(f"{n}/train/good/000.png" for n in names), "readme.txt", *extra):
            member = tarfile.TarInfo(name)
            member.size = 2000
            tar.addfile(member, io.BytesIO(os.urandom(2000)))
    return buffer.getvalue()


ARCHIVE = packed(MVTEC)


@pytest.fixture
def download(capsys, monkeypatch):
    """download(archive bytes the authors' are, flags) -> (exit code, standard error)."""
    module = load_script("download")
    module.PAUSE = 0

    def call(archive: bytes, *words, free: float | None = None):
        module.SHA256 = hashlib.sha256(archive).hexdigest()
        if free is not None:
            usage = SimpleNamespace(free=free)
            monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage)
        code = guard(module.main, [str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out + err

    return call


@pytest.fixture
def server():
    """server(behave) -> address; behave(bytes wanted, number of the request) -> bytes sent."""
    running = []

    def start(content: bytes, behave=lambda wanted, number: wanted, ranges=True):
        log = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                log.append(self.headers["Range"])
                asked = self.headers["Range"] if ranges else None
                begin = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
                if asked and begin >= len(content):
                    self.send_error(416)
                    return
                self.send_response(206 if asked else 200)
                self.send_header("Content-Length", str(len(content) - begin))
                self.end_headers()
                self.wfile.write(behave(content[begin:], len(log)))

            def log_message(self, *_): ...

        http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=http.serve_forever, daemon=True).start()
        running.append(http)
        return f"http://127.0.0.1:{http.server_port}/mvtec.tar.xz", log

    yield start
    for http in running:
        http.shutdown()
        http.server_close()


def all_there(root) -> bool:
    return {p.name for p in root.iterdir()} == set(MVTEC)


def test_a_broken_download_goes_on_where_it_stopped(download, server, tmp_path):
    url, log = server(ARCHIVE, lambda wanted, number: wanted[: len(wanted) // 2])
    code, told = download(ARCHIVE, "--data-root", tmp_path, "--url", url)
    # Halves of halves until nothing comes, which is told; the next run asks for the rest only
    assert code == 2 and "goes on from there" in told and "CC BY-NC-SA 4.0" in told
    assert log[0] is None and log[1] == f"bytes={len(ARCHIVE) // 2}-"
    kept = (tmp_path / ".mvtec_anomaly_detection.tar.xz.part").read_bytes()
    assert kept == ARCHIVE[: len(kept)] and len(kept) > 0.99 * len(ARCHIVE)
    url, log = server(ARCHIVE)
    code, told = download(ARCHIVE, "--data-root", tmp_path, "--url", url)
    assert (code, log) == (0, [f"bytes={len(kept)}-"]), told
    assert all_there(tmp_path)
    code, told = download(ARCHIVE, "--data-root", tmp_path, "--url", url)
    assert code == 0 and len(log) == 1 and "nothing to do" in told


def test_a_server_without_ranges_starts_again(download, server, tmp_path):
    half = len(ARCHIVE) // 2
    url, log = server(ARCHIVE, lambda wanted, n: wanted[:half] if n == 1 else wanted, ranges=False)
    code, told = download(ARCHIVE, "--data-root", tmp_path, "--url", url)
    assert code == 0 and len(log) == 2 and all_there(tmp_path), told


def test_wrong_bytes_are_told_and_not_kept(download, server, tmp_path):
    wrong = ARCHIVE[:-1] + bytes([ARCHIVE[-1] ^ 1])
    url, _ = server(wrong)
    code, told = download(ARCHIVE, "--data-root", tmp_path, "--url", url)
    assert code == 2 and "sha256" in told and not list(tmp_path.iterdir())


def test_a_whole_part_of_a_killed_run_is_not_fetched_again(download, server, tmp_path):
    (tmp_path / ".mvtec_anomaly_detection.tar.xz.part").write_bytes(ARCHIVE)
    url, log = server(ARCHIVE)
    code, told = download(ARCHIVE, "--data-root", tmp_path, "--url", url)
    assert code == 0 and len(log) == 1 and all_there(tmp_path), told


def test_a_local_file_stays_and_adds_what_is_missing(download, tmp_path):
    root, archive = tmp_path / "root", tmp_path / "mine.tar.xz"
    archive.write_bytes(ARCHIVE)
    (root / "bottle/train/good").mkdir(parents=True)
    code, told = download(ARCHIVE, "--data-root", root, "--url", archive)
    assert code == 0 and "14 categories added" in told and archive.exists()
    assert all_there(root) and not list((root / "bottle/train/good").iterdir())
    archive.write_bytes(b"another")
    (root / "cable/train/good/000.png").unlink()
    (root / "cable/train/good").rmdir()
    code, told = download(ARCHIVE, "--data-root", root, "--url", archive)
    assert code == 2 and "cable: there, but without train/good" in told
    (root / "cable/train").rmdir()
    (root / "cable").rmdir()
    code, told = download(ARCHIVE, "--data-root", root, "--url", archive)
    assert code == 2 and "name another file" in told and archive.exists()


def test_nothing_leaves_the_folder(download, tmp_path):
    root, archive = tmp_path / "root", tmp_path / "mine.tar.xz"
    evil = packed(MVTEC, extra=["../../evil.txt"])
    archive.write_bytes(evil)
    code, told = download(evil, "--data-root", root, "--url", archive)
    assert code == 2 and "cannot be unpacked" in told and "evil.txt" in told
    assert not root.exists() and not list(tmp_path.rglob("evil.txt"))


def test_too_little_room_is_told_before_anything_is_fetched(download, server, tmp_path):
    url, log = server(ARCHIVE)
    code, told = download(ARCHIVE, "--data-root", tmp_path, "--url", url, free=1000)
    assert code == 2 and "GB are free" in told and not list(tmp_path.iterdir())


def test_another_archive_is_refused(download, tmp_path):
    root, archive = tmp_path / "root", tmp_path / "mine.tar.xz"
    other = packed(["bottle"])
    archive.write_bytes(other)
    code, told = download(other, "--data-root", root, "--url", archive)
    assert code == 2 and "has no cable, capsule" in told and not (root / "bottle").exists()
    code, told = download(other, "--data-root", root, "--url", tmp_path / "none")
    assert code == 2 and "no such file" in told
