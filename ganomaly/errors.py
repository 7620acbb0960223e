"""Errors for users: one clear line and an exit code. Only our own bugs show a traceback."""

import errno
import io
import os
import sys
import threading


class UserError(Exception):
    """Something the user can change. The message names the path or key, and what to do."""


def flag(name: str) -> str:
    """A flag of the scripts in a message, with its form for make."""
    return f"{name} (with make: ARGS={name})"


def describe(error: BaseException) -> str | None:
    """One line for a UserError, an OSError or too little memory. None for a bug of ours."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}"
    if out_of_memory(error):
        return "out of memory: lower --image-size, --width or, in training, --batch-size"
    return None


def out_of_memory(error: BaseException) -> bool:
    """Known by its text, so that this module does not import torch."""
    texts = ("out of memory", "can't allocate memory", "ALLOC")  # CUDA, a CPU, cuBLAS and cuDNN
    known = isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    return known or isinstance(error, MemoryError)


def reason_of(error: BaseException) -> str:
    """An error's text in parentheses, on one line, to add to a message."""
    text = " ".join(str(error).split())
    return f" ({text[:300]})" if text else ""


def quiet(failure: threading.ExceptHookArgs) -> None:
    """Hide an OSError of TensorBoard's thread, as of a full disk: the main thread reports it."""
    if not isinstance(failure.exc_value, OSError):
        threading.__excepthook__(failure)


class Forgiving(io.FileIO):
    """A standard stream. Where its terminal is gone, what is written is lost, without an error."""

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if self.fileno() == 1 and error.errno != errno.EIO:  # a full disk or a closed pipe
                raise
            return len(data)


def open_streams() -> None:
    """Make stdin, stdout and stderr usable, also where the parent process has closed them.

    A closed stream becomes /dev/null. Else the next file that is opened would take its descriptor,
    and what is printed would go into that file. Every file name can be printed.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:  # the lowest free descriptor
        pass
    os.close(number)
    sys.stdin = sys.stdin or open(0, closefd=False)
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is getattr(sys, f"__{name}__"):  # pytest has others
            raw = io.BufferedWriter(Forgiving(number, "w", closefd=False))
            lines = number == 2 or raw.isatty()
            text = io.TextIOWrapper(raw, "utf-8", "surrogateescape", line_buffering=lines)
            setattr(sys, name, text)


def guard(main, argv: list[str] | None = None) -> int:
    """Run a script's main(argv); returns its exit code.

    0 done, 1 done in part, 2 refused, 130 interrupted by Ctrl-C. Under torchrun 0 also stands for
    1 and 2: torchrun would start the processes again, which does not help here.
    """
    threading.excepthook = quiet
    open_streams()
    try:
        code = main(argv) or 0
        sys.stdout.flush()
    except KeyboardInterrupt as interruption:
        print("\n" + ": ".join(["interrupted", *interruption.args]), file=sys.stderr)
        return 130
    except Exception as error:
        line = describe(error)
        if line is None:
            raise
        if not isinstance(error, BrokenPipeError):  # the reader of a pipe may leave
            print(f"error: {line}", file=sys.stderr)
        code = 2
    finally:
        try:
            sys.stdout.flush()
        except OSError:  # a closed pipe or a full disk. Python must not flush again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0 if code in (1, 2) and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) else code
