"""The machinery of notebooks: running, the canonical form, exercises from solutions, the rules, the work folder."""

import json
import os
import subprocess
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from lora_edu.course.notebooks import inspection, runs, work
from lora_edu.course.notebooks import stored as notebooks
from lora_edu.course.notebooks.execute import execute, update
from lora_edu.course.notebooks.exercises import ANSWER, cut_solution, exercise_from, generate, outdated, source_from
from lora_edu.course.notebooks.stored import NotebookError, dumps, find_notebook, normalise, read, write


def book(*cells):
    return new_notebook(cells=list(cells))


def tagged(source, *tags, kind=new_code_cell):
    return kind(source, metadata={"tags": list(tags)})


PLOT = """from lora_edu.lab import plots
print("before")
plots.show(plots.losses({"a": [2, 1]}), alt="It falls from 2 to 1.")"""


def test_what_a_cell_printed_can_be_shown_elsewhere():
    for path in notebooks.list_notebooks():
        for cell in read(path).cells:
            printed = [each.text for each in cell.get("outputs", []) if each.output_type == "stream"]
            if printed:
                assert notebooks.stored_text(path.name[:2], cell.id) == "".join(printed).rstrip("\n")
    with pytest.raises(NotebookError, match=r"03_lora_layer\.ipynb has no cell 'nowhere'"):
        notebooks.stored_text("03", "nowhere")


def test_update_gives_the_same_file_twice(tmp_path):
    source = book(new_markdown_cell("# T"), new_code_cell("x = 2\nx"), new_code_cell("import os; os.getcwd()[-4:]"))
    source.cells[1].metadata = {"ExecuteTime": 1, "collapsed": True}
    write(source, tmp_path / "there" / "01_a.ipynb")
    update(tmp_path / "there" / "01_a.ipynb", tmp_path / "there" / "01_a.ipynb")
    first = (tmp_path / "there" / "01_a.ipynb").read_bytes()
    update(tmp_path / "there" / "01_a.ipynb", tmp_path / "there" / "01_a.ipynb")
    assert (tmp_path / "there" / "01_a.ipynb").read_bytes() == first
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["01_a.ipynb"]
    done = read(tmp_path / "there" / "01_a.ipynb")
    assert [cell.execution_count for cell in done.cells[1:]] == [1, 2]
    assert done.cells[1].outputs[0].data["text/plain"] == "2"
    assert done.cells[1].metadata == {}
    assert "version" not in done.metadata.language_info


def test_a_figure_keeps_its_place_and_its_alternative_text(tmp_path):
    notebook = normalise(execute(book(new_code_cell(PLOT)), tmp_path, "plot"))
    cell = notebook.cells[0]
    assert [output.output_type for output in cell.outputs] == ["stream", "display_data", "stream"]
    assert cell.outputs[2].text == "It falls from 2 to 1.\n"
    assert cell.metadata["mystnb"] == {"image": {"alt": "It falls from 2 to 1."}}
    assert list(inspection.problems_of_executed(notebook)) == []


def test_environment_of_a_notebook(tmp_path):
    code = "import os; print(os.environ['LORA_EDU_RUN'], os.environ['OMP_NUM_THREADS'], os.environ['HF_HUB_OFFLINE'])"
    notebook = execute(book(new_code_cell(code)), tmp_path, "env")
    assert notebook.cells[0].outputs[0].text == "quick 2 1\n"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("rank = 0\n1 / rank", r"broken, cell 1 \(rank = 0\): ZeroDivisionError: division by zero"),
        ("import os; os._exit(1)", "broken, cell 1 .*kernel died"),
        ("import time; time.sleep(60)", "broken, cell 1 .*took more than 2 s"),
    ],
    ids=["exception", "dead kernel", "too slow"],
)
def test_errors_name_notebook_and_cell(tmp_path, code, words):
    with pytest.raises(NotebookError, match=words):
        execute(book(new_markdown_cell("# T"), new_code_cell(code)), tmp_path, "broken", timeout=2)


INTERRUPTED = """
import os, sys
from pathlib import Path
from nbformat.v4 import new_code_cell, new_notebook
from lora_edu.course.notebooks.execute import execute

try:  # the cell presses Ctrl-C for its parent, and would then sleep for a minute
    cell = new_code_cell("import os, signal, time; os.kill(os.getppid(), signal.SIGINT); time.sleep(60)")
    execute(new_notebook(cells=[cell]), Path(sys.argv[1]), "slow")
except KeyboardInterrupt:
    print("stopped")
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals")
def test_ctrl_c_ends_the_run_and_not_only_the_kernel(tmp_path):
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.stdout == "stopped\n", done.stderr


def test_a_failed_update_leaves_the_file(tmp_path):
    path = tmp_path / "01_a.ipynb"
    write(normalise(book(new_code_cell("1 / 0"))), path)
    before = path.read_bytes()
    with pytest.raises(NotebookError):
        update(path, path)
    assert path.read_bytes() == before


def test_find_by_number_name_and_path(tmp_path):
    for name in ("01_a", "02_b"):
        write(book(), tmp_path / f"{name}.ipynb")
    assert {find_notebook(name, tmp_path).name for name in ("2", "02", "02_b", "02_b.ipynb")} == {"02_b.ipynb"}
    assert find_notebook(str(tmp_path / "01_a.ipynb")).name == "01_a.ipynb"
    with pytest.raises(NotebookError, match="there are 01_a, 02_b"):
        find_notebook("7", tmp_path)


def test_not_a_notebook(tmp_path):
    (tmp_path / "x.ipynb").write_text("{")
    with pytest.raises(NotebookError, match="not a notebook"):
        read(tmp_path / "x.ipynb")


SOLUTION = """def double(x):
    \"\"\"Twice x.\"\"\"
    ### BEGIN SOLUTION
    y = 2
    return y * x
    ### END SOLUTION


def half(x):
    if x:
        ### BEGIN SOLUTION
        return x / 2
        ### END SOLUTION
    return 0"""


def test_cutting_a_solution():
    stub = cut_solution(SOLUTION)
    assert 'Twice x."""\n    raise NotImplementedError("your code here")\n' in stub
    assert '    if x:\n        raise NotImplementedError("your code here")\n    return 0' in stub
    assert "y * x" not in stub
    assert "SOLUTION" not in stub


@pytest.mark.parametrize(
    "source",
    [
        "def f():\n    return 1",
        "def f():\n    ### BEGIN SOLUTION\n    return 1",
        "def f():\n    return 1\n    ### END SOLUTION",
        "### BEGIN SOLUTION\nx = 1\n### END SOLUTION",
        "def f():\n    ### BEGIN SOLUTION\n    ### BEGIN SOLUTION\n    ### END SOLUTION",
    ],
    ids=["no marker", "no end", "no begin", "outside a function", "begin twice"],
)
def test_bad_markers(source):
    with pytest.raises(NotebookError, match=r"here: .*SOLUTION"):
        cut_solution(source, "here")


def solutions_notebook():
    return book(
        new_markdown_cell("# Solutions to lesson 01"),
        new_markdown_cell("### A1 Twice"),
        tagged(SOLUTION, "solution"),
        tagged("checks.double(double)", "check"),
        tagged("Because.", "solution", kind=new_markdown_cell),
    )


def test_exercise_from_solution():
    solution = solutions_notebook()
    before = dumps(solution)
    exercise = exercise_from(solution)
    assert dumps(solution) == before
    assert exercise.cells[0].source == "# Exercises to lesson 01"
    assert exercise.cells[4].source == ANSWER
    assert [cell.metadata.get("tags") for cell in exercise.cells] == [None, None, None, ["check"], None]
    assert exercise.cells[3].source == "checks.double(double)"


RUBRIC = "### C1 Write\n\n| | not yet | good | very good |\n|---|---|---|---|\n| a | 1 | 2 | 3 |\n| b | 1 | 2 | 3 |"


def test_what_nbgrader_is_told_of_an_exercise():
    solution = solutions_notebook()
    solution.cells += [
        new_markdown_cell("### B2 More"),
        tagged(SOLUTION, "solution"),
        tagged(SOLUTION, "solution"),
        tagged("if checks.more(more):\n    print(1)", "check"),
        tagged("checks.more(more, hint=2)"),
        new_markdown_cell(RUBRIC),
        tagged("Half a page.", "solution", kind=new_markdown_cell),
    ]
    marks = [dict(cell.metadata.get("nbgrader", {})) for cell in exercise_from(solution).cells]
    assert {mark.pop("schema_version") for mark in marks if mark} == {3}
    told = [(mark["grade_id"], mark.get("points"), mark["grade"], mark["solution"]) for mark in marks if mark]
    assert told == [
        ("A1_solution", None, False, True),
        ("A1_double", 1, True, False),
        ("A1_answer", 1, True, True),
        ("B2_solution", None, False, True),
        ("B2_solution_2", None, False, True),
        ("B2_more", 4, True, False),
        ("C1_answer", 4, True, True),
    ]
    assert [mark["grade_id"] for mark in marks if mark and mark["locked"]] == ["A1_double", "B2_more"]
    assert [mark.get("grade_id") for mark in marks] == [
        cell.metadata.get("nbgrader", {}).get("grade_id") for cell in source_from(solution).cells
    ]


@pytest.mark.parametrize(
    ("source", "words"),
    [("checks.a(f); checks.b(f)", "2 checks are called"), ("print(1)", "0 checks are called")],
)
def test_a_check_cell_has_the_points_of_one_check(source, words):
    with pytest.raises(NotebookError, match=f"solutions/01_a.ipynb, cell 1: {words}"):
        exercise_from(book(new_markdown_cell("### A1 Twice"), tagged(source, "check")), "01_a.ipynb")


def test_a_check_belongs_to_a_task():
    with pytest.raises(NotebookError, match="cell 0: the cell belongs to no task"):
        exercise_from(book(tagged("checks.a(f)", "check")))


def test_outdated_exercises_are_found(tmp_path):
    solutions, exercises = tmp_path / "solutions", tmp_path / "exercises"
    source = solutions / "01_a.ipynb"
    write(normalise(solutions_notebook()), source)
    assert outdated(solutions, exercises) == ["exercises/01_a.ipynb is missing"]
    assert generate(source, exercises)
    assert not generate(source, exercises)
    assert outdated(solutions, exercises) == []
    (exercises / "01_a.ipynb").write_text(
        (exercises / "01_a.ipynb").read_text().replace("checks.double(double)", "pass")
    )
    assert outdated(solutions, exercises) == ["exercises/01_a.ipynb is not what solutions/01_a.ipynb gives"]
    source.unlink()
    assert outdated(solutions, exercises) == ["exercises/01_a.ipynb has no solution"]


def spoiled(change):
    cells = [new_markdown_cell("# T\n\n[x](01_a.ipynb)", id="a"), new_code_cell("1", id="b", execution_count=1)]
    notebook = normalise(new_notebook(cells=cells))
    change(notebook)
    return notebook


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda n: n.cells[1].metadata.update(tags=["nbval-skip"]), "unknown tag 'nbval-skip'"),
        (lambda n: n.cells[1].metadata.update(tags=["nbval-ignore-output"]), "without a reason"),
        (lambda n: n.cells[1].update(source="open('/home/me/x')"), "different on another machine"),
        (lambda n: n.cells[1].update(source="'<Foo at 0x7f3a5c0d1e80>'"), "different on another machine"),
        (lambda n: n.cells[0].update(source="[x](99_z.ipynb)"), "leads nowhere"),
        (lambda n: n.cells[1].metadata.update(slideshow={"slide_type": "page"}), "unknown slide type"),
        (lambda n: n.cells[1].metadata.update(collapsed=True), "canonical"),
        (lambda n: n.cells[1].update(source="x" * 2_000_000), "bytes"),
    ],
)
def test_rules_of_form(tmp_path, change, words):
    path = tmp_path / "01_a.ipynb"
    path.write_text(dumps(spoiled(lambda n: None)))
    assert list(inspection.problems_of_any(path)) == []
    path.write_text(dumps(spoiled(change)))
    assert any(words in problem for problem in inspection.problems_of_any(path))


def test_two_cells_with_one_id(tmp_path):
    path = tmp_path / "01_a.ipynb"
    path.write_text(dumps(spoiled(lambda n: None)).replace('"id": "b"', '"id": "a"'))
    with pytest.warns(Warning, match="Non-unique"):
        assert "a cell has no id, or two cells have the same" in list(inspection.problems_of_any(path))


def outputs(*found):
    return lambda n: n.cells[1].update(outputs=[nbformat.from_dict(output) for output in found])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda n: n.cells[1].update(execution_count=None), "not all executed"),
        (outputs({"output_type": "stream", "name": "stderr", "text": "warned"}), "stderr: warned"),
        (outputs({"output_type": "error", "ename": "KeyError", "evalue": "", "traceback": []}), "KeyError"),
        (outputs({"output_type": "display_data", "data": {"image/png": ""}, "metadata": {}}), "without alternative"),
        (outputs({"output_type": "display_data", "data": {"image/svg+xml": ""}, "metadata": {}}), "SVG"),
    ],
)
def test_rules_of_outputs(change, words):
    assert list(inspection.problems_of_executed(spoiled(lambda n: None))) == []
    assert any(words in problem for problem in inspection.problems_of_executed(spoiled(change)))


def test_rules_of_the_template_speak_up():
    problems = " ".join(inspection.problems_of_lesson(spoiled(lambda n: n.cells[1].update(source="x\n" * 40)), "03"))
    for words in ("**You will**", "'Spot the bug' is missing", "own words", "0 slides", "prediction", "lines of code"):
        assert words in problems
    for number, tiers in {"03": "ABC", "24": "BC"}.items():
        missing = " ".join(inspection.problems_of_solution(spoiled(lambda n: None), number))
        assert [tier for tier in "ABC" if f"tier {tier}" in missing] == list(tiers)


def test_only_what_changed_runs_again(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "surroundings", lambda: "same")
    source = tmp_path / "01_a.ipynb"
    write(normalise(book(new_code_cell("1 + 1"))), source)
    quiet = lambda name: lambda done, cells: None  # noqa: E731
    target = tmp_path / "ran"
    assert not runs.run([source], quiet, target)[0].cached
    assert runs.run([source], quiet, target)[0].cached
    monkeypatch.setattr(runs, "surroundings", lambda: "other versions")
    assert not runs.run([source], quiet, target)[0].cached
    write(normalise(book(new_code_cell("1 / 0"))), source)
    failed = runs.run([source], quiet, target)[0]
    assert "ZeroDivisionError" in failed.error
    assert "outputs" not in json.loads(source.read_text())["cells"][0] or not read(source).cells[0].outputs


def test_the_surroundings_see_library_data_and_versions(tmp_path, monkeypatch):
    (tmp_path / "lora_edu" / "core").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    monkeypatch.setenv("LORA_EDU_DATA", str(tmp_path / "data"))
    seen = set()
    for name in ("lora_edu/core/layer.py", "data/words.txt", "constraints.txt"):
        for text in ("a", "b"):
            (tmp_path / name).write_text(text)
            monkeypatch.setattr(runs, "fingerprint", fingerprint_below(tmp_path))
            seen.add(runs.surroundings())
    assert len(seen) == 6


def fingerprint_below(root, original=runs.fingerprint):
    return lambda paths, base=root: original(paths, base)


def test_work_is_never_overwritten(tmp_path):
    lessons, mine = tmp_path / "lessons", tmp_path / "work"
    write(normalise(book(new_code_cell("1", execution_count=1))), lessons / "01_a.ipynb")
    write(normalise(book(new_code_cell("2"))), lessons / "exercises" / "01_a.ipynb")
    assert work.refresh(mine, lessons) == (["01_a.ipynb", "exercises/01_a.ipynb"], [])
    assert read(mine / "01_a.ipynb").cells[0].execution_count is None
    assert work.refresh(mine, lessons) == ([], [])

    write(normalise(book(new_code_cell("my answer"))), mine / "exercises" / "01_a.ipynb")
    write(normalise(book(new_code_cell("newer"))), lessons / "01_a.ipynb")
    assert work.refresh(mine, lessons) == (["01_a.ipynb"], [])
    write(normalise(book(new_code_cell("newer exercise"))), lessons / "exercises" / "01_a.ipynb")
    assert work.refresh(mine, lessons) == ([], ["exercises/01_a.ipynb"])
    assert read(mine / "exercises" / "01_a.ipynb").cells[0].source == "my answer"

    kept, fresh = work.reset("exercises/01", mine, lessons)
    assert read(kept).cells[0].source == "my answer"
    assert read(fresh).cells[0].source == "newer exercise"
    assert work.refresh(mine, lessons) == ([], [])


def test_links_to_the_claims_lead_to_a_page_in_the_learners_folder(tmp_path):
    lessons, mine, pages = tmp_path / "lessons", tmp_path / "work", tmp_path / "book"
    said = "[000-35](../book/claims.md#000-35), [cards](../book/methods.md), [map](../book/map.md)"
    write(normalise(book(new_markdown_cell(said))), lessons / "01_a.ipynb")
    write(normalise(book(new_markdown_cell("[x](../../book/claims.md)"))), lessons / "exercises" / "01_a.ipynb")
    pages.mkdir()
    (pages / "claims.md").write_text("- Lessons: [01](../lessons/01_a.ipynb)", encoding="utf-8")
    assert work.refresh(mine, lessons, pages) == (["01_a.ipynb", "exercises/01_a.ipynb"], [])
    assert read(mine / "01_a.ipynb").cells[0].source == (
        "[000-35](book/claims.md#000-35), [cards](book/methods.md), [map](../book/map.md)"
    )
    assert read(mine / "exercises" / "01_a.ipynb").cells[0].source == "[x](../book/claims.md)"
    assert (mine / "book" / "claims.md").read_text(encoding="utf-8") == "- Lessons: [01](../01_a.ipynb)"
    assert work.refresh(mine, lessons, pages) == ([], [])


def test_root_is_the_repository():
    assert (notebooks.ROOT / "lora_edu" / "course").is_dir()
