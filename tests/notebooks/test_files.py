"""The notebooks on disk, read and not run: executed, canonical, complete, and linked to what exists."""

import re

import pytest

from lora_edu.course.notebooks import inspection
from lora_edu.course.notebooks.exercises import outdated
from lora_edu.course.notebooks.predictions import shares
from lora_edu.course.notebooks.stored import EXERCISES, LESSONS, MINE, SOLUTIONS, list_notebooks, read
from lora_edu.course.publish import methods
from lora_edu.course.publish.claims import PAGE, claims_page, lessons_by_claim, read_ledger, unlinked_claims
from lora_edu.files import data_path
from lora_edu.lab.recording import referee

LESSON_FILES = list_notebooks(LESSONS)
SOLUTION_FILES = list_notebooks(SOLUTIONS)
EXERCISE_FILES = list_notebooks(EXERCISES)


def named(path):
    return f"{path.parent.name}/{path.stem}"


def test_there_are_lessons_with_solutions_and_exercises():
    assert len(LESSON_FILES) >= 6
    assert [path.name for path in SOLUTION_FILES] == [path.name for path in LESSON_FILES]
    assert [path.name for path in EXERCISE_FILES] == [path.name for path in LESSON_FILES]


@pytest.mark.parametrize("path", [*LESSON_FILES, *SOLUTION_FILES, *EXERCISE_FILES, MINE], ids=named)
def test_form(path):
    assert list(inspection.problems_of_any(path)) == []


@pytest.mark.parametrize("path", [*LESSON_FILES, *SOLUTION_FILES, MINE], ids=named)
def test_outputs(path):
    assert list(inspection.problems_of_executed(read(path))) == []


@pytest.mark.parametrize("path", LESSON_FILES, ids=named)
def test_template(path):
    assert list(inspection.problems_of_lesson(read(path), path.name[:2])) == []


@pytest.mark.parametrize("path", LESSON_FILES, ids=named)
def test_budget(path):
    assert list(inspection.over_budget(read(path), path.name[:2])) == []


def test_no_letter_is_right_too_often_or_too_seldom():
    found = shares([read(path) for path in LESSON_FILES])
    assert found.keys() == set("abcd")
    assert all(0.15 <= share <= 0.40 for share in found.values()), found


@pytest.mark.parametrize("path", SOLUTION_FILES, ids=named)
def test_solutions_have_all_tiers(path):
    assert list(inspection.problems_of_solution(read(path), path.name[:2])) == []


@pytest.mark.parametrize("path", LESSON_FILES + EXERCISE_FILES, ids=named)
def test_only_solutions_are_tagged_so(path):
    assert not [i for i, cell in enumerate(read(path).cells) if "solution" in cell.metadata.get("tags", [])]


def test_exercises_are_what_the_solutions_give():
    assert outdated() == []


def test_the_ledger_has_every_claim_that_a_lesson_names():
    assert {claim.id: claim.shown for claim in read_ledger().claims if claim.shown} == lessons_by_claim()


@pytest.mark.parametrize("path", LESSON_FILES + SOLUTION_FILES + EXERCISE_FILES, ids=named)
def test_every_claim_links_to_its_entry(path):
    assert list(unlinked_claims(read(path), {claim.id for claim in read_ledger().claims})) == []


def test_the_page_of_claims_is_what_the_ledger_gives():
    assert PAGE.read_text(encoding="utf-8") == claims_page(read_ledger())


def test_the_page_of_methods_is_what_cards_and_record_give():
    record = referee.read(data_path("runs", "referee.json"))
    assert methods.PAGE.read_text(encoding="utf-8") == methods.methods_page(record)


@pytest.mark.parametrize("path", EXERCISE_FILES, ids=named)
def test_nbgrader_accepts_the_exercises(path):
    nbgrader = pytest.importorskip("nbgrader.nbgraderformat")
    nbgrader.MetadataValidator().validate_nb(read(path))
    marks = [cell.metadata.nbgrader for cell in read(path).cells if "nbgrader" in cell.metadata]
    assert sum(mark.get("points", 0) for mark in marks) >= 10


def test_few_cells_are_exempt_from_comparison():
    counts = {path: inspection.ignored_cells(read(path)) for path in LESSON_FILES + SOLUTION_FILES}
    timing = {path for path in counts if path.name[:2] in inspection.TIMING_LESSONS}
    for path in timing:
        ignored, cells = counts[path]
        assert ignored <= inspection.IGNORED_SHARE_TIMING * cells, path.name
    ignored = sum(counts[path][0] for path in counts if path not in timing)
    cells = sum(counts[path][1] for path in counts if path not in timing)
    assert ignored <= inspection.IGNORED_SHARE * cells


def test_lesson_00_says_which_lessons_are_not_there_yet():
    text = "\n".join(cell.source for cell in read(LESSON_FILES[0]).cells if cell.cell_type == "markdown")
    named = set()
    for first, last in re.findall(r"(\d\d)(?:–(\d\d))?", re.search(r"\*\*Not there yet:\*\* ([\d–, ]+)", text)[1]):
        named.update(range(int(first), int(last or first) + 1))
    assert named == set(range(27)) - {int(path.name[:2]) for path in LESSON_FILES}
