"""Counts against numbers that were published or counted elsewhere, and clear errors for bad input."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from transformers import GPT2Config, LlamaConfig

from lora_edu import LoraConfig, inject
from lora_edu.core.matching import near_names
from lora_edu.counting import (
    adapter_bytes,
    break_even_rank,
    count_parameters,
    format_bytes,
    full_parameters,
    lora_formula,
    lora_parameters,
    lora_report,
)
from lora_edu.counting.memory import training_memory
from lora_edu.counting.meta import meta_model, shipped_configs

QV = ["q_proj", "v_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
RANKS = (1, 4, 8, 16, 64)

BASE_TOTALS = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "qwen3-4b": 4_022_468_096,
    "smollm2-135m": 134_515_008,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "chatglm-6b": 6_173_286_400,
    "gpt3-175b": 174_604_283_904,  # 174,600M in GPT-3's own table; OPT's class adds two rows of positions
    "bert-base-cased": 108_340_804,
    "bert-base-uncased": 109_514_298,
    "bert-large-uncased": 335_174_458,
    "roberta-base": 124_697_433,
    "roberta-large": 355_412_057,
    "deberta-v2-xxlarge": 1_567_041_636,
}
CLASSIFIER_TOTALS = {  # two labels, DeBERTa three
    "roberta-base": 124_647_170,
    "roberta-large": 355_361_794,
    "bert-base-cased": 108_311_810,
    "bert-base-uncased": 109_483_778,
    "bert-large-uncased": 335_143_938,
    "deberta-v2-xxlarge": 1_566_915_075,
}
# Parameters at r = 1; LoRA's count is proportional to r.
PER_RANK = [
    ("llama-7b", QV, 524_288),
    ("llama-7b", ["q_proj", "k_proj", "v_proj"], 786_432),
    ("llama-7b", ATTENTION, 1_048_576),
    ("llama-7b", "all-linear", 2_498_560),
    ("llama-13b", QV, 819_200),
    ("llama-13b", "all-linear", 3_911_680),
    ("llama-65b", QV, 2_621_440),
    ("llama-65b", "all-linear", 12_492_800),
    ("llama-2-70b", QV, 2_048_000),
    ("llama-2-70b", "all-linear", 12_943_360),
    ("llama-3-8b", QV, 425_984),
    ("llama-3-8b", "all-linear", 2_621_440),
    ("qwen3-4b", QV, 368_640),
    ("qwen3-4b", "all-linear", 2_064_384),
]
PERCENTAGES = [
    ("llama-7b", QV, 8, 0.0622),
    ("llama-7b", ATTENTION, 64, 0.9861),
    ("llama-7b", "all-linear", 16, 0.5898),
    ("llama-7b", "all-linear", 64, 2.3181),
    ("llama-13b", "all-linear", 64, 1.8871),
    ("llama-65b", "all-linear", 64, 1.2099),
    ("llama-2-70b", "all-linear", 8, 0.1499),
    ("qwen3-4b", "all-linear", 64, 3.1801),
    ("gpt2", None, 8, 0.2364),
    ("gpt2-xl", None, 8, 0.1575),
    ("gpt2", ["c_attn", "c_proj", "c_fc"], 16, 1.8607),
    ("chatglm-6b", None, 8, 0.0594),
]
OTHERS = [
    ("gpt2", None, 8, 294_912),
    ("gpt2-medium", None, 4, 393_216),
    ("gpt2-large", None, 4, 737_280),
    ("gpt2-xl", None, 8, 2_457_600),
    ("gpt2", "all-linear", 16, 2_359_296),
    ("roberta-base", None, 8, 294_912),
    ("roberta-large", None, 8, 786_432),
    ("bert-base-cased", None, 8, 294_912),
    ("bert-large-uncased", None, 8, 786_432),
    ("deberta-v2-xxlarge", None, 8, 2_359_296),
    ("deberta-v2-xxlarge", None, 16, 4_718_592),
    ("chatglm-6b", None, 8, 3_670_016),
    ("gpt3-175b", QV, 1, 4_718_592),
    ("gpt3-175b", QV, 8, 37_748_736),
    ("gpt3-175b", ["q_proj", "k_proj", "v_proj", "out_proj"], 64, 603_979_776),
]


def test_every_shipped_config_has_a_known_total() -> None:
    assert shipped_configs() == sorted(BASE_TOTALS)


@pytest.mark.parametrize(("name", "total"), BASE_TOTALS.items())
def test_shipped_config_has_the_published_size(name: str, total: int) -> None:
    assert full_parameters(name) == total


@pytest.mark.parametrize(("name", "total"), CLASSIFIER_TOTALS.items())
def test_classifier_has_the_published_size(name: str, total: int) -> None:
    labels = 3 if name.startswith("deberta") else 2
    assert full_parameters(name, head="classification", num_labels=labels) == total


@pytest.mark.parametrize(("name", "targets", "at_one"), PER_RANK, ids=str)
def test_llama_family_table(name: str, targets: object, at_one: int) -> None:
    model = meta_model(name)
    assert [lora_parameters(model, r, targets) for r in RANKS] == [r * at_one for r in RANKS]


@pytest.mark.parametrize(("name", "targets", "r", "expected"), OTHERS, ids=str)
def test_other_models(name: str, targets: object, r: int, expected: int) -> None:
    assert lora_parameters(name, r, targets) == expected


@pytest.mark.parametrize(("name", "targets", "r", "percent"), PERCENTAGES, ids=str)
def test_percent_is_of_base_and_adapter(name: str, targets: object, r: int, percent: float) -> None:
    assert round(lora_report(name, r, targets).percent, 4) == percent


def test_grouped_queries_make_70b_smaller_than_65b() -> None:
    assert lora_parameters("llama-2-70b", 8, QV) == 16_384_000 < lora_parameters("llama-65b", 8, QV) == 20_971_520


def test_report_rows_follow_the_formula() -> None:
    report = lora_report("llama-7b", 16, "all-linear")
    assert [row.target for row in report.rows] == [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
    for row in report.rows:
        assert row.parameters == row.layers * lora_formula([(row.in_features, row.out_features)], 16)
    text = str(report)
    assert "39,976,960" in text
    assert "6,738,415,616" in text
    assert "0.5898 %" in text
    assert "11,008 → 4,096" in text


def test_same_ending_with_two_shapes_is_two_rows() -> None:
    report = lora_report("gpt2", 4, ["c_proj"])
    assert [(row.in_features, row.out_features) for row in report.rows] == [(768, 768), (3072, 768)]


def test_config_objects_models_and_paths_count_alike(tmp_path) -> None:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, vocab_size=50
    )
    expected = 3 * 5 * (64 + 64 + 64 + 64)
    (tmp_path / "config.json").write_text(json.dumps({**config.to_dict(), "model_type": "llama"}))
    for source in (config, meta_model(config), tmp_path, str(tmp_path), tmp_path / "config.json"):
        assert lora_parameters(source, 5, QV) == expected


def test_conv1d_and_embedding_shapes() -> None:
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=70, n_positions=10)
    assert lora_parameters(config, 3, ["c_attn"]) == 2 * 3 * (32 + 96)
    assert lora_parameters(config, 3, ["wte"]) == 3 * (70 + 32)


def test_rank_pattern_means_name_endings() -> None:
    pattern = {"v_proj": 2, r"layers\.0\.self_attn\.q_proj": 16}
    rows = {row.target: row.parameters for row in lora_report("llama-7b", 8, QV, rank_pattern=pattern).rows}
    assert rows == {"q_proj": (16 + 31 * 8) * 8192, "v_proj": 32 * 2 * 8192}


def test_a_classifier_s_head_is_no_target() -> None:
    """As in PEFT, which trains the head in full: "dense" also names a layer of RoBERTa's head."""
    options = {"head": "classification", "num_labels": 2}
    assert lora_parameters("roberta-base", 4, ["dense"], **options) == lora_parameters(
        "roberta-base", 4, ["dense"], exclude_modules=r"classifier\..*", **options
    )


def test_count_parameters_counts_tied_weights_once_and_copies_twice() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 5), "b": nn.Linear(3, 5)})
    model["b"].weight = model["a"].weight
    model["a"].bias.requires_grad_(False)
    assert count_parameters(model) == (15 + 5, 15 + 5 + 5)
    model["copy"] = nn.Linear(3, 5)
    assert count_parameters(model) == (15 + 5 + 20, 25 + 20)


@pytest.mark.parametrize(("storage", "numbers"), [(torch.uint8, 1), (torch.bfloat16, 2), (torch.float32, 4)])
def test_packed_four_bit_parameters_count_by_their_logical_size(storage: torch.dtype, numbers: int) -> None:
    class Params4bit(nn.Parameter):
        """The name by which bitsandbytes' packed parameters are known."""

    weights = 64 * 64
    packed = Params4bit(torch.zeros(weights // (2 * numbers), dtype=storage), requires_grad=False)
    model = nn.ParameterList([packed])
    assert count_parameters(model) == (0, weights)


def test_bytes_and_units() -> None:
    assert adapter_bytes(4_718_592, "float32") == adapter_bytes(4_718_592) == 18_874_368
    assert adapter_bytes(4_718_592, torch.bfloat16) == 9_437_184
    assert format_bytes(37_748_736) == "37.75 MB (36.00 MiB)"


def test_break_even_rank() -> None:
    assert break_even_rank(4096, 4096) == 2048
    rank = break_even_rank(8192, 1024)
    assert rank * (8192 + 1024) == pytest.approx(8192 * 1024)


@pytest.mark.errors
@pytest.mark.parametrize("r", [0, -3, 2.5, True, "8"], ids=str)
def test_bad_rank(r: object) -> None:
    with pytest.raises(ValueError, match="the rank must be"):
        lora_parameters("gpt2", r, None)
    with pytest.raises(ValueError, match="the rank must be"):
        lora_formula([(2, 3)], r)


@pytest.mark.errors
def test_unknown_target_lists_near_names() -> None:
    with pytest.raises(ValueError, match=r"\['q_prj'\]: no module of the LlamaForCausalLM has such a name.*'q_proj'"):
        lora_parameters("llama-7b", 8, ["q_prj"])


@pytest.mark.errors
def test_near_names_are_no_numbers_in_a_list() -> None:
    """Of ``w1`` the names closest by letters are the blocks' numbers: 1, 2, 3."""
    with pytest.raises(ValueError, match=r"has such a name; near names: \['q_proj', 'k_proj'"):
        lora_parameters("llama-7b", 8, ["w1"])
    modules = dict(meta_model("smollm2-135m").named_modules())
    assert near_names(["q_porj", "1"], modules)[0] == "q_proj"
    assert not any(name.isdigit() for name in near_names(["w1", "11"], modules))


def test_a_target_that_fits_nothing_is_warned_about_in_the_words_of_inject() -> None:
    targets, said = ["q_proj", "v_porj", "w1"], []
    for call in (
        lambda: inject(meta_model("smollm2-135m"), LoraConfig(target_modules=targets)),
        lambda: lora_report("smollm2-135m", 8, targets),
        lambda: lora_parameters("smollm2-135m", 8, targets),
        lambda: training_memory("smollm2-135m", target_modules=targets),
    ):
        with pytest.warns(UserWarning, match="fits no module") as caught:
            call()
        said.append([str(each.message) for each in caught])
        assert {each.filename for each in caught} == {__file__}  # the line that asked, not one of the package
    assert all(lines == said[0] for lines in said)
    assert [line.split(";")[0] for line in said[0]] == [
        "target_modules: 'v_porj' fits no module",
        "target_modules: 'w1' fits no module",
    ]


def test_an_adapted_model_is_counted_by_its_innermost_layers() -> None:
    plain = lora_report("smollm2-135m", 8, "all-linear")
    model = meta_model("smollm2-135m")
    inject(model, LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"]))
    assert lora_parameters(model, 8, ["q_proj"]) == lora_parameters("smollm2-135m", 8, ["q_proj"])
    assert lora_report(model, 8, "all-linear") == plain
    inject(model, LoraConfig(r=2, target_modules="all-linear"), adapter_name="second")
    assert lora_report(model, 8, "all-linear") == plain
    whole = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(whole)
    whole.module = model
    assert lora_report(whole, 8, "all-linear") == plain


@pytest.mark.errors
def test_a_block_is_no_target() -> None:
    with pytest.raises(ValueError, match=r"self_attn' is a LlamaAttention.*name the layers inside it"):
        lora_parameters("llama-7b", 8, ["self_attn"])


@pytest.mark.errors
def test_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"no model config found for './nowhere'.*'llama-7b'"):
        lora_parameters("./nowhere", 8, None)
    with pytest.raises(ValueError, match=r"head='mlm': expected one of \['base', 'classification', 'lm'\]"):
        lora_parameters("gpt2", 8, None, head="mlm")
    with pytest.raises(ValueError, match="dtype='float33': expected a torch dtype"):
        adapter_bytes(5, "float33")


def test_the_self_test_of_lesson_05() -> None:
    assert lora_formula([(3072, 8192)] * 28, r=32) == 10_092_544
    assert round(100 * lora_parameters("llama-7b", 8, "all-linear") / full_parameters("llama-7b"), 4) == 0.2966
