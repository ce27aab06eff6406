"""The book's page *Methods*: a table of the referee's results for each task, and a card for each method.

The cards are the paragraphs with which methods enter (``register_entrant``), most often their files' docstrings.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lora_edu.core.entrants import Entrant, registered_entrants
from lora_edu.files import ROOT, data_path, write_atomically
from lora_edu.lab.recording import referee
from lora_edu.lab.recording.records import described
from lora_edu.lab.recording.standings import Standing, lines, ranked, standing, verdict
from lora_edu.lab.recording.tasks import PLAN, Plan, Task
from lora_edu.lab.recording.trials import REFERENCE

PAGE = ROOT / "book" / "methods.md"
NOT_YET = "not measured yet"
Standings = dict[str, Standing | None]  # by entrant, on one task

ABOUT = f"""
Every method of this library on the same small tasks. On each task its learning rate ({{rates}} values) and its
batch size are tuned on the validation split with one seed; then {{seeds}} other seeds run at what was best, and the
tables show their results on the test split: mean ± standard deviation. All runs of a task see the same number of rows.
Rates fall linearly after a short warm-up. What starts from data sees the first {{start_batches}} batches.

*Against {REFERENCE}* compares two means: a difference that is not larger than the larger of the two standard
deviations is **not evidence**. Seeds *at chance* ended with a classifier less than two points better than a
guess.{{edge}}
*Plain loss* is the loss on a hundred plain definitions after training: how much is forgotten of what the base could
do. *Step* is the time of a training step as a ratio to {REFERENCE}'s, the median of {{rounds}} pairs that one process
alone measures in turns. {REFERENCE}'s own ratio is that of one copy of it against another, and not exactly 1 because
the time of a step varies from one to the next. *Memory* is the peak of a step on the GPU. These are small models and
short runs: the order of methods may be another on yours.
"""
EDGE = "\nA rate with a star is the lowest or the highest that was tried, so that a better one may lie outside."
OWN_RESULTS = f"""
Each card ends with the method's results from the tables above: test loss or accuracy, and in brackets how it compares
with {REFERENCE}.
""".strip()


def methods_page(record: dict[str, Any], plan: Plan = PLAN) -> str:
    """The page as Markdown for ``book/``.

    Args:
        record: what the referee recorded, as ``referee.read`` gives it; it may be empty.
        plan: the plan that it was recorded by.
    """
    entrants = registered_entrants()
    text = ["<!-- Written by lora-edu lessons methods from the record and the methods' cards; do not edit it here. -->"]
    found: dict[str, Standings] = {}
    tables: list[str] = []
    for name, task in plan.tasks.items():
        here = [entrant for entrant in entrants if entrant.enters(task.place)]
        found[name] = {entrant.name: standing(plan, record, entrant, name) for entrant in here}
        base = lines(record, stage="base", task=name)
        tables += ["", f"### {task.title or name}", "", *_table(task, here, found[name], base)]
    text += ["", "# Methods", _about(entrants, found, plan), ""]
    text += [f"Recorded by `{record['command']}`: {described(record) or NOT_YET}.", "", "## Results", *tables]
    text += ["", "## Cards", "", OWN_RESULTS]
    for method in dict.fromkeys(entrant.method for entrant in entrants):
        own = [entrant for entrant in entrants if entrant.method == method]
        text += ["", *_card(method, own, found, plan)]
    return "\n".join(text) + "\n"


def _about(entrants: Iterable[Entrant], found: dict[str, Standings], plan: Plan) -> str:
    """What the tables show and how it was made."""
    tried = {
        len(each.rates_for(task.base)) for each in entrants for task in plan.tasks.values() if each.enters(task.place)
    }
    fewest, most = min(tried), max(tried)
    starred = any(each and each.at_edge for standings in found.values() for each in standings.values())
    return ABOUT.format(
        rates=fewest if fewest == most else f"{fewest} to {most}",
        seeds=len(plan.seeds),
        edge=EDGE if starred else "",
        rounds=plan.rounds,
        start_batches=plan.start_batches,
    ).rstrip()


def refresh(record: Path | None = None, page: Path = PAGE) -> list[Path]:
    """Write the page from the shipped record, and return it if it changed.

    Raises:
        ValueError: if the file is no record of the referee.
    """
    text = methods_page(referee.read(record or data_path("runs", f"{referee.NAME}.json")))
    if page.exists() and page.read_text(encoding="utf-8") == text:
        return []
    write_atomically(page, text.encode())
    return [page]


def anchor(method: str) -> str:
    """A card's anchor on the page, as MyST-Parser makes it from the heading: LoRA has ``lora``, LoRA+ ``lora-1``."""
    alike = dict.fromkeys(each.method for each in registered_entrants() if _slug(each.method) == _slug(method))
    place = list(alike).index(method) if method in alike else 0
    return f"{_slug(method)}-{place}" if place else _slug(method)


def _slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def _table(task: Task, entrants: Iterable[Entrant], found: Standings, base: list[dict[str, Any]]) -> Iterator[str]:
    """One task's results, the best first, those that are missing last."""
    heads = ["", f"test {task.metric}", f"against {REFERENCE}", "plain loss", "rate", "batch"]
    heads += ["numbers trained", "file", "step", "memory"]
    yield f"| {' | '.join(heads)} |"
    yield f"|{'---|' * len(heads)}"
    method = {entrant.name: entrant.method for entrant in entrants}
    measured = [(name, each) for name, each in found.items() if each]
    for name, each in ranked(task, measured):
        yield _row(f"[{name}](#{anchor(method[name])})", *_cells(task, name, each, found.get(REFERENCE)))
    for line in base[-1:]:
        score = line["test accuracy"] if task.classes else line["test"]
        yield _row("*the base as it comes*", _number(task, score), "", _loss(line.get("plain")), *[""] * 6)
    for name, missing in found.items():
        if missing is None:
            yield _row(f"[{name}](#{anchor(method[name])})", NOT_YET, *[""] * 8)


def _cells(task: Task, name: str, each: Standing, reference: Standing | None) -> list[str]:
    compared = "" if reference is None or name == REFERENCE else verdict(task, each.score, reference.score)
    plain = f"{each.plain.mean:.3f} ± {each.plain.sd:.3f}" if each.plain else ""
    step = "" if each.step_ratio is None else f"{each.step_ratio:.2f}"
    memory = "" if each.peak_bytes is None else f"{each.peak_bytes / 2**20:,.0f} MiB"
    rate = f"{each.rate:g}" + (r"\*" if each.at_edge else "")
    numbers = f"{each.trainable:,}"
    return [_result(task, each), compared, plain, rate, str(each.batch), numbers, _size(each.file_bytes), step, memory]


def _card(method: str, entrants: list[Entrant], found: dict[str, Standings], plan: Plan) -> Iterator[str]:
    """A method's heading, its paragraphs, and its results in a list."""
    card = entrants[0].card
    yield from [f"### {method}", "", card["Idea"], "", f"`{card['Formula']}`", ""]
    for word in ("Cost", "Merging", "Papers"):
        yield from [f"**{word}.** {card[word][0].upper()}{card[word][1:]}", ""]
    yield from ["**Our result**", ""]
    for entrant in entrants:
        results = []
        for name, task in plan.tasks.items():
            if entrant.name not in found[name]:
                continue
            own, reference = found[name][entrant.name], found[name].get(REFERENCE)
            said = NOT_YET if own is None else _result(task, own)
            if own and reference and entrant.name != REFERENCE:
                said += f" ({verdict(task, own.score, reference.score)})"
            results.append(f"{task.title or name} {said}")
        yield f"- `{entrant.name}`: {'; '.join(results)}"


def _result(task: Task, each: Standing) -> str:
    """The score with its spread, and how many seeds came to nothing."""
    mean, sd = each.score.mean, each.score.sd
    said = f"{100 * mean:.1f} ± {100 * sd:.1f} %" if task.classes else f"{mean:.3f} ± {sd:.3f}"
    for number, ended in ((each.diverged, "diverged"), (each.at_chance, "at chance")):
        said += f", {number} {'seed' if number == 1 else 'seeds'} {ended}" if number else ""
    return said


def _number(task: Task, value: float | None) -> str:
    return f"{100 * value:.1f} %" if task.classes and value is not None else _loss(value)


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _size(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e6 else f"{size / 1e3:,.0f} kB"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
