"""The map of lessons: read from the notebooks and the README, drawn, and filled into the pages of the book."""

import re

import pytest
from nbformat.v4 import new_markdown_cell, new_notebook

from lora_edu.course.notebooks.stored import LESSONS, NotebookError, list_notebooks, write
from lora_edu.course.publish import book, lesson_map
from lora_edu.course.publish.lesson_map import ROUTES, Lesson, fill, read_lessons
from lora_edu.files import ROOT


def lesson(name, needs=()):
    return Lesson(name, title=f"{name[:2]} {name[3:]}", take_away="one thing", needs=needs, time="", seconds=1.0)


COURSE = [
    lesson("00_start"),
    lesson("01_rank", ("00",)),
    lesson("03_layer", ("00", "01")),
    lesson("04_model", ("03",)),
    lesson("05_count", ("01", "03")),
    lesson("24_speed", ("04", "05")),
]


def test_a_lesson_is_read_from_its_box_and_the_readme(tmp_path):
    box = (
        "> **You need** [lesson 01](01_rank.ipynb) (rank), [03](03_layer.ipynb) and later [07](07_later.ipynb)\n>\n"
        "> **Time** 40 minutes to read, predict and write, under a minute to run, 2 hours of exercises"
    )
    write(new_notebook(cells=[new_markdown_cell("# 05 Count"), new_markdown_cell(box)]), tmp_path / "05_count.ipynb")
    readme = tmp_path / "README.md"
    readme.write_text("| [05 Count](lessons/05_count.ipynb) | the targets decide | 9 s |\n", encoding="utf-8")
    (read,) = read_lessons(tmp_path, {"05_count": 9.4}, readme)
    assert read == Lesson(
        name="05_count",
        title="05 Count",
        take_away="the targets decide",
        needs=("01", "03"),
        time="40 min to read, predict and write, 2 h of exercises",
        seconds=9.4,
    )


def test_a_lesson_without_a_row_in_the_readme_is_named(tmp_path):
    write(new_notebook(cells=[new_markdown_cell("# 05 Count")]), tmp_path / "05_count.ipynb")
    (tmp_path / "README.md").write_text("nothing here", encoding="utf-8")
    with pytest.raises(NotebookError, match=r"05_count has no row in the map of README\.md"):
        read_lessons(tmp_path, {}, tmp_path / "README.md")


def test_every_lesson_says_what_it_needs_and_how_long_it_takes():
    lessons = read_lessons(LESSONS, {})
    assert [one.name for one in lessons] == [path.stem for path in list_notebooks(LESSONS)]
    assert [one.name for one in lessons if not (one.take_away and one.time)] == []
    assert [one.name for one in lessons[1:] if not one.needs] == []


def test_the_map_draws_each_lesson_once_and_leaves_out_lines_that_follow_from_others():
    drawn = lesson_map.drawing(COURSE)
    assert re.findall(r'<a class="(\w+)" href="lessons/(\w+)\.html">', drawn) == [
        ("elective" if one.name.startswith("24") else "core", one.name) for one in COURSE
    ]
    assert drawn.count("<path ") == 6  # 01–00, 03–01, 04–03, 05–03, 24–04, 24–05; not 03–00 and 05–01


def test_boxes_of_the_map_do_not_overlap():
    places = re.findall(r'<rect x="([\d.]+)" y="([\d.]+)"', lesson_map.drawing(read_lessons(LESSONS, {})))
    corners = [(float(x), float(y)) for x, y in places]
    for place, (x, y) in enumerate(corners):
        for other_x, other_y in corners[place + 1 :]:
            assert abs(x - other_x) >= lesson_map.WIDTH or abs(y - other_y) >= lesson_map.HEIGHT


def test_the_table_of_needs_has_both_directions():
    row = next(line for line in lesson_map.needs_table(COURSE).splitlines() if "03 layer" in line)
    assert [re.findall(r"\[(\d\d)\]", cell) for cell in row.split("|")[2:4]] == [["00", "01"], ["04", "05"]]


def test_blanks_are_filled_by_name_and_only_lessons_that_are_there_are_links():
    assert fill("see {{ layer }}.", COURSE) == "see [lesson\u00a003](lessons/03_layer.ipynb)."
    workshop = fill("{{ route workshop }}", COURSE)
    assert workshop == "[00](lessons/00_start.ipynb), [03](lessons/03_layer.ipynb), [04](lessons/04_model.ipynb), 07"
    assert "without a link" in fill("{{ planned }}", COURSE)
    assert fill("{{ planned }}", [lesson(f"{number:02d}_x") for number in range(27)]) == ""


@pytest.mark.parametrize("blank", ["{{ nothing }}", "{{ route nowhere }}", "{{ table week }}"])
def test_a_blank_that_names_nothing_is_refused(blank):
    with pytest.raises(NotebookError, match=r"names nothing: expected one of .*route week.*layer"):
        fill(blank, COURSE)


@pytest.mark.parametrize(
    ("link", "page"),
    [
        ("[glossary](../book/glossary.md)", "[glossary](../glossary.md)"),
        ("[a claim](../../book/claims.md#000-35)", "[a claim](../claims.md#000-35)"),
        ("[layer](../lora_edu/core/layer.py)", "[layer](../api/lora_edu.core.layer.md)"),
    ],
)
def test_links_of_a_lesson_to_files_become_links_to_pages(link, page):
    assert book._relink(link, "../") == page


@pytest.mark.parametrize("page", ["README.md", "book/teaching.md"])
def test_pages_that_are_read_outside_the_book_name_the_same_routes(page):
    text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
    assert ROUTES["week"] == [f"{number:02d}" for number in range(14)]
    assert ROUTES["core"] == [*(f"{number:02d}" for number in range(16)), "26"]
    for route in (", ".join(ROUTES["workshop"]), "00–13", "00–15 and 26", ", ".join(ROUTES["semester"])):
        assert route in text
