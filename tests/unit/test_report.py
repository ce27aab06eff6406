"""How checks talk: three sizes of help, what is not done yet, and the learner's random state left alone."""

import random

import numpy as np
import pytest
import torch

from lora_edu.course.checks import autograding
from lora_edu.course.checks.report import Wrong, drawn_from, run_steps


def fine():
    pass


def wrong():
    raise Wrong("the update is 4.0 × what it should be", "What stands between?", "The scale is lora_alpha / r.")


def missing():
    raise NotImplementedError("your code here")


def crash():
    return torch.ones(2, 3) @ torch.ones(2, 3)


def test_all_right(capsys):
    report = run_steps("layer", [("starts at the base", fine), ("is scaled", fine)])
    assert report.status == "passed"
    assert report
    assert capsys.readouterr().out == "✓ starts at the base\n✓ is scaled\n" == report.text + "\n"


def test_help_comes_in_three_sizes(capsys):
    steps = [("starts at the base", fine), ("is scaled", wrong), ("equals PEFT", fine)]
    texts = {hint: run_steps("layer", steps, hint) for hint in (1, 2, 3)}
    assert [("What stands between?" in texts[hint].text) for hint in (1, 2, 3)] == [False, True, True]
    assert [("lora_alpha / r" in texts[hint].text) for hint in (1, 2, 3)] == [False, False, True]
    assert all("✗ the update is 4.0 ×" in report.text for report in texts.values())
    assert "○ equals PEFT: checked once the point above is right" in texts[1].text
    assert (texts[1].status, texts[1].step, texts[1].passed) == ("failed", "is scaled", ["starts at the base"])
    assert not texts[1]


def test_later_steps_do_not_run_after_a_mistake():
    def never():
        raise AssertionError("this step should not have run")

    assert run_steps("layer", [("a", wrong), ("b", never)]).waiting == ["b"]


def test_not_done_yet(capsys):
    report = run_steps("layer", [("a", missing), ("b", fine)])
    assert report.status == "not done"
    assert capsys.readouterr().out == "○ not done yet\n"
    assert "○ b: not done yet" in run_steps("layer", [("a", fine), ("b", missing)]).text


def test_an_exception_of_the_learner_is_a_mistake_with_its_text():
    report = run_steps("layer", [("runs", crash)], hint=3)
    assert report.status == "failed"
    assert "RuntimeError" in report.symptom
    assert "crash" in report.question
    assert "torch.ones(2, 3)" in report.question


def test_random_states_are_left_alone():
    def draw():
        torch.rand(3), np.random.rand(3), random.random()

    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    wanted = torch.rand(1).item(), np.random.rand(), random.random()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    run_steps("layer", [("draws", draw)])
    assert (torch.rand(1).item(), np.random.rand(), random.random()) == wanted


def test_draws_differ_unless_the_seed_is_given(monkeypatch):
    monkeypatch.delenv("LORA_EDU_CHECK_SEED", raising=False)
    drawn = []
    steps = [("draws", lambda: drawn.append(torch.rand(1).item()))]
    run_steps("layer", steps)
    run_steps("layer", steps)
    monkeypatch.setenv("LORA_EDU_CHECK_SEED", "7")
    run_steps("layer", steps)
    run_steps("layer", steps)
    assert drawn[0] != drawn[1]
    assert drawn[2] == drawn[3]


@pytest.mark.parametrize("hint", [0, 4, "2"])
def test_unknown_hint(hint):
    with pytest.raises(ValueError, match="expected 1"):
        run_steps("layer", [("a", fine)], hint)


def test_no_steps():
    with pytest.raises(ValueError, match="no steps"):
        run_steps("layer", [])


def test_under_nbgrader_a_check_without_a_notebook_raises_unless_all_is_right(monkeypatch, tmp_path, capsys):
    (tmp_path / "other.ipynb").write_text("[1]")  # not the notebook: its points are unknown
    monkeypatch.setattr(autograding, "FOLDER", tmp_path)
    monkeypatch.setenv("NBGRADER_EXECUTION", "autograde")
    assert run_steps("layer", [("a", fine), ("b", fine)])
    with pytest.raises(autograding.NotPassed, match=r"layer: 1 of 2 steps right\nthe update is 4\.0"):
        run_steps("layer", [("a", fine), ("b", wrong)])
    with pytest.raises(autograding.NotPassed, match=r"layer: 0 of 1 steps right\nnot done yet"):
        run_steps("layer", [("a", missing)])
    assert "✗ the update" in capsys.readouterr().out


def test_a_grader_says_what_is_drawn(monkeypatch):
    drawn = []

    def step():
        drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))

    monkeypatch.setenv("LORA_EDU_CHECK_SEED", "1")
    for seed in (5, 5, 0):
        with drawn_from(seed):
            run_steps("layer", [("draws", step)])
    run_steps("layer", [("draws", step)])
    assert drawn[0] == drawn[1]
    assert len({*drawn}) == 3
