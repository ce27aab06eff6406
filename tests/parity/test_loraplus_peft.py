"""LoRA+'s optimizer equals PEFT's: what is in which group, every rate and decay, and twenty steps."""

import warnings

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer as theirs_of
from shapes import TARGETS, batch_for, pair, relative_error, their_parameters, tiny_model

from lora_edu import LoraConfig, create_loraplus_optimizer, inject

pytestmark = pytest.mark.parity
SETTINGS = {"lr": 1e-3, "loraplus_lr_ratio": 16.0, "loraplus_weight_decay": 0.1, "loraplus_lr_embedding": 3e-4}


def groups(optimizer, names):
    """[(rate, decay, names of what is in it)] of an optimizer."""
    return [
        (group["lr"], group["weight_decay"], sorted(names[id(parameter)] for parameter in group["params"]))
        for group in optimizer.param_groups
    ]


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ("llama", {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}),
        ("gpt2", {"target_modules": ["c_attn", "wte"], "bias": "all", "modules_to_save": ["ln_f"]}),
        ("bert", {"target_modules": ["query"], "bias": "lora_only", "modules_to_save": ["classifier"]}),
    ],
)
def test_the_same_parameters_in_the_same_groups(shape, options):
    """Linear, Conv1D and Embedding; trained biases, a norm and a head beside them."""
    ours, theirs = tiny_model(shape), tiny_model(shape)
    inject(ours, LoraConfig(**options))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(theirs, peft.LoraConfig(**options))
    our_names = {
        id(parameter): name.replace(".base.bias", ".bias").replace(".copies.default", "")
        for name, parameter in ours.named_parameters()
    }
    their_names = {}
    for name, parameter in theirs.named_parameters():
        for old in ("base_model.model.", ".base_layer", ".modules_to_save.default", ".default"):
            name = name.replace(old, "")
        their_names[id(parameter)] = name.replace("lora_embedding_", "lora_").removesuffix(".weight") if (
            "lora_" in name
        ) else name  # fmt: skip
    found = groups(create_loraplus_optimizer(ours, torch.optim.AdamW, **SETTINGS), our_names)
    assert found == groups(theirs_of(theirs, torch.optim.AdamW, **SETTINGS), their_names)
    assert sum(len(names) for *_, names in found) == sum(each.requires_grad for each in ours.parameters())


@pytest.mark.parametrize("shape", TARGETS)
def test_twenty_steps(shape):
    ours, theirs = pair(shape, r=4, lora_alpha=6)
    batch = batch_for(shape, ours)
    losses = []
    for model, create in ((ours, create_loraplus_optimizer), (theirs, theirs_of)):
        optimizer = create(model, torch.optim.AdamW, **SETTINGS, betas=(0.9, 0.99))
        losses.append([])
        for _ in range(20):
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert losses[0][-1] < losses[0][0]
    for our, their in their_parameters(ours, theirs).values():
        assert relative_error(our, their) <= 1e-9


def test_other_optimizers_and_peft_s_defaults():
    ours, theirs = pair("llama")
    mine = create_loraplus_optimizer(ours, torch.optim.SGD, lr=0.1, loraplus_lr_ratio=4, momentum=0.9)
    other = theirs_of(theirs, torch.optim.SGD, lr=0.1, loraplus_lr_ratio=4, momentum=0.9)
    for one, two in zip(mine.param_groups, other.param_groups, strict=True):
        assert {name: value for name, value in one.items() if name != "params"} == {
            name: value for name, value in two.items() if name != "params"
        }
