"""Files that are whole or not there: written to a temporary name, fsynced, renamed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import os
import secrets
import zipfile
from pathlib import Path

import torch

from ganomaly.errors import UserError, out_of_memory

LOCK = ".lock"  # a file of its own: network file systems lock no folders


class Busy(UserError):
    """Another process holds the lock."""


@contextlib.contextmanager
def locked(folder: Path, wait: bool = False, tidy: bool = False):
    """Hold the folder's lock, which a process that dies does not leave behind.

    Raises Busy at once where another process has it, unless `wait`. A folder that it made and where
    nothing came into it is taken back; else the lock's file stays unless `tidy`, as network file
    systems give those who wait for a file that was removed an error.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with naming(folder / LOCK):
        file = lock_file(folder, wait)
    with file:
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # somebody else came
                if tidy or (made and os.listdir(folder) == [LOCK]):
                    os.unlink(file.name)
                    for path in made:
                        path.rmdir()


def lock_file(folder: Path, wait: bool):
    tries = 100
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = open(folder / LOCK, "a")
        except FileNotFoundError:  # the folder has just been removed, or none can be made there
            tries -= 1
            if not tries:
                raise
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if os.path.samestat(os.fstat(file.fileno()), os.stat(folder / LOCK)):
                return file
        except BlockingIOError:
            file.close()
            raise Busy(f"{folder}: another process is at work on this run") from None
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE):
                raise
        file.close()  # its holder has removed it: that lock is worth nothing


@contextlib.contextmanager
def naming(path: Path):
    """A write that fails, on a full disk for one, says no file: say which."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename = error.filename or str(path)
        raise


@contextlib.contextmanager
def replacing(path: Path):
    """A binary file to write, which takes the place of `path` once it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not the process's number: containers on one file system have the same ones
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with naming(path):
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomic(path: Path, content: bytes | str) -> None:
    """Text goes out as UTF-8; names of files that are not UTF-8 keep their bytes."""
    if isinstance(content, str):
        content = content.encode("utf-8", "surrogateescape")
    with replacing(path) as file:
        file.write(content)


def write_output(path: Path, content: bytes | str) -> None:
    """A file that a user names: through a link to its target; into a pipe or device as it is."""
    if path.exists() and not path.is_file():
        if isinstance(content, str):
            content = content.encode("utf-8", "surrogateescape")
        with naming(path):
            path.write_bytes(content)
    else:
        write_atomic(Path(os.path.realpath(path)), content)


def check_output(path: Path) -> None:
    """Make the folder of a file that a user names; UserError where it cannot be written."""
    if path.is_dir():
        raise UserError(f"--output {path}: a folder; name a file")
    if path.exists() and not path.is_file():
        return
    folder = Path(os.path.realpath(path)).parent
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"--output {path}: {folder} cannot be written to; choose another folder")


def write_torch(path: Path, state: dict) -> None:
    with replacing(path) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # a full disk; then no archive can be closed
                raise error.__context__ from None
            raise


def read_torch(path: Path) -> dict:
    """Tensors, numbers, text; ValueError for a damaged archive, or a pickle that would run code."""
    content = io.BytesIO(path.read_bytes())
    try:
        if damaged := zipfile.ZipFile(content).testzip():  # torch reads past a flipped bit
            raise ValueError(f"{damaged} is damaged")
        content.seek(0)
        state = torch.load(content, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError("holds no names")
        return state
    except Exception as error:  # whatever other bytes make torch raise
        if out_of_memory(error):
            raise
        raise ValueError((str(error).splitlines() or [type(error).__name__])[0]) from None


def write_json(path: Path, content: dict) -> None:
    write_atomic(path, json.dumps(content, indent=2, allow_nan=False) + "\n")
