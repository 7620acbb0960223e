"""Files that are whole or not there: written to a temporary name, fsynced, renamed."""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path

import torch


@contextlib.contextmanager
def naming(path: Path):
    """A write that fails, on a full disk for one, says no file: say which."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_atomic(path: Path, content: bytes | str) -> None:
    """Text goes out as UTF-8; names of files that are not UTF-8 keep their bytes."""
    if isinstance(content, str):
        content = content.encode("utf-8", "surrogateescape")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path):
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_torch(path: Path, state: dict) -> None:
    buffer = io.BytesIO()  # so that a full disk is an OSError that names the file
    torch.save(state, buffer)
    write_atomic(path, buffer.getvalue())


def read_torch(path: Path) -> dict:
    """Tensors, numbers, text; ValueError for no archive, or a pickle that would run code."""
    content = io.BytesIO(path.read_bytes())
    try:
        return torch.load(content, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever other bytes make torch raise
        raise ValueError((str(error).splitlines() or [type(error).__name__])[0]) from None


def write_json(path: Path, content: dict) -> None:
    write_atomic(path, json.dumps(content, indent=2, allow_nan=False) + "\n")
