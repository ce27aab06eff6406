"""The tables and the pages of a class: everybody has a row, nothing is lost, and what a teacher wrote stays."""

import csv
import errno
import os

import nbformat
import pytest
from classes import NAME, hand_in, solved, untouched
from typer.testing import CliRunner

from lora_edu.course.cli import app
from lora_edu.course.grading import classroom, gradebook
from lora_edu.course.grading.classroom import Row, short_hash
from lora_edu.course.grading.client import Verdict
from lora_edu.course.grading.texts import defused, file_name
from lora_edu.course.notebooks.stored import EXERCISES, SOLUTIONS

OTHER = "01_low_rank_svd"
OTHER_SOLVED = (SOLUTIONS / f"{OTHER}.ipynb").read_bytes()
SAID = {
    "passed": Verdict("passed", title="Softmax", right=("each row sums to 1", "no overflow")),
    "failed": Verdict(
        "failed",
        "row 3 sums to 2",
        notes=("cell 4 raised NameError",),
        title="Softmax",
        question="What is the sum?",
        fix="Divide by the sum.",
        right=("as many probabilities as logits",),
        step="each row sums to 1",
        waiting=("no overflow for logits of 1000",),
    ),
    "not done": Verdict("not done", step="each row sums to 1", waiting=("no overflow",)),
    "error": Verdict("error", "raised SystemExit"),
    "timeout": Verdict("timeout", "took too long"),
}


@pytest.fixture
def says(monkeypatch):
    """What is said of each student's notebooks, without running them; "stop" is Ctrl-C."""
    status = {}

    def grade_one(one, runner, limits, exercises=EXERCISES):
        words = status.get(one.student, "passed")
        if words == "stop":
            raise KeyboardInterrupt
        said = SAID[words]
        return [
            Row(one.student, one.exercise, each.label, words, said.symptom, 0.5, said.points(each.worth), each.worth,
                one.place, short_hash(one.path), runner.seed, said)
            for each in classroom.checks_of(exercises / f"{one.exercise}.ipynb")
        ]  # fmt: skip

    monkeypatch.setattr(classroom, "grade_one", grade_one)
    return status


@pytest.fixture
def grade(tmp_path, says):
    def call(*more, code=0):
        arguments = ["grade", str(tmp_path / "class"), "--jobs", "1", "--seed", "7", *map(str, more)]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == code, result.output
        return result

    return call


def rows(path):
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def by_student(path):
    return {row["student"]: row for row in rows(path)}


def write_rows(path, table, columns, delimiter=","):
    """As a spreadsheet saves it."""
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, columns, delimiter=delimiter, lineterminator="\r\n")
        writer.writeheader()
        writer.writerows(table)


def test_a_row_for_each_exercise_and_one_for_each_student(tmp_path, grade, says):
    says |= {"ben": "failed", "cleo": "not done"}
    hand_in(tmp_path / "class", {"ada": solved(), "ben": solved(), "cleo": untouched()})
    hand_in(tmp_path / "class", {"ada": OTHER_SOLVED}, OTHER)
    (tmp_path / "class" / "stray.ipynb").write_text("{}")
    (tmp_path / "roster.csv").write_text("student\nada\nben\nzoe\n")
    table = tmp_path / "out" / "grades.csv"
    result = grade("--csv", table, "--roster", tmp_path / "roster.csv")
    assert "not graded: stray.ipynb (no student in the name" in result.output
    assert "nothing was handed in: zoe" in result.output
    assert "not on the roster: cleo" in result.output
    assert sorted(path.name for path in table.parent.iterdir()) == ["grades-students.csv", "grades.csv"]
    assert table.read_bytes().startswith(b"\xef\xbb\xbfstudent,notebook,exercise,status,points,of,")

    found = [(row["student"], row["exercise"][:2], row["status"], row["points"], row["of"]) for row in rows(table)]
    assert found == [
        ("", "", "not graded", "0", "0"),
        *[("ada", task, "passed", points, points) for task, points in (("A1", "1"), ("B1", "4"))],
        ("ada", "C1", "to read", "0", "0"),
        *[
            ("ada", task, "passed", points, points)
            for task, points in zip(("A1", "A2", "B1", "C1"), "1143", strict=True)
        ],
        ("ben", "A1", "failed", "0.33", "1"),
        ("ben", "B1", "failed", "1.33", "4"),
        ("ben", "C1", "to read", "0", "0"),
        *[("cleo", task, "not done", "0", points) for task, points in (("A1", "1"), ("B1", "4"))],
        ("cleo", "C1", "to read", "0", "0"),
        ("zoe", "", "not handed in", "0", "0"),
    ]
    for row in rows(table):
        assert row["seed"] == "7"
        assert row["course"].startswith("0.1.0+")
    hashes = {row["file_hash"] for row in rows(table) if row["student"] == "ada" and row["notebook"] == NAME}
    assert hashes == {short_hash(tmp_path / "class" / "ada" / f"{NAME}.ipynb")}

    students = by_student(tmp_path / "out" / "grades-students.csv")
    wanted = ("points", "of", "passed", "exercises", NAME, OTHER, "note")
    assert {name: [row[column] for column in wanted] for name, row in students.items()} == {
        "ada": ["14", "14", "6", "6", "5", "9", ""],
        "ben": ["1.66", "14", "0", "6", "1.66", "", ""],
        "cleo": ["0", "14", "0", "6", "0", "", "not on the roster"],
        "zoe": ["0", "14", "0", "6", "", "", "not handed in"],
    }
    assert {row["seed"] for row in students.values()} == {"7"}
    assert students["ada"]["file_hash"].count("sha256:") == 2


def test_points_are_for_the_steps_that_are_right():
    assert {status: said.points(4) for status, said in SAID.items()} == {
        "passed": 4, "failed": 1.33, "not done": 0, "error": 0, "timeout": 0,
    }  # fmt: skip


def test_nbgraders_points_count_where_the_exercise_has_them(tmp_path):
    notebook = untouched()
    first, second = (cell for cell in notebook.cells if "check" in cell.metadata.get("tags", []))
    first.metadata["nbgrader"] = {"grade": True, "points": 2.5}
    del second.metadata["nbgrader"]
    (tmp_path / "x.ipynb").write_text(nbformat.writes(notebook), encoding="utf-8")
    assert [check.worth for check in classroom.checks_of(tmp_path / "x.ipynb")] == [2.5, 1]


def test_what_nobody_can_grade_has_a_row_too(tmp_path, grade):
    """Then the command fails in one line, after it has said all."""
    (tmp_path / "class" / "ada").mkdir(parents=True)
    (tmp_path / "class" / "ada" / "essay.docx").write_text("x")
    (tmp_path / "class" / "ben").mkdir()
    result = grade("--csv", tmp_path / "g.csv", code=1)
    assert "not graded: ada/essay.docx" in result.stdout
    assert "holds no notebook that is recognised" in result.stderr
    assert [(row["student"], row["status"]) for row in rows(tmp_path / "g.csv")] == [
        ("ada", "not graded"),
        ("ben", "not handed in"),
    ]


def test_a_second_run_keeps_what_the_teacher_wrote(tmp_path, grade, says):
    hand_in(tmp_path / "class", {"ada": solved(), "ben": solved(), "cleo": solved()})
    table, students = tmp_path / "g.csv", tmp_path / "g-students.csv"
    grade("--csv", table)
    found = rows(table)
    for row in found:
        row["my mark"] = {"ada": "2", "cleo": "-1"}.get(row["student"], "") if row["exercise"][:2] == "C1" else ""
        row["rubric"] = "=A1" if row["student"] == "ada" else ""
    found.append({"student": "average", "points": "7.5"})
    columns = ["student", "my mark", *[name for name in found[0] if name not in ("student", "my mark")]]
    write_rows(table, found, columns, ";")
    seen = rows(students)
    for row in seen:
        row["remark"], row["talk"] = f"for {row['student']}", "Tuesday"
    write_rows(students, seen, list(seen[0]))
    (tmp_path / "class" / "cleo" / f"{NAME}.ipynb").unlink()
    (tmp_path / "class" / "cleo").rmdir()
    hand_in(tmp_path / "class", {"dan": solved()})
    says["ada"] = "failed"
    grade("--csv", table)

    assert table.read_bytes().startswith("\ufeffstudent,notebook,exercise,status,points".encode())
    found = {(row["student"], row["exercise"][:2]): row for row in rows(table)}
    assert [found["ada", task]["rubric"] for task in ("A1", "B1", "C1")] == ["=A1"] * 3
    assert found["ada", "C1"]["my mark"] == "2"
    assert found["ada", "A1"]["status"] == "failed"
    assert (found["cleo", "C1"]["my mark"], found["cleo", "C1"]["status"]) == ("-1", "no longer handed in")
    assert ("cleo", "A1") not in found  # nobody wrote anything there
    assert ("ben", "A1") in found
    assert ("dan", "A1") in found
    assert found["average", ""]["points"] == "7.5"
    assert rows(table)[-1]["student"] == "average"
    after = by_student(students)
    assert {name: (row["remark"], row["talk"]) for name, row in after.items()} == {
        "ada": ("for ada", "Tuesday"),
        "ben": ("for ben", "Tuesday"),
        "dan": ("", ""),
        "cleo": ("for cleo", "Tuesday"),
    }
    assert after["ada"]["points"] == "1.66"


def test_cells_beside_the_table_are_kept(tmp_path, grade):
    """Without a heading, or under one that is there already."""
    hand_in(tmp_path / "class", {"ada": solved()})
    grade("--csv", tmp_path / "g.csv")
    lines = (tmp_path / "g.csv").read_text(encoding="utf-8").splitlines()
    lines = [f"{lines[0]},remark,", *(f"{line},second,loose" for line in lines[1:])]
    (tmp_path / "g.csv").write_text("\n".join(lines), encoding="utf-8")
    grade("--csv", tmp_path / "g.csv")
    for row in rows(tmp_path / "g.csv"):
        assert (row["remark 15"], row["column 16"], row["remark"]) == ("second", "loose", "")


def test_ctrl_c_loses_nothing(tmp_path, grade, says):
    hand_in(tmp_path / "class", {"ada": solved(), "ben": solved(), "cleo": solved()})
    says |= {"ben": "stop"}
    result = grade("--csv", tmp_path / "g.csv", "--feedback", tmp_path / "pages", code=130)
    assert "stopped: 1 of 3 notebooks are graded; what came out is written" in result.stderr
    found = {(row["student"], row["exercise"][:2]): row["status"] for row in rows(tmp_path / "g.csv")}
    assert found["ada", "A1"] == "passed"
    assert found["ben", ""] == found["cleo", ""] == "not graded yet"
    assert by_student(tmp_path / "g-students.csv")["ben"]["note"] == "not graded yet: 1 (see the other table)"
    assert (tmp_path / "pages" / "ada" / "feedback.html").exists()

    says |= {"ben": "passed"}
    grade("--csv", tmp_path / "g.csv")
    says |= {"ada": "failed", "ben": "stop"}  # in a second run what was found in the first stays till then
    grade("--csv", tmp_path / "g.csv", code=130)
    found = {(row["student"], row["exercise"][:2]): row["status"] for row in rows(tmp_path / "g.csv")}
    assert (found["ada", "A1"], found["ben", "A1"], found["cleo", "A1"]) == ("failed", "passed", "passed")
    assert "not graded yet" not in found.values()


def test_rows_are_in_the_file_as_soon_as_they_are_there(tmp_path, grade, monkeypatch):
    hand_in(tmp_path / "class", {"ada": solved(), "ben": solved()})
    passed = []
    add = gradebook.Gradebook.add

    def look(self, new):
        add(self, new)
        passed.append(sum(row["status"] == "passed" for row in rows(tmp_path / "g.csv")))

    monkeypatch.setattr(gradebook.Gradebook, "add", look)
    grade("--csv", tmp_path / "g.csv")
    assert passed == [2, 4]


@pytest.mark.parametrize("option", ["--csv", "--feedback"])
def test_the_path_is_tried_before_anything_runs(tmp_path, grade, says, monkeypatch, option):
    hand_in(tmp_path / "class", {"ada": solved()})
    says |= {"ada": "not to be asked"}
    (tmp_path / "file").write_text("x")
    result = grade(option, tmp_path / "file" / "g", code=1)
    assert len(result.stderr.strip().splitlines()) == 1
    assert str(tmp_path / "file") in result.stderr

    def read_only(**where):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(where["dir"]))

    monkeypatch.setattr("tempfile.mkstemp", read_only)
    monkeypatch.setattr("tempfile.TemporaryFile", read_only)
    result = grade(option, tmp_path / "g", code=1)
    assert "Read-only file system; choose a place that is open to you" in result.stderr
    assert ".tmp" not in result.stderr


def test_a_file_that_is_no_such_table_is_not_overwritten(tmp_path, grade):
    hand_in(tmp_path / "class", {"ada": solved()})
    (tmp_path / "g.csv").write_text("name,mark\nada,1\n")
    result = grade("--csv", tmp_path / "g.csv", code=1)
    assert "is there already and is no table of lora-edu grade: name another file" in result.stderr
    assert (tmp_path / "g.csv").read_text() == "name,mark\nada,1\n"


def test_the_tables_may_lie_among_what_was_handed_in(tmp_path, grade):
    hand_in(tmp_path / "class", {"ada": solved()})
    for _ in range(2):
        result = grade("--csv", tmp_path / "class" / "g.csv", "--feedback", tmp_path / "class" / "pages")
        assert "not graded" not in result.output
    assert by_student(tmp_path / "class" / "g-students.csv").keys() == {"ada"}


@pytest.mark.parametrize("first", ["=", "+", "-", "@", "＝", "＋", "－", "＠", "﹦", "⁺"])
def test_formulas_are_defused(tmp_path, grade, first):
    hand_in(tmp_path / "class", {f"{first}1+1": solved()})
    (tmp_path / "class" / "\t=2").mkdir()
    grade("--csv", tmp_path / "g.csv")
    for path in (tmp_path / "g.csv", tmp_path / "g-students.csv"):
        for row in rows(path):
            assert row["student"] in (f"'{first}1+1", "'=2")
            assert all(cell.isprintable() for cell in row.values())
    grade("--csv", tmp_path / "g.csv")
    assert len(by_student(tmp_path / "g-students.csv")) == 2


def test_what_is_no_formula_stays_as_it_is():
    assert [defused(text) for text in ("\t=1", "\r=1", "a=1", "'=1", "", "−1", "1")] == [
        "'\t=1", "'\r=1", "a=1", "'=1", "", "−1", "1",
    ]  # fmt: skip


# The pages.


def test_a_page_for_each_student(tmp_path, grade, says):
    says |= {"ben": "failed"}
    hand_in(tmp_path / "class", {"ada": solved(), "ben": solved(), "dan": solved(), "<i>": solved()})
    hand_in(tmp_path / "class", {"ben": OTHER_SOLVED}, OTHER)
    (tmp_path / "class" / "ben" / "x.zip").write_bytes(b"no zip")
    (tmp_path / "roster.csv").write_text("student\nada\nben\nzoe\n")
    grade("--feedback", tmp_path / "pages", "--roster", tmp_path / "roster.csv")
    texts = {path.parent.name: path.read_text(encoding="utf-8") for path in (tmp_path / "pages").glob("*/*.html")}
    assert texts.keys() == {"ada", "ben", "zoe", "dan", "_i_"}
    assert "Nothing was handed in under this name." in texts["zoe"]
    assert "<p>2 of 2 passed; 5 of 5 points. This is ada/00_start_here.ipynb.</p>" in texts["ada"]
    assert "<li>✓ each row sums to 1</li>" in texts["ada"]
    ben = texts["ben"]
    assert "0 of 2 passed; 1.66 of 5 points" in ben
    assert "0 of 4 passed; 2.99 of 9 points" in ben
    assert "<p>1 of its 3 steps are right.</p>" in ben
    for line in (
        "✓ as many probabilities as logits",
        "✗ row 3 sums to 2",
        "○ no overflow for logits of 1000",
        "Before this check, cell 4 raised NameError",
    ):
        assert f"<li>{line}</li>" in ben
    assert "What is the sum?" in ben
    assert "ben/x.zip: no zip that can be read" in ben
    assert "This task has no check. A person reads it." in ben
    for name, text in texts.items():
        assert "Divide by the sum." not in text  # the fix
        assert "<i>" not in text
        for other in texts.keys() - {name, "_i_"}:
            assert f"{other}/" not in text
            assert f"for {other}" not in text


def test_pages_for_moodle_are_named_as_its_folders(tmp_path, grade):
    hand_in(tmp_path / "class", {"Ada Lovelace_4711_assignsubmission_file": solved()})
    (tmp_path / "roster.csv").write_text("student\nAda Lovelace\n")
    grade("--feedback", tmp_path / "pages", "--roster", tmp_path / "roster.csv", "--csv", tmp_path / "g.csv")
    page = tmp_path / "pages" / "Ada Lovelace_4711_assignsubmission_file" / "feedback.html"
    assert "<h1>Feedback for Ada Lovelace</h1>" in page.read_text(encoding="utf-8")
    assert by_student(tmp_path / "g-students.csv")["Ada Lovelace"]["note"] == ""


def test_names_of_files():
    names = ["ada", "../x", "a/b\\c:d", "CON", "nul.txt", "", "..", "x.", "Zoë 王", "a\nb", "=1"]
    assert [file_name(name) for name in names] == [
        "ada", "_x", "a_b_c_d", "_CON", "_nul.txt", "_", "_", "x", "Zoë 王", "a b", "=1",
    ]  # fmt: skip


def test_two_students_whose_names_would_be_one_files(tmp_path, grade):
    hand_in(tmp_path / "class", {"a": solved(), "A": solved(), "a:": solved()})
    grade("--feedback", tmp_path / "pages")
    assert sorted(path.parent.name for path in (tmp_path / "pages").glob("*/*.html")) == ["A", "a-2", "a_"]
