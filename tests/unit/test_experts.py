"""Mixtures of experts, whose experts are no layers: what is left out is said in one line, and nothing else is said."""

import json
import warnings

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, DeepseekV3Config, GptOssConfig, MixtralConfig
from typer.testing import CliRunner

from lora_edu import LoraConfig, inject, load_adapter, save_adapter
from lora_edu.core.experts import LeftOutWarning, expert_parameters, experts_left_out
from lora_edu.counting import lora_parameters, lora_report
from lora_edu.counting.memory import memory_table, training_memory
from lora_edu.counting.meta import meta_model
from lora_edu.course.cli import app

SMALL = {"hidden_size": 32, "num_attention_heads": 4, "vocab_size": 64, "num_hidden_layers": 2}
QV = ["q_proj", "v_proj"]


def mixtral():
    torch.manual_seed(0)
    config = MixtralConfig(**SMALL, intermediate_size=48, num_key_value_heads=2, num_local_experts=4)
    return AutoModelForCausalLM.from_config(config).eval()


def deepseek():
    """One block with a dense MLP, one with experts and a shared one."""
    torch.manual_seed(0)
    config = DeepseekV3Config(
        **SMALL, intermediate_size=48, moe_intermediate_size=16, num_key_value_heads=4, n_routed_experts=4,
        num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8,
        qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def said(call, *arguments, **options):
    """The warnings of a call about what is left out."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(*arguments, **options)
    return [str(each.message) for each in caught if each.category is LeftOutWarning]


GATE, UP, DOWN = 2 * (4 * 32), 2 * (4 * 96 * 32), 2 * (4 * 32 * 48)  # routers, gate and up, down: of two blocks


@pytest.mark.parametrize(
    ("targets", "numbers", "peft"),
    [
        ("all-linear", GATE + UP + DOWN, "PEFT would train 5,520 numbers there"),
        ([*QV, "w1", "w2", "w3"], UP + DOWN, "PEFT would train 5,376 numbers there"),
        ([*QV, "w2"], DOWN, "PEFT would train 1,280 numbers there"),
        ([*QV, "w1"], UP, "PEFT refuses 'w1' without 'w3' here"),
        (r".*\.(q_proj|w[123])", UP + DOWN, "PEFT would train 5,376 numbers there"),
        (r".*\.0\..*\.(q_proj|w[123])", (UP + DOWN) // 2, "PEFT would train 5,376 numbers there"),
        ([*QV, "experts.3.w2"], DOWN, "PEFT would train 1,280 numbers there"),
        (r".*\.(q_proj|experts\.\d\.w2)", DOWN, "PEFT leaves them out as well"),
        ([*QV, "gate_up_proj"], UP, "PEFT leaves them out as well"),
    ],
    ids=str,
)
def test_one_line_says_what_is_left_out(targets, numbers, peft):
    (line,) = said(inject, model := mixtral(), LoraConfig(r=2, target_modules=targets))
    assert line.startswith(f"left out: {numbers:,} numbers in experts and routers that are no linear layers (")
    assert line.endswith(peft)
    assert "\n" not in line
    assert said(lora_parameters, mixtral(), 2, targets) == [line]
    assert str(lora_report(mixtral(), 2, targets)).splitlines()[-1] == line
    assert said(lora_parameters, model, 2, targets) == [line]  # an adapted model too


def test_the_line_names_the_parameters():
    (line,) = said(inject, mixtral(), LoraConfig(target_modules="all-linear"))
    places = [f"model.layers.*.mlp.{name}" for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj")]
    assert f"({', '.join(places)})" in line


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": QV},
        {"target_modules": None},
        {"target_modules": r".*self_attn.*_proj"},
        {"target_modules": "all-linear", "exclude_modules": ["gate", "experts", "gate_up_proj", "down_proj"]},
        {"target_modules": "all-linear", "exclude_modules": r".*\.mlp\..*"},
    ],
    ids=str,
)
def test_where_no_target_means_experts_nothing_is_said(options):
    assert said(inject, mixtral(), LoraConfig(**options)) == []


def test_a_dense_model_hears_nothing():
    for name in ("llama-7b", "gpt2", "qwen3-4b"):
        assert said(lora_parameters, name, 8, "all-linear") == []
        assert lora_report(name, 8, "all-linear").left_out is None


def test_some_layers_only():
    config = LoraConfig(r=2, target_modules=[*QV, "w1", "w2", "w3"], layers_to_transform=[1])
    left_out = experts_left_out(mixtral(), config, [])
    assert set(left_out.parameters) == {f"model.layers.1.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")}


def test_a_setting_that_peft_refuses_there_is_named():
    (line,) = said(inject, mixtral(), LoraConfig(target_modules="all-linear", lora_dropout=0.1))
    assert line.endswith("PEFT refuses lora_dropout=0.1 here")


def test_a_family_that_peft_does_not_know():
    config = GptOssConfig(**SMALL, intermediate_size=16, num_key_value_heads=2, num_local_experts=4, head_dim=8)
    model = AutoModelForCausalLM.from_config(config)
    (line,) = said(inject, model, LoraConfig(target_modules="all-linear"))
    assert line.endswith("PEFT leaves them out as well")
    assert sum(expert_parameters(model).values()) == 2 * (4 * 32 * 32 + 4 * 16 * 32)


def test_layers_that_peft_passes_over_are_counted():
    """In DeepSeek the dense and shared MLPs bear the experts' names."""
    (line,) = said(inject, deepseek(), LoraConfig(r=2, target_modules="all-linear"))
    assert line.endswith("numbers there, and none in 6 linear layers of these names")


@pytest.mark.errors
def test_targets_that_mean_experts_only_are_an_error_that_says_so():
    for call in (inject, lambda model, config: lora_parameters(model, config.r, config.target_modules)):
        with pytest.raises(ValueError, match=r"'w3'\]: no layer has such a name; left out: 36,864 numbers in experts"):
            call(mixtral(), LoraConfig(target_modules=["w1", "w2", "w3"]))


def test_a_target_that_means_experts_is_no_typing_error():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        inject(mixtral(), LoraConfig(target_modules=["q_proj", "w1", "w2", "w3", "w4"]))
    typing = [str(each.message) for each in caught if "fits no module" in str(each.message)]
    assert len(typing) == 1
    assert typing[0].startswith("target_modules: 'w4' fits no module")


# Memory
def test_a_mixture_in_four_bits_says_why_it_is_large():
    """As the issue has it: Mixtral needs 91.5 GB, since bitsandbytes packs linear layers only."""
    config = MixtralConfig()
    (line,) = said(training_memory, config, "qlora", "nf4", activations=False)
    assert training_memory(config, "qlora", "nf4", activations=False).base / 1e9 == pytest.approx(91.5, abs=0.05)
    assert line.startswith("90.2 GB of the base are 45,097,156,608 numbers in experts that are no linear layers")
    table = memory_table(config, activations=False)
    assert str(table).splitlines()[-1] == f"four bits: {line}"
    assert str(table).count("left out") == 0  # the default targets are q_proj and v_proj
    table = memory_table(config, ["lora"], target_modules="all-linear", activations=False)
    assert str(table).count("LoRA: left out: 45,098,205,184 numbers") == 1
    assert "four bits" not in str(table)


def test_four_bits_are_for_linear_layers_and_no_class_derived_from_them():
    """As transformers 5 chooses them: ``type(module) is nn.Linear``."""

    class Other(nn.Linear):
        pass

    model = meta_model("smollm2-135m")
    plain = training_memory(model, "qlora", "nf4", activations=False).base
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    layer.__class__ = Other
    other = training_memory(model, "qlora", "nf4", activations=False).base
    assert other - plain == layer.weight.numel() * (2 - 4.5 / 8)


def test_the_command_line_says_it_once(tmp_path):
    MixtralConfig(architectures=["MixtralForCausalLM"]).save_pretrained(tmp_path)
    done = CliRunner().invoke(app, ["count", str(tmp_path), "--targets", "all-linear"])
    assert done.output.count("left out") == 1
    assert done.stdout.splitlines()[-1].endswith("PEFT would train 173,017,088 numbers there")
    assert done.stderr == ""
    done = CliRunner().invoke(app, ["memory", str(tmp_path), "--targets", "all-linear"])
    assert done.output.count("left out") == done.output.count("four bits: 90.2 GB") == 1
    assert done.stderr == ""
    done = CliRunner().invoke(app, ["count", str(tmp_path), "--targets", "q_proj,v_porj"])
    assert done.stderr.startswith("lora-edu: target_modules: 'v_porj' fits no module; near names: ['v_proj'")
    assert len(done.stderr.splitlines()) == 1


# Files
def test_saving_warns_of_layers_that_peft_will_drop(tmp_path):
    model = deepseek()
    inject(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    with pytest.warns(UserWarning, match="PEFT takes layers of these names for experts in a 'deepseek_v3'") as caught:
        save_adapter(model, tmp_path)
    (line,) = [str(each.message) for each in caught]
    names = ("gate_proj", "up_proj", "down_proj")
    places = [f"model.layers.*.mlp.{inside}{name}" for inside in ("", "shared_experts.") for name in names]
    assert f"of 6 of them from this file, or refuses it: {', '.join(places)};" in line
    again = deepseek()
    load_adapter(again, tmp_path)
    ids = torch.arange(12)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_saving_what_peft_reads_whole_warns_of_nothing(tmp_path):
    for model, targets in ((deepseek(), ["q_a_proj", "o_proj"]), (mixtral(), QV)):
        inject(model, LoraConfig(r=2, target_modules=targets))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            save_adapter(model, tmp_path)
        assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == targets
