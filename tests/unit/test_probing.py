"""The frozen encoder's embeddings, their probe and neighbours; prompts with examples, and the answers to them."""

import json
from types import SimpleNamespace

import pytest
import torch

from lora_edu.files import data_path
from lora_edu.lab.bases import load_base
from lora_edu.lab.datasets import encode_topics, load_dataset
from lora_edu.lab.probing import embed, nearest, probe
from lora_edu.lab.prompting import answer, topic_prompt
from lora_edu.lab.recording import labels


@pytest.fixture(scope="module")
def minilm():
    return load_base("minilm")


def test_embeddings_are_means_of_length_one_whatever_shares_a_batch(minilm):
    encoder, tokenizer = minilm
    rows = encode_topics(load_dataset("wordnet_topics", "test")[:7], tokenizer)
    vectors = embed(encoder, rows, batch_size=3)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(7), atol=1e-6)
    for row, vector in zip(rows, vectors, strict=True):
        with torch.no_grad():
            hidden = encoder(input_ids=torch.tensor([row["input_ids"]])).last_hidden_state[0].mean(0)
        assert torch.allclose(vector, hidden / hidden.norm(), atol=1e-5)


def test_a_probe_learns_what_is_linear_and_neighbours_end_with_the_nearest():
    vectors = torch.nn.functional.normalize(torch.randn(60, 5, generator=torch.Generator().manual_seed(0)), dim=1)
    sides = (vectors[:, 0] > 0).long().tolist()
    assert probe(vectors, sides).score(vectors.numpy(), sides) > 0.95
    places = nearest(vectors, vectors[7], 3)
    assert places[-1] == 7
    similar = (vectors @ vectors[7])[places]
    assert (similar.diff() >= 0).all()


def test_a_prompt_shows_the_examples_in_order_and_ends_where_the_answer_comes():
    rows = [{"definition": "a kind of fish", "topic": "animal"}, {"definition": "a kind of tree", "topic": "plant"}]
    text = topic_prompt("a kind of bread", rows, ["animal", "food", "plant"])
    assert text.startswith("Topics: animal, food, plant\n")
    assert text.index("fish\nTopic: animal") < text.index("tree\nTopic: plant") < text.index("bread")
    assert text.endswith("a kind of bread\nTopic:")


def test_an_answer_is_the_name_with_the_most_probable_first_token():
    ids = {" one": [3, 9], " two": [5], "prompt": [1, 2]}

    def tokenizer(text, add_special_tokens):
        return {"input_ids": ids[text]}

    def model(input_ids, logits_to_keep):
        assert input_ids.tolist() == [[1, 2]]
        logits = torch.zeros(1, 1, 10)
        logits[0, 0, 5], logits[0, 0, 7] = 2.0, 9.0  # the most probable token of all begins no name
        return SimpleNamespace(logits=logits)

    assert answer(model, tokenizer, "prompt", ["one", "two"]) == "two"
    ids[" two"] = [3]
    with pytest.raises(ValueError, match="begin with the same token"):
        answer(model, tokenizer, "prompt", ["one", "two"])


def test_the_record_has_every_run_of_its_script():
    record = json.loads(data_path("runs", "labels.json").read_text(encoding="utf-8"))
    done = [line["job"] for line in record["runs"]]
    assert all(job in done for job in labels.jobs())
    for line in record["runs"]:
        assert record["machines"][line["machine"]]["hardware"]
    assert record["settings"]["steps"] == labels.STEPS
    assert record["settings"]["rates"] == labels.RATES
