"""LoRA+: the identity that lesson 16 is built on, and what is refused."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lora_edu import LoraConfig, create_loraplus_optimizer, inject
from lora_edu.lab.training import train


@pytest.fixture
def base():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes))


ROWS = [{"input_ids": list(range(3, 12)), "labels": list(range(3, 12))} for _ in range(8)]


def losses(base, rate, alpha=16, ratio=None, larger_a=1, **changes):
    """The losses of 20 steps without clipping, from the same start."""
    model = copy.deepcopy(base)
    torch.manual_seed(1)
    inject(model, LoraConfig(r=4, lora_alpha=alpha, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_A"):
                parameter.mul_(larger_a)

    def optimizer(model, rate):
        if ratio is None:
            return torch.optim.AdamW(
                [p for p in model.parameters() if p.requires_grad], lr=rate, eps=1e-30, weight_decay=0
            )
        return create_loraplus_optimizer(model, lr=rate, loraplus_lr_ratio=ratio, eps=1e-30)

    options = {"max_grad_norm": 1e9, "optimizer": optimizer, "learning_rate": rate, "batch_size": 4}
    return train(model, ROWS, steps=20, **options | changes).train_loss


def test_loraplus_is_plain_lora_with_a_larger_alpha_to_the_last_bit(base):
    plus = losses(base, 2**-10, ratio=16)
    assert losses(base, 2**-10, alpha=16 * 16) == plus
    assert losses(base, 16 * 2**-10, alpha=1, larger_a=16) == plus  # another of its many plain forms
    assert losses(base, 2**-10) != plus
    assert losses(base, 2**-10, alpha=1) != plus


def test_with_clipping_it_is_so_only_about(base):
    clipped = {"max_grad_norm": 0.01}
    plus, plain = losses(base, 2**-10, ratio=16, **clipped), losses(base, 2**-10, alpha=256, **clipped)
    assert plain != plus
    assert plain == pytest.approx(plus, abs=0.05)


def test_a_schedule_moves_the_rates_of_all_groups(base):
    """The optimizer's own rates are the top of the schedule."""
    made = []

    def optimizer(model, rate):
        made.append(create_loraplus_optimizer(model, torch.optim.SGD, lr=rate, loraplus_lr_ratio=16))
        return made[0]

    inject(base, LoraConfig(r=4, target_modules="all-linear"))
    train(base, ROWS, steps=4, learning_rate=0.5, batch_size=4, schedule="linear", optimizer=optimizer)
    assert [group["initial_lr"] for group in made[0].param_groups] == [0.5, 1e-6, 8.0, 8.0]
    assert [group["lr"] / group["initial_lr"] for group in made[0].param_groups] == pytest.approx([0.0] * 4)


@pytest.mark.errors
def test_what_is_refused_and_what_warns(base):
    with pytest.raises(ValueError, match=r"no lora_B trains in this LlamaForCausalLM: .*inject a LoraConfig first"):
        create_loraplus_optimizer(base, lr=1e-3, loraplus_lr_ratio=16)
    inject(base, LoraConfig(r=4, target_modules="all-linear"))
    with pytest.raises(ValueError, match=r"loraplus_lr_ratio=0: expected η_B / η_A, a number above 0"):
        create_loraplus_optimizer(base, lr=1e-3, loraplus_lr_ratio=0)
    with pytest.warns(UserWarning, match=r"lets A move faster than B, .* it is η_B / η_A = 16"):
        create_loraplus_optimizer(base, lr=1e-3, loraplus_lr_ratio=1 / 16)
