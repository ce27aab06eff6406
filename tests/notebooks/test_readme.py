"""The README: its picture is a lesson's, its times are the recorded ones, its links resolve."""

import base64
import re

from lora_edu.course.notebooks.runs import recorded_times
from lora_edu.course.notebooks.stored import LESSONS, list_notebooks, read
from lora_edu.files import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_picture_is_one_that_lesson_04_shows():
    notebook = read(LESSONS / "04_lora_in_a_model.ipynb")
    shown = [
        base64.b64decode(output.data["image/png"])
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert (ROOT / "book" / "_static" / "result.png").read_bytes() in shown
    alt = re.search(r"!\[(.+)\]\(book/_static/result.png\)", README)
    assert alt
    assert any(alt[1] in "".join(output.get("text", "")) for c in notebook.cells for output in c.get("outputs", []))


def test_every_lesson_is_in_the_map_with_its_recorded_time():
    seconds = recorded_times()["seconds"]
    rows = dict(re.findall(r"^\| \[.+?\]\(lessons/(\w+)\.ipynb\) \|.*\| (\d+) s \|$", README, re.M))
    assert list(rows) == [path.stem for path in list_notebooks(LESSONS)]
    assert rows == {name: f"{seconds[name]:.0f}" for name in rows}


def test_links_within_the_repository_resolve():
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []
