"""Lessons for Colab and Kaggle: a copy whose first cell gets the course and installs what the lesson needs."""

import re
import tomllib
from pathlib import Path

from nbformat import NotebookNode
from nbformat.v4 import new_code_cell

from lora_edu.course.notebooks.stored import (
    BUILD,
    NotebookError,
    find_notebook,
    normalise,
    read,
    write,
)
from lora_edu.course.notebooks.your_turn import learners_copy
from lora_edu.files import ROOT

# Versions come from the pyproject.toml of the course that the cell has fetched, and are written nowhere else. The extra
# "lessons" leaves the notebook server out: it is the host's own.
CELL = """\
# On Colab and Kaggle, run this cell first: it gets the course and installs what the lesson needs, in a minute or two.
# (Kaggle: switch on Internet in the notebook's settings before.) Where the course is installed, it does nothing.
import importlib.util
import sys

if importlib.util.find_spec("lora_edu") is None:
    !git clone --quiet --depth 1 -- REPOSITORY lora-edu
    %pip install --quiet --editable "./lora-edu[lessons]"
    sys.path.insert(0, "lora-edu")  # new processes find the course by themselves, this one has started before"""
FETCH = """
    !{sys.executable} -m lora_edu.course.cli bases fetch BASES"""
CELL_ID = "hosted-set-up"


def first_cell(repository: str, bases: list[str]) -> str:
    """The source of the first cell, for a repository's address and the base models that the lesson loads."""
    cell = CELL.replace("REPOSITORY", repository)
    return cell + FETCH.replace("BASES", " ".join(bases)) if bases else cell


def repository_address(given: str | None = None, pyproject: Path = ROOT / "pyproject.toml") -> str:
    """Where the course can be cloned from: as given, else ``Repository`` under [project.urls] in pyproject.toml.

    Raises:
        ValueError: if there is neither, or the address has no form that git could use without a password.
    """
    urls = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"].get("urls", {})
    known = next((url for name, url in urls.items() if name.lower() in ("repository", "source")), None)
    address = given or known
    if not address:
        raise ValueError(
            "no repository to clone the course from: pass --repository with its https address, or add it once to "
            "pyproject.toml, as Repository under [project.urls]"
        )
    if not re.fullmatch(r"(https|file)://[\w./:~%+@-]+", address):
        raise ValueError(f"--repository {address}: expected an address that starts with https://")
    return address


def bases_of(notebook: NotebookNode) -> list[str]:
    """The base models that a notebook loads and that do not come with the repository."""
    from lora_edu.lab.bases import list_bases

    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    loaded = set(re.findall(r"\b(?:load|require)_base\(\s*[\"']([^\"']+)", code))
    return [base.name for base in list_bases() if base.name in loaded and base.origin != "this repository"]


def export_hosted(name: str, repository: str | None = None, output: Path | None = None) -> Path:
    """Write a copy of a notebook for Colab and Kaggle, with its outputs cleared, and return its path.

    Args:
        name: number, name or path of a notebook.
        repository: where the course can be cloned from; see ``repository_address``.
        output: the file to write, by default ``build/export/NAME.hosted.ipynb``.

    Raises:
        ValueError: if no usable address is known.
        NotebookError: if there is no such notebook, or it is such a copy already.
    """
    source = find_notebook(name)
    address = repository_address(repository)
    notebook = learners_copy(read(source))
    if any(cell.get("id") == CELL_ID for cell in notebook.cells[:1]):
        raise NotebookError(f"{source.name} is a copy for hosted runtimes already: export the lesson itself")
    cell = new_code_cell(first_cell(address, bases_of(notebook)))
    cell["id"] = CELL_ID
    notebook.cells.insert(0, cell)
    output = output or BUILD / "export" / f"{source.stem}.hosted.ipynb"
    write(normalise(notebook), output)
    return output
