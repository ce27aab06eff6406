"""``lora-edu test``: lint, then every test and every notebook in one pytest, then one summary."""

import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

from lora_edu.course.console import console
from lora_edu.course.notebooks.execute import TIMEOUT, environment, same_platform
from lora_edu.course.notebooks.stored import BUILD, LESSONS, SOLUTIONS, list_notebooks
from lora_edu.files import ROOT

# Part → what it stands for in pytest's command line. "lint" runs before, by itself.
PARTS = {
    "unit": ["tests/unit"],
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
    """One row of the summary."""

    part: str
    good: bool
    words: str
    seconds: float


def run_tests(parts: list[str]) -> list[Result]:
    """Run the named parts (all if none is named) and return a result for each.

    Raises:
        ValueError: for an unknown part.
    """
    unknown = [part for part in parts if part not in ("lint", *PARTS)]
    if unknown:
        raise ValueError(f"unknown part {unknown[0]!r}: expected lint, {', '.join(PARTS)}")
    chosen = parts or ["lint", *PARTS]
    results = [_lint(name, command) for name, command in LINT.items()] if "lint" in chosen else []
    tests = [part for part in PARTS if part in chosen]
    return results + _pytest(tests) if tests else results


def guarded_environment() -> dict[str, str]:
    """The environment of the tests: that of executed notebooks, with the guard that refuses sockets beyond loopback."""
    variables = environment()
    variables["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT / "tests" / "offline"), *filter(None, [variables.get("PYTHONPATH")])]
    )
    variables.pop("MPLBACKEND", None)
    return variables


def _lint(name: str, command: list[str]) -> Result:
    began = time.monotonic()
    console.print(f"== {name}")
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT)
    return Result(
        name, done.returncode == 0, "clean" if done.returncode == 0 else "see above", time.monotonic() - began
    )


def _pytest(tests: list[str]) -> list[Result]:
    report = BUILD / "test-report.xml"
    report.parent.mkdir(exist_ok=True)
    report.unlink(missing_ok=True)
    paths = [path for part in tests for path in PARTS[part] if (ROOT / path).exists()]
    strict = "--nbval" if same_platform() else "--nbval-lax"
    command = [sys.executable, "-m", "pytest", f"--junitxml={report}", *paths]
    if any(path.endswith(".ipynb") for path in paths):
        sanitize = str(ROOT / "tests" / "nbval_sanitize.cfg")
        command += [strict, "--nbval-current-env", "--nbval-sanitize-with", sanitize, f"--nbval-cell-timeout={TIMEOUT}"]
    console.print(f"== pytest: {', '.join(tests)}")
    done = subprocess.run(command, cwd=ROOT, env=guarded_environment())
    if not report.exists():
        return [Result("pytest", False, f"ended with exit code {done.returncode}", 0.0)]
    results = summarise(report, tests)
    if done.returncode not in (0, 1) or (done.returncode == 1 and all(result.good for result in results)):
        results.append(Result("pytest", False, f"ended with exit code {done.returncode}", 0.0))
    return results


def summarise(report: Path, tests: list[str]) -> list[Result]:
    """Pytest's report in one row a part: how many passed, failed and were skipped, and how long they took."""
    counts = {part: {"passed": 0, "failed": 0, "skipped": 0} for part in tests}
    seconds = dict.fromkeys(tests, 0.0)
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        part = _part_of(case.get("classname", "") or case.get("name", ""), tests)
        bad = case.find("failure") is not None or case.find("error") is not None
        outcome = "failed" if bad else "skipped" if case.find("skipped") is not None else "passed"
        counts[part][outcome] += 1
        seconds[part] += float(case.get("time", 0))
    rows = []
    for part in tests:
        words = ", ".join(f"{n} {outcome}" for outcome, n in counts[part].items() if n) or "nothing to test"
        rows.append(Result(part, counts[part]["failed"] == 0, words, seconds[part]))
    return rows


def _part_of(classname: str, tests: list[str]) -> str:
    place = classname.replace(".", "/").replace("/ipynb", ".ipynb")
    for part in tests:
        if any(place.startswith(path.removesuffix(".ipynb")) for path in PARTS[part]):
            return part
    return tests[0]


def print_summary(results: list[Result]) -> None:
    """One table at the end of the run."""
    console.print()
    for result in results:
        mark = "[green]✓[/]" if result.good else "[red]✗[/]"
        console.print(f"{mark} {result.part:12} {result.seconds:7.1f} s  {result.words}")
