"""The ledger of claims: what it refuses, the page made from it, and which claims in a lesson lack their link."""

import copy
import json

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from lora_edu.course.notebooks.stored import normalise, write
from lora_edu.course.publish import book
from lora_edu.course.publish.claims import claims_page, lessons_by_claim, read_ledger, refresh, unlinked_claims

LEDGER = {
    "about": "Two texts.",
    "explainers": {"000": "A note.", "002": "A lesson."},
    "verdicts": {"true": "It holds.", "false": "It does not hold.", "faulty": "Code."},
    "claims": [
        {
            "id": "000-35",
            "said": "The rate is ten times as high.",
            "verdict": "true",
            "figure": "Ten to forty times; see S002-b.",
            "shown": [],
            "source": [{"title": "A paper", "url": "https://arxiv.org/abs/2106.09685"}],
        },
        {
            "id": "S002-b",
            "said": "A layer starts A too large.",
            "verdict": "faulty",
            "figure": "By √(in / r).",
            "shown": [],
            "source": [{"title": "A repository", "url": "https://github.com/microsoft/LoRA/issues/61"}],
        },
    ],
}


@pytest.fixture
def lessons(tmp_path):
    """Two lessons of another name than the course's: one names both claims, the other one of them in its code only."""
    texts = {"07_rates": ["# 07 Rates", "000-35 and S002-b"], "31_last": ["# 31 The last", "again S002-b"]}
    for name, cells in texts.items():
        notebook = new_notebook(cells=[new_markdown_cell(text) for text in cells] + [new_code_cell("# 000-35")])
        write(normalise(notebook), tmp_path / "lessons" / f"{name}.ipynb")
    return tmp_path / "lessons"


def stored(tmp_path, content):
    path = tmp_path / "claims.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def changed(**fields):
    content = copy.deepcopy(LEDGER)
    content["claims"][0].update(fields)
    return content


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({**LEDGER, "note": ""}, "expected an object with about, explainers, verdicts, claims"),
        (
            {**LEDGER, "claims": [{"id": "000-35"}]},
            "claim 0 is {'id': '000-35'} …: expected an object with id, said, verdict",
        ),
        ({**LEDGER, "claims": LEDGER["claims"][::-1]}, "000-35 stands after S002-b"),
        ({**LEDGER, "claims": LEDGER["claims"][:1] * 2}, "000-35 stands after 000-35: expected each id once"),
        (changed(id="000-5"), "000-5: expected an id such as 000-35"),
        (changed(id="001-35"), "001-35: there is no explainer 001; there are 000, 002"),
        (changed(verdict="maybe"), "000-35: verdict='maybe': expected one of true, false, faulty"),
        (changed(figure="ten times"), "000-35: figure='ten times': expected whole sentences"),
        (changed(said=""), "000-35: said='': expected whole sentences"),
        (changed(shown=["7"]), "000-35: shown has '7': expected numbers of lessons"),
        (changed(source=[]), "000-35: no source: expected at least one"),
        (changed(source=[{"title": "A paper", "url": "arxiv.org"}]), "a url that starts with https://"),
        (changed(source=[{"url": "https://arxiv.org"}]), "expected a title, and a url"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_ledger_must_not_be(tmp_path, content, words):
    with pytest.raises(ValueError, match=r"claims\.json: ") as error:
        read_ledger(stored(tmp_path, content))
    assert words in str(error.value)


def test_a_ledger_that_is_no_json(tmp_path):
    (tmp_path / "claims.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"claims\.json is no JSON: .*line 1"):
        read_ledger(tmp_path / "claims.json")


def test_refreshing_fills_in_the_lessons_and_writes_the_page_once(tmp_path, lessons):
    ledger, page = stored(tmp_path, LEDGER), tmp_path / "book" / "claims.md"
    assert lessons_by_claim(lessons) == {"000-35": ["07"], "S002-b": ["07", "31"]}
    assert refresh(ledger, page, lessons) == [ledger, page]
    assert [claim.shown for claim in read_ledger(ledger).claims] == [["07"], ["07", "31"]]
    assert page.read_text(encoding="utf-8") == claims_page(read_ledger(ledger), lessons)
    assert refresh(ledger, page, lessons) == []


def test_the_page(tmp_path, lessons):
    ledger = stored(tmp_path, LEDGER)
    refresh(ledger, tmp_path / "claims.md", lessons)
    text = claims_page(read_ledger(ledger), lessons)
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        "# Claims", "## Explainer 000", "### 000-35", "## Explainer 002", "### S002-b",
    ]  # fmt: skip
    assert "**True.** Ten to forty times; see [S002-b](#s002-b).\n" in text
    assert "- Lessons: [07 Rates](../lessons/07_rates.ipynb); [31 The last](../lessons/31_last.ipynb)\n" in text
    assert "- Sources: [A paper](https://arxiv.org/abs/2106.09685)\n" in text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("| [000-35](../book/claims.md#000-35) | ten | true |", []),
        ("Entry [S002-b](../../book/claims.md#s002-b).", []),
        ("`000-35`\n\n```\nS002-b\n```\n\narXiv 2106.09685", []),
        ("| 000-35 | ten |", ["cell 0: 000-35 does not link to its entry: [000-35](../book/claims.md#000-35)"]),
        ("(001-14)", ["cell 0: 001-14 is not in data/claims.json", "cell 0: 001-14 does not link"]),
        ("[001-14](../book/claims.md#001-14)", ["cell 0: 001-14 is not in data/claims.json"]),
        ("[S002-b](../book/claims.md#S002-b)", ["cell 0: S002-b does not link"]),
        ("[000-35](../book/claims.md#000-36)", ["cell 0: 000-35 does not link"]),
        ("[000-35](claims.md#000-35)", ["cell 0: 000-35 does not link"]),
    ],
)
def test_claims_without_their_link(text, words):
    notebook = new_notebook(cells=[new_markdown_cell(text), new_code_cell("# 000-35")])
    found = list(unlinked_claims(notebook, {"000-35", "S002-b"}))
    assert len(found) == len(words)
    assert all(sentence.startswith(word) for sentence, word in zip(found, words, strict=True))


@pytest.mark.parametrize(("up", "written"), [("../", "../book"), ("../../", "../../book"), ("", "book")])
def test_links_to_a_claim_lead_to_the_books_page(up, written):
    assert book._relink(f"[000-35]({written}/claims.md#000-35)", up) == f"[000-35]({up}claims.md#000-35)"
    assert book._relink(f"[Claims]({written}/claims.md), [lesson](03_x.ipynb)", up) == (
        f"[Claims]({up}claims.md), [lesson](03_x.ipynb)"
    )
