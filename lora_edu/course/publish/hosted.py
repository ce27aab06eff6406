"""Lessons for Colab and Kaggle: a copy whose first cell gets the course and installs what it needs.

The cell's code is this module's own: the parts that ``CELL`` names are copied into it as they stand. They use the
standard library and ``packaging``, because a new runtime promises nothing else. Versions come from the
``pyproject.toml`` of the course that the cell has fetched, and are written nowhere else.
"""

import importlib.metadata
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from nbformat import NotebookNode
from nbformat.v4 import new_code_cell

from lora_edu.course.notebooks.stored import BUILD, NotebookError, clear_outputs, find_notebook, normalise, read, write
from lora_edu.files import ROOT

OPENING = """\
# Run this cell first. On Colab and Kaggle it gets the course and installs what the lesson needs, in a minute or two;
# PyTorch stays as the runtime brings it. Where the course is installed, and on your own machine, it does nothing.
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
"""


class NotReady(RuntimeError):
    """The runtime cannot run the course. A notebook shows the sentence, without a traceback."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


def call(command: list[str], otherwise: str) -> str:
    """Show a command, run it, and return what it printed; if it fails, raise its last line and what to do."""
    print("$", *("python" if part == sys.executable else part for part in command))
    variables = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}  # in a notebook nobody can answer git's questions
    out, err = subprocess.PIPE, subprocess.STDOUT
    try:
        done = subprocess.run(command, env=variables, stdin=subprocess.DEVNULL, stdout=out, stderr=err, text=True)
    except FileNotFoundError:
        raise NotReady(f"{command[0]} is not installed in this runtime. {otherwise}") from None
    if done.returncode:
        said = done.stdout.strip().splitlines() or [f"exit code {done.returncode}"]
        raise NotReady(f"That did not work: {said[-1].strip().rstrip('.')}. {otherwise}")
    return done.stdout.strip()


def requirements(pyproject: Path) -> list[str]:
    """What a lesson needs, by the ranges of pyproject.toml; PyTorch as it is installed, if that is in its range."""
    import tomllib

    from packaging.requirements import Requirement

    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    wanted = {Requirement(text).name: text for text in project["dependencies"]}
    wanted |= {Requirement(text).name: text for text in project["optional-dependencies"]["course"]}
    for name in ("ipykernel", "jupyterlab", "nbclient", "nbconvert", "nbformat"):
        wanted.pop(name, None)  # the notebook server is the runtime's own
    installed = {found.name for found in importlib.metadata.distributions()}
    if "torch" in installed:
        version = importlib.metadata.version("torch")
        if Requirement(wanted["torch"]).specifier.contains(version, prereleases=True):
            wanted["torch"] = f"torch=={version}"
        else:
            print(f"torch {version} is replaced, because the course needs {wanted['torch']}: this takes some minutes")
            wanted |= {name: name for name in ("torchvision", "torchaudio") if name in installed}  # made for one torch
    return list(wanted.values())


def set_up(repository: str, bases: list[str]) -> None:
    """Get the course and install what it needs, on Colab and Kaggle only; do nothing where it is installed."""
    hosts = {"KAGGLE_KERNEL_RUN_TYPE": "Kaggle", "COLAB_RELEASE_TAG": "Colab"}  # Kaggle's image is made from Colab's
    host = next((name for variable, name in hosts.items() if variable in os.environ), None)
    if host is None or importlib.util.find_spec("lora_edu"):
        return
    if importlib.util.find_spec("tomllib") is None:
        raise NotReady(f"The course needs Python 3.11 or newer, and this runtime has {sys.version.split()[0]}.")
    again = "Check that the runtime has internet, then run this cell again."
    if host == "Kaggle":
        again = "Switch on Internet in the notebook's settings, at the side, then run this cell again."
    course = Path.home() / "lora-edu"
    if not (course / "pyproject.toml").is_file():
        call(["git", "clone", "--quiet", "--depth", "1", "--", repository, str(course)], again)
    loaded = {name for name in ("torch", "numpy", "transformers", "matplotlib") if name in sys.modules}
    before = {name: importlib.metadata.version(name) for name in loaded}
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    call([*pip, *requirements(course / "pyproject.toml"), "--editable", str(course)], again)
    for base in bases:
        print(call([sys.executable, "-m", "lora_edu.course.cli", "bases", "fetch", base], again).split("\n")[-1])
    importlib.invalidate_caches()
    if old := sorted(name for name in before if importlib.metadata.version(name) != before[name]):
        raise NotReady(f"Installed. Restart the runtime now: it still holds the old {' and '.join(old)}.")
    sys.path.insert(0, str(course))  # new processes find the course by themselves, this one has started before
    print(f"The course is ready in {course}, with torch {importlib.metadata.version('torch')}.")


CELL = (NotReady, call, requirements, set_up)


def first_cell(repository: str, bases: list[str]) -> str:
    """The source of the first cell, for a repository's address and the base models that the lesson loads."""
    parts = [OPENING, *(inspect.getsource(part) for part in CELL)]
    return "\n\n".join(parts) + f"\n\nset_up({json.dumps(repository)}, bases={json.dumps(bases)})"


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
    if not re.fullmatch(r"(https|file)://\S+", address):
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
    notebook = clear_outputs(read(source))
    if any("def set_up(" in cell.source for cell in notebook.cells[:1]):
        raise NotebookError(f"{source.name} is a copy for hosted runtimes already: export the lesson itself")
    cell = new_code_cell(first_cell(address, bases_of(notebook)))
    cell["id"] = "hosted-set-up"
    notebook.cells.insert(0, cell)
    output = output or BUILD / "export" / f"{source.stem}.hosted.ipynb"
    write(normalise(notebook), output)
    return output
