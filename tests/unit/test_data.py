"""The committed texts: disjoint splits, nothing of the exclusion list, the checksums that data/README.md promises."""

import gzip
import hashlib
import importlib.util
import json
import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoTokenizer

from lora_edu.lab.bases import data_path
from lora_edu.lab.datasets import DATASETS, SPLITS, TEXTS, collate, encode, format_entry, load_dataset

DEVIL = "devils_dictionary"
REPOSITORY = Path(__file__).resolve().parents[2]


def build_script() -> ModuleType:
    """data/build.py as a module; it is a script beside the data, not part of the package."""
    folder = str(REPOSITORY / "data")
    sys.path.insert(0, folder)
    try:
        spec = importlib.util.spec_from_file_location("data_build", REPOSITORY / "data" / "build.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(folder)
    return module


def notebook_outputs(path: Path) -> str:
    """Everything that a notebook's cells printed or showed as text."""
    texts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        for output in cell.get("outputs", []):
            texts += ["".join(output.get("text", [])), "".join(output.get("data", {}).get("text/plain", []))]
    return "\n".join(texts)


def excluded_in(text: str) -> list[str]:
    """The excluded words that occur in a text."""
    return [match.group(0) for match in build_script().excluded_words().finditer(text)]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(data_path("tiny"))


@pytest.mark.parametrize("name", TEXTS)
def test_no_headword_and_no_definition_is_in_two_splits(name):
    splits = [load_dataset(name, split) for split in SPLITS]
    for field in ("word", "definition"):
        sets = [{row[field].lower() for row in rows} for rows in splits]
        assert all(sets)
        assert sum(map(len, sets)) == len(set.union(*sets))


def test_a_word_held_out_of_the_topics_is_not_one_that_tiny_was_trained_on():
    read = {row["word"].lower() for row in load_dataset("wordnet_glosses", "train")}
    assert not read & {row["word"].lower() for row in load_dataset("wordnet_topics", "test")}


def test_sizes_are_those_the_lessons_count_on():
    assert len(load_dataset("devils_dictionary")) > 500
    assert len(load_dataset("jargon")) > 1500
    assert len(load_dataset("wordnet_glosses")) > 100_000
    assert sum(len(load_dataset("digits", split)) for split in SPLITS) == 1797


@pytest.mark.parametrize("split", SPLITS)
def test_topics_are_balanced(split):
    rows = load_dataset("wordnet_topics", split)
    counts = Counter(row["topic"] for row in rows)
    assert len(counts) == 10
    assert len(set(counts.values())) == 1
    assert len({(row["topic"], row["label"]) for row in rows}) == 10


def test_digits_are_images_between_zero_and_one():
    row = load_dataset("digits", "test")[0]
    assert row["image"].shape == (8, 8)
    assert 0 <= row["image"].min() <= row["image"].max() <= 1
    assert row["label"] in range(10)


@pytest.mark.parametrize("name", TEXTS)
def test_texts_hold_nothing_of_the_exclusion_list(name):
    pattern = build_script().excluded_words()
    rows = [row for split in SPLITS for row in load_dataset(name, split)]
    assert not [row for row in rows if pattern.search(row["word"]) or pattern.search(row["definition"])]
    heads = {head.lower() for head in build_script().exclusions().get(name, [])}
    assert not heads & {row["word"].lower() for row in rows}


def test_the_exclusion_pattern_finds_what_it_should_and_spares_its_neighbours():
    listed = "\n".join(build_script().exclusions()["words"])
    assert "slut" in listed
    assert excluded_in("What a SLUT, he said") == ["SLUT"]
    assert excluded_in("the classic assessment of Scunthorpe's cocktail raccoon in Japan") == []


def test_stored_notebook_outputs_hold_nothing_of_the_exclusion_list():
    pattern = build_script().excluded_words()
    notebooks = sorted((REPOSITORY / "lessons").rglob("*.ipynb"))
    found = {path.name: pattern.findall(notebook_outputs(path)) for path in notebooks}
    assert not {name: words for name, words in found.items() if words}


def test_checksums_of_the_readme_match():
    readme = (REPOSITORY / "data" / "README.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| `([^`]+)` \| `([0-9a-f]{64})` \|", readme, flags=re.MULTILINE))
    mine = [f"texts/{name}.jsonl.gz" for name in TEXTS]
    mine += ["tiny/config.json", "tiny/model.safetensors", "tiny/tokenizer.json", "runs/tiny_pretraining.json"]
    assert set(mine) <= set(listed)
    for name in mine:
        assert hashlib.sha256((REPOSITORY / "data" / name).read_bytes()).hexdigest() == listed[name], name


@pytest.mark.parametrize("name", TEXTS)
def test_files_carry_no_time_stamp(name):
    assert data_path("texts", f"{name}.jsonl.gz").read_bytes()[4:8] == b"\0\0\0\0"


def test_splitting_keeps_shared_headwords_and_definitions_together():
    chain = [{"word": f"w{i // 2}", "pos": "noun", "definition": f"d{(i + 1) // 2}"} for i in range(40)]
    rows = build_script().split(chain, (30, 30))
    assert len({row["split"] for row in rows}) == 1
    apart = [{"word": f"w{i}", "pos": "noun", "definition": f"d{i}"} for i in range(200)]
    assert {row["split"] for row in build_script().split(apart, (30, 30))} == set(SPLITS)


@pytest.mark.skipif(
    not Path("/usr/share/dictd/devil.dict.dz").exists(), reason="Debian package dict-devil not installed"
)
def test_the_devils_dictionary_is_what_the_script_builds():
    built = {row["word"].lower(): row["definition"] for row in build_script().devils_dictionary(set())}
    committed = {row["word"].lower(): row["definition"] for split in SPLITS for row in load_dataset(DEVIL, split)}
    assert {word: built.get(word) for word in committed} == committed
    assert committed["abdication"].endswith("high temperature of the throne.")  # and not the verse after it


def test_format_entry():
    entry = {"word": "politician", "pos": "noun", "definition": "a leader"}
    assert format_entry(entry) == ("politician (noun):", " a leader")
    assert format_entry({**entry, "pos": ""}) == ("politician:", " a leader")


def test_encode_asks_for_the_definition_only(tokenizer):
    entry = {"word": "politician", "pos": "noun", "definition": "a leader in civil administration"}
    (row,) = encode([entry], tokenizer)
    prompt = [tokenizer.bos_token_id, *tokenizer("politician (noun):", add_special_tokens=False)["input_ids"]]
    assert row["input_ids"][: len(prompt)] == prompt
    assert row["labels"][: len(prompt)] == [-100] * len(prompt)
    assert row["labels"][len(prompt) :] == row["input_ids"][len(prompt) :]
    assert row["input_ids"][-1] == tokenizer.eos_token_id
    text = tokenizer.decode(row["input_ids"], skip_special_tokens=True)
    assert text == "politician (noun): a leader in civil administration"


def test_encode_cuts_long_entries_and_refuses_long_prompts(tokenizer):
    entry = {"word": "politician", "pos": "noun", "definition": "very " * 100}
    (row,) = encode([entry], tokenizer, max_length=16)
    assert len(row["input_ids"]) == len(row["labels"]) == 16
    assert tokenizer.eos_token_id not in row["input_ids"]
    with pytest.raises(ValueError, match="max_length=3: the prompt 'politician"):
        encode([entry], tokenizer, max_length=3)


def test_no_text_has_bytes_that_the_tokenizer_leaves_single(tokenizer):
    rows = load_dataset("jargon", "test") + load_dataset("devils_dictionary", "test")
    words = [len(row["definition"].split()) for row in rows]
    tokens = [len(tokenizer(row["definition"])["input_ids"]) for row in rows]
    assert sum(tokens) / sum(words) < 2.0
    assert tokenizer.unk_token is None


def test_collate_pads_on_the_right_and_masks_the_padding():
    rows = [{"input_ids": [1, 5, 2], "labels": [-100, 5, 2]}, {"input_ids": [1, 2], "labels": [-100, 2]}]
    batch = collate(rows, pad_token_id=9)
    assert batch["input_ids"].tolist() == [[1, 5, 2], [1, 2, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 5, 2], [-100, 2, -100]]
    assert batch["input_ids"].dtype == torch.int64


@pytest.mark.errors
def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match="unknown data set 'devil'") as error:
        load_dataset("devil")
    assert all(name in str(error.value) for name in DATASETS)
    with pytest.raises(ValueError, match=r"unknown split 'dev'.*train, validation, test"):
        load_dataset("jargon", "dev")


@pytest.mark.errors
def test_a_missing_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_EDU_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"jargon\.jsonl\.gz is missing"):
        load_dataset("jargon")


def test_every_line_has_its_fields():
    for name in TEXTS:
        with gzip.open(data_path("texts", f"{name}.jsonl.gz"), "rt", encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                assert {"word", "pos", "definition", "split"} <= row.keys()
                assert row["word"] == row["word"].strip() != ""
                assert row["definition"] == row["definition"].strip() != ""
