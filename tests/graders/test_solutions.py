"""Every check that a solutions notebook calls passes the solution, whatever it draws, and leaves the stub alone."""

import pytest

from found import calls
from lora_edu.course import checks

pytestmark = pytest.mark.graders


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
