"""The learner's own progress: what passes, what is next, remembered by content, and nothing of theirs changed."""

import errno
import hashlib
import os
import zipfile

import pytest
from nbformat.v4 import new_code_cell
from typer.testing import CliRunner

from lora_edu.course.cli import app
from lora_edu.course.grading import progress
from lora_edu.course.grading.classroom import Row
from lora_edu.course.notebooks.stored import EXERCISES, SOLUTIONS, list_notebooks, read, write
from lora_edu.course.notebooks.work import refresh
from lora_edu.course.publish.handout import TOP

NAME = "00_start_here"


def call(folder):
    return CliRunner().invoke(app, ["progress", str(folder)])


def solve(work, first=""):
    notebook = read(SOLUTIONS / f"{NAME}.ipynb")
    notebook.cells.insert(1, new_code_cell(first))
    write(notebook, work / "exercises" / f"{NAME}.ipynb")


def sums(folder):
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != progress.RECORD]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def work(tmp_path):
    refresh(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def nothing_runs(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a notebook was run")

    monkeypatch.setattr(progress, "grade_one", refuse)


def test_before_there_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("lora_edu.course.notebooks.work.WORK", tmp_path / "work")
    monkeypatch.setattr(progress, "WORK", tmp_path / "work")
    result = CliRunner().invoke(app, ["progress"])
    assert result.exit_code == 1
    assert result.stderr.strip().startswith("lora-edu: there is no work/ yet: lora-edu lab makes your own copy")
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_folder_without_exercises(tmp_path):
    result = call(tmp_path)
    assert result.exit_code == 1
    assert "holds no exercise notebook" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_untouched_copy_is_not_run(work, nothing_runs):
    result = call(work)
    assert result.exit_code == 0, result.output
    assert "0 of 2   ○ A1  ○ B1" in result.output
    path = work / "exercises" / f"{NAME}.ipynb"
    assert f"Next: A1 in {path} (lora-edu check {path} says more)" in result.output


def test_in_work_a_number_is_enough(work, nothing_runs, monkeypatch):
    monkeypatch.setattr("lora_edu.course.notebooks.work.WORK", work)
    monkeypatch.setattr(progress, "WORK", work)
    (work / "exercises" / f"{NAME}.ipynb").unlink()
    result = CliRunner().invoke(app, ["progress"])
    assert "0 of 2   ○ A1  ○ B1" in result.output  # also one that was thrown away
    assert f"Next: A1 in exercises/{NAME}.ipynb (lora-edu check 00 says more)" in result.output


def test_a_changed_notebook_is_run_once(work, monkeypatch):
    (work / "exercises" / "mine.txt").write_text("my own text")
    solve(work, "assert open('mine.txt').read() == 'my own text'\nopen('left.txt', 'w').write('x')")
    other = work / "exercises" / "01_low_rank_svd.ipynb"
    notebook = read(other)
    for cell in notebook.cells:
        cell.source = cell.source.replace('raise NotImplementedError("your code here")', "return W * 0", 1)
    write(notebook, other)
    before = sums(work)
    result = call(work)
    assert result.exit_code == 0, result.output
    assert "2 of 2   ✓ A1  ✓ B1" in result.output
    assert "0 of 4   ✗ A1" in result.output
    total = sum(len(progress.checks_of(path)) for path in list_notebooks(EXERCISES))
    assert f"2 of {total} checked exercises pass" in result.output
    assert f"Next: A1 in {work}/exercises/01_low_rank_svd.ipynb" in result.output
    assert sums(work) == before

    monkeypatch.setattr(progress, "grade_one", None)  # from here on nothing may run
    again = call(work)
    assert again.output == "\n".join(line for line in result.output.split("\n") if not line.startswith("running"))
    (work / progress.RECORD).write_text("{ damaged")
    assert call(work).exit_code == 1


@pytest.fixture
def handout(tmp_path):
    CliRunner().invoke(app, ["handout", "01", "03-04", "-o", str(tmp_path / "h.zip")])
    with zipfile.ZipFile(tmp_path / "h.zip") as archive:
        archive.extractall(tmp_path)
    return tmp_path / TOP


def test_a_hand_out_lists_its_own_lessons(handout, nothing_runs):
    (handout / "exercises" / "04_lora_in_a_model.ipynb").unlink()
    result = call(handout)
    assert result.exit_code == 0, result.output
    assert [line.rstrip() for line in result.output.splitlines()] == [
        f"{'01_low_rank_svd':32} 0 of 4   ○ A1  ○ A2  ○ B1  ○ C1",
        f"{'03_lora_layer':32} 0 of 5   ○ A1  ○ A2  ○ A3  ○ B1  ○ C1",
        f"{'04_lora_in_a_model':32} 0 of 0   there is no exercise notebook of this lesson here",
        "0 of 9 checked exercises pass",
        f"Next: A1 in {handout}/exercises/01_low_rank_svd.ipynb "
        f"(lora-edu check {handout}/exercises/01_low_rank_svd.ipynb says more)",
    ]


def test_a_hand_out_with_the_library(handout, tmp_path, nothing_runs):
    handout.rename(tmp_path / "lessons")
    assert "0 of 13 checked exercises pass" in call(tmp_path).output


def test_notebooks_under_other_names_count(handout, monkeypatch):
    """The newest of several, as in a class."""
    folder = handout / "exercises"
    (folder / "01_low_rank_svd.ipynb").rename(folder / "一.IPYNB")
    changed = read(folder / "03_lora_layer.ipynb")
    changed.cells.append(new_code_cell("1"))
    write(changed, folder / "03_lora_layer (1).ipynb")
    ran = []

    def grade_one(one, *_):
        ran.append(one.path.name)
        return [
            Row("", one.exercise, each.label, "passed")
            for each in progress.checks_of(EXERCISES / "03_lora_layer.ipynb")
        ]

    monkeypatch.setattr(progress, "grade_one", grade_one)
    result = call(folder)
    assert ran == ["03_lora_layer (1).ipynb"]
    assert "0 of 4   ○ A1" in result.output
    assert "5 of 5   ✓ A1" in result.output


def test_a_folder_that_is_read_only(handout, monkeypatch, nothing_runs):
    def refuse(**where):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(where["dir"]))

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    result = call(handout)
    assert result.exit_code == 0
    first, *_, last = result.output.splitlines()
    assert first == (f"{handout} cannot be written (Read-only file system): next time the same notebooks are run again")
    assert last.startswith("Next: A1")


def test_when_all_is_done(monkeypatch, tmp_path):
    done = [progress.Standing(NAME, "Start", [("A1 softmax_by_hand", "passed")])]
    monkeypatch.setattr(progress, "standings", lambda *_, **__: done)
    result = call(tmp_path)
    assert "1 of 1 checked exercises pass" in result.output
    assert "Nothing is left to do here." in result.output
