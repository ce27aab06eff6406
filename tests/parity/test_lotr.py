"""LoTR, which PEFT has not, equals a formula that is written here from the paper; and what its shared factors imply."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from shapes import TARGETS, batch_for, losses_of_twenty_steps, moved, relative_error, tiny_model
from torch import nn

from lora_edu import LotrConfig, count_parameters, hotswap_adapter, inject, load_adapter, merge, save_adapter
from lora_edu.core.adapter import adapter_layers
from lora_edu.core.state import adapter_state
from lora_edu.counting.parameters import base_parameters
from lora_edu.lab.diagnose import check_called

pytestmark = pytest.mark.parity
SHAPES = ["llama", "gpt2", "bert"]
every_shape = pytest.mark.parametrize("shape", SHAPES)


def lotr(shape, **settings):
    """A small model with LoTR on it, away from its start; another of the same base, without."""
    base = tiny_model(shape)
    inject(
        model := copy.deepcopy(base), LotrConfig(**{"target_modules": TARGETS[shape], "r": 3, "alpha": 2} | settings)
    )
    return moved(model), base


def stacks(model):
    """{(out, in): (names of the layers of this shape, A, B, their cores as one tensor)}, free of the model's graph."""
    found = {}
    for name, layer in adapter_layers(model).items():
        found.setdefault((layer.out_features, layer.in_features), []).append((name, layer))
    result = {}
    for shape, layers in found.items():
        pair = layers[0][1].shared
        tensors = pair.lotr_A, pair.lotr_B, torch.stack([layer.lotr_G for _, layer in layers])
        result[shape] = [name for name, _ in layers], *(tensor.detach().clone().requires_grad_() for tensor in tensors)
    return result


def by_the_paper(base, found, r=3, alpha=2):
    """Hooks that add what the stacked updates of low tensor rank put out: ΔW[layer] = (alpha/r) Σ B G[layer] A."""
    for names, A, B, cores in found.values():
        delta = alpha / r * torch.einsum("op,lpq,qi->loi", B, cores, A)
        for name, matrix in zip(names, delta, strict=True):
            base.get_submodule(name).register_forward_hook(
                lambda module, inputs, y, matrix=matrix: y + torch.einsum("...i,oi->...o", inputs[0], matrix)
            )
    return base


@every_shape
def test_outputs_and_gradients_are_the_papers_formula(shape):
    model, base = lotr(shape)
    found = stacks(model)
    by_the_paper(base, found)
    batch = batch_for(shape, model)
    result, expected = model(**batch), base(**batch)
    assert relative_error(result.logits, expected.logits) < 1e-12
    result.loss.backward()
    expected.loss.backward()
    layers = adapter_layers(model)
    for names, A, B, cores in found.values():
        pair = layers[names[0]].shared
        assert relative_error(pair.lotr_A.grad, A.grad) < 1e-9
        assert relative_error(pair.lotr_B.grad, B.grad) < 1e-9
        for name, gradient in zip(names, cores.grad, strict=True):
            assert relative_error(layers[name].lotr_G.grad, gradient) < 1e-9


def test_twenty_steps_of_training_are_the_formulas():
    model, base = lotr("llama")
    found = stacks(model)
    own = nn.ParameterList(tensor for _, *tensors in found.values() for tensor in tensors)
    batch = batch_for("llama", model)

    class Formula(nn.Module):
        def __init__(self):
            super().__init__()
            self.own = own

        def loss(self):
            tensors = iter(self.own)
            now = {shape: (names, next(tensors), next(tensors), next(tensors)) for shape, (names, *_) in found.items()}
            return by_the_paper(copy.deepcopy(base.requires_grad_(False)), now)(**batch).loss

    losses = losses_of_twenty_steps(model, lambda each: each(**batch).loss)
    assert losses == pytest.approx(losses_of_twenty_steps(Formula(), lambda each: each.loss()), rel=1e-9)
    assert losses[-1] < losses[0]


@every_shape
def test_merged_weights_are_the_formula(shape):
    model, base = lotr(shape)
    expected = {}
    for names, A, B, cores in stacks(model).values():
        for name, core in zip(names, cores, strict=True):
            delta = 2 / 3 * (B @ core @ A).detach()
            weight = base.get_submodule(name).weight
            expected[name] = weight + (delta.T if shape == "gpt2" else delta)
    merge(model)
    for name, layer in adapter_layers(model).items():
        assert relative_error(layer.frozen.weight, expected[name]) < 1e-12


def test_what_is_shared_is_one_and_counts_once(tmp_path):
    model, base = lotr("llama")
    shared = adapter_state(model).contexts["default"].shared["lotr"]
    assert set(shared) == {(24, 24), (12, 24), (24, 40)}  # q_proj, v_proj and down_proj of two layers
    assert all(
        layer.shared is shared[layer.out_features, layer.in_features] for layer in adapter_layers(model).values()
    )
    trainable = 3 * (24 + 24) + 3 * (24 + 12) + 3 * (40 + 24) + 6 * 3 * 3
    plain = sum(parameter.numel() for parameter in base.parameters())
    assert count_parameters(model) == (trainable, plain + trainable)
    assert base_parameters(model) == plain
    save_adapter(model, tmp_path)
    assert sum(tensor.numel() for tensor in load_file(tmp_path / "adapter_model.safetensors").values()) == trainable
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (fields["peft_type"], fields["r"], fields["alpha"]) == ("LOTR", 3, 2)


def test_two_adapters_share_nothing():
    model, _ = lotr("llama")
    inject(model, LotrConfig(target_modules=TARGETS["llama"], r=2), "other")
    one, other = (adapter_state(model).contexts[name].shared["lotr"] for name in ("default", "other"))
    assert not {id(p) for pair in one.values() for p in pair.parameters()} & {
        id(p) for pair in other.values() for p in pair.parameters()
    }
    assert all(p.requires_grad for pair in one.values() for p in pair.parameters())
    assert not any(p.requires_grad for pair in other.values() for p in pair.parameters())


def test_a_layer_that_is_never_called_is_named_though_its_shared_factors_get_gradients():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    inject(model := Idle(), LotrConfig(r=2, target_modules=["used", "idle"]))
    assert check_called(model, torch.randn(2, 4)) == ["idle"]


def test_another_alpha_is_swapped_in_and_another_rank_is_not(tmp_path):
    one, _ = lotr("llama")
    other, _ = lotr("llama", alpha=7)
    torch.manual_seed(9)
    for parameter in other.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    save_adapter(other.eval(), tmp_path)
    hotswap_adapter(one.eval(), tmp_path)
    batch = batch_for("llama", one)
    assert torch.equal(one(**batch).logits, other(**batch).logits)
    with pytest.raises(ValueError, match=r"has shape \(3, 3\).*\(4, 4\)"):
        hotswap_adapter(lotr("llama", r=4)[0], tmp_path)


def test_files_that_do_not_fit_are_refused(tmp_path):
    save_adapter(lotr("llama")[0], tmp_path)
    path = tmp_path / "adapter_config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"r": 4}))
    with pytest.raises(ValueError, match=r"layers 24 → 24 have the shapes \(3, 24\) and \(24, 3\).*for r=4"):
        load_adapter(tiny_model("llama"), tmp_path)
    path.write_text(json.dumps(fields | {"target_modules": ["q_proj", "up_proj"]}))
    with pytest.raises(ValueError, match=r"base_model.lotr_A.40x24.*missing"):
        load_adapter(tiny_model("llama"), tmp_path)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LotrConfig(r=0), "r=0"),
        (lambda: LotrConfig(alpha=float("nan")), "alpha=nan.*finite"),
        (lambda: LotrConfig(bias="lora_only"), "bias='lora_only'.*'lotr_only'"),
    ],
)
def test_settings_without_a_meaning_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
