"""Blind pairs of lesson 12: nothing shows who is who, the tally unblinds rightly, the form works without a screen."""

import pytest

from lora_edu.lab.pairs import BlindPairs

WORDS = [f"word {i}" for i in range(21)]
ONE, OTHER = [f"one {i}." for i in range(21)], [f"other {i}." for i in range(21)]


def pairs(seed=0):
    return BlindPairs(WORDS, {"one": ONE, "other": OTHER}, seed=seed)


def letter_of(blind, number, name):
    return "AB"[blind.shown[number - 1].index(f"{name} {blind.questions[number - 1].split()[1]}.")]


@pytest.mark.parametrize("seed", range(5))
def test_every_pair_is_there_once_with_its_own_answers_and_a_is_each_as_often(seed):
    blind = pairs(seed)
    assert sorted(blind.questions) == sorted(WORDS)
    assert blind.questions != WORDS
    for question, answers in zip(blind.questions, blind.shown, strict=True):
        number = question.split()[1]
        assert sorted(answers) == [f"one {number}.", f"other {number}."]
    firsts = [letter_of(blind, number, "one") for number in range(1, 22)]
    assert firsts.count("A") in (10, 11)
    assert blind.shown == pairs(seed).shown != pairs(seed + 1).shown


def test_the_tally_says_who_was_preferred():
    blind = pairs()
    for number in range(1, 16):
        blind.prefer(number, letter_of(blind, number, "one"))
    blind.prefer(16, letter_of(blind, 16, "other").lower())
    blind.prefer(17, "=")
    found = blind.tally()
    assert found.wins == {"one": 15, "other": 1}
    assert (found.ties, found.left) == (1, 4)
    assert found.share == pytest.approx(15.5 / 17)
    assert found.interval[0] > 0.5
    assert str(found).endswith("]: evidence of a preference")
    blind.prefer(1, letter_of(blind, 1, "other"))
    assert blind.tally().wins == {"one": 14, "other": 2}


def test_a_reader_who_always_takes_a_prefers_nobody():
    blind = pairs()
    for number in range(1, 21):
        blind.prefer(number, "A")
    assert "not evidence of a preference" in str(blind.tally())


def test_nothing_read_and_one_read():
    blind = pairs()
    assert str(blind.tally()) == "no pair is read yet, 21 are waiting"
    blind.prefer(3, "B")
    assert blind.tally().interval == (0, 1)


def test_pairs_that_are_the_same_are_left_out_and_the_text_is_numbered():
    blind = BlindPairs(["a", "b", "c"], {"x": ["same", "1", "2"], "y": ["same", "3", "4"]})
    assert len(blind) == 2
    lines = blind.text().split("\n")
    assert [line[0] for line in lines if line[0] != " "] == ["1", "2"]
    assert "x" not in blind.text()
    assert "y" not in blind.text()


def test_the_form_notes_clicks_without_a_screen():
    pytest.importorskip("ipywidgets")
    blind = pairs()
    form = blind.form()
    buttons = [row.children[1] for row in form.children]
    assert len(buttons) == 21
    buttons[0].value, buttons[4].value = "A", "="
    assert blind.preferred == {1: "A", 5: "="}
    buttons[0].value = ""
    assert blind.preferred == {5: "="}
    assert blind.form().children[4].children[1].value == "="


@pytest.mark.errors
@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: pairs().prefer(22, "A"), "numbered from 1 to 21"),
        (lambda: pairs().prefer(1, "C"), "'C' is no choice"),
        (lambda: BlindPairs(WORDS, {"one": ONE}), "expected two systems"),
        (lambda: BlindPairs(WORDS, {"one": ONE, "other": OTHER[:3]}), "21 questions, answers of one: 21, other: 3"),
        (lambda: BlindPairs(WORDS, {"one": ONE, "other": ONE}), "nothing to prefer"),
    ],
)
def test_what_cannot_be_paired(call, said):
    with pytest.raises(ValueError, match=said):
        call()
