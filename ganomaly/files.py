"""Files that are whole or not there: written under another name, then renamed. Locks."""

import contextlib
import fcntl
import io
import json
import os
import secrets
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import torch

from ganomaly.errors import UserError, out_of_memory


class Busy(UserError):
    """Another process holds the lock."""


@contextlib.contextmanager
def locked(folder: Path, wait: bool = False):
    """Hold the folder's lock. The lock ends with the process, even a killed one.

    Busy if another process has it, unless `wait`. The lock is on a file of its own, as network
    file systems lock no folders. It is not deleted, as other processes may still wait for it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as file:
        lock(file, f"{folder}: another process is using this folder", wait)
        yield


def lock(file: IO, message: str, wait: bool = False) -> None:
    """Lock an open file until it is closed. Busy with the message if another process has it."""
    try:
        with path_in_error(Path(file.name)):
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise Busy(message) from None


@contextlib.contextmanager
def path_in_error(path: Path):
    """Name this path in an OSError that names none, as of a failed write."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def write_atomic(path: Path, content: bytes | memoryview | str) -> None:
    """Write a file that is whole or not there. See as_bytes for text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Random, as process numbers repeat in containers that share a file system
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(as_bytes(content))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            error.filename = str(path)  # not that of the temporary file
        raise


def as_bytes(content: bytes | memoryview | str) -> bytes | memoryview:
    """Text as UTF-8. File names in it that are not UTF-8 keep their bytes."""
    return content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content


def write_output(path: Path, content: bytes | str) -> None:
    """Write a file that a user named, in place: it may be a link, a pipe or a device."""
    with path_in_error(path):
        path.write_bytes(as_bytes(content))


def check_output(path: Path, inputs: Iterable[str | Path] = (), flag: str = "--output") -> None:
    """Make the folder of a file that a user named by a flag.

    UserError where the file cannot be written, or where it is one of the inputs.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"{flag} {path}: cannot be written; name another file")
    if path.exists() and any(os.path.exists(p) and path.samefile(p) for p in inputs):
        raise UserError(f"{flag} {path}: is an input of this command; name another file")


def model_file(path: str | Path) -> Path:
    """A model's file. A run's folder stands for its model.pt."""
    return Path(path) / "model.pt" if Path(path).is_dir() else Path(path)


def write_torch(path: Path, state: dict) -> None:
    """torch.save. In memory first, as its own writing hides the error of a full disk."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomic(path, buffer.getbuffer())


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
