"""Execute a notebook in a fresh kernel, with the environment on which the stored outputs depend.

``lora-edu lessons run NN --update`` is this module's ``update``: the only way in which ``lessons/`` gets its outputs.
"""

import asyncio
import os
import platform
import re
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode

from lora_edu.course.notebooks.stored import KERNELSPEC, MINE, NotebookError, clear_outputs, normalise, read, write
from lora_edu.quick import ENVIRONMENT

TIMEOUT = 180  # seconds a cell may take

Progress = Callable[[int, int], None]


class _ThisPython(KernelSpecManager):
    """Starts kernels with the interpreter that runs now, whatever else is registered on the machine."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=ERROR"]
        return KernelSpec(argv=argv, display_name=KERNELSPEC["display_name"], language="python")


def environment() -> dict[str, str]:
    """The process's environment with the fixed variables of an executed notebook."""
    return {**os.environ, **ENVIRONMENT}


def same_platform() -> bool:
    """Whether stored outputs are expected to repeat to the last printed decimal here: Linux on x86-64."""
    return sys.platform == "linux" and platform.machine() == "x86_64"


def execute(
    notebook: NotebookNode,
    folder: Path,
    name: str,
    progress: Progress | None = None,
    timeout: int | None = TIMEOUT,
    variables: dict[str, str] | None = None,
) -> NotebookNode:
    """Run all cells in a fresh kernel of this Python and store their outputs in the notebook.

    Args:
        notebook: the notebook; it is changed.
        folder: the kernel's working directory.
        name: the notebook's name, for messages.
        progress: called with (cells done, cells) before the first and after each cell.
        timeout: seconds that one cell may take; None for as long as it takes.
        variables: the kernel's environment; the one of the stored outputs if not given.

    Raises:
        NotebookError: naming notebook, cell and exception, if a cell fails, takes too long or ends the kernel.
        KeyboardInterrupt: if someone pressed Ctrl-C.
    """
    cells = notebook.cells
    current, interrupted = 0, False

    def started(cell: NotebookNode, cell_index: int, **_: Any) -> None:
        nonlocal current
        current = cell_index
        if progress:
            progress(cell_index, len(cells))

    def interrupt() -> None:
        nonlocal interrupted
        interrupted = True
        ending.append(asyncio.ensure_future(manager.shutdown_kernel(now=True)))

    def heed_the_keyboard(**_: Any) -> None:
        """On Ctrl-C nbclient ends the kernel and tells nobody: take its handler's place."""
        with suppress(NotImplementedError, RuntimeError):  # Windows; not the main thread
            asyncio.get_event_loop().add_signal_handler(signal.SIGINT, interrupt)

    ending: list[asyncio.Future] = []  # kept, or Python may collect it before it has run
    manager = AsyncKernelManager(kernel_spec_manager=_ThisPython())
    client = NotebookClient(
        notebook,
        km=manager,
        kernel_name="python3",
        timeout=timeout,
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        on_cell_start=started,
        on_notebook_start=heed_the_keyboard,
    )
    try:
        client.execute(env=environment() if variables is None else variables)
    except CellExecutionError as error:
        value = re.sub(r"\x1b\[[0-9;]*m", "", str(error.evalue)).strip().split("\n")[0]
        raise NotebookError(f"{_where(name, cells, current)}: {error.ename}: {value}") from None
    except CellTimeoutError:
        raise NotebookError(f"{_where(name, cells, current)}: took more than {timeout} s") from None
    except DeadKernelError:
        if interrupted:
            raise KeyboardInterrupt from None
        message = "the kernel died (out of memory, or the code ended the process)"
        raise NotebookError(f"{_where(name, cells, current)}: {message}") from None
    if progress:
        progress(len(cells), len(cells))
    return notebook


def _where(name: str, cells: list[NotebookNode], index: int) -> str:
    first = next((line for line in cells[index].source.split("\n") if line.strip()), "")
    return f"{name}, cell {index} ({first.strip()[:60]})"


def update(source: Path, target: Path, progress: Progress | None = None) -> None:
    """Execute the notebook at ``source`` in the folder of ``target`` and write the result there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    notebook = clear_outputs(read(source))
    write(normalise(execute(notebook, target.parent, source.stem, progress, time_limit(source))), target)


def time_limit(source: Path) -> int | None:
    """Seconds that a cell of this notebook may take: of lessons few, of my_adapter as many as it needs."""
    return None if source.name == MINE.name else TIMEOUT
