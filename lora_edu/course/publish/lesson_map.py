"""What the book says of all lessons together: table, map, routes, and links that follow a lesson to a new number."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from textwrap import wrap

from lora_edu.course.notebooks.stored import NotebookError, list_notebooks, read, title
from lora_edu.files import ROOT

ELECTIVES = range(16, 26)
ROUTES = {
    "workshop": ["00", "03", "04", "07"],
    "week": [f"{number:02d}" for number in range(14)],
    "core": [*(f"{number:02d}" for number in range(16)), "26"],
    "semester": ["00+01", "02", "03", "04+05", "06", "07", "08", "09", "10+11", "12+13", "14+15", "26"],
}
BLANK = re.compile(r"\{\{ (\w+)(?: (\w+))? \}\}")
WIDTH, HEIGHT, GAP, COLUMNS = 250, 80, 30, 3  # of the boxes on the map, in the drawing's units
LETTERS, LINE = {"title": 25, "take-away": 32}, 17  # letters that fit into a box's line, and the height of a line


@dataclass(frozen=True)
class Lesson:
    """What the map knows of a lesson: ``needs`` are the numbers of other lessons, ``time`` is what its box says."""

    name: str
    title: str
    take_away: str
    needs: tuple[str, ...]
    time: str
    seconds: float | None

    @property
    def number(self) -> str:
        """The two digits that the file's name begins with."""
        return self.name[:2]

    @property
    def elective(self) -> bool:
        """Whether the core can be read without it."""
        return int(self.number) in ELECTIVES


def read_lessons(folder: Path, seconds: dict[str, float], readme: Path = ROOT / "README.md") -> list[Lesson]:
    """All lessons of a folder: what to take away from the README's map, the rest from the boxes of the notebooks.

    Raises:
        NotebookError: if the README's map has no row for one of them.
    """
    rows = re.findall(r"^\| \[.+?\]\(lessons/(\w+)\.ipynb\) \| (.+?) \|", readme.read_text(encoding="utf-8"), re.M)
    take_aways = dict(rows)
    lessons = []
    for path in list_notebooks(folder):
        if path.stem not in take_aways:
            raise NotebookError(f"{path.stem} has no row in the map of README.md: add one, with what to take away")
        notebook = read(path)
        box = "\n".join(cell.source for cell in notebook.cells[:3])
        needs = re.search(r"^> \*\*You need\*\*(.*)", box, re.M)
        time = re.search(r"^> \*\*Time\*\* (.*)", box, re.M)
        lessons.append(
            Lesson(
                name=path.stem,
                title=title(notebook),
                take_away=take_aways[path.stem],
                needs=_earlier(needs[1], path.stem) if needs else (),
                time=_own_time(time[1]) if time else "",
                seconds=seconds.get(path.stem),
            )
        )
    return lessons


def table(lessons: Sequence[Lesson]) -> str:
    """The map of the start page: a row a lesson, with what to take away and how long it takes."""
    rows = ["| lesson | the one thing to take away | your time | runs in |", "|---|---|---|---|"]
    for lesson in lessons:
        runs = "–" if lesson.seconds is None else f"{lesson.seconds:.0f}\u00a0s"
        rows.append(f"| {_link(lesson.title, lesson)} | {lesson.take_away} | {lesson.time} | {runs} |")
    return "\n".join(rows)


def needs_table(lessons: Sequence[Lesson]) -> str:
    """What each lesson builds on, and which lessons build on it."""
    by_number = {lesson.number: lesson for lesson in lessons}
    rows = ["| lesson | builds on | needed in |", "|---|---|---|"]
    for lesson in lessons:
        before = [by_number[number] for number in lesson.needs if number in by_number]
        after = [other for other in lessons if lesson.number in other.needs]
        cells = [", ".join(_link(other.number, other) for other in others) or "–" for others in (before, after)]
        kind = " (elective)" if lesson.elective else ""
        rows.append(f"| {_link(lesson.title, lesson)}{kind} | {cells[0]} | {cells[1]} |")
    return "\n".join(rows)


def planned(lessons: Sequence[Lesson]) -> str:
    """The sentence below the routes, while they name lessons that are not there yet."""
    there = {lesson.number for lesson in lessons}
    missing = {number for stops in ROUTES.values() for stop in stops for number in stop.split("+")} - there
    return "Numbers without a link are lessons that are planned and not there yet." if missing else ""


def drawing(lessons: Sequence[Lesson]) -> str:
    """The map as SVG: below each lesson stand those that build on it; lines that follow from others are left out."""
    rows = _rows(lessons)
    full = WIDTH * COLUMNS + GAP * (COLUMNS - 1)
    places = {}
    for down, row in enumerate(rows):
        left = (full - len(row) * WIDTH - (len(row) - 1) * GAP) / 2
        for across, lesson in enumerate(row):
            places[lesson.number] = (left + across * (WIDTH + GAP), down * (HEIGHT + GAP) + 2)
    parts = []
    for lesson in lessons:
        x, y = places[lesson.number]
        for number in _direct_needs(lesson, lessons):
            above, bottom = places[number][0] + WIDTH / 2, places[number][1] + HEIGHT
            middle = x + WIDTH / 2
            parts.append(f'<path d="M{above:g} {bottom:g} L{middle:g} {y:g}"/>')
    for lesson in lessons:
        x, y = places[lesson.number]
        box = f'<rect x="{x:g}" y="{y:g}" width="{WIDTH}" height="{HEIGHT}" rx="6"/>'
        texts = {"title": lesson.title, "take-away": lesson.take_away}
        lines = [(kind, line) for kind in texts for line in wrap(texts[kind], LETTERS[kind], break_on_hyphens=False)]
        top = y + (HEIGHT - len(lines) * LINE) / 2 + LINE - 4
        for place, (kind, line) in enumerate(lines):
            box += f'<text class="{kind}" x="{x + 12:g}" y="{top + place * LINE:g}">{escape(line)}</text>'
        part = "elective" if lesson.elective else "core"
        parts.append(f'<a class="{part}" href="lessons/{lesson.name}.html">{box}</a>')
    size = f'viewBox="-2 0 {full + 4} {len(rows) * (HEIGHT + GAP) - GAP + 4}"'
    label = "The lessons in the order in which they build on each other; the table below says the same."
    drawn = "\n".join([f'<svg class="lesson-map" {size} aria-label="{label}">', *parts, "</svg>"])
    return f"```{{raw}} html\n{drawn}\n```"


def fill(text: str, lessons: Sequence[Lesson]) -> str:
    """Fill a page's blanks.

    ``{{ lora_layer }}`` links a lesson by its name without the number, ``{{ route week }}`` lists a route, and
    ``{{ table }}``, ``{{ map }}``, ``{{ needs }}`` and ``{{ planned }}`` are made by the functions above.

    Raises:
        NotebookError: for a blank that names nothing.
    """
    views = {"table": table, "map": drawing, "needs": needs_table, "planned": planned}
    named = {lesson.name[3:]: lesson for lesson in lessons}

    def value(found: re.Match[str]) -> str:
        word, route = found.groups()
        if word == "route" and route in ROUTES:
            return _route(ROUTES[route], lessons)
        if route is None and word in views:
            return views[word](lessons)
        if route is None and word in named:
            return _link(f"lesson\u00a0{named[word].number}", named[word])
        known = [*views, *(f"route {name}" for name in ROUTES), *named]
        raise NotebookError(f"{found[0]} names nothing: expected one of {', '.join(known)}")

    return BLANK.sub(value, text)


def _earlier(line: str, name: str) -> tuple[str, ...]:
    return tuple(sorted({number for number in re.findall(r"\((\d\d)_\w+\.ipynb", line) if number < name[:2]}))


def _own_time(line: str) -> str:
    """The reader's part of a Time line, shortened; what the machine takes is measured."""
    parts = [part for part in line.split(", ") if not part.endswith("to run")]
    return ", ".join(parts).replace(" minutes", " min").replace(" hours", " h")


def _link(words: str, lesson: Lesson) -> str:
    return f"[{words}](lessons/{lesson.name}.ipynb)"


def _route(stops: Sequence[str], lessons: Sequence[Lesson]) -> str:
    by_number = {lesson.number: lesson for lesson in lessons}

    def link(found: re.Match[str]) -> str:
        return _link(found[0], by_number[found[0]]) if found[0] in by_number else found[0]

    return re.sub(r"\d\d", link, ", ".join(stops))


def _all_needs(lesson: Lesson, lessons: Sequence[Lesson]) -> set[str]:
    """The lessons that must come first, those included that its own needs need."""
    direct = [other for other in lessons if other.number in lesson.needs]
    return {other.number for other in direct}.union(*(_all_needs(other, lessons) for other in direct))


def _direct_needs(lesson: Lesson, lessons: Sequence[Lesson]) -> list[str]:
    """Its needs without those that another of them needs already."""
    direct = [other for other in lessons if other.number in lesson.needs]
    implied = set().union(*(_all_needs(other, lessons) for other in direct))
    return [other.number for other in direct if other.number not in implied]


def _rows(lessons: Sequence[Lesson]) -> list[list[Lesson]]:
    """The lessons by how many must come before them, at most ``COLUMNS`` to a row."""
    depth: dict[str, int] = {}
    for lesson in lessons:
        depth[lesson.number] = 1 + max((depth[number] for number in lesson.needs if number in depth), default=-1)
    rows = []
    for level in sorted(set(depth.values())):
        together = [lesson for lesson in lessons if depth[lesson.number] == level]
        rows += [together[start : start + COLUMNS] for start in range(0, len(together), COLUMNS)]
    return rows
