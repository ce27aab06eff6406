"""Every lesson gives slides to teach with: 8 to 15 of them, in one file that loads nothing from elsewhere."""

import re
from html.parser import HTMLParser

import pytest

from lora_edu.course.notebooks.inspection import SLIDES
from lora_edu.course.notebooks.stored import LESSONS, list_notebooks, read, title
from lora_edu.course.publish.export import export


class Deck(HTMLParser):
    """Counts the sections that hold no other section, which is what reveal.js shows one at a time."""

    def __init__(self, text):
        super().__init__()
        self.open, self.slides, self.foreign = [], 0, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        source = values.get("src") if tag in ("script", "img", "iframe") else None
        source = values.get("href") if tag == "link" else source
        if source and not source.startswith("data:"):
            self.foreign.append(source)
        if tag == "section":
            if self.open:
                self.open[-1] = True
            self.open.append(False)

    def handle_endtag(self, tag):
        if tag == "section":
            self.slides += not self.open.pop()


@pytest.mark.parametrize("path", list_notebooks(LESSONS), ids=lambda path: path.stem)
def test_slides(path, tmp_path):
    text = export(str(path), "slides", tmp_path / "slides.html").read_text(encoding="utf-8")
    deck = Deck(re.sub(r"<script\b[^>]*>.*?</script>", "", text, flags=re.S))
    assert deck.open == []
    assert deck.slides in SLIDES
    assert deck.foreign == []
    assert f"<title>{title(read(path))}" in text
