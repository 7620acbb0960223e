"""Files that are whole or not there: written to a temporary name, fsynced, renamed."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import secrets
import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch

from ganomaly.errors import UserError, out_of_memory

LOCK = ".lock"  # a file of its own: network file systems lock no folders


class Busy(UserError):
    """Another process holds the lock."""


@contextlib.contextmanager
def locked(folder: Path, wait: bool = False):
    """Hold the folder's lock, which ends with the process, even a killed one.

    Raises Busy at once where another process has it, unless `wait`. The lock's file stays: its
    removal would be an error to processes that wait for it.
    """
    with path_in_error(folder / LOCK):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, "a")
    with file:
        try:
            with path_in_error(folder / LOCK):
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise Busy(f"{folder}: another process is at work on this run") from None
        yield


@contextlib.contextmanager
def path_in_error(path: Path):
    """Put the path into an OSError without a file name, such as a failed write's."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename = error.filename or str(path)
        raise


@contextlib.contextmanager
def replacing(path: Path):
    """A binary file to write; it replaces `path` once it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Random, as process numbers repeat in containers that share a file system
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with path_in_error(path):
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomic(path: Path, content: bytes | str) -> None:
    """Text is written as UTF-8; file names in it that are not UTF-8 keep their bytes."""
    with replacing(path) as file:
        file.write(as_bytes(content))


def as_bytes(content: bytes | str) -> bytes:
    return content if isinstance(content, bytes) else content.encode("utf-8", "surrogateescape")


def is_stream(path: Path) -> bool:
    """Whether the path is a pipe or a device, such as /dev/stdout."""
    return path.exists() and not path.is_file()


def write_output(path: Path, content: bytes | str) -> None:
    """Write a file that a user named. A link stays and its target is replaced."""
    if is_stream(path):
        with path_in_error(path):
            path.write_bytes(as_bytes(content))
    else:
        write_atomic(Path(os.path.realpath(path)), content)


def check_output(path: Path, inputs: Iterable[str | Path] = ()) -> None:
    """Make the folder of a file that a user named.

    UserError where it cannot be written, or where it is one of the inputs.
    """
    if path.is_dir():
        raise UserError(f"--output {path}: a folder; name a file")
    if path.exists() and any(os.path.exists(p) and path.samefile(p) for p in inputs):
        raise UserError(f"--output {path}: is an input of this command; name another file")
    folder = Path(os.path.realpath(path)).parent
    if not is_stream(path):
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(
                f"--output {path}: {folder} cannot be written to; choose another folder"
            )


def write_torch(path: Path, state: dict) -> None:
    with replacing(path) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # a full disk, hidden by torch's own error
                raise error.__context__ from None
            raise


def read_torch(path: Path) -> dict:
    """A dict of torch.save; ValueError where the file is damaged, or would run code."""
    content = io.BytesIO(path.read_bytes())
    try:
        if damaged := zipfile.ZipFile(content).testzip():  # torch does not see a flipped bit
            raise ValueError(f"{damaged} is damaged")
        content.seek(0)
        state = torch.load(content, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError("holds no names")
        return state
    except Exception as error:  # torch raises errors of any kind
        if out_of_memory(error):
            raise
        raise ValueError((str(error).splitlines() or [type(error).__name__])[0]) from None


def write_json(path: Path, content: dict) -> None:
    write_atomic(path, json.dumps(content, indent=2, allow_nan=False) + "\n")
