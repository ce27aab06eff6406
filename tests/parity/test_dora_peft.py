"""DoRA equals PEFT, plainly and fast: output, gradients, training, merged weights, counts, files both ways."""

import copy
import warnings

import peft
import pytest
import torch
import torch.nn.functional as F
from shapes import (
    TARGETS,
    assert_same_step,
    batch_for,
    losses_of_twenty_steps,
    moved,
    pair,
    relative_error,
    take_values,
    their_parameters,
    tiny_model,
)
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_edu import (
    LoraConfig,
    LoRALinear,
    count_parameters,
    dequantize_base,
    disable_adapter,
    inject,
    load_adapter,
    merge,
    merge_and_unload,
    quantize_base,
    save_adapter,
    set_adapter,
    unmerge,
)
from lora_edu.core.adapter import adapter_layers
from lora_edu.variants.dora import (
    DoRAConv1D,
    DoRAEmbedding,
    DoRALinear,
    FastDoRALinear,
    QDoRALinear,
    low_rank_row_norms,
)

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
]
SHAPES = ["llama", "gpt2", "bert"]
EMBEDDING = {"llama": "embed_tokens", "gpt2": "wte", "bert": "word_embeddings"}
PLAIN = {"r": 4, "lora_alpha": 6, "use_dora": True}
OPTIONS = [
    PLAIN,
    PLAIN | {"use_rslora": True, "bias": "lora_only"},
    PLAIN | {"lora_dropout": 0.4, "bias": "lora_only"},
    PLAIN | {"rank_pattern": {"q_proj|c_attn|query": 2}, "alpha_pattern": {"v_proj|c_fc|value": 9}},
]
every_shape = pytest.mark.parametrize("shape", SHAPES)
every_option = pytest.mark.parametrize("options", OPTIONS, ids=["plain", "rslora", "dropout", "patterns"])
both_forms = pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])


def twins(shape, dtype=torch.float64, **options):
    """(ours, PEFT's) with the same A, B and m, all of them away from their start."""
    ours, theirs = pair(shape, dtype, **options)
    moved(theirs)
    take_values(ours, theirs)
    return ours, theirs


@every_shape
@every_option
@both_forms
def test_forward_and_gradients(shape, options, fast):
    ours, theirs = twins(shape, fast=fast, **options)
    assert_same_step(ours, theirs, batch_for(shape, ours))


@every_shape
@both_forms
def test_forward_and_gradients_in_float32(shape, fast):
    ours, theirs = twins(shape, torch.float32, fast=fast, **PLAIN)
    assert_same_step(ours, theirs, batch_for(shape, ours), 1e-5)  # layers' rounding adds up, and q's gradients cancel


@both_forms
def test_one_layer_in_float32(fast):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(300, 200))
    config = {"target_modules": ["0"], **PLAIN}
    theirs = moved(peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(init_lora_weights=False, **config)))
    inject(base, LoraConfig(**config), fast=fast)
    take_values(base.train(), theirs.train())
    x, g = torch.randn(500, 300), torch.randn(500, 200)
    results = [model(x) for model in (base, theirs)]
    assert relative_error(*results) <= 1e-6
    for result in results:
        result.backward(g)
    for key, (our, their) in their_parameters(base, theirs).items():
        assert relative_error(our.grad, their.grad) <= 1e-6, key


@every_shape
@every_option
@both_forms
def test_twenty_steps_of_training(shape, options, fast):
    ours, theirs = pair(shape, fast=fast, **options)
    batch = batch_for(shape, ours)
    losses = [losses_of_twenty_steps(model, lambda each: each(**batch).loss) for model in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert losses[0][-1] < losses[0][0]
    for key, (our, their) in their_parameters(ours, theirs).items():
        assert relative_error(our, their) <= 1e-9, key


@every_shape
@both_forms
def test_embeddings(shape, fast):
    """One length for each of the table's columns, as in PEFT, and no dropout."""
    targets = [*TARGETS[shape], EMBEDDING[shape]]
    ours, theirs = twins(shape, targets=targets, fast=fast, **PLAIN)
    ids = torch.randint(0, 61, (2, 5), generator=torch.Generator().manual_seed(0))
    embedding = next(layer for layer in adapter_layers(ours).values() if isinstance(layer, DoRAEmbedding))
    assert embedding.lora_magnitude_vector.shape == (24,)
    results = [model(input_ids=ids).logits for model in (ours, theirs)]
    assert relative_error(*results) <= 1e-9
    for result in results:
        result.square().sum().backward()
    for key, (our, their) in their_parameters(ours, theirs).items():
        assert relative_error(our.grad, their.grad) <= 1e-9, key
    merge(ours)
    reference = theirs.merge_and_unload()
    for name, layer in adapter_layers(ours).items():
        assert relative_error(layer.frozen.weight, reference.get_submodule(name).weight) <= 1e-9, name


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_an_embedding_has_no_dropout(dropout):
    torch.manual_seed(0)
    layer = DoRAEmbedding(nn.Embedding(9, 6).double(), r=2, lora_dropout=dropout, init_lora_weights=False)
    ids = torch.arange(9)
    assert torch.allclose(layer.train()(ids), layer.effective_weight()[ids], atol=1e-12)


@every_shape
@pytest.mark.parametrize("start", [True, "gaussian", False])
def test_the_start_is_pefts(shape, start):
    """Bit for bit the base with B = 0, and the lengths are those of W + ΔW in any case."""
    base = tiny_model(shape)
    batch = batch_for(shape, base)
    expected = base(**batch).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(
            copy.deepcopy(base), peft.LoraConfig(target_modules=TARGETS[shape], init_lora_weights=start, **PLAIN)
        )
    torch.manual_seed(0)
    report = inject(base, LoraConfig(target_modules=TARGETS[shape], init_lora_weights=start, **PLAIN))
    assert (report.trainable, report.total) == theirs.get_nb_trainable_parameters() == count_parameters(base)
    assert torch.equal(base(**batch).logits, expected) == (start is not False)
    for name, layer in adapter_layers(base).items():
        sums = layer.oriented(layer.weight) + layer.delta_weight()
        lengths = theirs.get_submodule(f"base_model.model.{name}").lora_magnitude_vector["default"].weight
        assert layer.lora_magnitude_vector.shape == lengths.shape
        assert relative_error(layer.lora_magnitude_vector, sums.square().sum(1).sqrt()) <= 1e-12
        assert start is False or relative_error(layer.lora_magnitude_vector, lengths) <= 1e-12


@every_shape
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-6)], ids=str)
def test_merged_weights(shape, dtype, tolerance):
    ours, theirs = twins(shape, dtype, **PLAIN)
    batch = batch_for(shape, ours)
    before, expected = {key: t.clone() for key, t in ours.state_dict().items()}, ours(**batch).logits
    merge(ours)
    unmerge(ours)
    assert all(torch.equal(tensor, before[key]) for key, tensor in ours.state_dict().items())
    assert torch.equal(ours(**batch).logits, expected)
    plain, reference = merge_and_unload(ours).state_dict(), theirs.merge_and_unload().state_dict()
    assert plain.keys() == reference.keys()
    for key, weight in plain.items():
        assert relative_error(weight, reference[key]) <= tolerance, key


@both_forms
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_in_bfloat16_no_further_from_float64_than_peft(fast, dropout):
    """One layer, as what follows it in a model would round all again. The lengths are in float32 beside its weight."""
    errors: dict[str, list[float]] = {"ours": [], "PEFT": []}
    for seed in range(8):
        torch.manual_seed(seed)
        base = nn.Sequential(nn.Linear(40, 60).bfloat16())
        x, g = torch.randn(50, 40).bfloat16(), torch.randn(50, 60).bfloat16()
        settings = {"target_modules": ["0"], "lora_dropout": dropout, **PLAIN}
        config = peft.LoraConfig(init_lora_weights=False, **settings)
        theirs = moved(peft.get_peft_model(copy.deepcopy(base), config).train())
        ours, exact = base, copy.deepcopy(base).double()
        inject(ours, LoraConfig(**settings), fast=fast)
        inject(exact, LoraConfig(**settings))
        take_values(ours.train(), theirs), take_values(exact.train(), theirs)
        assert {p.dtype for p in ours.parameters() if p.requires_grad} == {torch.float32}
        found = {}
        for name, model in [("ours", ours), ("PEFT", theirs), ("exact", exact)]:
            torch.manual_seed(seed)  # fixes the mask
            y = model(x.double() if name == "exact" else x)
            y.backward(g.to(y.dtype))
            of = their_parameters(exact if name == "exact" else ours, theirs)
            found[name] = [y, *(each[name == "PEFT"].grad for each in of.values())]
        for name in errors:
            errors[name] += [relative_error(a, b) for a, b in zip(found[name], found["exact"], strict=True)]
        weight = merge_and_unload(exact)[0].weight
        errors["ours"].append(relative_error(merge_and_unload(ours)[0].weight, weight))
        errors["PEFT"].append(relative_error(theirs.merge_and_unload()[0].weight, weight))
    for i in range(5):  # output, the gradients of A, B and m, the merged weight
        ours, peers = sum(errors["ours"][i::5]) / 8, sum(errors["PEFT"][i::5]) / 8
        assert ours <= max(1.01 * peers, 5e-7)  # or what float32 rounds


@every_shape
@both_forms
def test_files_cross_in_both_directions(shape, fast, tmp_path):
    targets = [*TARGETS[shape], EMBEDDING[shape]]
    ours, theirs = twins(shape, torch.float32, targets=targets, fast=fast, **PLAIN)
    batch = {"input_ids": torch.randint(0, 61, (2, 5), generator=torch.Generator().manual_seed(0))}
    save_adapter(moved(ours), tmp_path / "ours")
    read = peft.PeftModel.from_pretrained(tiny_model(shape, torch.float32), tmp_path / "ours").eval()
    assert relative_error(read(**batch).logits, ours.eval()(**batch).logits) <= 1e-5
    theirs.save_pretrained(tmp_path / "theirs")
    again = tiny_model(shape, torch.float32)
    load_adapter(again, tmp_path / "theirs")
    assert relative_error(again.eval()(**batch).logits, theirs.eval()(**batch).logits) <= 1e-5


# The formula, without PEFT


def by_hand(layer, x):
    """Equation 5 of the paper, row by row."""
    weight = layer.weight.T if isinstance(layer.frozen, Conv1D) else layer.weight
    rows = []
    for i, row in enumerate(weight):
        turned = row + layer.scaling * layer.lora_B[i] @ layer.lora_A
        norm = turned.detach().square().sum().sqrt()
        rows.append((x * turned).sum(-1) * layer.lora_magnitude_vector[i] / norm)
    y = torch.stack(rows, -1)
    return y if layer.bias is None else y + layer.bias


def small_layer(kind=nn.Linear, fast=False, bias=True, dtype=torch.float64, **settings):
    """A DoRA layer in a model of one, 5 → 7, with A, B and m away from their start."""
    torch.manual_seed(0)
    base = Conv1D(7, 5) if kind is Conv1D else nn.Linear(5, 7, bias=bias)
    model = nn.Sequential(base.to(dtype)).train()
    inject(model, LoraConfig(target_modules=["0"], **{"r": 2, "lora_alpha": 3, "use_dora": True} | settings), fast=fast)
    return moved(model)[0]


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("bias", [True, False])
@both_forms
def test_value_and_gradients_of_the_formula(kind, bias, fast):
    layer = small_layer(kind, fast, bias)
    assert type(layer).__name__ == f"{'Fast' if fast else ''}DoRA{kind.__name__}"
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, 3, 7, dtype=torch.float64)
    wanted = (x, *layer.adapter_parameters())
    found, expected = (torch.autograd.grad(y, wanted, g) for y in (layer(x), by_hand(layer, x)))
    assert relative_error(layer(x), by_hand(layer, x)) <= 1e-12
    for gradient, reference in zip(found, expected, strict=True):
        assert relative_error(gradient, reference) <= 1e-12
    assert relative_error(layer(x[0, 0]), by_hand(layer, x[0, 0])) <= 1e-12  # one row alone


def test_the_norm_is_a_constant_in_the_backward_pass():
    layer = small_layer()
    (gradient,) = torch.autograd.grad(layer(torch.ones(5, dtype=torch.float64)).sum(), layer.lora_B)
    g = layer.lora_magnitude_vector / (layer.weight + layer.delta_weight()).norm(dim=1)
    assert relative_error(gradient, layer.scaling * g[:, None] * layer.lora_A.sum(1)) <= 1e-12


@both_forms
def test_a_row_of_zeros_stays_one_and_gives_no_nan(fast):
    """PEFT divides 0 by 0 there."""
    base = nn.Linear(5, 7)
    with torch.no_grad():
        base.weight[2] = 0
    model = nn.Sequential(base)
    inject(model, LoraConfig(target_modules=["0"], r=2, use_dora=True), fast=fast)
    x = torch.randn(4, 5)
    assert torch.equal(model(x), base(x)) or torch.allclose(model(x), base(x), atol=1e-6)
    model(x).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    merge(model)
    assert torch.allclose(model(x), F.linear(x, base.weight, base.bias))


# The norms without B A


@pytest.mark.parametrize("size", [1e-3, 1.0, 100.0])
def test_low_rank_norms_in_float32_against_float64(size):
    """As exact as the long way, while the update is small, as large as the weight, or far larger."""
    generator = torch.Generator().manual_seed(0)
    W, A, B = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((60, 300), (8, 300), (60, 8)))
    B *= size
    exact = torch.linalg.vector_norm(W + 0.5 * B @ A, dim=1)
    found = low_rank_row_norms(W.float(), A.float(), B.float(), 0.5)
    assert ((found - exact) / exact).abs().max() < 1e-6
    assert relative_error(low_rank_row_norms(W, A, B, 0.5), exact) < 1e-14


@pytest.mark.parametrize("left", [0.3, 1e-2, 1e-4])
def test_low_rank_norms_where_a_row_nearly_vanishes(left):
    """ΔW takes all but a small part of some rows away: the terms cancel, and the rows are summed the long way."""
    generator = torch.Generator().manual_seed(0)
    W, A = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((4, 50), (4, 50)))
    W[:2] = torch.randn(2, 4, generator=generator, dtype=torch.float64) @ A  # these can be taken away
    B = torch.linalg.lstsq(A.T, -(1 - left) * W.T).solution.T
    B[2:] = 0
    exact = torch.linalg.vector_norm(W + B @ A, dim=1)
    found = low_rank_row_norms(W.float(), A.float(), B.float(), 1.0)
    assert ((found - exact) / exact).abs().max() < (1e-5 if left > 0.01 else 2e-2)


def test_the_fast_layer_goes_the_plain_way_where_it_would_not_be_the_same():
    x = torch.randn(3, 5, dtype=torch.float64)
    dropping = small_layer(fast=True, lora_dropout=0.5)
    results = []
    for kind in (FastDoRALinear, DoRALinear):
        dropping.__class__ = kind
        torch.manual_seed(2)
        results.append(dropping(x))
    assert relative_error(*results) <= 1e-12
    assert not torch.equal(dropping(x), dropping(x))
    hooked = small_layer(fast=True)
    expected = hooked(x)
    hooked.base.register_forward_hook(lambda module, inputs, output: output + 1)
    assert not torch.allclose(hooked(x), expected)
    mixed = small_layer(fast=True, dtype=torch.bfloat16)
    assert mixed(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert small_layer(fast=True, dtype=torch.float32)(x.float()).dtype == torch.bfloat16


@both_forms
def test_a_bias_or_input_that_needs_no_gradient_or_one(fast):
    layer = small_layer(fast=fast)
    layer.bias.requires_grad_(True)
    layer(torch.randn(3, 5, dtype=torch.float64)).sum().backward()
    assert torch.allclose(layer.bias.grad, torch.full((7,), 3.0, dtype=torch.float64))


# Around others


def test_lengths_are_measured_at_the_pretrained_weight_under_other_adapters():
    model = tiny_model("llama")
    inject(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    inject(model, LoraConfig(target_modules=["q_proj"], use_dora=True), "dora")
    layer = adapter_layers(model, "dora")["model.layers.0.self_attn.q_proj"]
    assert relative_error(layer.lora_magnitude_vector, layer.weight.norm(dim=1)) <= 1e-12
    with pytest.raises(ValueError, match="'dora' is a DoRALinear, whose effect depends on the weight it finds"):
        set_adapter(model, ["default", "dora"])
    expected = tiny_model("llama")(**batch_for("llama", model)).logits
    set_adapter(model, "dora")
    assert torch.equal(model(**batch_for("llama", model)).logits, expected)


def test_by_hand_around_an_active_lora_it_turns_what_that_gives():
    torch.manual_seed(0)
    inner = LoRALinear(nn.Linear(5, 7).double(), r=2, init_lora_weights=False)
    layer = DoRALinear(inner, r=2, init_lora_weights=False)
    x = torch.randn(3, 5, dtype=torch.float64)
    assert torch.allclose(F.linear(x, layer.effective_weight(), layer.bias), layer(x), atol=1e-12)


# Around four bits


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[2]], ids=["plain", "dropout"])
def test_around_four_bits_as_peft_around_the_same_numbers(options):
    ours = tiny_model("llama")
    quantize_base(ours)
    theirs = copy.deepcopy(ours)
    dequantize_base(theirs)
    config = peft.LoraConfig(target_modules=TARGETS["llama"], init_lora_weights=False, **options)
    theirs = moved(peft.get_peft_model(theirs, config).train())
    inject(ours, LoraConfig(target_modules=TARGETS["llama"], **options))
    assert {type(layer) for layer in adapter_layers(ours).values()} == {QDoRALinear}
    take_values(ours.train(), theirs)
    batch = batch_for("llama", ours)
    assert_same_step(ours, theirs, batch)
    expected = ours.eval()(**batch).logits
    assert dequantize_base(ours) == 14
    assert {type(layer) for layer in adapter_layers(ours).values()} == {DoRALinear}
    merge(ours)
    assert relative_error(ours(**batch).logits, expected) <= 1e-12


@pytest.mark.parametrize("start", ["pissa", "olora", "loftq", "eva"])
def test_a_start_away_from_the_weight_is_refused_and_leaves_the_model_alone(start):
    model = tiny_model("llama")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"init_lora_weights='{start}' with use_dora=True: .* or use_dora=False"):
        inject(model, LoraConfig(target_modules=["q_proj"], use_dora=True, init_lora_weights=start))
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_pefts_pissa_with_dora_loses_its_lengths_when_converted_and_is_refused(tmp_path):
    theirs = peft.get_peft_model(
        tiny_model("llama", torch.float32),
        peft.LoraConfig(target_modules=["q_proj"], r=2, use_dora=True, init_lora_weights="pissa"),
    )
    theirs.peft_config["default"].init_lora_weights = True  # PEFT asks for this before it saves the start
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    theirs.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=tmp_path / "start")
    with pytest.raises(ValueError, match=r"2 of 6 tensors are missing, .*q_proj\.lora_magnitude_vector"):
        load_adapter(tiny_model("llama", torch.float32), tmp_path / "end")


def test_disabled_is_the_base_exactly_merged_or_not():
    base = tiny_model("gpt2")
    batch = batch_for("gpt2", base)
    expected = base(**batch).logits
    ours, _ = twins("gpt2", **PLAIN)
    assert {type(layer) for layer in adapter_layers(ours).values()} == {DoRAConv1D}
    for prepare in (lambda: None, lambda: merge(ours), lambda: unmerge(ours)):
        prepare()
        adapted = ours(**batch).logits
        with disable_adapter(ours):
            assert torch.equal(ours(**batch).logits, expected)
        assert torch.equal(ours(**batch).logits, adapted)
        assert not torch.allclose(adapted, expected)
