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

from lora_edu.files import data_path
from lora_edu.lab.bases import list_bases, load_base
from lora_edu.lab.datasets import (
    DATASETS,
    IGNORED,
    SPLITS,
    TEXTS,
    collate,
    encode,
    encode_topics,
    format_chat,
    format_entry,
    load_dataset,
    mask_labels,
    prompt_ids,
)

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


def test_every_run_and_adapter_is_in_the_readme_as_it_is():
    data = REPOSITORY / "data"
    readme = (data / "README.md").read_text(encoding="utf-8")
    sums = set(re.findall(r"[0-9a-f]{64}", readme))
    for path in [*data.glob("runs/*.json"), *data.glob("adapters/*/*")]:
        assert hashlib.sha256(path.read_bytes()).hexdigest() in sums, path.name
    rows = re.findall(r"^\| `([^`]+)` \| `([0-9a-f]{64})` \| ([\d,]+) \|", readme, flags=re.MULTILINE)
    assert len(rows) > 30
    for name, sha256, size in rows:
        content = (data / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == sha256, name
        assert f"{len(content):,}" == size, name


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


BOS_FIRST = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
NO_BOS = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
ANSWERING = "{% if add_generation_prompt %}assistant: {% endif %}"


def chat_tokenizer(name):
    """tiny's tokenizer with a template of our own, or SmolLM2's with its own."""
    if name != "smollm2-135m":
        made = AutoTokenizer.from_pretrained(data_path("tiny"))
        made.chat_template = {"bos first": BOS_FIRST, "no bos": NO_BOS}[name] + ANSWERING
        return made
    (base,) = [base for base in list_bases() if base.name == name]
    if not base.present:
        pytest.skip("smollm2-135m is not on this machine")
    return AutoTokenizer.from_pretrained(base.path)


@pytest.mark.parametrize("name", ["bos first", "smollm2-135m"])
@pytest.mark.parametrize("split", SPLITS)
def test_chat_rows_are_the_tokenizers_own_ids(name, split):
    tokenizer = chat_tokenizer(name)
    entries = load_dataset(DEVIL, split)
    rows = encode(entries, tokenizer, max_length=1000, chat=True)
    for entry, row in zip(entries, rows, strict=True):
        request = f"Define: {entry['word']}, {entry['pos']}" if entry["pos"] else f"Define: {entry['word']}"
        asked = [{"role": "user", "content": request}]
        given = tokenizer.apply_chat_template(asked, tokenize=True, add_generation_prompt=True)["input_ids"]
        answered = [*asked, {"role": "assistant", "content": entry["definition"]}]
        whole = tokenizer.apply_chat_template(answered, tokenize=True)["input_ids"]
        n = len(row["input_ids"])
        assert row["input_ids"][: len(given)] == given
        assert row["labels"] == [-100] * len(given) + row["input_ids"][len(given) :]
        assert row["input_ids"][-1] == tokenizer.eos_token_id
        if name == "smollm2-135m":  # its template ends the answer with <|im_end|>, its eos, and a line break
            assert row["input_ids"] == whole[:n]
            assert tokenizer.decode(whole[n:]) == "\n"


@pytest.mark.parametrize("name", ["bos first", "no bos", "smollm2-135m"])
def test_a_chat_prompt_starts_with_one_bos(name):
    tokenizer = chat_tokenizer(name)
    entry = {"word": "politician", "pos": "noun", "definition": "a leader"}
    prompt, answer = format_chat(entry, tokenizer)
    ids = prompt_ids(prompt, tokenizer)
    assert ids[0] == tokenizer.bos_token_id != ids[1]
    assert answer == "a leader"
    assert "Define: politician, noun" in tokenizer.decode(ids)
    assert "Define: politician<" in format_chat({**entry, "pos": ""}, tokenizer)[0]
    assert encode([entry], tokenizer, chat=True)[0]["input_ids"][: len(ids)] == ids
    assert prompt_ids("politician", tokenizer)[0] == tokenizer.bos_token_id
    with pytest.raises(ValueError, match="max_length=5: the prompt"):
        encode([entry], tokenizer, max_length=5, chat=True)


def test_a_tokenizer_without_bos_gets_none(tokenizer):
    plain = AutoTokenizer.from_pretrained(data_path("tiny"))
    plain.bos_token = None
    assert prompt_ids("politician", plain) == prompt_ids("politician", tokenizer)[1:]


@pytest.mark.errors
def test_chat_needs_a_template(tokenizer):
    entry = {"word": "politician", "pos": "noun", "definition": "a leader"}
    for ask in (lambda: format_chat(entry, tokenizer), lambda: encode([entry], tokenizer, chat=True)):
        with pytest.raises(ValueError, match=r"no chat template: encode with chat=False, or take .* smollm2-135m"):
            ask()


def test_encode_topics(tokenizer):
    entries = load_dataset("wordnet_topics", "test")
    rows = encode_topics(entries, tokenizer, max_length=9)
    assert [row["labels"] for row in rows] == [entry["label"] for entry in entries]
    for entry, row in zip(entries, rows, strict=True):
        whole = [tokenizer.bos_token_id, *tokenizer(entry["definition"], add_special_tokens=False)["input_ids"]]
        assert row["input_ids"] == whole[:9]
    assert {len(row["input_ids"]) for row in rows} > {9}
    assert max(len(row["input_ids"]) for row in encode_topics(entries, tokenizer)) == 32


def test_an_encoder_gets_the_token_that_its_head_reads():
    _, bert = load_base("minilm", head="classification", num_labels=10)
    entries = load_dataset("wordnet_topics", "test")
    rows = encode_topics(entries, bert, max_length=12)
    for entry, row in zip(entries, rows, strict=True):
        inner = bert(entry["definition"], add_special_tokens=False)["input_ids"][:10]
        assert row == {"input_ids": [bert.cls_token_id, *inner, bert.sep_token_id], "labels": entry["label"]}


@pytest.mark.errors
def test_encode_topics_needs_labels_and_room(tokenizer):
    with pytest.raises(ValueError, match=r"the entry of '.+' has no label: only wordnet_topics"):
        encode_topics(load_dataset(DEVIL, "test"), tokenizer)
    with pytest.raises(ValueError, match="max_length=1"):
        encode_topics(load_dataset("wordnet_topics", "test"), tokenizer, max_length=1)


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


def test_labels_of_a_batch_are_those_that_encode_and_collate_give(tokenizer):
    rows = encode(load_dataset("devils_dictionary")[:12], tokenizer, max_length=20)  # some are cut, most are padded
    batch = collate(rows, tokenizer.eos_token_id)
    prompts = [sum(label == IGNORED for label in row["labels"]) for row in rows]
    before = batch["input_ids"].clone()
    labels = mask_labels(batch["input_ids"], batch["attention_mask"], prompts)
    assert torch.equal(labels, batch["labels"])
    assert torch.equal(batch["input_ids"], before)
    ends = (batch["input_ids"] == tokenizer.eos_token_id) & (batch["attention_mask"] == 1)
    assert ends.any()
    assert (labels[ends] == tokenizer.eos_token_id).all()  # although the padding has the same id


def test_collate_takes_one_label_per_row():
    batch = collate([{"input_ids": [1, 5, 2], "labels": 3}, {"input_ids": [1], "labels": 0}], pad_token_id=9)
    assert batch["labels"].tolist() == [3, 0]
    assert batch["labels"].dtype == torch.int64
    assert batch["input_ids"].tolist() == [[1, 5, 2], [1, 9, 9]]
    with pytest.raises(ValueError, match="cannot share a batch"):
        collate([{"input_ids": [1, 5], "labels": [1, 5]}, {"input_ids": [1], "labels": 0}], pad_token_id=9)


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
