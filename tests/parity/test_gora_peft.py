"""GoRA, which PEFT has not, equals its formulas, written here from the paper; PEFT reads its files."""

import math

import peft
import pytest
import torch
from shapes import losses_of_twenty_steps, moved, relative_error, tiny_model
from transformers.pytorch_utils import Conv1D

from lora_edu import GoraConfig, disable_adapter, inject, load_adapter, merge, save_adapter
from lora_edu.core.adapter import adapter_layers
from lora_edu.core.state import adapter_state

pytestmark = pytest.mark.parity
TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "bert": ["query", "intermediate.dense"],
}
every_shape = pytest.mark.parametrize("shape", TARGETS)


def batches_for(shape):
    batches = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, 61, (12, 7), generator=generator)
        labels = torch.randint(0, 3, (12,), generator=generator) if shape == "bert" else ids
        batches.append({"input_ids": ids, "labels": labels})
    return batches


def started(shape, dtype=torch.float64, **settings):
    model = tiny_model(shape, dtype)
    torch.manual_seed(4)
    inject(
        model,
        GoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": TARGETS[shape], **settings}),
        batches=batches_for(shape),
    )
    return model


def weights_and_gradients(shape, names):
    """{layer: (W, the mean over the batches of its gradient)}, as (out, in)."""
    model = tiny_model(shape).eval()
    for batch in batches_for(shape):
        model(**batch).loss.backward()
    found = {}
    for name in names:
        layer = model.get_submodule(name)
        W, G = layer.weight.detach(), layer.weight.grad / 3
        found[name] = (W.T, G.T) if isinstance(layer, Conv1D) else (W, G)
    return found


@every_shape
@pytest.mark.parametrize("rslora", [True, False])
def test_ranks_and_the_first_step(shape, rslora):
    layers = adapter_layers(started(shape, use_rslora=rslora, gamma=0.07, r_min=1, r_max=10))
    known = weights_and_gradients(shape, layers)
    importance = {name: (W * G).abs().mean().item() for name, (W, G) in known.items()}
    budget = sum(4 * math.sqrt(sum(W.shape)) for W, _ in known.values())
    for name, (W, G) in known.items():
        out, inside = W.shape
        rank = budget * importance[name] / sum(importance.values()) / math.sqrt(out + inside)
        layer = layers[name]
        assert layer.r == min(max(round(rank), 1), 10, out, inside), name
        assert layer.lora_A.abs().max() <= 1 / math.sqrt(inside)  # LoRA's own random start
        A = layer.lora_A.detach()
        step = -0.07 * math.sqrt(inside / layer.r) * G @ torch.linalg.pinv(A) @ A
        assert relative_error(layer.delta_weight(), step) <= 1e-9, name
        assert layer.scaling == 6 / (math.sqrt(layer.r) if rslora else layer.r)
    assert len({layer.r for layer in layers.values()}) > 2


def test_the_bounds_are_half_and_four_times_r_by_default():
    for settings, bounds in [({"r": 5}, (3, 20)), ({"r": 1}, (1, 4)), ({"r": 4, "r_min": 1, "r_max": 6}, (1, 6))]:
        assert GoraConfig(**settings).bounds() == bounds
    assert min(layer.r for layer in adapter_layers(started("llama")).values()) == 2


@every_shape
def test_the_first_step_lowers_the_loss_and_the_base_is_left_alone(shape):
    model, plain = started(shape).eval(), tiny_model(shape).eval()
    losses = [sum(each(**batch).loss.item() for batch in batches_for(shape)) for each in (model, plain)]
    assert losses[0] < losses[1]
    batch = batches_for(shape)[0]
    with disable_adapter(model):
        assert torch.equal(model(**batch).logits, plain(**batch).logits)


@every_shape
def test_training_and_merging(shape):
    model, batch = started(shape), batches_for(shape)[0]
    losses = losses_of_twenty_steps(model, lambda each: each(**batch).loss)
    assert losses[-1] < losses[0]
    expected = model(**batch).logits
    merge(model)
    assert relative_error(model.eval()(**batch).logits, expected) <= 1e-9


@every_shape
def test_peft_reads_the_file_as_plain_lora_with_these_ranks(shape, tmp_path):
    model = moved(started(shape, torch.float32)).eval()
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_model(shape, torch.float32), tmp_path).eval()
    load_adapter(again := tiny_model(shape, torch.float32).eval(), tmp_path)
    assert adapter_state(again).configs["default"].peft_type == "LORA"
    for read in (theirs, again):
        assert relative_error(read(**batches_for(shape)[0]).logits, model(**batches_for(shape)[0]).logits) <= 1e-5
