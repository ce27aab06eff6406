"""The first cell for Colab and Kaggle, run by IPython with what it would start noted down; Binder's files."""

import os
import re
import subprocess
import tomllib

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell
from nbformat.v4 import new_code_cell, new_notebook
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from typer.testing import CliRunner

from lora_edu.course.cli import app
from lora_edu.course.notebooks.stored import find_notebook
from lora_edu.course.notebooks.your_turn import learners_copy
from lora_edu.course.publish import hosted
from lora_edu.files import ROOT
from lora_edu.quick import ENVIRONMENT

ADDRESS = "https://example.org/lora-edu.git"
BINDER = ROOT / ".binder"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
RANGES = {Requirement(text).name: text for text in PROJECT["dependencies"]}
EXTRAS = PROJECT["optional-dependencies"]


@pytest.fixture
def run_cell(monkeypatch):
    """Runs a first cell as a notebook does; returns the shell commands and magics that it would have called."""
    called = []
    shell = InteractiveShell(colors="nocolor")
    monkeypatch.setattr(shell, "system", lambda command: called.append(shell.var_expand(command, depth=1)))
    monkeypatch.setattr(shell, "run_line_magic", lambda name, line, **_: called.append(f"%{name} {line}"))

    def run(cell, installed):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if installed else None)
        monkeypatch.setattr("sys.path", [])
        exec(compile(shell.transform_cell(cell), "cell", "exec"), {"get_ipython": lambda: shell})
        return called

    return run


def test_where_the_course_is_installed_the_cell_does_nothing(run_cell):
    assert run_cell(hosted.first_cell(ADDRESS, ["minilm"]), installed=True) == []


def test_it_clones_installs_and_fetches_what_the_lesson_loads(run_cell):
    clone, install, fetch = run_cell(hosted.first_cell(ADDRESS, ["smollm2-135m", "minilm"]), installed=False)
    assert clone == f"git clone --quiet --depth 1 -- {ADDRESS} lora-edu"
    assert install == '%pip install --quiet --editable "./lora-edu[lessons]"'
    assert fetch.endswith(" -m lora_edu.course.cli bases fetch smollm2-135m minilm")


def test_without_further_bases_nothing_is_fetched(run_cell):
    assert len(run_cell(hosted.first_cell(ADDRESS, []), installed=False)) == 2


def test_what_is_installed_there_leaves_the_notebook_server_to_the_host():
    names = {Requirement(text).name for text in EXTRAS["lessons"]}
    assert "peft" in names
    assert not names & {"ipykernel", "jupyterlab", "nbclient", "nbconvert", "nbformat"}
    assert "lora-edu[lessons]" in EXTRAS["course"]


# The copy that carries the cell.
def call(*arguments):
    return CliRunner().invoke(app, list(arguments))


def test_export_puts_the_cell_first_and_clears_the_rest(tmp_path):
    output = tmp_path / "lesson.ipynb"
    result = call("lessons", "export", "03", "--to", "hosted", "--repository", ADDRESS, "--output", str(output))
    assert result.exit_code == 0, result.output
    copy, lesson = nbformat.read(output, 4), learners_copy(nbformat.read(find_notebook("03"), 4))
    nbformat.validate(copy)
    first, *rest = copy.cells
    assert first.source == hosted.first_cell(ADDRESS, [])
    assert [cell.source for cell in rest] == [cell.source for cell in lesson.cells]
    assert not any(cell.get("outputs") for cell in copy.cells)
    again = call("lessons", "export", str(output), "--to", "hosted", "--repository", ADDRESS)
    assert again.exit_code == 1
    assert "already" in again.stderr


def test_the_cell_names_no_version():
    assert not re.search(r"[<>=~]=\s*\d", hosted.first_cell(ADDRESS, []).replace("3.11", ""))


@pytest.mark.parametrize(
    ("code", "bases"),
    [
        ('load_base("tiny")', []),
        ('model, tokenizer = load_base("smollm2-135m")', ["smollm2-135m"]),
        ("require_base('minilm'); load_base( 'smollm2-135m', head=None)", ["smollm2-135m", "minilm"]),
        ('lora_parameters("smollm2-135m", 8, None)  # its config only', []),
    ],
)
def test_bases_that_a_lesson_loads(code, bases):
    assert hosted.bases_of(new_notebook(cells=[new_code_cell(code)])) == bases


def test_the_address_is_written_once(tmp_path):
    pyproject = tmp_path / "pyproject.toml"
    pyproject.write_text(f'[project]\nname = "a"\n[project.urls]\nrepository = "{ADDRESS}"\n')
    assert hosted.repository_address(None, pyproject) == ADDRESS
    assert hosted.repository_address("https://example.org/fork", pyproject) == "https://example.org/fork"


@pytest.mark.errors
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--to", "hosted", "--repository", "--upload-pack=x"], "expected an address that starts with https://"),
        (["--to", "hosted", "--repository", "git@example.org:a/b"], "expected an address that starts with https://"),
        (["--to", "pdf"], "expected html, slides or hosted"),
        (["--to", "slides", "--repository", ADDRESS], "--repository belongs to --to hosted"),
    ],
)
def test_export_errors_are_one_line(arguments, words):
    result = call("lessons", "export", "03", *arguments)
    assert result.exit_code == 1
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.errors
def test_without_an_address_it_asks_for_one(tmp_path):
    pyproject = tmp_path / "pyproject.toml"
    pyproject.write_text('[project]\nname = "a"\n')
    with pytest.raises(ValueError, match=r"pass --repository .* under \[project.urls\]"):
        hosted.repository_address(None, pyproject)


# Binder.
def dependencies():
    """The entries of environment.yml's list; the file is short enough to be read without a YAML library."""
    lines = (BINDER / "environment.yml").read_text(encoding="utf-8").split("dependencies:\n")[1].splitlines()
    return [line.removeprefix("  - ") for line in lines]


def test_binder_has_python_and_a_torch_within_the_ranges():
    python, pip, torch = dependencies()
    assert pip == "pip"
    assert SpecifierSet(PROJECT["requires-python"]).contains(python.removeprefix("python="))
    assert python == "python=3.11"  # what the stored outputs were made with
    name, specifier = re.fullmatch(r"([\w-]+)(.*)", torch).groups()
    assert name == "pytorch-cpu"
    assert specifier == str(Requirement(RANGES["torch"]).specifier)


@pytest.mark.parametrize("name", ["postBuild", "start"])
def test_binders_scripts_are_executable_and_parse(name):
    script = BINDER / name
    assert os.access(script, os.X_OK)
    mode = subprocess.run(["git", "ls-files", "--stage", str(script)], capture_output=True, text=True, cwd=ROOT).stdout
    assert mode == "" or mode.startswith("100755")
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_post_build_installs_the_course_from_the_checkout(tmp_path):
    log = tmp_path / "commands"
    for name in ("python", "lora-edu"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {log}\n')
        (tmp_path / name).chmod(0o755)
    variables = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run([str(BINDER / "postBuild")], check=True, env=variables, cwd=tmp_path)
    install, check, prepare = log.read_text().splitlines()
    assert install.startswith("python -m pip install ")
    assert install.endswith(" --editable .[course]")
    assert "torch.version.cuda" in check
    assert prepare == "lora-edu lab --prepare"


def test_post_build_stops_at_the_first_failure(tmp_path):
    (tmp_path / "python").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "python").chmod(0o755)
    variables = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    assert subprocess.run([str(BINDER / "postBuild")], env=variables, cwd=tmp_path).returncode == 3


def test_start_sets_the_lessons_environment_and_hands_over():
    done = subprocess.run(
        [str(BINDER / "start"), "env"], capture_output=True, text=True, check=True, env={"PATH": os.environ["PATH"]}
    )
    found = dict(line.split("=", 1) for line in done.stdout.splitlines())
    shared = ("OMP_NUM_THREADS", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM")
    assert {name: found[name] for name in shared} == {name: ENVIRONMENT[name] for name in shared}


def test_binders_files_name_no_host():
    text = "".join(path.read_text(encoding="utf-8") for path in BINDER.iterdir())
    assert not re.search(r"\b[\w-]+\.(org|com|io|net)\b", text)
