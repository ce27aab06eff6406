"""The three LoRA layers: their arithmetic against the formula, their start, dropout, precision and nesting."""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_edu import LoRAConv1D, LoRAEmbedding, LoRALinear

BASES = {
    "Linear": lambda: (LoRALinear, nn.Linear(6, 10)),
    "Linear without bias": lambda: (LoRALinear, nn.Linear(6, 10, bias=False)),
    "Conv1D": lambda: (LoRAConv1D, Conv1D(10, 6)),
    "Embedding": lambda: (LoRAEmbedding, nn.Embedding(6, 10)),
}


@pytest.fixture(params=BASES)
def built(request):
    """(base, layer, x) with r=3, alpha=5 and random A and B, in float64."""
    torch.manual_seed(0)
    kind, base = BASES[request.param]()
    base = base.double()
    nn.init.normal_(base.weight)
    layer = kind(base, r=3, lora_alpha=5, init_lora_weights=False)
    x = torch.randint(0, 6, (4, 7)) if request.param == "Embedding" else torch.randn(4, 7, 6, dtype=torch.float64)
    return base, layer, x


def test_output_is_that_of_the_effective_weight(built):
    base, layer, x = built
    effective = copy.deepcopy(base)
    with torch.no_grad():
        effective.weight.copy_(layer.effective_weight())
    assert torch.allclose(layer(x), effective(x), rtol=1e-12)
    assert not torch.allclose(layer(x), base(x))


def test_the_update_is_s_times_b_times_a(built):
    base, layer, _ = built
    update = layer.effective_weight() - base.weight
    delta = 5 / 3 * layer.lora_B @ layer.lora_A
    assert layer.lora_A.shape == (3, 6)
    assert layer.lora_B.shape == (10, 3)
    assert torch.allclose(update if isinstance(base, nn.Linear) else update.T, delta, rtol=1e-12)


def test_only_a_and_b_train(built):
    _, layer, x = built
    layer(x).sum().backward()
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == {"lora_A", "lora_B"}


def test_merging_is_exact_and_comes_back_bit_for_bit(built):
    base, layer, x = built
    pretrained, adapted = base.weight.detach().clone(), layer(x)
    for _ in range(3):
        layer.merge()
        assert torch.allclose(base(x), adapted, rtol=1e-12)
        assert torch.equal(layer.eval()(x), base(x))
    layer.unmerge()
    layer.unmerge()
    assert torch.equal(base.weight, pretrained)
    assert torch.equal(layer(x), adapted)


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("start", [True, "gaussian"])
def test_training_starts_at_the_base(name, start):
    kind, base = BASES[name]()
    layer = kind(base, init_lora_weights=start, r=4)
    x = torch.arange(6) if name == "Embedding" else torch.randn(3, 6)
    assert torch.equal(layer(x), base(x))
    zero, moving = (layer.lora_A, layer.lora_B) if name == "Embedding" else (layer.lora_B, layer.lora_A)
    assert not zero.any()
    assert moving.abs().min() > 0


def test_the_start_of_a_is_that_of_peft():
    layer = LoRALinear(nn.Linear(4096, 8), r=8)
    bound = 1 / math.sqrt(4096)
    assert layer.lora_A.abs().max() <= bound
    assert layer.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    gaussian = LoRALinear(nn.Linear(4096, 8), r=8, init_lora_weights="gaussian")
    assert gaussian.lora_A.std().item() == pytest.approx(1 / 8, rel=0.02)


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 12 / 4), (True, 12 / 2)])
def test_scaling(rslora, scaling):
    assert LoRALinear(nn.Linear(9, 7), r=4, lora_alpha=12, use_rslora=rslora).scaling == scaling


def test_dropout_falls_on_the_input_of_a_only_and_only_in_training():
    torch.manual_seed(0)
    base = nn.Linear(50, 7)
    layer = LoRALinear(base, r=3, lora_dropout=0.5, init_lora_weights=False)
    x = torch.randn(20, 50)
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)
    expected = base(x) + F.linear(F.linear(F.dropout(x, 0.5), layer.lora_A), layer.lora_B) * layer.scaling
    assert torch.equal(y, expected)
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_all_is_dropped_at_probability_one():
    layer = LoRALinear(base := nn.Linear(5, 7), r=3, lora_dropout=1.0, init_lora_weights=False)
    x = torch.randn(2, 5)
    assert torch.equal(layer(x), base(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_bases_keep_float32_adapters(dtype):
    layer = LoRALinear(nn.Linear(6, 8).to(dtype), init_lora_weights=False, r=2)
    assert layer.lora_A.dtype is torch.float32
    assert layer(torch.randn(3, 6, dtype=dtype)).dtype is dtype
    assert layer.effective_weight().dtype is torch.float32
    kept = LoRALinear(nn.Linear(6, 8).to(dtype), r=2, autocast_adapter_dtype=False)
    assert kept.lora_A.dtype is dtype
    assert kept(torch.randn(3, 6, dtype=dtype)).dtype is dtype


def test_merging_in_bfloat16_rounds_once():
    torch.manual_seed(0)
    base = nn.Linear(64, 64).bfloat16()
    pretrained = base.weight.detach().clone()
    layer = LoRALinear(base, r=4, init_lora_weights=False)
    layer.merge()
    assert torch.equal(base.weight, (pretrained.float() + layer.delta_weight()).bfloat16())
    assert not torch.equal(base.weight, pretrained + layer.delta_weight().bfloat16())  # rounding twice gives another


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_merge_that_is_not_finite_is_refused(bad):
    base = nn.Linear(6, 8)
    layer = LoRALinear(base, r=2, init_lora_weights=False)
    weight = base.weight
    before = weight.detach().clone()
    with torch.no_grad():
        layer.lora_B[3, 1] = bad
    with pytest.raises(ValueError, match="infinite or NaN"):
        layer.merge()
    assert base.weight is weight
    assert torch.equal(weight, before)
    assert not layer.merged


def test_a_merged_layer_warns_when_it_is_trained():
    layer = LoRALinear(nn.Linear(6, 8), r=2)
    layer.merge()
    with pytest.warns(UserWarning, match="is merged, so nothing trains"):
        layer(torch.randn(2, 6))


def test_train_and_eval_never_merge():
    layer = LoRALinear(base := nn.Linear(6, 8), r=2, init_lora_weights=False)
    weight = base.weight.detach().clone()
    assert layer.eval() is layer
    assert layer.train() is layer
    assert torch.equal(base.weight, weight)
    assert not layer.merged


def test_two_adapters_nest_and_add():
    torch.manual_seed(0)
    base = nn.Linear(6, 8).double()
    pretrained = base.weight.detach().clone()
    first = LoRALinear(base, r=2, lora_alpha=3, init_lora_weights=False, adapter_name="first")
    alone = first(x := torch.randn(5, 6, dtype=torch.float64))
    second = LoRALinear(first, r=3, lora_alpha=7, init_lora_weights=False, adapter_name="second")
    assert second.frozen is base
    assert first.lora_A.requires_grad  # a second adapter does not freeze the first
    both = base.weight + first.delta_weight() + second.delta_weight()
    assert torch.allclose(second.effective_weight(), both, rtol=1e-12)
    assert torch.allclose(second(x), F.linear(x, both, base.bias), rtol=1e-12)
    second.active = False
    assert torch.equal(second(x), alone)
    second.active = True
    # Merge one of two: the other still adds, and nothing is counted twice.
    for merged in (first, second):
        merged.merge()
        assert torch.allclose(second.eval()(x), F.linear(x, both, base.bias), rtol=1e-12)
        assert torch.allclose(second.effective_weight(), both, rtol=1e-12)
    first.unmerge()
    assert torch.allclose(base.weight, pretrained + second.delta_weight(), rtol=1e-12)
    second.unmerge()
    assert torch.equal(base.weight, pretrained)


def test_asking_a_merged_layer_for_its_weight_warns_of_nothing(built):
    """In training mode a merged layer's forward warns; what a layer is can be asked at any time."""
    base, layer, _ = built
    expected = layer.effective_weight()
    layer.merge()
    layer.train()
    before = base.weight.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.allclose(layer.effective_weight(), expected, rtol=1e-12)
        assert not layer.adds_to_output()
    assert torch.equal(base.weight, before)
    assert layer.merged


def test_a_copied_layer_merges_on_its_own():
    layer = LoRALinear(nn.Linear(6, 8), r=2, init_lora_weights=False)
    twin = copy.deepcopy(layer)
    twin.merge()
    assert not layer.merged
    assert not torch.equal(twin.weight, layer.weight)
    twin.unmerge()
    assert torch.equal(twin.weight, layer.weight)


def test_a_layer_moved_while_merged_unmerges_in_its_new_precision():
    layer = LoRALinear(nn.Linear(6, 8), r=2, init_lora_weights=False)
    before = layer.weight.detach().clone()
    layer.merge()
    layer.double()
    layer.unmerge()
    assert layer.weight.dtype is torch.float64
    assert torch.equal(layer.weight, before.double())


def test_an_embedding_with_a_scale_after_the_look_up():
    class Scaled(nn.Embedding):
        embed_scale = 3.0

        def forward(self, x):
            return super().forward(x) * self.embed_scale

    layer = LoRAEmbedding(base := Scaled(6, 10).double(), r=2, init_lora_weights=False)
    x = torch.arange(6)
    adapted = layer(x)
    layer.merge()
    assert torch.allclose(base(x), adapted, rtol=1e-12)


def test_adapters_merged_in_either_order_give_the_same_bits():
    """A sum in float32 depends on its order: the innermost comes first, whichever was merged first."""
    torch.manual_seed(0)
    base = nn.Linear(64, 64)
    merged = []
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        torch.manual_seed(1)
        layers = [copy.deepcopy(base)]
        for name in ("inner", "middle", "outer"):
            layers.append(LoRALinear(layers[-1], r=4, init_lora_weights=False, adapter_name=name))
        for index in order:
            layers[1 + index].merge()
        merged.append(layers[0].weight.clone())
    assert all(torch.equal(merged[0], other) for other in merged[1:])
