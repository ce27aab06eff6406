"""A batch whose rows belong to different adapters, and values swapped under a running model."""

import copy
import hashlib
import json

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from lora_edu import (
    LoraConfig,
    adapter_names,
    disable_adapter,
    hotswap_adapter,
    inject,
    load_adapter,
    load_base,
    merge,
    save_adapter,
    set_adapter,
)
from lora_edu.core.adapter import AdapterLayer, adapter_layers
from lora_edu.files import data_path
from lora_edu.lab.training import generate
from lora_edu.serving.mixed import BASE, WAYS, gathered_update, grouped_update, rows_of, stack_factors

ROWS = ["b", "a", BASE, "c", "a", "b"]


def llama(dtype=torch.float64):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=53, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def with_adapters(model=None):
    """Three adapters of different ranks, scales and targets; c adapts the embedding and the head too."""
    model = llama() if model is None else model
    settings = {
        "a": {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"]},
        "b": {"r": 4, "lora_alpha": 9, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
        "c": {"r": 2, "lora_alpha": 2, "target_modules": ["embed_tokens", "down_proj", "lm_head"]},
    }
    for name, given in settings.items():
        inject(model, LoraConfig(init_lora_weights=False, **given), adapter_name=name)
    return model.eval()


def ids(rows=6):
    return torch.randint(0, 53, (rows, 7), generator=torch.Generator().manual_seed(1))


def alone(model, name, x):
    """The logits of rows that all belong to one adapter."""
    if name == BASE:
        with disable_adapter(model):
            return model(x).logits.detach()
    set_adapter(model, name)
    return model(x).logits.detach()


def row_by_row(model, names, x):
    return torch.cat([alone(model, name, x[i : i + 1]) for i, name in enumerate(names)])


@pytest.mark.parametrize("way", WAYS)
def test_each_row_is_that_of_its_own_adapter(way):
    model = with_adapters()
    expected = row_by_row(model, ROWS, ids())
    with adapter_names(model, ROWS, way):
        found = model(ids()).logits
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)
    assert all(not torch.allclose(expected[0], expected[i]) for i in (1, 2, 3))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("merged", [None, "a", ["a", "b"]])
def test_active_and_merged_make_no_difference_and_come_back(way, merged):
    model = with_adapters()
    expected = row_by_row(model, ROWS, ids())
    set_adapter(model, ["a", "b"] if isinstance(merged, list) else "a")
    if merged:
        merge(model, merged)
    before = model(ids()).logits
    with adapter_names(model, ROWS, way):
        assert torch.allclose(model(ids()).logits, expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(model(ids()).logits, before)


def test_hooks_are_gone_after_an_error():
    model = with_adapters()
    expected = alone(model, "a", ids())
    with pytest.raises(ZeroDivisionError), adapter_names(model, ROWS):
        raise ZeroDivisionError
    assert torch.equal(alone(model, "a", ids()), expected)
    assert not any(module._forward_hooks for module in model.modules())


def test_only_one_adapter_present_is_that_adapter():
    model = with_adapters()
    with adapter_names(model, ["b"] * 4):
        found = model(ids(4)).logits
    assert torch.allclose(found, alone(model, "b", ids(4)), rtol=1e-12)


@pytest.mark.parametrize("way", WAYS)
def test_half_precision_bases_keep_their_dtype(way):
    model = with_adapters(llama(torch.bfloat16))
    with adapter_names(model, ROWS, way):
        found = model(ids()).logits
    assert found.dtype == torch.bfloat16
    expected = row_by_row(model, ROWS, ids()).float()
    assert (found.float() - expected).norm() / expected.norm() < 1e-2


@pytest.mark.parametrize("way", WAYS)
def test_copies_of_heads_answer_their_own_rows(way):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=53, hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4, num_labels=3
    )
    model = BertForSequenceClassification(config).double().eval()
    for name in ("a", "b"):
        given = LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"], init_lora_weights=False)
        inject(model, given, adapter_name=name)
        with torch.no_grad():
            model.classifier.copies[name].weight.add_(torch.randn(3, 24))
    names = ["b", BASE, "a", "b"]
    expected = row_by_row(model, names, ids(4))
    with adapter_names(model, names, way):
        assert torch.allclose(model(ids(4)).logits, expected, rtol=1e-9)


def test_generation_in_a_mixed_batch():
    model, tokenizer = load_base("tiny", dtype=torch.float64)
    for seed, name in enumerate(("a", "b")):
        torch.manual_seed(seed)
        inject(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False), adapter_name=name)
        with torch.no_grad():
            for layer in adapter_layers(model, name).values():
                layer.lora_B.mul_(0.3)
    prompts = ["politician (noun):", "computer (noun):", "a (noun):", "history (noun):"]
    names = ["a", "b", BASE, "b"]
    with adapter_names(model, names):
        together = generate(model, tokenizer, prompts, max_new_tokens=12)
    for prompt, name, text in zip(prompts, names, together, strict=True):
        if name == BASE:
            with disable_adapter(model):
                assert generate(model, tokenizer, [prompt], max_new_tokens=12) == [text]
        else:
            set_adapter(model, name)
            assert generate(model, tokenizer, [prompt], max_new_tokens=12) == [text]


def test_the_pieces_by_hand():
    model = with_adapters()
    layers = {each.adapter_name: each for each in (model.model.layers[0].self_attn.q_proj,)}
    layers["a"] = model.model.layers[0].self_attn.q_proj.base
    x = torch.randn(4, 5, 24, dtype=torch.float64)
    names = ["b", BASE, "a", "b"]
    expected = torch.stack(
        [layers[n].update(r) if n in layers else torch.zeros(5, 24) for n, r in zip(names, x, strict=True)]
    )
    assert {name: rows.tolist() for name, rows in rows_of(names).items()} == {"b": [0, 3], "a": [2]}
    assert torch.allclose(grouped_update(x, layers, names, like=x), expected)
    a, b = stack_factors(layers)
    assert a.shape == (3, 4, 24)
    assert b.shape == (3, 24, 4)
    number = {name: i for i, name in enumerate(layers)}
    chosen = torch.tensor([number.get(name, 2) for name in names])
    assert torch.allclose(gathered_update(x, a, b, chosen), expected)
    assert torch.allclose(gathered_update(x[:, 0], a, b, chosen), expected[:, 0])  # rows without a length
    deep = x.reshape(4, 5, 1, 24)
    assert torch.allclose(gathered_update(deep, a, b, chosen), expected.reshape(4, 5, 1, 24))


@pytest.mark.errors
def test_what_is_refused():
    model = with_adapters()
    with pytest.raises(KeyError, match="no adapter named 'd'; this model has: __base__, a, b, c"), \
            adapter_names(model, ["a", "d"]):  # fmt: skip
        pass
    with pytest.raises(ValueError, match="way='fast'"), adapter_names(model, ROWS, "fast"):
        pass
    with pytest.raises(ValueError, match="names is empty"), adapter_names(model, []):
        pass
    with pytest.raises(ValueError, match=r"6 rows .* 2 adapter names"), adapter_names(model, ["a", "b"]):
        model(ids())
    with pytest.raises(ValueError, match="training mode"), adapter_names(model.train(), ROWS):
        pass
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(ValueError, match="has no adapters"), adapter_names(llama(), ROWS):
        pass


@pytest.mark.errors
def test_trained_biases_are_refused():
    model = nn.Sequential(nn.Linear(5, 4))
    inject(model, LoraConfig(r=2, target_modules=["0"], bias="all"))
    with (
        pytest.raises(ValueError, match=r"TrainedBias \(0\.bias\), which is the same for all rows"),
        adapter_names(model.eval(), ["default"]),
    ):
        pass


@pytest.mark.errors
def test_a_method_that_does_not_add_is_refused():
    class Other(AdapterLayer):
        def forward(self, x):
            return self.base(x)

    model = nn.Sequential(Other(nn.Linear(5, 4))).eval()
    with pytest.raises(ValueError, match="Other"), adapter_names(model, ["default"]):
        pass
    assert model[0].active


# ------------------------------------------------------------------------------------------------- hot-swapping


def saved(folder, **changes):
    """A random adapter on disk, and the logits with it."""
    torch.manual_seed(7)
    model = llama()
    settings = {"r": 3, "lora_alpha": 11, "target_modules": ["q_proj", "down_proj"]} | changes
    inject(model, LoraConfig(init_lora_weights=False, **settings))
    save_adapter(model, folder)
    return model(ids()).logits.detach()


def test_swapped_values_and_scale_in_the_same_parameters(tmp_path):
    expected = saved(tmp_path)
    model = with_adapters()
    others = {name: alone(model, name, ids()) for name in ("b", "c")}
    before = {name: (p, p.data_ptr()) for name, p in model.named_parameters()}
    hotswap_adapter(model, tmp_path, "a")
    assert torch.allclose(alone(model, "a", ids()), expected, rtol=1e-12)
    for name, logits in others.items():
        assert torch.equal(alone(model, name, ids()), logits)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is p and p.data_ptr() == place for name, (p, place) in before.items())
    save_adapter(model, tmp_path / "again", "a")
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["lora_alpha"] == 11


def test_swapping_keeps_active_and_trainable(tmp_path):
    saved(tmp_path)
    model = with_adapters()
    set_adapter(model, "b")
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    expected = alone(model, "b", ids())
    hotswap_adapter(model, tmp_path, "a")
    assert torch.equal(model(ids()).logits, expected)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trains


def test_biases_and_heads_are_swapped_too(tmp_path):
    def built(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        given = {"target_modules": ["0"], "bias": "lora_only", "modules_to_save": ["2"]}
        inject(model, LoraConfig(r=2, init_lora_weights=False, **given))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter))
        return model.eval()

    torch.manual_seed(3)
    x = torch.randn(4, 5, dtype=torch.float64)
    one, other = built(0), built(1)
    other[0].frozen.weight.data.copy_(one[0].frozen.weight)
    save_adapter(one, tmp_path)
    assert not torch.allclose(other(x), one(x))
    hotswap_adapter(other, tmp_path)
    assert torch.allclose(other(x), one(x))


@pytest.mark.errors
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"r": 4}, "has shape"),
        ({"target_modules": ["q_proj"]}, "tensors are missing"),
        ({"target_modules": ["q_proj", "v_proj", "down_proj"]}, "have no place"),
        ({"rank_pattern": {"down_proj": 2}}, "has shape"),
    ],
)
def test_a_file_that_does_not_fit_changes_nothing(tmp_path, changes, words):
    saved(tmp_path, **changes)
    model = with_adapters()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=words):
        hotswap_adapter(model, tmp_path, "a")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert alone(model, "a", ids()).isfinite().all()
    assert adapter_layers(model, "a")["model.layers.0.self_attn.q_proj"].scaling == 5 / 3


@pytest.mark.errors
def test_swapping_is_refused(tmp_path):
    saved(tmp_path)
    model = with_adapters()
    with pytest.raises(KeyError, match="no adapter named 'd'"):
        hotswap_adapter(model, tmp_path, "d")
    with pytest.raises(FileNotFoundError, match="no such directory"):
        hotswap_adapter(model, tmp_path / "nowhere", "a")
    set_adapter(model, "a")
    merge(model)
    with pytest.raises(ValueError, match="is merged"):
        hotswap_adapter(model, tmp_path, "a")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": True}))
    with pytest.raises(ValueError, match="is an adapter of method DoRA, and the one to be replaced is of LoRA"):
        hotswap_adapter(with_adapters(), tmp_path, "a")


def test_the_shipped_adapter_is_the_one_that_log_and_readme_name():
    log = json.loads(data_path("runs", "tiny_jargon.json").read_text(encoding="utf-8"))
    readme = data_path("README.md").read_text(encoding="utf-8")
    folder = "adapters/tiny-jargon"
    for name in (f"{folder}/adapter_config.json", f"{folder}/adapter_model.safetensors", "runs/tiny_jargon.json"):
        assert f"| `{name}` | `{hashlib.sha256(data_path(name).read_bytes()).hexdigest()}` |" in readme
    weights = data_path("adapters", "tiny-jargon", "adapter_model.safetensors").read_bytes()
    assert log["sha256"] == hashlib.sha256(weights).hexdigest()


def test_shipped_adapters_can_be_swapped():
    model, _ = load_base("tiny")
    load_adapter(model, data_path("adapters", "tiny-devils-dictionary"))
    other, _ = load_base("tiny")
    load_adapter(other, data_path("adapters", "tiny-jargon"))
    hotswap_adapter(model, data_path("adapters", "tiny-jargon"))
    x = torch.arange(12).reshape(2, 6)
    assert torch.equal(model(x).logits, other(x).logits)
