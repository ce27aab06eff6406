"""The diagnostic tools of lesson 11 on our models and PEFT's: names, gradients, changed weights, files, labels."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lora_edu import LoraConfig, disable_adapter, inject, merge, save_adapter, set_adapter, unmerge
from lora_edu.lab.diagnose import (
    counted_tokens,
    gradient_report,
    kind_of,
    not_finite,
    original_parameters,
    snapshot,
    unsaved,
    weights_changed,
    what_trains,
)


class Small(nn.Module):
    """Two layers under ``body`` and a head whose weight is tied to the table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 6)
        self.body = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(6, 9), "down": nn.Linear(9, 6)}) for _ in range(2)])
        self.score = nn.Linear(6, 3)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for layer in self.body:
            x = x + layer["down"](torch.relu(layer["up"](x)))
        return torch.cat([self.score(x), self.head(x)], dim=-1)


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


@pytest.fixture
def model() -> Small:
    torch.manual_seed(0)
    return Small()


def backward(model: nn.Module) -> None:
    model(IDS).square().sum().backward()


def test_what_trains_of_a_plain_model_counts_a_tied_weight_once(model):
    assert what_trains(model) == {"table": 42, "up": 126, "down": 120, "score": 21}
    assert sum(what_trains(model).values()) == sum(p.numel() for p in model.parameters())
    assert what_trains(model.requires_grad_(False)) == {}


@pytest.mark.parametrize("library", ["lora_edu", "peft"])
def test_what_trains_names_adapters_alike_in_both_libraries(model, library):
    settings = {"r": 2, "target_modules": ["up"], "modules_to_save": ["score"]}
    if library == "peft":
        model = peft.get_peft_model(model, peft.LoraConfig(**settings))
    else:
        inject(model, LoraConfig(**settings))
    assert what_trains(model) == {"up.lora_A": 24, "up.lora_B": 36, "score": 21}
    assert {"body.1.up.weight", "body.1.up.lora_A", "score.weight", "head.weight"} <= set(original_parameters(model))


def test_a_second_adapter_carries_its_name(model):
    inject(model, LoraConfig(r=2, target_modules=["up"]))
    inject(model, LoraConfig(r=2, target_modules=["up"]), adapter_name="second")
    assert "body.0.up.lora_A" in original_parameters(model)
    set_adapter(model, "second")
    assert what_trains(model) == {"up.lora_A.second": 24, "up.lora_B.second": 36}
    assert kind_of("body.0.up.lora_A.second") == "up.lora_A.second"


@pytest.mark.parametrize("library", ["lora_edu", "peft"])
def test_gradient_report_first_step_reaches_b_and_leaves_a_zero(model, library):
    if library == "peft":
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["up"]))
    else:
        inject(model, LoraConfig(target_modules=["up"]))
    report = gradient_report(model)
    assert report.total("none") == 4
    backward(model)
    report = gradient_report(model)
    assert report.counts["up.lora_A"] == {"arrived": 0, "zero": 2, "none": 0, "not finite": 0}
    assert report.counts["up.lora_B"] == {"arrived": 2, "zero": 0, "none": 0, "not finite": 0}
    assert str(report).splitlines()[-1].split() == ["all", "2", "2", ".", "."]


def test_gradient_report_sees_missing_and_not_finite(model):
    backward(model)
    model.score.weight.grad[0, 0] = float("inf")
    model.body[0]["up"].weight.grad = None
    report = gradient_report(model)
    assert report.counts["score"]["not finite"] == 1
    assert report.counts["up"]["none"] == 1
    with pytest.raises(ValueError, match="requires a gradient"):
        gradient_report(model.requires_grad_(False))


def test_not_finite_names_the_parameter(model):
    assert not_finite(model) == []
    inject(model, LoraConfig(target_modules=["down"]))
    model.body[1]["down"].lora_B.data[0, 0] = float("nan")
    assert not_finite(model) == ["body.1.down.lora_B"]


def test_weights_changed_across_injection_merging_and_tying(model):
    before = snapshot(model)
    inject(model, LoraConfig(target_modules=["up"], init_lora_weights=False))
    assert weights_changed(before, snapshot(model)) == []
    merge(model)
    assert weights_changed(before, snapshot(model)) == ["body.0.up.weight", "body.1.up.weight"]
    with disable_adapter(model):
        assert weights_changed(before, snapshot(model)) == []
    unmerge(model)
    model.table.weight.data[0] += 1
    assert weights_changed(before, snapshot(model)) == ["table.weight", "head.weight"]
    with pytest.raises(ValueError, match="no name in common"):
        weights_changed(before, {"other": torch.zeros(1)})


def test_unsaved_finds_the_head_that_is_in_no_file(model, tmp_path: Path):
    inject(model, LoraConfig(target_modules=["up"], init_lora_weights=False))
    model.score.requires_grad_(True)
    with pytest.raises(FileNotFoundError, match="save the adapter"):
        unsaved(model, tmp_path)
    save_adapter(model, tmp_path)
    assert unsaved(model, tmp_path) == ["score.weight", "score.bias"]
    save_file(
        {"anything": model.score.weight.detach().clone(), "b": model.score.bias.detach()}, tmp_path / "h.safetensors"
    )
    assert unsaved(model, tmp_path) == []
    model.score.weight.data += 1
    assert unsaved(model, tmp_path) == ["score.weight"]


def test_unsaved_is_content_with_modules_to_save(model, tmp_path: Path):
    inject(model, LoraConfig(target_modules=["up"], modules_to_save=["score"], init_lora_weights=False))
    save_adapter(model, tmp_path)
    assert unsaved(model, tmp_path) == []


class Letters:
    """A tokenizer of single letters."""

    def decode(self, ids: list[int]) -> str:
        return "".join("abcdef"[i] for i in ids)


def test_counted_tokens_shows_what_the_loss_asks_for():
    row = {"input_ids": [0, 1, 2, 3], "labels": [-100, 1, -100, 4]}
    assert counted_tokens(row, Letters()) == "a[b]c[d≠e]"
    assert counted_tokens({key: torch.tensor(value) for key, value in row.items()}, Letters()) == "a[b]c[d≠e]"
    with pytest.raises(ValueError, match="4 input_ids and 3 labels"):
        counted_tokens({"input_ids": [0, 1, 2, 3], "labels": [1, 2, 3]}, Letters())
