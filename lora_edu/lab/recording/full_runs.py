"""The recorded sweeps of lessons 06, 07, 10 and 16, by name, in pieces that resume. A GPU is not required, but wanted.

    lora-edu full-run                                            # what there is, and what it costs
    lora-edu full-run smollm2_finetuning --processes 6 --minutes 9
    lora-edu full-run smollm2_finetuning --base ORGANISATION/MODEL   # another base, into a file of its own
    python -m lora_edu.lab.recording.full_runs smollm2_finetuning --processes 6 --minutes 9

The last form does the same on a machine that has what training needs and no more (no typer, no notebooks): a GPU that
is borrowed for an hour. The records were made with it, and name it.

    accelerate launch --config_file data/accelerate/ddp.yaml --num_processes 2 -m lora_edu.lab.recording.full_runs NAME

With several GPUs, ``--processes`` gives each run to one of them, several runs at a time: the faster way while a run
fits. Under ``accelerate launch`` all of them train each run together.

Every finished run is in ``data/runs/NAME.json`` at once, with the machine it ran on. Killed and started again, the
command does what is missing. The file is replaced as a whole, so it is valid at every moment; one command at a time
writes it.
"""

import argparse
import json
import re
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lora_edu.files import data_path, locked
from lora_edu.lab.distributed import broadcast_from_main, process_state
from lora_edu.lab.recording.experiments import DEFAULTS, look_inside, run
from lora_edu.lab.recording.pool import (
    bar,
    check_limits,
    deadline,
    ending,
    failure,
    here,
    key,
    missing,
    settle,
    work,
    write,
)
from lora_edu.lab.recording.sweeps import SWEEPS, Job, jobs
from lora_edu.quick import full_size

SECONDS_PER_ROW = {"tiny": 0.008, "smollm2-135m": 0.31}  # of one training step, on two idle cores


class Cost(NamedTuple):
    """What a sweep takes: its runs, how many are in data/runs, their training steps, and hours on two cores."""

    runs: int
    recorded: int
    steps: int
    hours: float


def cost(name: str) -> Cost:
    """What a sweep takes. The hours are those of its training steps, as if no GPU helped; evaluations come on top.

    Raises:
        ValueError: for an unknown name.
    """
    wanted = jobs(name)
    path = data_path("runs", f"{name}.json")
    steps, seconds = 0, 0.0
    for job in wanted:
        # Looking inside trains two ranks from two seeds, and everything once.
        here = job.get("steps", DEFAULTS["steps"]) * (5 if job["part"] == "inside" else 1)
        steps += here
        rows = here * job.get("batch_size", DEFAULTS["batch_size"])
        seconds += rows * SECONDS_PER_ROW[job.get("base", DEFAULTS["base"])]
    return Cost(len(wanted), len(_record(name, path)["runs"]), steps, seconds / 3600)


@full_size()  # on a GPU where there is one
def full_run(
    name: str, out: Path | None = None, processes: int = 1, minutes: float | None = None, base: str | None = None
) -> bool:
    """Do what is missing of a sweep; True when nothing is.

    Args:
        name: one of ``SWEEPS``.
        out: the file to write and to resume from; default ``data/runs/NAME.json``, with ``base`` ``NAME-BASE.json``.
        processes: how many runs at a time, each on one thread. One run leaves most of a GPU idle: six share it well.
            Several GPUs take the runs in turn.
        minutes: begin no further run after this long.
        base: another base model than the sweep's own; see ``sweeps.jobs``.

    Under ``accelerate launch`` all processes call this and train each run together; the main one decides which run is
    next, and alone reads and writes the file.

    Raises:
        ValueError: for an unknown name, a number out of range, ``processes`` above 1 under ``accelerate launch``, a
            base that does not fit, or a file that is no record of this sweep.
        FileNotFoundError: if the file's folder does not exist, or the base is not here.
        RuntimeError: if another command writes this file, or a run failed; what had finished is recorded.
    """
    check_limits(processes, minutes)
    if processes > 1 and process_state().num_processes > 1:
        raise ValueError(
            f"processes={processes} under accelerate launch: its {process_state().num_processes} processes do each run "
            f"together. Leave processes at 1, or start python -m lora_edu.lab.recording.full_runs {name} --processes "
            f"{processes}"
        )
    path = out or data_path("runs", f"{_file_name(name, base)}.json")
    wanted = jobs(name, base)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent} to write {path.name} into: make it, or name another file")
    if not process_state().is_main_process:
        return _follow()
    with locked(path):
        record = _record(name, path, base)
        until = deadline(minutes)
        if process_state().num_processes > 1:
            return _lead(missing(wanted, record), record, path, until)
        return work(partial(missing, wanted, record), _do, record, path, processes, until)


def _lead(todo: list[Job], record: dict[str, Any], path: Path, until: float) -> bool:
    """The main process's part under ``accelerate launch``: say which job is next, do it with all, and record it."""
    machine = here(record, process_state().num_processes) if todo else None
    shown = bar(len(todo), record, path)
    settle()
    with shown:
        while todo and time.monotonic() < until:
            job = todo.pop(0)
            broadcast_from_main(job)
            try:
                result = _do(job)
            except Exception as error:  # the launcher ends the other processes when this one ends
                raise failure(job, error, path) from error
            record["runs"].append({"job": job, "machine": machine} | result)
            write(path, record)
            shown.update()
        return broadcast_from_main(not todo)  # no job, but the answer to whether all is done: the end


def _follow() -> bool:
    """The other processes' part: do what the main one says, until it says how it ended."""
    settle()
    said: Any = broadcast_from_main(None)
    while not isinstance(said, bool):
        _do(said)
        said = broadcast_from_main(None)
    return said


def _do(job: Job) -> dict[str, Any]:
    settings = {name: value for name, value in job.items() if name not in ("part", "rule", "kind")}
    return look_inside(settings) if job["part"] == "inside" else run(settings)


def _file_name(name: str, base: str | None) -> str:
    """NAME, or NAME-BASE for another base: the shipped records hold the sweeps' own bases."""
    if base is None:
        return name
    called = Path(base).resolve().name if Path(base).is_dir() else base
    return f"{name}-{re.sub('[^a-z0-9.]+', '-', called.lower()).strip('-.')}"


def _record(name: str, path: Path, base: str | None = None) -> dict[str, Any]:
    """The record so far, or an empty one; never a file that something else wrote."""
    command = f"python -m lora_edu.lab.recording.full_runs {name}" + (f" --base {base}" if base else "")
    record: dict[str, Any] = {"command": command, "defaults": DEFAULTS, "machines": [], "runs": []}
    if not path.exists():
        return record
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        record |= {"machines": found["machines"], "runs": found["runs"]}
        keys = {key(line["job"]) for line in found["runs"]}
        defaults = found["defaults"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no record of a sweep ({type(error).__name__}: {error}): name another file"
        ) from None
    if strange := keys - {key(job) for job in jobs(name, base)}:
        raise ValueError(
            f"{path} holds {len(strange)} runs that are no jobs of {name}, one of them {min(strange)}: take them out, "
            "or name another file"
        )
    if DEFAULTS | defaults != DEFAULTS:  # a setting that came later had its default's value before
        raise ValueError(f"{path} was recorded under other defaults ({defaults}): its jobs now mean something else")
    return record


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(SWEEPS))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--base", help="any base model instead of the sweep's own")
    given = parser.parse_args()
    complete = full_run(given.name, given.out, given.processes, given.minutes, given.base)
    if process_state().is_main_process:
        print(ending(complete))
    process_state().wait_for_everyone()
    process_state().destroy_process_group()


if __name__ == "__main__":
    main()
