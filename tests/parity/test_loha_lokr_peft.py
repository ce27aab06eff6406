"""LoHa and LoKr equal PEFT's on linear layers, and their formulas on GPT-2's and embeddings, where PEFT has neither."""

import copy
import json
import warnings

import peft
import pytest
import torch
import torch.nn.functional as F
from peft.tuners.lokr.layer import factorization as their_factorization
from safetensors.torch import load_file
from shapes import TARGETS, batch_for, losses_of_twenty_steps, moved, relative_error, tiny_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_edu import (
    LoHaConfig,
    LoKrConfig,
    count_parameters,
    disable_adapter,
    hotswap_adapter,
    inject,
    load_adapter,
    merge,
    merge_and_unload,
    quantize_base,
    save_adapter,
)
from lora_edu.core.adapter import adapter_layers
from lora_edu.variants.loha import LoHaLayer
from lora_edu.variants.lokr import LoKrLayer, factorization

pytestmark = pytest.mark.parity
CONFIGS = {"loha": (LoHaConfig, peft.LoHaConfig), "lokr": (LoKrConfig, peft.LoKrConfig)}
DROPOUT = {"rank_dropout": 0.3, "module_dropout": 0.4}
# PEFT keeps the scale of LoHa in float32, so that it is a whole number here.
# Layers have 24 or 40 inputs and outputs: r² is below and above; w1 and w2 are whole or products, in all four ways.
SETTINGS = [
    ("loha", {"r": 3, "alpha": 6}),
    ("loha", {"r": 7, "alpha": 7, **DROPOUT}),
    ("loha", {"r": 4, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.1.*down_proj": 20}}),
    ("lokr", {"r": 8, "alpha": 16}),
    ("lokr", {"r": 2, "alpha": 5, **DROPOUT}),
    ("lokr", {"r": 1, "decompose_both": True, **DROPOUT}),
    ("lokr", {"r": 3, "decompose_factor": 8, "decompose_both": True}),
    ("lokr", {"r": 3, "decompose_factor": 1}),
]
PLAIN = [each for each in SETTINGS if "rank_pattern" not in each[1]]
every_setting = pytest.mark.parametrize(("method", "settings"), SETTINGS, ids=str)


def pairs(ours, theirs):
    """{name: (our parameter, PEFT's)}; both have the same ones."""
    modules, found = dict(theirs.base_model.model.named_modules()), {}
    for name, layer in adapter_layers(ours).items():
        their = {key: getattr(modules[name], key) for key in modules[name].adapter_layer_names}
        their = {key: each["default"] for key, each in their.items() if "default" in each}
        assert list(their) == list(layer.to_file()), name
        found |= {f"{name}.{key}": (each, their[key]) for key, each in layer.to_file().items()}
    return found


def twins(method, base=None, targets=TARGETS["llama"], **settings):
    """(ours, PEFT's) around one base, by default a Llama in float64, with the same numbers, away from their start."""
    ours = base or tiny_model("llama")
    theirs = copy.deepcopy(ours)
    config, their_config = CONFIGS[method]
    inject(ours, config(target_modules=targets, **settings))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(theirs, their_config(target_modules=targets, **settings)).train()
    moved(ours.train())
    with torch.no_grad():
        for our, their in pairs(ours, theirs).values():
            their.copy_(our)
    return ours, theirs


def assert_same_step(ours, theirs, batches, tolerance, loss_of):
    """Outputs and every gradient, that of x included, agree; ``batches`` are the same for both, each with an x."""
    results = []
    for model, (batch, x) in zip((ours, theirs), batches, strict=True):
        torch.manual_seed(5)  # fixes what is dropped
        output, loss = loss_of(model, batch)
        loss.backward()
        results.append((output, x.grad))
    for our, their in zip(*results, strict=True):
        assert relative_error(our, their) <= tolerance
    for name, (our, their) in pairs(ours, theirs).items():
        assert (our.grad is None) == (their.grad is None), name  # a layer that is left out has none
        assert our.grad is None or relative_error(our.grad, their.grad) <= tolerance, name


@every_setting
def test_forward_and_gradients(method, settings):
    ours, theirs = twins(method, **settings)
    batches = [(batch := batch_for("llama", model), batch["inputs_embeds"]) for model in (ours, theirs)]

    def loss_of(model, batch):
        result = model(**batch)
        return result.logits, result.loss

    assert_same_step(ours, theirs, batches, 1e-9, loss_of)


@pytest.mark.parametrize(("method", "settings"), [*PLAIN, ("lokr", {**DROPOUT, "rank_dropout_scale": True})])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str)
def test_one_layer_in_lower_precision(method, settings, dtype, tolerance):
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(24, 40)).to(dtype), torch.randn(2, 5, 24, dtype=dtype)
    ours, theirs = twins(method, base=base, targets=["0"], **settings)
    batches = [(each, each) for each in (x.clone().requires_grad_(True), x.clone().requires_grad_(True))]
    g = torch.randn(2, 5, 40, dtype=dtype)
    assert_same_step(ours, theirs, batches, tolerance, lambda model, x: (y := model(x), (y * g).sum()))


@every_setting
def test_twenty_steps_of_training(method, settings):
    ours, theirs = twins(method, **settings)
    batch = batch_for("llama", ours)
    losses = [losses_of_twenty_steps(model, lambda each: each(**batch).loss) for model in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert losses[0][-1] < losses[0][0]
    for name, (our, their) in pairs(ours, theirs).items():
        assert relative_error(our, their) <= 1e-9, name


@every_setting
def test_counts_and_merged_weights(method, settings):
    ours, theirs = twins(method, **settings)
    assert count_parameters(ours) == theirs.get_nb_trainable_parameters()
    plain, reference = merge_and_unload(ours).state_dict(), theirs.merge_and_unload().state_dict()
    assert plain.keys() == reference.keys()
    for key, weight in plain.items():
        assert relative_error(weight, reference[key]) <= 1e-12, key


@every_setting
def test_files_cross_in_both_directions(method, settings, tmp_path):
    ours, theirs = twins(method, tiny_model("llama", torch.float32), **settings)
    batch = batch_for("llama", ours)
    save_adapter(ours, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Unexpected keyword")
        read = peft.PeftModel.from_pretrained(tiny_model("llama", torch.float32), tmp_path / "ours").eval()
    expected = ours.eval()(**batch).logits
    assert relative_error(read(**batch).logits, expected) <= 1e-6
    theirs.save_pretrained(tmp_path / "theirs")
    load_adapter(again := tiny_model("llama", torch.float32), tmp_path / "theirs")
    assert relative_error(again.eval()(**batch).logits, expected) <= 1e-6
    files = [load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("ours", "theirs")]
    assert files[0].keys() == files[1].keys()


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("loha", {}),
        ("loha", {"init_weights": False}),
        *[
            ("lokr", {"init_weights": init, "r": r, "decompose_both": True})
            for init in (True, False, "lycoris")
            for r in (1, 8)
        ],
    ],
    ids=str,
)
def test_starts_as_pefts_with_the_same_seed(method, settings):
    base = nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 24))
    config, their_config = CONFIGS[method]
    torch.manual_seed(4)
    theirs = peft.get_peft_model(copy.deepcopy(base), their_config(target_modules=["0", "1"], **settings))
    torch.manual_seed(4)
    inject(base, config(target_modules=["0", "1"], **settings))
    for name, (our, their) in pairs(base, theirs).items():
        assert torch.equal(our, their), name
    at_base = settings.get("init_weights", True) is not False
    for layer in adapter_layers(base).values():
        assert (layer.delta_weight().abs().max() == 0) == at_base


def test_the_sizes_of_lokrs_matrices_are_pefts():
    for factor in (-1, 1, 2, 3, 4, 5, 8, 16, 24, 60):
        for dimension in range(1, 300):
            assert factorization(dimension, factor) == their_factorization(dimension, factor), (dimension, factor)


# The formulas, written here once more: on layers that PEFT cannot adapt so, and on those that it can


def loha_by_hand(layer):
    w1_a, w1_b, w2_a, w2_b = (each.detach() for each in layer.adapter_parameters())
    return layer.alpha / layer.r * torch.einsum("oj,ji,ok,ki->oi", w1_a, w1_b, w2_a, w2_b)


def lokr_by_hand(layer):
    """Block (i, j) of ΔW is w1[i, j] · w2."""
    tensors = {key: each.detach() for key, each in layer.to_file().items()}
    w1 = tensors.get("lokr_w1")
    w2 = tensors.get("lokr_w2")
    w1 = tensors["lokr_w1_a"] @ tensors["lokr_w1_b"] if w1 is None else w1
    w2 = tensors["lokr_w2_a"] @ tensors["lokr_w2_b"] if w2 is None else w2
    rows = [torch.cat([number * w2 for number in row], dim=1) for row in w1]
    return layer.alpha / layer.r * torch.cat(rows)


def bases():
    """A layer of each kind, with 24 inputs (or rows) and 40 outputs, and something that it reads."""
    torch.manual_seed(0)
    x, ids = torch.randn(2, 5, 24, dtype=torch.float64, requires_grad=True), torch.randint(0, 24, (2, 5))
    return {"linear": (nn.Linear(24, 40), x), "conv1d": (Conv1D(40, 24), x), "embedding": (nn.Embedding(24, 40), ids)}


@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding"])
@pytest.mark.parametrize(("method", "settings"), PLAIN, ids=str)
def test_the_formula_in_float64(method, settings, kind):
    base, x = bases()[kind]
    base.double()
    layer = (LoHaLayer if method == "loha" else LoKrLayer)(base, init_weights=False, **settings).eval()
    delta = (loha_by_hand if method == "loha" else lokr_by_hand)(layer)
    g = torch.randn(2, 5, 40, dtype=torch.float64)
    assert relative_error(layer.delta_weight(), delta) <= 1e-12
    dense = delta.T if kind != "linear" else delta
    plain = F.embedding(x, base.weight) if kind == "embedding" else base(x)
    added = F.embedding(x, dense) if kind == "embedding" else x @ delta.T
    y = layer(x)
    assert relative_error(y, plain + added) <= 1e-12
    # By the chain rule the gradient of each parameter is that of <gᵀx, ΔW>, which autograd takes of ΔW alone.
    one_hot = F.one_hot(x, 24).double() if kind == "embedding" else x.detach()
    G = torch.einsum("bto,bti->oi", g, one_hot)
    parameters = layer.adapter_parameters()
    found = torch.autograd.grad(y, parameters, g, retain_graph=True)
    for gradient, reference in zip(found, torch.autograd.grad(layer.delta_weight(), parameters, G), strict=True):
        assert relative_error(gradient, reference) <= 1e-12
    if kind != "embedding":
        (x_grad,) = torch.autograd.grad(y, x, g)
        assert relative_error(x_grad, g @ (layer.oriented(base.weight) + delta)) <= 1e-12
    layer.merge()
    assert relative_error(layer(x), y) <= 1e-12
    assert relative_error(base.weight, layer.merge_state.pair_like(base)[0] + dense) <= 1e-12


@pytest.mark.parametrize("method", CONFIGS)
def test_adapts_the_embeddings_and_the_linear_layers_of_gpt2(method, tmp_path):
    model = tiny_model("gpt2")
    ids = {"input_ids": torch.tensor([[5, 9, 8, 60], [7, 3, 5, 2]])}
    before = model(**ids).logits
    inject(model, CONFIGS[method][0](r=3, target_modules=["c_attn", "c_fc", "wte"]))
    moved(model)
    expected = model(**ids).logits
    assert relative_error(expected, before) > 1e-3
    with disable_adapter(model):
        assert torch.equal(model(**ids).logits, before)
    save_adapter(model, tmp_path)
    load_adapter(again := tiny_model("gpt2"), tmp_path)
    assert relative_error(again(**ids).logits, expected) <= 1e-12
    merge(model.eval())
    assert relative_error(model(**ids).logits, expected) <= 1e-12


class Scaled(nn.Embedding):
    """As Gemma's: what is looked up is multiplied."""

    embed_scale = 3.0

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale


@pytest.mark.parametrize(("layer_class", "r"), [(LoHaLayer, 2), (LoHaLayer, 5), (LoKrLayer, 2)])
def test_an_embedding_that_scales_what_it_looks_up(layer_class, r):
    layer, ids = layer_class(Scaled(24, 10).double(), r=r, init_weights=False), torch.tensor([[3, 23], [0, 3]])
    expected = layer.eval()(ids)
    layer.merge()
    assert relative_error(layer(ids), expected) <= 1e-12


# What the ranks are, which the card promises


def test_ranks_multiply():
    torch.manual_seed(0)
    loha = LoHaLayer(nn.Linear(64, 64).double(), r=4, init_weights=False)
    assert torch.linalg.matrix_rank(loha.delta_weight()) == 16
    assert sum(each.numel() for each in loha.adapter_parameters()) == 8 * (64 + 64)  # as LoRA of rank 8
    lokr = LoKrLayer(nn.Linear(64, 64).double(), r=8, init_weights=False)
    assert torch.linalg.matrix_rank(lokr.delta_weight()) == 64
    assert sum(each.numel() for each in lokr.adapter_parameters()) == 2 * 64
    lokr = LoKrLayer(nn.Linear(1024, 1024), r=8)
    assert sum(each.numel() for each in lokr.adapter_parameters()) == 1024 + 16 * 32


# Dropout


def test_if_every_output_is_dropped_nothing_is_added():
    """PEFT's LoHa divides by zero."""
    layer = LoHaLayer(nn.Linear(6, 4), r=2, rank_dropout=1.0, init_weights=False).train()
    x = torch.randn(3, 6)
    assert torch.equal(layer(x), layer.base(x))
    assert not torch.equal(layer.eval()(x), layer.base(x))


def test_dropout_is_for_training_alone():
    layer = LoKrLayer(nn.Linear(6, 4), r=2, rank_dropout=0.5, module_dropout=1.0, init_weights=False)
    x = torch.randn(3, 6)
    assert torch.equal(layer.train()(x), layer.base(x))
    assert relative_error(layer.eval()(x), F.linear(x, layer.effective_weight(), layer.bias)) <= 1e-6


# Swapped in place, on four bits, refused


@pytest.mark.parametrize("method", CONFIGS)
def test_a_file_with_another_scale_is_swapped_in_place(method, tmp_path):
    """Where all of LoKr's matrices are whole, r shows in the scale alone, and the shapes are the same."""
    targets = {"target_modules": TARGETS["llama"]}
    config, x = CONFIGS[method][0], {"input_ids": torch.tensor([[5, 9, 8]])}
    other = config(r=8, alpha=16, alpha_pattern={"v_proj": 4}, rank_dropout=0.1, **targets)
    inject(second := tiny_model("llama"), other)
    save_adapter(moved(second), tmp_path)
    inject(model := tiny_model("llama"), config(r=16 if method == "lokr" else 8, alpha=5, **targets))
    hotswap_adapter(model, tmp_path)
    assert torch.equal(model.eval()(**x).logits, second.eval()(**x).logits)
    assert {layer.rank_dropout for layer in adapter_layers(model).values()} == {0.1}


@pytest.mark.parametrize("method", CONFIGS)
def test_around_layers_in_four_bits(method):
    model = tiny_model("llama")
    quantize_base(model)
    x = {"input_ids": torch.tensor([[5, 9, 8]])}
    before = model(**x).logits
    inject(model, CONFIGS[method][0](r=3, target_modules=TARGETS["llama"]))
    assert torch.equal(model(**x).logits, before)
    assert relative_error(moved(model)(**x).logits, before) > 1e-3
    with pytest.raises(ValueError, match=r"NF4Linear in it stores no weight .* dequantize_base"):
        merge(model)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LoHaConfig(r=0), "r=0.*at least 1"),
        (lambda: LoHaConfig(alpha=float("nan")), "^alpha=nan.*finite"),
        (lambda: LoHaConfig(rank_dropout=2), "rank_dropout=2.*probability"),
        (lambda: LoKrConfig(module_dropout=-0.1), "module_dropout=-0.1.*probability"),
        (lambda: LoKrConfig(rank_pattern={"q_proj": 1.5}), "r=1.5.*whole number"),
        (lambda: LoKrConfig(decompose_factor=0), "decompose_factor=0.*-1"),
        (lambda: LoKrConfig(init_weights="zeros"), "init_weights='zeros'.*'lycoris'"),
        (lambda: LoHaConfig(bias="all"), "bias='all': LoHaConfig has no such setting"),
        (lambda: LoKrLayer(nn.Linear(4, 4), init_weights="zeros"), "init_weights='zeros'"),
    ],
)
def test_settings_without_a_meaning_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("layer_class", [LoHaLayer, LoKrLayer])
def test_other_kinds_of_layer_are_refused(layer_class):
    with pytest.raises(TypeError, match=r"adapts nn\.Linear, Conv1D and nn\.Embedding, not a Conv2d"):
        layer_class(nn.Conv2d(3, 4, 2))


def test_a_pattern_that_fits_nothing_is_warned_about():
    with pytest.warns(UserWarning, match="rank_pattern: 'qproj' fits none"):
        inject(tiny_model("llama"), LoHaConfig(target_modules=["q_proj"], rank_pattern={"qproj": 4}))


@pytest.mark.parametrize("method", CONFIGS)
def test_the_fields_of_a_file_are_pefts(method, tmp_path):
    inject(model := tiny_model("llama"), CONFIGS[method][0](target_modules=["q_proj"]))
    save_adapter(model, tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    theirs = CONFIGS[method][1](target_modules=["q_proj"]).to_dict()
    assert fields.keys() <= theirs.keys()
    same = fields.keys() - {"peft_type", "target_modules", "inference_mode"}
    assert {name: fields[name] for name in same} == {name: theirs[name] for name in same}
