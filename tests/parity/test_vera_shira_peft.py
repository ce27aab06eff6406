"""VeRA and SHiRA equal PEFT's to rounding: random numbers, outputs, gradients, training, merged weights, files."""

import copy
import json
import warnings

import peft
import pytest
import torch
import torch.nn.functional as F
from peft.utils import constants
from safetensors.torch import load_file, save_file
from shapes import TARGETS, batch_for, losses_of_twenty_steps, moved, relative_error, tiny_model
from transformers import LlamaConfig

from lora_edu import (
    ShiraConfig,
    VeraConfig,
    adapter_names,
    count_parameters,
    dequantize_base,
    hotswap_adapter,
    inject,
    load_adapter,
    merge,
    merge_and_unload,
    quantize_base,
    save_adapter,
    set_adapter,
)
from lora_edu.core.adapter import adapter_layers
from lora_edu.core.parts import TrainedBias
from lora_edu.core.state import adapter_state

pytestmark = pytest.mark.parity
KINDS = {"vera": (VeraConfig, peft.VeraConfig), "shira": (ShiraConfig, peft.ShiraConfig)}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-6}  # whole models: a few layers' float32 rounding adds up
CASES = [
    ("vera", "llama", {"r": 5}),
    ("vera", "gpt2", {"r": 64, "projection_prng_key": 7, "vera_dropout": 0.4}),
    ("vera", "bert", {"r": 5, "d_initial": 0.3, "bias": "vera_only"}),
    ("shira", "llama", {"r": 3}),
    ("shira", "bert", {"r": 1, "random_seed": 7}),
]
every_case = pytest.mark.parametrize(("method", "shape", "settings"), CASES)


def quietly(make, *arguments, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(*arguments, **settings)


def theirs_of(method, shape, base, **settings):
    config = quietly(KINDS[method][1], target_modules=TARGETS[shape], **settings)
    return quietly(peft.get_peft_model, base, config).train()


def ours_of(method, shape, base, **settings):
    inject(base, KINDS[method][0](target_modules=TARGETS[shape], **settings))
    return base.train()


def pairs(ours, theirs):
    """{name: (our parameter, PEFT's)} for everything that trains."""
    modules, found = dict(theirs.base_model.model.named_modules()), {}
    for name, layer in adapter_layers(ours).items():
        for key in ("vera_lambda_d", "vera_lambda_b", "shira_weight"):
            if hasattr(layer, key):
                found[f"{name}.{key}"] = getattr(layer, key), getattr(modules[name], key)["default"]
    for part in adapter_state(ours).parts["default"]:
        assert isinstance(part, TrainedBias)
        module = modules[part.names[0]]
        found[f"{part.names[0]}.bias"] = part.trained, getattr(module, "base_layer", module).bias
    return found


def twins(method, shape, dtype=torch.float64, **settings):
    """(ours, PEFT's) with the same trained numbers, away from their start. What is random, each draws for itself."""
    base = tiny_model(shape, dtype)
    ours, theirs = ours_of(method, shape, copy.deepcopy(base), **settings), theirs_of(method, shape, base, **settings)
    moved(ours)
    with torch.no_grad():
        for our, their in pairs(ours, theirs).values():
            their.copy_(our)
    return ours, theirs


def step(model, batch):
    """One forward and backward pass; the seed fixes dropout."""
    torch.manual_seed(5)
    x = batch["inputs_embeds"].detach().clone().requires_grad_(True)
    result = model(**batch | {"inputs_embeds": x})
    result.loss.backward()
    return result.logits, x.grad


@every_case
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_forward_and_gradients(method, shape, settings, dtype):
    ours, theirs = twins(method, shape, dtype, **settings)
    batch = batch_for(shape, ours)
    for value, reference in zip(step(ours, batch), step(theirs, batch), strict=True):
        assert relative_error(value, reference) < TOLERANCE[dtype]
    for name, (our, their) in pairs(ours, theirs).items():
        assert relative_error(our.grad, their.grad) < TOLERANCE[dtype], name


@every_case
def test_starts_at_the_base_with_the_numbers_of_peft(method, shape, settings):
    ours = ours_of(method, shape, tiny_model(shape), **settings)
    theirs = theirs_of(method, shape, tiny_model(shape), **settings)
    for our, their in pairs(ours, theirs).values():
        assert torch.allclose(our, their, rtol=1e-7)  # PEFT starts in float32, whatever the model is in
    batch = batch_for(shape, ours)
    assert torch.equal(ours.eval()(**batch).logits, tiny_model(shape).eval()(**batch).logits)


@every_case
def test_twenty_steps_of_training(method, shape, settings):
    ours, theirs = twins(method, shape, **settings)
    batch = batch_for(shape, ours)
    losses = [losses_of_twenty_steps(model, lambda each: each(**batch).loss) for model in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert losses[0][-1] < losses[0][0]
    for name, (our, their) in pairs(ours, theirs).items():
        assert relative_error(our, their) < 1e-9, name


@every_case
def test_counts(method, shape, settings):
    ours, theirs = twins(method, shape, **settings)
    assert count_parameters(ours) == theirs.get_nb_trainable_parameters()


@every_case
def test_merged_weights(method, shape, settings):
    ours, theirs = twins(method, shape, **settings)
    merge(ours)
    theirs.merge_adapter()
    merged = dict(theirs.base_model.model.named_modules())
    for name, layer in adapter_layers(ours).items():
        assert relative_error(layer.frozen.weight, merged[name].base_layer.weight) < 1e-12, name
    state, expected = merge_and_unload(ours).state_dict(), theirs.merge_and_unload().state_dict()
    assert state.keys() == expected.keys()
    for key in state:
        assert relative_error(state[key], expected[key]) < 1e-12, key


FILES = [*CASES, ("vera", "llama", {"r": 5, "save_projection": False}), (*CASES[1][:2], {"save_projection": False})]


@pytest.mark.parametrize(("method", "shape", "settings"), FILES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_files_both_ways(method, shape, settings, dtype, tmp_path):
    """Without the pair in the file, each draws it from the seed, and PEFT rounds it to the base's precision."""
    ours, theirs = twins(method, shape, dtype, **settings)
    save_adapter(ours.eval(), tmp_path / "ours")
    quietly(theirs.eval().save_pretrained, tmp_path / "theirs")
    mine, other = (load_file(tmp_path / each / "adapter_model.safetensors") for each in ("ours", "theirs"))
    assert {key: (t.shape, t.dtype) for key, t in mine.items()} == {key: (t.shape, t.dtype) for key, t in other.items()}
    for key in mine:
        assert torch.equal(mine[key], other[key]), key
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Unexpected keyword")
        read = peft.PeftModel.from_pretrained(tiny_model(shape, dtype), tmp_path / "ours").eval()
    load_adapter(again := tiny_model(shape, dtype), tmp_path / "theirs")
    batch, bound = batch_for(shape, ours), 1e-6 if dtype is torch.float64 else 2e-2  # PEFT reads in float32
    assert relative_error(ours(**batch).logits, read(**batch).logits) < bound
    assert relative_error(again.eval()(**batch).logits, ours(**batch).logits) < (1e-12 if bound < 1e-3 else 1e-9)
    for our, their in pairs(again, theirs).values():
        assert torch.equal(our, their)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("key", [0, 7])
def test_a_seed_is_the_same_pair_of_matrices_as_in_peft(dtype, key):
    model = ours_of("vera", "llama", tiny_model("llama", dtype), r=5, projection_prng_key=key)
    theirs = theirs_of("vera", "llama", tiny_model("llama", dtype), r=5, projection_prng_key=key).base_model
    pair = adapter_state(model).contexts["default"].shared["vera"]
    assert torch.equal(pair.vera_A, theirs.vera_A["default"])
    assert torch.equal(pair.vera_B, theirs.vera_B["default"])
    assert pair.vera_A.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    assert all(layer.projections is pair for layer in adapter_layers(model).values())


@pytest.mark.parametrize("seed", [None, 0, 7])
def test_a_seed_is_the_same_places_as_in_peft(seed):
    model = ours_of("shira", "llama", tiny_model("llama"), r=2, random_seed=seed)
    theirs = theirs_of("shira", "llama", tiny_model("llama"), r=2, random_seed=seed)
    modules = dict(theirs.base_model.model.named_modules())
    for name, layer in adapter_layers(model).items():
        assert torch.equal(layer.shira_indices, modules[name].shira_indices["default"])
        assert len(layer.shira_weight) == 2 * sum(layer.features())


@pytest.mark.parametrize("method", KINDS)
def test_in_half_precision_the_error_is_of_pefts_size(method):
    settings = {"r": 5 if method == "vera" else 3}
    ours, theirs = twins(method, "llama", torch.bfloat16, **settings)
    batch = batch_for("llama", ours)
    exact = copy.deepcopy(ours).double()
    expected = exact(**{key: value.double() if value.is_floating_point() else value for key, value in batch.items()})
    error, reference = (relative_error(model(**batch).logits, expected.logits) for model in (ours, theirs))
    assert error < 2 * reference
    assert error < 0.02


def test_beside_a_base_in_half_precision_small_entries_are_not_lost():
    """PEFT adds them to the weight in its 16 bits, where one of a thousandth of the weight changes nothing."""
    ours, theirs = twins("shira", "llama", torch.bfloat16, r=2)
    with torch.no_grad():
        for our, their in pairs(ours, theirs).values():
            our.fill_(1e-6)
            their.fill_(1e-6)
    layer = adapter_layers(ours)["model.layers.0.mlp.down_proj"]
    their = theirs.base_model.model.model.layers[0].mlp.down_proj
    x = torch.randn(4, 40, dtype=torch.bfloat16)
    expected = F.linear(x.float(), layer.delta_weight())
    assert torch.allclose(layer.update(x), expected, atol=1e-12)
    assert expected.abs().min() > 0
    assert torch.equal(their(x), their.base_layer(x))


def test_shira_on_gpt2s_layers_is_the_formula():
    """PEFT adapts no ``Conv1D`` by SHiRA; the places are those of the (out, in) weight."""
    base = tiny_model("gpt2")
    model = moved(ours_of("shira", "gpt2", copy.deepcopy(base), r=3))
    for name, layer in adapter_layers(model).items():
        weight = base.get_submodule(name).weight
        with torch.no_grad():
            for value, (row, column) in zip(layer.shira_weight, layer.shira_indices.T.tolist(), strict=True):
                weight[column, row] += value
    batch = batch_for("gpt2", model)
    assert relative_error(model(**batch).logits, base(**batch).logits) < 1e-12


def test_places_of_ones_own(tmp_path):
    """``mask_fn`` as in PEFT; the file has the places, so that it needs no function."""

    def largest(layer, r):
        weight = layer.weight.abs()
        mask = torch.zeros_like(weight)
        mask.view(-1)[weight.flatten().topk(r * sum(weight.shape)).indices] = 1
        return mask

    settings = {"r": 2, "mask_type": "largest"}
    model = ours_of("shira", "llama", tiny_model("llama"), mask_fn=largest, **settings)
    config = quietly(peft.ShiraConfig, target_modules=TARGETS["llama"], **settings)
    config.mask_fn = largest
    theirs = quietly(peft.get_peft_model, tiny_model("llama"), config)
    modules = dict(theirs.base_model.model.named_modules())
    for name, layer in adapter_layers(model).items():
        assert torch.equal(layer.shira_indices, modules[name].shira_indices["default"])
        kept = layer.weight.abs()[layer.shira_indices[0], layer.shira_indices[1]]
        assert kept.min() >= layer.weight.abs().quantile(0.7)
    save_adapter(moved(model).eval(), tmp_path)
    load_adapter(again := tiny_model("llama"), tmp_path)
    batch = batch_for("llama", model)
    assert torch.equal(again.eval()(**batch).logits, model(**batch).logits)
    with pytest.raises(ValueError, match=r"mask_type='largest'.*mask_fn"):
        ours_of("shira", "llama", tiny_model("llama"), **settings)
    for wrong in (lambda layer, r: torch.ones(2, 2), lambda layer, r: largest(layer, r) * 0.5):
        with pytest.raises(ValueError, match=r"mask_fn gave .*expected \(24, 24\) \(out, in\).*= 96 ones"):
            ours_of("shira", "llama", tiny_model("llama"), mask_fn=wrong, **settings)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: VeraConfig(r=0), "r=0"),
        (lambda: VeraConfig(projection_prng_key=None), "projection_prng_key=None.*whole number"),
        (lambda: VeraConfig(vera_dropout=2), "vera_dropout=2.*probability"),
        (lambda: VeraConfig(d_initial=float("inf")), "d_initial=inf.*finite"),
        (lambda: VeraConfig(exclude_modules=["lm_head"]), "VeraConfig has no such setting"),
        (lambda: ShiraConfig(r=1.5), "r=1.5"),
        (lambda: ShiraConfig(random_seed="x"), "random_seed='x'.*whole number"),
        (lambda: ShiraConfig(layers_to_transform=[0]), "ShiraConfig has no such setting"),
    ],
)
def test_settings_without_a_meaning_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_more_places_than_a_weight_has_are_refused_and_leave_the_model_alone():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"r=9: .* 324 places of 'model.layers.0.self_attn.v_proj', .* 288; .* most 8"):
        inject(model, ShiraConfig(r=9, target_modules=["v_proj"]))
    assert "adapter_state" not in model.__dict__
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("place", [-1, 24])
def test_a_file_with_places_outside_the_weight_is_refused_before_anything_is_read(place, tmp_path):
    save_adapter(moved(ours_of("shira", "llama", tiny_model("llama"), r=1)), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    last = [key for key in tensors if key.endswith("v_proj.shira_indices")][-1]
    tensors[last][1, 0] = place
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    model, plain = ours_of("shira", "llama", tiny_model("llama"), r=1), tiny_model("llama")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for read, into in [(hotswap_adapter, model), (load_adapter, plain)]:
        with pytest.raises(ValueError, match=r"v_proj: shira_indices name places outside a weight of 12 × 24"):
            read(into, tmp_path)
    assert "adapter_state" not in plain.__dict__
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_places_are_swapped_with_the_values(tmp_path):
    one = moved(ours_of("shira", "llama", tiny_model("llama"), r=1, random_seed=1)).eval()
    other = moved(ours_of("shira", "llama", tiny_model("llama"), r=1, random_seed=2)).eval()
    save_adapter(other, tmp_path)
    hotswap_adapter(one, tmp_path)
    batch = batch_for("llama", one)
    assert torch.equal(one(**batch).logits, other(**batch).logits)


def test_matrices_that_do_not_belong_to_a_files_r_are_refused(tmp_path):
    save_adapter(ours_of("vera", "llama", tiny_model("llama"), r=5), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 4}))
    with pytest.raises(ValueError, match=r"vera_A has shape \(5, 40\) and vera_B \(24, 5\).*r=4"):
        load_adapter(tiny_model("llama"), tmp_path)
    narrow = {"target_modules": ["q_proj", "v_proj"]}
    inject(model := tiny_model("llama"), VeraConfig(r=5, **narrow))
    save_adapter(model, tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": ["down_proj"]}))
    with pytest.raises(ValueError, match=r"layers of at most 24 → 24, and this one is 40 → 24"):
        load_adapter(tiny_model("llama"), tmp_path)


@pytest.mark.parametrize("method", KINDS)
def test_beside_each_other_and_in_one_batch(method):
    """Each adapter has a pair of its own here, so another seed is no obstacle, as it is in PEFT."""
    settings = [{"r": 2}, {"r": 3, "projection_prng_key": 4} if method == "vera" else {"r": 3, "random_seed": 4}]
    model = tiny_model("llama").eval()
    for name, more in zip(("one", "two"), settings, strict=True):
        inject(model, KINDS[method][0](target_modules=TARGETS["llama"], **more), name)
        set_adapter(model, name)
        moved(model)
    batch = {"input_ids": torch.arange(10).view(2, 5)}
    alone = []
    for name in ("one", "two"):
        set_adapter(model, name)
        alone.append(model(**batch).logits)
    with adapter_names(model, ["two", "one"]):
        mixed = model(**batch).logits
    assert torch.allclose(mixed[0], alone[1][0], atol=1e-12)
    assert torch.allclose(mixed[1], alone[0][1], atol=1e-12)
    set_adapter(model, ["one", "two"])
    expected = model(**batch).logits
    assert torch.allclose(merge_and_unload(model)(**batch).logits, expected, atol=1e-10)


@pytest.mark.parametrize("method", KINDS)
def test_around_a_base_in_four_bits(method):
    """They run and train there; they merge once the base holds plain numbers."""
    model = tiny_model("llama", torch.float32)
    quantize_base(model)
    moved(ours_of(method, "llama", model, r=2))
    batch = batch_for("llama", model)
    losses = losses_of_twenty_steps(model, lambda each: each(**batch).loss)
    assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match=r"(Vera|Shira)Layer.*dequantize_base"):
        merge(model)
    expected = model.eval()(**batch).logits
    dequantize_base(model)
    merge(model)
    assert torch.allclose(model(**batch).logits, expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi"])
def test_default_targets_are_pefts(kind):
    tables = constants.TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING
    model = torch.nn.Module()
    model.config = LlamaConfig()
    model.config.model_type = kind
    modules = {name: torch.nn.Linear(1, 1) for name in ("q_proj", "v_proj", "c_attn", "fc1", "fc2")}
    for config in (VeraConfig(), ShiraConfig()):
        assert config.default_targets(model, modules) == tables[kind]
    assert tables == constants.TRANSFORMERS_MODELS_TO_SHIRA_TARGET_MODULES_MAPPING
