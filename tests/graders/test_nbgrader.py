"""nbgrader as a lecturer calls it: source, release, points, feedback; one exercise notebook, three students."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from nbformat.v4 import new_code_cell
from typer.testing import CliRunner

from lora_edu.course.cli import app
from lora_edu.course.notebooks.exercises import exercise_from, source_from
from lora_edu.course.notebooks.stored import EXERCISES, SOLUTIONS, read, write

pytest.importorskip("nbgrader", reason="nbgrader is not installed: pip install -e '.[class]' -c constraints.txt")
pytestmark = pytest.mark.graders
NAME = "00_start_here"
A1, B1, B1_WORDS, C1_WORDS = "A1_softmax_by_hand", "B1_masked_cross_entropy", "B1_answer", "C1_answer"
REGION = re.compile(r"### BEGIN SOLUTION.*### END SOLUTION", re.S)

# Everything that a notebook can do to write to stderr, around a right answer and inside it.
LOUD = """import logging, os, sys, warnings
logging.getLogger("early").addHandler(logging.StreamHandler())
def loudly():
    warnings.warn("careful")
    print("to stderr", file=sys.stderr)
    logging.getLogger("early").warning("logged")
    os.write(2, b"written by C")
    os.system("echo by a child >&2")"""


def nbgrader(course, *arguments):
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])  # it calls alembic
    command = [sys.executable, "-m", "nbgrader", *arguments]
    done = subprocess.run(command, cwd=course, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def cell_of(notebook, grade_id):
    return next(cell for cell in notebook.cells if cell.metadata.get("nbgrader", {}).get("grade_id") == grade_id)


def hand_in(course, student, notebook):
    write(notebook, course / "submitted" / student / NAME / f"{NAME}.ipynb")


CROSS = """\
def cross(logits, labels):
    picked = logits.gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    return (logits.logsumexp(-1) - picked).mean()"""


def half(solution):
    """A1 passes 3 of 5 steps and B1 1 of 6, which uses a name from a cell of the student's own with a check in it."""
    notebook = source_from(solution)
    a1, b1 = cell_of(notebook, "A1_solution"), cell_of(notebook, "B1_solution")
    naive = "return torch.exp(logits) / torch.exp(logits).sum(dim=-1, keepdim=True)"
    a1.source = REGION.sub(naive, a1.source)
    a1.source += "\n\nimport os, tempfile\nos.chdir(tempfile.gettempdir())"  # away from where the notebook lies
    own = f"checks.softmax_by_hand(softmax, hint=2)\n{CROSS}"
    notebook.cells.insert(notebook.cells.index(b1), new_code_cell(own))
    b1.source = REGION.sub("return cross(logits.flatten(0, 1), labels.flatten())", b1.source)
    return notebook


def full(solution):
    """The solution; A1 also warns in every way that there is, in its own cell and while it is checked."""
    notebook = source_from(solution)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    first.source = f"{LOUD}\n{first.source}"
    cell = cell_of(notebook, "A1_solution")
    cell.source = cell.source.replace("### BEGIN SOLUTION", "loudly()\n    ### BEGIN SOLUTION") + "\n\nloudly()"
    return notebook


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A course, laid out, released, handed in by three students, graded; the lecturer made B1 worth 10 points."""
    course = tmp_path_factory.mktemp("nbgrader") / "course"
    assert CliRunner().invoke(app, ["handout", "00", "--nbgrader", str(course)]).exit_code == 0
    source = course / "source" / NAME / f"{NAME}.ipynb"
    source.write_text(source.read_text().replace('"points": 4', '"points": 10'))
    nbgrader(course, "generate_assignment", NAME)
    solution = read(SOLUTIONS / f"{NAME}.ipynb")
    hand_in(course, "stub", exercise_from(solution))
    hand_in(course, "half", half(solution))
    hand_in(course, "full", full(solution))
    nbgrader(course, "autograde", NAME)
    nbgrader(course, "generate_feedback", NAME)
    return course


@pytest.fixture(scope="module")
def grades(course):
    """Student → cell → (points, or None where a person grades; points that it has)."""
    from nbgrader.api import Gradebook

    with Gradebook(f"sqlite:///{course / 'gradebook.db'}") as book:
        found = [(one.student.id, one.notebooks[0].grades) for one in book.assignment_submissions(NAME)]
        return {who: {one.cell.name: (one.auto_score, one.max_score) for one in many} for who, many in found}


def test_what_nbgrader_releases_is_our_exercise(course):
    released, ours = read(course / "release" / NAME / f"{NAME}.ipynb"), read(EXERCISES / f"{NAME}.ipynb")
    assert [cell.source for cell in released.cells[1:]] == [cell.source for cell in ours.cells[1:]]
    for cell, own in zip(released.cells, ours.cells, strict=True):
        marks = dict(cell.metadata.get("nbgrader", {}))
        for added in ("checksum", "cell_type"):
            marks.pop(added, None)
        if marks.get("grade_id") == B1:
            assert marks.pop("points") == 10
            assert own.metadata.nbgrader.pop("points") == 4
        assert marks == own.metadata.get("nbgrader", {})


def test_an_untouched_stub_has_no_points(grades):
    assert grades["stub"] == {A1: (0, 1), B1: (0, 10), B1_WORDS: (0, 1), C1_WORDS: (0, 8)}


def test_half_right_has_its_share_of_the_points_that_the_lecturer_chose(grades):
    assert grades["half"][A1] == (0.6, 1)
    assert grades["half"][B1] == (1.67, 10)


def test_a_right_answer_has_all_points_whatever_it_says_on_the_way(grades):
    assert grades["full"] == {A1: (1, 1), B1: (10, 10), B1_WORDS: (None, 1), C1_WORDS: (None, 8)}


def test_feedback_shows_the_sentences_of_the_checks(course):
    pages = {who: (course / "feedback" / who / NAME / f"{NAME}.html").read_text() for who in ("stub", "half", "full")}
    assert "not done yet" in pages["stub"]
    assert "3 of 5 steps right" in pages["half"]
    assert "run_steps" not in pages["half"]  # a sentence, no traceback through the checks
    assert "careful" in pages["full"]
