"""``lora-edu doctor``: what is installed, what was found, and how fast this machine is against the printed times."""

import importlib.metadata
import platform
import re
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from lora_edu.course.notebooks.runs import recorded_times
from lora_edu.files import ROOT

LIBRARIES = [
    "torch", "transformers", "peft", "trl", "accelerate", "safetensors", "numpy", "matplotlib", "jupyterlab", "nbval",
]  # fmt: skip
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@dataclass(frozen=True)
class Finding:
    """One line of the doctor: good, to be known ("note"), or in the way ("bad")."""

    state: str
    what: str
    words: str


def examine(probe_seconds: float = 2.5) -> list[Finding]:
    """Look at everything; takes about ``probe_seconds`` plus the time to import PyTorch."""
    return [*_versions(), *_bases(), *_data(), _gpu(), _browser(), _speed(probe_seconds)]


def pinned(constraints: Path = ROOT / "constraints.txt") -> dict[str, str]:
    """Package → version, as ``constraints.txt`` has them; empty if the file is not there."""
    if not constraints.exists():
        return {}
    lines = re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;#]+)", constraints.read_text(encoding="utf-8"), re.M)
    return {name.lower().replace("_", "-"): version for name, version in lines}


def browser() -> str | None:
    """The path of a Chromium that the book's test can use, or None."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


def _versions() -> list[Finding]:
    good = sys.version_info >= (3, 11)
    findings = [
        Finding("good" if good else "bad", "Python", platform.python_version() + ("" if good else ": 3.11 needed"))
    ]
    wanted = pinned()
    for name in LIBRARIES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            findings.append(
                Finding("bad", name, "not installed: run make setup, or pip install -e '.[course,book,dev]'")
            )
            continue
        pin = wanted.get(name)
        same = pin is None or version.split("+")[0] == pin
        note = "" if same else f" (stored outputs were made with {pin}: last decimals may differ)"
        findings.append(Finding("good" if same else "note", name, version + note))
    return findings


def _bases() -> list[Finding]:
    from lora_edu.lab.bases import list_bases

    try:
        bases = list_bases()
    except FileNotFoundError:  # no data folder: the line about the data says so
        return []
    findings = []
    for base in bases:
        missing = (
            "missing from data/" if base.name == "tiny" else "not here: run lora-edu bases fetch (00–05 need none)"
        )
        words = f"{base.size_bytes / 1e6:.1f} MB" if base.present else missing
        bad = "bad" if base.name == "tiny" else "note"
        findings.append(Finding("good" if base.present else bad, f"base {base.name}", words))
    return findings


def _data() -> list[Finding]:
    from lora_edu.files import data_path

    try:
        folder = data_path()
    except FileNotFoundError as error:
        return [Finding("bad", "data", str(error))]
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return [Finding("good", "data", f"{folder} ({size / 1e6:.0f} MB)")]


def _gpu() -> Finding:
    import torch

    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
        return Finding("good", "GPU", names)
    return Finding("note", "GPU", "none found: all lessons run on the CPU")


def _browser() -> Finding:
    found = browser()
    return (
        Finding("good", "Chromium", found)
        if found
        else Finding("note", "Chromium", "none: only the book's test needs it")
    )


def _speed(seconds: float) -> Finding:
    took = probe(seconds)
    words = f"{took:.1f} ms a probe step on one thread"
    times = recorded_times()
    if "probe_ms" in times:
        ratio = took / times["probe_ms"]
        words += f": expect about {ratio:.1f} times the printed lesson times (measured on {times['machine']})"
    return Finding("good", "speed", words)


def probe(seconds: float = 2.5) -> float:
    """Milliseconds of the fastest of many small training steps (two linear layers, 512 × 512, batch 512, one thread).

    The fastest, because anything else that runs on the machine can only slow a step down.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(512, 512, generator=generator)
        weights = [torch.randn(512, 512, generator=generator).div(22).requires_grad_() for _ in range(2)]
        best, until = float("inf"), time.perf_counter() + seconds
        while time.perf_counter() < until:
            began = time.perf_counter()
            (torch.relu(x @ weights[0]) @ weights[1]).square().mean().backward()
            best = min(best, time.perf_counter() - began)
            for weight in weights:
                weight.grad = None
        return 1000 * best
    finally:
        torch.set_num_threads(threads)
