"""A model with added tokens: the embedding's new rows cross between PEFT's files and ours, whatever else is adapted."""

import copy

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from shapes import moved, relative_error
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaConfig, LlamaForCausalLM, T5Config
from transformers import T5ForConditionalGeneration as T5

from lora_edu import (
    LoraConfig,
    disable_adapter,
    hotswap_adapter,
    inject,
    load_adapter,
    load_base,
    merge,
    merge_and_unload,
    save_adapter,
    set_adapter,
)
from lora_edu.core.peft_io import WEIGHTS_FILE
from lora_edu.files import data_path

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:the output head was tied:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*ensure_weight_tying.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning"),
]

IDS = torch.arange(50, 64)[None]
BOTH = ["embed_tokens", "lm_head"]
KINDS = {
    "q, v": {"target_modules": ["q_proj", "v_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "biases": {"target_modules": ["q_proj"], "bias": "lora_only"},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding and head": {"target_modules": BOTH},
    "embedding saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "head saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "both saved": {"target_modules": ["q_proj"], "modules_to_save": BOTH},
    "embedding saved, tied": {
        "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True,
    },
    "head saved, tied": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    "both saved, tied": {"target_modules": ["q_proj"], "modules_to_save": BOTH, "ensure_weight_tying": True},
    "q, tied": {"target_modules": ["q_proj"], "ensure_weight_tying": True},
}  # fmt: skip
# PEFT writes the adapted one of two untied layers, and not the other's new rows.
LOST_BY_PEFT = [("untied", "embedding"), ("untied", "head")]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    found = {}
    for name, tied in (("tied", True), ("untied", False)):
        torch.manual_seed(0)
        settings = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2}
        config = LlamaConfig(
            vocab_size=61, num_hidden_layers=2, tie_word_embeddings=tied, attention_bias=True, **settings
        )
        LlamaForCausalLM(config).save_pretrained(found.setdefault(name, tmp_path_factory.mktemp(name)))
    return found


def grown(folder, seed, tokens=64):
    """The base with three more tokens, whose rows are drawn anew."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(seed)
    model.resize_token_embeddings(tokens, mean_resizing=False)
    return model.eval()


@torch.no_grad()
def logits(model):
    return model.eval()(IDS).logits


def theirs(folder, kind):
    kind = copy.deepcopy(kind)  # PEFT writes into the caller's lists
    return moved(peft.get_peft_model(grown(folder, 1), peft.LoraConfig(r=2, init_lora_weights=False, **kind)))


def ours(folder, kind):
    inject(model := grown(folder, 1), LoraConfig(r=2, init_lora_weights=False, **kind))
    return moved(model)


CASES = [(base, kind) for base in ("tied", "untied") for kind in KINDS]


@pytest.mark.parametrize(("base", "kind"), CASES)
def test_we_read_what_peft_writes(base, kind, bases, tmp_path):
    trained = theirs(bases[base], KINDS[kind])
    trained.save_pretrained(tmp_path)
    again = logits(peft.PeftModel.from_pretrained(grown(bases[base], 2), tmp_path))
    model = grown(bases[base], 2)
    plain, before = logits(model), copy.deepcopy(model.state_dict())
    load_adapter(model, tmp_path)
    assert relative_error(logits(model), again) <= 1e-6
    assert (relative_error(again, logits(trained)) <= 1e-6) == ((base, kind) not in LOST_BY_PEFT)
    with disable_adapter(model):
        assert torch.equal(logits(model), plain)
    merge(model)
    assert relative_error(logits(model), again) <= 1e-5
    with disable_adapter(model):
        assert torch.equal(logits(model), plain)
    assert relative_error(logits(merge_and_unload(model)), again) <= 1e-5
    assert model.state_dict().keys() == before.keys()


@pytest.mark.parametrize(("base", "kind"), CASES)
def test_what_we_write_is_read_here_and_by_peft(base, kind, bases, tmp_path):
    trained = ours(bases[base], KINDS[kind])
    save_adapter(trained, tmp_path)
    here = grown(bases[base], 2)
    load_adapter(here, tmp_path)
    assert relative_error(logits(here), logits(trained)) <= 1e-6
    there = peft.PeftModel.from_pretrained(grown(bases[base], 2), tmp_path)
    assert relative_error(logits(there), logits(trained)) <= 1e-6
    save_adapter(here, tmp_path / "again")  # what was loaded can be saved
    found, expected = load_file(tmp_path / "again" / WEIGHTS_FILE), load_file(tmp_path / WEIGHTS_FILE)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


@pytest.mark.parametrize("kind", ["q, v", "embedding", "both saved, tied"])
def test_the_course_s_base(kind, tmp_path):
    """``load_base`` names it "tiny", which is no folder: it notes the number of rows itself."""

    def tiny(seed):
        model, _ = load_base("tiny")
        torch.manual_seed(seed)
        model.resize_token_embeddings(4100, mean_resizing=False)
        return model

    inject(trained := tiny(1), LoraConfig(r=2, init_lora_weights=False, **KINDS[kind]))
    ids = torch.tensor([[7, 4097, 4099, 12]])
    save_adapter(trained, tmp_path)
    load_adapter(model := tiny(2), tmp_path)
    expected = trained(ids).logits
    assert relative_error(model(ids).logits, expected) <= 1e-6
    there = AutoModelForCausalLM.from_pretrained(data_path("tiny"), dtype=torch.float32)
    there.resize_token_embeddings(4100)
    assert relative_error(peft.PeftModel.from_pretrained(there, tmp_path).eval()(ids).logits, expected) <= 1e-6
    with pytest.raises(ValueError, match=r"made for 4,100 rows of .* has 4,096.*resize_token_embeddings\(4100\)"):
        load_adapter(load_base("tiny")[0], tmp_path)


def test_a_vocabulary_that_has_not_grown_is_not_written(bases, tmp_path):
    for model in (load_base("tiny")[0], AutoModelForCausalLM.from_pretrained(bases["untied"])):
        inject(model, LoraConfig(r=2, target_modules=["q_proj"]))
        save_adapter(model, tmp_path)
        assert all("lora" in key for key in load_file(tmp_path / WEIGHTS_FILE))


@pytest.mark.errors
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", ["tied", "untied"])
def test_a_model_that_was_not_resized(base, kind, bases, tmp_path):
    theirs(bases[base], KINDS[kind]).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(bases[base])
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"made for 64 rows .* this model has 61.*resize_token_embeddings\(64\)"):
        load_adapter(model, tmp_path)
    assert all(p is before[name][0] and torch.equal(p, before[name][1]) for name, p in model.named_parameters())
    assert before.keys() == dict(model.named_parameters()).keys()


@pytest.mark.errors
def test_a_base_that_is_not_here(bases, tmp_path):
    inject(model := grown(bases["tied"], 1), LoraConfig(r=2, target_modules=["q_proj"]))
    model.config._name_or_path = str(tmp_path / "moved away")
    with pytest.warns(UserWarning, match=r"config of the base .*moved away' is not on this machine"):
        save_adapter(model, tmp_path)


@pytest.mark.errors
@pytest.mark.parametrize("targets", [BOTH, ["q_proj", "embed_tokens"], ["lm_head"]])
def test_one_lora_for_two_tied_layers_is_refused(targets, bases, tmp_path):
    kind = {"target_modules": targets, "ensure_weight_tying": True}
    refused = r"ensure_weight_tying=True: model.embed_tokens and lm_head share a weight.*modules_to_save"
    with pytest.raises(ValueError, match=refused):
        inject(grown(bases["tied"], 1), LoraConfig(r=2, **kind))
    theirs(bases["tied"], kind).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=refused):
        load_adapter(grown(bases["tied"], 1), tmp_path)
    inject(grown(bases["untied"], 1), LoraConfig(r=2, **kind))  # nothing is tied there


@pytest.mark.errors
def test_trained_token_indices_are_refused(bases, tmp_path):
    theirs(bases["tied"], {"target_modules": ["q_proj"], "trainable_token_indices": [61, 62]}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"does not support \{'trainable_token_indices': \[61, 62\]\}"):
        load_adapter(grown(bases["tied"], 1), tmp_path)


@pytest.mark.errors
def test_an_untied_file_for_a_tied_model(bases, tmp_path):
    theirs(bases["untied"], KINDS["q, v"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"differ in the file, and are one tied weight.*tie_word_embeddings=False"):
        load_adapter(grown(bases["tied"], 1), tmp_path)


def test_tied_copies_stay_tied_in_training(bases):
    model = ours(bases["tied"], KINDS["head saved, tied"])
    head, embedding = model.lm_head, model.model.embed_tokens
    assert head.weight is embedding.weight
    assert head.base.weight is embedding.base.weight is not head.weight
    free = ours(bases["tied"], KINDS["both saved"])
    assert free.lm_head.weight is not free.model.embed_tokens.weight


@pytest.mark.parametrize("base", ["tied", "untied"])
def test_several_adapters_each_with_its_rows(base, bases, tmp_path):
    """What is in use when another is loaded or saved makes no difference."""
    expected = {}
    for seed, (name, kind) in enumerate({"a": "q, v", "b": "both saved", "c": "q, v"}.items(), 3):
        model = grown(bases[base], seed)
        options = copy.deepcopy(KINDS[kind])
        trained = peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False, **options))
        moved(trained).save_pretrained(tmp_path / name)
        expected[name] = logits(trained)
    model = grown(bases[base], 2)
    plain = logits(model)
    for name in expected:
        load_adapter(model, tmp_path / name, name)
    for name in ("a", "c", "b", "a", "b", "c"):
        set_adapter(model, name)
        assert relative_error(logits(model), expected[name]) <= 1e-6
        for other in expected:
            save_adapter(model, tmp_path / "again", other)
            load_adapter(again := grown(bases[base], 9), tmp_path / "again")
            assert relative_error(logits(again), expected[other]) <= 1e-6
        with disable_adapter(model):
            assert torch.equal(logits(model), plain)
    hotswap_adapter(model, tmp_path / "a", "c")
    assert relative_error(logits(model), expected["a"]) <= 1e-6
    with disable_adapter(model):
        assert torch.equal(logits(model), plain)


def test_a_merged_embedding_is_written_as_it_was(bases, tmp_path):
    model = ours(bases["untied"], KINDS["embedding and head"])
    expected = logits(model)
    merge(model)
    save_adapter(model, tmp_path)
    load_adapter(again := grown(bases["untied"], 2), tmp_path)
    assert relative_error(logits(again), expected) <= 1e-6


def test_values_are_swapped_with_their_rows(bases, tmp_path):
    """The place was trained here, beside the model's own rows; the file brings others."""
    theirs(bases["untied"], KINDS["q, v"]).save_pretrained(tmp_path)
    expected = logits(peft.PeftModel.from_pretrained(grown(bases["untied"], 2), tmp_path))
    inject(model := grown(bases["untied"], 2), LoraConfig(r=2, **KINDS["q, v"]))
    plain = logits(model)
    hotswap_adapter(model, tmp_path)
    assert relative_error(logits(model), expected) <= 1e-6
    with disable_adapter(model):
        assert torch.equal(logits(model), plain)


def test_all_that_is_tied_follows(tmp_path):
    """T5's encoder and decoder have embeddings of their own, tied to the shared one."""
    settings = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0}
    torch.manual_seed(0)
    T5(T5Config(vocab_size=61, **settings)).save_pretrained(tmp_path / "base")

    def grown_t5(seed):
        model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base").eval()
        torch.manual_seed(seed)
        model.resize_token_embeddings(64, mean_resizing=False)
        return model

    trained = moved(peft.get_peft_model(grown_t5(1), peft.LoraConfig(r=2, target_modules=["q", "v"])))
    trained.save_pretrained(tmp_path / "adapter")
    load_adapter(model := grown_t5(2), tmp_path / "adapter")
    batch = {"input_ids": IDS, "decoder_input_ids": IDS}
    with torch.no_grad():
        assert relative_error(model(**batch).logits, trained.eval()(**batch).logits) <= 1e-6
        with disable_adapter(model):
            assert torch.equal(model(**batch).logits, grown_t5(2)(**batch).logits)


@pytest.mark.errors
def test_another_width_is_no_other_vocabulary(bases, tmp_path):
    theirs(bases["untied"], KINDS["q, v"]).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    key = "base_model.model.model.embed_tokens.weight"
    save_file(tensors | {key: torch.zeros(70, 9)}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(ValueError, match=r"have no place in this model, for example .*embed_tokens.weight"):
        load_adapter(grown(bases["untied"], 2), tmp_path)
