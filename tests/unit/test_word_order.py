"""The task of lesson 15: fixed splits, half of each swapped, one swap of two different neighbours."""

import pytest

from lora_edu.lab.datasets import SPLITS, load_dataset
from lora_edu.lab.word_order import SIZES, is_plain, word_order


@pytest.mark.parametrize("split", SPLITS)
def test_half_of_each_split_is_swapped_once(split):
    rows = word_order(split)
    plain = {row["definition"] for row in load_dataset("wordnet_glosses", split)}
    assert len(rows) == SIZES[split]
    assert sum(row["label"] for row in rows) == len(rows) // 2
    assert len({row["definition"] for row in rows}) == len(rows)
    for row in rows:
        words = row["definition"].split()
        if not row["label"]:
            assert row["definition"] in plain
            continue
        neighbours = range(len(words) - 1)
        back = [" ".join([*words[:i], words[i + 1], words[i], *words[i + 2 :]]) for i in neighbours]
        assert plain & set(back)
        assert row["definition"] not in plain


def test_it_is_the_same_each_time_and_a_part_is_its_beginning():
    assert word_order("validation") == word_order("validation")
    assert word_order("train", limit=40) == word_order("train")[:40]
    assert [row["label"] for row in word_order("test", limit=4)] == [0, 1, 0, 1]


def test_no_gloss_is_in_two_splits():
    plain = [{row["definition"] for row in load_dataset("wordnet_glosses", split)} for split in SPLITS]
    mine = [{row["definition"] for row in word_order(split) if not row["label"]} for split in SPLITS]
    for number, rows in enumerate(mine):
        assert rows <= plain[number]
        assert not any(rows & other for place, other in enumerate(plain) if place != number)


def test_punctuation_and_repetition_give_nothing_away():
    assert not is_plain("a large, heavy and slow animal")
    assert not is_plain("too short a gloss")
    assert not is_plain("la la la la la la")
    assert is_plain("a large heavy and slow animal")


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'all'"):
        word_order("all")
