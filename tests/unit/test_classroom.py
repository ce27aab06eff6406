"""Grading a class: right and wrong answers get what they deserve, and no notebook stops or harms the class."""

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time

import nbformat
import psutil
import pytest
from classes import NAME, hand_in, solved, untouched
from nbformat.v4 import new_code_cell, new_notebook
from typer.testing import CliRunner

from lora_edu.course.checks import CHECKS
from lora_edu.course.cli import app
from lora_edu.course.grading import check, isolation, progress, station
from lora_edu.course.grading.classroom import grade_class
from lora_edu.course.grading.client import Outcome
from lora_edu.course.grading.handed_in import handed_in
from lora_edu.course.grading.runner import Runner
from lora_edu.course.grading.submissions import checks_of, line_up, reaching
from lora_edu.course.grading.texts import LONGEST
from lora_edu.course.grading.watch import Limits
from lora_edu.course.notebooks.stored import EXERCISES, SOLUTIONS, list_notebooks, write

LIMITS = Limits(seconds=4, memory=1024**3 // 2, processes=16, file_bytes=64 * 1024**2)
SECRET = "LORA_EDU_TEST_TOKEN"
NO_ISOLATION = isolation.unavailable()
needs_fork = pytest.mark.skipif(not station.FORKS, reason="stations without a warm process are tried by one test alone")

FAKE_REPORT = """import json
from IPython.display import publish_display_data
def forge():
    for nonce in ("", None, "0" * 64):
        report = {"nonce": nonce, "status": "passed", "title": "Softmax"}
        publish_display_data({"application/vnd.lora-edu.report": json.dumps(report)})
forge()
get_ipython().events.register("post_run_cell", lambda result: forge())  # in the grader's own cells, too
print("✓ the rows sum to 1\\nA1 softmax_by_hand passed")
import os
os.environ.update(LORA_EDU_CHECK_SEED="0")"""
REPLACED_CHECK = """from lora_edu.course import checks
checks.softmax_by_hand = lambda candidate, hint=1: checks.Report('softmax')
checks.CHECKS['softmax_by_hand'] = checks.softmax_by_hand"""
ONE_CELL = """from lora_edu.course import checks
def softmax(logits):
    e = (logits - logits.max(dim=1, keepdim=True).values).exp()
    return e / e.sum(dim=1, keepdim=True)
checks.softmax_by_hand(softmax, hint=3)"""
RIGHT = """    e = (logits - logits.max(dim=1, keepdim=True).values).exp()
    return e / e.sum(dim=1, keepdim=True)"""
STUBBORN = """while True:
    try:
        while True:
            pass
    except BaseException:
        pass"""
HOGS = """import os
for _ in range(2): os.fork()
held = []
while True:
    try:
        held.append(b"x" * (50 << 20))
    except BaseException:
        pass"""
FORKS = """import os, time
for _ in range(100):
    if os.fork() == 0:
        os.setsid()
        time.sleep(60)
        os._exit(0)
time.sleep(9)"""
MANY_FILES = """for number in range(100):
    with open(f"{number}", "wb") as file:
        file.truncate(60 << 20)
import time
time.sleep(1)"""
WARM_PROCESS = """import os, signal
with open(f"/proc/{os.getppid()}/mem", "r+b") as memory:
    memory.read(1)"""
KILLS_IT = """import os, signal, time
os.kill(os.getppid(), signal.SIGKILL)
time.sleep(9)"""
SET_UP = """import sys
!pip install there-is-no-such-package
%pip install there-is-no-such-package
%conda install there-is-no-such-package
packages = !pip list
if True:
    !{sys.executable} -m pip install there-is-no-such-package
from google.colab import drive, files as colab_files
import google.colab
drive.mount("/content/drive")
uploaded = colab_files.upload()
google.colab.output.clear()
%tensorflow_version 2.x
%load_ext google.colab.data_table
!no-such-program
try:
    import google.colab
    on_colab = True
except ImportError:
    on_colab = False
went_on = not on_colab"""
PLACES = "('.', '/tmp', '/dev/shm', os.path.expanduser('~'))"
LEAVES = f"import os\nfor place in {PLACES}: open(f'{{place}}/left', 'w').write('the answer')"
LOOKS = f"import os\nassert not [place for place in {PLACES} if os.path.exists(f'{{place}}/left')]"


def reads(path):
    """Code that runs the answer in somebody else's notebook."""
    return f"import json\nexec(''.join(json.load(open({str(path)!r}))['cells'][3]['source']))"


# What each does, what is said of its two exercises, and whether it can be tried where nothing holds it but limits.
# "status" alone: without any words of a cell that failed.
HOSTILE = {
    "ada": (lambda folder: solved(), "passed", "passed", True),
    "ben": (lambda folder: untouched(), "not done", "not done", True),
    "loop": (
        lambda folder: solved(before_second="while True: pass"),
        "passed",
        "passed: took more than half of the time",
        True,
    ),
    "stubborn": (lambda folder: solved(before_second=STUBBORN), "passed", "timeout: no end after 4 s in cell", False),
    "hog": (lambda folder: solved(softmax="    return bytearray(8 << 30)"), "memory: MemoryError", "passed", True),
    "hogs": (lambda folder: solved(before_second=HOGS), "passed", "memory: took more than 0.5 GiB in cell", True),
    "forks": (lambda folder: solved(before_second=FORKS), "passed", "error: started more than 16 processes in", True),
    "exits": (lambda folder: solved(before_second="import os; os._exit(0)"), "passed", "error: Python ended in", True),
    "prints": (
        lambda folder: solved(first="for _ in range(200): print('x' * 10**6)\nimport os; os.write(1, bytes(10**6))"),
        "passed",
        "passed",
        True,
    ),
    "displays": (
        lambda folder: solved(first="for _ in range(200): display({'text/plain': 'x' * 10**6}, raw=True)"),
        "error: sent more than 64 MB",
        "error: sent more than 64 MB",
        False,
    ),
    "fills": (lambda folder: solved(before_second=MANY_FILES), "passed", "error: wrote too many or too large", False),
    "deletes": (
        lambda folder: solved(
            first=f"import os, shutil\nshutil.rmtree('.', True)\nshutil.rmtree({str(folder)!r}, True)\n"
            f"os.makedirs({str(folder / 'ada' / 'mallory')!r})"
        ),
        "passed",
        "passed",
        False,
    ),
    "neighbour": (
        lambda folder: untouched(later=reads(folder / "ada" / f"{NAME}.ipynb")),
        "not done: FileNotFoundError",
        "not done",
        False,
    ),
    "solutions": (
        lambda folder: untouched(later=reads(SOLUTIONS / f"{NAME}.ipynb")),
        "not done: FileNotFoundError",
        "not done",
        False,
    ),
    "network": (
        lambda folder: solved(first="import socket; socket.create_connection(('192.0.2.1', 80), timeout=2)"),
        "passed: Network is unreachable",
        "passed",
        False,
    ),
    "warm": (lambda folder: solved(first=WARM_PROCESS), "passed: PermissionError", "passed", False),
    "kills": (lambda folder: solved(before_second=KILLS_IT), "passed", "error: Python ended in cell", False),
    "fakes": (lambda folder: untouched(FAKE_REPORT), "not done", "not done", True),
    "replaces": (lambda folder: untouched(REPLACED_CHECK), "not done", "not done", True),
    "secrets": (
        lambda folder: solved(first=f"import os\nassert {SECRET!r} not in os.environ"),
        "passed",
        "passed",
        True,
    ),
    "=1+1 [red]\x1b[2J": (lambda folder: solved(), "passed", "passed", True),
    "zoe": (lambda folder: solved(), "passed", "passed", True),
}

# What is no notebook, or one that few would write.
ODD = {
    "wrong": (solved(softmax="    return logits.exp() / logits.exp().sum()"), "failed: row", "passed"),
    "crash": (
        solved(softmax="    raise ValueError('no idea')", before_second="1 / 0"),
        "failed: your code raised ValueError: no idea",
        "passed: raised ZeroDivisionError",
    ),
    "syntax": (solved(softmax="    return (logits"), "error: softmax is not there (cell", "passed"),
    "slow answer": (solved(softmax="    while True: pass"), "timeout: took more than half", "passed"),
    "sysexit": (solved(softmax="    raise SystemExit"), "error: raised SystemExit", "passed"),
    "seed": (
        solved(
            first="import os; os.environ.update(LORA_EDU_CHECK_SEED='0')",
            softmax=f"    assert 'LORA_EDU_CHECK_SEED' not in os.environ\n{RIGHT}",
        ),
        "passed",
        "passed",
    ),
    "escapes": (
        solved(softmax="    raise ValueError('\\x1b[2J=1+1 [bold]' + 'x' * 5000)"),
        "failed: [2J=1+1 [bold]xxx",
        "passed",
    ),
    "one cell": (
        new_notebook(cells=[new_code_cell(ONE_CELL)]),
        "passed",
        "error: masked_cross_entropy is not there (no",
    ),
    "own file": (solved(first="import mine\nassert open('mine.txt').read() == mine.text"), "passed", "passed"),
    "links": (solved(first="import os\nassert not os.path.lexists('mine.txt')"), "passed", "passed"),
    "magics": (
        solved(
            first="%matplotlib inline\n%timeit -n1 -r1 1 + 1\ndisplay(1)\nget_ipython()\n"
            "await __import__('asyncio').sleep(0)"
        ),
        "passed",
        "passed",
    ),
    "set-up lines": (
        solved(first=SET_UP, softmax=f"    assert went_on\n{RIGHT}"),
        "passed",
        "passed",
    ),
    "fails after set-up": (
        solved(first=f"{SET_UP}\n1 / 0", softmax=f"    assert went_on\n{RIGHT}"),
        "passed: cell 2 raised ZeroDivisionError",
        "passed",
    ),
    "crashing check": (
        solved(check="checks.softmax_by_hand(softmax)\nnothing_here"),
        "error: the cell that calls this check crashes; cell 5 raised NameError",
        "passed",
    ),
    "unfinished check": (
        solved(check="checks.softmax_by_hand(softmax"),
        "error: the cell that calls this check crashes; cell 5 raised SyntaxError",
        "passed",
    ),
    "asserts": (solved(check="assert checks.softmax_by_hand(softmax), 'not yet'"), "passed", "passed"),
    "mark": (b"\xef\xbb\xbf" + nbformat.writes(solved()).encode(), "passed", "passed"),
    "nbformat 3": (nbformat.v3.writes_json(nbformat.convert(solved(), 3)), "passed", "passed"),
    "uses the report": (
        solved(first="from lora_edu.course import checks\nchecks.softmax_by_hand(1).status"),
        "passed",
        "passed",
    ),
    "not json": ("{", "error: not a notebook", "error: not a notebook"),
    "deep": ('{"cells": ' + "[" * 200_000, "error: not a notebook", "error: not a notebook"),
    "no cells": ("[]", "error: not a notebook", "error: not a notebook"),
    "no text": ('{"cells": [{"cell_type": "code", "source": [1]}]}', "error: not a notebook", "error: not a notebook"),
    "utf-16": ("{}".encode("utf-16"), "error: not a notebook", "error: not a notebook"),
    "large": (b" " * (21 << 20), "error: larger than 20 MB", "error: larger than 20 MB"),
    "half a letter": (
        '{"cells": [{"cell_type": "code", "source": "x = \'\\ud800\'"}]}',
        "error: softmax is not there",
        "error: masked_cross_entropy is not there",
    ),
}  # fmt: skip


def state(folder):
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def graded(runner, folder, limits=LIMITS):
    table = {}
    for row in grade_class(handed_in(folder, folder).submissions, runner, limits, lambda rows: None):
        table.setdefault(row.student, []).append(row)
    return table


def processes():
    """All that came from this one, but what was there before the tests."""
    return {one for one in psutil.Process().children(recursive=True) if one.status() != psutil.STATUS_ZOMBIE}


@pytest.fixture(scope="module")
def secret():
    os.environ[SECRET] = "token"
    yield
    del os.environ[SECRET]


@pytest.fixture(scope="module")
def runner(secret):
    """Stations for all tests, without isolation."""
    with Runner(jobs=2) as runner:
        yield runner
    assert not any(one.folder.exists() for one in runner.stations)


@pytest.fixture(scope="module")
def isolated(secret):
    """The same, in bubblewrap."""
    if NO_ISOLATION:
        pytest.skip(f"no isolation on this machine: {NO_ISOLATION}")
    with Runner(jobs=2, isolated=True) as runner:
        yield runner


def hostile_class(runner, folder):
    students = {name: row for name, row in HOSTILE.items() if runner.isolated or row[-1]}
    hand_in(folder, {name: make(folder) for name, (make, *_) in students.items()})
    before, here = state(folder), processes()
    table = graded(runner, folder)
    assert state(folder) == before  # also what was to be deleted
    idle = {process for one in runner.idle for process in one.resident}
    left = processes() - here - idle
    assert not left, [process.cmdline() for process in left]
    return table


@pytest.fixture(scope="module")
def isolated_class(isolated, tmp_path_factory):
    return hostile_class(isolated, tmp_path_factory.mktemp("isolated"))


@pytest.fixture(scope="module")
def bare_class(runner, tmp_path_factory):
    return hostile_class(runner, tmp_path_factory.mktemp("bare"))


@pytest.fixture(scope="module")
def odd_class(runner, tmp_path_factory):
    folder = hand_in(tmp_path_factory.mktemp("odd"), {name: notebook for name, (notebook, *_) in ODD.items()})
    (folder / "own file" / "mine.txt").write_text("my own text")
    (folder / "own file" / "mine.py").write_text("text = 'my own text'")
    (folder / "links" / "mine.txt").symlink_to(folder / "own file" / "mine.txt")
    (folder / "links" / "mine").symlink_to(folder / "own file")
    return graded(runner, folder)


def assert_graded(rows, *expected):
    for row, wanted in zip(rows, expected, strict=True):
        status, _, words = wanted.partition(": ")
        assert row.status == status, row.symptom
        assert words in row.symptom
        assert row.symptom.isprintable()
        assert len(row.symptom) <= LONGEST
        if wanted == "passed":
            assert "raised" not in row.symptom, row.symptom  # no cell failed: what it looked for was not there


@needs_fork
@pytest.mark.parametrize("student", HOSTILE)
def test_hostile_and_isolated(isolated_class, student):
    assert_graded(isolated_class[" ".join(student.replace("\x1b", " ").split())], *HOSTILE[student][1:3])


@needs_fork
@pytest.mark.parametrize("student", [name for name, row in HOSTILE.items() if row[-1]])
def test_hostile_without_isolation(bare_class, student):
    assert_graded(bare_class[" ".join(student.replace("\x1b", " ").split())], *HOSTILE[student][1:3])


@needs_fork
@pytest.mark.parametrize("student", ODD)
def test_odd(odd_class, student):
    assert_graded(odd_class[student], *ODD[student][1:])


@needs_fork
def test_nothing_passes_from_one_student_to_the_next(isolated):
    with Runner(isolated=True) as other:
        other.idle = [isolated.idle[0]]  # one station, for both
        for source in (LEAVES, LOOKS):
            outcome = other.run([(0, source)], [], LIMITS)
            assert (outcome.ended, outcome.troubles) == ("ended", [])


@needs_fork
def test_a_result_can_be_had_again_by_its_seed(runner, tmp_path, monkeypatch):
    """What the check drew is in the symptom."""
    shown = solved(softmax="    raise ValueError(logits.flatten().tolist()[:3])")
    hand_in(tmp_path, {"ada": shown, "ben": shown})
    found = []
    for seed in (1, 1, 2):
        monkeypatch.setattr(runner, "seed", seed)
        ada, ben = graded(runner, tmp_path).values()
        assert (ada[0].symptom, ada[0].seed) == (ben[0].symptom, seed)
        found.append(ada[0].symptom)
    assert found[0] == found[1] != found[2]
    assert "ValueError: [" in found[0]


@needs_fork
def test_check_grade_and_progress_count_alike(tmp_path, runner, monkeypatch):
    borrow(runner, monkeypatch)
    monkeypatch.setattr(progress, "Runner", lambda **_: contextlib.nullcontext(runner))
    folder = tmp_path / "class" / "ada"
    notebook = solved(check="checks.softmax_by_hand(softmax)\n1 / 0", softmax=RIGHT)
    write(notebook, folder / f"mine ({NAME}).ipynb")
    lines = {
        command: CliRunner().invoke(app, [command, str(path)]).stdout
        for command, path in (
            ("check", folder / f"mine ({NAME}).ipynb"),
            ("grade", folder.parent),
            ("progress", folder),
        )
    }
    assert "\n1 of 2 passed" in lines["check"]
    assert "✗ A1 Softmax – error: the cell that calls this check crashes" in lines["check"]
    assert "✓ B1 Masked cross-entropy – passed" in lines["check"]
    assert f"ada, {NAME}: 1 of 2 passed" in lines["grade"]
    assert f"{NAME:32} 1 of 2   ✗ A1  ✓ B1" in lines["progress"]
    assert "1 of 2 checked exercises pass" in lines["progress"]


@needs_fork
def test_all_solutions_pass(request, tmp_path):
    runner = request.getfixturevalue("runner" if NO_ISOLATION else "isolated")
    (tmp_path / "ada").mkdir()
    for path in list_notebooks(SOLUTIONS):
        shutil.copy(path, tmp_path / "ada" / path.name)
    rows = graded(runner, tmp_path, Limits())["ada"]
    assert len(rows) == sum(len(checks_of(path)) for path in list_notebooks(EXERCISES))
    assert [row for row in rows if (row.status, row.symptom) != ("passed", "")] == []


def test_kernels_that_jupyter_starts(tmp_path, monkeypatch):
    """As on Windows and macOS: no fork, no warm process."""
    monkeypatch.setattr(station, "FORKS", False)
    with Runner() as runner:
        table = graded(runner, hand_in(tmp_path, {"ada": solved(before_second="while True: pass")}))
    assert_graded(table["ada"], "passed", "passed: took more than half")


@needs_fork
def test_ctrl_c_leaves_nothing(tmp_path):
    hand_in(tmp_path / "class", {"ada": solved(first="import time; time.sleep(60)")})
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "lora_edu.course.cli", "grade", str(tmp_path / "class"), "--jobs", "1"]
    grader = psutil.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("lora-edu-*/sockets/kernel.json")) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.5)
    family = grader.children(recursive=True)
    assert len(family) >= 2  # the warm process and the kernel
    grader.send_signal(signal.SIGINT)
    assert grader.wait(20) != 0
    _, alive = psutil.wait_procs(family, timeout=5)
    assert alive == []
    assert list(tmp_path.glob("lora-edu-*")) == []


# What is said about isolation.


def borrow(runner, patch):
    """Let the commands use these stations."""
    place = "lora_edu.course.grading.runner.Runner"
    patch.setattr(place, lambda *_, **__: contextlib.nullcontext(runner))
    patch.setattr(check, "Runner", lambda *_, **__: contextlib.nullcontext(runner))


@pytest.fixture
def nothing_runs(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("something was run")

    monkeypatch.setattr("lora_edu.course.grading.runner.Runner", refuse)
    monkeypatch.setattr(check, "Runner", refuse)


@pytest.fixture
def no_bwrap(monkeypatch, tmp_path):
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))


@needs_fork
def test_a_lack_of_isolation_is_said_first(tmp_path, runner, monkeypatch, no_bwrap):
    borrow(runner, monkeypatch)
    hand_in(tmp_path / "class", {"ada": solved()})
    result = CliRunner().invoke(app, ["grade", str(tmp_path / "class")])
    assert result.exit_code == 0
    first, second, *_ = result.output.splitlines()
    assert first.startswith(
        "no isolation: bubblewrap (bwrap) was not found (apt install bubblewrap). Notebooks run with"
    )
    assert second == f"ada, {NAME}: 2 of 2 passed"


@pytest.mark.parametrize("command", ["grade", "check"])
def test_isolation_can_be_required(tmp_path, nothing_runs, no_bwrap, command):
    hand_in(tmp_path / "class", {"ada": solved()})
    place = tmp_path / "class" if command == "grade" else tmp_path / "class" / "ada" / f"{NAME}.ipynb"
    result = CliRunner().invoke(app, [command, str(place), "--require-isolation"])
    assert result.exit_code == 1
    assert "--require-isolation: bubblewrap (bwrap) was not found (apt install bubblewrap); nothing" in result.stderr
    assert result.stdout == ""


def test_a_bubblewrap_that_fails(tmp_path, monkeypatch):
    program = tmp_path / "bwrap"
    program.write_text("#!/bin/sh\necho 'bwrap: setting up uid map: Permission denied' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(sys, "platform", "linux")
    words = "bubblewrap does not work here (bwrap: setting up uid map: Permission denied)"
    assert isolation.unavailable() == words


def test_submissions_inside_what_notebooks_see_are_covered(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_EDU_DATA", str(tmp_path))
    assert f"--tmpfs {tmp_path}/class" in " ".join(isolation.sandbox(tmp_path, [tmp_path / "class"]))
    assert f"--tmpfs {tmp_path.parent}/class" not in " ".join(isolation.sandbox(tmp_path, [tmp_path.parent / "class"]))


# lora-edu check


@needs_fork
def test_checking_a_strangers_notebook(tmp_path, isolated, monkeypatch):
    borrow(isolated, monkeypatch)
    hand_in(
        tmp_path, {"ada": solved(first=f"import os\nassert {SECRET!r} not in os.environ", softmax="    return logits")}
    )
    result = CliRunner().invoke(app, ["check", str(tmp_path / "ada" / f"{NAME}.ipynb")])
    assert result.exit_code == 1
    assert f"{NAME} ({tmp_path / 'ada'})" in result.output
    assert "✗ A1 Softmax – failed: some of your probabilities" in result.output
    assert "✓ B1 Masked cross-entropy – passed" in result.output
    assert "1 of 2 passed" in result.output
    assert "raised" not in result.output


@needs_fork
def test_checking_ones_own_notebook(tmp_path, runner, monkeypatch):
    """It runs where it lies; a hint that it asks for is given."""
    borrow(runner, monkeypatch)
    monkeypatch.setattr(check, "WORK", tmp_path)
    monkeypatch.setattr(isolation, "decide", None)
    notebook = solved(first="open('left.txt', 'w').write('x')\n1 / 0", softmax="    return logits")
    for cell in notebook.cells:
        cell.source = cell.source.replace("checks.softmax_by_hand(softmax)", "checks.softmax_by_hand(softmax, hint=2)")
    hand_in(tmp_path, {"exercises": notebook})
    (tmp_path / "exercises" / f"{NAME}.ipynb").rename(tmp_path / "exercises" / f"{NAME} (1).ipynb")
    result = CliRunner().invoke(app, ["check", str(tmp_path / "exercises" / f"{NAME} (1).ipynb")])
    assert result.exit_code == 1
    lines = result.output.splitlines()
    assert lines[1].startswith("✗ A1 Softmax – failed: some of your probabilities")
    assert lines[2].startswith("  ")
    assert lines[2].endswith("?")
    assert lines[3:] == [
        "✓ B1 Masked cross-entropy – passed",
        "✗ cell 2 raised ZeroDivisionError: division by zero",
        "1 of 2 passed",
    ]
    assert (tmp_path / "exercises" / "left.txt").exists()


def test_what_0_of_0_means(tmp_path, nothing_runs):
    for source, reason in (
        (EXERCISES.parent / f"{NAME}.ipynb", f"it is the lesson {NAME} itself, without its exercises"),
        (None, "no cell and no name in it is that of an exercise notebook"),
    ):
        path = source or tmp_path / "mine.ipynb"
        if not source:
            write(new_notebook(cells=[new_code_cell("1")]), path)
        result = CliRunner().invoke(app, ["check", str(path)])
        assert result.exit_code == 0
        assert "0 of 0 passed, because nothing here has a check" in result.output
        assert f"{reason}; the exercises lie in {EXERCISES}" in result.output


def test_whose_notebook_it_is(tmp_path):
    assert check.is_own(check.WORK / "exercises" / "00.ipynb")
    assert check.is_own(EXERCISES / f"{NAME}.ipynb")
    assert not check.is_own(tmp_path / "00.ipynb")
    (tmp_path / "work").symlink_to(check.WORK)
    assert not check.is_own(check.WORK / ".." / "00.ipynb")


# Lining up with the checks, and errors.


@pytest.mark.parametrize("path", list_notebooks(EXERCISES), ids=lambda path: path.stem)
def test_checks_of_an_exercise(path):
    def not_done(*_, **__):
        raise NotImplementedError

    checks = checks_of(path)
    assert {check.name for check in checks} <= CHECKS.keys()
    assert len({check.label for check in checks}) == len(checks) > 0
    assert all(check.arguments and check.label[0] in "ABC" for check in checks)
    for each in checks:
        assert CHECKS[each.name](*[not_done] * len(each.arguments)).status == "not done"


def test_where_a_check_is_called():
    first, second = line_up(
        checks_of(EXERCISES / f"{NAME}.ipynb"), [(0, ONE_CELL), (3, "checks . softmax_by_hand(\nf)")]
    )
    assert (first.after, first.hint, second.after) == (3, 1, None)


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


@needs_fork
def test_a_station_that_does_not_start(tmp_path, monkeypatch):
    monkeypatch.setattr(station, "sandbox", lambda *_: ["sh", "-c", "echo no room >&2"])
    with Runner(isolated=True) as runner:
        outcome = runner.run([], [], LIMITS)
    assert outcome == Outcome(words="the process that runs notebooks does not answer: no room")


@pytest.mark.parametrize("command", ["handout", "grade", "check", "progress"])
def test_help(command):
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output
