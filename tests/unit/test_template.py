"""The rules of predictions and of *Your turn* cells speak up, and ``use`` goes on with what passes."""

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from lora_edu.course import checks
from lora_edu.course.checks.report import Wrong, run_steps
from lora_edu.course.notebooks.inspection import over_budget
from lora_edu.course.notebooks.predictions import predictions, problems_of_predictions, shares
from lora_edu.course.notebooks.your_turn import learners_copy, problems_of_your_turn
from lora_edu.lowrank import truncated_svd

QUESTION = "> **Predict.** How many?\n>\n> - (a) one\n> - (b) two\n> - (c) none"
ANSWER = "<details><summary>Answer</summary>\n\n(b). One and one.\n\nNot (a).\n\n</details>"


def asked(question=QUESTION, answer=ANSWER, code_tags=("hide-output",), answer_tags=("answer",), last=True):
    cells = [
        new_markdown_cell(question, metadata={"tags": ["prediction"]}),
        new_code_cell("1 + 1", metadata={"tags": list(code_tags)}),
        new_markdown_cell(answer, metadata={"tags": list(answer_tags)}),
    ]
    return new_notebook(cells=cells if last else cells[:2])


def test_a_good_prediction_is_read_and_has_no_problem():
    assert list(problems_of_predictions(asked())) == []
    (found,) = predictions(asked())
    assert (found.options, found.right) == (["a", "b", "c"], "b")


@pytest.mark.parametrize(
    ("notebook", "said"),
    [
        (asked(code_tags=()), "does not fold its output"),
        (asked(answer_tags=()), "no cell with its answer"),
        (asked(last=False), "no cell with its answer"),
        (asked(answer=ANSWER.replace("(b)", "(d)").replace("(a)", "")), "names none of its options"),
        (asked(question=QUESTION.replace("(b)", "(d)")), "expected (a) to (c)"),
        (asked(answer=ANSWER.replace("</summary>\n\n", "</summary>\n")), "not folded whole"),
        (asked(answer=ANSWER.replace("\n\n</details>", "\n</details>")), "a blank line at its end"),
        (asked(answer=ANSWER + "\n\nIn short: two."), "not folded whole"),
        (asked(answer="It is (b).\n\n" + ANSWER), "not folded whole"),
        (new_notebook(cells=[new_markdown_cell(QUESTION)]), "without the tag prediction"),
        (new_notebook(cells=[new_markdown_cell(ANSWER, metadata={"tags": ["answer"]})]), "an answer without"),
        (new_notebook(cells=[new_markdown_cell("<details><summary>Hint</summary>\nx\n\n</details>")]), "blank line"),
    ],
)
def test_a_prediction_that_gives_itself_away(notebook, said):
    assert any(said in problem for problem in problems_of_predictions(notebook))


def test_shares_of_the_letters_count_only_questions_that_offer_them():
    four = asked(question=QUESTION + "\n> - (d) many", answer=ANSWER.replace("(b)", "(d)"))
    assert shares([asked(), asked(), four]) == {"a": 0, "b": 2 / 3, "c": 0, "d": 1}


SOLUTION = "def double(x, times=1):\n    return 2 * x * times"
STUB = 'def double(x, times=1):\n    raise NotImplementedError("your code here")'


def in_a_lesson(solution=SOLUTION, stub=STUB, after="double = use(double, otherwise=int, check=checks.double)"):
    metadata = {"tags": ["your-turn"], "stub": stub}
    return new_notebook(cells=[new_code_cell(solution, metadata=metadata), new_code_cell(after)])


def test_a_learners_copy_has_the_stub_and_no_trace_of_the_solution():
    notebook = in_a_lesson()
    assert list(problems_of_your_turn(notebook)) == []
    cell = learners_copy(notebook).cells[0]
    assert cell.source == STUB
    assert "stub" not in cell.metadata


@pytest.mark.parametrize(
    ("notebook", "said"),
    [
        (in_a_lesson(stub=STUB.replace("double", "twice")), "its stub defines"),
        (in_a_lesson(stub=STUB.replace(", times=1", "")), "its stub defines"),
        (in_a_lesson(stub="def double(:"), "not Python"),
        (in_a_lesson(stub=SOLUTION), "raises NotImplementedError"),
        (in_a_lesson(solution=STUB), "raises NotImplementedError"),
        (in_a_lesson(after="double(3)"), "does not call use"),
        (new_notebook(cells=[new_code_cell("1", metadata={"stub": "2"})]), "not the tag"),
    ],
)
def test_a_your_turn_cell_that_would_not_work(notebook, said):
    assert any(said in problem for problem in problems_of_your_turn(notebook))


def test_use_goes_on_with_what_passes(capsys):
    def check(candidate, hint=1):
        def doubles():
            if candidate(3) != 6:
                raise Wrong("3 becomes something else than 6", "What is twice three?", "Write 2 * x.")

        return run_steps("double", [("3 becomes 6", doubles)], hint)

    def right(x):
        return 2 * x

    def stub(x):
        raise NotImplementedError("your code here")

    assert checks.use(right, otherwise=abs, check=check) is right
    assert capsys.readouterr().out == "✓ 3 becomes 6\n"
    for candidate in (stub, abs):
        assert checks.use(candidate, otherwise=right, check=check) is right
        assert "Until yours passes, the lesson goes on with right." in capsys.readouterr().out
    assert checks.use(abs, otherwise=truncated_svd, check=check) is truncated_svd
    assert "Until yours passes, the lesson goes on with the library's truncated_svd." in capsys.readouterr().out
    checks.use(abs, otherwise=right, check=check, hint=3)
    assert "Write 2 * x." in capsys.readouterr().out


def test_a_budget_counts_cells_words_and_open_lines():
    cells = [new_markdown_cell("word " * 1500), *(new_code_cell("1\n" * 30) for _ in range(9))]
    assert list(over_budget(new_notebook(cells=cells), "03")) == [
        "270 lines of code in cells that are not folded: expected at most 250"
    ]
    cells[1].metadata["tags"] = ["hide-input"]
    assert list(over_budget(new_notebook(cells=cells), "03")) == []
    assert "1,500 words of Markdown: expected at most 1,400" in list(over_budget(new_notebook(cells=cells), "16"))
    many = [new_markdown_cell("word " * 50) for _ in range(41)] + [new_code_cell("1\n" * 9) for _ in range(41)]
    assert len(list(over_budget(new_notebook(cells=many), "03"))) == 3
