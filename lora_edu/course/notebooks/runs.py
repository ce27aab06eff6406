"""Run copies of the lessons under ``build/``, and only those that changed since they last ran."""

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_edu.course.notebooks.execute import Progress, execute, time_limit
from lora_edu.course.notebooks.stored import BUILD, LESSONS, NotebookError, clear_outputs, normalise, read, write
from lora_edu.files import ROOT, data_folder
from lora_edu.quick import ENVIRONMENT

RAN = BUILD / "lessons"
TIMES = ROOT / "book" / "lesson_times.json"


@dataclass(frozen=True)
class Run:
    """One lesson of a run: how long it took (when it last ran), whether it was taken from ``build/``, what failed."""

    name: str
    seconds: float
    cached: bool = False
    error: str = ""


def fingerprint(paths: Iterable[Path], root: Path = ROOT) -> str:
    """A hash of the contents and names of files; it does not depend on their order or times."""
    total = hashlib.sha256()
    for path in sorted(paths):
        total.update(path.relative_to(root).as_posix().encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def surroundings() -> str:
    """A hash of all that a lesson's outputs depend on beside the lesson: library, data, versions, environment."""
    library = [path for path in (ROOT / "lora_edu").rglob("*.py") if "course" not in path.relative_to(ROOT).parts]
    library += (ROOT / "lora_edu" / "course" / "checks").rglob("*.py")
    data = data_folder()
    files = [path for path in data.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    constraints = [ROOT / "constraints.txt"] if (ROOT / "constraints.txt").exists() else []
    settings = json.dumps([ENVIRONMENT, platform.python_version(), platform.machine()])
    return fingerprint(library + constraints) + fingerprint(files, data) + settings


def key(source: Path, around: str) -> str:
    """The key of a lesson in ``build/``: its cells (not their stored outputs) and its surroundings."""
    cells = [[cell.cell_type, cell.source] for cell in read(source).cells]
    return hashlib.sha256((json.dumps(cells) + around).encode()).hexdigest()


def run(
    sources: Sequence[Path],
    start: Callable[[str], Progress],
    target: Path = RAN,
    force: bool = False,
) -> list[Run]:
    """Execute copies of notebooks in ``target``. A failing one does not stop the others.

    Args:
        sources: the notebooks.
        start: called with a notebook's name; gives the callback that counts its cells.
        target: folder of the executed copies.
        force: run also what did not change.
    """
    target.mkdir(parents=True, exist_ok=True)
    around = surroundings()
    runs = []
    for source in sources:
        moved = start(source.stem)
        copy, note = target / source.name, target / f"{source.stem}.json"
        wanted = key(source, around)
        known = json.loads(note.read_text()) if note.exists() and copy.exists() else {}
        if known.get("key") == wanted and not force:
            moved(0, 0)
            runs.append(Run(source.stem, known["seconds"], cached=True))
            continue
        began = time.monotonic()
        try:
            notebook = execute(clear_outputs(read(source)), target, source.stem, moved, time_limit(source))
        except NotebookError as error:
            moved(0, 0)
            runs.append(Run(source.stem, time.monotonic() - began, error=str(error)))
            continue
        seconds = round(time.monotonic() - began, 1)
        write(normalise(notebook), copy)
        note.write_text(json.dumps({"key": wanted, "seconds": seconds}))
        runs.append(Run(source.stem, seconds))
    return runs


def recorded_times() -> dict[str, Any]:
    """The run times that README and book print: "seconds" by lesson, "machine", "probe_ms" (the doctor's probe)."""
    return json.loads(TIMES.read_text(encoding="utf-8")) if TIMES.exists() else {"seconds": {}}


def record_times(runs: Sequence[Run], probe_ms: float) -> None:
    """Keep these runs' times as the printed ones, with the machine that they were measured on."""
    record = {
        "command": "lora-edu course --force --record",
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "probe_ms": round(probe_ms, 2),
        "seconds": {run.name: run.seconds for run in runs},
    }
    TIMES.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def remove_stale(target: Path = RAN, sources: Path = LESSONS) -> None:
    """Remove executed copies whose lesson is gone, so that the book has no page of them."""
    names = {path.stem for path in sources.glob("*.ipynb")}
    for path in target.glob("*"):
        if path.suffix in (".ipynb", ".json") and path.stem not in names:
            path.unlink()
