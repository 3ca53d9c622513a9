"""UserError, the exception for a user's mistake, and the frame around each script's main function.

Exit status: 0 success, 1 a bug or a run that failed, 2 a user's mistake, 130 Ctrl-C, 141 the reader of our output ended.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(Exception):
    """A mistake of the user, not of the program. The message says what is wrong, where, and what to do."""


def run_main(main: Callable[[], int | None], help_page: str | None = None) -> NoReturn:
    """Run a script's main function and exit with its status.

    main: returns the exit status; None means 0. A UserError prints its message and exits with 2.
    help_page: the text that --help prints, for scripts that take no other argument.
    """
    try:
        if help_page is not None and {"-h", "--help"} & set(sys.argv[1:]):
            print(help_page.strip())
            status = 0
        elif help_page is not None and sys.argv[1:]:
            raise UserError(
                f"unknown argument {sys.argv[1]!r}: this script has no options, only --help"
            )
        else:
            status = main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        status = 141
    sys.exit(_flush_output(status))


def _flush_output(status: int) -> int:
    """Flush stdout and stderr and return the exit status, 2 if the output could not be written.

    Python flushes again when it ends. That would fail a second time and print a traceback, so a broken stream is
    pointed at the null device.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            if status == 0 and not isinstance(error, BrokenPipeError):
                print(
                    f"error: not all of the output could be written: {error.strerror}",
                    file=sys.stderr,
                )
                status = 2
    return status
