"""The mixed batch equals PEFT's ``adapter_names=``, on the same weights, and PEFT's hot-swap equals ours."""

import copy

import peft
import pytest
import torch
from shapes import batch_for, relative_error, tiny_model

from lora_edu import LoraConfig, adapter_names, hotswap_adapter, inject, load_adapter, save_adapter
from lora_edu.serving.mixed import BASE, WAYS

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
]

PAIRS = {
    "llama": [
        {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"]},
        {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    ],
    "llama, embedding and head": [
        {"r": 3, "lora_alpha": 5, "target_modules": ["embed_tokens", "lm_head"]},
        {"r": 2, "lora_alpha": 6, "target_modules": ["embed_tokens", "v_proj"]},
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
NAMES = ["two", BASE, "one"]  # batches of shapes.batch_for have three rows


def pair(kind, folder, dtype):
    """(PEFT's model, ours) with the same two adapters, "one" and "two", with random values."""
    shape = kind.split(",")[0]
    theirs = peft.get_peft_model(tiny_model(shape, dtype), peft.LoraConfig(**PAIRS[kind][0]), adapter_name="one")
    theirs.add_adapter("two", peft.LoraConfig(**PAIRS[kind][1]))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name or "modules_to_save." in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    theirs.save_pretrained(folder, save_embedding_layers=False)
    ours = tiny_model(shape, dtype)
    for name in ("one", "two"):
        load_adapter(ours, folder / name, adapter_name=name)
    return theirs.eval(), ours.eval(), shape


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-6)])
def test_logits_of_a_mixed_batch(kind, way, dtype, tolerance, tmp_path):
    theirs, ours, shape = pair(kind, tmp_path, dtype)
    batch = batch_for(shape, ours)
    if "embed" in kind:
        batch = {"input_ids": torch.randint(0, 61, (3, 7), generator=torch.Generator().manual_seed(3))}
    expected = theirs(**batch, adapter_names=NAMES).logits
    with adapter_names(ours, NAMES, way):
        found = ours(**batch).logits
    assert relative_error(found, expected) <= tolerance
    plain = theirs(**batch, adapter_names=[BASE] * 3).logits
    assert relative_error(expected[1], plain[1]) <= tolerance
    assert relative_error(expected, plain) > 1e-3


@pytest.mark.parametrize("way", WAYS)
def test_generation_of_a_mixed_batch(way, tmp_path):
    theirs, ours, _ = pair("llama", tmp_path, torch.float64)
    ids = torch.randint(3, 61, (3, 5), generator=torch.Generator().manual_seed(3))
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = theirs.generate(input_ids=ids, adapter_names=NAMES, **settings)
    with adapter_names(ours, NAMES, way):
        assert torch.equal(ours.generate(input_ids=ids, **settings), expected)


def test_hot_swapped_values(tmp_path):
    from peft.utils.hotswap import hotswap_adapter as theirs_swap

    settings = PAIRS["llama"][0]
    theirs, ours, shape = pair("llama", tmp_path, torch.float64)
    third = tiny_model(shape)
    torch.manual_seed(9)
    inject(third, LoraConfig(init_lora_weights=False, **(settings | {"lora_alpha": 13})))
    save_adapter(third, tmp_path / "third")
    start = copy.deepcopy(ours)
    theirs_swap(theirs, str(tmp_path / "third"), adapter_name="one", torch_device="cpu")
    hotswap_adapter(ours, tmp_path / "third", adapter_name="one")
    batch = batch_for(shape, ours)
    theirs.set_adapter("one")
    assert relative_error(ours(**batch).logits, theirs(**batch).logits) <= 1e-9
    assert relative_error(ours(**batch).logits, third.eval()(**batch).logits) <= 1e-9
    assert relative_error(ours(**batch).logits, start(**batch).logits) > 1e-3
