"""The book: builds without a warning, its links lead somewhere, and it opens in a browser, all from its own files."""

import functools
import http.server
import re
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from lora_edu.core.entrants import registered_entrants
from lora_edu.course.doctor import browser
from lora_edu.course.notebooks.stored import LESSONS, SOLUTIONS, list_notebooks
from lora_edu.course.publish import book, export
from lora_edu.course.publish.claims import anchor, read_ledger
from lora_edu.course.publish.methods import anchor as methods_anchor

pytestmark = pytest.mark.book
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
]


class Page(HTMLParser):
    """The links, anchors and images of one page."""

    def __init__(self, path):
        super().__init__()
        self.links, self.anchors, self.images, self.sources = [], {""}, [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.anchors |= {values[key] for key in ("id", "name") if values.get(key)}
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        if tag == "img":
            self.images.append(values)
        if tag in ("script", "img", "iframe") and values.get("src"):
            self.sources.append(values["src"])
        if tag == "link" and values.get("rel") in ("stylesheet", "preload", "icon", "preconnect"):
            self.sources.append(values.get("href", ""))


@pytest.fixture(scope="module")
def html():
    return book.build().parent


@pytest.fixture(scope="module")
def pages(html):
    return {path: Page(path) for path in html.rglob("*.html")}


def test_every_lesson_solution_and_module_has_a_page(html):
    wanted = [f"lessons/{path.stem}.html" for path in list_notebooks(LESSONS)]
    wanted += [f"lessons/solutions/{path.stem}.html" for path in list_notebooks(SOLUTIONS)]
    wanted += [f"lessons/exercises/{path.stem}.html" for path in list_notebooks(SOLUTIONS)]
    wanted += ["lessons/my_adapter.html"]
    wanted += [f"api/{name}.html" for name in book.modules()]
    wanted += ["index.html", "data/README.html", "licences.html", "contributing.html", "changelog.html", "search.html"]
    wanted += [
        "teaching.html",
        "hosted.html",
        "map.html",
        "glossary.html",
        "claims.html",
        "methods.html",
        "other_tools.html",
    ]
    assert [name for name in wanted if not (html / name).exists()] == []


def test_links_inside_the_book_lead_somewhere(html, pages):
    dead = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            known = pages.get(target)
            if not target.exists() or (known and unquote(parts.fragment) not in known.anchors):
                dead.append(f"{path.relative_to(html)}: {link}")
    assert dead == []


def test_nothing_is_loaded_from_elsewhere(html, pages):
    foreign = [
        f"{path.relative_to(html)}: {source}"
        for path, page in pages.items()
        for source in page.sources
        if urlsplit(source).scheme not in ("", "data") or urlsplit(source).netloc
    ]
    assert foreign == []


def test_images_have_alternative_text(html, pages):
    bare = [path.relative_to(html) for path, page in pages.items() for image in page.images if not image.get("alt")]
    assert bare == []


def test_lessons_and_library_link_to_each_other(html, pages):
    lesson, module = html / "lessons" / "03_lora_layer.html", html / "api" / "lora_edu.core.layer.html"
    assert "../api/lora_edu.core.layer.html#lora_edu.core.layer.LoRALinear" in pages[lesson].links
    assert "../lessons/03_lora_layer.html" in pages[module].links


def test_every_claim_has_its_id_as_an_address(html, pages):
    assert {anchor(claim.id) for claim in read_ledger().claims} <= pages[html / "claims.html"].anchors


def test_every_method_has_a_card_with_an_address(html, pages):
    methods = {entrant.method for entrant in registered_entrants()}
    assert {methods_anchor(method) for method in methods} <= pages[html / "methods.html"].anchors


def test_predicted_outputs_and_solutions_are_folded(html):
    assert 'class="admonition hide above-input' in (html / "lessons/solutions/03_lora_layer.html").read_text(
        encoding="utf-8"
    )
    assert "<details" in (html / "lessons" / "03_lora_layer.html").read_text(encoding="utf-8")


def test_every_blank_of_the_books_own_pages_is_filled(html):
    texts = {page.stem: (html / f"{page.stem}.html").read_text(encoding="utf-8") for page in book.BOOK.glob("*.md")}
    assert [name for name, text in texts.items() if "{{" in text] == []


def test_the_start_page_and_the_map_lead_to_every_lesson(html, pages):
    lessons = {f"lessons/{path.stem}.html" for path in list_notebooks(LESSONS)}
    for name in ("index.html", "map.html"):
        assert lessons <= set(pages[html / name].links)
    drawn = re.search(r"<svg class=\"lesson-map\".*?</svg>", (html / "map.html").read_text(encoding="utf-8"), re.S)
    assert set(re.findall(r'href="([^"]+)"', drawn[0])) == lessons
    assert any(image["src"].endswith("result.png") for image in pages[html / "index.html"].images)


def test_the_glossary_is_in_order_and_each_term_leads_to_a_lesson(html):
    text = (html / "glossary.html").read_text(encoding="utf-8")
    entries = re.findall(r'<dt id="term-[^"]+">(.*?)<a class="headerlink".*?</dt><dd>(.*?)</dd>', text, re.S)
    terms = [re.sub(r"[^a-z0-9]", "", term.lower().replace("φ", "phi")) for term, _ in entries]
    assert len(terms) > 100
    assert terms == sorted(set(terms))
    assert [term for term, meaning in entries if not re.search(r'href="lessons/\d\d_\w+\.html"', meaning)] == []


@pytest.mark.parametrize("folder", ["exercises", "solutions"])
def test_exercises_stand_below_their_tiers(html, folder):
    for path in list_notebooks(SOLUTIONS):
        text = (html / "lessons" / folder / f"{path.stem}.html").read_text(encoding="utf-8")
        levels = re.findall(r"<h([1-6])>(\w+)", text[text.index("<article") :])
        assert "".join(word for level, word in levels if level == "2") in ("ABC", "BC"), path.stem
        tier = ""
        for level, word in levels[1:]:
            tier = word if level == "2" else tier
            assert (level, word[0]) in (("2", tier), ("3", tier)), f"{path.stem}: {word} does not stand below {tier}"


@pytest.fixture(scope="module")
def chromium():
    path = browser()
    if path is None:
        pytest.skip("no Chromium on this machine: the book was built, and not opened (apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="the Python package playwright is not installed")
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def address(html):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(html)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def visit(chromium, url, scheme="light", width=1280):
    """Open a page; returns it with what it complained about and what it asked for from elsewhere."""
    page = chromium.new_page(color_scheme=scheme, viewport={"width": width, "height": 900})
    page.set_default_timeout(60_000)
    complaints, foreign = [], []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("requestfailed", lambda request: complaints.append(f"failed: {request.url}"))
    own = url.split("#")[0].rsplit("/", 1)[0] if url.startswith("file:") else "/".join(url.split("/")[:3])
    page.on("request", lambda r: None if r.url.startswith((own, "data:", "blob:")) else foreign.append(r.url))
    page.goto(url, wait_until="load")
    page.wait_for_function("!window.MathJax || !MathJax.startup || MathJax.startup.promise.then(() => true)")
    return page, complaints, foreign


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["index", "lessons/03_lora_layer"])
def test_pages_open_in_a_browser(chromium, address, name, scheme):
    page, complaints, foreign = visit(chromium, f"{address}/{name}.html", scheme)
    assert (complaints, foreign) == ([], [])
    page.evaluate("document.querySelectorAll('details').forEach(fold => { fold.open = true; })")
    images = page.evaluate(
        "() => Promise.all([...document.images].map(async i => { i.loading = 'eager';"
        " await i.decode().catch(() => 0); return [i.naturalWidth, i.alt, getComputedStyle(i).backgroundColor]; }))"
    )
    assert all(width > 0 and alt for width, alt, _ in images)
    if name.startswith("lessons/"):
        assert len(images) >= 1
        assert {background for _, _, background in images} == {"rgb(255, 255, 255)"}
        formulas, drawn = page.locator(".math").count(), page.locator(".math mjx-container svg").count()
        assert drawn >= formulas > 0
        assert page.locator("mjx-merror").count() == 0
    page.close()


@pytest.mark.parametrize("width", [600, 992, 1100, 1280])
def test_the_contents_of_a_page_stand_beside_it_where_there_is_room(chromium, address, width):
    page, _, _ = visit(chromium, f"{address}/lessons/{list_notebooks(LESSONS)[0].stem}.html", width=width)
    contents, text = page.locator("#pst-secondary-sidebar"), page.locator("article.bd-article")
    assert contents.is_visible() == (width >= 992)
    assert page.locator("button.secondary-toggle").is_visible() == (width < 992)
    if width >= 992:
        assert contents.bounding_box()["x"] >= text.bounding_box()["x"] + text.bounding_box()["width"]
        assert contents.bounding_box()["x"] + contents.bounding_box()["width"] <= width
        assert text.bounding_box()["width"] >= 0.55 * width
    lines = page.evaluate(
        "() => [...document.querySelectorAll('#claims-checked-here td:first-child')].map(cell => {"
        " const range = document.createRange();"
        " range.selectNodeContents(document.createTreeWalker(cell, NodeFilter.SHOW_TEXT).nextNode());"
        " return range.getClientRects().length; })"
    )
    assert lines
    assert set(lines) == {1}, "the number of a claim is broken over two lines"
    page.close()


def test_what_is_folded_is_printed(chromium, address):
    page, _, _ = visit(chromium, f"{address}/lessons/{list_notebooks(LESSONS)[0].stem}.html")
    inside = page.locator("article details:not(.hide) > p").first
    assert not inside.is_visible()
    page.emulate_media(media="print")
    assert inside.is_visible()
    page.close()


def test_search_finds_a_lesson(chromium, address):
    page, complaints, _ = visit(chromium, f"{address}/search.html?q=LoRALinear")
    page.wait_for_selector("#search-results li a")
    assert complaints == []
    page.close()


@pytest.mark.parametrize("kind", ["html", "slides"])
def test_exported_lessons_need_no_network(chromium, tmp_path, kind):
    path = export.export("03", kind, tmp_path / "lesson.html")
    page, complaints, foreign = visit(chromium, Path(path).as_uri())
    assert (complaints, foreign) == ([], [])
    assert page.locator("mjx-container svg").count() > 0
    assert page.evaluate("[...document.images].every(i => i.naturalWidth > 0 && i.alt)")
    if kind == "slides":
        assert page.evaluate("Reveal.isReady() && Reveal.getTotalSlides()") >= 8
    page.close()
