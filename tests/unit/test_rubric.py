"""The checks of lesson 12 that a program can do: each rule alone, on texts that break it and texts that nearly do."""

import pytest

from lora_edu import load_base, load_dataset
from lora_edu.lab import rubric


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("A cat. It sleeps.", "A cat."),
        ("A cat\nthat sleeps", "A cat that sleeps"),
        ("Is it? Yes.", "Is it?"),
        ("About 3.14 of it. More.", "About 3.14 of it."),
        ("", ""),
    ],
)
def test_first_sentence(text, first):
    assert rubric.first_sentence(text) == first


def test_words_keep_their_hyphens_and_apostrophes():
    assert rubric.words_of("A meat-axe, isn't it? __x__") == ["a", "meat-axe", "isn't", "it", "x"]


def test_a_loop_is_found_and_a_repeated_pair_is_none():
    assert rubric.repeats("the time when we are young, the time when we are old")
    assert not rubric.repeats("the time and the time again")
    assert not rubric.repeats("two words")


def test_the_longest_copy_is_in_one_source_and_of_whole_words():
    sources = ["One who has the power.", "A power to make the laws of men."]
    found = rubric.longest_copy("One has the power to make the laws.", sources)
    assert found == ("power", "to", "make", "the", "laws")
    assert rubric.longest_copy("he ma", ["the man"]) == ()
    assert rubric.longest_copy("nothing alike", sources) == ()
    assert rubric.longest_copy("", sources) == ()


def test_a_good_definition_passes_all_rules_and_each_rule_finds_its_own_mistake():
    given = {"word": "zeal", "ended": True, "sources": ["A feeling of attachment to the wrong person."]}
    assert all(rubric.check_answer("A nervous disorder of the young.", **given))
    broken = {
        "is_sentence": rubric.check_answer("a nervous disorder of the young.", **given),
        "has_length": rubric.check_answer("A disorder.", **given),
        "ends_by_itself": rubric.check_answer("A nervous disorder of the young.", **given | {"ended": False}),
        "does_not_repeat": rubric.check_answer("A disorder of the young, a disorder of the old.", **given),
        "is_not_circular": rubric.check_answer("Zeal is a nervous disorder.", **given),
        "is_not_copied": rubric.check_answer("A feeling of attachment to the wrong.", **given),
    }
    for rule, checked in broken.items():
        assert [name for name, fine in checked._asdict().items() if not fine] == [rule]


def test_a_part_of_a_word_is_not_circular():
    assert rubric.check_answer("A kind of zealot from the hills.", "zeal", True).is_not_circular
    assert not rubric.check_answer("The hair of Berenice's hair is long.", "Berenice's hair", True).is_not_circular


def test_ends_by_itself_counts_tokens():
    _, tokenizer = load_base("tiny")
    text = "a leader of the people"
    tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert rubric.ends_by_itself(text, tokenizer, tokens + 2)
    assert not rubric.ends_by_itself(text, tokenizer, tokens)


def test_contamination_finds_the_pair_of_lesson_07():
    texts = {
        split: [entry["definition"] for entry in load_dataset("devils_dictionary", split)]
        for split in ("train", "validation", "test")
    }
    found = rubric.contamination(texts["validation"] + texts["test"], texts["train"])
    assert len(found) == 188
    assert found[0].held_out == "To lay the foundation for a future offence."
    assert found[0].share == pytest.approx(0.5)
    assert found[1].share < 0.13
    assert found[-1].share == 0


def test_contamination_of_short_texts_is_that_of_the_whole():
    found = rubric.contamination(["Predigested wisdom.", "A cat."], ["A dog.", "predigested wisdom", "A cat sleeps."])
    assert found[0] == (1.0, "Predigested wisdom.", "predigested wisdom")
    assert found[1].share == 0


@pytest.mark.errors
def test_contamination_of_nothing():
    with pytest.raises(ValueError, match="0 held-out and 1 training texts"):
        rubric.contamination([], ["a"])
