"""The referee: all entered methods compared in one recorded run, each at its own tuned rate and batch, over five seeds.

    lora-edu full-run referee --minutes 7                        # all that is missing, eight processes on a GPU
    lora-edu full-run referee --method LoRA --method full --minutes 7
    python -m lora_edu.lab.recording.referee --minutes 7         # the same on a machine that has what training needs

On each task an entrant is tuned on the validation split with one seed; then five other seeds run at what was best.
Once all of that is recorded, time and memory of a step are measured by one process alone, in turns with a plain LoRA's.
Methods enter by ``register_entrant`` in their own files; the tasks stand in ``tasks.py``. The record is the basis of
the book's page *Methods*: ``lora-edu lessons methods`` writes it.

Every finished run is in ``data/runs/referee.json`` at once, with the machine it ran on. Killed and started again, the
command does what is missing.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lora_edu.core.entrants import Entrant, registered_entrants
from lora_edu.files import data_path, locked
from lora_edu.lab.recording.pool import Job, check_limits, deadline, ending, key, missing, work
from lora_edu.lab.recording.shared_card import shared_card
from lora_edu.lab.recording.standings import tuned, tuning_jobs
from lora_edu.lab.recording.tasks import PLAN, Plan
from lora_edu.lab.recording.trials import trial
from lora_edu.quick import full_size

NAME = "referee"
STAGES = ("base", "tune", "seed", "step")
PROCESSES = 8  # on one GPU; without one, a single process
# Of one training step, measured on an H100, where the launches of kernels decide; eight processes take 1.3 of it each.
SECONDS_PER_STEP = {"tiny": 0.032, "minilm": 0.044, "smollm2-135m": 0.205}
SHARING = 1.3
START_MINUTES = 0.5  # of each call: the processes load PyTorch and the bases


class Cost(NamedTuple):
    """What the comparison takes: entrants, runs, how many are recorded, and minutes on one H100 for the rest."""

    entrants: int
    runs: int
    recorded: int
    minutes: float


@full_size()  # on a GPU where there is one
def referee(
    methods: Sequence[str] | None = None,
    out: Path | None = None,
    processes: int | None = None,
    minutes: float | None = None,
    tasks: Sequence[str] | None = None,
    plan: Plan = PLAN,
) -> bool:
    """Do what is missing of the comparison; True when nothing is.

    Args:
        methods: names of entrants or of methods (then all of their entrants); default everything that is entered.
        out: the file to write and to resume from; default ``data/runs/referee.json``.
        processes: how many runs at a time; default eight on a GPU and one without. Steps are timed by one alone.
        minutes: begin no further run after this long.
        tasks: names of tasks, where not all are wanted or not all bases are here; default the plan's.
        plan: tasks and seeds; another than the course's own needs a file of its own.

    Raises:
        ValueError: for an unknown method or task, a number out of range, or a file that is no record of the referee.
        FileNotFoundError: if the file's folder does not exist, or a base is not here.
        RuntimeError: if another command writes this file, or a run failed; what had finished is recorded.
    """
    processes = processes if processes is not None else PROCESSES if torch.cuda.is_available() else 1
    check_limits(processes, minutes)
    entrants, part = chosen(methods), with_tasks(plan, tasks)
    path = out or data_path("runs", f"{NAME}.json")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent} to write {path.name} into: make it, or name another file")
    with locked(path):
        record, until = read(path, plan), deadline(minutes)
        do = partial(trial, plan)
        with shared_card(processes):
            trained = work(lambda: missing(runs(part, record, entrants), record), do, record, path, processes, until)
        timed = partial(missing, steps(part, entrants), record)
        return trained and work(timed, do, record, path, 1, until)


def chosen(methods: Sequence[str] | None) -> list[Entrant]:
    """The entrants that these names mean, whatever the case of their letters; without names, all.

    Raises:
        ValueError: for a name that no entrant and no method has.
    """
    everyone = registered_entrants()
    if not methods:
        return everyone
    wanted = {name.lower() for name in methods}
    if unknown := wanted - {name.lower() for each in everyone for name in (each.name, each.method)}:
        names = ", ".join(f"{each.name} ({each.method})" for each in everyone)
        raise ValueError(f"unknown method {min(unknown)!r}; entered are {names}")
    return [each for each in everyone if wanted & {each.name.lower(), each.method.lower()}]


def with_tasks(plan: Plan, names: Sequence[str] | None) -> Plan:
    """The plan with these of its tasks alone; without names, with all.

    Raises:
        ValueError: for a task that it does not have.
    """
    if unknown := set(names or ()) - plan.tasks.keys():
        raise ValueError(f"unknown task {min(unknown)!r}; there are: {', '.join(plan.tasks)}")
    return replace(plan, tasks={name: task for name, task in plan.tasks.items() if not names or name in names})


def runs(plan: Plan, record: dict[str, Any], entrants: Sequence[Entrant]) -> list[Job]:
    """The training runs that can be named by now: an entrant's seeds follow once its tuning is in the record."""
    found: list[Job] = [{"stage": "base", "task": name} for name in plan.tasks]
    for entrant in entrants:
        for name, task in plan.tasks.items():
            if not entrant.enters(task.place):
                continue
            found += tuning_jobs(plan, entrant, name)
            if choice := tuned(plan, record, entrant, name):
                job = {"stage": "seed", "method": entrant.name, "task": name, "rate": choice[0], "batch": choice[1]}
                found += [job | {"seed": seed} for seed in plan.seeds]
    return found


def steps(plan: Plan, entrants: Sequence[Entrant]) -> list[Job]:
    """The measurements of a step's time and memory."""
    return [
        {"stage": "step", "method": entrant.name, "task": name}
        for entrant in entrants
        for name, task in plan.tasks.items()
        if task.timed and entrant.enters(task.place)
    ]


def read(path: Path, plan: Plan = PLAN) -> dict[str, Any]:
    """The record so far, or an empty one; never a file that something else wrote.

    Raises:
        ValueError: if it is no record of the referee, or of another plan, or holds runs of what is not entered.
    """
    settings = json.loads(json.dumps(plan.settings()))
    command = f"python -m lora_edu.lab.recording.{NAME}"
    record: dict[str, Any] = {"command": command, "settings": settings, "machines": [], "runs": []}
    if not path.exists():
        return record
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        record |= {"machines": found["machines"], "runs": found["runs"]}
        # A record from before some method started from data does not say on how many batches: none of it depends on it.
        then = {"start_batches": plan.start_batches} | found["settings"]
        tasks = then.pop("tasks")
        strange = [job for line in found["runs"] if not _is_job(job := line["job"], plan)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no record of the referee ({type(error).__name__}: {error}): name another file"
        ) from None
    now = {name: value for name, value in settings.items() if name != "tasks"}
    changed = [name for name, task in tasks.items() if settings["tasks"].get(name) != task]
    if changed or then != now:
        raise ValueError(
            f"{path} was recorded with other settings ({', '.join(changed) or then}): its runs cannot be compared with "
            "those of now; name another file"
        )
    if strange:
        raise ValueError(
            f"{path} holds {len(strange)} runs that are none of the referee's, one of them {key(strange[0])}: take "
            "them out, or name another file"
        )
    return record


def _is_job(job: Job, plan: Plan) -> bool:
    """Whether it is one of this plan's jobs, at whatever rate: an entrant's rates may have been widened since."""
    entered = {entrant.name for entrant in registered_entrants()}
    if job["stage"] not in STAGES or job["task"] not in plan.tasks:
        return False
    if job["stage"] == "base":
        return True
    seeds = {"tune": (plan.tuning_seed,), "seed": plan.seeds, "step": (None,)}[job["stage"]]
    return job["method"] in entered and job.get("seed") in seeds


def cost(methods: Sequence[str] | None = None, path: Path | None = None, plan: Plan = PLAN) -> Cost:
    """What is recorded of the comparison, and what the rest takes on one H100 with eight processes."""
    record = read(path or data_path("runs", f"{NAME}.json"), plan)
    done, total, recorded, seconds = {key(line["job"]) for line in record["runs"]}, 0, 0, 0.0
    entrants = chosen(methods)
    for entrant in entrants:
        for name, task in plan.tasks.items():
            if not entrant.enters(task.place):
                continue
            known = [job for job in runs(plan, record, [entrant]) if job["task"] == name and job["stage"] != "base"]
            batches = [job["batch"] for job in known if key(job) not in done]
            if tuned(plan, record, entrant, name) is None:  # the seeds' batch is not known: take the middle one
                batches += [task.batches[len(task.batches) // 2]] * len(plan.seeds)
            total += len(tuning_jobs(plan, entrant, name)) + len(plan.seeds)
            recorded += sum(key(job) in done for job in known)
            seconds += sum(map(task.steps, batches)) * SECONDS_PER_STEP[task.base] * SHARING / PROCESSES
        for job in missing(steps(plan, [entrant]), record):
            seconds += 2 * (plan.rounds + 3) * SECONDS_PER_STEP[plan.tasks[job["task"]].base]
    return Cost(len(entrants), total, recorded, seconds / 60 + (START_MINUTES if seconds else 0))


def line(plan: Plan = PLAN) -> str:
    """What the comparison is, how much of it is recorded, and what it needs, in one line."""
    found = cost(plan=plan)
    rest = f"about {math.ceil(found.minutes)} min for the rest on one H100" if found.minutes else "complete"
    return (
        f"lessons 14 to 18: {found.entrants} settings of methods, tuned and compared; {found.runs} runs "
        f"({found.recorded} recorded), {rest}; needs a GPU, the bases smollm2-135m and minilm"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", action="append", help="an entrant or a method; may be repeated")
    parser.add_argument("--task", action="append", choices=list(PLAN.tasks), help="may be repeated")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    print(ending(referee(given.method, given.out, given.processes, given.minutes, given.task)))


if __name__ == "__main__":
    main()
