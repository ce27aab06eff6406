"""Recordings that are scripts of their own, by name: what ``lora-edu full-run`` starts besides the sweeps.

Each writes ``data/runs/NAME.json``, but for the base's pretraining: that file belongs to the weights in ``data/tiny``.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from lora_edu.files import ROOT, data_path


class Script(NamedTuple):
    """One script and how it is called.

    Args:
        path: of the script, from the repository's root.
        what: what it measures or makes.
        results: the list or table in its record, and what one of its entries is called.
        needs: what it cannot do without.
        call: arguments that are always given.
        out: its option for the file to write.
        limit: its option for a time after which nothing more is begun, and how many of its units are a minute.
    """

    path: str
    what: str
    results: tuple[str, str]
    needs: str
    call: tuple[str, ...] = ()
    out: str = "--out"
    limit: tuple[str, int] | None = None


SCRIPTS = {
    "tiny_pretraining": Script(
        "data/pretrain_tiny.py",
        "the base tiny pretrained, in two minutes",
        ("settings", "settings"),
        "a GPU, and Debian's packages for its text; leaves data/tiny alone",
        call=("run", "d192-long-decay"),
        out="--record",
    ),
    "memory_7b": Script(
        "benchmarks/memory_7b.py",
        "lesson 06: memory and time of a 7B step, also 13B and 70B (--shapes)",
        ("runs", "lines"),
        "a GPU of 80 GB or more; bitsandbytes and PEFT for QLoRA",
        limit=("--minutes", 1),
    ),
    "memory_cases": Script(
        "benchmarks/memory_cases.py",
        "lesson 06: two micro-batches, autocast, and a 7B step that does not fit",
        ("runs", "lines"),
        "a GPU of 80 GB or more",
    ),
    "nf4_speed": Script(
        "benchmarks/nf4_speed.py",
        "lesson 14: NF4 and a QLoRA step beside bitsandbytes (--parts, --shapes)",
        ("memory", "lines"),
        "a GPU of 80 GB or more; bitsandbytes and PEFT to compare with",
    ),
    "speed_7b": Script(
        "benchmarks/speed_7b.py",
        "lesson 24: a 7B LoRA step by every way to take it (--shape, --ways)",
        ("shapes", "lines"),
        "a GPU of 80 GB or more; PEFT and Unsloth to compare with",
    ),
    "loss_8b": Script(
        "benchmarks/loss_8b.py",
        "lesson 24: the loss over a vocabulary of 128,256 in pieces",
        ("ways", "ways"),
        "a GPU of 80 GB or more; liger-kernel to compare with",
    ),
    "scaling": Script(
        "benchmarks/scaling.py",
        "lesson 25: LoRA steps on one and several GPUs (--gpus, --shapes)",
        ("runs", "lines"),
        "two GPUs or more",
        limit=("--seconds", 60),
    ),
}


def command(name: str, out: Path | None = None, minutes: float | None = None, more: tuple[str, ...] = ()) -> list[str]:
    """The arguments of Python that run a script.

    Args:
        name: one of ``SCRIPTS``.
        out: the file to write; default the script's own.
        minutes: begin nothing further after this long.
        more: options of the script itself, handed on as they are.

    Raises:
        ValueError: for an unknown name, a time that is not above 0, or a time limit where the script knows none.
        FileNotFoundError: if the script is not here: it belongs to the repository, not to the installed package.
    """
    if name not in SCRIPTS:
        raise ValueError(f"unknown script {name!r}; there are: {', '.join(SCRIPTS)}")
    script = SCRIPTS[name]
    if minutes is not None and script.limit is None:
        raise ValueError(f"{name} takes no --minutes: {accepted(name)}")
    if minutes is not None and not minutes > 0:
        raise ValueError(f"minutes={minutes}: expected a time above 0, or none for the script's own limit")
    path = ROOT / script.path
    if not path.is_file():
        raise FileNotFoundError(f"no script {script.path} in {ROOT}: {name} needs the course's repository")
    arguments = [str(path), *script.call]
    if out is not None:
        arguments += [script.out, str(out)]
    if minutes is not None and script.limit is not None:
        option, units = script.limit
        arguments += [option, f"{minutes * units:g}"]
    return [*arguments, *more]


def accepted(name: str) -> str:
    """Which options ``full-run`` takes with this script, in words."""
    script = SCRIPTS[name]
    options = ["--out", *(["--minutes"] if script.limit else [])]
    return f"it takes {', '.join(options)} and the options that python {script.path} --help lists"


def run_script(name: str, out: Path | None = None, minutes: float | None = None, more: tuple[str, ...] = ()) -> None:
    """Run a script in a process of its own, which says what it does; arguments and errors as in ``command``.

    Raises:
        RuntimeError: if it fails; its own words stand above.
    """
    arguments = command(name, out, minutes, more)
    sys.stdout.flush()
    code = subprocess.run([sys.executable, *arguments]).returncode
    if code:
        raise RuntimeError(f"{name} ended with code {code}: see what {SCRIPTS[name].path} said above")


def line(name: str) -> str:
    """What a script is for, how much of it is recorded, and what it needs, in one line."""
    script = SCRIPTS[name]
    path, (field, unit) = data_path("runs", f"{name}.json"), script.results
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    found = sum(len(record.get(each, ())) for each in (field, "further_runs"))
    return f"{script.what}; {found or 'no'} {unit} recorded; needs {script.needs}"
