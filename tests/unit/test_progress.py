"""The learner's own progress: what passes, what is next, remembered by content, and nothing of theirs changed."""

import hashlib

import pytest
from nbformat.v4 import new_code_cell
from typer.testing import CliRunner

from lora_edu.course.cli import app
from lora_edu.course.grading import progress
from lora_edu.course.notebooks.stored import EXERCISES, SOLUTIONS, list_notebooks, read, write
from lora_edu.course.notebooks.work import refresh

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
    assert "Next: A1 in exercises/01_low_rank_svd.ipynb" in result.output
    assert sums(work) == before

    monkeypatch.setattr(progress, "grade_one", None)  # from here on nothing may run
    again = call(work)
    assert again.output == "\n".join(line for line in result.output.split("\n") if not line.startswith("running"))
    (work / progress.RECORD).write_text("{ damaged")
    assert call(work).exit_code == 1


def test_when_all_is_done(monkeypatch, tmp_path):
    done = [progress.Standing(NAME, "Start", [("A1 softmax_by_hand", "passed")])]
    monkeypatch.setattr(progress, "standings", lambda *_, **__: done)
    result = call(tmp_path)
    assert "1 of 1 checked exercises pass" in result.output
    assert "Nothing is left to do here." in result.output
