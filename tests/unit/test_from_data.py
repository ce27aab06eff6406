"""Starts from data: what they read, what they refuse, and that they leave the model as they found it."""

import warnings

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from lora_edu import EvaConfig, GoraConfig, LoraConfig, LoraGAConfig, disable_adapter, inject, merge, quantize_base
from lora_edu.core.adapter import adapter_layers
from lora_edu.core.state import adapter_state
from lora_edu.variants import from_data
from lora_edu.variants.eva import principal_directions, share_out
from lora_edu.variants.from_data import Moments, input_moments, weight_gradients

IDS = torch.tensor([[1, 5, 7, 2, 30, 6], [3, 3, 9, 8, 4, 0], [11, 2, 6, 6, 20, 17]])
BATCHES = [{"input_ids": IDS, "labels": IDS}, {"input_ids": IDS.flip(1), "labels": IDS.flip(1)}]
TARGETS = ["q_proj", "k_proj", "down_proj"]
CONFIGS = {
    "EVA": lambda **more: LoraConfig(**{"r": 4, "init_lora_weights": "eva", "target_modules": TARGETS, **more}),
    "LoRA-GA": lambda **more: LoraConfig(**{"r": 4, "init_lora_weights": "lora_ga", "target_modules": TARGETS, **more}),
    "GoRA": lambda **more: GoraConfig(**{"r": 4, "target_modules": TARGETS, **more}),
}
every_start = pytest.mark.parametrize("name", CONFIGS)
by_gradient = pytest.mark.parametrize("name", ["LoRA-GA", "GoRA"])


def model_of(dtype=torch.float64):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        attention_dropout=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


def state_of(model):
    """Everything that looking at a model could change."""
    values = [(name, p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
    return values, grads, modes, hooks


def same(before, after):
    for (name, value, trains), (other, value_after, trains_after) in zip(before[0], after[0], strict=True):
        assert (name, trains) == (other, trains_after)
        assert torch.equal(value, value_after)
    for grad, grad_after in zip(before[1], after[1], strict=True):
        assert (grad is None) == (grad_after is None)
        assert grad is None or torch.equal(grad, grad_after)
    assert before[2:] == after[2:]


def unusual(model):
    """The model in a state that nobody would guess: some gradients, some frozen, some modules in training mode."""
    model(**BATCHES[0]).loss.backward()
    model.model.layers[0].requires_grad_(False)
    model.model.layers[1].eval()
    model.train(False)
    model.model.layers[0].mlp.train()
    return model


def looked_at(model, kind, batches=BATCHES):
    names = [n for n, _ in model.named_modules() if n.endswith(("q_proj", "k_proj", "down_proj"))]
    targets = {name: model.get_submodule(name) for name in names}
    if kind == "inputs":
        return {names[0]: moments.scatter for names, moments in input_moments(model, targets, batches, -100)}
    return dict(weight_gradients(model, targets, batches))


# What is read


@pytest.mark.parametrize("kind", ["inputs", "gradients"])
def test_looking_leaves_the_model_as_it_was(kind):
    model = unusual(model_of())
    before = state_of(model)
    looked_at(model, kind)
    same(before, state_of(model))


@pytest.mark.parametrize("kind", ["inputs", "gradients"])
def test_little_room_needs_several_passes_and_finds_the_same(kind, monkeypatch):
    model, calls = model_of(), []
    expected = looked_at(model, kind)
    model.register_forward_hook(lambda *_: calls.append(1))
    looked_at(model, kind)
    alone = len(calls)
    monkeypatch.setattr(from_data, "ROOM", 1)  # one layer at a time
    found = looked_at(model, kind)
    assert len(calls) - alone == alone + 2 * (len(expected) - 1)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_gradients_are_the_mean_over_the_batches_without_dropout():
    model = model_of().train()
    found = looked_at(model, "gradients", iter(BATCHES))  # a generator can be read once only
    model.eval()
    for batch in BATCHES:
        (model(**batch).loss / 2).backward()
    assert len(found) == 6
    for name, gradient in found.items():
        assert torch.allclose(gradient, model.get_submodule(name).weight.grad, rtol=1e-6, atol=1e-12)


def test_inputs_count_without_padding_and_ignored_labels():
    model, mask = model_of(), torch.ones_like(IDS)
    mask[:, 4:] = 0
    labels = IDS.clone()
    labels[:, 0] = -100
    found = looked_at(model, "inputs", [{"input_ids": IDS, "attention_mask": mask, "labels": labels}])
    assert list(found) == [f"model.layers.{i}.{n}" for i in (0, 1) for n in ("self_attn.q_proj", "mlp.down_proj")]
    norm = model.model.layers[0].input_layernorm
    rows = norm(model.model.embed_tokens(IDS[:, 1:4])).flatten(0, 1)
    centred = rows - rows.mean(0)
    assert torch.allclose(found["model.layers.0.self_attn.q_proj"], centred.T @ centred)


def test_labels_that_are_no_positions_hide_none():
    ids = torch.ones(2, 3, dtype=torch.long)
    for labels in (torch.tensor([0, -100]), torch.full((2, 5), -100)):
        batch = {"input_ids": ids, "attention_mask": ids, "labels": labels}
        assert from_data.counted_positions(batch, -100).all()
    assert from_data.counted_positions({"input_ids": ids}, -100) is None


# What is refused


class Answers(nn.Module):
    """A model whose loss and layers do as a test wants."""

    def __init__(self):
        super().__init__()
        self.used, self.unused, self.idle = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x, labels=None, scale=1.0):
        self.idle(x)
        loss = None if labels is None else (self.used(x) * scale - labels).square().mean()
        return CausalLMOutput(loss=loss)


X = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
REFUSED = {
    "no batches": ({}, [], ValueError, "batches is empty"),
    "no dictionary": ({}, [X], TypeError, "batch 0 is a Tensor"),
    "no labels": ({}, [{"x": X, "labels": X}, {"x": X}], ValueError, r"batch 1 gave no loss \(it holds x\).*labels"),
    "not finite": ({}, [{"x": X, "labels": X, "scale": float("nan")}], ValueError, "layer 'used' is infinite or NaN"),
    "not in the loss": ({"target_modules": ["idle"]}, [{"x": X, "labels": X}], ValueError, "'idle' got no gradient"),
}


@by_gradient
@pytest.mark.parametrize("case", REFUSED)
def test_batches_that_give_no_gradient_are_refused_and_nothing_has_changed(name, case):
    settings, batches, error, says = REFUSED[case]
    model = Answers()
    model.unused.requires_grad_(False)
    before = state_of(model)
    with pytest.raises(error, match=says):
        inject(model, CONFIGS[name](**{"r": 2, "target_modules": ["used"], **settings}), batches=batches)
    same(before, state_of(model))


@pytest.mark.parametrize(
    ("targets", "batches", "says"),
    [
        (["used"], [], "batches is empty"),
        (["unused"], [{"x": X}], "layer 'unused' was not called in the first batch.*exclude_modules"),
        (["idle"], [{"x": X / 0}], "layer 'idle' reads numbers that are infinite or NaN"),
        (["idle"], [{"x": X[:1]}], "read the same numbers at every position"),
    ],
)
def test_batches_that_show_no_inputs_are_refused_and_nothing_has_changed(targets, batches, says):
    model = Answers()
    before = state_of(model)
    with pytest.raises(ValueError, match=says):
        inject(model, CONFIGS["EVA"](target_modules=targets), batches=batches)
    same(before, state_of(model))


def test_eva_names_the_mask_if_nothing_counts():
    batch = {"input_ids": IDS, "labels": torch.full_like(IDS, -100)}
    with pytest.raises(ValueError, match=r"every label is -100 or padding.*use_label_mask=False"):
        inject(model_of(), CONFIGS["EVA"](), batches=[batch])
    inject(model_of(), CONFIGS["EVA"](eva_config=EvaConfig(use_label_mask=False)), batches=[batch])


@by_gradient
def test_four_bits_have_no_gradient_and_eva_needs_none(name):
    model = model_of(torch.float32)
    quantize_base(model)
    with pytest.raises(ValueError, match="is a NF4Linear, which stores no weight that could have a gradient"):
        inject(model, CONFIGS[name](), batches=BATCHES)
    inject(model, CONFIGS["EVA"](), batches=BATCHES)
    assert sum(layer.r for layer in adapter_layers(model).values()) == 4 * 6
    packed = nn.Linear(4, 4)
    packed.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"'packed' is a Linear, which stores no weight"):
        next(weight_gradients(model, {"packed": packed}, BATCHES))


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: EvaConfig(rho=0.5), ValueError, "rho=0.5: expected at least 1.0"),
        (lambda: EvaConfig(rho=float("nan")), ValueError, "rho=nan"),
        (lambda: EvaConfig(tau=2), ValueError, "tau=2: expected a cosine"),
        (lambda: LoraGAConfig(direction="ABBA"), ValueError, "direction='ABBA': expected one of ArBr"),
        (lambda: LoraGAConfig(scale="large"), ValueError, "scale='large': expected one of stable"),
        (lambda: LoraGAConfig(stable_gamma=0), ValueError, "stable_gamma=0"),
        (lambda: GoraConfig(gamma=0), ValueError, "gamma=0: expected a step length"),
        (lambda: GoraConfig(r=8, r_min=9), ValueError, "r_min=9 and r_max=32: expected r_min ≤ r=8"),
        (lambda: GoraConfig(r_max=2.5), ValueError, "r=2.5: the rank must be a whole number"),
        (lambda: GoraConfig(init_lora_weights="eva"), ValueError, "GoRA is a start of its own"),
    ],
)
def test_settings_that_make_no_sense(make, error, says):
    with pytest.raises(error, match=says):
        make()


def test_settings_of_another_start_are_ignored_with_a_warning():
    with pytest.warns(UserWarning, match="eva_config is ignored with init_lora_weights=True"):
        LoraConfig(eva_config=EvaConfig())
    with pytest.warns(UserWarning, match="lora_ga_config is ignored with init_lora_weights='eva'"):
        LoraConfig(lora_ga_config=LoraGAConfig(), init_lora_weights="eva")


@pytest.mark.parametrize(
    ("name", "settings", "error", "says"),
    [
        ("EVA", {"eva_config": {"rho": 2}}, TypeError, r"eva_config=.*expected EvaConfig\("),
        ("EVA", {"use_dora": True}, ValueError, "use_dora=True|init_lora_weights='eva'"),
        ("EVA", {"target_modules": ["embed_tokens"]}, ValueError, "is a Embedding, which EVA cannot adapt"),
        ("LoRA-GA", {"lora_ga_config": 3}, TypeError, r"lora_ga_config=3: expected LoraGAConfig\("),
        ("LoRA-GA", {"r": 9}, ValueError, r"takes 2r = 18 singular directions.*\(16, 16\).*r ≤ 8"),
        ("LoRA-GA", {"lora_alpha": 0}, ValueError, "lora_alpha=0"),
        ("GoRA", {"lora_alpha": 0}, ValueError, "lora_alpha=0"),
        ("GoRA", {"rank_pattern": {"q_proj": 2}}, ValueError, "GoRA finds the ranks itself"),
    ],
)
def test_what_cannot_start_is_refused_and_nothing_has_changed(name, settings, error, says):
    model = model_of()
    before = state_of(model)
    with pytest.raises(error, match=says):
        inject(model, CONFIGS[name](**settings), batches=BATCHES)
    same(before, state_of(model))


# What comes of it


@every_start
def test_a_second_adapter_starts_as_if_it_were_the_first(name):
    alone, second = model_of(), model_of()
    inject(second, LoraConfig(init_lora_weights=False, target_modules=TARGETS), "other")
    for model in (alone, second):
        torch.manual_seed(1)
        inject(model, CONFIGS[name](), "mine", batches=BATCHES)
    for layer, other in zip(adapter_layers(alone).values(), adapter_layers(second, "mine").values(), strict=True):
        assert layer.r == other.r
        assert torch.allclose(layer.lora_A, other.lora_A)
        assert torch.allclose(layer.lora_B, other.lora_B)


@every_start
def test_it_starts_under_no_grad_too(name):
    model = model_of()
    with torch.no_grad():
        inject(model, CONFIGS[name](), batches=BATCHES)
    assert all(layer.lora_A.requires_grad for layer in adapter_layers(model).values())


@every_start
def test_disabled_and_merged_it_is_exact(name):
    model = model_of().eval()
    expected = model(**BATCHES[0]).logits
    inject(model, CONFIGS[name](), batches=BATCHES)
    mine = model(**BATCHES[0]).logits
    merge(model)
    assert torch.allclose(model(**BATCHES[0]).logits, mine, atol=1e-12)
    with disable_adapter(model):
        assert torch.equal(model(**BATCHES[0]).logits, expected)


def test_eva_gives_the_ranks_to_the_largest_shares_and_drops_layers_without_one():
    shares = {"a": torch.tensor([0.5, 0.3]), "b": torch.tensor([0.5, 0.1]), "c": torch.tensor([0.05, 0.04])}
    assert share_out(shares, 3) == {"a": 2, "b": 1, "c": 0}
    assert share_out(shares, 1) == {"a": 1, "b": 0, "c": 0}

    x = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
    narrow = x * torch.tensor([1, 1, 0, 0, 0, 0])  # varies in two directions, and x in six alike

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.flat, self.narrow = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x, y):
            return self.flat(x) + self.narrow(y)

    model = Two()
    config = LoraConfig(r=1, init_lora_weights="eva", target_modules=["flat", "narrow"], lora_alpha=3)
    report = inject(model, config, batches=[{"x": x, "y": narrow}])
    assert report.replaced == ["narrow"]
    assert adapter_layers(model)["narrow"].r == 2
    kept = adapter_state(model).configs["default"]
    assert (kept.target_modules, kept.rank_pattern, kept.alpha_pattern) == (["narrow"], {"^narrow": 2}, {"^narrow": 6})
    assert config.target_modules == ["flat", "narrow"]


def test_eva_warns_if_the_batches_have_too_few_directions():
    batch = {"input_ids": IDS[:1, :3]}
    with pytest.warns(UserWarning, match="vary in 12 directions, and 24 ranks were asked for"):
        inject(model := model_of(), CONFIGS["EVA"](), batches=[batch])
    assert {layer.r for layer in adapter_layers(model).values()} == {2}  # three centred rows have two directions
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inject(model_of(), CONFIGS["EVA"](), batches=BATCHES)


def test_evas_directions_are_those_of_the_centred_rows():
    x = torch.randn(30, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 7
    centred = x - x.mean(0)
    S, Vh = torch.linalg.svd(centred, full_matrices=False)[1:]
    directions, sigma, shares = principal_directions(Moments(30, x.mean(0), centred.T @ centred), 3)
    assert torch.allclose(directions.abs(), Vh[:3].abs())
    assert torch.allclose(sigma, S[:3])
    assert torch.allclose(shares, S[:3] ** 2 / (S**2).sum())
    assert (directions.gather(1, directions.abs().argmax(1, keepdim=True)) > 0).all()


@pytest.mark.parametrize("name", ["EVA", "GoRA"])
def test_a_found_rank_is_of_one_layer_even_where_names_end_alike(name):
    """``layer`` ends as ``inner.layer`` does: a pattern for the one must not fit the other."""

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.inner = nn.Linear(6, 6), Inner()

        def forward(self, x, y, labels):
            z = self.layer(x) + 50 * self.inner.layer(y)
            return CausalLMOutput(loss=(z - labels).square().mean())

    torch.manual_seed(0)
    model, x = Outer(), torch.randn(60, 6)
    y = x * torch.tensor([1, 1, 1, 0, 0, 0])
    inject(model, CONFIGS[name](r=2, target_modules=["layer"]), batches=[{"x": x, "y": y, "labels": x}])
    config = adapter_state(model).configs["default"]
    ranks = {each: layer.r for each, layer in adapter_layers(model).items()}
    assert ranks["layer"] != ranks["inner.layer"]
    assert {each: config.rank_of(each) for each in ranks} == ranks
