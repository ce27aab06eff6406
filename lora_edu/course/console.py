"""How the command line speaks: one-line errors and one progress bar, in a terminal or in a log."""

import errno
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

for stream in (sys.stdout, sys.stderr):  # a pipe or a terminal that knows no ✓ shows a ? and goes on
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="replace")

console = Console(highlight=False, soft_wrap=True)
errors = Console(stderr=True, highlight=False, soft_wrap=True)


def friendly(command: Callable[..., Any]) -> Callable[..., Any]:
    """Turn the errors that a user can cause into one line and exit code 1; ``LORA_EDU_DEBUG=1`` shows the traceback."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except typer.Exit:  # a RuntimeError too: the command has said already what it had to say
            raise
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
            if os.environ.get("LORA_EDU_DEBUG"):
                raise
            fail(_words(error))

    return run


def _words(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename and error.strerror:
        closed = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
        return f"{error.filename}: {error.strerror}" + ("; choose a place that is open to you" if closed else "")
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return text or type(error).__name__


def fail(message: str, code: int = 1) -> NoReturn:
    """Print one line to stderr and leave with an exit code."""
    errors.print("lora-edu: " + " ".join(message.split()), markup=False, style="red")
    raise typer.Exit(code)


@contextmanager
def progress_bar(label: str, total: int) -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    """An overall bar over ``total`` notebooks, and one below it for the cells of the current one.

    Yields a function that starts a notebook's bar by name and gives its (cells done, cells) callback; (0, 0) means that
    nothing was left to do. In a log, where nothing can be redrawn, each notebook gives one line instead.
    """
    if not sys.stdout.isatty():
        yield functools.partial(_log_lines, time.monotonic())
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        overall = bar.add_task(label, total=total)
        inner = None

        def start(name: str) -> Callable[[int, int], None]:
            nonlocal inner
            if inner is not None:
                bar.remove_task(inner)
            inner = task = bar.add_task(f"  {name}", total=None)

            def moved(done: int, cells: int) -> None:
                bar.update(task, completed=done, total=cells)
                if done == cells:
                    bar.advance(overall)

            return moved

        yield start


def _log_lines(since: float, name: str) -> Callable[[int, int], None]:
    def moved(done: int, cells: int) -> None:
        if done == cells:
            did = f"{cells} cells" if cells else "not run again, or failed"
            console.print(f"{time.monotonic() - since:6.1f} s  {name}: {did}")

    return moved
