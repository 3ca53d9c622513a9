"""UserError, printing a line, and the frame around each script's main function.

Exit status: 0 success, 1 a bug or a run that failed, 2 a user's mistake, 128 + a signal's number
if one ended the program: 130 for Ctrl-C, 141 if the program that read our output has ended.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TextIO

# They would move a terminal's cursor or worse. A line end and a tab are none of them.
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class UserError(Exception):
    """A mistake of the user, not of the program.

    The message says what is wrong, where, and what to do.
    """


def require_packages() -> None:
    """End with advice if a package is missing. Scripts call it before they import others."""
    for package in ("numpy", "torch", "pydantic", "safetensors", "tqdm"):
        if importlib.util.find_spec(package) is None:
            _print_error(
                f"{package} is not installed: activate the environment, or "
                "pip install -r requirements.txt"
            )
            sys.exit(2)


def is_rank_0() -> bool:
    """Tell whether this process is the one that writes files and prints, under torchrun."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Print a line on standard output, on rank 0 only."""
    print_line(text, sys.stdout)


def warn(text: str) -> None:
    """Print a warning as say() does, but on standard error: standard output may be data."""
    print_line(f"warning: {text}", sys.stderr)


def print_line(text: str, stream: TextIO | None) -> None:
    """Print a line at once, above a progress bar if there is one, on rank 0 only.

    stream: None if it was closed before the program started.
    """
    from tqdm import tqdm

    if not is_rank_0() or stream is None:
        return
    # A reader that has gone, a full disk under a log file, or a signal in the middle of another
    # line must not end the program. For the last of these, Python raises RuntimeError.
    with contextlib.suppress(OSError, RuntimeError):
        tqdm.write(printable(text, stream), file=stream)
        stream.flush()  # else a log file gets the line much later


def printable(text: str, stream: TextIO | None) -> str:
    """Return the text with a question mark for each character that the stream cannot show.

    A Windows console may be in cp1252, and a model, a file's name or a stranger's file may hold any
    character, also one that controls the terminal. A carriage return is left out.
    """
    encoding = getattr(stream, "encoding", None) or "utf-8"
    shown = CONTROLS.sub("?", text.replace("\r", ""))
    return shown.encode(encoding, "replace").decode(encoding)


def one_line(error: BaseException) -> str:
    """Return an exception's type and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]


def ran_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that the memory is used up.

    While a CUDA graph is recorded, running out of memory breaks off the recording, which raises an
    error of its own. If a CPU's RAM or a Mac's memory runs out, only the message says so.
    """
    import torch

    if any(words in str(error) for words in ("DefaultCPUAllocator", "MPS backend out of memory")):
        return True
    return any(isinstance(e, torch.OutOfMemoryError) for e in (error, error.__context__))


def run_main(
    main: Callable[[], int | None], help_page: str | None = None, out_of_memory: str = ""
) -> NoReturn:
    """Run a script's main function and exit with its status.

    main: returns the exit status; None means 0. A UserError prints its message and exits with 2.
    help_page: the text that --help prints, for scripts that take no other argument.
    out_of_memory: what to do where the memory does not suffice, which is a user's mistake then.
    An unexpected exception is a bug: it passes through, so that its traceback appears.
    """
    status: Any = 1
    try:
        if help_page is not None:
            as_written = argparse.RawDescriptionHelpFormatter
            argparse.ArgumentParser(description=help_page, formatter_class=as_written).parse_args()
        status = main()
    except UserError as error:
        _print_error(str(error))
        status = 2
    except RuntimeError as error:
        if not out_of_memory or not ran_out_of_memory(error):
            raise
        _print_error(f"out of memory: {out_of_memory}")
        status = 2
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        if not _is_output_closed():  # another pipe
            raise
        status = 141
    except SystemExit as stop:  # --help ends this way
        status = stop.code
    finally:
        status = _flush_output(status or 0)
    sys.exit(status)


def _is_output_closed() -> bool:
    """Tell whether nobody reads standard output any more. If somebody does, print a line end."""
    try:
        print(flush=True)
    except BrokenPipeError:
        return True
    return False


def _print_error(message: str) -> None:
    """Print an error message. It must not fail if nobody reads stderr."""
    with contextlib.suppress(OSError):
        print(printable(f"error: {message}", sys.stderr), file=sys.stderr)


def _flush_output(status: Any) -> Any:
    """Flush stdout and stderr. Return the exit status, which is not 0 if output was lost.

    Python flushes once more when it ends. That would fail again and print a traceback, so a broken
    stream is pointed at the null device.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:  # the stream was closed before the program started
                stream.flush()
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            if isinstance(error, BrokenPipeError):
                status = status or 141
            else:
                _print_error(f"not all of the output could be written: {error.strerror}")
                status = status or 2
    return status
