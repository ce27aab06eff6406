"""Adapters cross between lora_edu and PEFT in both directions, with every option that changes numbers or keys."""

import json
import re

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from shapes import TARGETS, batch_for, moved, pair, relative_error, tiny_model

from lora_edu import LoraConfig, inject, load_adapter, save_adapter

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
]

CASES = {
    "plain": {},
    "alpha": {"r": 4, "lora_alpha": 6},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "dropout": {"lora_dropout": 0.3},
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only"},
    "patterns": {"r": 4, "rank_pattern": {"layers.1.*": 2}, "alpha_pattern": {"layers.0.*": 9}},
    "one layer": {"layers_to_transform": [1]},
    "excluded": {"exclude_modules": ["1.self_attn.q_proj"]},
    "all-linear": {"targets": "all-linear"},
    "regex": {"targets": r".*\.1\..*(proj|dense)"},
    "head trained": {"modules_to_save": ["lm_head"]},
    "head trained, bias all": {"modules_to_save": ["lm_head"], "bias": "all"},
    "embedding": {"targets": ["q_proj", "embed_tokens"]},
    "tied embedding and head": {
        "targets": ["embed_tokens", "lm_head"],
        "model_settings": {"tie_word_embeddings": True},
    },
}
OTHER_SHAPES = {
    "gpt2": [{}, {"r": 4, "lora_alpha": 6, "bias": "all"}, {"targets": "all-linear"}, {"targets": ["wte", "c_proj"]}],
    "bert": [{}, {"bias": "lora_only"}, {"modules_to_save": ["classifier"]}, {"targets": "all-linear"}],
}
ALL = [pytest.param("llama", case, id=f"llama {name}") for name, case in CASES.items()] + [
    pytest.param(shape, case, id=f"{shape} {case}") for shape, cases in OTHER_SHAPES.items() for case in cases
]


def logits(model, shape):
    batch = batch_for(shape, model)
    return model.eval()(**batch).logits


@pytest.mark.parametrize(("shape", "case"), ALL)
def test_peft_reads_what_we_write(shape, case, tmp_path):
    settings = case.get("model_settings", {})
    ours, _ = pair(shape, torch.float32, **case)
    moved(ours)
    save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_model(shape, torch.float32, **settings), tmp_path)
    assert relative_error(logits(theirs, shape), logits(ours, shape)) <= 1e-5


@pytest.mark.parametrize(("shape", "case"), ALL)
def test_we_read_what_peft_writes(shape, case, tmp_path):
    settings = case.get("model_settings", {})
    _, theirs = pair(shape, torch.float32, **case)
    moved(theirs)
    theirs.save_pretrained(tmp_path)
    ours = tiny_model(shape, torch.float32, **settings)
    load_adapter(ours, tmp_path)
    assert relative_error(logits(ours, shape), logits(theirs, shape)) <= 1e-5
    assert not any(parameter.requires_grad for parameter in ours.parameters())


@pytest.mark.parametrize("name", ["plain", "patterns", "bias all", "head trained", "embedding"])
def test_the_files_hold_the_same_keys_and_numbers(name, tmp_path):
    ours, theirs = pair("llama", torch.float32, **CASES[name])
    save_adapter(ours, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    a = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    b = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    # PEFT adds an unchanged copy of an embedding that is a target.
    assert b.keys() - a.keys() == {key for key in b if key.endswith("embed_tokens.base_layer.weight")}
    assert a.keys() <= b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_every_field_we_write_is_one_of_peft(tmp_path):
    inject(model := tiny_model("gpt2"), LoraConfig())
    save_adapter(model, tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert set(fields) <= {*peft.LoraConfig.__dataclass_fields__}
    assert fields["target_modules"] == ["c_attn"]
    assert fields["fan_in_fan_out"] is True


def test_default_targets_agree_with_peft():
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as theirs

    from lora_edu.core.matching import DEFAULT_TARGETS

    lists = {family: targets for family, targets in theirs.items() if isinstance(targets, list)}
    assert {family for family in lists if DEFAULT_TARGETS.get(family) != lists[family]} == set()
    assert DEFAULT_TARGETS.keys() <= theirs.keys()


def test_a_half_precision_file_loads_into_float32(tmp_path):
    ours, _ = pair("llama", torch.bfloat16, targets=TARGETS["llama"])
    save_adapter(ours, tmp_path)
    model = tiny_model("llama", torch.float32)
    load_adapter(model, tmp_path, is_trainable=True)
    again = peft.PeftModel.from_pretrained(tiny_model("llama", torch.float32), tmp_path)
    assert relative_error(logits(model, "llama"), logits(again, "llama")) <= 1e-5
    assert any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", ["plain", "bias all", "head trained", "embedding"])
def test_keys_with_the_default_adapters_name_in_them_are_read_by_both(name, tmp_path):
    """Older versions and other tools write ``lora_A.default.weight``."""
    _, theirs = pair("llama", torch.float32, **CASES[name])
    moved(theirs)
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    renamed = {re.sub(r"(\.lora_(embedding_)?[AB])\b", r"\1.default", key): tensor for key, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, path)
    ours = tiny_model("llama", torch.float32)
    load_adapter(ours, tmp_path)
    assert relative_error(logits(ours, "llama"), logits(theirs, "llama")) <= 1e-5
    again = peft.PeftModel.from_pretrained(tiny_model("llama", torch.float32), tmp_path)
    assert relative_error(logits(again, "llama"), logits(theirs, "llama")) <= 1e-5
