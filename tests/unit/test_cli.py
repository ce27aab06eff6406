"""The command line: help everywhere, one line instead of a traceback, and only --update writes lessons/."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from nbformat.v4 import new_code_cell, new_notebook
from typer.testing import CliRunner

from lora_edu.course import doctor, testing
from lora_edu.course.cli import app
from lora_edu.course.notebooks import stored as notebooks
from lora_edu.course.notebooks import work
from lora_edu.course.notebooks.stored import normalise, read, write

COMMANDS = [
    [],
    ["doctor"],
    ["bases", "list"],
    ["bases", "fetch"],
    ["count"],
    ["check"],
    ["course"],
    ["book"],
    ["test"],
    ["lab"],
    ["memory"],
    ["full-run"],
    ["handout"],
    ["grade"],
    ["progress"],
    ["inspect"],
    ["lessons", "list"],
    ["lessons", "run"],
    ["lessons", "mine"],
    ["lessons", "exercises"],
    ["lessons", "claims"],
    ["lessons", "reset"],
    ["lessons", "export"],
]


def call(*arguments):
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help(command):
    result = call(*command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["lessons", "run", "98"], "no notebook '98' in lessons/"),
        (["lessons", "export", "98"], "no notebook '98'"),
        (["lessons", "reset", "98"], "no notebook '98'"),
        (["lessons", "mine", "nowhere.jsonl"], "nowhere.jsonl: No such file"),
        (["lessons", "mine", "README.md"], "README.md: line 1 is no JSON"),
        (["check", "98"], "no notebook '98' in exercises/"),
        (["test", "nothing"], "unknown part 'nothing'"),
        (["bases", "fetch", "nothing"], "nothing"),
        (
            ["full-run", "nothing"],
            "unknown recording 'nothing'; there are: smollm2_finetuning, smollm2_precision, smollm2_choices, "
            "tiny_choices, tiny_schedules, tiny_starts, referee, tiny_pretraining, memory_7b, memory_cases, nf4_speed, "
            "speed_7b, loss_8b, scaling",
        ),
        (["full-run", "tiny_choices", "--shapes", "7b"], "tiny_choices takes no --shapes: a sweep takes --processes"),
        (["full-run", "tiny_choices", "--base", "gpt2"], "GPT2LMHeadModel without q_proj, k_proj"),
        (["full-run", "tiny_choices", "--method", "full"], "tiny_choices takes no --method: a sweep takes --processes"),
        (["full-run", "memory_7b", "--method", "full"], "memory_7b takes no --method: it takes --out"),
        (["full-run", "referee", "--method", "magic"], "unknown method 'magic'; entered are "),
        (["full-run", "referee", "--task", "sums"], "unknown task 'sums'; there are: smollm2-bierce, minilm-topics, "),
        (["full-run", "referee", "--base", "tiny"], "referee takes no --base: it takes --method, --task, --processes"),
        (["full-run", "referee", "--shapes", "7b"], "referee takes no --shapes: it takes --method, --task, --proc"),
        (["full-run", "memory_7b", "--processes", "2"], "memory_7b takes no --processes: it takes --out, --minutes"),
        (["full-run", "speed_7b", "--base", "tiny"], "speed_7b takes no --base: it takes --out and the options that"),
        (["full-run", "speed_7b", "--minutes", "2"], "speed_7b takes no --minutes: it takes --out and the options"),
        (["full-run", "memory_7b", "--minutes", "0"], "minutes=0.0"),
        (["full-run", "memory_7b", "--shapes", "8b"], "memory_7b ended with code 2: see what benchmarks/memory_7b.py"),
        (["full-run", "tiny_choices", "--minutes", "0"], "minutes=0.0"),
        (["full-run", "tiny_choices", "--out", "nowhere/file.json"], "no folder nowhere"),
        (["count", "llama-7b", "--r", "0"], "0"),
        (["count", "llama-7b", "--targets", "q_prok"], "q_prok"),
        (["count", "llama-7b", "--targets", "(unclosed"], "target_modules='(unclosed' is not a regular expression"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_are_one_line(arguments, words):
    result = call(*arguments)
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_targets_may_have_spaces_between_them():
    plain = call("count", "llama-7b", "--targets", "q_proj,v_proj").output
    assert call("count", "llama-7b", "--targets", "q_proj, v_proj").output == plain


def test_a_terminal_without_the_marks_gets_question_marks():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-m", "lora_edu.course.cli", "count", "llama-7b"],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0
    assert "Traceback" not in done.stderr


def test_it_also_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "lora_edu.course.cli", "--help"], capture_output=True, text=True)
    assert done.returncode == 0


def test_count():
    assert "4,194,304" in call("count", "llama-7b", "--r", "8", "--targets", "q_proj,v_proj").output


def test_full_run_lists_what_there_is_and_what_it_costs():
    result = call("full-run")
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == 6 + 1 + 7 + 2
    recorded = {"tiny_pretraining": "9 settings", "memory_7b": "144 lines", "speed_7b": "7 lines", "loss_8b": "7 ways"}
    for name, found in (recorded | {"memory_cases": "16 lines", "scaling": "18 lines"}).items():
        (line,) = [line for line in result.stdout.splitlines() if line.startswith(name)]
        assert f"; {found} recorded; needs " in line
    for name, runs in {
        "smollm2_finetuning": 55,
        "smollm2_precision": 60,
        "smollm2_choices": 456,
        "tiny_choices": 310,
        "tiny_schedules": 35,
        "tiny_starts": 600,
    }.items():
        (line,) = [line for line in result.stdout.splitlines() if line.startswith(name)]
        assert f"{runs} runs" in line
        assert "recorded" in line
        assert line.endswith(" h on two cores")


@pytest.mark.parametrize(("complete", "words"), [(True, "complete"), (False, "the same command goes on")])
def test_full_run_hands_its_options_on(monkeypatch, tmp_path, complete, words):
    asked = []
    monkeypatch.setattr("lora_edu.lab.recording.full_runs.full_run", lambda *given: asked.append(given) or complete)
    out = tmp_path / "out.json"
    options = ("--processes", "3", "--minutes", "1.5", "--out", str(out), "--base", "a/b")
    result = call("full-run", "tiny_choices", *options)
    assert result.exit_code == 0
    assert asked == [("tiny_choices", out, 3, 1.5, "a/b")]
    assert words in result.stdout
    assert call("full-run", "tiny_choices", "--processes", "0").exit_code == 2


def test_full_run_hands_the_referee_its_methods(monkeypatch):
    asked = []
    monkeypatch.setattr("lora_edu.lab.recording.referee.referee", lambda *given: asked.append(given) or True)
    options = ("--method", "LoRA", "--method", "full", "--task", "tiny-jargon", "--minutes", "7")
    result = call("full-run", "referee", *options)
    assert result.exit_code == 0
    assert asked == [(["LoRA", "full"], None, None, 7.0, ["tiny-jargon"])]
    assert "complete" in result.stdout
    (line,) = [line for line in call("full-run").stdout.splitlines() if line.startswith("referee")]
    assert "settings of methods, tuned and compared" in line


@pytest.fixture
def lessons(tmp_path, monkeypatch):
    """A course of one lesson, in place of the real one."""
    folder = tmp_path / "lessons"
    write(normalise(new_notebook(cells=[new_code_cell("1 + 1")])), folder / "01_a.ipynb")
    write(normalise(new_notebook(cells=[new_code_cell("2 + 2")])), folder / "solutions" / "01_a.ipynb")
    for name, path in {"LESSONS": folder, "SOLUTIONS": folder / "solutions", "BUILD": tmp_path / "build"}.items():
        monkeypatch.setattr(notebooks, name, path)
    monkeypatch.setattr("lora_edu.course.notebooks.runs.RAN", tmp_path / "build" / "lessons")
    monkeypatch.setattr("lora_edu.course.notebooks.exercises.EXERCISES", folder / "exercises")
    monkeypatch.setattr(notebooks.find_notebook, "__defaults__", (folder,))
    monkeypatch.setattr(notebooks.list_notebooks, "__defaults__", (folder,))
    monkeypatch.setattr("lora_edu.course.notebooks.exercises.generate.__defaults__", (folder / "exercises",))
    return folder


def test_only_update_writes_lessons(lessons, monkeypatch, tmp_path):
    page = tmp_path / "book" / "claims.md"
    monkeypatch.setattr("lora_edu.course.publish.claims.refresh", lambda: [page])
    before = {path: path.read_bytes() for path in lessons.rglob("*.ipynb")}
    assert call("lessons", "run", "01").exit_code == 0
    assert {path: path.read_bytes() for path in lessons.rglob("*.ipynb")} == before
    updated = call("lessons", "run", "01", "--update")
    assert updated.exit_code == 0
    assert "wrote book/claims.md" in updated.output
    assert read(lessons / "01_a.ipynb").cells[0].outputs[0].data["text/plain"] == "2"
    assert (lessons / "exercises" / "01_a.ipynb").exists()
    assert (lessons / "solutions" / "01_a.ipynb").read_bytes() == before[lessons / "solutions" / "01_a.ipynb"]


def test_a_failing_part_is_said_once(monkeypatch):
    monkeypatch.setattr(testing, "run_tests", lambda parts: [testing.Result("pytest", False, 1.0)])
    result = call("test")
    assert result.exit_code == 1
    assert result.stderr.strip() == "lora-edu: pytest failed"


def test_a_failing_lesson_fails_the_command(lessons):
    write(normalise(new_notebook(cells=[new_code_cell("1 / 0")])), lessons / "01_a.ipynb")
    result = call("lessons", "run", "01")
    assert result.exit_code == 1
    assert "01_a, cell 0 (1 / 0): ZeroDivisionError" in result.output


@pytest.mark.parametrize(("ci", "code"), [("", 0), ("true", 1)])
def test_a_base_that_cannot_be_fetched(monkeypatch, ci, code):
    def unreachable(names, say):
        raise ConnectionError("pip could not\ndownload it")

    monkeypatch.setattr("lora_edu.lab.bases.fetch", unreachable)
    monkeypatch.setenv("CI", ci)
    result = call("bases", "fetch", "minilm")
    assert result.exit_code == code
    assert "minilm: could not be fetched (pip could not download it)" in result.output


def test_check_prefers_the_learners_copy(tmp_path, monkeypatch):
    write(normalise(new_notebook(cells=[])), tmp_path / "work" / "exercises" / "01_a.ipynb")
    monkeypatch.setattr(work, "EXERCISES", tmp_path / "lessons" / "exercises")
    write(normalise(new_notebook(cells=[])), tmp_path / "lessons" / "exercises" / "01_a.ipynb")
    write(normalise(new_notebook(cells=[])), tmp_path / "lessons" / "exercises" / "02_b.ipynb")
    write(normalise(new_notebook(cells=[])), tmp_path / "work" / "exercises" / "01_a.before-reset.ipynb")
    assert work.exercise_to_check("1", tmp_path / "work") == tmp_path / "work" / "exercises" / "01_a.ipynb"
    assert work.exercise_to_check("01_a.before-reset", tmp_path / "work").stem == "01_a.before-reset"
    monkeypatch.setattr(notebooks.find_notebook, "__defaults__", (tmp_path / "lessons",))
    assert work.exercise_to_check("2", tmp_path / "work").is_relative_to(tmp_path / "lessons")


def test_doctor_reads_the_pinned_versions(tmp_path):
    (tmp_path / "c.txt").write_text("# note\ntorch==2.13.0\nhuggingface_hub==2.4.0\n")
    assert doctor.pinned(tmp_path / "c.txt") == {"torch": "2.13.0", "huggingface-hub": "2.4.0"}
    assert doctor.pinned(tmp_path / "none.txt") == {}


def test_doctor_goes_on_without_a_data_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_EDU_DATA", str(tmp_path / "none"))
    findings = {finding.what: finding for finding in doctor.examine(probe_seconds=0.05)}
    assert findings["data"].state == "bad"
    assert "LORA_EDU_DATA" in findings["data"].words
    assert {"speed", "torch", "peft", "trl"} <= findings.keys()


def test_doctor_says_what_differs(monkeypatch):
    monkeypatch.setattr(doctor, "pinned", lambda: {"torch": "0.0.1"})
    monkeypatch.setattr(doctor, "LIBRARIES", ["torch", "no-such-package"])
    torch, missing = doctor._versions()[1:]
    assert torch.state == "note"
    assert "0.0.1" in torch.words
    assert (missing.state, missing.what) == ("bad", "no-such-package")


def test_the_probe_measures_a_time():
    assert 0 < doctor.probe(0.05) < 60_000


def test_the_parts_are_one_pytest_with_strict_comparison_where_outputs_repeat(monkeypatch):
    monkeypatch.setattr(testing, "same_platform", lambda: True)
    unit, parity = ["tests/unit", "tests/methods"], ["tests/parity"]
    assert testing.pytest_command(["unit", "parity"]) == ["pytest", "--durations=10", *unit, *parity]
    assert testing.pytest_command(["lessons"])[2:4] == ["--nbval", "lessons/00_start_here.ipynb"]
    monkeypatch.setattr(testing, "same_platform", lambda: False)
    assert testing.pytest_command(["solutions"])[2] == "--nbval-lax"


def test_help_does_not_wait_for_torch():
    code = "import sys; from lora_edu.course.cli import app; app(['--help'], standalone_mode=False); "
    code += "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'matplotlib', 'nbclient')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def started(monkeypatch, tmp_path):
    """What ``lora-edu lab`` starts, without starting it."""
    commands = []
    monkeypatch.setattr("lora_edu.course.notebooks.work.WORK", tmp_path / "work")
    monkeypatch.setattr("lora_edu.course.notebooks.work.LAB", tmp_path / "lab")
    monkeypatch.setattr("lora_edu.course.notebooks.work.refresh", lambda: ([], []))
    monkeypatch.setattr(
        subprocess, "run", lambda command, env: commands.append([*command, env]) or SimpleNamespace(returncode=0)
    )
    return commands


def test_lab_passes_on_what_follows(started):
    options = ["--no-browser", "--ip", "0.0.0.0", "--port=9000", "--allow-root"]
    assert call("lab", *options).exit_code == 0
    assert started[0][2:-1] == ["jupyterlab", started[0][3], *options]


def test_lab_leaves_out_the_menus_for_teachers(started, tmp_path, monkeypatch):
    monkeypatch.setenv("JUPYTER_CONFIG_PATH", "mine")
    assert call("lab", "--allow-root").exit_code == 0
    assert started[0][-1]["JUPYTER_CONFIG_PATH"] == os.pathsep.join([str(tmp_path / "lab"), "mine"])
    page = json.loads((tmp_path / "lab" / "labconfig" / "page_config.json").read_text())
    assert page["disabledExtensions"]["@jupyter/nbgrader"] is True


def test_lab_as_root_says_what_to_add(started, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0, raising=False)
    result = call("lab", "--no-browser")
    assert result.exit_code == 1
    assert "add --allow-root" in result.stderr
    assert started == []
    monkeypatch.setattr(os, "geteuid", lambda: 1000, raising=False)
    assert call("lab", "--no-browser").exit_code == 0
