"""QLoRA equals PEFT: around the numbers that four bits stand for, and around bitsandbytes' layers if installed."""

import copy
import warnings

import peft
import pytest
import torch
from shapes import (
    TARGETS,
    assert_same_step,
    batch_for,
    losses_of_twenty_steps,
    moved,
    relative_error,
    take_values,
    their_parameters,
    tiny_model,
)

from lora_edu import (
    LoraConfig,
    count_parameters,
    dequantize_base,
    disable_adapter,
    inject,
    load_adapter,
    merge,
    merge_and_unload,
    quantize_base,
    save_adapter,
)
from lora_edu.core.adapter import adapter_layers
from lora_edu.variants.qlora import FourBitLinear, QLoRALinear, dense_weight

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
]
OPTIONS = [{"r": 4, "lora_alpha": 6}, {"r": 3, "lora_alpha": 6, "lora_dropout": 0.3, "use_rslora": True, "bias": "all"}]
SHAPES = ["llama", "bert"]


def their_lora(base, targets, **options):
    """PEFT's LoRA, with random A and B."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(target_modules=targets, init_lora_weights=False, **options)
        return peft.get_peft_model(base, config).train()


def four_bit_pair(shape, dtype=torch.float64, **options):
    """Our model in four bits, and PEFT's on the same numbers as plain weights, with the same A and B."""
    ours = tiny_model(shape, dtype)
    quantize_base(ours)
    theirs = copy.deepcopy(ours)
    dequantize_base(theirs)
    theirs = their_lora(theirs, TARGETS[shape], **options)
    inject(ours, LoraConfig(target_modules=TARGETS[shape], **options))
    assert all(type(layer) is QLoRALinear for layer in adapter_layers(ours).values())
    take_values(ours.train(), theirs)
    return ours, theirs


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_forward_and_gradients(shape, options):
    ours, theirs = four_bit_pair(shape, **options)
    assert_same_step(ours, theirs, batch_for(shape, ours))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_twenty_steps_of_training(options):
    ours, theirs = four_bit_pair("llama", **options)
    batch = batch_for("llama", ours)
    losses = [losses_of_twenty_steps(model, lambda each: each(**batch).loss) for model in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert losses[0][-1] < losses[0][0]
    for key, (our, their) in their_parameters(ours, theirs).items():
        assert relative_error(our, their) <= 1e-9, key


@pytest.mark.parametrize("shape", SHAPES)
def test_merged_weights_once_the_base_is_plain(shape):
    ours, theirs = four_bit_pair(shape, r=4, lora_alpha=6)
    dequantize_base(ours)
    plain, reference = merge_and_unload(ours).state_dict(), theirs.merge_and_unload().state_dict()
    assert plain.keys() == reference.keys()
    for key, weight in plain.items():
        assert relative_error(weight, reference[key]) <= 1e-9, key


@pytest.mark.parametrize("shape", SHAPES)
def test_files_cross_in_both_directions(shape, tmp_path):
    ours, theirs = four_bit_pair(shape, torch.float32, r=4, lora_alpha=6)
    moved(ours)
    save_adapter(ours, tmp_path / "ours")
    plain = tiny_model(shape, torch.float32)
    quantize_base(plain)
    dequantize_base(plain)
    read = peft.PeftModel.from_pretrained(plain, tmp_path / "ours").eval()
    batch = batch_for(shape, ours)
    assert relative_error(read(**batch).logits, ours.eval()(**batch).logits) <= 1e-5
    moved(theirs).save_pretrained(tmp_path / "theirs")
    again = tiny_model(shape, torch.float32)
    quantize_base(again)
    load_adapter(again, tmp_path / "theirs")
    assert relative_error(again.eval()(**batch).logits, theirs.eval()(**batch).logits) <= 1e-5


def test_the_formula_in_float64():
    """Independently: levels looked up one by one, scales by hand."""
    base = tiny_model("llama")
    report = quantize_base(base, ["up_proj"], double_quant=False)
    assert report.replaced == ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    inject(base, LoraConfig(r=4, lora_alpha=6, target_modules=["up_proj"], init_lora_weights=False))
    layer = base.model.layers[0].mlp.up_proj
    state, numbers = layer.frozen.state, []
    for i, byte in enumerate(state.packed.tolist()):
        for place, index in ((2 * i, byte // 16), (2 * i + 1, byte % 16)):
            numbers.append(state.pairs[16 * index, 0] * state.absmax[place // 64])
    weight = torch.stack(numbers).double().view(40, 24)
    x = torch.randn(5, 24, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    expected = x @ weight.T + layer.bias + 1.5 * (x @ layer.lora_A.T) @ layer.lora_B.T
    assert relative_error(y, expected) <= 1e-12
    g = torch.randn(5, 40, dtype=torch.float64)
    found = torch.autograd.grad(y, (x, layer.lora_A, layer.lora_B), g)
    A, B = layer.lora_A.detach(), layer.lora_B.detach()
    by_hand = (g @ (weight + 1.5 * B @ A), 1.5 * (g @ B).T @ x, 1.5 * g.T @ (x @ A.T))
    for gradient, reference in zip(found, by_hand, strict=True):
        assert relative_error(gradient, reference) <= 1e-12
    assert torch.autograd.gradcheck(layer, torch.randn(2, 24, dtype=torch.float64, requires_grad=True))


# bitsandbytes


def their_four_bits(dtype=torch.float32, double_quant=True, seed=0):
    """(a Llama whose linear layers are bitsandbytes' ``Linear4bit``, the same with plain weights).

    Rows are whole blocks: on a CPU, bitsandbytes 0.50.2 mistakes the scales of others when it dequantises.
    """
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=61, attention_bias=True, **sizes)).to(dtype).train()
    plain = copy.deepcopy(model)
    nf4 = {"quant_type": "nf4", "compress_statistics": double_quant}
    for name, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            shape, bias = (layer.in_features, layer.out_features), layer.bias
            new = bitsandbytes.nn.Linear4bit(*shape, bias=bias is not None, compute_dtype=dtype, device="meta", **nf4)
            new.weight, new.bias = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, **nf4), bias
            model.set_submodule(name, new.to("cpu"))  # quantised on its way
    model.is_loaded_in_4bit = True  # what PEFT asks before it adapts such layers
    return model, plain


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[1] | {"bias": "none"}], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-2)], ids=str)
def test_around_bitsandbytes_layers_as_peft(dtype, tolerance, options, double_quant):
    ours, _ = their_four_bits(dtype, double_quant)
    theirs = their_lora(copy.deepcopy(ours), TARGETS["llama"], **options)
    report = inject(ours, LoraConfig(target_modules=TARGETS["llama"], **options))
    assert (report.trainable, report.total) == theirs.get_nb_trainable_parameters() == count_parameters(ours)
    take_values(ours.train(), theirs)
    assert_same_step(ours, theirs, batch_for("llama", ours), tolerance)


def test_our_four_bits_are_bitsandbytes():
    """The same LoRA on both: the same numbers, to rounding."""
    reference, ours = their_four_bits(double_quant=False)
    quantize_base(ours, double_quant=False)
    config = LoraConfig(r=4, target_modules=TARGETS["llama"], init_lora_weights=False)
    for model in (ours, reference):
        torch.manual_seed(1)
        inject(model, config)
    batch = batch_for("llama", ours)
    results = [model(**batch) for model in (ours, reference)]
    assert relative_error(results[0].logits, results[1].logits) <= 1e-6
    for result in results:
        result.loss.backward()
    theirs = adapter_layers(reference)
    for name, layer in adapter_layers(ours).items():
        assert relative_error(layer.lora_A.grad, theirs[name].lora_A.grad) <= 1e-5
    assert count_parameters(ours) == count_parameters(reference)


def test_what_else_works_around_bitsandbytes_layers(tmp_path):
    model, _ = their_four_bits()
    before = model(**batch_for("llama", model)).logits
    inject(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False), fast=True)
    batch = batch_for("llama", model)
    expected = model(**batch).logits
    with disable_adapter(model):
        assert torch.equal(model(**batch).logits, before)
    with pytest.raises(ValueError, match=r"QLoRALinear, and the Linear4bit in it stores no weight .* dequantize_base"):
        merge(model)
    save_adapter(model, tmp_path)
    again, _ = their_four_bits()
    load_adapter(again, tmp_path)
    assert torch.equal(again(**batch).logits, expected)
    assert dequantize_base(model) == 14
    merge(model)
    assert not any(isinstance(module, FourBitLinear) for module in model.modules())
    assert relative_error(model.eval()(**batch).logits, expected) <= 1e-5


def test_bytes_that_bitsandbytes_has_rearranged_are_refused():
    layer = their_four_bits()[0].model.layers[0].mlp.up_proj
    layer.weight.quant_state.packing_format_for_cpu = True  # as after a pass in eval mode, on some CPUs
    with pytest.raises(ValueError, match="rearranged the bytes of this Linear4bit"):
        dense_weight(layer)
