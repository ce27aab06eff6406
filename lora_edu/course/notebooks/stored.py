"""Where the notebooks lie, and the one canonical form in which they are stored, so that they can be compared."""

import re
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from lora_edu.files import ROOT, write_atomically

LESSONS = ROOT / "lessons"
SOLUTIONS = LESSONS / "solutions"
EXERCISES = LESSONS / "exercises"
MINE = LESSONS / "my_adapter.ipynb"  # no lesson: the form that a person's own rows are filled into
BUILD = ROOT / "build"

KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
LANGUAGE = {
    "codemirror_mode": {"name": "ipython", "version": 3},
    "file_extension": ".py",
    "mimetype": "text/x-python",
    "name": "python",
    "nbconvert_exporter": "python",
    "pygments_lexer": "ipython3",
}
CELL_METADATA = {"tags", "reason", "slideshow", "stub", "mystnb", "alt", "nbgrader"}


class NotebookError(RuntimeError):
    """A notebook that cannot be found, read or run; the message is one line and names it."""


def list_notebooks(folder: Path = LESSONS) -> list[Path]:
    """The notebooks of a folder in the order of their numbers."""
    return sorted(path for path in folder.glob("*.ipynb") if re.match(r"\d\d_", path.name))


def find_notebook(name: str | Path, folder: Path = LESSONS) -> Path:
    """A notebook by path, by file name with or without its ending, or by number: "3", "03", "03_lora_layer".

    Lessons have numbers; ``my_adapter`` is found by its name alone.

    Raises:
        NotebookError: if there is none, or more than one.
    """
    if Path(name).suffix == ".ipynb" and Path(name).is_file():
        return Path(name).resolve()
    stem = Path(name).stem if Path(name).suffix == ".ipynb" else Path(name).name
    there = [*list_notebooks(folder), *(path for path in [folder / MINE.name] if path.is_file())]
    wanted = f"{int(stem):02d}_" if stem.isdecimal() else stem
    found = [path for path in there if path.stem == wanted or (stem.isdecimal() and path.name.startswith(wanted))]
    if len(found) != 1:
        names = ", ".join(path.stem for path in there) or "none"
        raise NotebookError(f"no notebook {str(name)!r} in {folder.name}/: there are {names}")
    return found[0]


def read(path: Path) -> NotebookNode:
    """A notebook from disk.

    Raises:
        NotebookError: if it is not there or is no notebook.
    """
    try:
        return nbformat.reads(path.read_text(encoding="utf-8-sig"), as_version=4)
    except FileNotFoundError:
        raise NotebookError(f"{path}: there is no such notebook") from None
    except Exception as error:
        raise NotebookError(f"{path}: not a notebook ({str(error).splitlines()[0]})") from error


def stored_text(name: str, cell_id: str) -> str:
    """What a lesson's cell printed when it was stored, for readers who lack what the cell needs.

    Raises:
        NotebookError: if there is no such lesson, or no such cell in it.
    """
    path = find_notebook(name)
    cell = next((cell for cell in read(path).cells if cell.get("id") == cell_id), None)
    if cell is None:
        raise NotebookError(f"{path.name} has no cell {cell_id!r}")
    return "".join(output.text for output in cell.get("outputs", []) if output.output_type == "stream").rstrip("\n")


def title(notebook: NotebookNode) -> str:
    """The text of a notebook's first heading."""
    lines = (line for cell in notebook.cells if cell.cell_type == "markdown" for line in cell.source.split("\n"))
    return next((line[2:].strip() for line in lines if line.startswith("# ")), "")


def normalise(notebook: NotebookNode) -> NotebookNode:
    """Bring a notebook into its canonical form, in place: the same content always gives the same file.

    Only the metadata that the course uses stays; execution counts run from 1; consecutive pieces of one stream are
    one; the alternative texts that ``plots.show`` left in the outputs are copied to the cell, where MyST-NB reads them.
    """
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    notebook.metadata = NotebookNode(kernelspec=dict(KERNELSPEC), language_info=dict(LANGUAGE))
    seen: set[str] = set()
    count = 0
    for index, cell in enumerate(notebook.cells):
        identity = cell.get("id") or f"cell-{index:02d}"
        while identity in seen:
            identity += "-again"
        cell["id"] = identity
        seen.add(identity)
        cell.source = "\n".join(line.rstrip() for line in cell.source.strip("\n").split("\n"))
        cell.metadata = NotebookNode({key: value for key, value in cell.metadata.items() if key in CELL_METADATA})
        if cell.cell_type != "code":
            continue
        if cell.get("execution_count") is not None:
            count += 1
            cell.execution_count = count
        _tidy_outputs(cell)
        _copy_alternative_texts(cell)
    return notebook


def _tidy_outputs(cell: NotebookNode) -> None:
    tidy: list[NotebookNode] = []
    for output in cell.outputs:
        if output.output_type == "stream" and tidy and tidy[-1].get("name") == output.name:
            tidy[-1].text += output.text
        else:
            tidy.append(output)
        if "execution_count" in output:
            output.execution_count = cell.execution_count
        output.pop("transient", None)
    cell.outputs = tidy


def _copy_alternative_texts(cell: NotebookNode) -> None:
    texts = [
        output.metadata["image/png"]["alt"]
        for output in cell.outputs
        if output.output_type == "display_data" and "alt" in output.get("metadata", {}).get("image/png", {})
    ]
    for stale in ("mystnb", "alt"):
        cell.metadata.pop(stale, None)
    if texts:
        cell.metadata["mystnb"] = {"image": {"alt": " ".join(texts)}}


def dumps(notebook: NotebookNode) -> str:
    """The canonical text of a notebook: sorted keys, one space of indent, a newline at the end."""
    return nbformat.writes(notebook, version=4).rstrip("\n") + "\n"


def write(notebook: NotebookNode, path: Path) -> None:
    """Write a notebook whole or not at all: a reader never sees half a file."""
    write_atomically(path, dumps(notebook).encode())


def clear_outputs(notebook: NotebookNode) -> NotebookNode:
    """Remove outputs and execution counts, in place: for the copy that a learner works in."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
            cell.metadata.pop("mystnb", None)
    return notebook
