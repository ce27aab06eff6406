"""Grading a class: right and wrong answers get what they deserve, and no notebook harms the class or forges one."""

import contextlib
import csv
import hashlib
import os
import shutil
import threading
import time

import psutil
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from typer.testing import CliRunner

from lora_edu.course.checks import CHECKS
from lora_edu.course.cli import app
from lora_edu.course.grading import classroom, sandbox
from lora_edu.course.grading.marking import not_done
from lora_edu.course.grading.sandbox import Limits
from lora_edu.course.grading.submissions import checks_of, collect, reaching
from lora_edu.course.notebooks.stored import EXERCISES, SOLUTIONS, list_notebooks, read, write

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="grading needs fork: Linux or macOS")
NAME = "00_start_here"
LIMITS = Limits(seconds=4, memory=1024**3, processes=16)
MARK = f"lora-edu-test-{os.getpid()}"
SECRET = "LORA_EDU_TEST_TOKEN"
SAME = {"ben", "loop", "exit", "disk", "overwrites"}

ONE_CELL = """from lora_edu.course import checks
def softmax(logits):
    e = (logits - logits.max(dim=1, keepdim=True).values).exp()
    return e / e.sum(dim=1, keepdim=True)
checks.softmax_by_hand(softmax, hint=3)"""
RIGHT = """    e = (logits - logits.max(dim=1, keepdim=True).values).exp()
    return e / e.sum(dim=1, keepdim=True)"""
CHEAT = """from lora_edu.course import checks
import lora_edu.course.checks.lesson_00 as lesson
import torch
checks.softmax_by_hand = lambda candidate, hint=1: checks.Report('softmax')
checks.CHECKS['softmax_by_hand'] = checks.softmax_by_hand
lesson.run_steps = lambda title, steps, hint=1: checks.Report(title)
torch.allclose = torch.equal = lambda *a, **k: True"""
GRADER = """import json
import lora_edu.course.checks
import lora_edu.course.grading.integrity as integrity
import lora_edu.course.grading.marking as marking
marking.Marker._check = lambda self, check: None
marking.Marker._verdict = lambda self, check: ('passed', '')
marking.not_done = lambda *a: a[0]
integrity.Snapshot.restore.__code__ = (lambda self: []).__code__
encode = json.JSONEncoder.encode
json.JSONEncoder.encode = lambda self, value: encode(self, value).replace('not done', 'passed')
lora_edu.course.checks.lesson_00.run_steps.__code__ = (
    lambda title, steps, hint=1: lora_edu.course.checks.Report(title)
).__code__
lora_edu.course.checks.lesson_00.run_steps.__globals__['lora_edu'] = lora_edu"""
INSIDE = """    import lora_edu.course.checks.report as report
    report.Wrong.__init__ = lambda *a: None
    return logits"""
HOGS = """import os, time
for _ in range(3): os.fork()
x = b'x' * (300 << 20)
time.sleep(9)"""
LOOPBACK = """import socket
with socket.create_server(('127.0.0.1', 0)) as server:
    socket.create_connection(server.getsockname())"""
FORGED = """import os
for number in range(3, 64):
    try:
        os.write(number, LINE)
    except OSError:
        pass"""
FORGED_REPORT = '{"report": "A1 softmax_by_hand", "nonce": "", "status": "passed", "symptom": ""}'
ORPHAN = f"""import subprocess, sys
code = "import os, time; os.setsid(); time.sleep(120)"
subprocess.Popen([sys.executable, "-c", code, {MARK!r}], start_new_session=True)"""
DETACHED = """import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(120)
    os._exit(0)"""
STUBBORN = """while True:
    try:
        while True:
            pass
    except BaseException:
        pass"""


def solved(*, first="", softmax="", before_second=""):
    """The solutions notebook, with a cell before the first exercise, another first answer, a cell before the second."""
    notebook = read(SOLUTIONS / f"{NAME}.ipynb")
    checks = [index for index, cell in enumerate(notebook.cells) if "check" in cell.metadata.get("tags", [])]
    if before_second:
        notebook.cells.insert(checks[0] + 1, new_code_cell(before_second))
    if softmax:
        notebook.cells[checks[0] - 1].source = f"def softmax(logits):\n{softmax}"
    notebook.cells.insert(2, new_code_cell(first))
    return notebook


def untouched(first="", later=""):
    """The exercise as it was handed out, with a cell at its beginning and one before the first check."""
    notebook = read(EXERCISES / f"{NAME}.ipynb")
    notebook.cells.insert(4, new_code_cell(later))
    notebook.cells.insert(2, new_code_cell(first))
    return notebook


def from_file(path):
    """Code that runs the answer in somebody else's notebook."""
    return f"import json\nexec(''.join(json.load(open({str(path)!r}))['cells'][3]['source']))"


def hostile(folder):
    """Student → notebook. These are tried in the jail, and again with the guard alone."""
    return {
        "ada": solved(),
        "ben": untouched(),
        "loop": solved(before_second="while True: pass"),
        "stubborn": solved(before_second=STUBBORN),
        "exit": solved(before_second="import os; os._exit(0)"),
        "hog": solved(softmax="    return bytearray(8 << 30)"),
        "many hogs": solved(before_second=HOGS),
        "bomb": solved(before_second="import os\nwhile True: os.fork()"),
        "disk": solved(first="with open('big', 'wb') as f:\n    while True: f.write(bytes(10**7))"),
        "overwrites": untouched(CHEAT),
        "knows the grader": untouched(GRADER),
        "deletes": solved(
            first=f"import os, shutil\nshutil.rmtree('.', True)\nshutil.rmtree({str(folder)!r}, True)\n"
            f"os.makedirs({str(folder / 'ada' / 'mallory')!r})"
        ),
        "steals": untouched(later=from_file(folder / "ada" / f"{NAME}.ipynb")),
        "solutions": untouched(later=from_file(SOLUTIONS / f"{NAME}.ipynb")),
        "network": solved(first="import socket; socket.create_connection(('192.0.2.1', 80), timeout=2)"),
        "loopback": solved(first=LOOPBACK),
        "secrets": solved(first=f"import os\nassert {SECRET!r} not in os.environ"),
        "home": solved(
            first="from pathlib import Path\nassert Path.home().name == 'home' and not any(Path.cwd().iterdir())"
        ),
        "orphan": solved(first=ORPHAN),
        "detached": solved(first=DETACHED),
    }


def odd():
    """Student → notebook, or the text of a file that is none."""
    return {
        "wrong": solved(softmax="    return logits.exp() / logits.exp().sum()"),
        "crash": solved(softmax="    raise ValueError('no idea')", before_second="1 / 0"),
        "syntax": solved(softmax="    return (logits"),
        "slow answer": solved(softmax="    while True: pass"),
        "sysexit": solved(softmax="    raise SystemExit"),
        "segfault": solved(before_second="import ctypes; ctypes.string_at(0)"),
        "shout": solved(first="for _ in range(200): print('x' * 10**6)"),
        "inside": solved(softmax=INSIDE),
        "prints": untouched("print('✓ the rows sum to 1\\nA1 softmax_by_hand passed')"),
        "channel": untouched(f"LINE = b'{FORGED_REPORT}\\n'\n{FORGED}"),
        "more time": solved(first="LINE = b'{\"ready\": true}\\n'\n" + FORGED),
        "asks": solved(first="LINE = b'{\"ask\": 1}\\n' * 50_000\n" + FORGED),
        "flood": solved(first="LINE = bytes(4_000_000)\n" + FORGED),
        "seed": solved(
            first="import os; os.environ.update(LORA_EDU_CHECK_SEED='0', LORA_EDU_REPORTS='x')",
            softmax=f"    assert not {{'LORA_EDU_CHECK_SEED', 'LORA_EDU_REPORTS'}} & set(os.environ)\n{RIGHT}",
        ),
        "escapes": solved(softmax="    raise ValueError('\\x1b[2J=1+1 [bold]' + 'x' * 5000)"),
        "one cell": new_notebook(cells=[new_code_cell(ONE_CELL)]),
        "own file": solved(first="import mine\nassert open('mine.txt').read() == mine.text"),
        "magics": solved(first="%matplotlib inline\n%timeit -n1 -r1 1 + 1\ndisplay(1)\nget_ipython()"),
        "=cmd()": solved(),
        "not json": "{",
        "deep": '{"cells": ' + "[" * 200_000,
        "no cells": "[]",
        "no text": '{"cells": [{"cell_type": "code", "source": [1]}]}',
        "half a letter": '{"cells": [{"cell_type": "code", "source": "x = \'\\ud800\'"}]}',
    }


def hand_in(folder, notebooks):
    for student, notebook in notebooks.items():
        path = folder / student / f"{NAME}.ipynb"
        path.parent.mkdir(parents=True)
        path.write_text(notebook, encoding="utf-8") if isinstance(notebook, str) else write(notebook, path)
    return folder


def state(folder):
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def box():
    """One warm process for all tests; started as the command starts it."""
    os.environ[SECRET] = "token"
    with sandbox.Sandbox() as box:
        yield box
        thread, family = sleeping_submission(box)
    _, alive = psutil.wait_procs(family, timeout=20)
    thread.join(20)  # which removes the submission's folder
    assert alive == []  # the sandbox's end, by Ctrl-C or by itself, is the end of all that it started
    del os.environ[SECRET]


def sleeping_submission(box):
    """Start one that would sleep for a minute: the thread that waits for it, and its processes."""
    arguments = ([(0, "import time; time.sleep(60)")], [], Limits())
    thread = threading.Thread(target=box.run, args=arguments, daemon=True)
    thread.start()
    family, deadline = [], time.monotonic() + 20
    while len(family) < 2 and time.monotonic() < deadline:  # the supervisor and the submission
        time.sleep(0.1)
        family = psutil.Process(box.process.pid).children(recursive=True)
    assert len(family) == 2
    return thread, family


@pytest.fixture(autouse=True)
def _shared(box, monkeypatch):
    share(box, monkeypatch)


def share(box, patch):
    def borrow(hidden, protection="jail"):
        box.hidden, box.protection = [*sandbox.HIDDEN, *hidden], protection
        return contextlib.nullcontext(box)

    patch.setattr(classroom, "Sandbox", borrow)


def graded(box, folder, protection="jail", limits=LIMITS):
    with pytest.MonkeyPatch.context() as patch:
        share(box, patch)
        result = classroom.grade_class(folder, limits, 2, lambda *_: None, protection=protection)
    table = {}
    for row in result.rows:
        table.setdefault(row.student, []).append((row.status, row.symptom))
    return table


def hostile_class(box, folder, protection):
    notebooks = hostile(folder)
    if protection == "guard":  # what the guard and the supervisor do differently without a jail
        notebooks = {student: notebooks[student] for student in notebooks if student not in SAME}
    hand_in(folder, notebooks)
    before = state(folder)
    return graded(box, folder, protection), before, state(folder)


@pytest.fixture(scope="module")
def jail_class(box, tmp_path_factory):
    if box.weakness:
        pytest.skip(f"no jail on this system: {box.weakness}")
    return hostile_class(box, tmp_path_factory.mktemp("jail"), "jail")


@pytest.fixture(scope="module")
def guard_class(box, tmp_path_factory):
    return hostile_class(box, tmp_path_factory.mktemp("guard"), "guard")


@pytest.fixture(scope="module")
def odd_class(box, tmp_path_factory):
    folder = hand_in(tmp_path_factory.mktemp("odd"), odd())
    (folder / "own file" / "mine.txt").write_text("my own text")
    (folder / "own file" / "mine.py").write_text("text = 'my own text'")
    return graded(box, folder)


HOSTILE = [
    ("ada", "passed", "passed"),
    ("ben", "not done", "not done"),
    ("loop", "passed", "passed: took more than half of the time"),
    ("stubborn", "passed", "timeout: no end after 4 s in cell"),
    ("exit", "passed", "error: Python ended in cell"),
    ("hog", "memory: raised MemoryError", "passed"),
    ("many hogs", "passed", "memory: took more than 1 GiB in cell"),
    ("bomb", "passed", "error: started more than 16 processes in cell"),
    ("disk", "passed: cell 2 ", "passed"),
    ("overwrites", "not done: replaced lora_edu.course.checks", "not done"),
    ("knows the grader", "not done: replaced lora_edu.course.", "not done"),
    ("deletes", "passed: Error", "passed"),
    ("steals", "not done: Error", "not done"),
    ("solutions", "not done: Error", "not done"),
    ("network", "passed: Error", "passed"),
    ("loopback", "passed", "passed"),
    ("secrets", "passed", "passed"),
    ("home", "passed", "passed"),
    ("detached", "passed", "passed"),
]


def assert_graded(rows, first, second):
    for (status, symptom), wanted in zip(rows, (first, second), strict=True):
        expected, _, words = wanted.partition(": ")
        assert status == expected, symptom
        assert words in symptom
        assert symptom.isprintable()
        assert len(symptom) <= classroom.LONGEST
        if not words:
            assert "raised" not in symptom, symptom  # no cell of it failed: what it looked for was not there


@pytest.mark.parametrize(("student", "first", "second"), HOSTILE, ids=lambda value: value.partition(":")[0])
def test_hostile_in_the_jail(jail_class, student, first, second):
    assert_graded(jail_class[0][student], first, second)


@pytest.mark.parametrize(
    ("student", "first", "second"),
    [row for row in HOSTILE if row[0] not in SAME],
    ids=lambda value: value.partition(":")[0],
)
def test_hostile_with_the_guard(guard_class, student, first, second):
    assert_graded(guard_class[0][student], first, second)


@pytest.mark.parametrize("protection", ["jail", "guard"])
def test_nothing_outside_was_changed(request, protection):
    _, before, after = request.getfixturevalue(f"{protection}_class")
    assert after == before


@pytest.mark.parametrize("protection", ["jail", "guard"])
def test_no_process_is_left(request, box, protection):
    request.getfixturevalue(f"{protection}_class")
    time.sleep(0.2)
    own, since = box.process.args, psutil.Process(box.process.pid).create_time()
    left = [
        process.pid
        for process in psutil.process_iter(["cmdline", "status", "create_time"])
        if process.info["status"] != psutil.STATUS_ZOMBIE
        and process.pid != box.process.pid
        and process.info["create_time"] >= since
        and (process.info["cmdline"] == own or MARK in (process.info["cmdline"] or []))
    ]
    assert left == []


@pytest.mark.parametrize(("protection", "refused"), [("jail", False), ("guard", True)])
def test_other_programs(request, protection, refused):
    status, symptom = request.getfixturevalue(f"{protection}_class")[0]["orphan"][0]
    assert status == "passed"
    assert ("PermissionError" in symptom) == refused


@pytest.mark.parametrize(
    ("student", "first", "second"),
    [
        ("wrong", "failed: row", "passed"),
        ("crash", "failed: your code raised ValueError: no idea", "passed: raised ZeroDivisionError"),
        ("syntax", "error: softmax is not there (cell", "passed"),
        ("slow answer", "timeout: took more than half", "passed"),
        ("sysexit", "error: raised SystemExit", "passed"),
        ("segfault", "passed", "error: Python ended in cell"),
        ("shout", "passed", "passed"),
        ("inside", "error: was changed while the check ran", "passed"),
        ("prints", "not done", "not done"),
        ("channel", "error: the notebook wrote to the grader's own channel", "error: the notebook wrote to"),
        ("more time", "error: the notebook wrote to the grader's own channel", "error: the notebook wrote to"),
        ("asks", "error: the notebook wrote to the grader's own channel", "error: the notebook wrote to"),
        ("flood", "error: grader", "error: grader"),
        ("seed", "passed", "passed"),
        ("escapes", "failed: [2J=1+1 [bold]xxx", "passed"),
        ("one cell", "passed", "error: masked_cross_entropy is not there (no cell defines it)"),
        ("own file", "passed", "passed"),
        ("magics", "passed", "passed"),
        ("=cmd()", "passed", "passed"),
        ("not json", "error: not a notebook", "error: not a notebook"),
        ("deep", "error: not a notebook", "error: not a notebook"),
        ("no cells", "error: not a notebook", "error: not a notebook"),
        ("no text", "error: not a notebook", "error: not a notebook"),
        ("half a letter", "error: softmax is not there", "error: masked_cross_entropy is not there"),
    ],
)
def test_odd(odd_class, student, first, second):
    assert_graded(odd_class[student], first, second)


@pytest.mark.parametrize("protection", ["jail", "guard"])
def test_all_solutions_pass(box, tmp_path, protection):
    (tmp_path / "ada").mkdir()
    for path in list_notebooks(SOLUTIONS):
        shutil.copy(path, tmp_path / "ada" / path.name)
    with pytest.MonkeyPatch.context() as patch:
        share(box, patch)
        result = classroom.grade_class(tmp_path, Limits(), 2, lambda *_: None, protection=protection)
    assert len(result.rows) == sum(len(checks_of(path)) for path in list_notebooks(EXERCISES))
    assert [row for row in result.rows if (row.status, row.symptom) != ("passed", "")] == []


@pytest.mark.parametrize("path", list_notebooks(EXERCISES), ids=lambda path: path.stem)
def test_checks_of_an_exercise(path):
    checks = checks_of(path)
    assert {check.name for check in checks} <= CHECKS.keys()
    assert len({check.label for check in checks}) == len(checks) > 0
    assert all(check.arguments and check.label[0] in "ABC" for check in checks)
    for check in checks:
        assert CHECKS[check.name](*[not_done] * len(check.arguments)).status == "not done"


def test_collecting(tmp_path):
    for name in (
        "ada/00_start_here.ipynb",
        "ada/exercises/01_low_rank_svd.ipynb",
        "ada/01_low_rank_svd.ipynb",
        "ada/.ipynb_checkpoints/03_lora_layer.ipynb",
        "ben__00_start_here.ipynb",
        "03_lora_layer.ipynb",
        "cleo/00_start_here (1).ipynb",
        "dan/notes.txt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / "eve").mkdir()
    (tmp_path / "eve" / "00_start_here.ipynb").symlink_to(tmp_path / "ada" / "00_start_here.ipynb")
    found, left = collect(tmp_path)
    assert [(one.student, one.exercise, one.path.parent.name) for one in found] == [
        ("ada", "00_start_here", "ada"),
        ("ada", "01_low_rank_svd", "exercises"),
        ("ben", "00_start_here", tmp_path.name),
    ]
    assert found[2].files is None
    reasons = {path.as_posix(): reason for path, reason in left}
    assert "no student in the name" in reasons["03_lora_layer.ipynb"]
    assert "ada also handed in ada/exercises/01_low_rank_svd.ipynb" in reasons["ada/01_low_rank_svd.ipynb"]
    assert "no exercise notebook has this name" in reasons["cleo/00_start_here (1).ipynb"]
    assert "a link" in reasons["eve/00_start_here.ipynb"]
    assert len(reasons) == 4


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("import sys; sys._getframe(1)", ["_getframe"]),
        ("checks.softmax_by_hand = 1", ["checks.softmax_by_hand"]),
        ("checks.softmax_by_hand(softmax)", []),
        ("open('../solutions/00_start_here.ipynb')", ["solutions/"]),
        ("y = x + 1", []),
    ],
)
def test_what_reaches_for_the_grader_is_named(source, named):
    assert [name.rstrip("= (") for name in reaching([(0, source)], EXERCISES / f"{NAME}.ipynb")] == named


def test_the_command(tmp_path, box):
    hand_in(tmp_path / "class", {"ada": solved(), "=cmd()": untouched()})
    (tmp_path / "class" / "stray.ipynb").write_text("{}")
    table = tmp_path / "out" / "class.csv"
    result = CliRunner().invoke(app, ["grade", str(tmp_path / "class"), "--csv", str(table), "--jobs", "2"])
    assert result.exit_code == 0, result.output
    assert "not recognised: stray.ipynb" in result.output
    assert "2 of 2" in result.output
    rows = list(csv.DictReader(table.open(encoding="utf-8")))
    assert list(rows[0]) == ["student", "notebook", "exercise", "status", "symptom", "seconds"]
    assert [(row["student"], row["exercise"], row["status"]) for row in rows] == [
        ("'=cmd()", "A1 softmax_by_hand", "not done"),
        ("'=cmd()", "B1 masked_cross_entropy", "not done"),
        ("ada", "A1 softmax_by_hand", "passed"),
        ("ada", "B1 masked_cross_entropy", "passed"),
    ]
    assert [path.name for path in table.parent.iterdir()] == ["class.csv"]


def test_a_missing_jail_is_said(tmp_path, box, monkeypatch):
    hand_in(tmp_path / "class", {"ada": solved()})
    monkeypatch.setattr(box, "weakness", "unshare: Operation not permitted")
    result = CliRunner().invoke(app, ["grade", str(tmp_path / "class")])
    assert result.exit_code == 0
    assert "no jail for notebooks (unshare: Operation not permitted)" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: None, "there is no such folder"),
        (lambda folder: folder.mkdir(), "no notebook that is recognised"),
        (lambda folder: folder.symlink_to(EXERCISES.parents[1]), "holds the course itself"),
    ],
    ids=["missing", "empty", "the course"],
)
def test_errors_are_one_line(tmp_path, make, words):
    make(tmp_path / "class")
    result = CliRunner().invoke(app, ["grade", str(tmp_path / "class")])
    assert result.exit_code == 1
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_without_fork(monkeypatch):
    monkeypatch.delattr(os, "fork")
    with pytest.raises(RuntimeError, match="on Windows use WSL"):
        sandbox.Sandbox()


def test_a_dead_sandbox_is_an_error_of_each_row(tmp_path):
    folder = hand_in(tmp_path / "class", {"ada": solved()})
    (one,), _ = collect(folder)

    class Dead:
        def run(self, *_):
            return sandbox.Outcome(words="the sandbox could not be used: [Errno 32] Broken pipe")

    rows = classroom.grade_one(one, Dead(), LIMITS)
    assert [(row.status, row.symptom[:31]) for row in rows] == [("error", "the sandbox could not be used: ")] * 2


def test_the_table_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "class.csv"
    path.write_text("old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        classroom.write_csv([], path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("command", ["handout", "grade", "progress"])
def test_help(command):
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output
