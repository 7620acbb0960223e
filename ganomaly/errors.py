"""Errors for users: one clear line and an exit code; a traceback is for our bugs."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading


class UserError(Exception):
    """Something the user can mend: the message names the path or key, and the mend."""


def flag(name: str) -> str:
    """A flag of the scripts in a message, and how make passes it on."""
    return f"{name} (with make: ARGS={name})"


def describe(error: BaseException) -> str | None:
    """One line for an error that is not ours to fix, None for a bug of ours."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        mend = {
            errno.ENOSPC: "free some space, then the same command goes on",
            errno.EDQUOT: "free some space, then the same command goes on",
            errno.EACCES: "check who may read and write there",
            errno.EPERM: "check who may read and write there",
            errno.EROFS: "choose a folder that can be written to",
        }.get(error.errno, "")
        return f"{where}{error.strerror or error}" + (f"; {mend}" if mend else "")
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("ganomaly"):
        mend = "use make without PYTHON=, or python3 -m pip install -r requirements.txt"
        return f"{error.name} is not installed; {mend}"
    if out_of_memory(error):
        return "out of memory: lower --image-size, --width or, in training, --batch-size"
    return None


def out_of_memory(error: BaseException) -> bool:
    """By name and text, so that nobody pays for importing torch to hear of a wrong flag."""
    texts = (
        "can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED",
        "CUDNN_STATUS_ALLOC_FAILED", "ALLOCATION_FAILED",
    )  # fmt: skip
    return (
        type(error).__name__ == "OutOfMemoryError"
        or isinstance(error, MemoryError)
        or (isinstance(error, RuntimeError) and any(text in str(error) for text in texts))
    )


def reason_of(error: BaseException) -> str:
    """What a library says of a state that does not fit, in one line, to stand behind a message."""
    text = " ".join(str(error).split())
    return f" ({text[:300]})" if text else ""


def lost_device(error: BaseException) -> bool:
    """After such an error nothing that this process asks of its GPU will succeed."""
    return type(error).__name__ == "AcceleratorError" and not out_of_memory(error)


def exit_code(code: int) -> int:
    """Under torchrun with restarts, 0 for what a restart of all workers would not mend."""
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    return 0 if code in (1, 2) and restarts else code


@contextlib.contextmanager
def leaving_at_once():
    """Around imports, where Ctrl-C inside of an extension module becomes any other error."""

    def leave(*_):
        print("\ninterrupted", file=sys.stderr, flush=True)
        os._exit(130)

    before = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def quiet(failure: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread hands a full disk to the main thread; once is enough to tell it."""
    if not isinstance(failure.exc_value, OSError):
        threading.__excepthook__(failure)


def guard(main, argv: list[str] | None = None) -> int:
    """Run a script's main(argv); returns its exit code.

    0 done, 1 done in part, 2 refused, 130 interrupted by Ctrl-C.
    """
    threading.excepthook = quiet
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # no file name may stop a run at its last line
            utf8 = stream.encoding.lower().replace("-", "") == "utf8"
            stream.reconfigure(errors="surrogateescape" if utf8 else "backslashreplace")
    try:
        code = main(argv) or 0
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as interruption:
        print("\n" + ": ".join(["interrupted", *interruption.args]), file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has gone
        give_up_output()
        return 2
    except Exception as error:
        line = describe(error)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        give_up_output()
        return 2


def give_up_output() -> None:
    """What standard output does not take is not tried again, and complained of, at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
