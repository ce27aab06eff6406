"""Compiled and captured steps: the same numbers, one graph for all blocks, and no mask that appears while capturing."""

from contextlib import contextmanager

import pytest
import torch
import transformers.utils.import_utils
from torch import nn
from torch._dynamo.utils import counters
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lora_edu import LoraConfig, inject
from lora_edu.fast.steps import capture_step, causal_attention, compile_blocks

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4, "vocab_size": 32}
IDS = torch.randint(32, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch.compiler.reset()


def llama(way="full", attention="sdpa", dtype=torch.float32, layers=3):
    """A Llama with grouped keys, the same weights in every way; adapters away from zero."""
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_hidden_layers=layers, num_key_value_heads=2, attn_implementation=attention)
    model = LlamaForCausalLM(config).to(dtype).train()
    if way != "full":
        settings = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        inject(model, settings, autocast_adapter_dtype=False, fast=way == "fast")
    return model


def gpt2(attention="sdpa"):
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 32}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, attn_implementation=attention)).eval()


def step(model, labels=IDS, **inputs):
    """The loss, and every gradient by its parameter's name."""
    model.zero_grad()
    loss = model(input_ids=IDS, labels=labels, use_cache=False, **inputs).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, rtol=tolerance, atol=tolerance * float(tensor.abs().max())), name


def as_if_capturing(monkeypatch):
    """What transformers asks while a CUDA graph is captured."""
    monkeypatch.setattr(transformers.utils.import_utils, "is_cuda_stream_capturing", lambda: True)
    assert transformers.utils.import_utils.is_tracing()


# Compiling.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", ["full", "plain", "fast"])
def test_compiled_blocks_step_as_before_in_two_or_three_graphs(way, dtype):
    """One for the first block, whose input needs no gradient in LoRA, one for all others, and one for the loss."""
    model = llama(way, causal_attention(), dtype)
    assert compile_blocks(model, backend="aot_eager", fullgraph=True) == 3
    before = counters["stats"]["unique_graphs"]
    found = step(model)
    assert counters["stats"]["unique_graphs"] - before == (2 if way == "full" else 3)
    assert_same(found, step(llama(way, "sdpa", dtype)), 1e-5 if dtype == torch.float32 else 3e-2)


def test_the_blocks_are_the_longest_list():
    """A model may hold shorter ones before and in them, as heads or experts, and need no loss of transformers."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))

        def forward(self, x):
            return sum(expert(x) for expert in self.experts)

    model = nn.Sequential(Block(), nn.ModuleList(Block() for _ in range(4)))
    assert compile_blocks(model, backend="aot_eager") == 4
    assert [block._compiled_call_impl is not None for block in (model[0], *model[1])] == [False, *[True] * 4]


@pytest.mark.parametrize("adapter", ["bfloat16", "float32"])
def test_fast_blocks_compile_in_one_piece_under_autocast(adapter):
    losses = []
    for compiled in (False, True):
        model = llama("fast")
        for name, p in model.named_parameters():
            p.data = p.data.to(getattr(torch, adapter) if "lora_" in name else torch.float32)
        if compiled:
            compile_blocks(model, backend="aot_eager", fullgraph=True)
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(step(model)["loss"])
    assert torch.allclose(*losses, rtol=2e-2)


@pytest.mark.parametrize("way", ["plain", "fast"])
def test_while_capturing_no_block_is_compiled_anew_and_no_random_state_is_read(way, monkeypatch):
    """Either would end the capture."""
    model = llama(way, causal_attention())
    compile_blocks(model, backend="aot_eager")
    expected = step(model)
    as_if_capturing(monkeypatch)
    monkeypatch.setattr(torch.random, "get_rng_state", lambda: pytest.fail("the random state was read"))
    monkeypatch.setattr(torch, "get_rng_state", torch.random.get_rng_state)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_same(step(model), expected)
        again = llama(way, causal_attention())  # a second model finds everything compiled
        compile_blocks(again, backend="aot_eager")
        assert_same(step(again), expected)


def test_blocks_are_counted_in_models_of_any_make():
    assert compile_blocks(llama("plain", layers=5)) == 5
    assert compile_blocks(gpt2()) == 2
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 32}
    assert compile_blocks(BertModel(BertConfig(**sizes, num_hidden_layers=4))) == 4


def test_shapes_are_fixed_unless_asked_for_otherwise(monkeypatch):
    asked = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: asked.append(options))
    compile_blocks(llama(layers=1))
    compile_blocks(llama(layers=1), dynamic=True, mode="max-autotune")
    assert asked == [{"dynamic": False}, {"dynamic": True, "mode": "max-autotune"}]


@pytest.mark.errors
@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(nn.ModuleList())], ids=["none", "empty"])
def test_a_model_without_blocks_is_named(model):
    with pytest.raises(ValueError, match=f"{type(model).__name__} has no nn.ModuleList"):
        compile_blocks(model)


# Attention without a mask.
@pytest.mark.parametrize("build", [lambda attention: llama("full", attention), gpt2], ids=["llama", "gpt2"])
def test_causal_attention_is_sdpa_on_full_rows(build):
    assert causal_attention() == causal_attention() == "causal"
    assert_same(step(build("causal")), step(build("sdpa")))
    model = build("sdpa")
    model.set_attn_implementation(causal_attention())
    assert_same(step(model), step(build("sdpa")))


def test_causal_attention_is_sdpa_on_rows_padded_on_the_right():
    mask = torch.ones_like(IDS)
    mask[1, 4:] = 0
    labels = IDS.masked_fill(mask == 0, -100)
    expected = step(llama(), labels, attention_mask=mask)
    assert_same(step(llama("full", causal_attention()), labels), expected)
    assert_same(step(llama("full", causal_attention()), labels, attention_mask=mask), expected)


@pytest.mark.parametrize("capturing", [False, True])
def test_no_mask_reaches_a_layer(capturing, monkeypatch):
    if capturing:
        as_if_capturing(monkeypatch)
    model, masks = llama("full", causal_attention()), []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(
            lambda layer, inputs, named: masks.append((*inputs[1:], named["attention_mask"])), with_kwargs=True
        )
    assert_same(step(model), step(llama()))
    assert masks == [(None,)] * 3


@pytest.mark.errors
def test_causal_attention_refuses_what_it_would_get_wrong():
    name, refused = causal_attention(), pytest.raises(ValueError, match=r'trains decoders.*"sdpa"')
    with refused:
        llama("full", name)(IDS, attention_mask=torch.zeros(2, 1, 7, 7))
    with refused:
        llama("full", name).generate(IDS, min_new_tokens=3, max_new_tokens=3)
    with refused:
        BertModel(BertConfig(**SIZES, num_hidden_layers=1, attn_implementation=name))(IDS)


# Capturing: the GPU's part is played by stand-ins.
@pytest.mark.errors
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_a_step_is_not_captured():
    with pytest.raises(RuntimeError, match=r"no CUDA device.*call the step itself"):
        capture_step(lambda: pytest.fail("a step was taken"))


class Device:
    """Notes what is asked of the GPU."""

    def __init__(self, monkeypatch):
        self.log, cuda = [], torch.cuda
        stream = type("Stream", (), {"wait_stream": lambda stream, other: None})
        graph = type("Graph", (), {"replay": lambda graph: self.log.append("replay")})
        for name, value in {
            "is_available": lambda: True, "graph_pool_handle": lambda: (0, 1),
            "current_stream": stream, "Stream": stream, "CUDAGraph": graph,
            "stream": lambda which: self.noted("stream"), "graph": lambda graph, pool=None: self.capture(pool),
        }.items():  # fmt: skip
            monkeypatch.setattr(cuda, name, value)

    @contextmanager
    def noted(self, name):
        try:
            yield
        finally:
            self.log.append(f"{name} left")

    @contextmanager
    def capture(self, pool):
        self.log.append(("capture", pool))
        yield


@pytest.mark.parametrize("pool", [None, (0, 7)])
def test_a_captured_step_warms_up_elsewhere_and_is_then_replayed(pool, monkeypatch):
    gpu, loss = Device(monkeypatch), torch.tensor(1.0)

    def one():
        gpu.log.append("step")
        return loss

    replay = capture_step(one, warmup=2, pool=pool)
    assert gpu.log == ["step", "step", "stream left", ("capture", pool or (0, 1)), "step"]
    del gpu.log[:]
    assert replay() is loss
    assert gpu.log == ["replay"]
