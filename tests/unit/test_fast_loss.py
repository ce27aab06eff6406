"""The loss in pieces has the model's own values and gradients, never holds all logits, refuses what it would miss."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from lora_edu import LoraConfig, inject
from lora_edu.fast.loss import loss_in_pieces

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
VOCABULARY = 37


def adapted(dtype=torch.float64, tied=False, targets="all-linear"):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=VOCABULARY, tie_word_embeddings=tied)).to(dtype).train()
    inject(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    return model


def batch(ignored=True):
    torch.manual_seed(1)
    ids = torch.randint(VOCABULARY, (3, 9))
    labels = ids.clone()
    if ignored:
        labels[0, :5], labels[2, -2:] = -100, -100
    return ids, labels


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("rows", [1, 5, 24, 512])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("ignored", [False, True])
def test_values_and_gradients_are_the_models_own(rows, tied, ignored):
    model, (ids, labels) = adapted(tied=tied), batch(ignored)
    own, pieces = model(input_ids=ids, labels=labels).loss, loss_in_pieces(model, ids, labels, rows)
    assert pieces.item() == pytest.approx(own.item(), rel=1e-6)  # transformers takes its own in float32
    expected, found = gradients(model, 3 * own), gradients(model, 3 * pieces)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max())), name


def test_masks_reach_the_decoder():
    model, (ids, labels) = adapted(), batch()
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    own = model(input_ids=ids, labels=labels, attention_mask=mask).loss
    assert loss_in_pieces(model, ids, labels, attention_mask=mask).item() == pytest.approx(own.item(), rel=1e-6)


def test_in_bfloat16_it_is_as_close_to_the_truth_as_the_models_own():
    exact, half = adapted(torch.float64), adapted(torch.float64).to(torch.bfloat16)
    ids, labels = batch()
    truth = gradients(exact, exact(input_ids=ids, labels=labels).loss)

    def error(found):
        return sum(float((found[name].double() - truth[name]).norm() ** 2) for name in truth) ** 0.5

    own = error(gradients(half, half(input_ids=ids, labels=labels).loss))
    assert error(gradients(half, loss_in_pieces(half, ids, labels, rows=4))) < 1.3 * own


def test_no_tensor_has_the_logits_of_all_tokens():
    model, (ids, labels) = adapted(torch.float32), batch()

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            weight = (SIZES["hidden_size"], VOCABULARY)
            if isinstance(out, torch.Tensor) and out.shape[-1:] == (VOCABULARY,) and out.shape != weight:
                self.numel = max(self.numel, out.numel())
            return out

    with Largest() as seen:
        loss_in_pieces(model, ids, labels, rows=4).backward()
    assert seen.numel == 4 * VOCABULARY


@pytest.mark.errors
def test_a_head_that_needs_its_own_gradient_is_refused():
    ids, labels = batch()
    with pytest.raises(ValueError, match="the output head is a LoRALinear"):
        loss_in_pieces(adapted(targets=["q_proj", "lm_head"]), ids, labels)
    model = adapted()
    model.get_output_embeddings().requires_grad_(True)
    with pytest.raises(ValueError, match="the output head is a Linear that trains"):
        loss_in_pieces(model, ids, labels)
    with pytest.raises(ValueError, match="rows=0"):
        loss_in_pieces(adapted(), ids, labels, rows=0)


@pytest.mark.errors
def test_logits_that_are_changed_after_the_head_are_refused():
    model = Gemma2ForCausalLM(Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=4, vocab_size=VOCABULARY))
    inject(model, LoraConfig(target_modules=["q_proj"]))
    assert isinstance(model.get_output_embeddings(), nn.Linear)
    with pytest.raises(ValueError, match="final_logit_softcapping"):
        loss_in_pieces(model, *batch())
