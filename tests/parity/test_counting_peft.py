"""Our counts equal what PEFT injects, on models of real size built on the meta device."""

from __future__ import annotations

import pytest
import torch

from lora_edu.counting import count_parameters, lora_parameters, lora_report
from lora_edu.counting.meta import meta_model

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.parity

QV = ["q_proj", "v_proj"]
CASES = [
    ("llama-7b", QV, 8),
    ("llama-7b", "all-linear", 16),
    ("llama-7b", ["q_proj", "k_proj", "v_proj"], 1),
    ("llama-7b", ["embed_tokens", "lm_head"], 4),
    ("llama-2-70b", QV, 8),
    ("llama-2-70b", r".*layers\.(0|79)\.(self_attn\.[kv]_proj|mlp\.down_proj)", 64),
    ("llama-3-8b", None, 64),
    ("qwen3-4b", "all-linear", 4),
    ("gpt2-medium", None, 4),
    ("gpt2", ["c_attn", "c_proj", "c_fc"], 16),
    ("gpt2", ["wte", "c_attn"], 8),
    ("chatglm-6b", None, 8),
    ("gpt3-175b", QV, 2),
    ("roberta-base", "all-linear", 16),
    ("deberta-v2-xxlarge", None, 16),
]


def peft_model(config: str, r: int, targets: object, head: str | None = None, **options: object):
    model = meta_model(config, head=head, num_labels=2 if head == "classification" else None)
    with torch.device("meta"):
        return peft.get_peft_model(model, peft.LoraConfig(r=r, target_modules=targets, **options))


@pytest.mark.parametrize(("config", "targets", "r"), CASES, ids=lambda value: str(value)[:40])
def test_lora_parameters_equal_peft(config: str, targets: object, r: int) -> None:
    model = peft_model(config, r, targets)
    trainable, total = model.get_nb_trainable_parameters()
    report = lora_report(config, r, targets)
    assert report.total == lora_parameters(config, r, targets) == trainable
    assert report.base_total + report.total == total
    assert report.percent == pytest.approx(100 * trainable / total, rel=1e-12)
    assert count_parameters(model) == (trainable, total)


@pytest.mark.parametrize("targets", [None, "all-linear", ["query", "dense"]], ids=str)
def test_a_trained_head_is_counted_as_peft_counts_it(targets: object) -> None:
    """PEFT trains a copy of the classification head: LoRA + head train, and base + head's copy + LoRA are all."""
    model = peft_model("roberta-base", 8, targets, head="classification", task_type="SEQ_CLS")
    report = lora_report("roberta-base", 8, targets, head="classification", num_labels=2)
    head = 768 * 768 + 768 + 768 * 2 + 2
    assert model.get_nb_trainable_parameters() == (report.total + head, report.base_total + head + report.total)
    assert count_parameters(model) == model.get_nb_trainable_parameters()


def test_patterns_equal_peft() -> None:
    options = {"rank_pattern": {"v_proj": 2, r"layers\.3\.self_attn\.q_proj": 32}, "exclude_modules": r".*\.0\..*"}
    model = peft_model("smollm2-135m", 8, QV, **options)
    assert lora_parameters("smollm2-135m", 8, QV, **options) == model.get_nb_trainable_parameters()[0]
    model = peft_model("smollm2-135m", 8, QV, layers_to_transform=[1, 2, 29])
    assert lora_parameters("smollm2-135m", 8, QV, layers_to_transform=[1, 2, 29]) == count_parameters(model)[0]
