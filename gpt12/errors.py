"""UserError, the exception for a user's mistake, and the frame around each script's main function.

Exit status: 0 success, 1 a bug or a run that failed, 2 a user's mistake, 128 + a signal's number
if one ended the program: 130 for Ctrl-C, 141 if the program that read our output has ended.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(Exception):
    """A mistake of the user, not of the program.

    The message says what is wrong, where, and what to do.
    """


def run_main(main: Callable[[], int | None], help_page: str | None = None) -> NoReturn:
    """Run a script's main function and exit with its status.

    main: returns the exit status; None means 0. A UserError prints its message and exits with 2.
    help_page: the text that --help prints, for scripts that take no other argument.
    An unexpected exception is a bug: it passes through, so that its traceback appears.
    """
    try:
        if help_page is None:
            status = main() or 0
        else:
            status = _run_without_options(main, help_page)
    except UserError as error:
        _print_error(str(error))
        status = 2
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        if not _is_output_closed():  # another pipe
            raise
        status = 141
    except SystemExit as stop:  # --help ends this way
        status = _status_of(stop)
    except BaseException:
        _flush_output(status=1)
        raise
    sys.exit(_flush_output(status))


def _run_without_options(main: Callable[[], int | None], help_page: str) -> int:
    """Run a script that takes no argument but --help. Return its exit status."""
    arguments = sys.argv[1:]
    if "-h" in arguments or "--help" in arguments:
        print(help_page.strip())
        return 0
    if arguments:
        raise UserError(f"unknown argument {arguments[0]!r}: this script has no options but --help")
    return main() or 0


def _status_of(stop: SystemExit) -> int:
    """Return the exit status that Python gives to sys.exit(code)."""
    if stop.code is None:
        return 0
    if isinstance(stop.code, int):
        return stop.code
    _print_error(str(stop.code))
    return 1


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
        print(f"error: {message}", file=sys.stderr)


def _flush_output(status: int) -> int:
    """Flush stdout and stderr. Return the exit status, which is 2 if output was lost.

    Python flushes once more when it ends. That would fail again and print a traceback, so a broken
    stream is pointed at the null device.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is None:  # the stream was closed before the program started
            continue
        try:
            stream.flush()
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            if status == 0 and not isinstance(error, BrokenPipeError):
                _print_error(f"not all of the output could be written: {error.strerror}")
                status = 2
    return status
