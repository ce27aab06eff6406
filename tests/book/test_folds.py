"""What a lesson folds is folded in the book, in exported pages and in slides, and what is inside stays Markdown."""

import re
import shutil

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from lora_edu.course.notebooks.stored import LESSONS, find_notebook, normalise, read, write
from lora_edu.course.publish import book
from lora_edu.course.publish.export import export

pytestmark = pytest.mark.book
ANSWER = """<details><summary>Answer</summary>

(c). *Every* sum is **rounded**: $a + b$ is not $b + a$, and

$$W = \\sum_i \\sigma_i\\, u_i v_i^\\top$$

- one `item`

| claim | verdict |
|---|---|
| 000-35 | true |

</details>"""


def code(source, printed, tags, slide):
    output = new_output("stream", text=printed)
    return new_code_cell(source, outputs=[output], execution_count=1, metadata={"tags": tags, **slides(slide)})


def slides(kind):
    return {"slideshow": {"slide_type": kind}}


@pytest.fixture(scope="module")
def lesson(tmp_path_factory):
    path = tmp_path_factory.mktemp("lesson") / "99_small.ipynb"
    cells = [
        new_markdown_cell("# 99 Small", metadata=slides("slide")),
        code("draw()", "the drawing", ["hide-input"], "fragment"),
        new_markdown_cell("## A question", metadata=slides("slide")),
        code("ask()", "the answer", ["hide-output"], "fragment"),
        new_markdown_cell(ANSWER, metadata=slides("fragment")),
        code("draw_again()", "the second drawing", ["hide-input", "hide-output"], "fragment"),
    ]
    write(normalise(new_notebook(cells=cells)), path)
    return path


@pytest.fixture(scope="module")
def page(lesson, tmp_path_factory):
    folder = tmp_path_factory.mktemp("book")
    source = folder / "src"
    source.mkdir()
    shutil.copy(book.BOOK / "conf.py", source)
    shutil.copytree(book.BOOK / "_static", source / "_static")
    shutil.copy(lesson, source / "index.ipynb")
    book.render(source, folder / "html")
    return (folder / "html" / "index.html").read_text(encoding="utf-8")


def folds(text):
    """The closed details elements of a page, by the words that stand on them; nested ones do not occur."""
    found = re.findall(r"<details[^>]*>\s*<summary[^>]*>(.*?)</summary>(.*?)</details>", text, re.S)
    return [(re.sub(r"<[^>]+>|\s+", " ", summary).split("Hide")[0].strip(), inside) for summary, inside in found]


def test_an_answer_is_markdown_in_the_book(page):
    answer = dict(folds(page))["Answer"]
    for element in ("<em>Every</em>", "<strong>rounded</strong>", "<li>", "<table"):
        assert element in answer
    assert len(re.findall(r'<(?:div|span) class="math', answer)) == 3
    assert "**" not in answer
    assert "$$" not in answer


def test_code_and_outputs_are_folded_in_the_book(page):
    words = [summary for summary, _ in folds(page)]
    assert words == ["Show the code", "Show the output", "Answer", "Show the code", "Show the output"]
    assert "the drawing" not in "".join(inside for _, inside in folds(page))
    assert "the answer" in dict(folds(page)[:2])["Show the output"]


def test_nothing_is_blurred():
    assert "blur" not in (book.BOOK / "_static" / "lora_edu.css").read_text(encoding="utf-8")


def test_exported_pages_fold_the_same(lesson, tmp_path):
    text = export(str(lesson), "html", tmp_path / "page.html").read_text(encoding="utf-8")
    body = text[text.index("<body") :]
    words = [summary for summary, _ in folds(body)]
    assert words == ["Show the code", "Show the output", "Answer", "Show the code", "Show the output"]
    assert "<strong>rounded</strong>" in dict(folds(body))["Answer"]


def test_slides_leave_folded_code_out_and_let_outputs_wait(lesson, tmp_path):
    text = export(str(lesson), "slides", tmp_path / "slides.html").read_text(encoding="utf-8")
    body = re.sub(r"<script\b[^>]*>.*?</script>", "", text[text.index("<body") :], flags=re.S)
    shown = re.sub(r"<[^>]+>", "", body)
    assert "ask()" in shown
    assert "draw" not in shown.replace("drawing", "")
    waiting = re.findall(r'<div class="fragment">\s*<div class="jp-Cell-outputWrapper">.*?</pre>', body, re.S)
    assert len(waiting) == 1  # the second drawing waits for its cell's key press
    assert "the answer" in waiting[0]
    assert re.search(r"<details open[^>]*>\s*<summary>Answer</summary>", body)


def test_a_your_turn_cell_shows_its_stub_and_folds_its_solution(tmp_path):
    path = find_notebook("01", LESSONS)
    book._stage_notebook(path, tmp_path / path.name)
    cells = read(tmp_path / path.name).cells
    turns = [index for index, cell in enumerate(cells) if "your-turn" in cell.metadata.get("tags", [])]
    assert turns
    for index in turns:
        assert "hide-input" in cells[index].metadata.tags
        assert cells[index - 1].source == f"```python\n{cells[index].metadata.stub}\n```"
