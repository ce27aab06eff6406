"""Plain LoRA equals PEFT to rounding error: output, gradients, training, merged weights, counts."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from shapes import (
    TARGETS,
    assert_same_step,
    batch_for,
    losses_of_twenty_steps,
    pair,
    relative_error,
    their_parameters,
    tiny_model,
)

from lora_edu import LoraConfig, LoRALinear, count_parameters, disable_adapter, inject, merge, merge_and_unload, unmerge
from lora_edu.core.adapter import adapter_layers
from lora_edu.core.state import adapter_state

pytestmark = pytest.mark.parity

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-6, torch.bfloat16: 1e-2}
SHAPES = ["llama", "gpt2", "bert"]
OPTIONS = [
    {"r": r, "lora_alpha": alpha, "use_rslora": rslora, "lora_dropout": dropout, "bias": bias}
    for (r, alpha), rslora, dropout, bias in itertools.product(
        [(1, 3), (4, 6)], [False, True], [0.0, 0.4], ["none", "all", "lora_only"]
    )
]
# The fused layers: with dropout their random numbers are others than PEFT's. BERT's key bias has no gradient (softmax
# does not see it), only rounding, which differs too: so no bias="all".
FAST = [options | {"fast": True} for options in OPTIONS if not options["lora_dropout"] and options["bias"] != "all"]


def named(options):
    """A test's name."""
    return "-".join(map(str, options.values()))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=named)
def test_forward_and_gradients(shape, dtype, options):
    ours, theirs = pair(shape, dtype, **options)
    tolerance = TOLERANCE[dtype]
    if dtype is torch.float32:
        tolerance *= 5  # whole-model gradients in float32: a few layers' rounding adds up
    if dtype is torch.bfloat16:
        tolerance *= 2
    assert_same_step(ours, theirs, batch_for(shape, ours), tolerance)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", FAST, ids=named)
def test_the_fused_layers_compute_what_peft_computes(shape, options):
    """In float64, where a wrong term cannot hide behind rounding; test_fast.py has the other precisions."""
    ours, theirs = pair(shape, **options)
    assert_same_step(ours, theirs, batch_for(shape, ours), TOLERANCE[torch.float64])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", OPTIONS + FAST[:2], ids=named)
def test_twenty_steps_of_training(shape, options):
    ours, theirs = pair(shape, **options)
    batch = batch_for(shape, ours)
    losses = [losses_of_twenty_steps(model, lambda each: each(**batch).loss) for model in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert losses[0][-1] < losses[0][0]
    for key, (our, their) in their_parameters(ours, theirs).items():
        assert relative_error(our, their) <= 1e-9, key


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("options", OPTIONS[::3] + FAST[:1], ids=named)
def test_merged_weights(shape, dtype, options):
    ours, theirs = pair(shape, dtype, **options)
    merge(ours)
    theirs.merge_adapter()
    merged = dict(theirs.base_model.model.named_modules())
    for name, layer in adapter_layers(ours).items():
        assert relative_error(layer.frozen.weight, merged[name].base_layer.weight) <= TOLERANCE[dtype], name
    plain, reference = merge_and_unload(ours), theirs.merge_and_unload()
    assert not any(type(module).__module__.startswith("lora_edu") for module in plain.modules())
    state, expected = plain.state_dict(), reference.state_dict()
    assert state.keys() == expected.keys()
    for key in state:
        assert relative_error(state[key], expected[key]) <= TOLERANCE[dtype], key


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", OPTIONS[::2], ids=named)
def test_trainable_and_total_counts(shape, options):
    ours, theirs = pair(shape, **options)
    assert count_parameters(ours) == theirs.get_nb_trainable_parameters()


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_counts_with_a_trained_head(bias):
    """The head of a classifier counts twice: the frozen original and the copy that trains."""
    ours, theirs = pair("bert", modules_to_save=["classifier"], bias=bias)
    assert count_parameters(ours) == theirs.get_nb_trainable_parameters()
    batch = batch_for("bert", ours)
    assert_same_step(ours, theirs, batch, 1e-9)


@pytest.mark.parametrize(
    "targets",
    ["all-linear", r".*\.layers\.1\..*_proj", ["model.layers.0.self_attn.q_proj", "v_proj"], None],
    ids=["all-linear", "regex", "names", "default"],
)
@pytest.mark.parametrize("more", [{}, {"exclude_modules": ["v_proj"]}, {"exclude_modules": r".*down_proj"}], ids=str)
def test_targets_are_those_of_peft(targets, more):
    import peft

    if targets is None and more == {"exclude_modules": ["v_proj"]}:
        more = {"exclude_modules": ["layers.0.self_attn.v_proj"]}
    report = inject(model := tiny_model("llama"), LoraConfig(target_modules=targets, **more))
    theirs = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(target_modules=targets, **more))
    expected = [n for n, m in theirs.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert report.replaced == expected
    assert (report.trainable, report.total) == theirs.get_nb_trainable_parameters() == count_parameters(model)


@pytest.mark.parametrize(
    "more",
    [
        {"layers_to_transform": 0},
        {"layers_to_transform": [1]},
        {"layers_to_transform": [1], "layers_pattern": "layers"},
        {"rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 3}, "alpha_pattern": {"v_proj": 5}},
        {"rank_pattern": {"^model.layers.0.self_attn.q_proj": 1}},
    ],
    ids=str,
)
def test_layer_and_rank_patterns(more):
    targets = ["q_proj", "v_proj"]
    ours, theirs = pair("llama", targets=targets, r=4, lora_alpha=6, **more)
    assert count_parameters(ours) == theirs.get_nb_trainable_parameters()
    assert_same_step(ours, theirs, batch_for("llama", ours), 1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_embedding_layers(shape):
    embedding = {"llama": "embed_tokens", "gpt2": "wte", "bert": "word_embeddings"}[shape]
    ours, theirs = pair(shape, targets=[*TARGETS[shape], embedding], r=3, lora_alpha=5)
    ids = torch.randint(0, 61, (2, 5), generator=torch.Generator().manual_seed(0))
    assert relative_error(ours(input_ids=ids).logits, theirs(input_ids=ids).logits) <= 1e-9
    ours(input_ids=ids).logits.square().sum().backward()
    theirs(input_ids=ids).logits.square().sum().backward()
    for key, (our, their) in their_parameters(ours, theirs).items():
        assert relative_error(our.grad, their.grad) <= 1e-9, key
    assert count_parameters(ours) == theirs.get_nb_trainable_parameters()


@pytest.mark.parametrize("shape", SHAPES)
def test_disabled_is_the_base_model_exactly(shape):
    base = tiny_model(shape)
    batch = batch_for(shape, base)
    expected = base(**batch).logits
    ours, _ = pair(shape, bias="all")
    with torch.no_grad():
        for bias in adapter_state(ours).parts["default"]:
            bias.trained.add_(0.5)
    for prepare in (lambda: None, lambda: merge(ours), lambda: unmerge(ours)):
        prepare()
        adapted = ours(**batch).logits
        with disable_adapter(ours):
            assert torch.equal(ours(**batch).logits, expected)
        assert torch.equal(ours(**batch).logits, adapted)
        assert not torch.allclose(adapted, expected)


class UnscaledGradientOfA(torch.autograd.Function):
    """Wrong on purpose: the gradient of A lacks the factor s."""

    @staticmethod
    def forward(ctx, x, a, b, scaling):
        ctx.save_for_backward(x, a, b)
        ctx.scaling = scaling
        return F.linear(F.linear(x, a), b) * scaling

    @staticmethod
    def backward(ctx, grad):
        x, a, b = ctx.saved_tensors
        flat_grad, flat_x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        through_b = flat_grad @ b
        grad_b = ctx.scaling * flat_grad.T @ (flat_x @ a.T)
        return (ctx.scaling * through_b @ a).view_as(x), through_b.T @ flat_x, grad_b, None


def broken_forward(kind):
    def forward(self, x):
        y = self.base(x)
        if kind == "gradient of A unscaled":
            return y + UnscaledGradientOfA.apply(x, self.lora_A, self.lora_B, self.scaling)
        return y + F.linear(F.linear(x.detach(), self.lora_A), self.lora_B) * self.scaling

    return forward


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("gradient of A unscaled", "gradient of .*lora_A differs"),
        ("adapter's term missing from the gradient of x", "gradient of x differs"),
    ],
)
def test_broken_layers_are_caught(kind, message, monkeypatch):
    """Both layers give the right output and train; only the comparison of gradients can tell."""
    monkeypatch.setattr(LoRALinear, "forward", broken_forward(kind))
    # One adapted layer, the last: so that its error is not hidden behind another layer's.
    ours, theirs = pair("bert", targets=["encoder.layer.1.output.dense"], r=4, lora_alpha=6)
    batch = batch_for("bert", ours)
    assert relative_error(ours(**batch).logits, theirs(**batch).logits) <= 1e-9
    with pytest.raises(AssertionError, match=message):
        assert_same_step(ours, theirs, batch, 1e-9)
