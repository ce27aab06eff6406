"""Export a lesson to one file: a page to read or slides, which need no network, or a notebook for Colab and Kaggle."""

import re
from pathlib import Path

from nbformat import NotebookNode

from lora_edu.course.notebooks.stored import BUILD, find_notebook, read, title
from lora_edu.course.publish.book import BOOK
from lora_edu.course.publish.hosted import export_hosted

TEMPLATES = BOOK / "export"
KINDS = {"html": "lesson_page", "slides": "lesson_slides"}
HIDDEN = ["remove-cell"]
FOLDED = re.compile(r"<details>(?:(?!<details>).)*</details>", re.S)


def export(name: str, to: str = "html", output: Path | None = None, repository: str | None = None) -> Path:
    """Write a lesson as one file and return its path.

    Args:
        name: number, name or path of a notebook; its stored outputs are shown, except in a hosted copy.
        to: "html", "slides", or "hosted" for Colab and Kaggle.
        output: the file to write, by default ``NAME.html``, ``NAME.slides.html`` or ``NAME.hosted.ipynb`` under
            ``build/export/``.
        repository: for "hosted", the address that the course is cloned from.

    Raises:
        ValueError: for another kind, a lesson in which no cell is marked for slides, or a hosted copy without address.
    """
    from nbconvert import HTMLExporter, SlidesExporter
    from traitlets.config import Config

    if to == "hosted":
        return export_hosted(name, repository, output)
    if to not in KINDS:
        raise ValueError(f"--to {to}: expected html, slides or hosted")
    if repository is not None:
        raise ValueError(f"--repository belongs to --to hosted, not to --to {to}")
    source = find_notebook(name)
    notebook = read(source)
    if to == "slides":
        _for_slides(notebook, source.stem)
    settings = Config({"TagRemovePreprocessor": {"enabled": True, "remove_cell_tags": HIDDEN}})
    exporter_class = SlidesExporter if to == "slides" else HTMLExporter
    exporter = exporter_class(config=settings, extra_template_basedirs=[str(TEMPLATES)], template_name=KINDS[to])
    notebook.metadata["title"] = title(notebook) or source.stem
    files = {
        "mathjax": BOOK / "_static" / "mathjax" / "tex-svg.js",
        "reveal_js": TEMPLATES / "reveal" / "reveal.js",
        "reveal_css": TEMPLATES / "reveal" / "reveal.css",
    }
    texts = {key: path.read_text(encoding="utf-8").replace("</script", "<\\/script") for key, path in files.items()}
    body, _ = exporter.from_notebook_node(notebook, resources={"inline": texts, "metadata": {"name": source.stem}})
    if to == "slides":  # nbconvert's template has these links outside of any block that could be replaced
        body = re.sub(r'<link [^>]*rel="stylesheet"[^>]*>', "", body)
    output = output or BUILD / "export" / f"{source.stem}{'.slides' if to == 'slides' else ''}.html"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(body, encoding="utf-8")
    return output


def _for_slides(notebook: NotebookNode, name: str) -> None:
    """Slides are what the author chose: a cell without a mark of its own does not appear.

    An answer that fills its cell is open, because the cell waits for a key press already.
    """
    marks = [cell.metadata.get("slideshow", {}).get("slide_type", "") for cell in notebook.cells]
    if not any(mark in ("slide", "subslide") for mark in marks):
        raise ValueError(f"{name} has no cell marked as a slide (metadata slideshow.slide_type)")
    for cell, mark in zip(notebook.cells, marks, strict=True):
        if not mark or mark == "-":
            cell.metadata["slideshow"] = {"slide_type": "skip"}
        if FOLDED.fullmatch(cell.source):
            cell.source = cell.source.replace("<details>", "<details open>", 1)
