"""Layers that cannot be adapted are refused before anything changes: uncalled ones, weights that are elsewhere."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload, disk_offload
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)
from transformers.models.bamba.modeling_bamba import BambaMixer
from transformers.models.bert.modeling_bert import BertSelfAttention
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1Mixer
from transformers.models.falcon_mamba.modeling_falcon_mamba import FalconMambaMixer
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import GraniteMoeHybridMambaLayer
from transformers.models.jamba.modeling_jamba import JambaMambaMixer
from transformers.models.layoutlmv3.modeling_layoutlmv3 import LayoutLMv3Encoder
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashTopkRouter
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from transformers.models.mobilebert.modeling_mobilebert import MobileBertLMPredictionHead
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer
from transformers.models.t5.modeling_t5 import T5DenseActDense, T5ForConditionalGeneration
from transformers.models.wav2vec2.modeling_wav2vec2 import TDNNLayer, Wav2Vec2Attention
from transformers.models.wavlm.modeling_wavlm import WavLMAttention
from transformers.models.zamba.modeling_zamba import ZambaMambaMixer
from transformers.models.zamba2.modeling_zamba2 import Zamba2MambaMixer

from lora_edu import LoraConfig, inject, list_adapters, load_adapter, load_base, load_dataset, merge, save_adapter
from lora_edu.lab.datasets import encode
from lora_edu.lab.diagnose import check_called, without_gradient
from lora_edu.lab.hooks import Hooks
from lora_edu.lab.training import train

pytestmark = pytest.mark.errors


def config(*targets, **options):
    return LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False, **options)


def refused(model, *targets, message="reads this layer's weight and does not call the layer", **options):
    """Injecting says so, and leaves the model as it was, bit for bit."""
    before = {name: (p, p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        inject(model, config(*targets), **options)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for name, (parameter, value, requires_grad) in before.items():
        assert after[name] is parameter
        assert parameter.requires_grad == requires_grad
        assert parameter.is_meta or torch.equal(parameter, value)
    assert list_adapters(model) == []


# Layers that nobody calls


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.attention(x, x, x)[0])


def test_the_projection_of_multihead_attention():
    refused(model := Attention(), "out_proj", message=r"exclude_modules=\['attention.out_proj'\]")
    with pytest.raises(ValueError, match="MultiheadAttention reads"):
        inject(model, LoraConfig(target_modules="all-linear"))
    report = inject(model, LoraConfig(target_modules="all-linear", exclude_modules=["attention.out_proj"]))
    assert report.replaced == ["head"]


class ByHand(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(5, 4)
        self.called = nn.Linear(5, 4)

    def forward(self, x):
        # the layer is not called: not self.proj(x)
        return self.called(x) + F.linear(
            x,
            self.proj.weight,
        )


def test_a_weight_that_is_multiplied_by_hand():
    refused(ByHand(), "proj", "called")
    outer = nn.Sequential(ByHand(), nn.Linear(4, 2))
    refused(outer, "proj")
    inject(outer, config("called", "1"))


def test_a_layer_that_somebody_else_calls_is_adapted():
    """It is registered twice; the other owner calls it."""
    model = nn.ModuleDict({"reads": ByHand(), "calls": nn.Sequential()})
    model["calls"].append(model["reads"].proj)
    assert inject(model, config("proj")).replaced == ["reads.proj"]


class Uses(nn.Module):
    """Every attribute is a layer whose weight is read somewhere, and that may be called somewhere else."""

    def __init__(self):
        super().__init__()
        self.in_list, self.handed, self.by_name, self.local = (nn.Linear(3, 3) for _ in range(4))
        self.asked, self.started, self.tied, self.optional = (nn.Linear(3, 3) for _ in range(4))
        self.read, self.aliased, self.transposed, self.in_product = (nn.Linear(3, 3) for _ in range(4))
        nn.init.zeros_(self.started.weight)
        self.tied.weight = self.started.weight

    def forward(self, x):
        for layer in [self.in_list]:
            x = layer(x)
        x = torch.utils.checkpoint.checkpoint(self.handed, x, use_reentrant=False)
        x = self.by_name.forward(x)
        layer = self.local
        x = layer(x)
        if self.optional is not None:
            x = x @ self.optional.weight
        if self.asked.weight.dtype != x.dtype or self.asked.weight.device != x.device:
            x = x.to(self.asked.weight.dtype)
        weight = self.aliased.weight
        return F.linear(x, weight) @ self.transposed.weight.T + torch.einsum("oi,bi->bo", self.in_product.weight, x)

    def penalty(self):
        layers = (self.in_list, self.handed, self.by_name, self.local)
        assert layers
        return self.in_list.weight.norm() + self.handed.weight.norm() + self.by_name.weight.norm() + self.read.weight


class Goes(nn.Sequential):
    """Its layers are called in a loop over it."""

    def forward(self, x):
        for layer in self:
            x = layer(x)
        return x + self.a.weight.sum()


class Inherits(ByHand):
    def forward(self, x):
        return super().forward(x) + self.proj(x)


@pytest.mark.parametrize(
    ("owner", "attribute", "reads_only"),
    [
        *((Uses, name, False) for name in ("in_list", "handed", "by_name", "local", "asked", "started", "tied")),
        *((Uses, name, True) for name in ("optional", "read", "aliased", "transposed", "in_product")),
        (ByHand, "proj", True),
        (ByHand, "called", False),
        (Inherits, "proj", False),
        (Goes, "a", False),
        (type("Typed", (nn.Module,), {}), "proj", False),  # no source to read
        # transformers, as installed
        *((MambaMixer, name, name in ("dt_proj", "out_proj")) for name in ("in_proj", "x_proj", "dt_proj", "out_proj")),
        *((FalconMambaMixer, name, name in ("dt_proj", "out_proj")) for name in ("in_proj", "dt_proj", "out_proj")),
        *((JambaMambaMixer, name, name == "dt_proj") for name in ("in_proj", "x_proj", "dt_proj", "out_proj")),
        *((owner, "out_proj", True) for owner in (Mamba2Mixer, BambaMixer, FalconH1Mixer, Zamba2MambaMixer)),
        *((owner, "out_proj", True) for owner in (GraniteMoeHybridMambaLayer, NemotronHMamba2Mixer)),
        *((Mamba2Mixer, "in_proj", False), (ZambaMambaMixer, "out_proj", False)),
        *((WavLMAttention, name, True) for name in ("q_proj", "k_proj", "v_proj", "out_proj")),
        *((TDNNLayer, "kernel", True), (Wav2Vec2Attention, "out_proj", False)),
        *((MobileBertLMPredictionHead, "decoder", True), (LongcatFlashTopkRouter, "classifier", True)),
        *((LayoutLMv3Encoder, "rel_pos_bias", True), (T5DenseActDense, "wo", False)),
        *((BertSelfAttention, "query", False), (LlamaForCausalLM, "lm_head", False)),
        (T5ForConditionalGeneration, "lm_head", False),
    ],
)
def test_what_an_owner_does_with_a_layer_is_read_from_its_source(owner, attribute, reads_only):
    from lora_edu.core.refusals import reads_only_the_weight

    assert reads_only_the_weight(owner, attribute) is reads_only


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 31}
IDS = torch.arange(12).reshape(2, 6)
BATCH = {"input_ids": IDS, "labels": IDS}


@pytest.mark.parametrize(
    ("make", "uncalled", "called"),
    [
        (lambda: MambaForCausalLM(MambaConfig(**SMALL, state_size=4)), ["dt_proj", "out_proj"], ["in_proj", "x_proj"]),
        (
            lambda: Mamba2ForCausalLM(Mamba2Config(**SMALL, state_size=4, num_heads=4, head_dim=8, n_groups=1)),
            ["out_proj"],
            ["in_proj"],
        ),
        (
            lambda: JambaForCausalLM(
                JambaConfig(
                    **SMALL, num_attention_heads=2, num_key_value_heads=2, intermediate_size=24, num_experts=1,
                    mamba_d_state=4, mamba_dt_rank=3, use_mamba_kernels=False, attn_layer_period=2, attn_layer_offset=1,
                )
            ),
            ["dt_proj"],
            ["in_proj", "x_proj", "out_proj", "q_proj"],
        ),
    ],
    ids=["mamba", "mamba2", "jamba"],
)  # fmt: skip
def test_state_space_models(make, uncalled, called):
    torch.manual_seed(0)
    model = make()
    for target in uncalled:
        refused(model, target, *called)
    inject(model, config(*called))
    assert check_called(model, BATCH) == []


def test_with_its_kernel_installed_mamba_skips_one_more(monkeypatch):
    from lora_edu.core import refusals

    monkeypatch.setattr(refusals, "find_spec", lambda name: object() if name == "mamba_ssm" else None)
    assert refusals.reads_only_the_weight(MambaMixer, "x_proj")
    assert not refusals.reads_only_the_weight(MambaMixer, "in_proj")
    assert not refusals.reads_only_the_weight(JambaMambaMixer, "x_proj")


def test_bloom_reads_and_calls():
    """With pretraining_tp and slow_but_exact it slices the weight; else it calls the layer."""
    model = BloomForCausalLM(BloomConfig(hidden_size=16, n_layer=2, n_head=2, vocab_size=31))
    inject(model, config("dense", "dense_4h_to_h", "query_key_value"))
    assert check_called(model, BATCH) == []


# PyTorch's own encoder block


def encoder(**options):
    options = {"batch_first": True, "nhead": 2} | options
    block = nn.TransformerEncoderLayer(8, dim_feedforward=12, dropout=0.0, **options)
    return nn.TransformerEncoder(block, 2, enable_nested_tensor=False)


@pytest.fixture
def fastpath():
    before = torch.backends.mha.get_fastpath_enabled()
    yield torch.backends.mha.set_fastpath_enabled
    torch.backends.mha.set_fastpath_enabled(before)


def test_the_encoder_block_is_refused_while_it_skips_its_layers(fastpath):
    fastpath(True)
    x = torch.randn(2, 5, 8)
    refused(model := encoder().eval(), "linear1", message=r"fast path.*set_fastpath_enabled\(False\) first")
    refused(model, "linear2", "linear1", message="fast path")
    refused(model, "out_proj")
    fastpath(False)
    plain = model(x)
    inject(model, config("linear1", "linear2"))
    with torch.no_grad():
        assert (model(x) - plain).abs().max() > 1e-3
        merged = model(x)
    merge(model)
    torch.testing.assert_close(model(x), merged, rtol=1e-4, atol=1e-5)
    refused(encoder(), "out_proj")  # with the fast path or without


@pytest.mark.parametrize(
    "options", [{"batch_first": False}, {"activation": F.silu}, {"nhead": 1}, {"bias": False}], ids=str
)
def test_an_encoder_block_that_cannot_take_the_fast_path_is_adapted(options, fastpath):
    fastpath(True)
    model, x = encoder(**options).eval(), torch.randn(2, 5, 8)
    with torch.no_grad():
        plain = model(x)
        inject(model, config("linear1", "linear2"))
        assert (model(x) - plain).abs().max() > 1e-3


class OwnForward(nn.TransformerEncoderLayer):
    def forward(self, src, *args, **kwargs):
        return self._ff_block(src)


def test_an_encoder_block_with_a_forward_of_its_own_is_adapted(fastpath):
    fastpath(True)
    model = nn.Sequential(OwnForward(8, 2, 12, batch_first=True))
    inject(model, config("linear1", "linear2"))
    assert check_called(model, torch.randn(2, 5, 8)) == []


# In training, and on request


class Skips(nn.Module):
    """What its source does not tell: which of its layers are called."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("one", "two", "three")})

    def forward(self, x, wanted="one"):
        return self.layers[wanted](x) @ self.layers["two"].weight


def test_layers_without_a_gradient_are_named_once():
    inject(model := Skips(), config("one", "two", "three"))
    hooks = Hooks(model)
    model(torch.ones(1, 4)).sum().backward()
    assert without_gradient(model) == ["layers.two", "layers.three"]
    with pytest.warns(UserWarning, match=r"2 adapted layers got no gradient.*: layers.two, layers.three$"):
        hooks.after_backward(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hooks.after_backward(2)


def test_check_called_leaves_everything_as_it_was():
    inject(model := Skips(), config("one", "two", "three"))
    inject(model, config("one"), "other")
    model(torch.ones(1, 4)).sum().backward()
    before = [(p.grad, p.requires_grad) for p in model.parameters()]
    assert check_called(model, torch.ones(2, 4)) == ["layers.two", "layers.three"]
    assert check_called(model, {"x": torch.ones(2, 4), "wanted": "three"}) == ["layers.one", "layers.two"]
    with torch.no_grad():
        assert check_called(torch.compile(model, backend="eager"), torch.ones(2, 4)) == ["layers.two", "layers.three"]
    after = [(p.grad, p.requires_grad) for p in model.parameters()]
    assert all(a is c and b is d for (a, b), (c, d) in zip(before, after, strict=True))
    merge(model)
    with pytest.raises(ValueError, match="no adapter is in use in this Skips: call inject, set_adapter or unmerge"):
        check_called(model, torch.ones(2, 4))
    with pytest.raises(ValueError, match="no adapter is in use in this Linear"):
        check_called(nn.Linear(4, 4), torch.ones(2, 4))


def test_check_called_finds_a_frozen_adapter_that_is_called():
    inject(model := Skips(), config("one"))
    model.requires_grad_(False)
    assert check_called(model, torch.ones(2, 4)) == []
    assert not any(p.requires_grad for p in model.parameters())


def test_training_names_them():
    model, tokenizer = load_base("tiny")
    rows = encode(load_dataset("devils_dictionary")[:4], tokenizer, max_length=16)
    skipped = model.model.layers[1]
    inject(model, config("q_proj", "v_proj"))
    skipped.forward = lambda x, *args, **kwargs: x
    with pytest.warns(UserWarning, match=r"2 adapted layers got no gradient.*model.layers.1.self_attn.q_proj") as seen:
        train(model, rows, steps=2, batch_size=2)
    assert sum("got no gradient" in str(warning.message) for warning in seen) == 1
    assert check_called(model, {"input_ids": IDS}) == [f"model.layers.1.self_attn.{x}_proj" for x in "qv"]


# Weights that are not there


def small_llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(**SMALL, intermediate_size=24, num_attention_heads=2, num_key_value_heads=2)
    ).eval()


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_weights(where, tmp_path):
    inject(trained := small_llama(), config("q_proj"))
    save_adapter(trained, tmp_path / "adapter")
    model = small_llama()
    plain = model(IDS).logits
    cpu_offload(model, "cpu") if where == "cpu" else disk_offload(model, tmp_path / "weights", "cpu")
    offloaded = r"'model.layers.0.self_attn.q_proj' has its weight offloaded .* load the model without offloading"
    refused(model, "q_proj", message=offloaded)
    with pytest.raises(ValueError, match=offloaded):
        load_adapter(model, tmp_path / "adapter")
    assert list_adapters(model) == []
    assert torch.equal(model(IDS).logits, plain)


def test_one_offloaded_layer_is_no_reason_to_refuse_the_others():
    model = small_llama()
    cpu_offload(model.model.layers[0], "cpu")
    refused(model, "q_proj", message="'model.layers.0.self_attn.q_proj' has its weight offloaded")
    assert len(inject(model, config("layers.1.self_attn.q_proj")).replaced) == 1
    assert check_called(model, BATCH) == []


def test_a_trained_copy_of_an_offloaded_module():
    model = small_llama()
    cpu_offload(model.lm_head, "cpu")
    with pytest.raises(ValueError, match="'lm_head' has its weight offloaded"):
        inject(model, config("q_proj", modules_to_save=["lm_head"]))
    assert list_adapters(model) == []


def test_a_trained_bias_of_an_offloaded_module():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    cpu_offload(model[1], "cpu")
    with pytest.raises(ValueError, match="'1' has its weight offloaded"):
        inject(model, config("0", bias="all"))
    assert list_adapters(model) == []
    inject(model, config("0", bias="lora_only"))


def test_a_model_that_was_offloaded_afterwards(tmp_path):
    inject(model := small_llama(), config("q_proj"))
    adapted = model(IDS).logits
    cpu_offload(model, "cpu")
    torch.testing.assert_close(model(IDS).logits, adapted)
    with pytest.raises(ValueError, match=r"the weight is offloaded .*: merge in a model that was loaded without"):
        merge(model)
    with pytest.raises(ValueError, match=r"the adapter is offloaded .*: call save_adapter before"):
        save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    torch.testing.assert_close(model(IDS).logits, adapted)


def test_a_model_on_the_meta_device_can_be_counted():
    with torch.device("meta"):
        model = small_llama()
    report = inject(model, config("q_proj", "v_proj", modules_to_save=["lm_head"]))
    assert report.trainable == 2 * 2 * 2 * (16 + 16) + 31 * 16


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
@pytest.mark.parametrize("targets", [["q_proj"], ["embed_tokens"]])
def test_weights_that_are_packed(dtype, targets):
    model = small_llama()
    for module in (model.model.layers[0].self_attn.q_proj, model.model.embed_tokens):
        module.weight = nn.Parameter(module.weight.detach().to(dtype), requires_grad=False)
    before = list(model.parameters())
    with pytest.raises(TypeError, match=rf"keeps its weight packed as {dtype}.*: load the model unquantised"):
        inject(model, config(*targets))
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    assert list_adapters(model) == []
