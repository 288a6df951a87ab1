"""Exit codes of the training commands, for schedulers. `docs/jobs.md` lists them all.

0    finished; or stopped by SIGTERM, and the same command continues
1    an error; a retry does not help
2    wrong options or a wrong file of settings
3    `train-sae status`: not finished
75   an outside cause such as a full disk; a retry may help
130  stopped by Ctrl-C; the same command continues
"""

from __future__ import annotations

import errno
import re
import signal
import sys
from typing import Any

import click

from sae_harvest.common.console import (
    EXIT_INTERRUPTED,
    Commands,
    Terminated,
    ending,
    when_interrupted,
)
from sae_harvest.common.errors import SaeHarvestError

EXIT_UNFINISHED = 3
EXIT_TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h

PASSING = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EBUSY, errno.EAGAIN),
        *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ETIMEDOUT, errno.ECONNRESET),
        *(errno.ECONNREFUSED, errno.ECONNABORTED, errno.ENETUNREACH, errno.ENETDOWN),
        *(errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENOTCONN, errno.EPIPE),
    }
)


def may_pass(error: BaseException) -> bool:
    """Whether the error has a temporary cause outside the program, so that a retry may succeed."""
    from obstore.exceptions import BaseError  # imported here, since --help needs neither
    from safetensors import SafetensorError

    from sae_harvest.store.bucket import passes

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, BaseError) and passes(cause):
            return True
        if isinstance(cause, OSError) and cause.errno in PASSING:
            return True
        if isinstance(cause, SafetensorError):  # it has the number only in its text
            number = re.search(r"os error (\d+)", str(cause))
            return number is not None and int(number[1]) in PASSING
        cause = cause.__cause__
    return False


class JobCommands(Commands):
    """`Commands` with a separate exit code for errors for which a retry may help."""

    def exit_code(self, error: SaeHarvestError) -> int:
        return EXIT_TRY_AGAIN if may_pass(error) else super().exit_code(error)


class Job(click.Command):
    """A command that can be continued, so SIGTERM is not a failure.

    It needs `stopped_code_option`.
    """

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with when_interrupted("The same command continues."):
                return super().invoke(ctx)
        except Terminated as error:  # in preparation or evaluation; training stops between steps
            click.echo(ending("Stopped.", error), err=True)
            ctx.exit(ctx.params["stopped_code"])


stopped_code_option = click.option(
    "--stopped-code",
    type=click.IntRange(0, 255),
    default=0,
    show_default=True,
    help="Exit code when SIGTERM stops the run before its end, for schedulers that take 0 for "
    "done.",
)


def stopped(what: str, number: int | None, code: int) -> None:
    """Exit the command: with 130 after Ctrl-C, otherwise with `code`."""
    click.echo(f"{what}; the same command continues.", err=True)
    sys.exit(EXIT_INTERRUPTED if number == signal.SIGINT else code)
