"""What the four command lines share: error reporting and the progress bar.

Progress goes to standard error, results to standard output, so that a command can be piped.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from store.errors import SaeHarvestError

EXIT_FAILURE = 1
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143

store_option = click.option(
    "--store",
    metavar="PLACE",
    required=True,
    help="The activation store: a folder, or s3://bucket/prefix.",
)


class Commands(click.Group):
    """A command group that turns a `SaeHarvestError` into one line on stderr and exit code 1.

    Usage errors keep click's exit code 2, an interrupted command exits with 130, a terminated one
    with 143, both in order. Anything else is a bug and keeps its traceback.
    """

    def exit_code(self, error: SaeHarvestError) -> int:
        """What an error ends with; for groups that tell errors apart."""
        return EXIT_FAILURE

    def invoke(self, ctx: click.Context) -> Any:
        before = signal.signal(signal.SIGTERM, _terminate)
        try:
            return super().invoke(ctx)
        except Terminated:
            click.echo("Terminated.", err=True)
            sys.exit(EXIT_TERMINATED)
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            sys.exit(EXIT_INTERRUPTED)
        finally:
            signal.signal(signal.SIGTERM, before)

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        try:
            super().main(*args, **kwargs)
        except SaeHarvestError as error:
            click.echo(f"Error: {error}", err=True)
            sys.exit(self.exit_code(error))
        except BrokenPipeError:  # the reader of our output, `head` say, has gone
            sys.stderr.close()
            sys.exit(EXIT_FAILURE)
        raise AssertionError("click always exits")


class Terminated(KeyboardInterrupt):
    """A SIGTERM, raised where the command is, so that it ends as it does when interrupted."""


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def output() -> Console:
    """The console for results, on standard output; text is as it is: a token may be `[/]`."""
    return Console(highlight=False, markup=False, emoji=False)


def progress(unit: str) -> Progress:
    """A progress bar on standard error: done, total, `rate` field, elapsed and remaining time.

    Tasks are added with `add_task(description, total=…, rate="")`; update `rate` with a short
    text such as "5,120 tokens/s". Without a terminal nothing moves: the bar is printed once.
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
