"""Corners at which two libraries may part: each was once a difference, found by comparing with PEFT."""

import contextlib
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from shapes import batch_for, moved, relative_error, tiny_model
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertForQuestionAnswering, BertForTokenClassification

from lora_edu import (
    LoraConfig,
    LoRALinear,
    count_parameters,
    disable_adapter,
    inject,
    load_adapter,
    merge_and_unload,
    save_adapter,
    set_adapter,
)

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
]


def logits(model, shape):
    return model.eval()(**batch_for(shape, model)).logits.detach()


def with_peft(model, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return moved(peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=False, **options)))


def assert_files_cross(shape, tmp_path, **options):
    """What we write PEFT reads, and the other way round, to the same logits; and the counts agree."""
    ours = tiny_model(shape)
    report = inject(ours, LoraConfig(**options))
    save_adapter(moved(ours), tmp_path / "ours")
    theirs = with_peft(tiny_model(shape), **options)
    assert (report.trainable, report.total) == theirs.get_nb_trainable_parameters()
    read = peft.PeftModel.from_pretrained(tiny_model(shape), tmp_path / "ours")
    assert relative_error(logits(read, shape), logits(ours, shape)) <= 1e-5
    theirs.save_pretrained(tmp_path / "theirs")
    load_adapter(again := tiny_model(shape), tmp_path / "theirs")
    assert relative_error(logits(again, shape), logits(theirs, shape)) <= 1e-5


def test_the_order_of_patterns_survives_the_file(tmp_path):
    """The first pattern that fits counts; a sorted file would put the general one first."""
    ours = tiny_model("llama")
    options = {"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"v_proj": 20, ".*": 5}}
    inject(ours, LoraConfig(**options))
    save_adapter(moved(ours), tmp_path)
    load_adapter(again := tiny_model("llama"), tmp_path)
    assert torch.equal(logits(again, "llama"), logits(ours, "llama"))
    theirs = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    assert relative_error(logits(theirs, "llama"), logits(ours, "llama")) <= 1e-5


def test_names_to_save_are_plain_endings(tmp_path):
    """PEFT's ``key.endswith``: "norm" also means input_layernorm."""
    assert_files_cross("llama", tmp_path, target_modules=["q_proj"], modules_to_save=["norm"])


def test_biases_and_a_saved_head(tmp_path):
    assert_files_cross("bert", tmp_path, target_modules=["query"], modules_to_save=["classifier"], bias="all")


@pytest.mark.errors
@pytest.mark.parametrize("part", ["original_module", "modules_to_save"])
def test_what_a_file_repeats_must_be_the_same(part, tmp_path):
    """PEFT writes the head's trained bias once more, and its pretrained one, which the trained copy replaces anyway."""
    theirs = with_peft(tiny_model("bert"), target_modules=["query"], modules_to_save=["classifier"], bias="all")
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    (key,) = [key for key in tensors if f"classifier.{part}." in key and key.endswith("bias")]
    tensors[key] = tensors[key] + 1
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    refused = pytest.raises(ValueError, match="have no place in this model")
    with refused if part == "modules_to_save" else contextlib.nullcontext():
        load_adapter(tiny_model("bert"), tmp_path)


def test_a_tied_bias_trains_under_all_its_names(tmp_path):
    """BertForMaskedLM has one bias at cls.predictions and at its decoder."""

    def fresh():
        torch.manual_seed(0)
        small = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
        return BertForMaskedLM(BertConfig(**small, num_hidden_layers=1))

    ids = torch.arange(8).reshape(2, 4)
    options = {"target_modules": ["query"], "bias": "all"}
    ours = fresh()
    report = inject(ours, LoraConfig(**options))
    theirs = with_peft(fresh(), **options)
    assert (report.trainable, report.total) == theirs.get_nb_trainable_parameters()
    ours(ids, labels=ids).loss.backward()
    assert ours.cls.predictions.decoder.bias.grad.abs().sum() > 0
    save_adapter(moved(ours), tmp_path)
    read = peft.PeftModel.from_pretrained(fresh(), tmp_path)
    assert relative_error(read.eval()(ids).logits, ours.eval()(ids).logits) <= 1e-5


@pytest.mark.parametrize("targets", [["query"], "all-linear", ["query", "classifier"]])
def test_the_head_of_a_task_is_trained_and_saved(targets, tmp_path):
    """PEFT adds the head to modules_to_save without being asked; a target of that name gives way to it."""
    assert_files_cross("bert", tmp_path, target_modules=targets, task_type="SEQ_CLS")
    config = LoraConfig(target_modules=targets, task_type="SEQ_CLS")
    inject(model := tiny_model("bert"), config)
    assert model.classifier.copies["default"].weight.requires_grad
    assert config.modules_to_save is None  # the caller's config is left alone


@pytest.mark.parametrize(
    ("task_type", "family"), [("TOKEN_CLS", BertForTokenClassification), ("QUESTION_ANS", BertForQuestionAnswering)]
)
def test_the_heads_of_other_tasks(task_type, family, tmp_path):
    def fresh():
        torch.manual_seed(0)
        return family(
            BertConfig(vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
        )

    options = {"target_modules": ["query"], "task_type": task_type}
    report = inject(ours := fresh(), LoraConfig(**options))
    theirs = with_peft(fresh(), **options)
    assert (report.trainable, report.total) == theirs.get_nb_trainable_parameters()
    save_adapter(moved(ours), tmp_path)
    read = peft.PeftModel.from_pretrained(fresh(), tmp_path)
    ids = torch.arange(12).reshape(2, 6)
    assert relative_error(read.eval()(ids)[0], ours.eval()(ids)[0]) <= 1e-5


@pytest.mark.parametrize("targets", [["q_proj"], "all-linear"])
def test_a_task_type_without_a_head(targets, tmp_path):
    """PEFT would look for the head in the file; we say no task type then, and name the layers."""
    ours = tiny_model("llama")
    inject(ours, LoraConfig(target_modules=targets, task_type="SEQ_CLS"))
    save_adapter(moved(ours), tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    assert relative_error(logits(theirs, "llama"), logits(ours, "llama")) <= 1e-5
    load_adapter(again := tiny_model("llama"), tmp_path)
    assert torch.equal(logits(again, "llama"), logits(ours, "llama"))


def test_embeddings_saved_on_request(tmp_path):
    theirs = with_peft(tiny_model("llama"), target_modules=["q_proj"])
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    load_adapter(ours := tiny_model("llama"), tmp_path)
    assert relative_error(logits(ours, "llama"), logits(theirs, "llama")) <= 1e-5


@pytest.mark.parametrize("options", [{"layers_to_transform": [0]}, {"layers_pattern": "layers"}])
def test_numbers_of_layers_go_with_lists_only(options):
    for config_type in (LoraConfig, peft.LoraConfig):
        with pytest.raises(ValueError, match="layers_"):
            config_type(target_modules="all-linear", **options)


def test_sets_can_be_saved(tmp_path):
    ours = tiny_model("llama")
    options = {"exclude_modules": {"v_proj"}, "modules_to_save": {"lm_head"}, "layers_to_transform": range(1)}
    inject(ours, LoraConfig(target_modules={"q_proj", "v_proj"}, **options))
    save_adapter(moved(ours), tmp_path)
    load_adapter(again := tiny_model("llama"), tmp_path)
    assert torch.equal(logits(again, "llama"), logits(ours, "llama"))


def test_a_second_adapter_leaves_what_trains_alone(tmp_path):
    save_adapter(model := _two_of_bert(tmp_path), tmp_path / "a", adapter_name="a")
    load_adapter(loaded := tiny_model("bert"), tmp_path / "a", adapter_name="a")
    load_adapter(loaded, tmp_path / "a", adapter_name="b")
    assert count_parameters(loaded)[0] == 0
    assert count_parameters(model)[0] > 0


def _two_of_bert(tmp_path):
    model = tiny_model("bert")
    for name in ("a", "b"):
        inject(model, LoraConfig(target_modules=["query"], modules_to_save=["classifier"]), adapter_name=name)
        set_adapter(model, name)
        moved(model)
    return model


def test_two_trained_heads_cannot_be_active_at_once(tmp_path):
    model = _two_of_bert(tmp_path)
    before = logits(model, "bert")
    with pytest.raises(ValueError, match=r"classifier.* is trained by each of \['a', 'b'\]"):
        set_adapter(model, ["a", "b"])
    assert torch.equal(logits(model, "bert"), before)


def test_disabling_nests():
    base = logits(tiny_model("bert"), "bert")
    model = tiny_model("bert")
    inject(model, LoraConfig(target_modules=["query"], modules_to_save=["classifier"], bias="all"))
    trained = logits(moved(model), "bert")
    with disable_adapter(model):
        with disable_adapter(model):
            assert torch.equal(logits(model, "bert"), base)
        assert torch.equal(logits(model, "bert"), base)
    assert torch.equal(logits(model, "bert"), trained)


@pytest.mark.errors
def test_a_name_that_is_taken_by_a_layer_put_in_by_hand():
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6))
    model[0] = LoRALinear(model[0], r=2)
    with pytest.raises(ValueError, match="already have an adapter named 'default'"):
        inject(model, LoraConfig(r=2, target_modules=["0", "1"]))


@pytest.mark.errors
def test_a_name_that_a_module_dict_cannot_hold():
    model = tiny_model("bert")
    with pytest.raises(ValueError, match="ModuleDict"):
        inject(model, LoraConfig(target_modules=["query"], modules_to_save=["classifier"]), adapter_name="train")
    assert not any(isinstance(module, LoRALinear) for module in model.modules())


@pytest.mark.errors
def test_unloading_a_nested_layer_with_nan_changes_nothing():
    outer = LoRALinear(LoRALinear(nn.Linear(6, 8), r=2, adapter_name="a", init_lora_weights=False), r=2)
    weight = outer.weight.detach().clone()
    with torch.no_grad():
        outer.lora_B.fill_(float("nan"))
    with pytest.raises(ValueError, match="finite"):
        merge_and_unload(outer)
    assert torch.equal(outer.weight, weight)
    assert not outer.base.merged


@pytest.mark.errors
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lora_alpha": "16"}, ValueError, "lora_alpha='16'"),
        ({"lora_alpha": float("nan")}, ValueError, "lora_alpha=nan"),
        ({"rank_pattern": ["q_proj"]}, TypeError, "rank_pattern="),
        ({"alpha_pattern": {"(": 3}}, ValueError, "alpha_pattern='.' is not a regular expression"),
    ],
)
def test_bad_settings(options, error, message):
    with pytest.raises(error, match=message):
        LoraConfig(**options)
