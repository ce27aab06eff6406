"""The fused LoRA layer: values and gradients are the plain layer's; what it does not cover, it leaves alone."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from transformers import T5Config, T5ForConditionalGeneration
from transformers.pytorch_utils import Conv1D

from lora_edu import LoraConfig, LoRALinear, disable_adapter, inject, merge, merge_and_unload, set_adapter, unmerge
from lora_edu.core.adapter import adapter_layers
from lora_edu.core.layer import LoRAConv1D
from lora_edu.counting.flops import step_flops
from lora_edu.counting.measure import saved_bytes
from lora_edu.counting.meta import load_config, meta_model
from lora_edu.fast.function import _kept_share, _random_mask, lora_linear, lora_linears
from lora_edu.fast.layers import fuse

S = 1.7
SHAPES = [(7, 12), (2, 5, 12), (12,), (0, 12), (2, 1, 3, 12)]


def factors(dtype=torch.float64, in_features=12, out_features=20, r=3, seed=0):
    """W, b, A and B, all away from zero."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(out_features, in_features), (out_features,), (r, in_features), (out_features, r)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def plain(x, W, b, A, B, s):
    return F.linear(x, W, b) + s * F.linear(F.linear(x, A), B)


def grads(function, *tensors):
    """The output and the gradients of all tensors, for an output gradient that is no constant."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    y = function(*leaves)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))
    return y.detach(), [leaf.grad for leaf in leaves]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_the_plain_layers(shape, dtype, tolerance):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    W, b, A, B = factors(dtype)
    y, found = grads(lambda *t: lora_linear(*t, S), x, W, b, A, B)
    reference, expected = grads(lambda *t: plain(*t, S), x.double(), *(t.double() for t in (W, b, A, B)))
    assert y.dtype == dtype
    assert y.shape == reference.shape
    for one, other in [(y, reference), *zip(found, expected, strict=True)]:
        assert one.dtype == dtype
        assert torch.allclose(
            one.double(), other, rtol=tolerance, atol=tolerance * float(other.abs().max() if other.numel() else 1)
        )


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_gradcheck(p):
    """Against finite differences; with dropout the seed holds the mask still."""
    x = torch.randn(2, 3, 12, dtype=torch.float64)

    def seeded(*tensors):
        torch.manual_seed(3)
        return lora_linear(*tensors, S, p)

    assert torch.autograd.gradcheck(seeded, [t.requires_grad_() for t in (x, *factors())])


def test_only_what_is_asked_for_gets_a_gradient():
    W, b, A, B = factors()
    x = torch.randn(4, 12, dtype=torch.float64)
    lora_linear(x, W, None, A.requires_grad_(), B.requires_grad_(), S).sum().backward()
    assert (x.grad, W.grad) == (None, None)
    assert A.grad is not None
    assert B.grad is not None
    y = lora_linear(x.requires_grad_(), W, b, A.detach(), B.detach(), S)
    y += 1  # the output is nobody else's: a model may write into it
    y.sum().backward()
    assert torch.allclose(x.grad, (W + S * B @ A).sum(0).expand(4, -1))


def fused_and_by_hand(ranks, scalings, dropouts, monkeypatch):
    """Outputs and gradients of three layers of one input, fused, and by the plain formula with the same masks."""
    torch.manual_seed(0)
    x = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)
    layers = [factors(out_features=5 + i, r=r, seed=i) for i, r in enumerate(ranks)]
    layers[1][1] = None
    leaves = [x, *(t.requires_grad_() for layer in layers for t in layer if t is not None)]
    drawn = []

    def draw(*arguments):
        drawn.append(_random_mask(*arguments))
        return drawn[-1]

    monkeypatch.setattr("lora_edu.fast.function._random_mask", draw)
    fused = lora_linears(x, layers, scalings, dropouts)
    masks = [drawn.pop(0).double() / _kept_share(p) if p else 1 for p in dropouts]
    hand = [
        F.linear(x, W, b) + s * ((mask * x) @ A.T @ B.T)
        for (W, b, A, B), s, mask in zip(layers, scalings, masks, strict=True)
    ]
    results = []
    for ys in (fused, hand):
        found = torch.autograd.grad(sum(y.square().sum() for y in ys), leaves)
        results.append([*ys, *found])
    return results


KEPT = _kept_share(0.4)


@pytest.mark.parametrize(
    ("ranks", "scalings", "dropouts"),
    [
        ((2, 2, 2), (S, S, S), (0, 0, 0)),
        ((2, 4, 1), (S, S, S), (0, 0, 0)),
        ((2, 2, 2), (S, 0.5, -3), (0, 0, 0)),
        ((2, 4, 1), (S, 0.5, S), (0.4, 0.4, 0.4)),
        ((2, 4, 1), (S, 0.5, 1), (0, 0.4, 0)),
        ((2, 2, 2), (S, S * KEPT, S), (0, 0.4, 0)),  # equal once the kept entries are scaled up
    ],
    ids=str,
)
def test_layers_that_read_together_may_differ(ranks, scalings, dropouts, monkeypatch):
    fused, hand = fused_and_by_hand(ranks, list(scalings), list(dropouts), monkeypatch)
    for one, other in zip(fused, hand, strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-10)


def test_compiled_sums_stay_in_place():
    """The compiler is handed the operation that it leaves alone; of addmm_ it would make a copy and a sum."""
    graphs = []

    def look(graph, inputs):
        graphs.append(graph.code)
        return graph

    torch.compiler.reset()
    W, b, A, B = factors()
    compiled = torch.compile(lora_linear, backend=aot_autograd(fw_compiler=look, bw_compiler=look))
    x = torch.randn(7, 12, dtype=torch.float64)
    y, found = grads(lambda x, A, B: compiled(x, W, b, A, B, S), x, A, B)
    reference, expected = grads(lambda x, A, B: plain(x, W, b, A, B, S), x, A, B)
    assert all(torch.allclose(one, other) for one, other in zip([y, *found], [reference, *expected], strict=True))
    forward, backward = graphs
    assert "lora_edu.add_product_" in forward
    assert "lora_edu.add_product_" in backward


def test_strided_inputs_and_outputs():
    """Transposed and expanded tensors, as attention layers produce them."""
    W, b, A, B = factors()
    x = torch.randn(12, 5, dtype=torch.float64)
    y, (g, *_) = grads(lambda x: lora_linear(x.T, W, b, A, B, S).sum(0).expand(3, -1), x)
    reference, (expected, *_) = grads(lambda x: plain(x.T, W, b, A, B, S).sum(0).expand(3, -1), x)
    assert torch.allclose(y, reference)
    assert torch.allclose(g, expected)


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [True, False])
def test_mixed_precision(autocast, adapter_dtype):
    """Under autocast, and with a float32 adapter on a bfloat16 base: bfloat16 out, gradients in their own precision."""
    x, W, b, A, B = torch.randn(2, 5, 12), *factors(torch.float32)
    base = torch.float32 if autocast else torch.bfloat16
    tensors = [x.to(base), W.to(base), b.to(base), A.to(adapter_dtype), B.to(adapter_dtype)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, found = grads(lambda *t: lora_linear(*t, S), *tensors)
    reference, expected = grads(lambda *t: plain(*t, S), *(t.double() for t in tensors))
    assert y.dtype == torch.bfloat16
    assert [g.dtype for g in found] == [t.dtype for t in tensors]
    for one, other in [(y, reference), *zip(found, expected, strict=True)]:
        assert (one.double() - other).norm() <= 2e-2 * other.norm()


def test_autocast_leaves_float64_alone():
    x, (W, b, A, B) = torch.randn(5, 12, dtype=torch.float64), factors()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(lora_linear(x, W, b, A, B, S), plain(x, W, b, A, B, S))


def test_operations_can_be_counted_without_computing():
    """On the meta device, as ``step_flops`` does: the fused layers have the plain ones' operations."""
    config = load_config("tiny")
    counted = []
    for fast in (False, True):
        model = meta_model(config)
        with torch.device("meta"):
            inject(model, LoraConfig(r=3, target_modules="all-linear"), fast=fast)
        counted.append(step_flops(model, tokens=8))
    assert counted[0] == counted[1]


# Dropout: another stream of random numbers than F.dropout's, so these tests are about shares and means.
@pytest.mark.parametrize("p", [0.05, 0.1, 0.5])
def test_the_mask_keeps_its_share_in_every_lane(p):
    """Four decisions come from one draw: each of the four must be fair."""
    torch.manual_seed(0)
    mask = _random_mask(1001, 401, p, torch.device("cpu"))
    assert mask.shape == (1001, 401)
    assert mask.dtype == torch.bool
    lanes = [mask.flatten()[i::4].double().mean().item() for i in range(4)]
    error = (p * (1 - p) / (1001 * 401 / 4)) ** 0.5
    assert lanes == pytest.approx([1 - p] * 4, abs=5 * error)
    assert not torch.equal(mask, _random_mask(1001, 401, p, torch.device("cpu")))
    columns = mask.double().T  # neighbours are independent
    assert torch.corrcoef(columns[:8]).fill_diagonal_(0).abs().max() < 0.15


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_is_right_on_average(p):
    """The mean over many masks is the layer without dropout; its spread is F.dropout's."""
    W, b, A, B = factors()
    x = torch.randn(1, 12, dtype=torch.float64).expand(20_000, -1)
    torch.manual_seed(0)
    ours = lora_linear(x, W, b, A, B, S, p)
    theirs = F.linear(x, W, b) + S * F.linear(F.linear(F.dropout(x, p), A), B)
    error = theirs.std(0) / 20_000**0.5
    assert ((ours.mean(0) - plain(x[:1], W, b, A, B, S)[0]).abs() < 5 * error).all()
    assert torch.allclose(ours.std(0), theirs.std(0), rtol=0.05)


def test_no_dropout_in_eval_mode_and_all_dropped_at_one():
    layer = fused_linear(nn.Linear(12, 20), r=3, lora_dropout=0.5, init_lora_weights=False)
    x = torch.randn(4, 12)
    assert not torch.allclose(layer(x), layer(x))
    layer.eval()
    assert torch.allclose(layer(x), LoRALinear.forward(layer, x), atol=1e-6)
    gone = fused_linear(nn.Linear(12, 20), r=3, lora_dropout=1.0, init_lora_weights=False)
    assert torch.allclose(gone(x), gone.base(x))


@pytest.mark.errors
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 11)}, r"x is \(2, 11\).*in = 12"),
        ({"x": torch.tensor(1.0)}, r"x is \(\)"),
        ({"lora_A": torch.ones(3, 11)}, r"lora_A is \(3, 11\).*must be \(3, 12\)"),
        ({"lora_B": torch.ones(3, 20)}, r"lora_B is \(3, 20\).*must be \(20, 3\)"),
        ({"bias": torch.ones(12)}, r"bias is \(12,\).*must be \(20,\)"),
        ({"dropout_p": 1.5}, "lora_dropout=1.5"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    W, b, A, B = factors(torch.float32)
    arguments = {"x": torch.ones(2, 12), "weight": W, "bias": b, "lora_A": A, "lora_B": B, "scaling": S}
    with pytest.raises(ValueError, match=message):
        lora_linear(**(arguments | change))


def test_gradients_of_gradients_are_refused():
    x, (W, b, A, B) = torch.randn(4, 12, dtype=torch.float64, requires_grad=True), factors()
    (g,) = torch.autograd.grad(lora_linear(x, W, b, A.requires_grad_(), B, S).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


# Layers and models.
class Block(nn.Module):
    """Two siblings that read the same input, and one layer after them."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 16), nn.Linear(8, 16, bias=False), Conv1D(8, 16)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def blocks(fast, r=3, **options):
    """A model of two blocks and an embedding, the same for fast and plain."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 8), Block(), Block()).double()
    config = LoraConfig(r=r, lora_alpha=5, target_modules=["0", "gate_proj", "up_proj", "down_proj"], **options)
    inject(model, config, fast=fast)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def fused_linear(base, **options):
    layer = LoRALinear(base, **options)
    assert fuse(layer)
    return layer


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def assert_same_step(fast, plain_model):
    for model in (fast, plain_model):
        model.zero_grad()
        model(IDS).square().mean().backward()
    assert torch.allclose(fast(IDS), plain_model(IDS), rtol=1e-9, atol=1e-12)
    for (name, one), other in zip(fast.named_parameters(), plain_model.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            assert torch.allclose(one.grad, other.grad, rtol=1e-9, atol=1e-12), name


def siblings(model):
    return [layer.siblings for layer in adapter_layers(model).values() if getattr(layer, "siblings", None)]


def test_fast_injection_takes_the_fast_form_where_there_is_one():
    model = blocks(fast=True)
    kinds = {name: type(layer).__name__ for name, layer in adapter_layers(model).items()}
    assert kinds["0"] == "LoRAEmbedding"
    assert kinds["1.gate_proj"] == "FastLoRALinear"
    assert kinds["2.down_proj"] == "FastLoRAConv1D"
    assert not any("Fast" in type(layer).__name__ for layer in adapter_layers(blocks(fast=False)).values())


@pytest.mark.parametrize("bias", ["none", "all"])
def test_a_model_steps_as_the_plain_one_does(bias):
    fast, plain_model = blocks(True, bias=bias), blocks(False, bias=bias)
    assert_same_step(fast, plain_model)
    assert len({id(group) for group in siblings(fast)}) == 2
    assert all(group.pending is None and not group.uncollected for group in siblings(fast))
    for model in (fast, plain_model):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter -= 0.01 * parameter.grad
    assert_same_step(fast, plain_model)


def test_merging_disabling_and_unloading_are_inherited():
    fast, plain_model = blocks(True), blocks(False)
    with disable_adapter(fast), disable_adapter(plain_model):
        assert torch.equal(fast(IDS), plain_model(IDS))
    merge(fast), merge(plain_model)
    fast.eval(), plain_model.eval()
    assert torch.equal(fast(IDS), plain_model(IDS))
    unmerge(fast), unmerge(plain_model)
    fast.train(), plain_model.train()
    assert_same_step(fast, plain_model)
    assert torch.equal(merge_and_unload(fast)(IDS), merge_and_unload(plain_model)(IDS))


def test_a_second_adapter_around_the_first():
    models = []
    for fast in (True, False):
        model = blocks(fast)
        torch.manual_seed(7)
        inject(model, LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False), "second", fast=fast)
        set_adapter(model, ["default", "second"])
        models.append(model)
    assert_same_step(*models)


def test_hooks_and_forwards_of_the_base_are_kept():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    assert not fuse(LoRALinear(Doubled(8, 16), r=3))  # one in four bits is such a base
    x, base = torch.randn(4, 8), nn.Linear(8, 16)
    layer = fused_linear(base, r=3, init_lora_weights=False)
    base.register_forward_hook(lambda module, inputs, output: output + 1)
    assert torch.equal(layer(x), LoRALinear.forward(layer, x))


@pytest.mark.parametrize("write", ["x", "adapter", "base", "grad mode"])
def test_a_sibling_never_hands_out_what_is_no_longer_true(write):
    block = blocks(True)[1]
    x = torch.randn(4, 8, dtype=torch.float64)
    block.gate_proj(x)
    assert list(block.up_proj.siblings.pending.outputs) == [block.up_proj]
    with torch.no_grad():
        if write == "x":
            x += 1
        elif write == "adapter":
            block.up_proj.lora_B += 1
        elif write == "base":
            block.up_proj.weight.add_(1)
    with torch.set_grad_enabled(write != "grad mode"):
        y = block.up_proj(x)
    assert torch.allclose(y, LoRALinear.forward(block.up_proj, x))
    assert y.requires_grad == (write != "grad mode")


def test_siblings_that_read_different_inputs_part():
    block = blocks(True)[1]
    group = block.up_proj.siblings
    for _ in range(4):
        x, z = torch.randn(2, 4, 8, dtype=torch.float64)
        assert torch.allclose(block.gate_proj(x), LoRALinear.forward(block.gate_proj, x))
        assert torch.allclose(block.up_proj(z), LoRALinear.forward(block.up_proj, z))
    assert group.uncollected >= 3
    assert group.pending is None


def test_siblings_of_two_widths_are_computed_apart():
    model = nn.ModuleDict({"gate_proj": nn.Linear(8, 16), "up_proj": nn.Linear(6, 16)})
    inject(model, LoraConfig(r=2, target_modules=["gate_proj", "up_proj"], init_lora_weights=False), fast=True)
    for name, layer in model.items():
        x = torch.randn(4, 8 if name == "gate_proj" else 6)
        assert torch.allclose(layer(x), LoRALinear.forward(layer, x), atol=1e-5)


def test_a_copy_has_siblings_of_its_own():
    model = blocks(True)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other[1].up_proj.siblings.members == [other[1].gate_proj, other[1].up_proj]
        assert_same_step(other, blocks(False))


def test_a_frozen_or_switched_off_sibling_is_left_out():
    fast, plain_model = blocks(True), blocks(False)
    for model in (fast, plain_model):
        model[1].up_proj.active = False
        model[2].gate_proj.lora_A.requires_grad_(False)
    assert_same_step(fast, plain_model)


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_gradient_checkpointing(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self, inside):
            super().__init__()
            self.inside = inside

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.inside, x, use_reentrant=reentrant)

    models = [blocks(True), blocks(False)]
    for model in models:
        model[1], model[2] = Checkpointed(model[1]), Checkpointed(model[2])
    assert_same_step(*models)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_autograd_keeps_no_more_than_for_the_plain_layers(dropout):
    kept = []
    for fast in (True, False):
        model = blocks(fast, lora_dropout=dropout)
        x = torch.randn(64, 8, dtype=torch.float64)
        kept.append(saved_bytes(model, lambda model=model, x=x: model[2](model[1](x))))
    assert kept[0] <= kept[1] if dropout == 0 else kept[0] < 0.9 * kept[1]


def test_compiled_blocks_step_as_plain_ones():
    """Siblings included, in one piece: no graph break."""
    fast = blocks(True)
    for block in fast[1:]:
        block.compile(backend="aot_eager", fullgraph=True)
    assert_same_step(fast, blocks(False))


def test_a_model_is_copied_after_a_forward_that_was_left_unfinished():
    """What waits for a sibling belongs to the model it was computed in: the copy starts with nothing."""
    model = blocks(True)
    half = model[1].gate_proj(torch.ones(2, 8, dtype=torch.float64))
    assert model[1].up_proj.siblings.pending is not None
    twin = copy.deepcopy(model)
    assert twin[1].up_proj.siblings.pending is None
    assert half.requires_grad
    assert torch.equal(twin(IDS), model(IDS))
    twin(IDS).sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_encoder_decoder_is_copied_after_a_forward():
    """T5's decoder hands the encoder's output to k and v of every block."""
    torch.manual_seed(0)
    config = T5Config(d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, vocab_size=20, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    inject(model, LoraConfig(r=2, target_modules=["q", "k", "v"], init_lora_weights=False), fast=True)
    logits = model(input_ids=IDS, labels=IDS).logits
    assert torch.equal(copy.deepcopy(model)(input_ids=IDS, labels=IDS).logits, logits)


def test_conv1d_alone():
    base = Conv1D(20, 12)
    layer = LoRAConv1D(base, r=3, init_lora_weights=False)
    assert fuse(layer)
    x = torch.randn(2, 5, 12)
    y, (g,) = grads(layer, x)
    reference, (expected,) = grads(lambda x: LoRALinear.forward(layer, x), x)
    assert torch.allclose(y, reference, atol=1e-5)
    assert torch.allclose(g, expected, atol=1e-5)
