"""PiSSA and OLoRA equal PEFT's, which take their start out of the weight; and equal a formula that is written here.

PEFT's need float32 or less and change the base, so what is compared is what comes out: logits, losses, merged weights,
and the files that its conversion to plain LoRA writes and reads.
"""

import copy
import json
import math
import warnings

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from shapes import (
    TARGETS,
    batch_for,
    losses_of_twenty_steps,
    moved,
    relative_error,
    take_values,
    their_parameters,
    tiny_model,
)
from test_qlora_peft import their_four_bits
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_edu import LoraConfig, count_parameters, inject, load_adapter, merge_and_unload, save_adapter
from lora_edu.core.adapter import adapter_layers
from lora_edu.core.layer import LoRALinear
from lora_edu.variants.pissa import pissa_start
from lora_edu.variants.shifted import ShiftedQLoRA

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
    pytest.mark.filterwarnings("ignore:PiSSA changes the base weights:UserWarning"),
    pytest.mark.filterwarnings("ignore:OLoRA changes the base weights:UserWarning"),
]
OPTIONS = [{"r": 4, "lora_alpha": 6}, {"r": 3, "lora_alpha": 6, "use_rslora": True, "bias": "all"}]
PATTERNS = {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 7}}
# PEFT's OLoRA does not know that GPT-2's weights are stored as (in, out).
PAIRS = [("pissa", "llama"), ("pissa", "gpt2"), ("pissa", "bert"), ("olora", "llama"), ("olora", "bert")]
every_pair = pytest.mark.parametrize(("start", "shape"), PAIRS)


def their_adapter(base, shape, start, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(target_modules=TARGETS[shape], init_lora_weights=start, **options)
        return peft.get_peft_model(base, config).train()


def pair(start, shape, dtype=torch.float32, **options):
    """Our model and PEFT's, each with its own start from the same base."""
    ours = tiny_model(shape, dtype)
    theirs = their_adapter(copy.deepcopy(ours), shape, start, **options)
    inject(ours, LoraConfig(target_modules=TARGETS[shape], init_lora_weights=start, **options))
    return ours, theirs


def moved_pair(start, shape, dtype=torch.float32, **options):
    """The same, with equal values of A and B that have moved away from the start."""
    ours, theirs = pair(start, shape, dtype, **options)
    take_values(ours, moved(theirs))
    return ours, theirs


@every_pair
def test_the_starts_are_pefts(start, shape):
    ours, theirs = pair(start, shape, r=4, lora_alpha=6)
    for key, (our, their) in their_parameters(ours, theirs).items():
        assert relative_error(our.abs(), their.abs()) <= 1e-5, key  # the signs of singular vectors are arbitrary
    for name, layer in adapter_layers(ours).items():
        lora = theirs.base_model.model.get_submodule(name)
        product = lora.lora_B["default"].weight @ lora.lora_A["default"].weight
        assert relative_error(layer.lora_B @ layer.lora_A, product) <= 1e-5
    assert count_parameters(ours) == theirs.get_nb_trainable_parameters()


@every_pair
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_forward_and_gradients(start, shape, options):
    ours, theirs = moved_pair(start, shape, **options)
    batch = batch_for(shape, ours)
    results = []
    for model in (ours, theirs):
        x = batch["inputs_embeds"].detach().clone().requires_grad_(True)
        result = model(**batch | {"inputs_embeds": x})
        result.loss.backward()
        results.append((result.logits, x.grad))
    for our, their in zip(*results, strict=True):
        assert relative_error(our, their) <= 1e-5
    for key, (our, their) in their_parameters(ours, theirs).items():
        # BERT's key bias has no gradient but rounding: softmax does not see it.
        assert relative_error(our.grad, their.grad) <= 1e-5 or their.grad.norm() < 1e-6, key


@every_pair
def test_twenty_steps_of_training(start, shape):
    ours, theirs = pair(start, shape, r=4, lora_alpha=6)
    batch = batch_for(shape, ours)
    losses = [losses_of_twenty_steps(model, lambda each: each(**batch).loss) for model in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][-1] < losses[0][0]


@every_pair
def test_merged_weights(start, shape):
    ours, theirs = moved_pair(start, shape, r=4, lora_alpha=6)
    plain, reference = merge_and_unload(ours).state_dict(), theirs.merge_and_unload().state_dict()
    assert plain.keys() == reference.keys()
    for key, weight in plain.items():
        assert relative_error(weight, reference[key]) <= 1e-5, key


@every_pair
def test_half_precision_loses_no_more_than_pefts(start, shape):
    """There the weight without the start is rounded once more; here it stays as it came."""
    ours, theirs = moved_pair(start, shape, torch.bfloat16, r=4, lora_alpha=6)
    errors = {"ours": 0.0, "theirs": 0.0}
    for name, layer in adapter_layers(ours).items():
        x = torch.randn(2000, layer.in_features).bfloat16()
        part = layer.start_B.double() @ layer.start_A.double()
        change = layer.scaling * (layer.lora_B.double() @ layer.lora_A.double() - part)
        expected = F.linear(x.double(), layer.oriented(layer.weight).double() + change, layer.bias.double())
        for whose, module in (("ours", layer), ("theirs", theirs.base_model.model.get_submodule(name))):
            errors[whose] += relative_error(module(x), expected)
    assert errors["ours"] < errors["theirs"]


def test_dropout_makes_no_noise_at_the_start():
    """What A and A₀ read is dropped alike, so that the start cancels; PEFT drops it from what trains only."""
    model = tiny_model("llama")
    batch = batch_for("llama", model)
    expected = model(**batch).logits
    settings = {"r": 4, "target_modules": TARGETS["llama"], "init_lora_weights": "pissa", "lora_dropout": 0.5}
    inject(model, LoraConfig(**settings))
    assert relative_error(model.train()(**batch).logits, expected) <= 1e-12
    moved(model)
    noisy = [model(**batch).logits for _ in range(2)]
    assert relative_error(*noisy) > 1e-3


# The formula, in float64


def part_of(start, weight, r, scaling):
    """What the start takes out of the weight (out, in), by NumPy."""
    if start == "pissa":
        U, S, Vh = np.linalg.svd(weight, full_matrices=False)
        return (U[:, :r] * S[:r]) @ Vh[:r]
    Q, R = np.linalg.qr(weight)
    return scaling * Q[:, :r] @ R[:r]


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding"])
@pytest.mark.parametrize("rslora", [False, True])
def test_the_formula_in_float64(start, kind, rslora):
    """y = (W − part) x + b + s · B A x, the part by NumPy; all gradients too. PEFT has no twin in float64."""
    torch.manual_seed(0)
    kinds = {
        "linear": lambda: nn.Linear(10, 7),
        "conv1d": lambda: Conv1D(7, 10),
        "embedding": lambda: nn.Embedding(10, 7),
    }
    model = nn.Sequential(kinds[kind]()).double()
    before = model[0].weight.detach().clone()
    settings = {"r": 3, "lora_alpha": 5, "use_rslora": rslora}
    inject(model, LoraConfig(target_modules=["0"], init_lora_weights=start, **settings))
    layer, s = model[0], 5 / math.sqrt(3) if rslora else 5 / 3
    assert torch.equal(layer.weight, before)
    W = before if kind == "linear" else before.T
    rest = W - torch.from_numpy(part_of(start, W.numpy(), 3, s))
    assert relative_error(rest + s * layer.lora_B @ layer.lora_A, W) <= 1e-12
    moved(model)
    ids = torch.randint(0, 10, (4, 6))
    x = ids if kind == "embedding" else torch.randn(4, 6, 10, dtype=torch.float64, requires_grad=True)
    rows = F.one_hot(ids, 10).double() if kind == "embedding" else x
    expected = F.linear(rows, rest + s * layer.lora_B @ layer.lora_A, layer.bias)
    y, g = model(x), torch.randn(4, 6, 7, dtype=torch.float64)
    assert relative_error(y, expected) <= 1e-9
    inputs = [layer.lora_A, layer.lora_B, *([x] if x.requires_grad else [])]
    for our, reference in zip(torch.autograd.grad(y, inputs, g), torch.autograd.grad(expected, inputs, g), strict=True):
        assert relative_error(our, reference) <= 1e-9


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_gpt2_and_its_embedding_start_at_the_base(start):
    """PEFT's OLoRA fails on Conv1D, and its PiSSA quietly starts embeddings as plain LoRA."""
    model = tiny_model("gpt2")
    ids = torch.arange(12).view(2, 6)
    expected = model(ids).logits
    inject(model, LoraConfig(r=4, lora_alpha=6, target_modules=["wte", "c_attn", "c_fc"], init_lora_weights=start))
    assert relative_error(model(ids).logits, expected) <= 1e-12
    assert all(layer.lora_A.any() and layer.lora_B.any() for layer in adapter_layers(model).values())
    losses = losses_of_twenty_steps(model, lambda each: each(ids, labels=ids).loss)
    assert losses[-1] < losses[0]


def test_the_randomised_decomposition_is_pefts():
    """From the same random numbers, by the formula of its ``pissa_init``; with many iterations it is exact."""
    W = torch.randn(30, 4) @ torch.randn(4, 40) + 0.01 * torch.randn(30, 40)
    torch.manual_seed(1)
    A, B = pissa_start(W, 4, 1.5, niter=3)
    torch.manual_seed(1)
    V, S, U = torch.svd_lowrank(W, 4, niter=3)
    S /= 1.5
    assert relative_error(A, torch.diag(torch.sqrt(S)) @ U.T) <= 1e-6
    assert relative_error(B, V @ torch.diag(torch.sqrt(S))) <= 1e-6
    exact_A, exact_B = pissa_start(W, 4, 1.5)
    assert relative_error(B @ A, exact_B @ exact_A) <= 1e-3
    model = tiny_model("llama")
    inject(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa_niter_200"))
    layer = model.model.layers[0].self_attn.q_proj
    by_svd = torch.from_numpy(part_of("pissa", layer.weight.detach().numpy(), 4, layer.scaling))
    assert relative_error(layer.scaling * layer.lora_B @ layer.lora_A, by_svd) <= 1e-6


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_bitsandbytes_layers_start_from_the_numbers_that_they_stand_for(start):
    """PEFT refuses PiSSA there, and for OLoRA rounds what is left to four bits again."""
    model, _ = their_four_bits()
    batch = batch_for("llama", model)
    expected = model(**batch).logits
    inject(model, LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS["llama"], init_lora_weights=start))
    assert relative_error(model(**batch).logits, expected) <= 1e-5
    assert {type(layer) for layer in adapter_layers(model).values()} == {ShiftedQLoRA}
    losses = losses_of_twenty_steps(model, lambda each: each(**batch).loss)
    assert losses[-1] < losses[0]


# Files


def converted(theirs, folder):
    """PEFT's own way to a plain LoRA: the start was saved before, and is subtracted."""
    theirs.save_pretrained(folder / "after", path_initial_model_for_weight_conversion=str(folder / "start"))
    return folder / "after"


@pytest.mark.parametrize(
    ("start", "shape", "options"),
    [
        *((start, shape, {}) for start, shape in PAIRS),
        ("pissa", "llama", {"use_rslora": True}),
        ("pissa", "llama", PATTERNS),
        ("olora", "llama", PATTERNS),
    ],
    ids=str,
)
def test_a_file_is_what_peft_converts_to(start, shape, options, tmp_path):
    """The same fields and tensors; each side reads the other's, and gives the same logits."""
    ours = tiny_model(shape, torch.float32)
    theirs = their_adapter(copy.deepcopy(ours), shape, start, r=4, lora_alpha=6, **options)
    theirs.peft_config["default"].init_lora_weights = True  # as its documentation asks for
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = start
    inject(ours, LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS[shape], init_lora_weights=start, **options))
    take_values(ours, moved(theirs))
    batch = batch_for(shape, ours)
    expected = theirs.eval()(**batch).logits
    their_folder = converted(theirs, tmp_path)
    save_adapter(ours, tmp_path / "ours")
    fields, reference = (
        json.loads((folder / "adapter_config.json").read_text()) for folder in (tmp_path / "ours", their_folder)
    )
    for name in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights"):
        assert fields[name] == reference[name], name
    tensors = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    their_tensors = load_file(their_folder / "adapter_model.safetensors")
    assert tensors.keys() == their_tensors.keys()
    for key, tensor in tensors.items():
        assert tensor.shape == their_tensors[key].shape
    read = peft.PeftModel.from_pretrained(tiny_model(shape, torch.float32), tmp_path / "ours").eval()
    assert relative_error(read(**batch).logits, expected) <= 1e-5
    again = tiny_model(shape, torch.float32)
    load_adapter(again, their_folder)
    assert all(isinstance(layer, LoRALinear) for layer in adapter_layers(again).values())
    assert relative_error(again.eval()(**batch).logits, expected) <= 1e-5


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_rslora_with_patterns_which_peft_does_not_convert(start, tmp_path):
    model = tiny_model("llama", torch.float32)
    inject(
        model,
        LoraConfig(
            r=4, lora_alpha=6, target_modules=TARGETS["llama"], init_lora_weights=start, use_rslora=True, **PATTERNS
        ),
    )
    moved(model)
    save_adapter(model, tmp_path)
    read = peft.PeftModel.from_pretrained(tiny_model("llama", torch.float32), tmp_path).eval()
    batch = batch_for("llama", model)
    assert relative_error(read(**batch).logits, model.eval()(**batch).logits) <= 1e-5
