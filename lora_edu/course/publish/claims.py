"""The ledger of claims in ``data/claims.json``: read and checked, laid out as a page, and linked from the lessons."""

import itertools
import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbformat import NotebookNode

from lora_edu.course.notebooks.stored import LESSONS, list_notebooks, read, title
from lora_edu.files import ROOT, data_path, write_atomically

PAGE = ROOT / "book" / "claims.md"
ID = re.compile(r"\b(?:00\d-\d\d|S00\d-[a-z])\b")  # 000-35: sentence 35 of explainer 000; S002-b: its second snippet
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]*)\)")
CODE = re.compile(r"```.*?```|`[^`]*`", re.S)
HEAD = ["about", "explainers", "verdicts", "claims"]


@dataclass(frozen=True)
class Claim:
    """One entry of the ledger.

    Args:
        id: such as "000-35", or "S002-b" for code; the three digits name the explainer.
        said: what is said, in one sentence of our own.
        verdict: one of the ledger's verdicts.
        figure: the right figure, or the right sentence.
        shown: the numbers of the lessons that name it.
        source: the title and the address of each primary source.
    """

    id: str
    said: str
    verdict: str
    figure: str
    shown: list[str]
    source: list[dict[str, str]]

    @property
    def explainer(self) -> str:
        """The number of the text that says it."""
        return self.id.removeprefix("S")[:3]


@dataclass(frozen=True)
class Ledger:
    """All claims in the order of their ids, what the explainers are, and what each verdict means."""

    about: str
    explainers: dict[str, str]
    verdicts: dict[str, str]
    claims: list[Claim]


def read_ledger(path: Path | None = None) -> Ledger:
    """The ledger, checked; by default that of the course's data folder.

    Raises:
        ValueError: if it is no JSON, or an entry is not as it should be; the message names the entry and the field.
    """
    path = path or data_path("claims.json")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name} is no JSON: {error}") from error
    for problem in problems_of(content):
        raise ValueError(f"{path.name}: {problem}")
    return Ledger(**{**content, "claims": [Claim(**entry) for entry in content["claims"]]})


def problems_of(content: Any) -> Iterator[str]:
    """What is wrong with a ledger as it comes from JSON, one sentence each, in the order in which to mend it."""
    if not isinstance(content, dict) or list(content) != HEAD:
        yield f"expected an object with {', '.join(HEAD)}, in this order"
        return
    fields = list(Claim.__dataclass_fields__)
    ids: list[str] = []
    for place, entry in enumerate(content["claims"]):
        if not isinstance(entry, dict) or list(entry) != fields:
            yield f"claim {place} is {str(entry)[:60]} …: expected an object with {', '.join(fields)}, in this order"
            return
        yield from (f"{entry['id']}: {problem}" for problem in _problems_of_entry(entry, content))
        ids.append(entry["id"])
    for before, after in itertools.pairwise(ids):
        if _place(before) >= _place(after):
            yield f"{after} stands after {before}: expected each id once, numbers before code, in rising order"


def _problems_of_entry(entry: dict[str, Any], content: dict[str, Any]) -> Iterator[str]:
    if not ID.fullmatch(entry["id"]):
        yield "expected an id such as 000-35, or S002-b for code"
        return
    if (explainer := entry["id"].removeprefix("S")[:3]) not in content["explainers"]:
        yield f"there is no explainer {explainer}; there are {', '.join(content['explainers'])}"
    for field in ("said", "figure"):
        if not str(entry[field]).endswith((".", "?")):
            yield f"{field}={entry[field]!r}: expected whole sentences, which end with a full stop"
    if entry["verdict"] not in content["verdicts"]:
        yield f"verdict={entry['verdict']!r}: expected one of {', '.join(content['verdicts'])}"
    for number in entry["shown"]:
        if not re.fullmatch(r"\d\d", number):
            yield f"shown has {number!r}: expected numbers of lessons, such as '03'"
    if not entry["source"]:
        yield "no source: expected at least one, with title and url"
    for source in entry["source"]:
        if list(source) != ["title", "url"] or not re.fullmatch(r"https://[^\s()]+", source["url"]):
            yield f"source={source}: expected a title, and a url that starts with https:// and has no brackets"


def claims_page(ledger: Ledger, lessons: Path = LESSONS) -> str:
    """The ledger as a Markdown page for ``book/``: a section for each explainer, a heading for each claim."""
    names = {path.name[:2]: f"[{title(read(path))}](../lessons/{path.name})" for path in list_notebooks(lessons)}
    lines = ["# Claims", "", ledger.about, "", "| verdict | what it means |", "|---|---|"]
    lines += [f"| {verdict} | {meaning} |" for verdict, meaning in ledger.verdicts.items()]
    for explainer, what in ledger.explainers.items():
        lines += ["", f"## Explainer {explainer}", "", what]
        for claim in (claim for claim in ledger.claims if claim.explainer == explainer):
            where = "; ".join(names.get(number, number) for number in claim.shown) or "none yet"
            sources = "; ".join(f"[{source['title']}]({source['url']})" for source in claim.source)
            lines += ["", f"### {claim.id}", "", f"Said: {claim.said}", ""]
            lines += [f"**{claim.verdict.capitalize()}.** {ID.sub(_link_here, claim.figure)}", ""]
            lines += [f"- Lessons: {where}", f"- Sources: {sources}"]
    note = "<!-- Written by lora-edu lessons claims from data/claims.json; do not edit it here. -->"
    return "\n".join([note, "", *lines]) + "\n"


def lessons_by_claim(lessons: Path = LESSONS) -> dict[str, list[str]]:
    """Claim's id → the numbers of the lessons whose Markdown names it."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in list_notebooks(lessons):
        text = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
        for name in sorted(set(ID.findall(text))):
            found[name].append(path.name[:2])
    return dict(found)


def refresh(ledger: Path | None = None, page: Path = PAGE, lessons: Path = LESSONS) -> list[Path]:
    """Fill ``shown`` in the ledger from the lessons, write the page, and return the files that changed.

    Raises:
        ValueError: if the ledger is not as it should be.
    """
    ledger = ledger or data_path("claims.json")
    read_ledger(ledger)
    content = json.loads(ledger.read_text(encoding="utf-8"))
    shown = lessons_by_claim(lessons)
    for entry in content["claims"]:
        entry["shown"] = shown.get(entry["id"], [])
    changed = _write_if_new(ledger, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return changed + _write_if_new(page, claims_page(read_ledger(ledger), lessons))


def unlinked_claims(notebook: NotebookNode, known: Collection[str]) -> Iterator[str]:
    """The claims in a notebook's Markdown that are not in the ledger, or do not link to their entry in it.

    Args:
        notebook: a lesson, a solution or an exercise; ids inside code need no link.
        known: the ids of the ledger.
    """
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type != "markdown":
            continue
        text = CODE.sub("", cell.source)
        for name in ID.findall(LINK.sub(r"\1", text)):
            if name not in known:
                yield f"cell {index}: {name} is not in data/claims.json"
        for name in ID.findall(LINK.sub(lambda link: "" if _is_right(link) else link[1], text)):
            yield f"cell {index}: {name} does not link to its entry: [{name}](../book/claims.md#{anchor(name)})"


def anchor(name: str) -> str:
    """A claim's anchor on the page, as GitHub and MyST-Parser make it from the heading."""
    return name.lower()


def _is_right(link: re.Match[str]) -> bool:
    return re.fullmatch(rf"(\.\./)+book/claims\.md#{re.escape(anchor(link[1]))}", link[2]) is not None


def _link_here(found: re.Match[str]) -> str:
    return f"[{found[0]}](#{anchor(found[0])})"


def _place(name: str) -> tuple[str, bool, str]:
    number = name.removeprefix("S")
    return number[:3], name.startswith("S"), number


def _write_if_new(path: Path, text: str) -> list[Path]:
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return []
    write_atomically(path, text.encode())
    return [path]
