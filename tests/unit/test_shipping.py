"""What lesson 13 ships with: a model's card, the proof that what is served is not the base, the merged folder."""

import json

import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_edu import LoHaConfig, LoraConfig, disable_adapter, inject, load_adapter, load_base, save_adapter
from lora_edu.core.adapter import adapter_layers
from lora_edu.files import data_path
from lora_edu.lab.training import generate
from lora_edu.serving.card import Figure, model_card, save_card
from lora_edu.serving.proof import served_is_not_base
from lora_edu.serving.shipping import same_answers, save_merged

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SHIPPED = data_path("adapters", "smollm2-devils-dictionary")
DEVIL = data_path("adapters", "tiny-devils-dictionary")
PROMPTS = ["politician (noun):", "love (noun):", "piano (noun):"]


@pytest.fixture
def folder(tmp_path):
    """A small adapter's folder."""
    model, _ = load_base("tiny")
    inject(model, LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj", "v_proj"]))
    return save_adapter(model, tmp_path / "mine")


# The card


def test_what_is_not_given_is_not_made_up(folder):
    card = ModelCard(model_card(folder))  # as the hub reads it
    assert card.data.to_dict() == {
        "base_model": "tiny", "library_name": "peft", "pipeline_tag": "text-generation", "tags": ["lora"],
    }  # fmt: skip
    parts = dict(part.split("\n\n", 1) for part in card.text.split("\n## ")[1:])
    assert parts["Evaluation"].strip() == "not measured"
    for heading in ("Training data", "Training", "Licence", "Limits"):
        assert parts[heading].strip() == "not stated", heading


def test_a_card_says_what_the_files_and_the_records_say():
    log = json.loads(data_path("runs", "smollm2_devils_dictionary.json").read_text())
    text = model_card(
        SHIPPED, title="Devil | Dictionary", about="Defines words.", base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
        license="apache-2.0", language="en", datasets=["someone/words"], tags=["dictionary"],
        data="The Devil's Dictionary", training=log["settings"],
        evaluation=[
            Figure("loss per token (nats)", "test words", log["adapted"]["test"], (3.6, 3.9), log["base"]["test"]),
            Figure("right | wrong", "three sums"),
        ],
        limits=["One author's voice."],
    )  # fmt: skip
    head = yaml.safe_load(text.split("---")[1])
    assert head["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert head["license"] == "apache-2.0"
    assert head["language"] == "en"
    assert head["datasets"] == ["someone/words"]
    assert head["tags"] == ["lora", "dictionary"]
    assert "| loss per token (nats) | test words | 4.655 | 3.731 | 3.6 to 3.9 |" in text
    assert "| right \\| wrong | three sums | not measured | not measured | not measured |" in text
    for line in ("| lora_alpha | 16 |", "| scale of B·A as it acts | 2 |", "| size of the file | 4.94 MB |",
                 "| numbers in the file | 2,442,240, bfloat16 |", "| learning_rate | 0.0005 |",
                 "- One author's voice."):  # fmt: skip
        assert line in text


def test_the_scale_is_the_one_that_acts(folder):
    assert "| scale of B·A as it acts | 4 |" in model_card(folder)  # 8 / √4


def test_a_method_without_factors_has_a_card_without_their_scale(tmp_path):
    model, _ = load_base("tiny")
    inject(model, LoHaConfig(r=4, target_modules=["q_proj"]))
    card = model_card(save_adapter(model, tmp_path / "loha"))
    assert "| alpha | 8 |" in card
    assert "as it acts" not in card


def test_a_path_of_this_machine_is_not_published(folder):
    fields = json.loads((folder / "adapter_config.json").read_text())
    fields["base_model_name_or_path"] = "/home/somebody/models/base"
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    assert "somebody" not in model_card(folder)
    assert "base_model: me/base" in model_card(folder, base_model="me/base")


def test_a_card_is_written_beside_the_adapter(folder):
    path = save_card(folder, license="mit")
    assert path == folder / "README.md"
    assert path.read_text() == model_card(folder, license="mit")
    with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json"):
        save_card(folder.parent)
    assert not (folder.parent / "README.md").exists()


# Served is not base


BASE = {"a": "one two three", "b": "four five", "c": "six"}
ADAPTED = {"a": "one two 3", "b": "4 5", "c": "six"}


@pytest.mark.parametrize(
    ("served", "words", "verdict", "says"),
    [
        (ADAPTED, None, "adapter", "all 2 prompts that can tell"),
        (BASE, None, "base", "as if there were no adapter"),
        (ADAPTED | {"b": "four five"}, None, "neither", "1 got the adapter's answer, 1 the base's and 0 another text"),
        (dict.fromkeys("abc", "x"), None, "neither", "0 got the adapter's answer, 0 the base's and 3 another"),
        (ADAPTED | {"c": "x"}, None, "neither", "1 another text"),
        ({"a": "one  two 3\n", "b": " 4 5", "c": "six"}, None, "adapter", ""),
        ({"a": "one two 4", "b": "4 five", "c": "six"}, 1, "adapter", "all 1 prompts"),
    ],
)
def test_the_verdict_of_three_prompts(served, words, verdict, says):
    for base, adapted in ((BASE.get, ADAPTED.get), (list(BASE.values()), list(ADAPTED.values()))):
        proof = served_is_not_base(served.get, base, adapted, list("abc"), words)
        assert proof.verdict == verdict
        assert says in str(proof)
        assert [each.served for each in proof.answers] == [served[prompt] for prompt in "abc"]


@pytest.mark.errors
def test_prompts_that_cannot_tell_are_refused():
    with pytest.raises(ValueError, match="same answers to all 1 prompts"):
        served_is_not_base(BASE.get, BASE.get, ADAPTED.get, ["c"])
    with pytest.raises(ValueError, match="base has 2 texts for 1 prompts"):
        served_is_not_base(BASE.get, ["x", "y"], ADAPTED.get, ["a"])
    with pytest.raises(ValueError, match="give a list of prompts"):
        served_is_not_base(BASE.get, BASE.get, ADAPTED.get, "abc")


def test_real_models_are_told_apart():
    model, tokenizer = load_base("tiny")
    load_adapter(model, DEVIL)

    def ask(prompt):
        return generate(model, tokenizer, [prompt], 12)[0]

    def asked_base(prompt):
        with disable_adapter(model):
            return ask(prompt)

    expected = [ask(prompt) for prompt in PROMPTS]
    assert served_is_not_base(ask, asked_base, expected, PROMPTS).verdict == "adapter"
    assert served_is_not_base(asked_base, asked_base, expected, PROMPTS).verdict == "base"
    for layer in adapter_layers(model).values():
        layer.scaling *= 2.8
    assert served_is_not_base(ask, asked_base, expected, PROMPTS).verdict == "neither"


# The merged folder


def test_a_merged_folder_is_whole_and_answers_as_before(tmp_path):
    model, tokenizer = load_base("tiny")
    load_adapter(model, DEVIL)
    tokenizer.chat_template = "{{ messages[0]['content'] }} says"
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = 5  # not the tokenizer's
    folder = save_merged(model, tokenizer, tmp_path / "new" / "merged", max_new_tokens=17)
    assert {path.name for path in folder.parent.iterdir()} == {"merged"}
    assert len(adapter_layers(model)) == 21  # still beside its base
    plain, theirs = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert theirs.chat_template == tokenizer.chat_template
    assert plain.generation_config.max_new_tokens == 17
    assert plain.generation_config.eos_token_id == tokenizer.eos_token_id != 5
    assert plain.generation_config.pad_token_id == tokenizer.pad_token_id != 5
    found = same_answers(model, plain, theirs, PROMPTS)
    assert found.same == found.prompts == 3
    assert found.largest < 1e-4 * found.scale
    with disable_adapter(model):
        base = same_answers(model, plain, theirs, PROMPTS)
    assert base.largest > 0.01 * base.scale
    assert base.same < 3
    assert f"{base.same} of 3 greedy answers are the same text" in str(base)


@pytest.mark.errors
def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    model, tokenizer = load_base("tiny")
    load_adapter(model, DEVIL)
    (tmp_path / "old.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        save_merged(model, tokenizer, tmp_path)
    (tmp_path / "empty").mkdir()
    assert (save_merged(model, tokenizer, tmp_path / "empty") / "model.safetensors").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"old.txt", "empty"}
