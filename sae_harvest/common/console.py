"""Shared parts of the four command lines: error reporting and progress.

Progress goes to standard error, results to standard output, so that a command can be piped.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars

from sae_harvest.common import environment
from sae_harvest.common.errors import SaeHarvestError
from sae_harvest.common.masking import masked
from sae_harvest.common.options import Command, PlaceOption, grouped

# Libraries read these variables when they are imported. Their progress bars and messages would
# disturb our own progress, or fill a log. Processes that a command starts inherit the variables.
QUIET_LIBRARIES = {
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
}
for _name, _value in QUIET_LIBRARIES.items():
    os.environ.setdefault(_name, _value)

LINE_SECONDS = 60.0  # between lines of progress if there is no terminal for a bar

SAME_COMMAND = "What was finished is kept; the same command continues."

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class _StoreOption(click.Option):
    """The option --store. If it is missing, the error shows how to type it."""

    def process_value(self, ctx: click.Context, value: Any) -> Any:
        if self.value_is_missing(value) and not ctx.resilient_parsing:
            raise click.UsageError(
                f"Name the store with an option: {ctx.command_path} --store PLACE.", ctx
            )
        return super().process_value(ctx, value)


device_option = grouped(
    "Execution",
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Device to compute on; auto takes a GPU where there is one.",
)
store_option = click.option(
    "--store",
    cls=_StoreOption,
    type=PlaceOption(),
    required=True,
    help="The activation store: a folder, or s3://bucket/prefix.",
)


class Commands(click.Group):
    """A command group that turns a `SaeHarvestError` into one line on stderr and exit code 1.

    Usage errors keep click's exit code 2. An interrupted command exits with 130, a terminated one
    with 143, both after cleaning up. Any other error is a bug and keeps its traceback.

    An argument with bytes that are not UTF-8 is a usage error of every command: paths are written
    to JSON, SQL and terminals, which need text.
    """

    command_class = Command

    def exit_code(self, error: SaeHarvestError) -> int:
        """Return the exit code for an error. Subclasses may distinguish errors."""
        return EXIT_FAILURE

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with _masked_usage():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        _terminated.clear()
        before = signal.signal(signal.SIGTERM, _terminate)
        try:
            with _masked_usage():
                return super().invoke(ctx)
        except KeyboardInterrupt as error:
            if _terminated.is_set():
                click.echo(ending("Terminated.", error), err=True)
                sys.exit(EXIT_TERMINATED)
            click.echo(ending("Interrupted.", error), err=True)
            sys.exit(EXIT_INTERRUPTED)
        finally:
            signal.signal(signal.SIGTERM, before)

    def main(self, args: Sequence[str] | None = None, *rest: Any, **kwargs: Any) -> NoReturn:
        environment.set_defaults()
        words = sys.argv[1:] if args is None else list(args)
        for word in words:
            if not _is_text(word):
                click.echo(
                    f"Error: The argument {word!a} has bytes that are not UTF-8; "
                    "rename what it names, or type it in UTF-8.",
                    err=True,
                )
                sys.exit(EXIT_USAGE)
        try:
            super().main(words, *rest, **kwargs)
        except SaeHarvestError as error:
            click.echo(f"Error: {error}", err=True)
            sys.exit(self.exit_code(error))
        except BrokenPipeError:  # the reader of our output, `head` say, has gone
            sys.stderr.close()
            sys.exit(EXIT_FAILURE)
        raise AssertionError("click always exits")


@contextmanager
def _masked_usage() -> Iterator[None]:
    """Mask passwords in usage errors, which repeat the typed arguments."""
    try:
        yield
    except click.UsageError as error:
        told = error.format_message()
        if masked(told) == told:
            raise
        raise click.UsageError(masked(told), error.ctx) from None


def _is_text(word: str) -> bool:
    """True unless the argument has bytes that are not UTF-8 (Python's lone surrogates)."""
    try:
        word.encode()
    except UnicodeEncodeError:
        return False
    return True


class Terminated(KeyboardInterrupt):
    """Raised in a command by SIGTERM, so that the command ends as after an interrupt."""


# Set by SIGTERM: while Ray waits, it raises a plain KeyboardInterrupt for the signal.
_terminated = threading.Event()


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    _terminated.set()
    raise Terminated


def output() -> Console:
    """Return the console for results on standard output, without markup: a token may be `[/]`."""
    return Console(highlight=False, markup=False, emoji=False)


@contextmanager
def when_interrupted(kept: str | Callable[[], str]) -> Iterator[None]:
    """Say at the end of an interrupted command what is kept and how to continue.

    An error that SIGTERM caused is raised as `Terminated`. If such blocks are nested, only the
    innermost adds its sentences.

    Args:
        kept: one or two sentences, or a function that returns them.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        if not hasattr(error, "__notes__"):
            error.add_note(kept if isinstance(kept, str) else kept())
        if not _terminated.is_set() or isinstance(error, Terminated):
            raise
        terminated = Terminated()
        terminated.__notes__ = error.__notes__
        raise terminated from error


def ending(word: str, error: KeyboardInterrupt) -> str:
    """Return the last line of an interrupted command."""
    return " ".join([word, *getattr(error, "__notes__", ())])


class Progress:
    """Progress of a command on standard error: a bar on a terminal, else one line per minute.

    A separate thread prints the lines, so they also appear in a phase that reports nothing, such as
    loading a model. Use it as a context manager.
    """

    def __init__(self, unit: str = "") -> None:
        """`unit` is the unit of the reported numbers, for example "tokens"."""
        self._unit = unit
        self._console = Console(stderr=True)
        self._bar = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task = self._bar.add_task("preparing", total=None, rate="")
        self.latest: tuple[str, int, int | None, str] = ("preparing", 0, None, "")
        self._began = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._lines, name="progress", daemon=True)

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._bar.start()
        else:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        if self._console.is_terminal:
            self._bar.stop()
        else:
            self._thread.join()

    def __call__(self, phase: str, done: int, total: int | None, rate: str = "") -> None:
        """Report the progress of a phase. It may be called very often.

        Args:
            rate: a short text such as "5,120 tokens/s".
        """
        self.latest = phase, done, total, rate
        if self._console.is_terminal:
            self._bar.update(self._task, description=phase, completed=done, total=total, rate=rate)

    def counting(
        self, phase: str, rate: Callable[[float], str] = lambda speed: ""
    ) -> Callable[[int, int | None], None]:
        """Return a function that reports the progress of one phase as (done, total).

        Args:
            rate: turns a speed, in units per second since the first report, into text.
        """
        first: list[tuple[float, int]] = []

        def report(done: int, total: int | None) -> None:
            now = time.monotonic()
            if not first:
                first.append((now, done))
            seconds = now - first[0][0]
            self(phase, done, total, rate((done - first[0][1]) / seconds) if seconds > 1 else "")

        return report

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, soft_wrap=True, highlight=False, markup=False)

    def _lines(self) -> None:
        while not self._ended.wait(LINE_SECONDS):
            phase, done, total, rate = self.latest
            words = phase
            if total or done:
                of = f" of {total:,}" if total else ""
                words = f"{phase} {done:,}{of} {self._unit}".rstrip()
            minutes = f"{(time.monotonic() - self._began) / 60:,.0f} min so far"
            click.echo(", ".join(filter(None, (words, rate, minutes))), err=True)
