"""The model may be inside DistributedDataParallel, torch.compile, nn.Sequential and the like: it is looked through."""

import contextlib
import datetime

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel

from lora_edu import (
    LoraConfig,
    LoRALinear,
    adapter_names,
    disable_adapter,
    hotswap_adapter,
    inject,
    list_adapters,
    load_adapter,
    merge,
    merge_and_unload,
    save_adapter,
    set_adapter,
    unmerge,
)
from lora_edu.core.adapter import AdapterLayer
from lora_edu.core.parts import TrainedCopy

X = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.v = nn.Linear(5, 6), nn.Linear(6, 5)

    def forward(self, x):
        return self.v(torch.tanh(self.q(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.ModuleList([Block()])
        self.score = nn.Linear(5, 3)

    def forward(self, x):
        for block in self.body:
            x = block(x)
        return self.score(x)


def plain():
    torch.manual_seed(0)
    return Net()


CONFIGS = {
    "en": LoraConfig(r=2, target_modules=["q", "v"], bias="all"),
    "de": LoraConfig(r=2, target_modules=["q"], modules_to_save=["score"]),
    "fr": LoraConfig(r=2, target_modules=["v"]),
}


def filled(model, name):
    """Everything that trains gets values that only the adapter's name decides, biases and head included."""
    generator = torch.Generator().manual_seed(ord(name[0]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def adapted(wrap=lambda model: model):
    """(wrapped model, model) with three adapters, the later ones put in from outside the wrapper; "en" is in use."""
    model = plain()
    wrapped = wrap(model)
    # What is injected into a plain container is the container: its parts are layers of a larger model.
    first = model if isinstance(wrapped, nn.Sequential | nn.ModuleDict | nn.ModuleList) else wrapped
    with maybe_warned(wrapped):
        for name, config in CONFIGS.items():
            inject(first if name == "en" else wrapped, config, name)
        for name in reversed(CONFIGS):
            set_adapter(wrapped, name)
            filled(model, name)
    return wrapped, model


def maybe_warned(wrapped):
    """DistributedDataParallel does not average what came after it."""
    inside = any(isinstance(module, DistributedDataParallel) for module in wrapped.modules())
    warned = pytest.warns(UserWarning, match="build it anew around the model")
    return warned if inside else contextlib.nullcontext()


@pytest.fixture(scope="module")
def right():
    """The outputs of the base and of each adapter, each in a model of its own that has no other and no wrapper."""
    with torch.no_grad():
        found = {"base": plain()(X)}
        for name, config in CONFIGS.items():
            inject(model := plain(), config, name)
            filled(model, name)
            found[name] = model(X)
    return found


def compiled(model):
    return torch.compile(model, backend="eager")


WRAPPERS = {
    "compiled": compiled,
    "data parallel": nn.DataParallel,
    "distributed": DistributedDataParallel,
    "sequential": nn.Sequential,
    "dictionary": lambda model: nn.ModuleDict({"other": Block(), "model": model}),
    "nested": lambda model: nn.ModuleList([nn.ModuleDict({"model": nn.DataParallel(model)})]),
}


@pytest.fixture(params=WRAPPERS)
def wrap(request, tmp_path):
    """A wrapper that is called like the model; a group of one process while it is needed."""
    if "distributed" not in request.param:
        yield WRAPPERS[request.param]
        return
    one = {"rank": 0, "world_size": 1, "timeout": datetime.timedelta(seconds=60)}
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", **one)
    yield WRAPPERS[request.param]
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def fresh_graphs():
    yield
    torch.compiler.reset()


def runs(wrapped):
    """The part of a wrapper that can be called: containers cannot."""
    while isinstance(wrapped, nn.ModuleDict | nn.ModuleList):
        wrapped = wrapped["model"] if isinstance(wrapped, nn.ModuleDict) else wrapped[0]
    return wrapped


def check(wrapped, expected):
    """The outputs, by way of the wrapper, are these."""
    with torch.no_grad():
        torch.testing.assert_close(runs(wrapped)(X), expected, rtol=1e-5, atol=1e-5)


# One model in a wrapper


def test_switching(wrap, right):
    wrapped, model = adapted(wrap)
    check(wrapped, right["en"])
    for name in ("de", "fr", "en", "de"):
        with maybe_warned(wrapped):
            set_adapter(wrapped, name)
        check(wrapped, right[name])
    for name in ("fr", "de", "en"):
        set_adapter(model, name)
        check(wrapped, right[name])


def test_names(wrap):
    wrapped, model = adapted(wrap)
    assert list_adapters(wrapped) == list_adapters(model) == ["en", "de", "fr"]
    assert [name for name, module in wrapped.named_modules() if "adapter_state" in module.__dict__] == [
        next(name for name, module in wrapped.named_modules() if module is model)
    ]
    assert list_adapters(wrap(plain())) == []
    with pytest.raises(KeyError, match="no adapter named 'es'; this model has: en, de, fr"):
        set_adapter(wrapped, "es")


def test_merging(wrap, right):
    wrapped, model = adapted(wrap)
    wrapped.eval()
    for name in CONFIGS:
        set_adapter(model, name)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        merge(wrapped)
        layers = [module for module in model.modules() if isinstance(module, AdapterLayer)]
        assert [layer.merged for layer in layers] == [layer.adapter_name == name for layer in layers]
        check(wrapped, right[name])
        with pytest.raises(ValueError, match="merged"):
            set_adapter(wrapped, "de")
        unmerge(wrapped)
        check(wrapped, right[name])
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("merged", [False, True], ids=["", "merged"])
def test_switching_off(wrap, merged, right):
    wrapped, model = adapted(wrap)
    wrapped.eval()
    for name in CONFIGS:
        set_adapter(model, name)
        if merged:
            merge(wrapped)
        check(wrapped, right[name])
        with disable_adapter(wrapped):
            with torch.no_grad():
                assert torch.equal(runs(wrapped)(X), right["base"])  # biases and heads too
            with disable_adapter(model):
                check(wrapped, right["base"])
            check(wrapped, right["base"])
        check(wrapped, right[name])
        unmerge(wrapped)


def test_a_further_adapter_waits(wrap, right):
    wrapped, model = adapted(wrap)
    with maybe_warned(wrapped):
        inject(wrapped, LoraConfig(r=2, target_modules=["q"], init_lora_weights=False), "three")
    check(wrapped, right["en"])
    assert list_adapters(model) == ["en", "de", "fr", "three"]
    assert {name.split(".")[-1] for name, p in model.named_parameters() if p.requires_grad} == {
        "lora_A", "lora_B", "bias",
    }  # fmt: skip


def test_files(wrap, tmp_path, right):
    wrapped, _ = adapted(wrap)
    _, bare = adapted()
    for name in CONFIGS:
        save_adapter(wrapped, tmp_path / "wrapped" / name, name)
        save_adapter(bare, tmp_path / "bare" / name, name)
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            assert (tmp_path / "wrapped" / name / file).read_bytes() == (tmp_path / "bare" / name / file).read_bytes()
    again, model = adapted(wrap)
    for name in ("de", "fr"):
        load_adapter(again, tmp_path / "bare" / name, f"{name} again")
        check(again, right["en"])
    for name in ("de", "fr"):
        set_adapter(model, f"{name} again")
        check(again, right[name])


def test_another_adapters_values(wrap, tmp_path, right):
    wrapped, model = adapted(wrap)
    save_adapter(wrapped, tmp_path, "fr")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    set_adapter(model, "fr")
    for module in model.modules():
        if isinstance(module, LoRALinear) and module.adapter_name == "fr":
            torch.nn.init.zeros_(module.lora_B)
    check(wrapped, right["base"])
    hotswap_adapter(wrapped, tmp_path, "fr")
    check(wrapped, right["fr"])


def test_rows_of_a_batch(wrap, right):
    wrapped, _ = adapted(wrap)
    wrapped.eval()
    check(wrapped, right["en"])
    for names in (["de", "fr", "__base__"], ["fr", "de", "de"], ["__base__", "__base__", "fr"]):
        expected = torch.stack([right[name.strip("_")][row] for row, name in enumerate(names)])
        with adapter_names(wrapped, names):
            check(wrapped, expected)
        check(wrapped, right["en"])


@pytest.mark.parametrize("name", ["en", "de"])
def test_unloading(wrap, name, right):
    wrapped, model = adapted(wrap)
    set_adapter(model, name)
    check(wrapped, right[name])
    assert merge_and_unload(wrapped) is model
    assert not any(isinstance(module, AdapterLayer | TrainedCopy) for module in wrapped.modules())
    assert not any("adapter_state" in module.__dict__ for module in wrapped.modules())
    assert model.state_dict().keys() == plain().state_dict().keys()
    assert list_adapters(wrapped) == list_adapters(model) == []
    check(wrapped, right[name])
    inject(model, CONFIGS["en"])


@pytest.mark.errors
def test_a_plain_model_in_a_wrapper(wrap, tmp_path):
    wrapped = wrap(plain())
    save_adapter(adapted()[1], tmp_path, "fr")
    for call in (
        lambda: set_adapter(wrapped, "en"),
        lambda: merge(wrapped),
        lambda: unmerge(wrapped),
        lambda: save_adapter(wrapped, tmp_path),
        lambda: hotswap_adapter(wrapped, tmp_path),
        lambda: disable_adapter(wrapped).__enter__(),
        lambda: adapter_names(wrapped, ["en"]).__enter__(),
        lambda: merge_and_unload(wrapped),
    ):
        with pytest.raises(ValueError, match=r"this \w+ has no adapters: call inject"):
            call()


def test_wrapped_afterwards(wrap, right):
    _, model = adapted()
    wrapped = wrap(model)
    assert list_adapters(wrapped) == ["en", "de", "fr"]
    with maybe_warned(wrapped):
        set_adapter(wrapped, "de")
    check(wrapped, right["de"])
    with disable_adapter(wrapped):
        check(wrapped, right["base"])
    merge(wrapped.eval())
    check(wrapped, right["de"])


def test_a_wrapper_in_a_wrapper(tmp_path, right):
    one = {"rank": 0, "world_size": 1, "timeout": datetime.timedelta(seconds=60)}
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", **one)
    try:
        _, model = adapted()
        for wrapped in (compiled(DistributedDataParallel(model)), DistributedDataParallel(compiled(model))):
            assert list_adapters(wrapped) == ["en", "de", "fr"]
            set_adapter(wrapped.eval(), "de")  # nothing to average: no warning
            check(wrapped, right["de"])
            with disable_adapter(wrapped):
                check(wrapped, right["base"])
            set_adapter(wrapped, "en")
    finally:
        dist.destroy_process_group()


# Parts


@pytest.mark.errors
def test_two_injected_parts(tmp_path):
    _, one = adapted()
    _, two = adapted()
    both = nn.ModuleDict({"one": one, "two": compiled(two)})
    before = list(both.named_modules())
    for call in (
        lambda: list_adapters(both),
        lambda: set_adapter(both, "de"),
        lambda: merge(both),
        lambda: save_adapter(both, tmp_path, "de"),
        lambda: inject(both, CONFIGS["fr"], "more"),
        lambda: merge_and_unload(both),
        lambda: adapter_names(both, ["de"]).__enter__(),
    ):
        with pytest.raises(ValueError, match=r"2 parts of this ModuleDict.*: one, two.* model.get_submodule\('one'\)"):
            call()
    assert list(both.named_modules()) == before
    set_adapter(both.get_submodule("one"), "de")


def test_switching_two_parts_off(right):
    one, two = adapted()[1], adapted()[1]
    set_adapter(one, "de")
    with disable_adapter(nn.ModuleList([one, two])):
        check(one, right["base"])
        check(two, right["base"])
    check(one, right["de"])
    check(two, right["en"])


def test_one_model_under_two_names(right):
    _, model = adapted()
    twice = nn.ModuleDict({"a": model, "b": model})
    set_adapter(twice, "de")
    check(model, right["de"])


@pytest.mark.errors
def test_a_part_of_an_injected_model(right):
    _, model = adapted()
    part = model.body[0]
    for call in (
        lambda: set_adapter(part, "de"),
        lambda: merge(part),
        lambda: inject(part, CONFIGS["fr"], "more"),
        lambda: disable_adapter(part).__enter__(),
    ):
        with pytest.raises(ValueError, match="adapters in this Block were injected into a larger model"):
            call()
    assert not any("adapter_state" in module.__dict__ for module in part.modules())
    check(model, right["en"])


def test_layers_wrapped_by_hand_leave_no_state_in_a_part():
    model = plain()
    model.body[0].q = LoRALinear(model.body[0].q, r=2)
    merge(model.body[0])
    unmerge(nn.Sequential(model.body[0]))
    assert inject(model, CONFIGS["fr"], "fr").replaced == ["body.0.v"]


# Wrapped modules inside the model


@pytest.mark.parametrize("around", [compiled, checkpoint_wrapper], ids=["compiled", "checkpointed"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_submodules_in_wrappers(around, when, tmp_path, right):
    """Their names skip what the wrapper adds, and what is adapted is what is called."""

    def wrap_parts(model):
        model.body[0].q, model.body[0], model.score = (
            around(model.body[0].q),
            around(model.body[0]),
            around(model.score),
        )

    model = plain()
    if when == "before":
        wrap_parts(model)
        check(model, right["base"])
    for name, config in CONFIGS.items():
        replaced = inject(model, config, name).replaced
        assert replaced == [f"body.0.{target}" for target in config.target_modules]
    if when == "after":
        wrap_parts(model)
    for name in reversed(CONFIGS):
        set_adapter(model, name)
        filled(model, name)
    for name in CONFIGS:
        set_adapter(model, name)
        check(model, right[name])
        with disable_adapter(model):
            check(model, right["base"])
        save_adapter(model, tmp_path / name, name)
        _, bare = adapted()
        save_adapter(bare, tmp_path / "bare", name)
        found, expected = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in (name, "bare"))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found)
    merge(model.eval())
    check(model, right["fr"])
    merge_and_unload(model)
    check(model, right["fr"])
    assert not any(isinstance(module, AdapterLayer | TrainedCopy) for module in model.modules())


def test_compiled_in_place(right):
    model = plain()
    model.compile(backend="eager")
    model.body[0].q.compile(backend="eager")
    check(model, right["base"])
    for name, config in CONFIGS.items():
        inject(model, config, name)
    for name in reversed(CONFIGS):
        set_adapter(model, name)
        filled(model, name)
        check(model, right[name])
