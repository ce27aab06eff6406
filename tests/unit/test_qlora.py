"""A base in four bits: what is stored, kept for the backward pass, moved and cast, and what is refused."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch.compiler import config as compiler_config
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from lora_edu import LoraConfig, count_parameters, dequantize_base, inject, load_adapter, quantize_base, save_adapter
from lora_edu.core.adapter import adapter_layers
from lora_edu.core.entrants import Place, registered_entrants
from lora_edu.core.layer import LoRALinear
from lora_edu.core.state import adapter_state
from lora_edu.counting.measure import saved_bytes
from lora_edu.nf4 import INT4_CODE, dequantize_nf4, quantize_nf4
from lora_edu.variants import four_bit_base
from lora_edu.variants.four_bit_base import NF4Linear
from lora_edu.variants.qlora import QLoRALinear

IDS = torch.arange(24).view(2, 12)
SIZES = {"vocab_size": 40, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama(dtype=torch.float32, **settings):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES | {"intermediate_size": 96} | settings)).to(dtype)


def layer(bias=True, dtype=torch.float32, double_quant=True):
    """(a four-bit layer, the plain one with the same numbers)."""
    torch.manual_seed(0)
    plain = nn.Linear(64, 96, bias=bias).to(dtype)
    packed = NF4Linear(quantize_nf4(plain.weight, double_quant=double_quant), plain.bias)
    plain.weight.data = packed.weight
    return packed, plain


@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 3, 64), (0, 64)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_computes_as_a_plain_layer_with_the_same_numbers(shape, bias, dtype):
    packed, plain = layer(bias, dtype)
    results = []
    for each in (packed, plain):
        each.requires_grad_(False)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        y = each(x)
        y.backward(torch.ones_like(y))
        results.append((y, x.grad))
    for found, expected in zip(*results, strict=True):
        assert found.dtype == dtype
        assert torch.equal(found, expected)


def test_keeps_four_bits_for_the_backward_pass():
    packed, plain = layer(double_quant=False)
    plain.requires_grad_(False)
    x = torch.randn(3, 64, requires_grad=True)
    kept = saved_bytes(packed, lambda: packed(x).sum())
    dense = saved_bytes(nn.Identity(), lambda: F.linear(x, packed.weight, packed.bias).sum())
    assert kept == 0  # beside what the layer stores anyway
    assert dense == plain.weight.nbytes


def test_the_bias_can_train():
    packed, plain = layer()
    for each in (packed, plain):
        each.bias.requires_grad_(True)
        each(torch.ones(2, 3, 64)).sum().backward()
    assert torch.equal(packed.bias.grad, plain.bias.grad)
    assert packed.packed.grad is None


def test_autocast_computes_as_a_plain_layer_under_autocast():
    packed, plain = layer()
    results = []
    for each in (packed, plain):
        x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = each(x)
        assert y.dtype == torch.bfloat16
        y.sum().backward()
        assert x.grad.dtype == torch.float32
        results.append((y, x.grad))
    for found, expected in zip(*results, strict=True):
        assert torch.allclose(found, expected, atol=1e-2)


def test_a_cast_leaves_the_scales_alone():
    packed, _ = layer()
    weight = packed.weight
    packed.to(torch.bfloat16)
    assert (packed.absmax.dtype, packed.absmax_scales.dtype, packed.pairs.dtype) == (torch.uint8, *[torch.float32] * 2)
    assert packed.weight.dtype == packed.bias.dtype == torch.bfloat16
    assert torch.equal(packed.weight, weight.bfloat16())
    assert packed(torch.ones(64, dtype=torch.bfloat16)).dtype == torch.bfloat16
    packed.float()
    assert torch.equal(packed.weight, weight)  # nothing was lost on the way


def test_compiles_to_the_same_numbers():
    packed, _ = layer()
    adapted = QLoRALinear(packed, r=4, init_lora_weights=False)
    torch._dynamo.reset()
    compiled = torch.compile(adapted, backend=aot_autograd(fw_compiler=lambda graph, _: graph), fullgraph=True)
    x = torch.randn(3, 64, requires_grad=True)
    (compiled(x) ** 2).sum().backward()
    found, x.grad = x.grad, None
    (adapted(x) ** 2).sum().backward()
    assert torch.allclose(found, x.grad, rtol=1e-5, atol=1e-6)


def test_copies_states_and_its_name():
    packed, _ = layer()
    other = copy.deepcopy(packed)
    assert torch.equal(other.weight, packed.weight)
    empty = NF4Linear(quantize_nf4(torch.zeros(96, 64), double_quant=True), torch.zeros(96))
    empty.load_state_dict(packed.state_dict())
    assert torch.equal(empty.weight, packed.weight)
    assert "in_features=64, out_features=96, bias=True, 4.13" in repr(packed)


# A whole model


def test_a_model_is_stored_in_four_bits_all_but_embedding_and_head():
    model = llama()
    plain = {name: module.weight.detach() for name, module in model.named_modules() if type(module) is nn.Linear}
    before = count_parameters(model)[1]
    report = quantize_base(model)
    assert set(report.replaced) == plain.keys() - {"lm_head"}
    for name in report.replaced:
        expected = dequantize_nf4(quantize_nf4(plain[name], double_quant=True))
        assert torch.equal(model.get_submodule(name).weight, expected)
    assert type(model.lm_head) is nn.Linear
    assert count_parameters(model)[1] == before
    assert report.bytes_before == sum(plain[name].nbytes for name in report.replaced)
    numbers = report.bytes_before / 4
    assert report.bits_per_parameter == 8 * report.bytes_after / numbers
    assert str(report).startswith("stored 14 weights in 4.13")
    assert inject(model, LoraConfig(target_modules="all-linear")).replaced == report.replaced
    assert all(type(each) is QLoRALinear for each in adapter_layers(model).values())


def test_settings_reach_the_layers():
    model = llama()
    report = quantize_base(model, ["q_proj", "up_proj"], exclude_modules=["layers.1.mlp.up_proj"], block_size=32,
                           double_quant=False, code=INT4_CODE)  # fmt: skip
    assert len(report.replaced) == 3
    state = model.model.layers[0].mlp.up_proj.state
    assert (state.block_size, state.bits_per_parameter) == (32, 5)
    assert state.pairs[:, 1].unique().tolist() == INT4_CODE.tolist()
    assert len(quantize_base(model).replaced) == 11  # what is left
    with pytest.raises(ValueError, match="these layers are stored in four bits already"):
        quantize_base(model)


def test_the_new_head_of_a_classifier_stays_plain():
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SIZES | {"intermediate_size": 96}))
    assert not any("classifier" in name for name in quantize_base(model).replaced)
    assert type(model.classifier) is nn.Linear


def test_a_shared_layer_stays_one():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model.append(model[0])
    assert quantize_base(model, ["0", "1"]).replaced == ["0", "1"]
    assert model[2] is model[0]
    assert dequantize_base(model) == 2
    assert model[2] is model[0]


def test_a_file_of_plain_lora_goes_into_a_four_bit_base_and_back(tmp_path):
    plain, packed = llama(), llama()
    quantize_base(packed)
    inject(plain, LoraConfig(r=2, init_lora_weights=False))
    save_adapter(plain, tmp_path / "plain")
    load_adapter(packed, tmp_path / "plain")
    save_adapter(packed, tmp_path / "packed")
    packed_file, plain_file = (tmp_path / name / "adapter_model.safetensors" for name in ("packed", "plain"))
    assert packed_file.read_bytes() == plain_file.read_bytes()


def test_dequantised_with_adapters_it_is_plain_lora():
    model = llama()
    quantize_base(model)
    inject(model, LoraConfig(r=2, init_lora_weights=False))
    model.eval()
    expected = model(IDS).logits
    assert dequantize_base(model) == 14
    assert torch.allclose(model(IDS).logits, expected, atol=1e-6)
    assert all(type(each) is LoRALinear for each in adapter_layers(model).values())
    targets = adapter_state(model).configs["default"].targets
    assert all(targets[name] is each.frozen for name, each in adapter_layers(model).items())
    assert not any(p.requires_grad for name, p in model.named_parameters() if "lora_" not in name)
    assert dequantize_base(model) == 0


def test_it_joins_the_comparison():
    entrant = next(each for each in registered_entrants() if each.name == "qlora-r8")
    model = llama()
    entrant.unfreeze(model, Place("tiny", "CAUSAL_LM"))
    assert {type(each) for each in adapter_layers(model).values()} == {QLoRALinear}


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_trains_with_checkpointing(use_reentrant):
    grads = []
    for checkpointing in (False, True):
        model = llama().train()
        quantize_base(model)
        inject(model, LoraConfig(r=2, target_modules="all-linear"))
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model(IDS, labels=IDS).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name


# What is refused


def untouched(model, before):
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(after[key] is before[key] or torch.equal(after[key], before[key]) for key in before)


@pytest.mark.errors
@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"target_modules": ["q_porj"]}, ValueError, "no module of the LlamaForCausalLM has such a name"),
        ({"target_modules": ["embed_tokens"]}, TypeError, r"'model.embed_tokens' is a Embedding: only nn\.Linear"),
        ({"target_modules": ["norm"]}, ValueError, "is a LlamaRMSNorm, which LoRA cannot adapt"),
        ({"block_size": 0}, ValueError, "block_size=0"),
        ({"code": torch.ones(3)}, ValueError, "rising levels"),
    ],
    ids=str,
)
def test_bad_settings_leave_the_model_alone(settings, error, words):
    model = llama()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(error, match=words):
        quantize_base(model, **settings)
    untouched(model, before)


@pytest.mark.errors
def test_a_weight_that_is_not_finite_leaves_the_model_alone():
    model = llama()
    model.model.layers[1].mlp.down_proj.weight.data[3, 4] = torch.inf
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="infinite or NaN"):
        quantize_base(model)
    untouched(model, before)


@pytest.mark.errors
def test_packed_meta_unread_and_adapted_weights():
    model = llama()
    with pytest.raises(ValueError, match="on the meta device"):
        quantize_base(llama().to("meta"))
    inject(model, LoraConfig())
    with pytest.raises(ValueError, match=r"the model has adapters, .* quantize_base\(model\) comes first"):
        quantize_base(model)
    packed = llama()
    linear = packed.model.layers[0].self_attn.q_proj
    linear.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(TypeError, match=r"packed as torch\.uint8"):
        quantize_base(packed)
    attention = nn.Sequential(nn.MultiheadAttention(64, 2))
    with pytest.raises(ValueError, match="reads this layer's weight and does not call the layer"):
        quantize_base(attention, ["out_proj"])


@pytest.mark.errors
def test_the_layer_wants_four_bits():
    with pytest.raises(TypeError, match="QLoRALinear adapts a FourBitLinear, not a Linear"):
        QLoRALinear(nn.Linear(8, 8))


@pytest.mark.parametrize("backend", ["aot_eager", "aot_eager_decomp_partition"])  # the second decides what is kept
def test_the_compiler_keeps_no_dequantised_weight(backend):
    layer = nn.Linear(128, 96)
    model = nn.Sequential(NF4Linear(quantize_nf4(layer.weight, double_quant=True), layer.bias), nn.GELU())
    x = torch.randn(4, 128, requires_grad=True)
    expected = model(x)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), x)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.nbytes) or tensor, lambda t: t):
        y = torch.compile(model, backend=backend)(x)
    assert kept  # the hooks saw what is kept
    assert max(kept) < layer.weight.nbytes / 4
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    assert torch.allclose(y, expected, atol=1e-6)
    assert torch.allclose(grad, expected_grad, atol=1e-6)
    torch._dynamo.reset()


def test_every_shape_gets_a_kernel(monkeypatch):
    counted = CompileCounter()
    monkeypatch.setattr(four_bit_base.torch, "compile", partial(torch.compile, backend=counted))
    monkeypatch.setattr(compiler_config, "recompile_limit", compiler_config.recompile_limit)
    four_bit_base._fused.cache_clear()
    torch._dynamo.reset()
    for out_features in range(8, 100, 8):  # twelve, where the compiler's own limit is eight
        packed = NF4Linear(quantize_nf4(torch.randn(out_features, 64), double_quant=True))
        found = four_bit_base._fused()(packed.about, packed.stored, torch.float32)
        assert torch.equal(found, packed.weight)
    assert counted.frame_count == 12
    four_bit_base._fused.cache_clear()
    torch._dynamo.reset()
