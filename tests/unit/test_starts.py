"""Starts away from zero: PiSSA, OLoRA, LoftQ: what is refused, and that the model is then as it was."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from lora_edu import (
    LoraConfig,
    dequantize_base,
    disable_adapter,
    hotswap_adapter,
    inject,
    load_adapter,
    merge,
    quantize_base,
    save_adapter,
    set_adapter,
    unmerge,
)
from lora_edu.core.adapter import adapter_layers
from lora_edu.core.layer import LoRALinear
from lora_edu.nf4 import dequantize_nf4, quantize_nf4
from lora_edu.variants.four_bit_base import NF4Linear
from lora_edu.variants.loftq import LoftQLinear, loftq
from lora_edu.variants.olora import olora_start
from lora_edu.variants.pissa import pissa_start
from lora_edu.variants.qlora import QLoRALinear
from lora_edu.variants.shifted import ShiftedLinear, ShiftedQLoRA

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
SHIFTED = ["pissa", "olora"]


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 6))


def config(start, **more):
    return LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": ["0", "2"], "init_lora_weights": start} | more)


def shake(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize(
    ("start", "more", "message"),
    [
        ("pissa", {"r": 7}, r"r=7: this layer of 12 inputs and 6 outputs has only 6 directions .* rank_pattern"),
        ("olora", {"r": 7}, r"r=7: this layer of 12 inputs and 6 outputs has only 6 directions .* rank_pattern"),
        ("loftq", {"r": 7}, r"r=7: expected a whole number from 1 to 6"),
        ("pissa", {"lora_alpha": 0}, r"lora_alpha=0: a start away from zero needs a scale above zero, for example 2"),
        ("olora", {"lora_alpha": -1}, r"lora_alpha=-1: .* above zero"),
        ("loftq", {"lora_alpha": 0}, r"lora_alpha=0: .* above zero"),
        ("pissa_niter_", {}, r"init_lora_weights='pissa_niter_': expected 'pissa', or 'pissa_niter_4'"),
        ("pissa_16", {}, r"init_lora_weights='pissa_16': expected 'pissa', or 'pissa_niter_4'"),
        ("stars", {}, r"init_lora_weights='stars': no method here serves it; known are .*PiSSA.*LoRA"),
        ("loftq", {"loftq_config": {"loftq_bits": 8}}, r"loftq_bits=8: expected 4"),
        ("loftq", {"loftq_config": {"loftq_iter": 0}}, r"loftq_iter=0: expected a whole number of at least 1"),
        ("loftq", {"loftq_config": {"bits": 4}}, r"loftq_config: \['bits'\] are not known; expected loftq_bits and"),
        ("loftq", {"bias": "all"}, r"bias='all': LoftQ puts new layers .* bias='none'"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:r=7 is above min")
def test_what_cannot_be_is_refused_and_leaves_the_model(start, more, message):
    model = small_model()
    modules, state = list(model.modules()), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        inject(model, config(start, **more))
    assert list(model.modules()) == modules
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("start", [*SHIFTED, "loftq"])
def test_a_weight_that_is_not_finite_or_not_here_is_refused(start):
    model = small_model()
    with torch.no_grad():
        model[2].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        inject(model, config(start))
    assert type(model[0]) is nn.Linear
    with pytest.raises(ValueError, match="on the meta device"):
        inject(small_model().to("meta"), config(start))


def test_settings_of_loftq_without_loftq_are_ignored_with_a_warning_as_in_peft():
    with pytest.warns(UserWarning, match="loftq_config is ignored with init_lora_weights=True"):
        assert LoraConfig(loftq_config={"loftq_iter": 5}) == LoraConfig()
    with pytest.raises(TypeError, match=r"loftq_config=5: expected a dictionary such as \{'loftq_iter': 5\}"):
        LoraConfig(init_lora_weights="loftq", loftq_config=5)


# PiSSA and OLoRA


def test_the_start_of_pissa_is_the_largest_part_and_that_of_olora_the_first_columns():
    W = torch.randn(9, 7, dtype=torch.float64)
    A, B = pissa_start(W, 3, 2.0)
    assert torch.allclose((W - 2 * B @ A).svd().S[0], W.svd().S[3])
    assert torch.allclose(A.norm(dim=1), B.norm(dim=0))  # shared evenly between the two
    A, B = olora_start(W, 3, 1.0)
    assert torch.allclose(B.T @ B, torch.eye(3, dtype=torch.float64))
    rest = W - B @ A
    assert rest[:, :3].abs().max() < 1e-12
    assert rest[:, 3:].abs().max() > 0.1


@pytest.mark.parametrize("start", SHIFTED)
def test_several_in_one_model_each_start_from_the_pretrained_weight(start):
    model = small_model()
    expected = model(X)
    inject(model, config(start), "one")
    shake(model)
    inject(model, config(start), "two")
    alone = small_model()
    inject(alone, config(start))
    for name, layer in adapter_layers(model, "two").items():
        assert torch.equal(layer.start_A, adapter_layers(alone)[name].lora_A)
    set_adapter(model, "two")
    assert torch.allclose(model(X), expected, atol=1e-6)
    set_adapter(model, "one")
    one = model(X)
    set_adapter(model, ["one", "two"])
    assert torch.allclose(model(X), one, atol=1e-6)  # the second is still at its start
    merge(model.eval())
    assert torch.allclose(model(X), one, atol=1e-5)
    with disable_adapter(model):
        assert torch.equal(model(X), expected)
    unmerge(model)
    with disable_adapter(model):
        assert torch.equal(model(X), expected)


@pytest.mark.parametrize("start", SHIFTED)
def test_around_four_bits_it_starts_at_the_numbers_that_these_stand_for(start, tmp_path):
    model = small_model()
    quantize_base(model)
    expected = model(X)
    inject(model, config(start))
    assert {type(layer) for layer in adapter_layers(model).values()} == {ShiftedQLoRA}
    assert torch.allclose(model(X), expected, atol=1e-6)
    shake(model)
    adapted = model(X)
    with pytest.raises(ValueError, match="dequantize_base"):
        merge(model)
    save_adapter(model, tmp_path)
    again = small_model()
    quantize_base(again)
    load_adapter(again, tmp_path)
    assert {type(layer) for layer in adapter_layers(again).values()} == {QLoRALinear}
    assert torch.allclose(again(X), adapted, atol=1e-5)
    dequantize_base(model)
    merge(model.eval())
    assert torch.allclose(model(X), adapted, atol=1e-5)


def test_a_saved_start_trains_on_as_plain_lora(tmp_path):
    model = small_model()
    inject(model, config("pissa"))
    save_adapter(shake(model), tmp_path)
    again = small_model()
    load_adapter(again, tmp_path, is_trainable=True)
    assert {(type(layer), layer.r) for layer in adapter_layers(again).values()} == {(LoRALinear, 4)}
    again(X).sum().backward()
    assert all(layer.lora_A.grad.abs().sum() > 0 for layer in adapter_layers(again).values())


def test_a_state_dict_brings_the_start_along():
    model = small_model()
    inject(model, config("pissa"))
    shake(model)
    other = small_model()
    with torch.no_grad():
        other[0].weight.mul_(2)
    inject(other, config("pissa"))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(X), model(X))


def test_by_hand_around_a_single_layer():
    layer = ShiftedLinear(base := nn.Linear(8, 6), pissa_start, r=2, lora_alpha=2)
    assert torch.allclose(layer(X), base(X), atol=1e-6)
    assert layer.delta_weight().abs().max() < 1e-6
    assert {name for name, each in layer.named_parameters() if each.requires_grad} == {"lora_A", "lora_B"}


# LoftQ


def four_bits(weight):
    return dequantize_nf4(quantize_nf4(weight))


def test_the_correction_brings_the_base_nearer_to_the_pretrained_weight():
    torch.manual_seed(2)
    W = torch.randn(96, 64)
    plain = (W - four_bits(W)).norm()
    errors = []
    for iterations in (1, 2, 5):
        Q, A, B = loftq(W, 8, iterations)
        errors.append((W - dequantize_nf4(Q) - B @ A).norm())
    assert errors[2] < errors[1] < errors[0] < 0.95 * plain
    assert torch.equal(loftq(W, 8)[0].packed, quantize_nf4(W).packed)  # one iteration: Q is W rounded


@pytest.mark.parametrize(
    "settings", [{"lora_alpha": 2}, {"lora_alpha": 9}, {"lora_alpha": 4, "use_rslora": True}], ids=str
)
def test_the_scale_is_divided_out(settings):
    """So that the model starts at the best correction for every lora_alpha."""
    model = small_model()
    pretrained = {name: layer.weight.detach().clone() for name, layer in model.named_children() if name != "1"}
    inject(model, config("loftq", **settings))
    for name, layer in adapter_layers(model).items():
        error = (pretrained[name] - layer.effective_weight()).norm()
        assert error < 0.9 * (pretrained[name] - layer.weight).norm()
        assert torch.allclose(layer.weight, four_bits(pretrained[name]))


def test_the_weights_in_full_precision_are_let_go():
    model = small_model()
    layers = [weakref.ref(model[0]), weakref.ref(model[2])]
    inject(model, config("loftq"))
    gc.collect()
    assert [layer() for layer in layers] == [None, None]
    assert all(type(layer.frozen) is NF4Linear for layer in adapter_layers(model).values())


def test_disabled_merged_and_beside_others():
    model = small_model()
    biases = {key: each.clone() for key, each in model.state_dict().items() if key.endswith("bias")}
    inject(model, config("loftq"))
    shake(model)
    adapted = model(X)
    rounded = small_model()
    quantize_base(rounded, double_quant=False)
    expected = rounded(X)
    with disable_adapter(model):
        assert torch.equal(model(X), expected)
    assert all(torch.equal(model[int(key[0])].bias, bias) for key, bias in biases.items())
    inject(model, config(True), "second")
    assert torch.equal(model(X), adapted)
    set_adapter(model, ["default", "second"])
    assert torch.allclose(model(X), adapted, atol=1e-6)
    set_adapter(model, "default")
    dequantize_base(model)
    merge(model.eval())
    assert torch.allclose(model(X), adapted, atol=1e-5)


def test_a_file_makes_the_four_bits_again(tmp_path):
    model = small_model()
    inject(model, config("loftq", loftq_config={"loftq_iter": 3}))
    save_adapter(shake(model), tmp_path)
    again = small_model()
    load_adapter(again, tmp_path)
    assert torch.equal(again(X), model(X))
    assert {type(layer) for layer in adapter_layers(again).values()} == {LoftQLinear}
    once = small_model()
    inject(once, config("loftq"))
    save_adapter(shake(once), tmp_path / "once")
    with pytest.raises(ValueError, match="keeps those that it was built with"):  # Q of other settings is another Q
        hotswap_adapter(model, tmp_path / "once")
    hotswap_adapter(again, tmp_path)
    assert torch.equal(again(X), model(X))


def test_a_base_that_it_would_have_to_change_under_others_is_refused(tmp_path):
    model = small_model()
    inject(model, config("loftq"))
    save_adapter(model, tmp_path)
    model = small_model()
    inject(model, config(True))
    before = model(X)
    with pytest.raises(ValueError, match="'0' has an adapter, 'default', and LoftQ would change the weight"):
        inject(model, config("loftq"), "second")
    assert torch.equal(model(X), before)
    model = small_model()
    quantize_base(model)
    for attempt in (lambda: inject(model, config("loftq")), lambda: load_adapter(model, tmp_path)):
        with pytest.raises(
            ValueError, match=r"'0' is stored in four bits already, .*: load the model in full precision"
        ):
            attempt()
    assert type(model[0]) is NF4Linear
