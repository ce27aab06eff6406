"""LoftQ equals PEFT's, where PEFT runs: its own code needs bitsandbytes, and a CUDA device, which is taken out here.

What PEFT does otherwise: it does not divide the start by s = lora_alpha / r. So training is compared at s = 1.
"""

import inspect
import warnings

import numpy as np
import peft
import pytest
import torch
from peft.tuners.lora import layer as their_layer
from peft.utils import loftq_utils
from shapes import (
    TARGETS,
    losses_of_twenty_steps,
    moved,
    relative_error,
    take_values,
    their_parameters,
)
from transformers import LlamaConfig, LlamaForCausalLM

from lora_edu import LoraConfig, count_parameters, inject, load_adapter, save_adapter
from lora_edu.core.adapter import adapter_layers
from lora_edu.nf4 import NF4_CODE, dequantize_nf4, quantize_nf4
from lora_edu.variants.loftq import LoftQLinear, loftq

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
]
IDS = torch.randint(0, 61, (3, 7), generator=torch.Generator().manual_seed(1))
TARGET_NAMES = TARGETS["llama"]


def rounded(values):
    """To four bits and back, by NumPy: the nearest level of each block of 64, times its largest magnitude."""
    code = NF4_CODE.double().numpy()
    blocks = values.reshape(-1, 64)
    scale = np.abs(blocks).max(1, keepdims=True)
    return (code[np.abs((blocks / scale)[..., None] - code).argmin(-1)] * scale).reshape(values.shape)


@pytest.mark.parametrize("iterations", [1, 4])
@pytest.mark.parametrize(("alpha", "rslora"), [(4, False), (6, False), (6, True)])
def test_the_formula_in_float64(iterations, alpha, rslora):
    """Q, and s · B A, by NumPy; the layer's output and its gradients from these."""
    torch.manual_seed(0)
    base = torch.nn.Linear(32, 48).double()
    W, low_rank = base.weight.detach().numpy(), 0
    for _ in range(iterations):
        Q = rounded(W - low_rank)
        U, S, Vh = np.linalg.svd(W - Q, full_matrices=False)
        low_rank = (U[:, :4] * S[:4]) @ Vh[:4]
    layer = LoftQLinear(base, iterations, 4, lora_alpha=alpha, use_rslora=rslora)
    s = alpha / 2 if rslora else alpha / 4
    assert relative_error(layer.weight, torch.from_numpy(Q)) <= 1e-6  # scales are stored in float32
    assert relative_error(s * layer.lora_B @ layer.lora_A, torch.from_numpy(low_rank)) <= 1e-5
    moved(layer)
    x, g = torch.randn(5, 32, dtype=torch.float64, requires_grad=True), torch.randn(5, 48, dtype=torch.float64)
    A, B, weight = layer.lora_A.detach(), layer.lora_B.detach(), layer.weight
    y = layer(x)
    assert relative_error(y, x @ weight.T + layer.bias + s * x @ A.T @ B.T) <= 1e-9
    found = torch.autograd.grad(y, (x, layer.lora_A, layer.lora_B), g)
    by_hand = (g @ (weight + s * B @ A), s * (g @ B).T @ x, s * g.T @ (x @ A.T))
    for gradient, reference in zip(found, by_hand, strict=True):
        assert relative_error(gradient, reference) <= 1e-9


def test_the_decomposition_is_pefts():
    torch.manual_seed(0)
    W = torch.randn(48, 64)
    Q, A, B = loftq(W, 4)
    theirs = loftq_utils._low_rank_decomposition(W - dequantize_nf4(Q), reduced_rank=4)
    assert relative_error(A, theirs["R"]) <= 1e-6
    assert relative_error(B, theirs["L"]) <= 1e-6


# PEFT's own, on a CPU


@pytest.fixture
def their_loftq(monkeypatch):
    """PEFT's ``loftq_init`` with one word changed, also for its layers: the device that it computes on."""
    pytest.importorskip("bitsandbytes")
    source = inspect.getsource(loftq_utils.loftq_init)
    assert source.count('"cuda"') == 1
    names = dict(vars(loftq_utils))
    exec(source.replace('"cuda"', '"cpu"'), names)
    monkeypatch.setattr(their_layer, "loftq_init", names["loftq_init"])
    return names["loftq_init"]


def llama(dtype=torch.float32):
    """Its rows are whole blocks: on a CPU, bitsandbytes 0.50.2 mistakes the scales of others when it dequantises."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=61, attention_bias=True, **sizes)).to(dtype).train()


def their_model(iterations, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loftq_config = peft.LoftQConfig(loftq_bits=4, loftq_iter=iterations)
        config = peft.LoraConfig(
            target_modules=TARGET_NAMES, init_lora_weights="loftq", loftq_config=loftq_config, **options
        )
        return peft.get_peft_model(llama(), config).train()


def pair(iterations, **options):
    ours = llama()
    settings = {"loftq_bits": 4, "loftq_iter": iterations}
    inject(
        ours,
        LoraConfig(target_modules=TARGET_NAMES, init_lora_weights="loftq", loftq_config=settings, **options),
    )
    return ours.train(), their_model(iterations, **options)


@pytest.mark.parametrize("iterations", [1, 3])
def test_the_start_is_pefts(iterations, their_loftq):
    W = torch.randn(48, 64, generator=torch.Generator().manual_seed(4))
    Q, A, B = loftq(W, 4, iterations)
    their_Q, their_A, their_B = their_loftq(W, num_bits=4, reduced_rank=4, num_iter=iterations)
    assert relative_error(dequantize_nf4(Q), their_Q) <= 1e-6
    assert relative_error(B @ A, their_B @ their_A) <= 1e-5


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("options", [{"r": 4, "lora_alpha": 4}, {"r": 4, "lora_alpha": 2, "use_rslora": True}], ids=str)
def test_training_is_pefts(iterations, options, their_loftq):
    ours, theirs = pair(iterations, **options)
    assert count_parameters(ours) == theirs.get_nb_trainable_parameters()
    results = []
    for model in (ours, theirs):
        result = model(IDS, labels=IDS)
        result.loss.backward()
        results.append(result)
    assert relative_error(results[0].logits, results[1].logits) <= 1e-5
    for key, (our, their) in their_parameters(ours, theirs).items():
        assert relative_error(our.grad.abs(), their.grad.abs()) <= 1e-4, key  # up to the signs of singular vectors
    losses = [losses_of_twenty_steps(model, lambda each: each(IDS, labels=IDS).loss) for model in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("iterations", [1, 3])
def test_files_cross_in_both_directions(iterations, their_loftq, tmp_path):
    """Each side makes Q again from the pretrained weight; it is the same for every lora_alpha."""
    ours, theirs = pair(iterations, r=4, lora_alpha=6)
    take_values(ours, moved(theirs))
    expected = ours.eval()(IDS).logits
    assert relative_error(expected, theirs.eval()(IDS).logits) <= 1e-5
    save_adapter(ours, tmp_path / "ours")
    read = peft.PeftModel.from_pretrained(llama(), tmp_path / "ours").eval()
    assert relative_error(read(IDS).logits, expected) <= 1e-5
    theirs.save_pretrained(tmp_path / "theirs")
    again = llama()
    load_adapter(again, tmp_path / "theirs")
    assert relative_error(again.eval()(IDS).logits, expected) <= 1e-5


def test_pefts_start_overshoots_where_the_scale_is_not_one(their_loftq):
    """As in its issue 1982: at s = 3 its model starts further away than plain rounding; ours is nearest at every s."""
    ours, theirs = pair(1, r=4, lora_alpha=12)
    errors = {"ours": 0.0, "theirs": 0.0, "rounded": 0.0}
    pretrained = dict(llama().named_modules())
    for name, layer in adapter_layers(ours).items():
        W, lora = pretrained[name].weight.detach(), theirs.base_model.model.get_submodule(name)
        their_weight = lora.base_layer.weight + lora.get_delta_weight("default")
        errors["ours"] += (W - layer.effective_weight()).norm().item()
        errors["theirs"] += (W - their_weight).norm().item()
        errors["rounded"] += (W - dequantize_nf4(quantize_nf4(W))).norm().item()
    assert errors["ours"] < errors["rounded"] < errors["theirs"]


def test_half_precision_is_pefts_to_its_rounding(their_loftq):
    W = torch.randn(48, 64, generator=torch.Generator().manual_seed(4)).bfloat16()
    Q, A, B = loftq(W, 4)
    their_Q, their_A, their_B = their_loftq(W, num_bits=4, reduced_rank=4, num_iter=1)
    assert dequantize_nf4(Q).dtype == their_Q.dtype == torch.bfloat16
    assert torch.equal(dequantize_nf4(Q), their_Q)
    errors = [(W.double() - their_Q.double() - b.double() @ a.double()).norm() for a, b in ((A, B), (their_A, their_B))]
    assert errors[0] <= errors[1] * (1 + 1e-6)
