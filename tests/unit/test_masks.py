"""The recorded masks of lesson 17: complete, of equal budgets, and tuned inside their grids."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from lora_edu import count_parameters, load_base, load_dataset
from lora_edu.core.adapter import adapter_layers
from lora_edu.files import data_path
from lora_edu.lab.datasets import encode

pytestmark = pytest.mark.recording
SCRIPT = Path(__file__).resolve().parents[2] / "data" / "record_masks.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("record_masks", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_way_is_tuned_inside_its_grid_and_compared_over_five_seeds(script):
    record = json.loads(data_path("runs", "masks.json").read_text(encoding="utf-8"))
    for way, rates in script.RATES.items():
        runs = [line for line in record["runs"] if line["job"]["way"] == way]
        tuning = {line["job"]["learning_rate"]: line for line in runs if line["job"]["seed"] == script.TUNING_SEED}
        assert sorted(tuning) == sorted(rates)
        best = min(tuning, key=lambda rate: tuning[rate]["validation"])
        assert min(rates) < best < max(rates)
        compared = [line["job"] for line in runs if line["job"]["seed"] in script.SEEDS]
        assert [job["seed"] for job in compared] == list(script.SEEDS)
        assert {job["learning_rate"] for job in compared} == {best}
        assert {line["trainable"] for line in runs} == {1_105_920 if way == "full" else 78_336}


def test_a_mask_holds_the_largest_gradients_of_each_matrix(script):
    model, tokenizer = load_base("tiny")
    rows = encode(load_dataset("jargon")[:80], tokenizer)
    gradients = script.gradients(model, rows, seed=0)
    script.prepare(model, "gradient", rows, seed=0)
    assert count_parameters(model)[0] == 78_336
    layer = adapter_layers(model)["model.layers.1.mlp.up_proj"]
    size = gradients[id(layer.frozen)].abs()
    chosen = torch.zeros_like(size, dtype=torch.bool)
    chosen[tuple(layer.shira_indices.long())] = True
    assert chosen.sum() == 8 * (384 + 192)
    assert size[chosen].min() >= size[~chosen].max()
