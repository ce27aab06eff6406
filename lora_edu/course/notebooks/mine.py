"""``lora-edu lessons mine``: a copy of my_adapter.ipynb for a person's own rows, and its run."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbformat import NotebookNode

from lora_edu.course.notebooks.execute import Progress, execute
from lora_edu.course.notebooks.stored import MINE, NotebookError, clear_outputs, normalise, read, write
from lora_edu.course.notebooks.work import WORK

SETTINGS = "settings"  # the id of the cell that is filled in
RESULTS = "results.json"


@dataclass(frozen=True)
class Copy:
    """A copy for one file: the notebook, the folder of its results beside it, and what was found in the file."""

    notebook: Path
    folder: Path
    rows: int
    parts: dict[str, int]


def copy_for(file: Path, small: bool = False, max_length: int | None = None, target: Path = WORK) -> Copy:
    """Check a file of rows, and write a copy of the notebook with its path filled in. Nothing is overwritten.

    Args:
        file: one JSON object a line, each with ``messages``.
        small: a few rows and steps only, to see whether everything runs.
        max_length: tokens of a row, where the notebook's own number does not fit; what is longer is cut.
        target: the folder for the copy; it gets the file's name, or that name with a number if it is taken.

    Raises:
        FileNotFoundError, ValueError: if there is no such file, or it holds no rows, wrong ones or too few.
    """
    from lora_edu.lab.chat_rows import read_rows
    from lora_edu.lab.splitting import split_rows, without_copies

    rows = read_rows(file)
    parts = {name: len(part) for name, part in split_rows(without_copies(rows)).items()}
    notebook = free_name(target, file.stem)
    folder = notebook.with_suffix("")
    copy = clear_outputs(read(MINE))
    lengths = {} if max_length is None else {"MAX_LENGTH": max_length}
    fill_in(copy, FILE=str(file.resolve()), FOLDER=folder.name, SMALL=small, **lengths)
    write(normalise(copy), notebook)
    return Copy(notebook, folder, len(rows), parts)


def free_name(target: Path, stem: str) -> Path:
    """The first of ``stem.ipynb``, ``stem_2.ipynb``, … for which neither the notebook nor its folder is there."""
    names = [target / f"{stem}{number}.ipynb" for number in ("", *(f"_{n}" for n in range(2, 1000)))]
    return next(path for path in names if not path.exists() and not path.with_suffix("").exists())


def fill_in(notebook: NotebookNode, **values: Any) -> None:
    """Set ``NAME = value`` in the cell of settings, in place; what is said behind a value stays."""
    cell = next(cell for cell in notebook.cells if cell.get("id") == SETTINGS)
    lines = cell.source.split("\n")
    for name, value in values.items():
        place = next(place for place, line in enumerate(lines) if line.startswith(f"{name} = "))
        _, mark, said = lines[place].partition("  #")
        text = json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
        lines[place] = f"{name} = {text}{mark}{said}"
    cell.source = "\n".join(lines)


def run_copy(copy: Copy, progress: Progress | None = None) -> dict[str, Any]:
    """Execute a copy where it lies, however long it takes, and return what it found out.

    The kernel has this process's environment: ``OMP_NUM_THREADS`` sets the threads, ``LORA_EDU_RUN=full`` a GPU.

    Raises:
        NotebookError: naming the cell that failed. What was printed until then is kept in the notebook.
    """
    notebook = read(copy.notebook)
    variables = {**os.environ, "LORA_EDU_PROGRESS": "0", "TOKENIZERS_PARALLELISM": "false"}
    try:
        execute(notebook, copy.notebook.parent, copy.notebook.stem, progress, timeout=None, variables=variables)
    finally:
        write(normalise(notebook), copy.notebook)
    path = copy.folder / RESULTS
    if not path.exists():
        raise NotebookError(f"{copy.notebook.name} ran, and wrote no {path}: was its last cell removed?")
    return json.loads(path.read_text(encoding="utf-8"))


def told(results: dict[str, Any]) -> str:
    """The results in a sentence."""
    losses = ", ".join(f"{name} {loss:.2f}" for name, loss in results["loss"].items())
    served = {
        "adapter": "llama.cpp serves the adapter",
        None: "llama.cpp was not asked, see the notebook",
    }.get(results["served"], f"llama.cpp serves {results['served']}, and not the adapter: see the notebook")
    return f"loss per token on {results['rows']['test']} held-out rows: {losses}; {served}"
