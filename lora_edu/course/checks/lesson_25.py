"""The check of lesson 25: a plan for several GPUs (B1)."""

import random
from collections.abc import Callable
from typing import Any

from lora_edu.course.checks.report import Report, Wrong, run_steps
from lora_edu.course.checks.tools import is_several, is_whole, known_slip

Job = dict[str, float]
Plan = tuple[str, bool, int]  # way, checkpointed, rows of a micro-batch
QUESTION = "What does a GPU hold at once, what is sent once an update, and what once a micro-batch?"
FIX = (
    "Go through both ways, with and without checkpointing, and every micro-batch that divides rows; leave out what "
    "does not fit; take min((seconds, -rows_of_it, …)). FSDP gathers base and adapter 2 · rows / rows_of_it times."
)


def best_plan(
    job: Job,
    gathers: float = 2,
    each_piece: bool = True,
    own_part: bool = False,
    block: bool = True,
    gradients: bool = True,
    moments: bool = True,
    at_once: bool = False,
    again: float = 1.5,
    largest: bool = True,
    ways: tuple[str, ...] = ("DDP", "FSDP"),
) -> Plan | None:
    """The fastest plan that fits; every argument but the first is a mistake that one can make."""
    processes, total = job["gpus"], int(job["rows"])
    part = 1.0 if own_part else (processes - 1) / processes
    trained = job["adapter"] + gradients * job["adapter"] + moments * job["moments"]
    found = []
    for way in ways:
        held = job["base"] + trained
        if way == "FSDP":
            held = held / processes + block * job["block"]
        for checkpointed in (False, True):
            each = job["row_checkpointed" if checkpointed else "row"]
            computing = total * job["row_seconds"] * (again if checkpointed else 1)
            for rows in (rows for rows in range(1, total + 1) if total % rows == 0):
                if held + each * (total if at_once else rows) > job["card"]:
                    continue
                pieces = total // rows if each_piece else 1
                sent = 2 * job["adapter"] if way == "DDP" else job["adapter"]
                if way == "FSDP":
                    sent += gathers * pieces * (job["base"] + job["adapter"])
                order = -rows if largest else rows
                found.append((computing + part * sent / job["link"], order, way, checkpointed, rows))
    return min(found)[2:] if found else None


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"gathers": 1}, "so it would be if FSDP gathered the weights once for both passes"),
    ({"each_piece": False}, "so it would be if FSDP gathered the weights once an update, not for each micro-batch"),
    ({"own_part": True}, "so it would be if a GPU also sent its own part to itself; (P − 1)/P of the bytes travel"),
    ({"block": False}, "so it would be if no block had to be whole while it computes"),
    ({"gradients": False}, "so it would be without memory for the adapter's gradients"),
    ({"moments": False}, "so it would be without memory for the moments"),
    ({"ways": ("FSDP",)}, "so it would be without DDP"),
    ({"ways": ("DDP",)}, "so it would be without FSDP"),
    ({"at_once": True}, "so it would be if the activations of all rows were held at once"),
    ({"again": 1}, "so it would be if checkpointing cost no time"),
    ({"largest": False}, "of equally fast plans the one with the largest micro-batch is asked for"),
]


def plan(candidate: Callable[[Job], Plan | None], hint: int = 1) -> Report:
    """Exercise B1: ``candidate(job)`` is (way, checkpointed, rows of a micro-batch) of the fastest plan that fits."""

    def job(room: float, gather: float, sharded: bool, processes: int) -> Job:
        """A job whose card has so much room beside what is held, and in which one gathering of both passes takes
        ``gather`` times as long as a row."""
        size, second = random.uniform(0.9e9, 1.1e9), random.uniform(0.1, 0.3)
        own = {"base": 16.0, "adapter": 0.2, "moments": 0.8, "block": 0.6, "row": 3.0, "row_checkpointed": 0.5}
        held = own["base"] + 2 * own["adapter"] + own["moments"]
        card = held / processes + own["block"] + room if sharded else held + room
        link = 2 * (processes - 1) / processes * (own["base"] + own["adapter"]) / (gather * second)
        sizes = {name: value * size for name, value in {**own, "card": card, "link": link}.items()}
        return {"gpus": processes, "rows": 16, "row_seconds": second, **sizes}

    def compare(room: float, gather: Callable[[int], float], sharded: bool, case: str) -> None:
        processes = random.choice([2, 4, 8])
        given = job(room, gather(processes), sharded, processes)
        right = best_plan(given)
        got = candidate(dict(given))
        if got is not None and not (is_several(got, 3) and got[0] in ("DDP", "FSDP") and is_whole(got[2])):
            raise Wrong(f"you return {got!r}: expected None or (way, checkpointed, rows)", QUESTION, FIX)
        if (None if got is None else tuple(got)) != right:
            slips = [(best_plan(given, **mistake), said) for mistake, said in MISTAKES]
            same = lambda answer, wrong: (None if answer is None else tuple(answer)) == wrong  # noqa: E731
            note = known_slip(got, slips, same, "this is none of the usual slips")
            raise Wrong(f"{case}, {processes} GPUs: you return {got!r}, expected {right!r}; {note}", QUESTION, FIX)

    def cheap(share: float) -> Callable[[int], float]:
        """So long a gathering that all of FSDP's take this share of what checkpointing adds to DDP's computing."""
        return lambda processes: share * 8 / (8 if processes == 2 else 4)

    steps = [
        ("the base fits on each card", lambda: compare(6.8, lambda p: 1.0, False, "a card with room for two rows")),
        ("what trains takes more than its weights", lambda: compare(5.9, lambda p: 1.0, False, "a tight card")),
        ("a slow link", lambda: compare(3.2, lambda p: 1.5, True, "a base that does not fit, a slow link")),
        ("a fast link", lambda: compare(3.2, lambda p: 0.2, True, "a base that does not fit, a fast link")),
        ("both ways fit, a fast link", lambda: compare(1.2, cheap(0.4), False, "a base that barely fits")),
        ("both ways fit, one a little ahead", lambda: compare(1.2, cheap(0.92), False, "a base that barely fits")),
        ("both ways fit, a slow link", lambda: compare(1.2, cheap(1.08), False, "a base that barely fits")),
        ("nothing fits", lambda: compare(0.3, lambda p: 1.0, True, "a card that is too small")),
    ]
    return run_steps("a plan for several GPUs", steps, hint)
