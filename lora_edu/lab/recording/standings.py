"""What the referee's record says: the tuned rate and batch of each entrant on each task, its results, and verdicts."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_edu.core.entrants import Entrant
from lora_edu.lab.recording.records import Spread, spread
from lora_edu.lab.recording.tasks import Plan, Task

Line = dict[str, Any]  # a run of the record: its job and its results
ENOUGH_RATES = 5  # to show what came out; an entrant may list more
NEAR = 0.02  # to chance, of an accuracy


@dataclass(frozen=True)
class Standing:
    """One entrant on one task, once all of its seeds have run.

    Attributes:
        score: test loss, or a classifier's test accuracy, over the seeds that ended with a finite number.
        rate, batch: as tuned.
        at_edge: the rate is the lowest or the highest that was tried, so that a better one may lie outside.
        diverged: how many seeds ended without a finite loss.
        at_chance: how many seeds ended with a classifier that is less than two points better than a guess.
        plain: loss on plain definitions after training; None for a classifier.
        trainable, file_bytes: numbers that train, and the size of their file.
        step_ratio: time of a step against the reference's; None where it was not measured.
        peak_bytes: memory of a step on a GPU; None without one.
    """

    score: Spread
    rate: float
    batch: int
    at_edge: bool
    diverged: int
    at_chance: int
    plain: Spread | None
    trainable: int
    file_bytes: int
    step_ratio: float | None = None
    peak_bytes: int | None = None


def lines(record: dict[str, Any], **job: Any) -> list[Line]:
    """The runs whose jobs have these values."""
    return [line for line in record["runs"] if job.items() <= line["job"].items()]


def tuning_jobs(plan: Plan, entrant: Entrant, name: str) -> list[dict[str, Any]]:
    """The runs that tune an entrant on the task of this name: every rate with every batch, one seed."""
    task = plan.tasks[name]
    common = {"stage": "tune", "method": entrant.name, "task": name, "seed": plan.tuning_seed}
    return [common | {"rate": r, "batch": b} for b in task.batches for r in entrant.rates_for(task.base)]


def tuned(plan: Plan, record: dict[str, Any], entrant: Entrant, name: str) -> tuple[float, int] | None:
    """The rate and the batch with the best validation result; None while a run of the tuning is missing.

    Runs at rates that the entrant no longer lists are left aside.
    """
    found = _tried(plan, record, entrant, name)
    if len(found) < len(tuning_jobs(plan, entrant, name)):
        return None
    best = min(found, key=_badness)["job"]
    return best["rate"], best["batch"]


def _tried(plan: Plan, record: dict[str, Any], entrant: Entrant, name: str) -> list[Line]:
    """The tuning runs at rates that were tried with every batch."""
    wanted = tuning_jobs(plan, entrant, name)
    found = [line for line in lines(record, stage="tune", method=entrant.name, task=name) if line["job"] in wanted]
    batches = Counter(line["job"]["rate"] for line in found)
    return [line for line in found if batches[line["job"]["rate"]] == len(plan.tasks[name].batches)]


def standing(plan: Plan, record: dict[str, Any], entrant: Entrant, name: str) -> Standing | None:
    """An entrant's results on a task; None while something is missing. Time and memory may come later.

    Rates beyond the first five may come later, too: until then the best of those that were tried counts.
    """
    task = plan.tasks[name]
    found = _tried(plan, record, entrant, name)
    rates = sorted({line["job"]["rate"] for line in found})
    if len(rates) < min(ENOUGH_RATES, len(entrant.rates_for(task.base))):
        return None
    best = min(found, key=_badness)["job"]
    rate, batch = best["rate"], best["batch"]
    own = {"method": entrant.name, "task": name}
    runs = [
        line for line in lines(record, stage="seed", rate=rate, batch=batch, **own) if line["job"]["seed"] in plan.seeds
    ]
    if len(runs) < len(plan.seeds):
        return None
    finite = [line for line in runs if line["test"] is not None]
    if not finite:
        return None
    timed = [line for line in lines(record, stage="step", method=entrant.name) if _same_base(plan, line, task)]
    last = timed[-1] if timed else {}
    plain = [line["plain"] for line in finite if line.get("plain") is not None]
    return Standing(
        score=spread(line[_key(task)] for line in finite),
        rate=rate,
        batch=batch,
        at_edge=rate in (rates[0], rates[-1]),
        diverged=len(runs) - len(finite),
        at_chance=sum(line["test accuracy"] < 1 / task.classes + NEAR for line in finite) if task.classes else 0,
        plain=spread(plain) if plain else None,
        trainable=runs[0]["trainable"],
        file_bytes=runs[0]["file_bytes"],
        step_ratio=last.get("step_ratio"),
        peak_bytes=last.get("peak_bytes"),
    )


def verdict(task: Task, one: Spread, other: Spread) -> str:
    """Whether ``one`` is "better" or "worse" than ``other``, or the difference "not evidence".

    It is evidence if it is larger than the larger of the two standard deviations over seeds.
    """
    difference = one.mean - other.mean
    if abs(difference) <= max(one.sd, other.sd):
        return "not evidence"
    return "better" if (difference > 0) == (task.metric == "accuracy") else "worse"


def ranked(task: Task, standings: Sequence[tuple[str, Standing]]) -> list[tuple[str, Standing]]:
    """Names with their standings, the best mean first."""
    sign = -1 if task.metric == "accuracy" else 1
    return sorted(standings, key=lambda each: sign * each[1].score.mean)


def _key(task: Task) -> str:
    return "test accuracy" if task.classes else "test"


def _badness(line: Line) -> tuple[float, float]:
    """The lower, the better: errors of a classifier, and where they are equal or there are none its loss."""
    loss = math.inf if line["validation"] is None else line["validation"]
    return -line.get("validation accuracy", 0.0), loss


def _same_base(plan: Plan, line: Line, task: Task) -> bool:
    timed = plan.tasks.get(line["job"]["task"])
    return timed is not None and timed.base == task.base
