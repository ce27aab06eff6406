"""The handout: what is asked for and no more, always the same bytes, and no solution in it."""

import json
import os
import re
import zipfile

import pytest
from typer.testing import CliRunner

from lora_edu.course.cli import app
from lora_edu.course.notebooks.exercises import ANSWER, BEGIN, END
from lora_edu.course.notebooks.stored import EXERCISES, LESSONS, SOLUTIONS, NotebookError, list_notebooks, read
from lora_edu.course.publish import handout, nbgrader


def call(*arguments):
    return CliRunner().invoke(app, ["handout", *map(str, arguments)])


def names(path):
    with zipfile.ZipFile(path) as archive:
        return [name.removeprefix(f"{handout.TOP}/") for name in archive.namelist()]


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    path = tmp_path_factory.mktemp("handout") / "all.zip"
    assert call("-o", path).exit_code == 0
    return path


def solution_lines(path):
    """The lines of code that only the solution has: what stands between its markers and nowhere outside them."""
    inside, outside = set(), set()
    for cell in read(path).cells:
        marked = False
        for line in map(str.strip, cell.source.split("\n")):
            marked = line == BEGIN if line in (BEGIN, END) else marked
            if len(line) > 20:
                (inside if marked and cell.cell_type == "code" else outside).add(line)
    return inside - outside


def test_all_by_default(everything):
    lessons = [path.name for path in list_notebooks(LESSONS)]
    exercises = [f"exercises/{path.name}" for path in list_notebooks(EXERCISES)]
    assert names(everything) == sorted(
        [*lessons, *exercises, "LICENSE", "LICENSE-lessons", "README.md", "my_adapter.ipynb"]
    )


def test_no_solution_is_in_it(everything):
    wanted = {line for path in list_notebooks(SOLUTIONS) for line in solution_lines(path)}
    answers = [
        cell.source
        for path in list_notebooks(SOLUTIONS)
        for cell in read(path).cells
        if cell.cell_type == "markdown" and "solution" in cell.metadata.get("tags", [])
    ]
    assert len(wanted) > 100
    assert len(answers) > 5
    with zipfile.ZipFile(everything) as archive:
        for name in archive.namelist():
            text = archive.read(name).decode()
            assert "solutions" not in name
            assert BEGIN not in text
            if "/exercises/" not in name:
                continue
            cells = ["".join(cell["source"]) for cell in json.loads(text)["cells"]]
            given = {line.strip() for cell in cells for line in cell.split("\n")}
            own = solution_lines(SOLUTIONS / name.rsplit("/", 1)[1])
            assert own
            assert given & own == set(), name
            assert not [answer for answer in answers if any(answer[:200] in cell for cell in cells)]
            assert any(cell == ANSWER for cell in cells), name


def test_the_scan_finds_a_solution():
    path = next(iter(list_notebooks(SOLUTIONS)))
    code = "\n".join(cell.source for cell in read(path).cells)
    assert {line.strip() for line in code.split("\n")} & solution_lines(path)


def test_outputs_are_cleared(everything):
    with zipfile.ZipFile(everything) as archive:
        for name in archive.namelist():
            if name.endswith(".ipynb"):
                cells = [cell for cell in json.loads(archive.read(name))["cells"] if cell["cell_type"] == "code"]
                assert cells
                assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells)
                assert not any("mystnb" in cell["metadata"] for cell in cells)


def test_the_same_bytes_each_time(everything, tmp_path, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 2e9)
    assert call("-o", tmp_path / "again.zip").exit_code == 0
    assert (tmp_path / "again.zip").read_bytes() == everything.read_bytes()


def test_links_between_its_notebooks_lead_somewhere(everything):
    there = set(names(everything))
    with zipfile.ZipFile(everything) as archive:
        for name in sorted(there):
            if not name.endswith(".ipynb"):
                continue
            text = archive.read(f"{handout.TOP}/{name}").decode()
            for target in re.findall(r"\]\(([\w./]+\.ipynb)\)", text):
                assert os.path.normpath(os.path.join(os.path.dirname(name), target)) in there, f"{name}: {target}"


@pytest.mark.parametrize(
    ("asked", "numbers"),
    [
        (["03"], "03"),
        (["3", "00"], "00 03"),
        (["00-02"], "00 01 02"),
        (["00-01", "01_low_rank_svd", "05"], "00 01 05"),
    ],
    ids=str,
)
def test_choosing(asked, numbers, tmp_path):
    assert call(*asked, "-o", tmp_path / "h.zip").exit_code == 0
    assert [name[:2] for name in names(tmp_path / "h.zip") if re.match(r"\d\d_", name)] == numbers.split()


@pytest.mark.parametrize(("asked", "words"), [("97", "no notebook '97'"), ("97-99", "no lesson has a number from 97")])
def test_errors_are_one_line(asked, words, tmp_path):
    result = call(asked, "-o", tmp_path / "h.zip")
    assert result.exit_code == 1
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_its_page_names_what_is_in_it(tmp_path):
    assert call("03", "-o", tmp_path / "h.zip").exit_code == 0
    with zipfile.ZipFile(tmp_path / "h.zip") as archive:
        page = archive.read(f"{handout.TOP}/README.md").decode()
    for words in (
        "`03_lora_layer.ipynb`: 03 A LoRA layer by hand",
        "exercises/03_lora_layer.ipynb",
        "ada__03_",
        "CC BY",
    ):
        assert words in page
    assert "{" not in page.replace("NotImplementedError", "")


def test_with_the_library_it_can_be_installed(tmp_path):
    assert call("00", "--library", "-o", tmp_path / "h.zip").exit_code == 0
    there = names(tmp_path / "h.zip")
    for name in ("pyproject.toml", "README.md", "HANDOUT.md", "Makefile", "constraints.txt", "lora_edu/core/layer.py"):
        assert name in there
    assert "data/tiny/config.json" in there
    assert [name for name in there if name.endswith(".ipynb")] == [
        "lessons/00_start_here.ipynb",
        "lessons/exercises/00_start_here.ipynb",
        "lessons/my_adapter.ipynb",
    ]
    assert not [name for name in there if "__pycache__" in name or name.startswith(("tests", ".git", "build"))]


def test_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "h.zip"
    path.write_text("old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    assert call("00", "-o", path).exit_code == 1
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def lay_out(course, *lessons):
    return call(*lessons, "--nbgrader", course)


def files(course):
    return sorted(path.relative_to(course).as_posix() for path in course.rglob("*") if path.is_file())


def test_a_course_for_nbgrader(tmp_path):
    result = lay_out(tmp_path / "new", "00-01")
    assert (result.exit_code, "wrote 2 of 2 assignments" in result.stdout) == (0, True)
    assert files(tmp_path / "new") == [
        "README.md",
        "nbgrader_config.py",
        "source/00_start_here/00_start_here.ipynb",
        "source/01_low_rank_svd/01_low_rank_svd.ipynb",
    ]
    assert "nbgrader generate_assignment 00_start_here" in (tmp_path / "new" / "README.md").read_text()
    source = read(tmp_path / "new" / "source" / "00_start_here" / "00_start_here.ipynb")
    assert source.cells[0].source.startswith("# Exercises to lesson 00")
    assert "exercises on lesson 00." in source.cells[0].source  # a link in the exercise, which would lead nowhere
    assert sum(BEGIN in cell.source for cell in source.cells) == 2
    assert [cell.outputs for cell in source.cells if cell.get("outputs")] == []
    compile((tmp_path / "new" / "nbgrader_config.py").read_text(), "config", "exec")


def test_a_course_that_is_there_stays_as_it_is(tmp_path):
    (tmp_path / "nbgrader_config.py").write_text("mine")
    assert lay_out(tmp_path, "00").exit_code == 0
    mine = tmp_path / "source" / "00_start_here" / "00_start_here.ipynb"
    mine.write_text("mine too")
    result = lay_out(tmp_path, "00-01")
    assert "wrote 1 of 2 assignments" in result.stdout
    assert f"{mine} is there already and differs" in result.stdout
    assert (mine.read_text(), (tmp_path / "nbgrader_config.py").read_text()) == ("mine too", "mine")
    assert "README.md" not in files(tmp_path)


@pytest.mark.parametrize("options", [["-o", "h.zip"], ["--library"]], ids=str)
def test_a_course_is_no_zip(tmp_path, options):
    result = call("00", "--nbgrader", tmp_path / "course", *options)
    assert (result.exit_code, "belong to the zip" in result.stderr) == (1, True)
    assert list(tmp_path.iterdir()) == []


def test_where_there_are_no_solutions(tmp_path):
    with pytest.raises(NotebookError, match="the repository has"):
        nbgrader.lay_out(tmp_path / "course", list_notebooks(LESSONS), tmp_path / "solutions")
    assert list(tmp_path.iterdir()) == []
