"""What a class handed in: nobody and nothing that lies in its folder vanishes, whatever its name, form or packing."""

import io
import os
import stat
import zipfile

import nbformat
import pytest
from classes import NAME
from nbformat.v4 import new_code_cell, new_notebook

from lora_edu.course.grading import unpack, walk
from lora_edu.course.grading.handed_in import NAMED, handed_in
from lora_edu.course.grading.recognise import recognise
from lora_edu.course.grading.roster import on_roster, read_roster
from lora_edu.course.grading.submissions import code_cells
from lora_edu.course.notebooks.stored import EXERCISES, LESSONS, SOLUTIONS, NotebookError, list_notebooks, read, write

SOLVED = SOLUTIONS / f"{NAME}.ipynb"
OTHER = "01_low_rank_svd"
ONE_CHECK = new_notebook(cells=[new_code_cell("checks.softmax_by_hand(softmax)")])


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "class").mkdir()
    return tmp_path / "class"


@pytest.fixture
def sort(folder, tmp_path):
    def call(of=folder, **more):
        (tmp_path / "unpacked").mkdir(exist_ok=True)
        return handed_in(of, tmp_path / "unpacked", **more)

    return call


def put(path, source=SOLVED, age=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(source if isinstance(source, bytes) else source.read_bytes())
    os.utime(path, (2e9 - age, 2e9 - age))
    return path


def zipped(*entries):
    """A zip with (name, content) entries; a ZipInfo serves as a name too."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return content.getvalue()


def graded(found):
    return [(one.student, one.exercise, one.place) for one in found.submissions]


def reasons(found):
    return {one.place: one.reason for one in found.left}


def test_folders_files_and_what_is_neither(folder, sort):
    put(folder / "ada" / f"{NAME}.ipynb")
    put(folder / "ada" / "exercises" / f"{OTHER}.ipynb", EXERCISES / f"{OTHER}.ipynb")
    put(folder / f"ben__{NAME}.ipynb")
    put(folder / f"{NAME}.ipynb")
    put(folder / "dan" / "notes.txt", b"hello")
    put(folder / "eve" / ".ipynb_checkpoints" / f"{NAME}-checkpoint.ipynb")
    (folder / "fay").mkdir()
    found = sort()
    assert graded(found) == [
        ("ada", NAME, f"ada/{NAME}.ipynb"),
        ("ada", OTHER, f"ada/exercises/{OTHER}.ipynb"),
        ("ben", NAME, f"ben__{NAME}.ipynb"),
    ]
    assert [one.files for one in found.submissions] == [folder / "ada", folder / "ada" / "exercises", None]
    assert "no student in the name" in reasons(found)[f"{NAME}.ipynb"]
    assert "it is no notebook, and lies beside none" in reasons(found)["dan/notes.txt"]
    assert len(found.left) == 2
    assert [*found.students] == ["ada", "ben", "dan", "eve", "fay"]


def test_every_file_is_graded_goes_with_a_notebook_or_is_left_with_a_reason(folder, sort):
    names = ("x.py", "data.csv", f"{NAME}.ipynb", "sub/y.txt", "sub/mine.ipynb", "a/b/c.bin", "d.zip", "e.tar.gz")
    for student in ("ada", "ben"):
        for name in names:
            content = zipped(("z.txt", b"z")) if name == "d.zip" else b"{}"
            put(folder / student / name, SOLVED if student == "ada" and name == f"{NAME}.ipynb" else content)
    put(folder / "loose.txt", b"x")
    found = sort()
    known = {one.place for one in found.submissions} | set(reasons(found))
    for one in found.submissions:
        known |= {path.relative_to(folder).as_posix() for path in walk.beside(one.files)[0]}
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert known == files


@pytest.mark.parametrize(
    "name",
    [
        f"{NAME} (1).ipynb",
        f"{NAME}-Copy1.ipynb",
        f"Kopie von {NAME}.IPYNB",
        f"{NAME.upper()}.ipynb",
        "00 start here.ipynb",
        "课程作业 三.ipynb",
        "Übung.ipynb",
        "домашнее задание.ipynb",
        f"{OTHER}.ipynb",  # its cells know better
    ],
)
def test_a_notebook_is_known_by_its_cells_under_any_name(folder, sort, name):
    put(folder / "ada" / name)
    assert graded(sort()) == [("ada", NAME, f"ada/{name}")]


@pytest.mark.parametrize("path", list_notebooks(EXERCISES), ids=lambda path: path.stem)
def test_every_exercise_and_solution_is_known_by_its_cells(tmp_path, path):
    for source in (path, SOLUTIONS / path.name):
        assert recognise(put(tmp_path / "x.ipynb", source), EXERCISES) == path.stem


def test_cell_ids_alone_are_enough_where_no_other_notebook_has_them(tmp_path):
    """Not one text is as it was handed out."""
    notebook = read(EXERCISES / "02_is_the_update_low_rank.ipynb")
    for cell in notebook.cells:
        cell.source = f"{cell.source.replace('checks.', 'tests.')} …"
    write(notebook, tmp_path / "作业.ipynb")
    assert recognise(tmp_path / "作业.ipynb", EXERCISES) == "02_is_the_update_low_rank"


def test_what_the_name_alone_says(tmp_path):
    empty = new_notebook(cells=[new_code_cell("x = 1")])
    write(empty, tmp_path / f"my {NAME}.ipynb")
    assert recognise(tmp_path / f"my {NAME}.ipynb", EXERCISES) == NAME
    write(empty, tmp_path / "mine.ipynb")
    with pytest.raises(NotebookError, match="no cell and no name in it is that of an exercise notebook"):
        recognise(tmp_path / "mine.ipynb", EXERCISES)
    write(ONE_CHECK, tmp_path / "mine.ipynb")
    assert recognise(tmp_path / "mine.ipynb", EXERCISES) == NAME


def test_a_lesson_is_not_taken_for_its_exercises(folder, sort):
    """Both have one name, and who zips a whole hand-out hands in both."""
    put(folder / "ada" / f"{NAME}.ipynb", LESSONS / f"{NAME}.ipynb")
    put(folder / "ada" / "exercises" / f"{NAME}.ipynb", age=1000)
    found = sort()
    assert graded(found) == [("ada", NAME, f"ada/exercises/{NAME}.ipynb")]
    assert reasons(found) == {f"ada/{NAME}.ipynb": f"it is the lesson {NAME} itself, without its exercises"}


def test_two_exercises_in_one_notebook(tmp_path):
    both = new_notebook(cells=[*ONE_CHECK.cells, new_code_cell("checks.pieces_for_energy(pieces_needed)")])
    write(both, tmp_path / "both.ipynb")
    with pytest.raises(NotebookError, match=f"it holds as much of {NAME} as of {OTHER}: hand in one notebook for each"):
        recognise(tmp_path / "both.ipynb", EXERCISES)
    write(both, tmp_path / f"{OTHER} (2).ipynb")
    assert recognise(tmp_path / f"{OTHER} (2).ipynb", EXERCISES) == OTHER


def test_the_newest_of_several_versions(folder, sort):
    put(folder / "ada" / f"{NAME}.ipynb", age=100)
    put(folder / "ada" / f"{NAME} (1).ipynb", age=10)
    put(folder / "ada" / "final.ipynb", age=50)
    put(folder / "ada" / f"{NAME} (2).ipynb", b"{ cut off", age=0)
    found = sort()
    assert graded(found) == [("ada", NAME, f"ada/{NAME} (1).ipynb")]
    said = reasons(found)
    words = f"ada also handed in ada/{NAME} (1).ipynb, which is newer and was graded"
    assert said[f"ada/{NAME}.ipynb"] == said["ada/final.ipynb"] == words
    assert said[f"ada/{NAME} (2).ipynb"].startswith("not a notebook (")
    assert said[f"ada/{NAME} (2).ipynb"].endswith(f"; ada/{NAME} (1).ipynb was graded in its place")


def test_of_two_that_are_as_old_the_one_as_handed_out(folder, sort):
    put(folder / "ada" / f"{NAME}.ipynb")
    put(folder / "ada" / "final.ipynb")
    found = sort()
    assert graded(found) == [("ada", NAME, f"ada/{NAME}.ipynb")]
    assert reasons(found) == {"ada/final.ipynb": f"ada also handed in ada/{NAME}.ipynb, which was graded"}


# Zips.


def test_zips_are_unpacked(folder, sort):
    inner = zipped((f"deep/{OTHER}.ipynb", (SOLUTIONS / f"{OTHER}.ipynb").read_bytes()), ("deep/mine.txt", b"my text"))
    put(folder / "ada" / "hand in.ZIP", zipped((f"drafts/{NAME}.ipynb", SOLVED.read_bytes()), ("more.zip", inner)))
    put(folder / "ben.zip", zipped((f"{NAME} (1).ipynb", SOLVED.read_bytes())))
    put(folder / "cleo__all.zip", zipped((f"{NAME}.ipynb", SOLVED.read_bytes())))
    found = sort()
    assert graded(found) == [
        ("ada", NAME, f"ada/hand in.ZIP/drafts/{NAME}.ipynb"),
        ("ada", OTHER, f"ada/hand in.ZIP/more.zip/deep/{OTHER}.ipynb"),
        ("ben", NAME, f"ben.zip/{NAME} (1).ipynb"),
        ("cleo", NAME, f"cleo__all.zip/{NAME}.ipynb"),
    ]
    assert found.left == []
    assert [path.name for path in walk.beside(found.submissions[1].files)[0]] == ["mine.txt"]


def test_a_zip_of_the_whole_class(folder, sort):
    put(folder / "download.zip", zipped((f"ada/{NAME}.ipynb", SOLVED.read_bytes()), ("ben/x.txt", b"x")))
    found = sort(folder / "download.zip")
    assert graded(found) == [("ada", NAME, f"ada/{NAME}.ipynb")]
    assert [*found.students] == ["ada", "ben"]


def test_a_zip_without_notebooks_is_data(folder, sort):
    data = zipped(("a.txt", b"a"))
    put(folder / "ada" / f"{NAME}.ipynb")
    put(folder / "ada" / "data.zip", data)
    put(folder / "ben" / "data.zip", data)
    found = sort()
    assert reasons(found) == {"ben/data.zip": "it is no notebook, and lies beside none that is graded"}
    assert [path.name for path in walk.beside(folder / "ada")[0]] == ["data.zip"]


def linked(name):
    entry = zipfile.ZipInfo(name)
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    return entry


def test_nothing_gets_out_of_a_zip(folder, sort, tmp_path):
    names = ("../out.ipynb", "/out.ipynb", "a/../../out.ipynb", "..\\out.ipynb", "C:\\out.ipynb", "C:out.ipynb")
    entries = [(name, b"{}") for name in names] + [(linked("link.ipynb"), b"/etc/passwd")]
    put(folder / "ada.zip", zipped(*entries, ("d/" * 30 + "deep.ipynb", b"{}"), (f"{NAME}.ipynb", SOLVED.read_bytes())))
    before = set(tmp_path.rglob("*"))
    found = sort()
    new = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    assert [path.name for path in new] == [f"{NAME}.ipynb"]
    assert graded(found) == [("ada", NAME, f"ada.zip/{NAME}.ipynb")]
    assert [reasons(found)[f"ada.zip/{name}"] for name in names] == ["its name leads out of the zip"] * len(names)
    assert reasons(found)["ada.zip/link.ipynb"] == "a link, not a file"
    assert "more than 19 folders inside each other" in reasons(found)["ada.zip/" + "d/" * 30 + "deep.ipynb"]


def test_zips_that_are_too_much(folder, sort, monkeypatch):
    monkeypatch.setattr(unpack, "MOST_BYTES", 1024**2)
    monkeypatch.setattr(unpack, "MOST_FILES", 3)
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.ipynb", bytes(50 * 1024**2))
        archive.writestr(f"{NAME}.ipynb", SOLVED.read_bytes())
    put(folder / "ada.zip", bomb.getvalue())
    put(folder / "ben.zip", zipped(*((f"{number}.txt", b"x") for number in range(5))))
    inner = zipped(("y.zip", zipped(("z.zip", zipped((f"{NAME}.ipynb", SOLVED.read_bytes()))))))
    put(folder / "cleo.zip", inner)
    found = sort()
    assert graded(found) == [("ada", NAME, f"ada.zip/{NAME}.ipynb")]
    assert reasons(found)["ada.zip/bomb.ipynb"] == "the zip holds more than 1 MB"
    assert reasons(found)["ben.zip"] == "the zip holds 5 files; only the first 3 were unpacked"
    assert reasons(found)["cleo.zip/y.zip/z.zip"] == "a zip in a zip in a zip, which is not unpacked"


def test_zips_that_lie_about_their_size(folder, sort):
    content = bytearray(zipped((f"{NAME}.ipynb", SOLVED.read_bytes())))
    start = content.rindex(b"PK\x01\x02")
    content[start + 24 : start + 28] = (10).to_bytes(4, "little")  # the size that is stated
    put(folder / "ada.zip", bytes(content))
    found = sort()
    assert graded(found) == []
    assert "ada.zip" in next(iter(reasons(found)))


def test_zips_that_cannot_be_read(folder, sort):
    put(folder / "ada" / f"{NAME}.zip", b"PK\x03\x04 cut off")
    locked = bytearray(zipped(("secret.ipynb", b"{}")))
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        locked[locked.rindex(mark) + place] |= 1
    put(folder / "ben.zip", bytes(locked))
    broken = bytearray(zipped((f"{NAME}.ipynb", SOLVED.read_bytes())))
    broken[2000] ^= 1
    put(folder / "cleo.zip", bytes(broken))
    with pytest.warns(UserWarning, match="Duplicate"):
        twice = zipped(*[(f"{NAME}.ipynb", SOLVED.read_bytes())] * 2)
    put(folder / "dan.zip", twice)
    found = sort()
    assert graded(found) == [("dan", NAME, f"dan.zip/{NAME}.ipynb")]
    assert reasons(found)[f"ada/{NAME}.zip"].startswith("no zip that can be read")
    assert reasons(found)["ben.zip/secret.ipynb"] == "locked with a password"
    assert "CRC" in reasons(found)[f"cleo.zip/{NAME}.ipynb"]
    assert reasons(found)[f"dan.zip/{NAME}.ipynb"] == "the zip holds this name twice"
    assert [*found.students] == ["ada", "ben", "cleo", "dan"]


def test_the_times_in_a_zip_count(folder, sort):
    old, new, timeless = (zipfile.ZipInfo(f"{name}.ipynb", date) for name, date in (
        ("old", (2024, 1, 1, 0, 0, 0)), ("new", (2034, 1, 1, 0, 0, 0)), ("none", (1980, 1, 1, 0, 0, 0))))  # fmt: skip
    put(folder / "ada" / "a.zip", zipped((old, SOLVED.read_bytes()), (new, SOLVED.read_bytes())))
    put(folder / "ada" / f"{NAME}.ipynb")  # of 2033
    put(folder / "ben" / "b.zip", zipped((timeless, SOLVED.read_bytes())), age=10)
    put(folder / "ben" / f"{NAME}.ipynb", age=20)
    assert [place for *_, place in graded(sort())] == ["ada/a.zip/new.ipynb", "ben/b.zip/none.ipynb"]


# Links, what cannot be read, and files that go with a notebook.


def test_links_are_listed_and_not_followed(folder, sort, tmp_path):
    put(tmp_path / "elsewhere" / f"{NAME}.ipynb")
    (folder / "ada").mkdir()
    (folder / "ada" / "drafts").symlink_to(tmp_path / "elsewhere")
    (folder / "ada" / f"{NAME}.ipynb").symlink_to(tmp_path / "elsewhere" / f"{NAME}.ipynb")
    (folder / "ben").symlink_to(tmp_path / "elsewhere")
    (folder / "cleo__gone.ipynb").symlink_to(tmp_path / "nowhere")
    found = sort()
    assert graded(found) == []
    assert reasons(found) == {
        "ada/drafts": "a link to a folder, which is not followed",
        f"ada/{NAME}.ipynb": "a link, not a file",
        "ben": "a link to a folder, which is not followed",
        "cleo__gone.ipynb": "a link, not a file",
    }
    assert [*found.students] == ["ada", "ben", "cleo"]


def test_a_folder_that_may_not_be_read(folder, sort, monkeypatch):
    put(folder / "ada" / "drafts" / f"{NAME}.ipynb")
    put(folder / "ben" / f"{NAME}.ipynb")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("drafts"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found = sort()
    assert reasons(found) == {"ada/drafts": "cannot be read (Permission denied)"}
    assert [student for student, *_ in graded(found)] == ["ben"]


def test_a_notebook_that_may_not_be_read(folder, sort, monkeypatch):
    path = put(folder / "ada" / "x.ipynb")
    read_text = type(path).read_text

    def refuse(self, *given, **more):
        if self.name == "x.ipynb":
            raise PermissionError(13, "Permission denied", str(self))
        return read_text(self, *given, **more)

    monkeypatch.setattr(type(path), "read_text", refuse)
    assert reasons(sort()) == {"ada/x.ipynb": "cannot be read (Permission denied)"}


def test_files_that_were_dropped_are_listed(folder, sort, monkeypatch):
    monkeypatch.setattr(walk, "MOST_BYTES", 1000)
    monkeypatch.setattr(walk, "MOST_FILES", 2)
    put(folder / "ada" / "exercises" / f"{NAME}.ipynb")
    put(folder / "ada" / "exercises" / "a.bin", bytes(2000))
    for name in ("b.txt", "c.txt", "d.txt"):
        put(folder / "ada" / "exercises" / name, b"x")
    put(folder / "ada" / "beside nothing.txt", b"x")
    put(folder / "ada" / "exercises" / ".git" / "config", b"x")
    found = reasons(sort())
    assert "MB lie beside the notebook" in found["ada/exercises/a.bin"]
    assert "more than 2 files lie beside the notebook" in found["ada/exercises/d.txt"]
    assert "lies beside none" in found["ada/beside nothing.txt"]
    assert len(found) == 3


def test_of_very_many_files_most_are_counted(folder, sort):
    for number in range(NAMED + 30):
        put(folder / "ada" / "venv" / f"{number}.py", b"x")
    found = sort()
    assert len(found.left) == NAMED + 1
    assert "30 more files" in reasons(found)


# Forms of a notebook.


def older(notebook):
    return nbformat.v3.writes_json(nbformat.convert(notebook, 3)).encode()


@pytest.mark.parametrize(
    ("make", "same_ids"),
    [(lambda data: b"\xef\xbb\xbf" + data, True), (lambda data: older(nbformat.reads(data.decode(), 4)), False)],
    ids=["byte-order mark", "nbformat 3"],
)
def test_what_jupyter_opens_is_read(tmp_path, make, same_ids):
    path = put(tmp_path / "x.ipynb", make(SOLVED.read_bytes()))
    assert code_cells(path) == code_cells(SOLVED)
    assert recognise(path, EXERCISES) == NAME
    assert [cell.source for cell in read(path).cells] == [cell.source for cell in read(SOLVED).cells]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"{}", b'{"nbformat": 3}', b'{"nbformat": "x"}', b'{"nbformat": 3, "worksheets": [1]}',
     b'{"cells": [{"cell_type": "code", "source": 1}]}', b'{"cells": ' + b"[" * 100_000, "{}".encode("utf-16")],
    ids=str,
)  # fmt: skip
def test_what_is_no_notebook_is_said_in_one_line(tmp_path, content):
    with pytest.raises(NotebookError, match=r"^not a notebook") as error:
        code_cells(put(tmp_path / "x.ipynb", content))
    assert "\n" not in str(error.value)


# The roster.


def test_a_roster(tmp_path):
    path = tmp_path / "roster.csv"
    for text in (
        "Email;Student\na@x;Ada\nb@x;Ben\n",
        "student\nAda\nBen\n",
        "Ada\n\n Ben \n",
        "student\tid\nAda\t1\nBen",
    ):
        path.write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert read_roster(path) == ["Ada", "Ben"]
    for text, words in (
        ("first name,last name\nAda,Lovelace\n", r"has no column 'student' \(it has: first name, last name\)"),
        ("student\nAda\nada\nAda\n", "names 'Ada' twice"),
        ("student\n", "names nobody"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            read_roster(path)
    path.write_bytes("student\nZoë".encode("latin-1"))
    with pytest.raises(ValueError, match="is not in UTF-8: save it again from the spreadsheet as CSV UTF-8"):
        read_roster(path)


def test_whose_folder_it_is():
    roster = ["Ada Lovelace", "Ben Ng", "Zoë", "Cy Twombly", "ada"]
    folders = {
        "ada lovelace": "Ada Lovelace",
        "Ben Ng_4711_assignsubmission_file": "Ben Ng",
        "Zoë": "Zoë",
        "Cy Twombly_1_assignsubmission_file": "Cy Twombly_1_assignsubmission_file",  # two of one name
        "Cy Twombly_2_assignsubmission_file": "Cy Twombly_2_assignsubmission_file",
        "stranger": "stranger",
        "ada": "ada",
    }
    assert on_roster(folders, roster) == folders


def test_names_are_the_rosters(folder, sort):
    put(folder / "ADA" / f"{NAME}.ipynb")
    put(folder / "Zoe\u0308" / f"{NAME}.ipynb")  # as macOS writes it
    put(folder / "zed" / "x.txt", b"x")
    found = sort(roster=["Ada", "Zoë", "Zed"])
    assert [student for student, *_ in graded(found)] == ["Ada", "Zoë"]
    assert found.left[0].student == "Zed"
    assert found.students == {"Ada": "ADA", "Zed": "zed", "Zoë": "Zoë"}


def test_what_is_the_teachers_is_skipped(folder, sort):
    for name in ("grades.csv", "feedback/ada/feedback.html", f"ada/{NAME}.ipynb"):
        put(folder / name, SOLVED if name.endswith("ipynb") else b"x")
    found = sort(skipped=[folder / "grades.csv", folder / "feedback"])
    assert found.left == []
    assert [*found.students] == ["ada"]
