"""Every check that a solutions notebook calls passes the solution, whatever it draws, and leaves the stub alone."""

import re

import pytest

from lora_edu.course import checks
from lora_edu.course.notebooks.stored import SOLUTIONS, list_notebooks, read

pytestmark = pytest.mark.graders


def calls() -> list:
    """(notebook, check, names of the learner's objects) for each cell tagged "check"."""
    found = []
    for path in list_notebooks(SOLUTIONS):
        for cell in read(path).cells:
            if "check" in cell.metadata.get("tags", []):
                check, objects = re.search(r"checks\.(\w+)\(([\w, ]+)\)", cell.source).groups()
                found.append(pytest.param(path.stem, check, re.split(r",\s*", objects), id=f"{path.stem[:2]} {check}"))
    return found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("notebook", "check", "objects"), calls())
def test_the_solution_passes(notebook, check, objects, seed, from_solution, monkeypatch):
    monkeypatch.setenv("LORA_EDU_CHECK_SEED", str(seed))
    report = getattr(checks, check)(*(from_solution(notebook, name) for name in objects))
    assert report.status == "passed", report.text


@pytest.mark.parametrize(("notebook", "check", "objects"), calls())
def test_the_stub_is_not_done_yet(notebook, check, objects, from_stub):
    report = getattr(checks, check)(*(from_stub(notebook, name) for name in objects))
    assert report.status == "not done", report.text
    assert "not done yet" in report.text
    assert report.passed == []  # nbgrader counts the steps that are right, and an untouched stub has none
