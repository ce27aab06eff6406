"""Several adapters on one base, by name, with PEFT's subfolders: each side reads what the other writes."""

import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from shapes import batch_for, relative_error, tiny_model

from lora_edu import (
    LoraConfig,
    disable_adapter,
    inject,
    list_adapters,
    load_adapter,
    merge,
    save_adapter,
    set_adapter,
)
from lora_edu.core.adapter import adapter_layers

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
]

# Two adapters that differ in every setting: (default, other).
PAIRS = {
    "llama": [
        {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"]},
        {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    ],
    "gpt2": [
        {"r": 3, "lora_alpha": 5, "target_modules": ["c_attn"]},
        {"r": 2, "lora_alpha": 7, "target_modules": ["c_attn", "c_fc"]},
    ],
    "bert": [
        {"r": 3, "lora_alpha": 5, "target_modules": ["query"], "modules_to_save": ["classifier"]},
        {"r": 2, "lora_alpha": 7, "target_modules": ["query", "value"], "modules_to_save": ["classifier"]},
    ],
}
NAMES = ("default", "second")


def logits(model, shape):
    batch = batch_for(shape, model)
    return model.eval()(**batch).logits.detach()


def change_adapters(model, seed=2):
    """Random values in everything that an adapter of either library owns."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("lora_", "modules_to_save.", ".copies.")):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


def peft_pair(shape):
    """PEFT's model with both adapters, and what it computes with each, and without."""
    model = peft.get_peft_model(tiny_model(shape, torch.float32), peft.LoraConfig(**PAIRS[shape][0]))
    model.add_adapter("second", peft.LoraConfig(**PAIRS[shape][1]))
    change_adapters(model)
    expected = {}
    for name in NAMES:
        model.set_adapter(name)
        expected[name] = logits(model, shape)
    with model.disable_adapter():
        expected["base"] = logits(model, shape)
    return model, expected


def our_pair(shape):
    """Our model with both adapters, and what it computes with each, and without."""
    model = tiny_model(shape, torch.float32)
    for name, settings in zip(NAMES, PAIRS[shape], strict=True):
        inject(model, LoraConfig(**settings), adapter_name=name)
    change_adapters(model)
    expected = {}
    for name in NAMES:
        set_adapter(model, name)
        expected[name] = logits(model, shape)
    with disable_adapter(model):
        expected["base"] = logits(model, shape)
    return model, expected


@pytest.mark.parametrize("order", [NAMES, NAMES[::-1]], ids=["in order", "reversed"])
@pytest.mark.parametrize("shape", PAIRS)
def test_we_load_pefts_folder_and_subfolder_by_name(shape, order, tmp_path):
    theirs, expected = peft_pair(shape)
    theirs.save_pretrained(tmp_path)
    places = {"default": tmp_path, "second": tmp_path / "second"}
    ours = tiny_model(shape, torch.float32)
    for name in order:
        load_adapter(ours, places[name], adapter_name=name)
    assert list_adapters(ours) == list(order)
    for name in (*order, order[0]):
        set_adapter(ours, name)
        assert relative_error(logits(ours, shape), expected[name]) <= 1e-5
    with disable_adapter(ours):
        assert relative_error(logits(ours, shape), expected["base"]) <= 1e-5
    assert relative_error(expected["default"], expected["second"]) > 1e-3


@pytest.mark.parametrize("shape", PAIRS)
def test_peft_loads_ours_by_name(shape, tmp_path):
    ours, expected = our_pair(shape)
    for name in NAMES:
        save_adapter(ours, tmp_path / name, adapter_name=name)
    base = tiny_model(shape, torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "default", adapter_name="one")
    theirs.load_adapter(tmp_path / "second", adapter_name="two")
    for name, called in zip((*NAMES, NAMES[0]), ("one", "two", "one"), strict=True):
        theirs.set_adapter(called)
        assert relative_error(logits(theirs, shape), expected[name]) <= 1e-5
    with theirs.disable_adapter():
        assert relative_error(logits(theirs, shape), expected["base"]) <= 1e-5


@pytest.mark.parametrize("shape", PAIRS)
def test_the_name_is_not_in_the_file(shape, tmp_path):
    ours, _ = our_pair(shape)
    theirs, _ = peft_pair(shape)
    theirs.save_pretrained(tmp_path / "theirs")
    save_adapter(ours, tmp_path / "ours", adapter_name="second")
    a = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    b = load_file(tmp_path / "theirs" / "second" / "adapter_model.safetensors")
    assert a.keys() == b.keys()
    assert {key: tensor.shape for key, tensor in a.items()} == {key: tensor.shape for key, tensor in b.items()}
    assert not any("second" in key or "default" in key for key in a)


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_two_active_adapters_add_up_as_in_peft(shape, tmp_path):
    theirs, _ = peft_pair(shape)
    theirs.save_pretrained(tmp_path)
    ours = tiny_model(shape, torch.float32)
    load_adapter(ours, tmp_path)
    load_adapter(ours, tmp_path / "second", adapter_name="second")
    theirs.base_model.set_adapter(list(NAMES))
    set_adapter(ours, list(NAMES))
    together = logits(theirs, shape)
    assert relative_error(logits(ours, shape), together) <= 1e-5
    merge(ours, "default")  # where PEFT drops the other one
    assert relative_error(logits(ours, shape), together) <= 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_only_the_chosen_adapter_trains_as_in_peft(name, tmp_path):
    theirs, _ = peft_pair("llama")
    ours, _ = our_pair("llama")
    theirs.set_adapter(name)
    set_adapter(ours, name)
    count = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert sum(p.numel() for p in ours.parameters() if p.requires_grad) == count
    assert all(layer.lora_A.requires_grad for layer in adapter_layers(ours, name).values())


def test_a_folder_of_subfolders_is_no_adapter_on_either_side(tmp_path):
    model = peft.get_peft_model(tiny_model("llama", torch.float32), peft.LoraConfig(), adapter_name="only")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="adapter_config"):
        peft.PeftModel.from_pretrained(tiny_model("llama", torch.float32), tmp_path)
    with pytest.raises(FileNotFoundError, match="adapter_config"):
        load_adapter(tiny_model("llama", torch.float32), tmp_path)
    load_adapter(ours := tiny_model("llama", torch.float32), tmp_path / "only", adapter_name="only")
    assert list_adapters(ours) == ["only"]


def test_a_taken_name_is_refused_where_peft_overwrites(tmp_path):
    ours, expected = our_pair("llama")
    save_adapter(ours, tmp_path, adapter_name="second")
    with pytest.raises(ValueError, match="already has an adapter named 'default'"):
        load_adapter(ours, tmp_path)
    set_adapter(ours, "default")
    assert torch.equal(logits(ours, "llama"), expected["default"])


def test_nested_wrappers_keys_are_refused(tmp_path):
    """PEFT around PEFT writes its prefix twice: PEFT loads nothing of such a file, we say so."""
    inner = peft.get_peft_model(tiny_model("llama", torch.float32), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outer = peft.get_peft_model(inner, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    change_adapters(outer)
    outer.save_pretrained(tmp_path)
    base = tiny_model("llama", torch.float32)
    expected = logits(base, "llama")
    with pytest.raises(ValueError, match="tensors are missing"):
        load_adapter(base, tmp_path)
    assert torch.equal(logits(base, "llama"), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(tiny_model("llama", torch.float32), tmp_path)
    assert torch.equal(logits(loaded, "llama"), expected)


def test_an_embedding_s_file_written_beside_an_adapted_head(tmp_path):
    """PEFT then writes the frozen weight of the head as well, although this adapter does not touch it."""
    theirs = peft.get_peft_model(
        tiny_model("llama"), peft.LoraConfig(target_modules=["embed_tokens"], init_lora_weights=False)
    )
    theirs.add_adapter("head", peft.LoraConfig(target_modules=["lm_head"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        theirs.save_pretrained(tmp_path, selected_adapters=["default"])
    assert any("lm_head.base_layer.weight" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    ours = tiny_model("llama")
    load_adapter(ours, tmp_path)
    assert relative_error(logits(ours, "llama"), logits(theirs, "llama")) <= 1e-5
