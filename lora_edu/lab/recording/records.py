"""The recorded runs in ``data/runs/``: pick them by their settings, average over seeds, say where they ran, write them.

The sweeps are made by ``full_runs.py`` and ``referee.py``, and each of their runs names one of the ``surroundings``; a
benchmark's record says its ``provenance`` once. Lessons 06, 07, 10 and 16 read them.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lora_edu.files import ROOT, data_path, write_atomically


class Spread(NamedTuple):
    """What several seeds gave: the mean, the standard deviation (of a sample, so divided by n - 1), and how many."""

    mean: float
    sd: float
    n: int


def read_record(name: str) -> dict[str, Any]:
    """A record of a sweep: ``machines`` (where), ``defaults`` and ``runs``, each with its ``job`` and its results.

    Every job comes back complete: what it does not name stands in ``defaults``.

    Raises:
        FileNotFoundError: if there is no such record; the sentence lists those that there are.
        ValueError: if the file of that name is no record of a sweep.
    """
    path = data_path("runs", f"{name}.json")
    if not path.exists():
        there = ", ".join(sorted(each.stem for each in path.parent.glob("*.json")))
        raise FileNotFoundError(f"no record {name!r} in data/runs; there are: {there}")
    record = json.loads(path.read_text(encoding="utf-8"))
    if not {"machines", "defaults", "runs"} <= record.keys():
        raise ValueError(
            f"data/runs/{name}.json is no record of a sweep, it has {', '.join(record)}: read it with json"
        )
    for line in record["runs"]:
        line["job"] = record["defaults"] | line["job"]
    return record


def pick(record: dict[str, Any], **settings: Any) -> list[dict[str, Any]]:
    """The runs whose jobs have these settings, for instance ``pick(record, part="rank", r=8)``.

    Raises:
        ValueError: if there is none: a mean over nothing would hide a typing error. It says what was recorded.
    """
    wanted = {name: _hashable(value) for name, value in settings.items()}
    found = [
        line
        for line in record["runs"]
        if all(name in line["job"] and _hashable(line["job"][name]) == value for name, value in wanted.items())
    ]
    if not found:
        there = "; ".join(_values(record["runs"], name) for name in settings) or "the record is empty"
        raise ValueError(f"no recorded run with {settings}: {there}")
    return found


def spread(values: Iterable[float]) -> Spread:
    """Mean, standard deviation and number of values (one value has no spread: 0).

    Raises:
        ValueError: if there are none.
    """
    values = list(values)
    if not values:
        raise ValueError("no values: there is no mean of nothing")
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0, len(values))


def by(record: dict[str, Any], *names: str, metric: str = "test", **settings: Any) -> dict[Any, Spread]:
    """A result averaged over what is not named, usually the seeds.

    ``by(record, "r", "learning_rate", part="rank")`` → ``{(1, 0.001): Spread(mean, sd, n), …}``; with one name the
    keys are its values alone.

    Raises:
        ValueError: if no run has these settings, none names what to group by, or one has no such result.
    """
    groups = defaultdict(list)
    runs = pick(record, **settings)
    for name in names:
        if not any(name in line["job"] for line in runs):
            there = ", ".join(sorted(set().union(*(line["job"] for line in runs))))
            raise ValueError(f"no job here has {name!r}; they have {there}")
    for line in runs:
        if metric not in line:
            there = ", ".join(key for key in line if key not in ("job", "machine"))
            raise ValueError(
                f"a run of part {line['job'].get('part')!r} has no {metric!r}, it has {there}: name a part"
            )
        key = tuple(_hashable(line["job"].get(name)) for name in names)
        groups[key[0] if len(names) == 1 else key].append(line[metric])
    return {key: spread(values) for key, values in groups.items()}


def described(record: dict[str, Any]) -> str:
    """Where and when a record was made, in one line for a caption; pieces that differ in no more are named once."""
    machines = [
        f"{_several(each)}{each['hardware']}, {each['precision']}, torch {each['versions']['torch']}, {each['date']}"
        for each in record["machines"]
    ]
    return "; ".join(dict.fromkeys(machines))


def _several(machine: dict[str, Any]) -> str:
    """ "2 × " for a record made by two processes together; older records do not say, and had one."""
    return f"{machine['world_size']} × " if machine.get("world_size", 1) > 1 else ""


def surroundings(precision: str, world_size: int = 1) -> dict[str, Any]:
    """What a figure may depend on besides its settings: hardware, precision, date, versions, and the code's commit.

    ``world_size`` is how many processes, each with its own device, trained one model together.
    """
    cuda = torch.cuda.is_available()
    where = torch.cuda.get_device_name() if cuda else f"CPU, {torch.backends.cpu.get_cpu_capability()}"
    return {
        "hardware": f"{where}, {platform.machine()}",
        "world_size": world_size,
        "precision": precision,
        "commit": commit(),
        "date": date.today().isoformat(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__.split("+")[0]}
        | {name: version(name) for name in ("transformers", "accelerate")},
    }


def processor() -> str:
    """The processor's name, its cores, and which of its instructions PyTorch uses."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def commit() -> str:
    """The commit of this repository that is checked out, or "unknown".

    ``LORA_EDU_COMMIT`` says it where git cannot: on a machine to which only the files were copied.
    """
    if given := os.environ.get("LORA_EDU_COMMIT"):
        return given
    try:
        command = ["git", "rev-parse", "--show-toplevel", "HEAD"]
        found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.split("\n")
    except OSError:  # there is no git here
        return "unknown"
    # A package that is installed somewhere inside another project's repository must not name that one's commit.
    return found[1] if len(found) > 1 and os.path.samefile(found[0], ROOT) else "unknown"


def provenance(script: str, hardware: str, given_commit: str | None, *libraries: str) -> dict[str, Any]:
    """How, when and where a benchmark's lines were measured: with the arguments that this process was started with.

    ``libraries`` are further ones that the figures depend on; those that are not installed are left out.
    """
    named = [name for name in ("transformers", *libraries) if find_spec(name)]
    return {
        "command": " ".join(["python", script, *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "commit": given_commit or commit(),
        "hardware": hardware,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
        | {name: version(name) for name in named},
    }


def resumed(
    path: Path, new: dict[str, Any], same: Sequence[str], key: Callable[[dict[str, Any]], Any]
) -> dict[str, Any]:
    """The record in the file, to be gone on with; ``new`` if there is none.

    Lines of one file are compared with each other, so they come from one version of PyTorch, and what ``same`` names
    (the hardware, the number of steps) is what it was. ``key`` tells one line from the others.

    Raises:
        ValueError: if the file holds something else, or was recorded elsewhere or otherwise.
    """
    if not path.exists():
        return new
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        pairs = {name: (found[name], new[name]) for name in same}
        pairs["torch"] = (found["versions"]["torch"], new["versions"]["torch"])
        list(map(key, [*found["runs"], *found.get("further_runs", [])]))
        list(map(itemgetter("commit"), found.get("continued", [])))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no record that can be continued ({type(error).__name__}: {error}). Name another file with --out"
        ) from None
    if other := [f"{name} {there!r}, now {here!r}" for name, (there, here) in pairs.items() if there != here]:
        raise ValueError(
            f"{path} was recorded with {'; '.join(other)}: lines that cannot be compared do not go into one file. "
            "Name another file with --out"
        )
    return found


def write_record(record: dict[str, Any], path: Path) -> None:
    """Write a benchmark's record whole or not at all, and its folder if that is missing."""
    write_atomically(path, (json.dumps(record, indent=1) + "\n").encode())


def _values(runs: list[dict[str, Any]], name: str) -> str:
    """What the jobs have for one setting, in words."""
    values = sorted({repr(_hashable(line["job"][name])) for line in runs if name in line["job"]})
    return f"{name} is one of {', '.join(values)}" if values else f"no job has {name!r}"


def _hashable(value: Any) -> Any:
    """Lists of names, as ``targets``, as one name: they become keys. A tuple is the same as a list, as in a file."""
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
