"""The recorded answers that lesson 12 evaluates: complete, and from the splits that they should be from."""

import json

import pytest

from lora_edu import load_dataset
from lora_edu.files import data_path

pytestmark = pytest.mark.recording


def test_the_record_is_complete_and_from_the_right_splits():
    record = json.loads(data_path("runs", "answers.json").read_text(encoding="utf-8"))
    words = {split: {row["word"] for row in load_dataset("devils_dictionary", split)} for split in ("train", "test")}
    assert len(set(record["words"])) == len(record["words"]) == 60
    assert set(record["words"]) <= words["test"]
    assert set(record["examples"]) <= words["train"]
    assert set(record["negatives"]) <= words["train"]
    systems = record["systems"]
    assert set(systems) == {"base", "asked", "ten examples", "adapter", "tiny"}
    for name, system in systems.items():
        assert len(system["answers"]) == 60
        assert all(text.strip() for text in system["answers"])
        if name != "tiny":
            tokens = [count for _, count in system["losses"]]
            assert tokens == [count for _, count in systems["base"]["losses"]]
    assert len(systems["base"]["negatives"]) == len(record["negatives"]) == 120
    for name in ("base", "adapter"):
        assert len(systems[name]["capitals"]) == len(record["capitals"]) == 20
