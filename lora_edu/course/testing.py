"""``lora-edu test``: lint, then every test and every notebook in one pytest."""

import subprocess
import sys
import time
from dataclasses import dataclass

from lora_edu.course.console import console
from lora_edu.course.notebooks.execute import same_platform
from lora_edu.course.notebooks.stored import LESSONS, SOLUTIONS, list_notebooks
from lora_edu.files import ROOT

# Part → what it stands for in pytest's command line. "lint" runs before, by itself.
PARTS = {
    "unit": ["tests/unit", "tests/methods"],
    "parity": ["tests/parity"],
    "graders": ["tests/graders"],
    "files": ["tests/notebooks"],
    "lessons": [path.relative_to(ROOT).as_posix() for path in list_notebooks(LESSONS)],
    "solutions": [path.relative_to(ROOT).as_posix() for path in list_notebooks(SOLUTIONS)],
    "book": ["tests/book"],
}
LINT = {
    "ruff check": ["ruff", "check", "."],
    "ruff format": ["ruff", "format", "--check", "."],
    "mypy": ["mypy"],
}


@dataclass
class Result:
    """One line of the summary: a tool, whether it is content, and how long it took."""

    tool: str
    good: bool
    seconds: float


def run_tests(parts: list[str]) -> list[Result]:
    """Run the named parts (all if none is named) and return a result for each tool; pytest's own words stand above.

    Raises:
        ValueError: for an unknown part.
    """
    unknown = [part for part in parts if part not in ("lint", *PARTS)]
    if unknown:
        raise ValueError(f"unknown part {unknown[0]!r}: expected lint, {', '.join(PARTS)}")
    chosen = parts or ["lint", *PARTS]
    tools = dict(LINT) if "lint" in chosen else {}
    if tests := [part for part in PARTS if part in chosen]:
        tools["pytest"] = pytest_command(tests)
    return [_run(name, command) for name, command in tools.items()]


def pytest_command(tests: list[str]) -> list[str]:
    """The arguments of ``python -m`` that run these parts; outputs are compared strictly where they can repeat."""
    paths = [path for part in tests for path in PARTS[part] if (ROOT / path).exists()]
    notebooks = any(path.endswith(".ipynb") for path in paths)
    strict = ["--nbval" if same_platform() else "--nbval-lax"] if notebooks else []
    return ["pytest", "--durations=10", *strict, *paths]


def _run(name: str, command: list[str]) -> Result:
    began = time.monotonic()
    console.print(f"== {name}")
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT)
    return Result(name, done.returncode == 0, time.monotonic() - began)


def print_summary(results: list[Result]) -> None:
    """One table at the end of the run."""
    console.print()
    for result in results:
        mark = "[green]✓[/]" if result.good else "[red]✗[/]"
        console.print(f"{mark} {result.tool:12} {result.seconds:7.1f} s  {'' if result.good else 'see above'}")
