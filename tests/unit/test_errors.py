"""Bad input: each case raises a clear error, and the model is bit for bit what it was."""

import json
import pickle
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_edu import LoraConfig, LoRALinear, inject, load_adapter, save_adapter, set_adapter
from lora_edu.core.merging import merge
from lora_edu.core.peft_io import CONFIG_FILE, WEIGHTS_FILE

pytestmark = pytest.mark.errors


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(6, 8)
        self.v_proj = nn.Linear(8, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, x):
        return self.norm(self.v_proj(self.q_proj(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block()])
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.layers[0](x))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


@pytest.fixture
def unchanged(model):
    """Afterwards the model has the same modules, values and trainable parameters as before."""
    before = {name: (tensor.clone(), tensor.requires_grad) for name, tensor in model.named_parameters()}
    modules = {name: module for name, module in model.named_modules()}
    memory = dict(model.__dict__)
    yield
    assert {name: id(m) for name, m in model.named_modules()} == {name: id(m) for name, m in modules.items()}
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for name, (tensor, requires_grad) in before.items():
        assert torch.equal(after[name], tensor), name
        assert after[name].requires_grad == requires_grad, name
    assert model.__dict__.keys() == memory.keys()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"r": 0}, ValueError, "r=0: the rank must be at least 1"),
        ({"r": -4}, ValueError, "r=-4"),
        ({"r": 2.5}, ValueError, "r=2.5: the rank must be a whole number"),
        ({"r": True}, ValueError, "whole number"),
        ({"r": "8"}, ValueError, "whole number"),
        ({"lora_dropout": 1.5}, ValueError, "lora_dropout=1.5: expected a probability"),
        ({"lora_dropout": -0.1}, ValueError, "lora_dropout=-0.1"),
        ({"lora_dropout": float("nan")}, ValueError, "lora_dropout=nan"),
        ({"lora_dropout": "0.1"}, ValueError, "lora_dropout='0.1'"),
        ({"bias": "some"}, ValueError, "bias='some': expected one of 'none', 'all', 'lora_only'"),
        ({"rank_pattern": {"q_proj": 0}}, ValueError, "r=0"),
        ({"target_modules": 3}, TypeError, "target_modules=3"),
        ({"target_modules": []}, ValueError, "target_modules is empty"),
        ({"target_modules": "(q_proj"}, ValueError, "not a regular expression"),
        ({"target_modules": ["q_proj"], "modules_to_save": "head"}, TypeError, r"expected a list, \['head'\]"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense(options, error, message):
    with pytest.raises(error, match=message):
        LoraConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_porj"]}, r"no module of the Model has such a name; near names: \['q_proj'"),
        ({"target_modules": "q_proj"}, "near names"),  # a string must match the whole name
        ({"target_modules": ["proj"]}, "near names"),  # whole segments only
        ({"target_modules": None}, "no default targets for model type None"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "rule them out"),
        (
            {"target_modules": ["norm"]},
            "is a LayerNorm, which LoRA cannot adapt .it adapts FourBitLinear, Linear, Conv1D, Embedding",
        ),
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["haed"]},
            r"no module has such a name; near names: \['head'",
        ),
        (
            {"target_modules": ["q_proj"], "init_lora_weights": "sunshine"},
            "init_lora_weights='sunshine': no method here serves it",
        ),
        (
            {"target_modules": ["q_proj"], "r": 2, "use_dora": True, "init_lora_weights": "pissa"},
            "init_lora_weights='pissa' with use_dora=True: .* 'gaussian'; take one of these",
        ),
    ],
    ids=str,
)
def test_injections_that_cannot_be(options, message, model, unchanged):
    with pytest.raises(ValueError, match=message):
        inject(model, LoraConfig(**options))


def test_one_adapter_name_twice(model):
    inject(model, LoraConfig(target_modules=["q_proj"]))
    layer = model.layers[0].q_proj
    with pytest.raises(ValueError, match="already has an adapter named 'default'"):
        inject(model, LoraConfig(target_modules=["v_proj"]))
    assert model.layers[0].q_proj is layer
    assert type(model.layers[0].v_proj) is nn.Linear


@pytest.mark.parametrize("name", ["", "a.b", None])
def test_names_that_files_could_not_hold(name, model, unchanged):
    with pytest.raises(ValueError, match="adapter_name="):
        inject(model, LoraConfig(target_modules=["q_proj"]), adapter_name=name)


def test_a_bare_layer_as_the_model():
    layer = nn.Linear(3, 4)
    with pytest.raises(ValueError, match=r"bare Linear.*LoRALinear\(layer\)"):
        inject(layer, LoraConfig(target_modules="all-linear"))
    assert layer.weight.requires_grad


def test_what_is_no_config_and_no_model(model, unchanged):
    with pytest.raises(TypeError, match="expected LoraConfig"):
        inject(model, {"r": 8})
    with pytest.raises(TypeError, match="expected a torch"):
        inject("model", LoraConfig())


def test_a_rank_above_the_layer_warns():
    with pytest.warns(UserWarning, match=r"r=9 is above min\(in, out\) = 6"):
        LoRALinear(nn.Linear(6, 8), r=9)


@pytest.mark.parametrize("options", [{"r": 0}, {"r": 1.5}, {"lora_dropout": 2}, {"init_lora_weights": "best"}], ids=str)
def test_a_layer_refuses_and_leaves_its_base_trainable(options):
    base = nn.Linear(3, 4)
    with pytest.raises(ValueError, match=next(iter(options))):
        LoRALinear(base, **options)
    assert base.weight.requires_grad


def test_a_layer_of_another_kind():
    with pytest.raises(TypeError, match="adapts a Linear, not a Embedding"):
        LoRALinear(nn.Embedding(3, 4))


def test_a_packed_weight(model):
    """As bitsandbytes' Linear4bit keeps it."""
    layer = model.get_submodule(next(name for name, _ in model.named_modules() if name.endswith("v_proj")))
    layer.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    before = dict(model.named_modules())
    with pytest.raises(TypeError, match=r"the Linear keeps its weight packed as torch.uint8.* adapt it with PEFT"):
        inject(model, LoraConfig(target_modules=["q_proj", "v_proj"]))
    assert dict(model.named_modules()) == before
    assert all(p.requires_grad for p in model.parameters() if p is not layer.weight)


def test_an_unknown_adapter(model):
    inject(model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(KeyError, match="no adapter named 'other'; this model has: default"):
        set_adapter(model, "other")
    with pytest.raises(KeyError, match="no adapter named 'other'"):
        merge(model, ["other"])
    with pytest.raises(KeyError, match="no adapter named 'other'"):
        save_adapter(model, "nowhere", "other")


def test_a_model_without_adapters(model, tmp_path):
    with pytest.raises(ValueError, match="has no adapters: call inject"):
        merge(model)
    with pytest.raises(ValueError, match="has no adapters"):
        save_adapter(model, tmp_path)


def test_half_a_typing_error_warns_and_names_what_is_near(model):
    with pytest.warns(UserWarning, match=r"'v_porj' fits no module; near names: \['v_proj'"):
        inject(model, LoraConfig(target_modules=["q_proj", "v_porj"]))


def test_a_pattern_that_fits_nothing_warns(model):
    with pytest.warns(UserWarning, match="rank_pattern: 'q_porj' fits none"):
        inject(model, LoraConfig(target_modules=["q_proj"], rank_pattern={"q_porj": 2}))


# ---------------------------------------------------------------- files


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(1)
    source = Model()
    inject(source, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    return save_adapter(source, tmp_path / "adapter")


def change_config(folder, **changes):
    path = folder / CONFIG_FILE
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in fields.items() if value != "remove"}))


def change_tensors(folder, change):
    path = folder / WEIGHTS_FILE
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


Q_A = "base_model.model.layers.0.q_proj.lora_A.weight"


def rename(tensors):
    for key in list(tensors):
        tensors[key.removeprefix("base_model.model.")] = tensors.pop(key)


def truncate(folder):
    path = folder / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-40])


def as_pickle(folder):
    (folder / WEIGHTS_FILE).write_bytes(pickle.dumps({Q_A: [1.0]}))


def only_pickle(folder):
    (folder / WEIGHTS_FILE).unlink()
    torch.save({}, folder / "adapter_model.bin")


BAD_FILES = {
    "another rank": (lambda f: change_config(f, r=3), ValueError, r"has shape \(2, 6\), but this model and r=3 need"),
    "no rank": (lambda f: change_config(f, r="remove"), ValueError, r"this model and r=8 need"),
    "no such targets": (lambda f: change_config(f, target_modules=["c_attn"]), ValueError, "near names"),
    "fewer targets": (lambda f: change_config(f, target_modules=["q_proj"]), ValueError, "no place in this model"),
    "more targets": (lambda f: change_config(f, target_modules="all-linear"), ValueError, "are missing"),
    "another shape": (
        lambda f: change_tensors(f, lambda t: t.update({Q_A: torch.zeros(2, 5)})),
        ValueError,
        r"has shape \(2, 5\)",
    ),
    "the same numbers in another shape": (
        lambda f: change_tensors(f, lambda t: t.update({Q_A: torch.zeros(6, 2)})),
        ValueError,
        r"has shape \(6, 2\)",
    ),
    "whole numbers": (
        lambda f: change_tensors(f, lambda t: t.update({Q_A: torch.zeros(2, 6, dtype=torch.int64)})),
        ValueError,
        "holds torch.int64",
    ),
    "no prefix": (lambda f: change_tensors(f, rename), ValueError, "lack PEFT's prefix 'base_model.model.'"),
    "a tensor missing": (lambda f: change_tensors(f, lambda t: t.pop(Q_A)), ValueError, "1 of 4 tensors are missing"),
    "a foreign tensor": (
        lambda f: change_tensors(f, lambda t: t.update({"base_model.model.other": torch.zeros(2)})),
        ValueError,
        "have no place in this model, for example 'base_model.model.other'",
    ),
    "truncated": (truncate, ValueError, "not a complete safetensors file"),
    "empty": (lambda f: (f / WEIGHTS_FILE).write_bytes(b""), ValueError, "not a complete safetensors file"),
    "a pickle inside": (as_pickle, ValueError, "not a complete safetensors file"),
    "only a pickle": (only_pickle, ValueError, "is a pickle"),
    "no weights": (lambda f: (f / WEIGHTS_FILE).unlink(), FileNotFoundError, f"has no {WEIGHTS_FILE}"),
    "no config": (lambda f: (f / CONFIG_FILE).unlink(), FileNotFoundError, f"has no {CONFIG_FILE}"),
    "no directory": (shutil.rmtree, FileNotFoundError, "no such directory"),
    "broken JSON": (lambda f: (f / CONFIG_FILE).write_text('{"r": 2,'), ValueError, "not valid JSON"),
    "not text": (lambda f: (f / CONFIG_FILE).write_bytes(b"\xff\xfe\x00"), ValueError, "not valid JSON"),
    "JSON of another kind": (lambda f: (f / CONFIG_FILE).write_text("[1]"), ValueError, "holds a list"),
    "another method": (lambda f: change_config(f, peft_type="OFT"), ValueError, "peft_type='OFT'"),
    "no method": (lambda f: change_config(f, peft_type="remove"), ValueError, "peft_type=None"),
    "a rank of zero": (lambda f: change_config(f, r=0), ValueError, "r=0"),
    "trained biases of A and B": (
        lambda f: change_config(f, lora_bias=True),
        ValueError,
        "does not support .'lora_bias",
    ),
    "copied layers": (lambda f: change_config(f, layer_replication=[[0, 1]]), ValueError, "layer_replication"),
    "trained tokens": (lambda f: change_config(f, trainable_token_indices=[1]), ValueError, "trainable_token_indices"),
    "a field from the future": (lambda f: change_config(f, use_telepathy=True), ValueError, "use_telepathy"),
    "no DoRA": (lambda f: change_config(f, use_dora=True), ValueError, "2 of 6 tensors .*q_proj.lora_magnitude_vector"),
    "a start from the future": (lambda f: change_config(f, init_lora_weights="stars"), ValueError, "no method"),
    "an unconverted PiSSA": (
        lambda f: change_config(f, init_lora_weights="pissa"),
        ValueError,
        "holds PiSSA as it trained.*path_initial_model_for_weight_conversion",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_files_that_do_not_fit(case, saved, model, unchanged):
    damage, error, message = BAD_FILES[case]
    damage(saved)
    with pytest.raises(error, match=message):
        load_adapter(model, saved)


def test_a_file_of_an_unknown_start_is_refused_by_the_one_field_that_matters(saved, model):
    change_config(saved, init_lora_weights="corda")
    with pytest.raises(ValueError, match="init_lora_weights='corda'") as refused:
        load_adapter(model, saved)
    fields = json.loads((saved / CONFIG_FILE).read_text())
    assert [name for name in fields if re.search(rf"\b{name}\b", str(refused.value))] == ["init_lora_weights"]


def test_a_module_may_be_called_like_pefts_default_adapter(tmp_path):
    def fresh():
        torch.manual_seed(0)
        return nn.ModuleDict({"default": nn.ModuleDict({"proj": nn.Linear(3, 4)}), "other": nn.Linear(4, 2)})

    model = fresh()
    inject(model, LoraConfig(r=2, target_modules=["proj", "other"], bias="all"))
    save_adapter(model, tmp_path)
    load_adapter(fresh(), tmp_path)
    change_tensors(
        tmp_path, lambda t: t.update({key.replace("lora_A", "lora_A.default"): t.pop(key) for key in list(t)})
    )
    load_adapter(fresh(), tmp_path)


def test_an_undamaged_file_loads(saved, model):
    load_adapter(model, saved)
    assert type(model.layers[0].q_proj) is LoRALinear


def test_the_weight_of_an_embedding_in_the_file_must_be_the_base_s(tmp_path):
    """PEFT writes the frozen table of an adapted embedding into the file; another table means another base."""
    torch.manual_seed(0)
    base = nn.ModuleDict({"table": nn.Embedding(5, 3)})
    table = base["table"].weight.detach().clone()
    inject(base, LoraConfig(r=2, target_modules=["table"]))
    save_adapter(base, tmp_path)
    key = "base_model.model.table.base_layer.weight"

    def fresh():
        model = nn.ModuleDict({"table": nn.Embedding(5, 3)})
        model["table"].weight.data.copy_(table)
        return model

    change_tensors(tmp_path, lambda tensors: tensors.update({key: table}))
    load_adapter(fresh(), tmp_path)
    change_tensors(tmp_path, lambda tensors: tensors.update({key: table + 1}))
    with pytest.raises(ValueError, match="have no place in this model"):
        load_adapter(fresh(), tmp_path)


def test_fields_at_their_default_are_ignored(saved, model):
    change_config(saved, lora_bias=False, layer_replication=None, megatron_core="megatron.core", eva_config=None)
    load_adapter(model, saved)


def test_a_name_that_is_taken(saved, model):
    load_adapter(model, saved)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="already has an adapter named 'default'"):
        load_adapter(model, saved)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
