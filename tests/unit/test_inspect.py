"""``lora-edu inspect``: the shipped adapters are sound, and of every broken or foreign file it says what it is."""

import json
import math
import pickle
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import lora_edu
from lora_edu.core.adapter import adapter_layers
from lora_edu.course.cli import app
from lora_edu.files import ROOT, data_path
from lora_edu.lab.bases import load_base
from lora_edu.lowrank import effective_rank, product_singular_values, singular_values
from lora_edu.serving.inspection.effect import merge_loss
from lora_edu.serving.inspection.findings import LEVELS
from lora_edu.serving.inspection.report import inspect_adapter

JARGON = data_path("adapters", "tiny-jargon")
PREFIX = "base_model.model."
Q0 = "model.layers.0.self_attn.q_proj"
V2 = "model.layers.2.self_attn.v_proj"


@pytest.fixture(scope="module")
def parts():
    """The fields and the tensors of a sound adapter, from which the broken ones are made."""
    fields = json.loads((JARGON / "adapter_config.json").read_text())
    return fields, load_file(JARGON / "adapter_model.safetensors")


@pytest.fixture
def made(tmp_path, parts):
    """Write an adapter's folder: the sound one with other fields (None leaves one out) and other tensors."""

    def make(fields=None, tensors=None, weights="adapter_model.safetensors", config=True, folder=None):
        folder = folder or tmp_path / "adapter"
        folder.mkdir(exist_ok=True)
        said = {**parts[0], **(fields or {})}
        if config:
            (folder / "adapter_config.json").write_text(json.dumps({k: v for k, v in said.items() if v is not None}))
        held = parts[1] if tensors is None else tensors
        save_file({key: tensor.contiguous() for key, tensor in held.items()}, folder / weights, {"format": "pt"})
        return folder

    return make


def found(report, level, code):
    """The one finding of this level and code."""
    for finding in report.findings:  # of all it holds that each names a lesson that there is, and a way out
        assert list((ROOT / "lessons").glob(f"{finding.lesson}_*.ipynb")), finding
        assert finding.level in LEVELS
        assert finding.sentence.endswith(".")
    matching = [finding for finding in report.findings if (finding.level, finding.code) == (level, code)]
    assert len(matching) == 1, [(f.level, f.code, f.sentence) for f in report.findings]
    return matching[0]


def changed(tensors, name, which, change):
    """The tensors, one factor of one module changed."""
    key = f"{PREFIX}{name}.{which}.weight"
    return {**tensors, key: change(tensors[key])}


def key(name, which="lora_A"):
    return f"{PREFIX}{name}.{which}.weight"


# What is sound


@pytest.mark.parametrize(
    ("name", "base", "modules", "scale"),
    [("tiny-jargon", "tiny", 21, 2), ("tiny-devils-dictionary", "tiny", 21, 1),
     ("smollm2-devils-dictionary", "smollm2-135m", 210, 2)],
)  # fmt: skip
def test_shipped_adapters_are_sound(name, base, modules, scale):
    report = inspect_adapter(data_path("adapters", name), base, config_only=base != "tiny")
    assert not report.wrong
    assert report.format == "PEFT"
    assert len(report.modules) == modules
    assert {(module.rank, module.scale) for module in report.modules} == {(8, scale)}
    assert found(report, "ok", "fits")
    if base == "tiny":
        assert set(report.effect.merging) == {"bfloat16", "float16"}
        assert report.effect.output.largest > 0
        assert report.effect.output.before is not None


def test_norms_and_ranks_are_those_of_the_dense_update(parts):
    report = inspect_adapter(JARGON)
    measured = next(module for module in report.modules if module.name == V2)
    delta = 2 * parts[1][key(V2, "lora_B")].float() @ parts[1][key(V2)].float()
    assert measured.norm == pytest.approx(delta.norm().item(), rel=1e-5)
    assert measured.effective_rank == pytest.approx(effective_rank(delta), rel=1e-4)
    assert (measured.in_features, measured.out_features) == (192, 192)


@pytest.mark.parametrize("shape", [(40, 3, 30), (3, 8, 5)])
def test_singular_values_of_a_product_without_the_product(shape):
    m, r, n = shape
    B, A = torch.randn(m, r), torch.randn(r, n)
    values = product_singular_values(B, A)
    k = min(shape)
    assert torch.allclose(values[:k], singular_values(B @ A)[:k], atol=1e-4)
    with pytest.raises(ValueError, match="as many columns"):
        product_singular_values(B, A.T)


def test_what_merging_loses_is_what_merge_writes():
    for dtype in (torch.bfloat16, torch.float16):
        model, _ = load_base("tiny", dtype=dtype)
        lora_edu.load_adapter(model, JARGON)
        layers = adapter_layers(model)
        before = {name: layer.weight.float().clone() for name, layer in layers.items()}
        loss = merge_loss(layers.values(), dtype)
        lora_edu.merge(model)
        meant = torch.cat([layer.delta_weight().flatten() for layer in layers.values()])
        written = torch.cat([(layer.weight.float() - before[name]).flatten() for name, layer in layers.items()])
        assert loss.error == pytest.approx(((written - meant).norm() / meant.norm()).item(), rel=1e-3)
        assert loss.projection == pytest.approx((written @ meant / (meant @ meant)).item(), rel=1e-4)


def test_a_small_update_is_lost_in_bfloat16(made, parts):
    small = {k: t.float() * (3e-3 if "lora_B" in k else 1) for k, t in parts[1].items()}
    report = inspect_adapter(made(tensors=small), "tiny")
    assert not report.wrong
    loss = report.effect.merging
    assert loss["bfloat16"].projection < 0.9 < loss["float16"].projection
    assert "bfloat16" in found(report, "note", "merging").sentence


# What PEFT and those who build on it write


def test_rslora_divides_by_the_root(made):
    report = inspect_adapter(made({"use_rslora": True}), "tiny")
    assert not report.wrong
    assert report.modules[0].scale == pytest.approx(16 / math.sqrt(8))
    assert "√r = 16 / √8" in found(report, "ok", "scale").sentence


@pytest.mark.parametrize("rule", [{"use_rslora": True}, {"alpha_pattern": {"q_proj": 4}}, {}])
def test_what_llama_cpps_converter_loses_is_said(made, rule):
    report = inspect_adapter(made(rule))
    lost = [finding for finding in report.findings if finding.code == "lost-in-gguf"]
    assert [(each.level, each.lesson) for each in lost] == [("note", "13")] * len(rule)
    assert all(next(iter(rule)) in each.sentence for each in lost)


def test_rank_pattern(made, parts):
    tensors = changed(changed(parts[1], Q0, "lora_A", lambda A: A[:4]), Q0, "lora_B", lambda B: B[:, :4])
    sound = inspect_adapter(made({"rank_pattern": {"layers.0.self_attn.q_proj": 4}}, tensors), "tiny")
    assert not sound.wrong
    assert {module.name: module.scale for module in sound.modules}[Q0] == 4
    assert "ranks 4, 8" in found(sound, "ok", "rank").sentence
    unsaid = inspect_adapter(made(tensors=tensors))
    assert found(unsaid, "wrong", "rank-differs").names == (Q0,)


def test_dora(made, parts):
    lengths = {f"{PREFIX}{Q0}.lora_magnitude_vector": torch.ones(192)}
    every = {k.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(t.shape[0]) for k, t in parts[1].items()}
    whole = {k: t for k, t in every.items() if "magnitude" in k} | parts[1]
    report = inspect_adapter(made({"use_dora": True}, whole))
    assert "method DoRA" in found(report, "ok", "kind").sentence
    assert not report.wrong
    assert (
        "20 modules have no magnitudes"
        in found(inspect_adapter(made({"use_dora": True}, parts[1] | lengths)), "wrong", "dora").sentence
    )
    assert "use_dora is false" in found(inspect_adapter(made(tensors=parts[1] | lengths)), "wrong", "dora").sentence


PROGRAMS = {  # what each writes besides: fields of the config, files
    "Unsloth": (
        {"auto_mapping": {"base_model_class": "LlamaForCausalLM", "unsloth_fixed": True},
         "target_modules": r"(?:.*?(?:self_attn|mlp).*?(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*?)",
         "base_model_name_or_path": "unsloth/tiny-bnb-4bit", "lora_bias": False, "peft_version": "0.18.0",
         "qalora_group_size": 16, "trainable_token_indices": None, "use_qalora": False,
         "megatron_core": "megatron.core", "target_parameters": None},
        ["tokenizer.json", "chat_template.jinja"],
    ),
    "Axolotl": (
        {"base_model_name_or_path": "org/tiny-base", "loftq_config": {}, "eva_config": None, "revision": None,
         "target_modules": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj", "fc1"]},
        ["config.json", "tokenizer.json", "debug.log"],
    ),
    "LLaMA-Factory": (
        {"base_model_name_or_path": "/models/tiny_8b", "task_type": "CAUSAL_LM", "corda_config": None,
         "exclude_modules": None, "layer_replication": None},
        ["all_results.json", "trainer_log.jsonl", "training_loss.png", "trainer_state.json"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("program", PROGRAMS)
def test_folders_that_other_programs_write(made, program):
    fields, files = PROGRAMS[program]
    folder = made(fields)
    for name in (*files, "README.md", "training_args.bin", "optimizer.pt"):
        (folder / name).write_text("{}")
    shutil.copytree(JARGON, folder / "checkpoint-60")
    report = inspect_adapter(folder, "tiny")
    assert not report.wrong
    assert found(report, "note", "base-name")
    assert "checkpoint-60" in found(report, "note", "folders-below").sentence
    assert report.effect.output.largest > 0
    assert "pickle" not in {finding.code for finding in report.findings}  # the Trainer's own state is none of them


def test_a_setting_that_lora_edu_lacks_is_a_note(made):
    report = inspect_adapter(made({"layer_replication": [[0, 2], [1, 3]]}), "tiny")
    assert "layer_replication" in found(report, "note", "unsupported").sentence
    assert found(report, "note", "not-loaded")
    assert not report.wrong


METHODS = {
    "IA3": lambda: peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    "LOHA": lambda: peft.LoHaConfig(r=4, target_modules=["q_proj"]),
    "LOKR": lambda: peft.LoKrConfig(r=4, target_modules=["q_proj"]),
    "VERA": lambda: peft.VeraConfig(target_modules=["q_proj", "v_proj"]),
    "ADALORA": lambda: peft.AdaLoraConfig(total_step=10, target_modules=["q_proj"]),
    "LORA": lambda: peft.LoraConfig(trainable_token_indices=[1], init_lora_weights=False, target_modules=["q_proj"]),
}


@pytest.mark.parametrize("method", METHODS)
def test_other_methods_of_peft_are_not_called_wrong(tmp_path, method):
    model = peft.get_peft_model(load_base("tiny")[0], METHODS[method]())
    model.save_pretrained(tmp_path)
    report = inspect_adapter(tmp_path, "tiny", config_only=True)
    assert report.settings["peft_type"] == method
    assert not [finding for finding in report.findings if finding.level == "wrong" and finding.code != "never-trained"]


def test_pefts_classifier(tmp_path):
    """PEFT names two heads in modules_to_save, of which a model has one; and it may adapt the embedding."""
    config = peft.LoraConfig(
        task_type="SEQ_CLS", init_lora_weights=False, target_modules=["q_proj", "embed_tokens"], bias="lora_only"
    )
    model = peft.get_peft_model(load_base("tiny", "classification", 3)[0], config)
    model.save_pretrained(tmp_path)
    report = inspect_adapter(tmp_path, "tiny")
    assert not report.wrong
    assert report.effect.output.before is None
    assert report.modules[0].in_features == model.config.vocab_size


def test_an_adapter_saved_under_a_name_lies_one_folder_below(tmp_path):
    shutil.copytree(JARGON, tmp_path / "jargon")
    report = inspect_adapter(tmp_path)
    assert not report.wrong
    assert "jargon" in found(report, "note", "folder-below").sentence


def test_a_head_that_is_tied(made, parts):
    weight = load_base("tiny")[0].lm_head.weight.detach().clone()
    folder = made({"modules_to_save": ["lm_head"]}, parts[1] | {f"{PREFIX}lm_head.weight": weight * 1.1})
    report = inspect_adapter(folder, "tiny")
    assert not report.wrong
    assert found(report, "note", "tied-head").names == ("lm_head",)
    missing = inspect_adapter(made({"modules_to_save": ["lm_head"]}))
    assert "lm_head" in found(missing, "wrong", "saved-module-missing").sentence


# What is broken


def dead(tensors):
    return {k: torch.zeros_like(t) if "lora_B" in k else t for k, t in tensors.items()}


BROKEN = {  # code: how the tensors of a sound adapter are spoilt, and words of the finding
    "never-trained": (dead, "never trained"),
    "not-finite": (lambda t: changed(t, Q0, "lora_A", lambda A: A.clone().fill_(math.nan)), "1 tensor with NaN"),
    "half-a-pair": (lambda t: {k: v for k, v in t.items() if k != key(Q0, "lora_B")}, "only one of A and B"),
    "factors-do-not-fit": (lambda t: changed(t, Q0, "lora_B", lambda B: B[:, :5]), "cannot be multiplied"),
    "empty-factors": (lambda t: changed(t, Q0, "lora_B", lambda B: B[:0]), "is empty"),
    "no-floats": (lambda t: changed(t, Q0, "lora_A", lambda A: A.to(torch.int8)), "whole numbers"),
    "no-prefix": (lambda t: {k.removeprefix(PREFIX): v for k, v in t.items()}, "lack PEFT's prefix"),
    "wrapped-twice": (lambda t: {PREFIX + k: v for k, v in t.items()}, "prefix twice"),
    "wrapper-in-names": (lambda t: {k.replace("layers", "_orig_mod.layers"): v for k, v in t.items()}, "compile"),
    "adapter-in-names": (lambda t: {k.replace(".weight", ".mine.weight"): v for k, v in t.items()}, "1 adapter: mine"),
    "two-adapters": (
        lambda t: {k.replace(".weight", f".{n}.weight"): v.clone() for k, v in t.items() for n in "ab"},
        "2 adapters: a, b",
    ),
    "no-tensors": (lambda t: {}, "holds no tensors"),
}  # fmt: skip


@pytest.mark.parametrize("code", BROKEN)
def test_broken_tensors(made, parts, code):
    spoil, words = BROKEN[code]
    report = inspect_adapter(made(tensors=spoil(parts[1])))
    assert report.wrong
    assert words in found(report, "wrong", code).sentence


def test_some_dead_factors_are_a_note(made, parts):
    report = inspect_adapter(made(tensors=changed(parts[1], Q0, "lora_B", torch.zeros_like)), "tiny")
    assert not report.wrong
    assert found(report, "note", "dead-factors").names == (Q0,)
    assert {module.name: module.effective_rank for module in report.modules}[Q0] == 0


@pytest.mark.parametrize(
    ("spoil", "code", "words"),
    [
        (lambda t: {k: v for k, v in t.items() if Q0 not in k}, "missing", "1 of 21 modules"),
        (lambda t: t | {k.replace(V2, "model.layers.9.self_attn.v_proj"): v.clone() for k, v in t.items() if V2 in k},
         "extra", "1 of 22 adapted modules"),
        (lambda t: {k.replace(".model.model.", ".model."): v for k, v in t.items()}, "extra", "calls it model.layers"),
        (lambda t: changed(t, Q0, "lora_A", lambda A: A[:, :64]), "wrong-base", "made for 64 → 192"),
        (lambda t: t | {f"{PREFIX}lm_head.weight": torch.zeros(2000, 192)}, "vocabulary", "2,000 rows"),
        (lambda t: t | {f"{PREFIX}score.weight": torch.zeros(2, 192)}, "extra", "score.weight"),
        (dead, "output", "bit for bit"),
    ],
)  # fmt: skip
def test_what_only_the_base_can_tell(made, parts, spoil, code, words):
    report = inspect_adapter(made(tensors=spoil(parts[1])), "tiny")
    assert words in found(report, "wrong", code).sentence


def test_whether_the_output_changes_is_the_matter_of_lesson_13(made, parts):
    assert found(inspect_adapter(JARGON, "tiny"), "ok", "output").lesson == "13"
    assert found(inspect_adapter(made(tensors=dead(parts[1])), "tiny"), "wrong", "output").lesson == "13"


def test_what_load_adapter_refuses_is_said(made, parts):
    report = inspect_adapter(made(tensors=parts[1] | {f"{PREFIX}{Q0}.scales": torch.ones(3)}), "tiny")
    assert "have no place in this model" in found(report, "wrong", "refused").sentence


def test_gpt2s_layers_are_stored_the_other_way_round(made):
    names = [f"transformer.h.{i}.attn.c_attn" for i in range(12)]
    tensors = {key(name): torch.randn(8, 768) for name in names}
    tensors |= {key(name, "lora_B"): torch.randn(2304, 8) for name in names}
    report = inspect_adapter(made({"target_modules": ["c_attn"], "fan_in_fan_out": True}, tensors), "gpt2")
    assert not report.wrong
    assert found(report, "ok", "fits")


def test_the_wrong_base_by_shape_and_by_name():
    report = inspect_adapter(JARGON, "smollm2-135m", config_only=True)
    assert "192" in found(report, "wrong", "wrong-base").sentence
    assert "'tiny'" in found(report, "wrong", "base-name").sentence
    assert not report.with_weights


def test_targets_that_the_file_does_not_have(made):
    report = inspect_adapter(made({"target_modules": ["q_proj"]}), "tiny")
    assert "18 modules" in found(report, "wrong", "not-targeted").sentence
    report = inspect_adapter(made({"target_modules": ["query"]}), "tiny")
    assert "no module" in found(report, "wrong", "targets").sentence


@pytest.mark.parametrize(
    ("fields", "level", "code"),
    [
        ({"r": 0}, "wrong", "config"),
        ({"lora_alpha": 0}, "wrong", "scale"),
        ({"peft_type": None}, "wrong", "config"),
        ({"modules_to_save": 3}, "wrong", "config"),
        ({"task_type": {}}, "wrong", "config"),
        ({"alpha_pattern": {"q_proj": "much"}}, "wrong", "config"),
        ({"r": 16}, "wrong", "rank-differs"),
        ({"r": 16, "lora_alpha": 8}, "note", "alpha-left"),
        ({"init_lora_weights": "pissa"}, "note", "shifted-start"),
        ({"base_model_name_or_path": None}, "note", "no-base-name"),
        ({"peft_type": "BOFT"}, "note", "kind"),
    ],
)
def test_configs(made, fields, level, code):
    found(inspect_adapter(made(fields)), level, code)


# Files and folders


def files_of(case, folder, made):
    """Make a folder, or a file, that cannot be read as an adapter."""
    if case == "empty-folder":
        folder.mkdir()
    elif case == "no-config":
        return made(config=False)
    elif case == "config":
        (made() / "adapter_config.json").write_text("r: 8\n")
        return folder
    elif case == "damaged":
        weights = made() / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    elif case == "lfs-pointer":
        (made() / "adapter_model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    elif case == "whole-model":
        made(weights="model.safetensors", config=False)
    elif case == "several-files":
        made(weights="b.safetensors", config=False)
        made(weights="a.safetensors", config=False)
    elif case == "several-folders":
        folder.mkdir()
        for name in ("a", "b"):
            shutil.copytree(JARGON, folder / name)
    elif case == "two-adapters":
        made()
        made(weights="adapters.safetensors")
    elif case == "no-weights":
        (made() / "adapter_model.safetensors").unlink()
    elif case == "no-adapter":
        made(tensors={"conv.weight": torch.ones(2, 2)}, config=False, weights="thing.safetensors")
    elif case == "unknown-file":
        folder.mkdir()
        (folder / "adapter.gguf").write_bytes(b"GGUF")
        return folder / "adapter.gguf"
    return folder


@pytest.mark.parametrize(
    "case",
    ["empty-folder", "no-config", "config", "damaged", "lfs-pointer", "whole-model", "several-files", "several-folders",
     "two-adapters", "no-weights", "no-adapter", "unknown-file"],
)  # fmt: skip
def test_files_that_are_no_adapter(tmp_path, made, case):
    report = inspect_adapter(files_of(case, tmp_path / "adapter", made), "tiny")
    assert found(report, "wrong", case).way_out


class Bomb:
    """A pickle that would run code."""

    def __reduce__(self):
        return (pytest.fail, ("the pickle was opened",))


@pytest.mark.parametrize("name", ["adapter_model.bin", "lora.pt", "lora.ckpt"])
def test_pickles_are_named_and_not_opened(tmp_path, made, name):
    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    for path in (tmp_path, tmp_path / name):
        assert name in found(inspect_adapter(path), "wrong", "pickle").sentence
    (made() / name).write_bytes(pickle.dumps(Bomb()))
    assert found(inspect_adapter(tmp_path / "adapter"), "note", "pickle").names == (name,)


def test_a_pickle_under_another_name(made):
    folder = made()
    (folder / "adapter_model.safetensors").write_bytes(pickle.dumps(Bomb()))
    assert "pickle under another name" in found(inspect_adapter(folder), "wrong", "damaged").sentence


# Foreign files


def test_kohyas_file(tmp_path):
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {
        f"{name}.lora_down.weight": torch.randn(4, 32), f"{name}.lora_up.weight": torch.randn(32, 4),
        f"{name}.alpha": torch.tensor(2.0),
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.randn(4, 16, 3, 3),
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.randn(16, 4, 1, 1),
    }  # fmt: skip
    save_file(tensors, tmp_path / "style.safetensors", {"ss_network_dim": "4"})
    report = inspect_adapter(tmp_path / "style.safetensors")
    assert (report.format, report.wrong) == ("kohya", False)
    assert "kohya" in found(report, "note", "kind").sentence
    assert {module.scale for module in report.modules} == {0.5, 1}
    assert all(module.norm > 0 for module in report.modules)
    assert found(inspect_adapter(tmp_path / "style.safetensors", "tiny"), "wrong", "other-world")
    shown = call(tmp_path / "style.safetensors", "--figure", tmp_path / "style.png")
    assert shown.exit_code == 0
    kinds = [line.split()[0] for line in shown.stdout.splitlines()[1:3]]  # what stands behind the last number of a name
    assert sorted(kinds) == ["attn1_to_q", "mlp_fc1"]
    assert (tmp_path / "style.png").exists()


@pytest.mark.parametrize("ends", [("lora_A.weight", "lora_B.weight"), ("lora.down.weight", "lora.up.weight")])
@pytest.mark.parametrize("part", ["unet", "transformer"])
def test_diffusers_file(tmp_path, part, ends):
    name = f"{part}.transformer_blocks.0.attn.to_q"
    tensors = {f"{name}.{ends[0]}": torch.randn(4, 32), f"{name}.{ends[1]}": torch.randn(48, 4)}
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    report = inspect_adapter(tmp_path)
    assert (report.format, report.wrong) == ("diffusers", False)
    assert [(module.name, module.scale) for module in report.modules] == [(name, 1)]
    assert (report.modules[0].in_features, report.modules[0].out_features) == (32, 48)
    said = {"lora_adapter_metadata": json.dumps({f"{part}.r": 4, f"{part}.lora_alpha": 8})}
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors", said)
    assert inspect_adapter(tmp_path).modules[0].scale == 2


def mlx_folder(folder, parts, scale=20.0):
    """What mlx-lm writes: both factors transposed, a scale that the rank does not divide."""
    names = {"lora_A.weight": "lora_a", "lora_B.weight": "lora_b"}
    tensors = {}
    for k, tensor in parts[1].items():
        name, which, end = k.removeprefix(PREFIX).rsplit(".", 2)
        tensors[f"{name}.{names[f'{which}.{end}']}"] = tensor.T.contiguous()
    save_file(tensors, folder / "adapters.safetensors", {"format": "mlx"})
    save_file(tensors, folder / "0000100_adapters.safetensors", {"format": "mlx"})
    said = {"fine_tune_type": "lora", "model": "tiny", "num_layers": 16,
            "lora_parameters": {"rank": 8, "scale": scale, "dropout": 0.0}}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(said))


def test_mlx_lms_folder(tmp_path, parts):
    mlx_folder(tmp_path, parts)
    report = inspect_adapter(tmp_path, "tiny", config_only=True)
    assert (report.format, report.wrong) == ("mlx-lm", False)
    assert "does not depend on the rank" in found(report, "ok", "scale").sentence
    assert found(report, "ok", "fits")
    own = inspect_adapter(JARGON)
    for theirs, ours in zip(report.modules, own.modules, strict=True):
        assert theirs.norm == pytest.approx(10 * ours.norm, rel=1e-4)  # scale 20 in the place of 16 / 8
        assert (theirs.in_features, theirs.out_features) == (ours.in_features, ours.out_features)


# The command


def call(*arguments):
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)])


def test_the_command_prints_a_table_and_findings(tmp_path):
    result = call(JARGON, "--figure", tmp_path / "norms.png")
    assert result.exit_code == 0
    assert "self_attn.q_proj" in result.stdout
    assert "192 → 192" in result.stdout
    assert "(lesson 03)" in result.stdout
    assert "nothing is wrong" in result.stdout
    assert (tmp_path / "norms.png").read_bytes().startswith(b"\x89PNG")
    assert V2 in call(JARGON, "--each").stdout


def test_json_and_the_exit_status(made, parts):
    sound = call(JARGON, "--base", "tiny", "--json")
    assert sound.exit_code == 0
    said = json.loads(sound.stdout)
    assert said["wrong"] is False
    assert said["modules"][0]["rank"] == 8
    assert 0 < said["effect"]["merging"]["bfloat16"]["error"] < 0.1
    nan = call(made(tensors=changed(parts[1], Q0, "lora_A", lambda A: A.clone().fill_(math.nan))), "--json")
    assert nan.exit_code == 1
    said = json.loads(nan.stdout, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert said["wrong"] is True
    assert "not-finite" in {finding["code"] for finding in said["findings"]}


def test_mistakes_in_the_call_are_one_line(tmp_path):
    for arguments, words in [
        ([tmp_path / "nowhere"], "no such file or folder"),
        ([JARGON, "--config-only"], "--base"),
        ([JARGON, "--base", "tinny"], "tinny"),
    ]:
        result = call(*arguments)
        assert result.exit_code == 1
        assert words in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1


def test_the_help_has_examples():
    assert "lora-edu inspect data/adapters/tiny-jargon" in call("--help").output
