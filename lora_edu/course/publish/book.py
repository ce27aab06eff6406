"""The book: lay out executed lessons, exercises and the API's pages under ``build/``, and run Sphinx on them."""

import ast
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import nbformat

from lora_edu.course.notebooks.runs import recorded_times
from lora_edu.course.notebooks.stored import (
    BUILD,
    EXERCISES,
    LESSONS,
    MINE,
    SOLUTIONS,
    NotebookError,
    list_notebooks,
    read,
    write,
)
from lora_edu.course.notebooks.your_turn import TAG
from lora_edu.course.publish.lesson_map import fill, read_lessons
from lora_edu.files import ROOT

BOOK = ROOT / "book"
SOURCE = BUILD / "book" / "src"
HTML = BUILD / "book" / "html"
PAGES = {
    "data": ROOT / "data" / "README.md",
    "contributing": ROOT / "CONTRIBUTING.md",
    "changelog": ROOT / "CHANGELOG.md",
}
TIERS = {"A": "A. Complete one line", "B": "B. Build", "C": "C. Investigate and write"}
LESSON_MENTION = re.compile(r"\b[Ll]essons? (\d\d(?:(?:, | and |–)\d\d)*)")


def build(executed: Path = LESSONS, seconds: dict[str, float] | None = None) -> Path:
    """Build the book and return its start page.

    Args:
        executed: the folder with the executed lessons.
        seconds: lesson's name → run time, for the map of lessons; the recorded ones if not given.

    Raises:
        NotebookError: if Sphinx fails or warns; the message carries its first complaint.
    """
    stage(executed, seconds or recorded_times()["seconds"])
    render(SOURCE, HTML)
    return HTML / "index.html"


def render(source: Path, target: Path) -> None:
    """Run Sphinx on pages that are laid out, with a warning as an error.

    Raises:
        NotebookError: if Sphinx fails or warns; the message carries its first complaint.
    """
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-W", "--keep-going", "-q"]
    command += ["-d", str(target.with_name("cache")), str(source), str(target)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if result.returncode:
        print(result.stderr, file=sys.stderr)
        first = next((line for line in result.stderr.splitlines() if "WARNING" in line or "ERROR" in line), "")
        raise NotebookError(f"the book was not built without warnings: {first or result.stderr[-300:]}")


def stage(executed: Path, seconds: dict[str, float], target: Path = SOURCE) -> None:
    """Lay out all pages in ``target``. Files whose content did not change keep their times, so Sphinx skips them."""
    fresh = target.with_name("src.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    shutil.copy(BOOK / "conf.py", fresh / "conf.py")
    shutil.copytree(BOOK / "_static", fresh / "_static")
    built_in = _names_by_lesson()
    for path in list_notebooks(executed):
        _stage_notebook(path, fresh / "lessons" / path.name, built_in.get(path.name[:2], []))
    _stage_notebook(MINE, fresh / "lessons" / MINE.name)
    for folder in (EXERCISES, SOLUTIONS):
        for path in list_notebooks(folder):
            _stage_notebook(path, fresh / "lessons" / folder.name / path.name)
    _stage_api(fresh / "api")
    for name, path in PAGES.items():
        text = path.read_text(encoding="utf-8") if path.exists() else f"# {name.capitalize()}\n\nNothing here yet.\n"
        place = fresh / "data" / "README.md" if name == "data" else fresh / f"{name}.md"
        place.parent.mkdir(exist_ok=True)
        place.write_text(_relink(text, ""), encoding="utf-8")
    blanks = {
        "result": _result(),
        "lesson_pages": _entries(executed, "lessons"),
        "exercise_pages": _entries(EXERCISES, "lessons/exercises"),
        "solution_pages": _entries(SOLUTIONS, "lessons/solutions"),
        "data_page": "data/README",
    }
    lessons = read_lessons(executed, seconds)
    for page in BOOK.glob("*.md"):
        text = page.read_text(encoding="utf-8")
        for blank, value in blanks.items():
            text = text.replace("{{ " + blank + " }}", value)
        text = text.replace("](../lessons/", "](lessons/")  # the pages of book/ are laid out beside lessons/
        (fresh / page.name).write_text(fill(text, lessons), encoding="utf-8")
    _replace_changed(fresh, target)


def _stage_notebook(path: Path, target: Path, names: list[str] | None = None) -> None:
    """Write a notebook as the book shows it: links to pages, solutions folded, a stub before each *Your turn*."""
    notebook = read(path)
    _head_tiers(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = _relink(cell.source, "../" * (len(target.parent.parts) - len(SOURCE.parts)))
        if "solution" in cell.metadata.get("tags", []):
            _fold(cell)
    for index in reversed([i for i, cell in enumerate(notebook.cells) if TAG in cell.metadata.get("tags", [])]):
        _fold(notebook.cells[index])
        stub = nbformat.v4.new_markdown_cell(f"```python\n{notebook.cells[index].metadata.stub}\n```")
        stub["id"] = f"{notebook.cells[index]['id']}-stub"
        notebook.cells.insert(index, stub)
    if names:
        links = "\n".join(f"- {{py:obj}}`{name}`" for name in names)
        cell = nbformat.v4.new_markdown_cell(f"## In the library\n\nWhat this lesson builds or uses first:\n\n{links}")
        cell["id"] = "in-the-library"
        notebook.cells.insert(len(notebook.cells) - 1, cell)
    write(notebook, target)


def _head_tiers(notebook: nbformat.NotebookNode) -> None:
    """Put a heading above the first exercise of each tier: the page's contents then show the exercises below it."""
    tier = ""
    for cell in notebook.cells:
        found = re.search(r"^### ([ABC])\d", cell.source, re.M) if cell.cell_type == "markdown" else None
        if found and found[1] != tier:
            tier = found[1]
            cell.source = f"{cell.source[: found.start()]}## {TIERS[tier]}\n\n{cell.source[found.start() :]}"


def _fold(cell: nbformat.NotebookNode) -> None:
    """Fold a solution: code by the tag that MyST-NB knows, prose by a details element."""
    if cell.cell_type == "code":
        cell.metadata.tags = [*cell.metadata.tags, "hide-input"]
    else:
        cell.source = f"<details><summary>Show an answer</summary>\n\n{cell.source}\n\n</details>"


def _relink(text: str, up: str) -> str:
    """Point links to source files of the library, to files of the book and to the licences at their pages."""
    text = re.sub(
        r"\]\((?:\.\./)*lora_edu/([\w/]+)\.py\)",
        lambda found: f"]({up}api/lora_edu.{found[1].replace('/', '.')}.md)".replace(".__init__", ""),
        text,
    )
    text = re.sub(r"\]\((?:\.\./)*book/([\w-]+\.md[#)])", lambda found: f"]({up}{found[1]}", text)
    return re.sub(r"\]\((?:\.\./)*LICENSE(?:-lessons)?\)", f"]({up}licences.md)", text)


def modules() -> list[str]:
    """The library's modules that the API describes, in the order of their names; the graders are left out."""
    names = []
    for path in sorted((ROOT / "lora_edu").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if "course" in parts or parts[-1].startswith("_"):
            continue
        names.append(".".join(parts))
    return names


def _stage_api(folder: Path) -> None:
    folder.mkdir()
    for name in modules():
        page = f"# {name}\n\n```{{eval-rst}}\n.. automodule:: {name}\n```\n"
        (folder / f"{name}.md").write_text(page, encoding="utf-8")
    pages = "\n".join(modules())
    intro = "Every public name of the library, from its docstrings. Most are built in a lesson; the page links to it."
    index = f"# The library\n\n{intro}\n\n```{{toctree}}\n:maxdepth: 1\n\n{pages}\n```\n"
    (folder / "index.md").write_text(index, encoding="utf-8")


def _names_by_lesson() -> dict[str, list[str]]:
    """Lesson's number → the modules, classes and functions whose docstring says that this lesson builds them."""
    found: dict[str, list[str]] = defaultdict(list)
    for module in modules():
        path = ROOT / Path(*module.split(".")).with_suffix(".py")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        nodes: list[ast.AST] = [tree, *tree.body]
        for node in nodes:
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                continue
            name = module if isinstance(node, ast.Module) else f"{module}.{node.name}"
            if name.rsplit(".", 1)[-1].startswith("_"):
                continue
            for mention in LESSON_MENTION.findall(ast.get_docstring(node) or ""):
                for number in re.findall(r"\d\d", mention):
                    if name not in found[number]:
                        found[number].append(name)
    return found


def _result() -> str:
    """The README's picture of a result, and the paragraph below it."""
    paragraphs = (ROOT / "README.md").read_text(encoding="utf-8").split("\n\n")
    picture = next(place for place, text in enumerate(paragraphs) if text.startswith("!["))
    return "\n\n".join(paragraphs[picture : picture + 2]).replace("](book/", "](")


def _entries(folder: Path, prefix: str) -> str:
    return "\n".join(f"{prefix}/{path.stem}" for path in list_notebooks(folder))


def _replace_changed(fresh: Path, target: Path) -> None:
    new = {path.relative_to(fresh) for path in fresh.rglob("*") if path.is_file()}
    for path in [path for path in target.rglob("*") if path.is_file()]:
        if path.relative_to(target) not in new:
            path.unlink()
    for name in new:
        old = target / name
        if not old.exists() or old.read_bytes() != (fresh / name).read_bytes():
            old.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(fresh / name, old)
    shutil.rmtree(fresh)
