"""The first cell for Colab and Kaggle, run in a process of its own with a made-up host, pip and git; Binder's files."""

import importlib.metadata
import os
import re
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from typer.testing import CliRunner

from lora_edu.course.cli import app
from lora_edu.course.notebooks.execute import ENVIRONMENT
from lora_edu.course.notebooks.stored import find_notebook
from lora_edu.course.publish import hosted
from lora_edu.files import ROOT

ADDRESS = "https://example.org/lora-edu.git"
BINDER = ROOT / ".binder"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
RANGES = {Requirement(text).name: text for text in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["course"]}
SERVER = {"ipykernel", "jupyterlab", "nbclient", "nbconvert", "nbformat"}
# Runs the cell as a notebook does, in a Python that does not see this repository's library.
RUNNER = """
import importlib.util, sys
from IPython.core.interactiveshell import InteractiveShell
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "lora_edu" else real(name, *rest)
{before}
result = InteractiveShell.instance(colors="NoColor").run_cell({cell!r})
print("path:", sys.path[0])
sys.exit(0 if result.success else 1)
"""
PIP = """
import os, sys
from pathlib import Path
with open(os.environ["COMMANDS"], "a") as file:
    print("pip", *sys.argv[1:], sep="\\n", file=file)
{then}
"""


class Runtime:
    """A hosted runtime: a home, a folder of commands that only write down how they were called, a Python's packages."""

    def __init__(self, folder: Path):
        self.home, self.bin, self.packages = folder / "home", folder / "bin", folder / "packages"
        for path in (self.home, self.bin, self.packages / "pip"):
            path.mkdir(parents=True)
        self.log = folder / "commands"
        self.course = self.home / "lora-edu"
        self.git(f'mkdir -p "$7" && cp {ROOT / "pyproject.toml"} "$7"')
        self.pip("")
        (self.packages / "pip" / "__init__.py").touch()

    def git(self, then: str) -> None:
        script = self.bin / "git"
        script.write_text(f'#!/bin/sh\n{{ echo git; printf "%s\\n" "$@"; }} >> "$COMMANDS"\n{then}\n')
        script.chmod(0o755)

    def pip(self, then: str) -> None:
        """What pip does when it has written down its arguments."""
        (self.packages / "pip" / "__main__.py").write_text(PIP.format(then=textwrap.dedent(then)))

    def provides(self, name: str, version: str) -> None:
        """A package of this version is installed, before any other of its name."""
        folder = self.packages / f"{name}-{version.split('+')[0]}.dist-info"
        folder.mkdir(exist_ok=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")

    def run(
        self, host: str | None, bases: tuple[str, ...] = (), before: str = "", address: str = ADDRESS
    ) -> tuple[int, list[str], list[str]]:
        """Run the cell; gives the exit code, the printed lines, and the commands' words."""
        variables = {name: value for name, value in os.environ.items() if not name.startswith(("COLAB", "KAGGLE"))}
        path = f"{self.bin}{os.pathsep}{variables['PATH']}"
        variables |= {"HOME": str(self.home), "USERPROFILE": str(self.home), "PATH": path, "COMMANDS": str(self.log)}
        variables |= {"PYTHONPATH": str(self.packages), "IPYTHONDIR": str(self.home / "ipython")}
        if host:
            variables[host] = "release"
        code = RUNNER.format(before=before, cell=hosted.first_cell(address, list(bases)))
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=variables, cwd=self.home, timeout=100
        )
        assert done.stderr == ""
        words = self.log.read_text().splitlines() if self.log.exists() else []
        return done.returncode, done.stdout.splitlines(), words


@pytest.fixture
def runtime(tmp_path):
    return Runtime(tmp_path)


def test_on_a_local_machine_the_cell_does_nothing(runtime):
    code, lines, words = runtime.run(None)
    assert (code, words) == (0, [])
    assert [line for line in lines if not line.startswith("path:")] == []
    assert not runtime.course.exists()


def test_where_the_course_is_installed_the_cell_does_nothing(runtime):
    found = "importlib.util.find_spec = lambda name, *rest: object() if name == 'lora_edu' else real(name, *rest)"
    code, lines, words = runtime.run("COLAB_RELEASE_TAG", before=found)
    assert (code, len(lines), words) == (0, 1, [])


@pytest.mark.parametrize("host", ["COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE"])
def test_it_clones_and_installs_by_ranges_and_keeps_torch(runtime, host):
    runtime.provides("torch", "2.12.1+cu130")
    code, lines, words = runtime.run(host)
    assert code == 0
    clone, pip = words[: words.index("pip")], words[words.index("pip") :]
    assert clone == ["git", "clone", "--quiet", "--depth", "1", "--", ADDRESS, str(runtime.course)]
    assert pip[:2] == ["pip", "install"]
    assert pip[-2:] == ["--editable", str(runtime.course)]
    wanted = [word for word in pip[2:-2] if not word.startswith("-")]
    kept = {name: text for name, text in RANGES.items() if name not in SERVER} | {"torch": "torch==2.12.1+cu130"}
    assert wanted == list(kept.values())
    assert "peft>=0.20" in wanted
    assert lines[0].startswith("$ git clone")
    assert lines[1].startswith("$ python -m pip install")
    assert lines[-2] == f"The course is ready in {runtime.course}, with torch 2.12.1+cu130."
    assert lines[-1] == f"path: {runtime.course}"


def test_a_second_run_does_not_clone_again(runtime):
    runtime.run("COLAB_RELEASE_TAG")
    runtime.log.unlink()
    code, _, words = runtime.run("COLAB_RELEASE_TAG")
    assert code == 0
    assert "git" not in words


def test_what_is_installed_satisfies_the_command_without_any_download(runtime):
    """Real pip, told to use no index: it would change nothing, torch least of all."""
    words = runtime.run("COLAB_RELEASE_TAG")[2]
    wanted = words[words.index("pip") + 2 : -2]
    assert f"torch=={importlib.metadata.version('torch')}" in wanted
    dry = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", *(w for w in wanted if w != "--quiet")]
    done = subprocess.run(dry, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Would install" not in done.stdout


def test_a_torch_outside_the_range_is_replaced_and_said_so(runtime):
    runtime.provides("torch", "2.5.0+cu124")
    runtime.provides("torchvision", "0.20.0+cu124")
    code, lines, words = runtime.run("COLAB_RELEASE_TAG")
    assert code == 0
    assert (
        f"torch 2.5.0+cu124 is replaced, because the course needs {RANGES['torch']}: this takes some minutes" in lines
    )
    assert RANGES["torch"] in words
    assert "torchvision" in words  # the old one was made for the old torch
    assert "torchaudio" not in words


def test_something_replaced_after_it_was_imported_asks_for_a_restart(runtime):
    runtime.provides("numpy", "1.26.0")
    runtime.pip("""
        found = Path(__file__).parents[1] / "numpy-1.26.0.dist-info" / "METADATA"
        found.write_text(found.read_text().replace("1.26.0", "2.1.0"))
    """)
    code, lines, _ = runtime.run("COLAB_RELEASE_TAG", before="sys.modules['numpy'] = sys")
    assert code == 1
    assert "Installed. Restart the runtime now: it still holds the old numpy." in lines
    assert not any("Traceback" in line for line in lines)


NO_NETWORK = "fatal: unable to access 'https://example.org/lora-edu.git/': Could not resolve host: example.org"


@pytest.mark.parametrize(
    ("host", "advice"),
    [
        ("KAGGLE_KERNEL_RUN_TYPE", "Switch on Internet in the notebook's settings"),
        ("COLAB_RELEASE_TAG", "Check that the runtime has internet"),
    ],
)
def test_without_network_it_says_so_in_one_line(runtime, host, advice):
    runtime.git(f'echo "{NO_NETWORK}" >&2; exit 128')
    code, lines, words = runtime.run(host)
    assert code == 1
    assert "pip" not in words
    (said,) = [line for line in lines if not line.startswith(("$", "path:"))]
    assert said.startswith(f"That did not work: {NO_NETWORK}. {advice}")
    assert said.endswith("then run this cell again.")


def test_kaggle_is_told_apart_though_it_may_carry_colabs_name(runtime):
    runtime.git("exit 128")
    before = "import os; os.environ['COLAB_RELEASE_TAG'] = 'release'"
    assert "Switch on Internet" in "\n".join(runtime.run("KAGGLE_KERNEL_RUN_TYPE", before=before)[1])


def test_a_failing_pip_says_its_last_line_and_can_be_tried_again(runtime):
    runtime.pip("""
        print("WARNING: Retrying")
        sys.exit("ERROR: No matching distribution found for peft>=0.20")
    """)
    code, lines, _ = runtime.run("COLAB_RELEASE_TAG")
    assert code == 1
    (said,) = [line for line in lines if not line.startswith(("$", "path:"))]
    assert said.startswith("That did not work: ERROR: No matching distribution found for peft>=0.20. Check")
    assert lines[-1] != f"path: {runtime.course}"
    runtime.pip("")
    assert runtime.run("COLAB_RELEASE_TAG")[0] == 0


def test_no_git_is_said_in_one_line(runtime):
    (runtime.bin / "git").unlink()
    code, lines, _ = runtime.run("COLAB_RELEASE_TAG", before=f"import os; os.environ['PATH'] = {str(runtime.bin)!r}")
    assert code == 1
    assert any(line.startswith("git is not installed in this runtime.") for line in lines)


def test_an_old_python_is_named(runtime):
    old = (
        "importlib.util.find_spec = lambda name, *rest: None if name in ('lora_edu', 'tomllib') else real(name, *rest)"
    )
    code, lines, words = runtime.run("COLAB_RELEASE_TAG", before=old)
    assert (code, words) == (1, [])
    assert any(line.startswith("The course needs Python 3.11 or newer") for line in lines)
    assert PROJECT["requires-python"] == ">=3.11"


def test_bases_of_the_lesson_are_fetched(runtime):
    package = runtime.packages / "lora_edu" / "course"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package.parent / "__init__.py").touch()
    (package / "cli.py").write_text("import sys\nprint('downloading')\nprint(sys.argv[3] + ': ready')\n")
    code, lines, _ = runtime.run("COLAB_RELEASE_TAG", bases=("minilm",))
    assert code == 0
    assert "$ python -m lora_edu.course.cli bases fetch minilm" in lines
    assert "minilm: ready" in lines


def test_the_clone_is_a_real_one(runtime, tmp_path):
    """Real git, from a repository on this disk."""
    origin = tmp_path / "origin"
    origin.mkdir()
    (origin / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    for arguments in (["init", "--quiet"], ["add", "."], [*who, "commit", "--quiet", "-m", "start"]):
        subprocess.run(["git", *arguments], cwd=origin, check=True)
    (runtime.bin / "git").unlink()
    code, lines, _ = runtime.run("COLAB_RELEASE_TAG", address=origin.as_uri())
    assert (code, lines[-1]) == (0, f"path: {runtime.course}")
    assert (runtime.course / "pyproject.toml").read_bytes() == (origin / "pyproject.toml").read_bytes()


# The copy that carries the cell.
def call(*arguments):
    return CliRunner().invoke(app, list(arguments))


def test_export_puts_the_cell_first_and_clears_the_rest(tmp_path):
    output = tmp_path / "lesson.ipynb"
    result = call("lessons", "export", "03", "--to", "hosted", "--repository", ADDRESS, "--output", str(output))
    assert result.exit_code == 0, result.output
    copy, lesson = nbformat.read(output, 4), nbformat.read(find_notebook("03"), 4)
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
