"""Injection into whole models: names, sharing, ties, several adapters, heads and biases, what trains."""

import copy

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lora_edu import (
    LoraConfig,
    LoRALinear,
    count_parameters,
    disable_adapter,
    inject,
    list_adapters,
    load_adapter,
    merge,
    merge_and_unload,
    save_adapter,
    set_adapter,
    unmerge,
)
from lora_edu.core.adapter import AdapterLayer, adapter_layers
from lora_edu.core.matching import named_places

IDS = torch.tensor([[1, 5, 7, 2], [3, 3, 9, 8]])


def llama(tied=False):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def shake(model, adapter_name="default"):
    """Give an adapter's B (or A, for embeddings) random values, so that it does something."""
    torch.manual_seed(7)
    with torch.no_grad():
        for layer in adapter_layers(model, adapter_name).values():
            for parameter in layer.adapter_parameters():
                parameter.normal_(std=0.3)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def test_report_names_and_counts():
    model = llama()
    report = inject(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    assert report.replaced == [f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qv"]
    assert report.trainable == 4 * 2 * (16 + 16)
    assert (report.trainable, report.total) == count_parameters(model)
    assert str(report).startswith("adapted 4 layers; trainable 256 of ")


def test_injecting_changes_no_output_and_freezes_the_rest():
    model = llama()
    before = logits(model)
    inject(model, LoraConfig(target_modules="all-linear"))
    assert torch.equal(logits(model), before)
    assert {name.rsplit(".", 1)[-1] for name, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert type(model.lm_head) is nn.Linear


def test_new_layers_follow_the_mode_of_the_model():
    model = llama()
    inject(model, LoraConfig(target_modules=["q_proj"], lora_dropout=0.5))
    assert not any(layer.training for layer in adapter_layers(model).values())
    assert torch.equal(logits(model), logits(model))


class Shared(nn.Module):
    """One linear layer registered under two names, in one parent and in two."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(5, 5))
        self.first = self.encoder[0]
        self.second = self.encoder[0]
        self.other = nn.Linear(5, 5)

    def forward(self, x):
        return self.other(self.second(self.first(self.encoder(x))))


@pytest.mark.parametrize("targets", [["first"], ["second"], ["encoder.0"], ["first", "second"]], ids=str)
def test_a_module_with_two_names_is_adapted_on_both_paths_and_counted_once(targets, tmp_path):
    torch.manual_seed(0)
    model = Shared().double()
    plain = copy.deepcopy(model)
    report = inject(model, LoraConfig(r=2, target_modules=targets))
    assert model.first is model.second is model.encoder[0]
    assert isinstance(model.first, LoRALinear)
    assert report.replaced == ["encoder.0"]
    assert report.trainable == 2 * (5 + 5)
    assert report.total == 2 * (5 * 5 + 5) + 20
    shake(model)
    x = torch.randn(3, 5, dtype=torch.float64)
    adapted = model(x)
    weight = plain.first.weight + model.first.delta_weight()
    step = lambda x: nn.functional.linear(x, weight, plain.first.bias)  # noqa: E731
    assert torch.allclose(adapted, plain.other(step(step(step(x)))), rtol=1e-12)
    save_adapter(model, tmp_path)
    load_adapter(plain, tmp_path)
    assert torch.equal(plain(x), adapted)
    merged = merge_and_unload(model)
    assert merged.first is merged.second is merged.encoder[0]
    assert torch.allclose(merged(x), adapted, rtol=1e-12)


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens", "q_proj"]], ids=str)
def test_tied_weights_stay_apart(targets):
    """An adapter on one end of a tie changes that end only, merged or not; PEFT's merge changes both."""
    model = llama(tied=True)
    table = model.model.embed_tokens.weight
    before = table.detach().clone()
    assert model.lm_head.weight is table
    inject(model, LoraConfig(r=2, target_modules=targets))
    shake(model)
    adapted = logits(model)
    merge(model)
    assert torch.allclose(logits(model), adapted, rtol=1e-10)
    assert torch.equal(table, before)
    unmerge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight is table
    with pytest.warns(UserWarning, match="tie_word_embeddings is set to False"):
        plain = merge_and_unload(model)
    assert torch.allclose(logits(plain), adapted, rtol=1e-10)
    assert plain.config.tie_word_embeddings is False


@pytest.mark.parametrize(
    "settings",
    [{"target_modules": ["lm_head"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}],
    ids=["adapted", "saved"],
)
def test_a_head_that_was_tied_survives_saving_the_whole_model(settings, tmp_path):
    model = llama(tied=True)
    inject(model, LoraConfig(r=2, **settings))
    shake(model)
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        plain = merge_and_unload(model)
    plain.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.allclose(logits(again), logits(plain), rtol=1e-10)


def test_disabling_a_whole_reaches_the_biases_of_a_part():
    model = llama()
    base = logits(model)
    inject(model.model, LoraConfig(r=2, target_modules=["q_proj"], bias="all"))
    shake(model)
    adapted = logits(model)
    with disable_adapter(model):
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), adapted)


def test_several_adapters():
    model = llama()
    base = logits(model)
    inject(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]), "a")
    shake(model, "a")
    only_a = logits(model)
    inject(model, LoraConfig(r=3, target_modules=["v_proj", "down_proj"]), "b")
    shake(model, "b")
    assert list_adapters(model) == ["a", "b"]
    assert torch.equal(logits(model), only_a)  # later adapters wait
    set_adapter(model, "b")
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert trainable == {id(p) for layer in adapter_layers(model, "b").values() for p in layer.adapter_parameters()}
    only_b = logits(model)
    assert not torch.allclose(only_b, only_a)
    with disable_adapter(model):
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), only_b)
    alone = llama()
    inject(alone, LoraConfig(r=3, target_modules=["v_proj", "down_proj"]), "b")
    shake(alone, "b")
    assert torch.equal(logits(alone), only_b)
    set_adapter(model, ["a", "b"])
    both = logits(model)
    merge(model, ["a"])
    assert torch.allclose(logits(model), both, rtol=1e-10)  # b keeps adding
    with pytest.raises(ValueError, match="merged into the weights: call unmerge"):
        set_adapter(model, "b")
    with pytest.raises(ValueError, match="an adapter is merged: call unmerge"):
        inject(model, LoraConfig(target_modules=["q_proj"]), "c")
    merge(model)
    assert torch.allclose(logits(model), both, rtol=1e-10)
    with disable_adapter(model):
        assert torch.equal(logits(model), base)
    assert torch.allclose(logits(model), both, rtol=1e-10)
    unmerge(model, "b")
    assert torch.allclose(logits(model), both, rtol=1e-10)
    unmerge(model)
    set_adapter(model, "a")
    assert torch.equal(logits(model), only_a)


def test_all_linear_finds_layers_that_are_adapted_already():
    model = llama()
    first = inject(model, LoraConfig(r=2, target_modules="all-linear"), "a")
    second = inject(model, LoraConfig(r=2, target_modules="all-linear"), "b")
    assert first.replaced == second.replaced
    assert len(first.replaced) == 14


def test_files_of_nested_adapters_hold_one_adapter_each(tmp_path):
    model = llama()
    for name in "ab":
        inject(model, LoraConfig(r=2, target_modules=["q_proj"]), name)
        set_adapter(model, name)
        torch.manual_seed(ord(name))
        with torch.no_grad():
            for layer in adapter_layers(model, name).values():
                layer.lora_B.normal_()
    for name in "ab":
        set_adapter(model, name)
        save_adapter(model, tmp_path / name, name)
        fresh = llama()
        load_adapter(fresh, tmp_path / name, "renamed")
        assert torch.equal(logits(fresh), logits(model))
        assert list_adapters(fresh) == ["renamed"]


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 5)
        self.score = nn.Linear(5, 3)

    def forward(self, x):
        return self.score(torch.tanh(self.body(x)))


def test_a_trained_head_is_saved_switched_and_unloaded(tmp_path):
    torch.manual_seed(0)
    model, x = Classifier(), torch.randn(4, 6)
    base, head = model(x), model.score
    report = inject(model, LoraConfig(r=2, target_modules=["body"], modules_to_save=["score"]))
    assert report.trainable == 2 * (6 + 5) + (5 * 3 + 3)
    assert model.score.out_features == 3
    assert model.score.weight is model.score.copies["default"].weight
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    trained = model(x)
    assert not torch.allclose(trained, base)
    with disable_adapter(model):
        assert torch.equal(model(x), base)
    save_adapter(model, tmp_path)
    torch.manual_seed(0)
    fresh = Classifier()
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(x), trained)
    inject(model, LoraConfig(r=2, target_modules=["body"]), "plain")
    set_adapter(model, "plain")
    assert torch.equal(model(x), base)  # this adapter has no head of its own
    set_adapter(model, "default")
    plain = merge_and_unload(model)
    assert type(plain.score) is nn.Linear
    assert plain.score is not head
    assert torch.allclose(plain(x), trained, rtol=1e-5)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_switch_with_their_adapter(bias, tmp_path):
    torch.manual_seed(0)
    model, x = Classifier(), torch.randn(4, 6)
    base = model(x)
    report = inject(model, LoraConfig(r=2, target_modules=["body"], bias=bias))
    assert report.trainable == 2 * (6 + 5) + 5 + (3 if bias == "all" else 0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2)
    trained = model(x)
    save_adapter(model, tmp_path)
    with disable_adapter(model):
        assert torch.equal(model(x), base)
    assert torch.equal(model(x), trained)
    with pytest.raises(ValueError, match="adapter 'default' trains biases already"):
        inject(model, LoraConfig(target_modules=["score"], bias="all"), "second")
    inject(model, LoraConfig(target_modules=["score"]), "second")
    set_adapter(model, "second")
    assert torch.equal(model(x), base)
    torch.manual_seed(0)
    fresh = Classifier()
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(x), trained)
    set_adapter(model, "default")
    assert torch.allclose(merge_and_unload(model)(x), trained, rtol=1e-5)


def test_a_failed_merge_leaves_every_layer_as_it_was():
    model = llama()
    inject(model, LoraConfig(r=2, target_modules=["q_proj"]))
    shake(model)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.lora_A[0, 0] = float("nan")
    with pytest.raises(ValueError, match="infinite or NaN"):
        merge(model)
    assert all(torch.equal(weights[n], t) for n, t in model.state_dict().items() if "lora" not in n)
    assert not any(layer.merged for layer in adapter_layers(model).values())


def test_unloading_leaves_the_plain_model():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2)).double().eval()
    names = [name for name, _ in model.named_modules()]
    inject(model, LoraConfig(r=2))
    shake(model)
    adapted = logits(model)
    plain = merge_and_unload(model)
    assert plain is model
    assert [name for name, _ in plain.named_modules()] == names
    assert list_adapters(plain) == []
    assert torch.allclose(logits(plain), adapted, rtol=1e-10)
    layer = LoRALinear(base := nn.Linear(3, 4), r=2, init_lora_weights=False)
    x = torch.randn(2, 3)
    adapted = layer(x)
    assert merge_and_unload(layer) is base
    assert torch.allclose(base(x), adapted, atol=1e-6)


def test_a_copied_model_is_independent():
    model = llama()
    inject(model, LoraConfig(r=2, target_modules=["q_proj"], bias="all"))
    shake(model)
    twin = copy.deepcopy(model)
    before = logits(model)
    merge(twin)
    set_adapter(model, "default")
    with disable_adapter(twin):
        pass
    assert torch.equal(logits(model), before)
    assert not any(layer.merged for layer in adapter_layers(model).values())


def test_no_name_shows_the_wrappers():
    model = llama()
    for name in "ab":
        inject(model, LoraConfig(r=2, target_modules=["q_proj"]), name)
    assert all(".base" not in name for name in adapter_layers(model))
    assert all(isinstance(layer, AdapterLayer) for layer in adapter_layers(model).values())


class Cyclic(nn.Module):
    """A module that holds its owner, as agents and trainers do."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.helper = nn.Module()
        self.helper.proj = nn.Linear(4, 4)
        self.helper.owner = self

    def forward(self, x):
        return self.helper.proj(self.proj(x))


def test_modules_that_hold_each_other(tmp_path):
    torch.manual_seed(0)
    model, x = Cyclic(), torch.randn(3, 4)
    assert [name for name, _, _, _ in named_places(model)] == ["proj", "helper", "helper.proj", "helper.owner"]
    report = inject(model, LoraConfig(r=2, target_modules=["proj"], init_lora_weights=False))
    assert report.replaced == ["proj", "helper.proj"]
    adapted = model(x)
    save_adapter(model, tmp_path)
    torch.manual_seed(0)
    load_adapter(again := Cyclic(), tmp_path)
    assert torch.equal(again(x), adapted)
    merge(model)
    assert torch.allclose(model(x), adapted, atol=1e-6)
    assert type(merge_and_unload(model).helper.proj) is nn.Linear


def test_a_module_that_holds_itself_at_once():
    model = nn.Sequential(nn.Linear(4, 4))
    model.me = model
    assert inject(model, LoraConfig(r=2, target_modules=["0"])).replaced == ["0"]


def test_layers_wrapped_by_hand_merge_and_switch_off_too(tmp_path):
    torch.manual_seed(0)
    model, x = Classifier(), torch.randn(4, 6)
    base = model(x)
    model.body = LoRALinear(model.body, r=2, init_lora_weights=False)
    adapted = model(x)
    for whole, run in ((model, lambda: model(x)), (model.body, lambda: model(x))):
        with disable_adapter(whole):
            assert torch.equal(run(), base)
        merge(whole)
        model.eval()
        assert torch.allclose(run(), adapted, atol=1e-6)
        unmerge(whole)
        assert torch.equal(run(), adapted)
    with pytest.raises(ValueError, match="put in by hand, so there is no config to save"):
        save_adapter(model, tmp_path)
    assert torch.allclose(merge_and_unload(model)(x), adapted, atol=1e-6)
    assert type(model.body) is nn.Linear
