"""The graders are tried on the solutions themselves, taken from the solutions' notebooks, and on their stubs."""

import os
import warnings
from pathlib import Path

import pytest

from lora_edu.course.notebooks.exercises import exercise_from
from lora_edu.course.notebooks.stored import SOLUTIONS, find_notebook, read


@pytest.fixture(scope="session")
def from_solution():
    """``from_solution("03_lora_layer", "MyLoRA")``: the object that the solutions notebook defines."""
    return lambda notebook, name: _namespace(notebook, stub=False)[name]


@pytest.fixture(scope="session")
def from_stub():
    """``from_stub("03_lora_layer", "MyLoRA")``: the same object as the learner first sees it, not done yet."""
    return lambda notebook, name: _namespace(notebook, stub=True)[name]


@pytest.fixture(autouse=True)
def fixed_draws(monkeypatch):
    """The checks' draws are fixed here. Set LORA_EDU_CHECK_SEED to try others: all must hold with these as well."""
    monkeypatch.setenv("LORA_EDU_CHECK_SEED", os.environ.get("LORA_EDU_CHECK_SEED", "0"))


_CACHE: dict[tuple[Path, bool], dict] = {}


def _namespace(notebook: str, stub: bool) -> dict:
    """The names that a solutions notebook defines: its imports and solution cells are run, its checks are not."""
    path = find_notebook(notebook, SOLUTIONS)
    if (path, stub) not in _CACHE:
        content = exercise_from(read(path), path.name) if stub else read(path)
        space: dict = {"__name__": f"solutions_{path.stem}"}
        for index, cell in enumerate(content.cells):
            if cell.cell_type != "code" or "check" in cell.metadata.get("tags", []):
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exec(compile(cell.source, f"{path.name}, cell {index}", "exec"), space)
        _CACHE[path, stub] = space
    return _CACHE[path, stub]
