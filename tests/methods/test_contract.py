"""Nine methods from outside the package, and its own, taken through everything that an adapter can do.

The core does not change for any. Each either does a thing right or refuses it, naming itself; and a refusal leaves the
model bit for bit as it was.
"""

import copy
import json
import pickle
import sys
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from outside import adalora, bottleneck, dora, eva, ia3, loha, pissa, prefix, vera
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lora_edu import (
    BitFitConfig,
    BottleneckConfig,
    GoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    LoRALinear,
    LotrConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    ShiraConfig,
    VeraConfig,
    adapter_names,
    count_parameters,
    disable_adapter,
    hotswap_adapter,
    inject,
    list_adapters,
    load_adapter,
    merge,
    merge_and_unload,
    quantize_base,
    save_adapter,
    set_adapter,
    unmerge,
)
from lora_edu.core.adapter import AdapterLayer, adapter_layers
from lora_edu.core.config import AdapterConfig
from lora_edu.core.methods import register
from lora_edu.core.state import adapter_state
from lora_edu.lab.training import train

IDS = torch.tensor([[1, 5, 7, 2, 30], [3, 3, 9, 8, 4], [11, 2, 6, 6, 20]])
BATCHES = [{"input_ids": IDS}, {"input_ids": IDS.flip(1)}]
LABELLED = [batch | {"labels": batch["input_ids"]} for batch in BATCHES]
ROWS = [{"input_ids": ids, "labels": ids} for ids in (IDS + torch.arange(4)[:, None, None]).flatten(0, 1).tolist()]


@dataclass(frozen=True)
class Case:
    """A method, and what it can do."""

    config: Callable[..., AdapterConfig]
    named: str  # how a refusal names it
    additive: bool = True
    mergeable: bool = True
    conv1d: bool = False
    fused: bool = True
    layers: bool = True
    biases: bool = False  # needs a base that has some
    at_base: bool = True  # starts at the base model
    alone: str = ""  # what a second adapter of the method in one model is told
    four_bits: bool = False  # the base's weights are stored in four bits before anything else
    swapped: str | None = None  # what a refusal to be swapped in place says
    batches: Any = None


def scales(**more: Any) -> IA3Config:
    inputs = [name for name in more.get("target_modules", ()) if name in ("down_proj", "c_fc")]
    return IA3Config(feedforward_modules=inputs, **more)


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 3, "lora_alpha": 5, **settings})


METHODS = {
    "ia3": Case(ia3.IA3LikeConfig, "ScaledLayer", additive=False, conv1d=True, fused=False, swapped="ScaledLayer"),
    "vera": Case(lambda **more: vera.VeraLikeConfig(**{"r": 6, **more}), "VeraLayer"),
    "loha": Case(
        lambda **more: loha.LoHaLikeConfig(**{"r": 3, "alpha": 5, **more}), "LoHaLayer", conv1d=True, fused=False
    ),
    "adalora": Case(adalora.AdaLoraLikeConfig, "SVDLayer"),
    "pissa": Case(
        lambda **more: pissa.PissaLikeConfig(**{"r": 3, "lora_alpha": 5, **more}), "ShiftedLinear", swapped="PiSSA-like"
    ),
    "dora": Case(
        lambda **more: dora.DoraLikeConfig(**{"r": 3, **more}), "MagnitudeLinear",
        additive=False, fused=False, swapped="MagnitudeLinear",
    ),
    "prefix": Case(
        lambda target_modules=None, **more: prefix.PrefixLikeConfig(size=16, **more), "InputVector",
        mergeable=False, fused=False, layers=False,
    ),
    "eva": Case(lambda **more: eva.EvaLikeConfig(**{"r": 4, **more}), "LoRALinear", batches=BATCHES),
    "bottleneck": Case(
        bottleneck.BottleneckLikeConfig, "BottleneckLayer",
        additive=False, mergeable=False, conv1d=True, fused=False, swapped="BottleneckLayer",
    ),
    "(IA)³": Case(scales, "IA3Layer", additive=False, conv1d=True, fused=False, swapped="IA3Layer"),
    "bottleneck adapters": Case(
        lambda **more: BottleneckConfig(bottleneck_size=5, **more), "BottleneckLayer",
        additive=False, mergeable=False, conv1d=True, fused=False, swapped="BottleneckLayer",
    ),
    "BitFit": Case(
        lambda target_modules=None, **more: BitFitConfig(**more), "TrainedBias",
        conv1d=True, fused=False, layers=False, biases=True, alone="trains biases already",
    ),
    "prefix tuning": Case(
        lambda target_modules=None, **more: PrefixTuningConfig(num_virtual_tokens=3, **more), "Prefix",
        mergeable=False, conv1d=True, fused=False, layers=False, at_base=False,
    ),
    "prompt tuning": Case(
        lambda target_modules=None, **more: PromptTuningConfig(num_virtual_tokens=3, **more), "Prompt",
        mergeable=False, conv1d=True, fused=False, layers=False, at_base=False,
    ),
    "LoHa": Case(lambda **more: LoHaConfig(**{"r": 3, "alpha": 5, **more}), "LoHaLayer", conv1d=True, fused=False),
    "LoKr": Case(lambda **more: LoKrConfig(**{"r": 3, "alpha": 5, **more}), "LoKrLayer", conv1d=True, fused=False),
    "PiSSA": Case(
        lambda **more: lora(init_lora_weights="pissa", **more), "ShiftedLinear", conv1d=True, swapped="PiSSA"
    ),
    "EVA": Case(
        lambda **more: lora(init_lora_weights="eva", **more), "LoRALinear", conv1d=True, swapped="EVA", batches=BATCHES
    ),
    "LoRA-GA": Case(
        lambda **more: lora(init_lora_weights="lora_ga", **more), "ShiftedLinear",
        conv1d=True, swapped="LoRA-GA", batches=LABELLED,
    ),
    "GoRA": Case(
        lambda **more: GoraConfig(**{"r": 3, "lora_alpha": 5, **more}), "LoRALinear",
        conv1d=True, at_base=False, swapped="GoRA", batches=LABELLED,
    ),
    "VeRA": Case(lambda **more: VeraConfig(**{"r": 6, **more}), "VeraLayer", conv1d=True),
    "SHiRA": Case(lambda **more: ShiraConfig(**{"r": 3, **more}), "ShiraLayer", conv1d=True, fused=False),
    "LoTR": Case(lambda **more: LotrConfig(**{"r": 3, **more}), "LotrLayer", conv1d=True),
    "qlora": Case(lora, "QLoRALinear", mergeable=False, fused=False, four_bits=True),
    "DoRA": Case(
        lambda **more: lora(use_dora=True, **more), "DoRALinear", additive=False, conv1d=True, swapped="DoRALinear"
    ),
    "qdora": Case(
        lambda **more: lora(use_dora=True, **more), "QDoRALinear",
        additive=False, mergeable=False, fused=False, four_bits=True, swapped="QDoRALinear",
    ),
}  # fmt: skip
BASES = ["biases", "no biases", "conv1d", "four bits"]
TARGETS = {base: ["c_attn", "c_fc"] if base == "conv1d" else ["q_proj", "down_proj"] for base in BASES}
PAIRS = [
    (name, base)
    for name, case in METHODS.items()
    for base in (["four bits"] if case.four_bits else BASES[:3])
    if (base != "conv1d" or case.conv1d) and (base != "no biases" or not case.biases)
]
MAIN_BASE = "biases"


@pytest.fixture(autouse=True)
def base_of_the_method(request, monkeypatch):
    """A method for a base in four bits meets such a base wherever a test asks for none in particular."""
    name = request.node.callspec.params.get("name") if hasattr(request.node, "callspec") else None
    if name in METHODS and METHODS[name].four_bits:
        monkeypatch.setattr(sys.modules[__name__], "MAIN_BASE", "four bits")


def plain_model(base=None, dtype=torch.float64):
    """A small Llama with or without biases, or in four bits, or a GPT-2; its biases are away from zero."""
    base = base or MAIN_BASE
    torch.manual_seed(0)
    if base == "conv1d":
        config = GPT2Config(
            vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0
        )  # fmt: skip
        model: nn.Module = GPT2LMHeadModel(config)
    else:
        config = LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            attention_bias=base != "no biases", mlp_bias=base != "no biases",
        )  # fmt: skip
        model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    model = model.to(dtype).eval()
    if base == "four bits":
        quantize_base(model)
    return model


def adapt(model, name, base="biases", adapter_name="default", **more):
    """Inject a method of the table (or plain LoRA) into the model, from the same random start each time."""
    torch.manual_seed(1)
    if name == "lora":
        return inject(model, lora(target_modules=TARGETS[base]), adapter_name)
    fast = more.pop("fast", False)
    config = METHODS[name].config(target_modules=TARGETS[base], **more)
    return inject(model, config, adapter_name, fast=fast, batches=METHODS[name].batches)


def shake(model, adapter_name="default", seed=3):
    """Move everything that an adapter trains, so that it does something."""
    generator = torch.Generator().manual_seed(seed)
    was = adapter_state(model).active
    set_adapter(model, adapter_name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.3 * noise.to(parameter.dtype))
    set_adapter(model, was)


def adapted_model(name, base=None, seed=3, **more):
    model = plain_model(base)
    adapt(model, name, base or MAIN_BASE, **more)
    shake(model, seed=seed)
    return model.eval()


def outputs(model):
    with torch.no_grad():
        return model(IDS).logits


def numbers(model):
    """Everything that a model holds, and where: registered tensors, what trains, what is active and merged."""
    tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    adapters = [layer for layer in model.modules() if isinstance(layer, AdapterLayer)]
    layers = [(layer.adapter_name, layer.active, layer.merged) for layer in adapters]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    state = model.__dict__.get("adapter_state")
    return tensors, (trains, layers, hooks, state and (list(state.configs), list(state.active)))


def same(before, after):
    assert before[1] == after[1]
    assert before[0].keys() == after[0].keys()
    for key, tensor in before[0].items():
        assert torch.equal(tensor, after[0][key]), key


@contextmanager
def refused(model, *words, error=ValueError):
    """The block raises, its message has these words in it, and the model is bit for bit as it was."""
    before, said = numbers(model), outputs(model)
    with pytest.raises(error) as caught:
        yield
    for word in words:
        assert word in str(caught.value)
    same(before, numbers(model))
    assert torch.equal(outputs(model).nan_to_num(7), said.nan_to_num(7))


def name_of(model, layer):
    return next(name for name, each in adapter_layers(model, layer.adapter_name).items() if each is layer)


every_pair = pytest.mark.parametrize(("name", "base"), PAIRS)
every_method = pytest.mark.parametrize("name", METHODS)


# Into the model


@every_pair
def test_injects_and_starts_at_the_base(name, base):
    model, case = plain_model(base), METHODS[name]
    before, expected = numbers(model)[0], outputs(model)
    config = case.config(target_modules=TARGETS[base])
    report = inject(model, config, batches=case.batches)
    assert len(report.replaced) == (4 if case.layers else 0)
    assert (report.trainable, report.total) == count_parameters(model)
    assert report.trainable > 0
    assert torch.allclose(outputs(model), expected, atol=1e-12) == case.at_base
    assert config == case.config(target_modules=TARGETS[base])  # the model has a copy of its own
    assert not config.layers
    assert not config.targets
    assert set(adapter_state(model).configs["default"].layers) == set(report.replaced)
    with disable_adapter(model):
        assert torch.equal(outputs(model), expected)
    # The base is never changed by injecting.
    frozen = {layer: f"{layer}.base" for layer in report.replaced}
    after = model.state_dict()
    for key, tensor in before.items():
        place, _, tensor_name = key.rpartition(".")
        assert torch.equal(after[f"{frozen.get(place, place)}.{tensor_name}"], tensor)


@every_pair
def test_trains_and_only_its_own_numbers_move(name, base):
    model = plain_model(base, torch.float32)
    adapt(model, name, base)
    before = {key: (p.detach().clone(), p.requires_grad) for key, p in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses = train(model, ROWS, steps=8, batch_size=6, learning_rate=2e-2, eval_data=ROWS).eval_loss["held-out"]
    assert losses[-1] < losses[0]
    for key, parameter in model.named_parameters():
        value, trained = before[key]
        assert torch.equal(parameter, value) != trained or "lora_E" in key, key  # a layer may lose its last rank


@every_pair
def test_is_disabled_exactly_merged_or_not(name, base):
    expected = outputs(plain_model(base))
    model = adapted_model(name, base)
    mine = outputs(model)
    assert not torch.allclose(mine, expected, atol=1e-6)
    with disable_adapter(model):
        assert torch.equal(outputs(model), expected)
        with disable_adapter(model):
            assert torch.equal(outputs(model), expected)
        assert torch.equal(outputs(model), expected)
    assert torch.equal(outputs(model), mine)
    if METHODS[name].mergeable:
        merge(model)
        merged = outputs(model)
        with disable_adapter(model):
            assert torch.equal(outputs(model), expected)
        assert torch.equal(outputs(model), merged)


# Merging


@every_pair
def test_merges_with_the_right_value_or_refuses(name, base):
    model = adapted_model(name, base)
    before, expected = numbers(model), outputs(model)
    if not METHODS[name].mergeable:
        with refused(model, METHODS[name].named, "'default'"):
            merge(model)
        return
    merge(model)
    assert all(layer.merged for layer in adapter_layers(model).values())
    assert torch.allclose(outputs(model), expected, atol=1e-10)
    once = numbers(model)
    merge(model)
    same(once, numbers(model))
    unmerge(model)
    same(before, numbers(model))
    assert torch.equal(outputs(model), expected)


@every_pair
def test_unloads_into_a_plain_model_or_refuses(name, base):
    model = adapted_model(name, base)
    expected = outputs(model)
    if not METHODS[name].mergeable:
        with refused(model, METHODS[name].named):
            merge_and_unload(model)
        return
    plain = merge_and_unload(model)
    assert plain is model
    assert plain.state_dict().keys() == plain_model(base).state_dict().keys()
    assert not any(type(module).__module__.startswith(("lora_edu", "outside")) for module in plain.modules())
    assert torch.allclose(outputs(plain), expected, atol=1e-10)


@every_method
def test_unloads_without_a_trace_when_another_is_active(name):
    model = plain_model()
    adapt(model, "lora")
    adapt(model, name, adapter_name="other")
    shake(model), shake(model, "other")
    expected = outputs(model)
    if METHODS[name].four_bits:  # nothing merges into such a base
        with refused(model, "NF4Linear", "dequantize_base"):
            merge_and_unload(model)
        return
    plain = merge_and_unload(model)
    assert plain.state_dict().keys() == plain_model().state_dict().keys()
    assert not any(module._forward_pre_hooks for module in plain.modules())
    assert torch.allclose(outputs(plain), expected, atol=1e-10)


@every_pair
def test_effective_weight_and_bias_are_those_of_the_layer(name, base):
    model = adapted_model(name, base)
    for layer in adapter_layers(model).values():
        x = torch.randn(3, layer.features()[0], dtype=torch.float64)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            before = {key: value.clone() for key, value in layer.state_dict().items()}
            if not layer.mergeable:
                with pytest.raises(ValueError, match=METHODS[name].named):
                    layer.effective_weight()
                continue
            weight, bias = layer.effective_weight(), layer.effective_bias()
            assert torch.allclose(F.linear(x, layer.oriented(weight), bias), layer(x), atol=1e-10)
            if METHODS[name].four_bits:  # it has a dense form, and no room for it
                continue
            layer.train().merge()
            assert torch.allclose(layer.effective_weight(), weight, atol=1e-12)
            assert bias is None or torch.allclose(layer.effective_bias(), bias, atol=1e-12)
            layer.unmerge()
            assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


# Files


@every_pair
def test_saves_and_loads_with_equal_outputs(name, base, tmp_path):
    model = adapted_model(name, base)
    expected = outputs(model)
    save_adapter(model, tmp_path)
    again = plain_model(base)
    load_adapter(again, tmp_path)
    assert torch.allclose(outputs(again), expected, atol=1e-12)
    assert not any(parameter.requires_grad for parameter in again.parameters())
    with disable_adapter(again):
        assert torch.equal(outputs(again), outputs(plain_model(base)))
    save_adapter(again, tmp_path / "again")  # and what was loaded is saved as it came
    assert (tmp_path / "again" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "adapter_model.safetensors"
    ).read_bytes()


@every_method
def test_a_file_without_one_tensor_is_refused(name, tmp_path):
    from safetensors.torch import load_file, save_file

    save_adapter(adapted_model(name), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    for key in list(tensors):
        save_file({other: tensor for other, tensor in tensors.items() if other != key}, path)
        model = plain_model()
        with refused(model, "missing", str(path)):
            load_adapter(model, tmp_path)


@every_method
def test_is_swapped_in_place_or_refuses(name, tmp_path):
    one, other = adapted_model(name), adapted_model(name, seed=4)
    save_adapter(other, tmp_path)
    parameters = dict(one.named_parameters())
    if METHODS[name].swapped:
        with refused(one, METHODS[name].swapped):
            hotswap_adapter(one, tmp_path)
        return
    hotswap_adapter(one, tmp_path)
    assert torch.allclose(outputs(one), outputs(other), atol=1e-12)
    assert all(parameter is parameters[key] for key, parameter in one.named_parameters())


# Beside others


@every_method
def test_switches_beside_itself_and_beside_lora(name):
    alone = {}
    for adapter_name, method, seed in [("one", name, 3), ("two", name, 4), ("lora", "lora", 5)]:
        model = plain_model()
        adapt(model, method, adapter_name=adapter_name)
        shake(model, adapter_name, seed)
        alone[adapter_name] = outputs(model)
    model = plain_model()
    if METHODS[name].alone:
        adapt(model, name)
        with refused(model, METHODS[name].alone, "'default'"):
            adapt(model, name, adapter_name="two")
        return
    for adapter_name, method, seed in [("one", name, 3), ("lora", "lora", 5), ("two", name, 4)]:
        adapt(model, method, adapter_name=adapter_name)
        shake(model, adapter_name, seed)
    assert list_adapters(model) == ["one", "lora", "two"]
    for adapter_name in ("one", "two", "lora", "one"):
        set_adapter(model, adapter_name)
        assert torch.allclose(outputs(model), alone[adapter_name], atol=1e-12)
        trains = {layer.adapter_name for layer in model.modules() if isinstance(layer, AdapterLayer) and layer.active}
        assert trains <= {adapter_name}
    with disable_adapter(model):
        assert torch.equal(outputs(model), outputs(plain_model()))


@every_method
def test_several_names_add_up_or_are_refused(name):
    case, model = METHODS[name], plain_model()
    adapt(model, "lora")
    adapt(model, name, adapter_name="other")
    shake(model), shake(model, "other")
    if not case.additive:
        with refused(model, case.named, "'other'"):
            set_adapter(model, ["default", "other"])
        with refused(model, case.named, "'other'"):
            merge(model, ["default", "other"])
        with refused(model, case.named, "'other'"):
            merge(model, "other")  # while LoRA is in use around the same weights
        return
    set_adapter(model, ["default", "other"])
    assert not torch.allclose(outputs(model), outputs(plain_model()))
    for layer in adapter_layers(model, "default").values():
        x = torch.randn(2, layer.features()[0], dtype=torch.float64)
        outermost = adapter_layers(model)[name_of(model, layer)]
        both = outermost.effective_weight() - outermost.weight
        one = layer.adapted(torch.zeros_like(layer.weight), None)[0]
        assert torch.allclose(outermost(x), F.linear(x, outermost.effective_weight(), outermost.bias), atol=1e-10)
        assert case.layers != torch.allclose(both, one)
    expected = outputs(model)
    if case.mergeable:
        merge(model)
    else:
        with refused(model, case.named):
            merge(model)
        if not case.four_bits:  # the prefix stays, LoRA goes into the weights
            merge(model, "default")
    assert torch.allclose(outputs(model), expected, atol=1e-10)
    with disable_adapter(model):
        assert torch.equal(outputs(model), outputs(plain_model()))
    unmerge(model)
    assert torch.equal(outputs(model), expected)


@every_method
def test_answers_rows_of_a_mixed_batch_as_alone_or_refuses(name):
    case, model, names = METHODS[name], plain_model(), ["other", "default", "__base__"]
    adapt(model, "lora")
    adapt(model, name, adapter_name="other")
    shake(model), shake(model, "other")
    rows = []
    for i, adapter_name in enumerate(names):
        with disable_adapter(model):
            plain = outputs(model)
        set_adapter(model, adapter_name if i < 2 else "default")
        rows.append(outputs(model)[i] if i < 2 else plain[i])
    set_adapter(model, "default")
    for way in ("grouped", "gathered"):
        if case.additive and case.layers:
            with adapter_names(model, names, way):
                assert torch.allclose(outputs(model), torch.stack(rows), atol=1e-12)
        else:
            with refused(model, case.named, "'other'"), adapter_names(model, names, way):
                pass
    assert torch.equal(outputs(model)[1], rows[1])


@every_pair
def test_fast_serves_what_has_factors_and_leaves_others_plain(name, base):
    plain, fast = plain_model(base), plain_model(base)
    torch.manual_seed(1)
    adapt(plain, name, base)
    torch.manual_seed(1)
    report = adapt(fast, name, base, fast=True)
    assert report.fast == (len(report.replaced) if METHODS[name].fused else 0)
    assert ("fused" in str(report)) == METHODS[name].fused
    shake(plain), shake(fast)
    for model in (plain, fast):
        model.train()
        model(IDS, labels=IDS).loss.backward()
    assert torch.allclose(outputs(fast.eval()), outputs(plain.eval()), atol=1e-12)
    theirs = dict(plain.named_parameters())
    for key, parameter in fast.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(parameter.grad, theirs[key].grad, atol=1e-10)


@every_method
def test_a_copy_of_the_model_is_a_model_of_its_own(name):
    model = adapted_model(name)
    expected = outputs(model)
    other = copy.deepcopy(model)
    shake(other)
    assert torch.equal(outputs(model), expected)
    assert not torch.allclose(outputs(other), expected, atol=1e-6)
    with disable_adapter(other):
        assert torch.equal(outputs(model), expected)
    theirs, state = {id(module) for module in other.modules()}, adapter_state(other)
    config, shared = state.configs["default"], state.contexts["default"].shared
    known = [
        *config.layers.values(),
        *config.targets.values(),
        *(s for s in shared.values() if isinstance(s, nn.Module)),
    ]
    assert {id(module) for module in known} <= theirs


@every_method
def test_can_be_pickled_fast_or_not(name):
    model = plain_model()
    adapt(model, name, fast=True)
    shake(model)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(outputs(again), outputs(model))
    assert [type(layer) for layer in adapter_layers(again).values()] == [
        type(layer) for layer in adapter_layers(model).values()
    ]


@every_method
def test_brings_a_trained_head_and_trained_biases_along(name, tmp_path):
    """Parts come with every method; biases train where it has the setting, and never those inside an adapter."""
    case = METHODS[name]
    more = {"modules_to_save": ["lm_head"]} | ({} if "bias" in case.config().lacks else {"bias": "all"})
    model = plain_model()
    inject(model, case.config(target_modules=TARGETS["biases"], **more), batches=case.batches)
    names = {part.place for part in adapter_state(model).parts["default"]}
    assert "lm_head" in names
    assert ("bias" in more) == ("model.layers.0.self_attn.o_proj.bias" in names)
    assert not any("down." in place or "up." in place for place in names)
    shake(model)
    expected = outputs(model)
    with disable_adapter(model):
        assert torch.equal(outputs(model), outputs(plain_model()))
    assert torch.equal(outputs(model), expected)
    save_adapter(model, tmp_path)
    again = plain_model()
    load_adapter(again, tmp_path)
    assert torch.allclose(outputs(again), expected, atol=1e-12)
    if case.mergeable:
        plain = merge_and_unload(model)
        assert plain.state_dict().keys() == plain_model().state_dict().keys()
        assert torch.allclose(outputs(plain), expected, atol=1e-10)


@every_method
def test_half_precision_keeps_its_dtype_and_moves_as_one(name):
    model = plain_model().to(torch.bfloat16)
    adapt(model, name)
    if METHODS[name].layers:
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    shake(model)
    found = outputs(model)
    assert found.dtype == torch.bfloat16
    expected = outputs(model.float())
    assert {tensor.dtype for tensor in model.state_dict().values()} <= {
        torch.float32,
        torch.bool,
        torch.uint8,
        torch.int32,
    }
    assert (found.float() - expected).norm() / expected.norm() < 0.03


# What each is there to show


def test_vera_stores_its_matrices_once_and_they_move_as_one(tmp_path):
    from safetensors.torch import load_file

    model = adapted_model("vera")
    save_adapter(model, tmp_path)
    keys = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert {key for key in keys if "vera_A" in key or "vera_B" in key} == set(vera.KEYS)
    model.float()
    shared = {id(layer.shared.A) for layer in adapter_layers(model).values()}
    assert len(shared) == 1
    assert adapter_state(model).contexts["default"].shared["vera"].A.dtype == torch.float32
    key = METHODS["vera"].config(target_modules=TARGETS["biases"], save_projection=False, projection_prng_key=7)
    other = plain_model()
    inject(other, key)
    shake(other)
    save_adapter(other, tmp_path / "key")
    assert not any("vera_A" in key for key in load_file(tmp_path / "key" / "adapter_model.safetensors"))
    again = plain_model()
    load_adapter(again, tmp_path / "key")
    assert torch.allclose(outputs(again), outputs(other), atol=1e-12)


def test_swapping_vera_swaps_its_matrices_too(tmp_path):
    one, other = adapted_model("vera"), adapted_model("vera", seed=4)
    with torch.no_grad():
        adapter_state(other).contexts["default"].shared["vera"].A.mul_(2)
    save_adapter(other, tmp_path)
    hotswap_adapter(one, tmp_path)
    assert torch.allclose(outputs(one), outputs(other), atol=1e-12)


def test_adalora_changes_its_ranks_while_it_trains(tmp_path):
    model = plain_model(dtype=torch.float32)
    adapt(model, "adalora")
    sizes = {key: parameter.shape for key, parameter in model.named_parameters()}
    train(model, ROWS, steps=8, batch_size=6, learning_rate=2e-2)
    assert sizes == {key: parameter.shape for key, parameter in model.named_parameters()}
    save_adapter(model, tmp_path)
    pattern = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    assert sum(map(sum, pattern.values())) == 4 * 2  # target_r for each layer, of init_r = 4
    assert len({sum(rows) for rows in pattern.values()}) > 1
    again = plain_model(dtype=torch.float32)
    load_adapter(again, tmp_path, is_trainable=True)
    assert torch.allclose(outputs(again), outputs(model), atol=1e-6)
    assert {len(layer.lora_E) for layer in adapter_layers(again).values()} == {sum(rows) for rows in pattern.values()}
    untrained = adapted_model("adalora").float()
    with refused(untrained, "rank_pattern", "SVDLayer"):  # other ranks: nothing to write the values into
        hotswap_adapter(untrained, tmp_path)


def test_hooks_are_those_of_the_active_adapter(monkeypatch):
    called = []

    def note(self, step):
        called.append(self.adapter_name)

    monkeypatch.setattr(ia3.ScaledLayer, "after_backward", note, raising=False)
    model = plain_model(dtype=torch.float32)
    for adapter_name, method in [("adalora", "adalora"), ("one", "ia3"), ("two", "ia3")]:
        adapt(model, method, adapter_name=adapter_name)
    set_adapter(model, "two")
    train(model, ROWS, steps=2, batch_size=6)  # AdaLoRA's after_step would fail: its layers have no gradients
    assert called == ["two"] * 8
    assert all(layer.kept.all() for layer in adapter_layers(model, "adalora").values())


def test_pissa_starts_away_from_zero_and_leaves_the_base():
    model = plain_model()
    adapt(model, "pissa")
    for layer in adapter_layers(model).values():
        assert layer.lora_B.norm() > 0.1
        assert layer.delta_weight().abs().max() < 1e-12
    config = pissa.PissaLikeConfig(target_modules=["q_proj"], modules_to_save=["no such module"])
    plain = plain_model()
    with refused(plain, "no such module"):
        inject(plain, config)


def test_pissas_file_is_a_plain_lora_of_twice_the_rank(tmp_path):
    model = plain_model()
    config = pissa.PissaLikeConfig(
        r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], use_rslora=True,
        rank_pattern={"down_proj": 2}, alpha_pattern={"q_proj": 7},
    )  # fmt: skip
    inject(model, config)
    shake(model)
    save_adapter(model, tmp_path)
    again = plain_model()
    load_adapter(again, tmp_path)
    assert {type(layer) for layer in adapter_layers(again).values()} == {LoRALinear}
    assert {layer.r for layer in adapter_layers(again).values()} == {4, 6}
    assert torch.allclose(outputs(again), outputs(model), atol=1e-12)


def test_a_field_of_a_shared_config_switches_a_method_on(tmp_path):
    """As init_lora_weights does: when it applies, how it prepares and what its file is are said in ``register``."""

    @dataclass
    class Switched(LoraConfig):
        start: str = "plain"

    def fields_of_lora(fields):
        del fields["start"]
        return pissa.as_plain_lora(fields)

    def build(base, name, config, context):
        assert context.shared == {"batches": 2, "r": 3}
        return pissa.build(base, name, config, context)

    def plain(base, name, config, context):
        return LoRALinear(base, r=config.r, **context.settings)

    def prepare(config, model, batches):
        return {"batches": len(batches), "r": config.r}

    register("plain", Switched, {nn.Linear: plain}, applies=lambda config: config.start == "plain")
    register(
        "shifted", Switched, {nn.Linear: build}, applies=lambda config: config.start == "shifted",
        prepare=prepare, file_fields=fields_of_lora,
    )  # fmt: skip
    settings = {"r": 3, "target_modules": TARGETS["biases"]}
    inject(other := plain_model(), Switched(**settings))
    assert {type(layer) for layer in adapter_layers(other).values()} == {LoRALinear}
    model = plain_model()
    with refused(model, "shifted", "batches"):
        inject(model, Switched(start="shifted", **settings))
    with refused(model, "start='sideways'", "shifted, plain"):
        inject(model, Switched(start="sideways", **settings))
    inject(model, Switched(start="shifted", **settings), batches=BATCHES)
    shake(model)
    save_adapter(model, tmp_path)
    load_adapter(again := plain_model(), tmp_path)
    assert type(adapter_state(again).configs["default"]) is LoraConfig
    assert torch.allclose(outputs(again), outputs(model), atol=1e-12)


def test_eva_needs_batches_and_sees_the_pretrained_model():
    model = plain_model()
    with refused(model, "EVA-like", "batches"):
        inject(model, METHODS["eva"].config(target_modules=TARGETS["biases"]))
    adapt(model, "eva")
    alone = {name: layer.lora_A.clone() for name, layer in adapter_layers(model).items()}
    second = adapted_model("ia3")
    adapt(second, "eva", adapter_name="eva")
    for name, layer in adapter_layers(second, "eva").items():
        assert torch.allclose(layer.lora_A, alone[name], atol=1e-10)
    assert not any(module._forward_pre_hooks for module in second.modules())


def test_eva_may_choose_ranks_and_its_file_has_them(tmp_path):
    model, config = plain_model(), METHODS["eva"].config(target_modules=TARGETS["biases"], r=9)
    inject(model, config, batches=[{"input_ids": IDS[:1, :3]}])  # three tokens have at most three directions
    assert config.rank_pattern == {}
    assert {layer.r for layer in adapter_layers(model).values()} == {3}
    save_adapter(model, tmp_path)
    load_adapter(plain_model(), tmp_path)


def test_a_method_has_its_own_default_targets():
    @dataclass
    class Everywhere(AdapterConfig):
        peft_type = "EVERYWHERE"

        def default_targets(self, model, modules):
            return {"llama": ["k_proj", "down_proj"]}[model.config.model_type]

    register("everywhere", Everywhere, {nn.Linear: ia3.build})
    model = plain_model()
    report = inject(model, Everywhere())
    assert {name.rpartition(".")[2] for name in report.replaced} == {"k_proj", "down_proj"}
    assert adapter_state(model).configs["default"].target_modules == ["k_proj", "down_proj"]


def test_two_prefixes_of_one_place_are_not_used_together():
    model = plain_model()
    for adapter_name in ("one", "two"):
        adapt(model, "prefix", adapter_name=adapter_name)
    with refused(model, "layers.0.mlp", "'one', 'two'"):
        set_adapter(model, ["one", "two"])
    with refused(plain := plain_model(), "nowhere"):
        inject(plain, prefix.PrefixLikeConfig(place="nowhere", size=16))


def test_a_setting_that_the_method_lacks_is_refused_and_in_no_file(tmp_path):
    with pytest.raises(ValueError, match=r"bias='all': IA3LikeConfig has no such setting"):
        ia3.IA3LikeConfig(target_modules=["q_proj"], bias="all")
    save_adapter(adapted_model("ia3"), tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert not fields.keys() & set(ia3.IA3LikeConfig.lacks)


def test_the_word_for_the_biases_of_adapted_layers_is_the_methods_own():
    model = plain_model()
    inject(model, vera.VeraLikeConfig(target_modules=["q_proj"], bias="vera_like_only"))
    assert [part.place for part in adapter_state(model).parts["default"]] == [
        f"model.layers.{number}.self_attn.q_proj.bias" for number in range(2)
    ]
    with pytest.raises(ValueError, match=r"bias='lora_only': expected one of 'none', 'all', 'vera_like_only'"):
        vera.VeraLikeConfig(target_modules=["q_proj"], bias="lora_only")


def test_a_scale_that_the_layer_was_built_with_is_not_swapped(tmp_path):
    one, other = adapted_model("loha"), adapted_model("loha", alpha=50)
    save_adapter(other, tmp_path)
    with refused(one, "alpha", "50", "LoHaLayer"):
        hotswap_adapter(one, tmp_path)


# Nesting by hand, and whatever else touches a pair of weight and bias


class Shift(AdapterLayer):
    """y = W x + b + v: gives a bias to a layer that may have none."""

    additive = True

    def __init__(self, base, **settings):
        super().__init__(base, **settings)
        self.v = self.new_parameter(self.features()[1])
        nn.init.normal_(self.v)

    def forward(self, x):
        y = self.base(x)
        return (y + self.update(x)).to(y.dtype) if self.applies_in_forward() else y

    def adapted(self, weight, bias):
        return weight, self.v.clone() if bias is None else bias + self.v

    def adapter_parameters(self):
        return [self.v]

    def to_file(self):
        return {"v": self.v}


@dataclass
class ScaledWithBiases(AdapterConfig):
    """(IA)³-like layers, beside which biases train."""

    peft_type = "SCALED_WITH_BIASES"


@dataclass
class ShiftConfig(AdapterConfig):
    peft_type = "SHIFT"


register("scale with biases", ScaledWithBiases, {nn.Linear: ia3.build})
register("shift", ShiftConfig, {nn.Linear: lambda base, name, config, context: Shift(base, **context.settings)})


def test_a_layer_may_refuse_what_a_file_holds_before_any_of_it_is_read(tmp_path, monkeypatch):
    def check_file(layer, tensors):
        if (tensors["v"] > 5).any():
            raise ValueError("v above 5")

    monkeypatch.setattr(Shift, "check_file", check_file)
    inject(model := plain_model(), ShiftConfig(target_modules=["q_proj"]))
    with torch.no_grad():
        list(adapter_layers(model).values())[-1].v[0] = 6
    save_adapter(model, tmp_path)
    inject(other := plain_model(), ShiftConfig(target_modules=["q_proj"]))
    for read, into in [(load_adapter, plain_model()), (hotswap_adapter, other)]:
        with refused(into, "layers.1.self_attn.q_proj: v above 5", str(tmp_path)):
            read(into, tmp_path)


@pytest.mark.parametrize("bias", [True, False])
def test_nested_layers_are_computed_from_the_inside_out(bias):
    torch.manual_seed(0)
    linear = nn.Linear(5, 4, bias=bias).double()
    inner = LoRALinear(linear, r=2, init_lora_weights=False, adapter_name="inner")
    outer = ia3.ScaledLayer(Shift(inner, adapter_name="shift"), adapter_name="scale")
    nn.init.normal_(outer.ia3_l)
    outer.eval()
    x = torch.randn(3, 5, dtype=torch.float64)
    assert torch.allclose(F.linear(x, outer.effective_weight(), outer.effective_bias()), outer(x), atol=1e-12)
    with pytest.raises(ValueError, match="ScaledLayer"):
        outer.merge()
    outer.active = False
    assert torch.allclose(F.linear(x, outer.effective_weight(), outer.effective_bias()), outer(x), atol=1e-12)
    expected, weight, registered = outer(x), linear.weight, linear.bias
    inner.merge()
    outer.base.merge()
    assert torch.allclose(outer(x), expected, atol=1e-12)
    assert torch.allclose(linear(x), expected, atol=1e-12)
    inner.unmerge()
    assert torch.allclose(outer(x), expected, atol=1e-12)
    outer.base.unmerge()
    assert linear.weight is weight
    assert linear.bias is registered


def test_a_bias_that_was_not_there_comes_and_goes():
    model = plain_model("no biases")
    inject(model, ShiftConfig(target_modules=["q_proj"]))
    before, expected = numbers(model), outputs(model)
    merge(model)
    assert torch.allclose(outputs(model), expected, atol=1e-12)
    with disable_adapter(model):
        assert torch.equal(outputs(model), outputs(plain_model("no biases")))
    assert torch.allclose(outputs(model), expected, atol=1e-12)
    unmerge(model)
    same(before, numbers(model))
    plain = merge_and_unload(model)
    assert plain.model.layers[0].self_attn.q_proj.bias is not None
    assert torch.allclose(outputs(plain), expected, atol=1e-12)


@pytest.mark.parametrize("others", [False, True])
def test_trained_biases_and_a_bias_that_merging_changes(others, tmp_path):
    """The merged bias starts from the trained one; disabling brings the pretrained one back, unmerging the trained."""
    model = plain_model()
    inject(model, ScaledWithBiases(target_modules=["q_proj", "down_proj"], bias="all"), "scale")
    if others:
        adapt(model, "lora", adapter_name="lora")
    shake(model, "scale")
    before, expected = numbers(model), outputs(model)
    with disable_adapter(model):
        assert torch.equal(outputs(model), outputs(plain_model()))
    merge(model)
    assert torch.allclose(outputs(model), expected, atol=1e-10)
    with disable_adapter(model):
        assert torch.equal(outputs(model), outputs(plain_model()))
    assert torch.allclose(outputs(model), expected, atol=1e-10)
    unmerge(model)
    same(before, numbers(model))
    save_adapter(model, tmp_path, "scale")
    again = plain_model()
    load_adapter(again, tmp_path)
    assert torch.allclose(outputs(again), expected, atol=1e-12)
    assert torch.allclose(outputs(merge_and_unload(model)), expected, atol=1e-10)


def test_an_inactive_adapters_biases_do_not_undo_a_merged_one():
    model = plain_model()
    inject(model, lora(target_modules=["q_proj"], bias="all"), "biases")
    adapt(model, "ia3", adapter_name="scale")
    shake(model, "biases"), shake(model, "scale")
    set_adapter(model, "scale")
    expected = outputs(model)
    assert torch.allclose(outputs(merge_and_unload(model)), expected, atol=1e-10)


def test_a_merge_that_fails_halfway_leaves_no_trace(monkeypatch):
    model = adapted_model("ia3")
    last = list(adapter_layers(model).values())[-1]
    with torch.no_grad():
        last.ia3_l[0] = float("inf")
    with refused(model, "infinite or NaN", "'default'"):
        merge(model)
    with refused(model, "infinite or NaN"):
        merge_and_unload(model)

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(last, "adapted", interrupted)
    with refused(model, error=KeyboardInterrupt):
        merge(model)


def test_the_models_config_is_a_copy_to_the_bottom():
    model, config = plain_model(), lora(target_modules=["q_proj"], rank_pattern={"q_proj": 2})
    inject(model, config)
    config.rank_pattern["q_proj"] = 5
    config.target_modules.append("v_proj")
    mine = adapter_state(model).configs["default"]
    assert (mine.rank_pattern, mine.target_modules) == ({"q_proj": 2}, ["q_proj"])
    inject(other := plain_model(), mine)  # and what a model has may be given to another
    assert adapter_state(other).configs["default"].layers != mine.layers


def test_combinations_are_checked_before_anything_is_merged(monkeypatch):
    model = plain_model()
    inject(model, lora(target_modules=["q_proj"]))
    adapt(model, "ia3", adapter_name="scale")  # q_proj and down_proj: only q_proj has both
    adapt(model, "bottleneck", adapter_name="bottleneck")
    for adapter_name in ("default", "scale", "bottleneck"):
        shake(model, adapter_name)
    for names, word in [(["scale", "default"], "ScaledLayer"), (["default", "bottleneck"], "BottleneckLayer")]:
        with refused(model, word):
            merge(model, names)
        with refused(model, word):
            set_adapter(model, names)
    with refused(model, "no adapter named", error=KeyError):
        merge(model, ["default", "nobody"])
    set_adapter(model, "scale")  # which stands around the default one
    with monkeypatch.context() as watched:
        watched.setattr(AdapterLayer, "merge", lambda layer: pytest.fail("merged before the check"))
        for names in ("default", ["default", "scale"], ["scale", "bottleneck"]):
            with refused(model, "Layer"):
                merge(model, names)
    merge(model)
    with refused(model, "ScaledLayer"):  # not beside what is merged either
        merge(model, "default")


def test_a_forgetful_child_of_lora_is_no_sum_and_has_no_factors():
    class Forgetful(LoRALinear):
        def forward(self, x):
            return 2 * super().forward(x)

    class Restated(Forgetful):
        additive = True

        def forward(self, x):
            return LoRALinear.forward(self, x)

    class Quiet(LoRALinear):
        """Says nothing of its own."""

    assert (Forgetful.additive, Forgetful.factors) == (False, None)
    assert (Restated.additive, Restated.factors) == (True, None)
    assert Quiet.additive
    assert Quiet.factors is LoRALinear.factors


def test_a_layer_that_makes_tensors_for_its_file_says_how_to_read_them(tmp_path):
    class Halved(Shift):
        def to_file(self):
            return {"half": self.v / 2}

    @dataclass
    class HalvedConfig(AdapterConfig):
        peft_type = "HALVED"

    register("halved", HalvedConfig, {nn.Linear: lambda base, name, config, context: Halved(base)})
    model = plain_model()
    inject(model, HalvedConfig(target_modules=["q_proj"]))
    save_adapter(model, tmp_path)
    with refused(plain_model(), "Halved", "from_file", error=NotImplementedError):
        load_adapter(plain_model(), tmp_path)


def test_the_config_that_was_defined_last_reads_the_file(tmp_path):
    """As in a notebook whose cell is run again. A child that inherits its peft_type leaves files to its parent."""

    def define():
        @dataclass
        class Again(AdapterConfig):
            peft_type = "AGAIN"

        register("again", Again, {nn.Linear: ia3.build})
        return Again

    @dataclass
    class ChildConfig(LoraConfig):
        pass

    register("child", ChildConfig, {nn.Linear: lambda base, name, config, context: LoRALinear(base, r=config.r)})
    first, second = define(), define()
    for config in (first, ChildConfig):
        model = plain_model()
        inject(model, config(target_modules=["q_proj"]))
        save_adapter(model, tmp_path)
        again = plain_model()
        load_adapter(again, tmp_path)
        assert type(adapter_state(again).configs["default"]) is (second if config is first else LoraConfig)


def test_a_method_that_nobody_registered_is_named():
    @dataclass
    class Unknown(AdapterConfig):
        peft_type = "UNKNOWN"

    with refused(model := plain_model(), "Unknown", "register"):
        inject(model, Unknown(target_modules=["q_proj"]))


@pytest.mark.parametrize("name", [name for name, case in METHODS.items() if case.layers])
@pytest.mark.parametrize("wrong", ["no such layer", "lm_head.norm"])
def test_an_injection_that_fails_leaves_the_model_as_it_was(name, wrong):
    model = plain_model()
    model.lm_head.requires_grad_(False)
    with refused(model, wrong):
        inject(model, METHODS[name].config(target_modules=[wrong]), batches=METHODS[name].batches)
    with refused(model, "input_layernorm", "LlamaRMSNorm"):
        inject(model, METHODS[name].config(target_modules=["q_proj", "input_layernorm"]), batches=METHODS[name].batches)
