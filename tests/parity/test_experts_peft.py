"""Mixtures of experts: what we say that PEFT trains is what it trains, and it reads our files as far as we say."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, MixtralConfig

from lora_edu import LoraConfig, inject, save_adapter
from lora_edu.core.experts import experts_left_out
from lora_edu.counting import lora_formula, lora_report
from lora_edu.counting.meta import meta_model

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::lora_edu.core.experts.LeftOutWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"),
]
SMALL = {"hidden_size": 32, "num_attention_heads": 4, "vocab_size": 64}
IDS = torch.arange(12)[None]


def of_peft(model, r: int, targets: object, **options: object) -> int:
    with torch.device("meta"):
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=r, target_modules=targets, **options))
    return adapted.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize(
    ("family", "ours", "theirs"),
    [
        ("Mixtral", 6_815_744, 179_832_832),
        ("Qwen3Moe", 2_457_600, 248_242_176),
        ("DeepseekV2", 14_236_160, 326_582_272),
        ("DeepseekV3", 63_175_168, 3_822_627_328),
    ],
)
def test_the_left_out_numbers_are_pefts(family: str, ours: int, theirs: int) -> None:
    """PEFT's total is ours, less the layers that it takes for experts, and what it trains beside the experts."""
    model = meta_model(getattr(transformers, f"{family}Config")())
    report = lora_report(model, 8, "all-linear")
    linears = [model.get_submodule(name) for name in report.left_out.passed_over]
    less = lora_formula([(each.in_features, each.out_features) for each in linears], 8)
    assert report.total == ours
    assert report.total - less + report.left_out.peft == theirs == of_peft(model, 8, "all-linear")


@pytest.mark.parametrize("family", ["Olmoe", "Glm4Moe", "Afmoe", "Ernie4_5_Moe", "MiniMaxM2", "GptOss", "Qwen2Moe"])
def test_in_other_families_too(family: str) -> None:
    """GPT-OSS and Qwen2-MoE are not in PEFT's table: it leaves the experts out, as we do."""
    config = getattr(transformers, f"{family}Config")(
        **SMALL, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=3, num_key_value_heads=4,
        head_dim=8, num_experts=4, num_local_experts=4, n_routed_experts=4, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = meta_model(config)
    report = lora_report(model, 2, "all-linear")
    linears = [model.get_submodule(name) for name in report.left_out.passed_over]
    less = lora_formula([(each.in_features, each.out_features) for each in linears], 2)
    assert report.total - less + report.left_out.peft == of_peft(model, 2, "all-linear")


def mixtral():
    torch.manual_seed(0)
    config = MixtralConfig(
        **SMALL, intermediate_size=48, num_hidden_layers=3, num_key_value_heads=2, num_local_experts=4
    )
    return AutoModelForCausalLM.from_config(config).eval()


EXPERTS = ["w1", "w2", "w3"]
CASES = [
    {"target_modules": EXPERTS},
    {"target_modules": ["w2"]},
    {"target_modules": ["layers.0.mlp.experts.1.w2"]},
    {"target_modules": ["gate", *EXPERTS], "rank_pattern": {"down_proj": 5, "gate.weight": 1}},
    {"target_modules": EXPERTS, "rank_pattern": {"gate_up_proj": 3}},
    {"target_modules": r".*layers\.0\..*\.(w1|w3)"},
    {"target_modules": r".*experts\.w2"},
    {"target_modules": EXPERTS, "exclude_modules": ["layers.0.mlp.experts.w1"]},
    {"target_modules": EXPERTS, "layers_to_transform": [1]},
]


@pytest.mark.filterwarnings("ignore:You have passed exclude_modules")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_targets_that_mean_experts_are_read_as_peft_reads_them(case: dict) -> None:
    left_out = experts_left_out(mixtral(), LoraConfig(r=2, **case), [])
    assert (
        left_out.peft == peft.get_peft_model(mixtral(), peft.LoraConfig(r=2, **case)).get_nb_trainable_parameters()[0]
    )


@pytest.mark.parametrize(
    "case",
    [
        {"target_modules": ["q_proj", "w1"]},
        {"target_modules": "all-linear", "lora_dropout": 0.1},
    ],
    ids=str,
)
def test_what_peft_refuses_it_refuses(case: dict) -> None:
    assert experts_left_out(mixtral(), LoraConfig(r=2, **case), []).refusal
    with pytest.raises(ValueError, match=r"Cannot convert PEFT target|does not work with lora_dropout"):
        peft.get_peft_model(mixtral(), peft.LoraConfig(r=2, **case))


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", *EXPERTS], r".*layers\.0\..*q_proj"], ids=str)
def test_peft_adapts_no_more_than_our_file_holds(targets: object, tmp_path) -> None:
    """Of a regular expression PEFT keeps the last segments here, and to "all-linear" it adds all experts."""
    ours = mixtral()
    report = inject(ours, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(mixtral(), tmp_path, is_trainable=True).eval()
    assert theirs.get_nb_trainable_parameters()[0] == report.trainable
    assert torch.allclose(theirs(IDS).logits, ours(IDS).logits, rtol=1e-5, atol=1e-6)


def test_peft_drops_what_the_warning_names(tmp_path) -> None:
    """A tiny DeepSeek-V3: its dense and shared MLPs have the names of experts."""
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(
        **SMALL, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2, num_key_value_heads=4,
        n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=1, q_lora_rank=8,
        kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    inject(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    with pytest.warns(UserWarning, match=r"it drops the tensors of 6 of them from this file"):
        save_adapter(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_config(config), tmp_path)
    adapted = {name.removesuffix(".lora_A.default") for name, _ in theirs.named_modules() if name.endswith("A.default")}
    plain = "base_model.model.model.layers"
    assert f"{plain}.0.self_attn.o_proj" in adapted
    for place in ("0.mlp", "1.mlp.shared_experts"):
        for name in ("gate_proj", "up_proj", "down_proj"):
            assert f"{plain}.{place}.{name}" not in adapted
