"""GGUF files: what is in them read back, what they refuse, and llama.cpp's answers with them against transformers'."""

import copy
from types import SimpleNamespace

import gguf
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from shapes import tiny_model

import lora_edu.serving.gguf as ours
from lora_edu import LoraConfig, inject, load_adapter, load_base, merge_and_unload, save_adapter, set_adapter
from lora_edu.core.adapter import adapter_layers
from lora_edu.files import data_path
from lora_edu.lab.bases import BaseMissing, require_gguf
from lora_edu.lab.datasets import format_chat, prompt_ids
from lora_edu.serving.gguf import permuted, save_adapter_gguf, save_model_gguf
from lora_edu.serving.llama_cpp import LlamaCpp

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:the output head was tied to the embedding:UserWarning"),
]

SHIPPED = data_path("adapters", "smollm2-devils-dictionary")
# Three ranks, two alphas and rsLoRA: five different scales over six kinds of layer.
MIXED = {
    "r": 4, "lora_alpha": 6, "target_modules": "all-linear", "use_rslora": True,
    "rank_pattern": {"k_proj": 2, "down_proj": 5}, "alpha_pattern": {"v_proj": 3},
}  # fmt: skip


def randomised(model, seed=0, std=0.1):
    """The model with random values in every adapter's factors: B too, which starts at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return model


def mixed_model():
    model = tiny_model("llama", torch.float32)
    inject(model, LoraConfig(**MIXED))
    return randomised(model)


def read(path):
    """(settings, tensors) of a GGUF file."""
    reader = gguf.GGUFReader(path)
    settings = {name: field.contents() for name, field in reader.fields.items()}
    return settings, {t.name: torch.tensor(gguf.dequantize(t.data, t.tensor_type)) for t in reader.tensors}


def transformers_order(rows, heads):
    """The inverse of ``permuted``."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_base_file(path, model, tokenizer=None):
    """A GGUF file of a Llama with its settings, and with weights of zero: the pattern for ``save_model_gguf``."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    if tokenizer is not None:
        tokens = tokenizer.convert_ids_to_tokens(range(config.vocab_size))
        special = set(tokenizer.all_special_tokens)
        kinds = [gguf.TokenType.CONTROL if each in special else gguf.TokenType.NORMAL for each in tokens]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(tokens)
        writer.add_token_types(kinds)
        writer.add_token_merges(["a b"])  # of no use here: prompts come as ids
        writer.add_bos_token_id(tokenizer.bos_token_id)
        writer.add_eos_token_id(tokenizer.eos_token_id)
    for name, parameter in model.named_parameters():
        writer.add_tensor(ours.gguf_name(name, config), torch.zeros(parameter.shape).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# What is in the files


def test_permuted_turns_halves_into_neighbours():
    assert permuted(torch.arange(8), heads=1).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert permuted(torch.arange(8), heads=2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    rows = torch.randn(12, 3)
    assert torch.equal(transformers_order(permuted(rows, 3), 3), rows)


def test_an_adapters_tensors_read_back_are_a_b_and_its_scale(tmp_path):
    model = mixed_model()
    settings, tensors = read(save_adapter_gguf(model, tmp_path / "new" / "adapter.gguf"))
    assert {key: settings[key] for key in ("general.architecture", "general.type", "adapter.type")} == {
        "general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora",
    }  # fmt: skip
    layers = adapter_layers(model)
    assert len(tensors) == 2 * len(layers) == 2 * 2 * 7
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
             "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}  # fmt: skip
    for name, layer in layers.items():
        _, _, number, _, kind = name.split(".")
        a, b = (tensors[f"blk.{number}.{names[kind]}.weight.lora_{factor}"] for factor in "ab")
        heads = {"q_proj": 4, "k_proj": 2}.get(kind)
        b = b if heads is None else transformers_order(b, heads)
        assert torch.equal(a, layer.lora_A.float())
        scale = settings["adapter.lora.alpha"] / b.shape[1]  # as llama.cpp computes it
        torch.testing.assert_close(scale * b @ a, layer.delta_weight().float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "alpha"),
    [({}, 16), ({"use_rslora": True}, 32), ({"rank_pattern": {"v_proj": 2}}, 16), ({"lora_alpha": -3}, -3)],
)
def test_b_is_written_as_it_is_where_one_alpha_serves_all(tmp_path, settings, alpha):
    model = tiny_model("llama", torch.float32)
    inject(model, LoraConfig(**{"r": 4, "lora_alpha": 16, "target_modules": ["v_proj", "up_proj"]} | settings))
    found, tensors = read(save_adapter_gguf(randomised(model), tmp_path / "adapter.gguf"))
    assert found["adapter.lora.alpha"] == alpha
    layer = adapter_layers(model)["model.layers.1.self_attn.v_proj"]
    assert torch.equal(tensors["blk.1.attn_v.weight.lora_b"], layer.lora_B)


def test_an_alpha_of_zero_stays_without_effect(tmp_path):
    model = tiny_model("llama", torch.float32)
    inject(model, LoraConfig(lora_alpha=0, target_modules=["v_proj"]))
    settings, tensors = read(save_adapter_gguf(randomised(model), tmp_path / "adapter.gguf"))
    assert settings["adapter.lora.alpha"] != 0  # llama.cpp takes 0 for "not said", and scales by 1
    assert not any(tensor.any() for name, tensor in tensors.items() if name.endswith("lora_b"))


def test_a_folder_and_the_model_that_wrote_it_give_the_same_file(tmp_path):
    model = mixed_model()
    folder = save_adapter(model, tmp_path / "folder")
    one = save_adapter_gguf(model, tmp_path / "one.gguf").read_bytes()
    assert save_adapter_gguf(folder, tmp_path / "two.gguf", base=model.config).read_bytes() == one


def test_a_merged_models_tensors_and_the_bases_settings_read_back(tmp_path):
    model = mixed_model()
    base_file = write_base_file(tmp_path / "base.gguf", tiny_model("llama", torch.float32))
    merged = merge_and_unload(model)
    settings, tensors = read(save_model_gguf(merged, tmp_path / "merged.gguf", base_file, "f32"))
    assert settings["llama.attention.head_count_kv"] == 2
    assert settings["general.file_type"] == gguf.LlamaFileType.ALL_F32
    attention = merged.model.layers[1].self_attn
    for kind, heads, layer in (("q", 4, attention.q_proj), ("k", 2, attention.k_proj)):
        assert torch.equal(transformers_order(tensors[f"blk.1.attn_{kind}.weight"], heads), layer.weight)
        assert torch.equal(transformers_order(tensors[f"blk.1.attn_{kind}.bias"], heads), layer.bias)
    assert torch.equal(tensors["blk.0.ffn_down.weight"], merged.model.layers[0].mlp.down_proj.weight)
    assert torch.equal(tensors["output.weight"], merged.lm_head.weight)
    half = read(save_model_gguf(merged, tmp_path / "half.gguf", base_file))[1]
    assert torch.equal(half["blk.0.ffn_down.weight"], tensors["blk.0.ffn_down.weight"].half().float())
    assert torch.equal(half["output_norm.weight"], merged.model.norm.weight)


def test_a_head_that_merging_made_the_models_own_is_written(tmp_path):
    model = tiny_model("llama", torch.float32, tie_word_embeddings=True)
    base_file = write_base_file(tmp_path / "base.gguf", model)
    inject(model, LoraConfig(target_modules=["lm_head"]))
    merged = merge_and_unload(randomised(model))
    tensors = read(save_model_gguf(merged, tmp_path / "merged.gguf", base_file, "f32"))[1]
    assert torch.equal(tensors["output.weight"], merged.lm_head.weight)
    assert torch.equal(tensors["token_embd.weight"], merged.model.embed_tokens.weight)
    assert not torch.equal(tensors["output.weight"], tensors["token_embd.weight"])


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def full(writer):
        raise OSError("no space left")

    path = tmp_path / "adapter.gguf"
    path.write_bytes(b"the old one")
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(OSError, match="no space left"):
        save_adapter_gguf(mixed_model(), path)
    assert path.read_bytes() == b"the old one"
    assert list(tmp_path.iterdir()) == [path]


# What is refused


def put(folder, **tensors):
    """Add tensors to a saved adapter."""
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file) | tensors, file)


@pytest.mark.errors
@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"target_modules": ["v_proj", "embed_tokens"]}, "LoRA on the embedding.*merge_and_unload.*save_model_gguf"),
        ({"target_modules": ["v_proj", "lm_head"]}, "LoRA on the output head"),
        ({"target_modules": ["v_proj"], "bias": "lora_only"}, "a trained bias"),
        ({"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]}, r"lm_head\.weight.*from modules_to_save"),
        (
            {"target_modules": ["v_proj"], "init_lora_weights": "loftq"},
            "init_lora_weights='loftq'.*that this start has changed.*merge_and_unload",
        ),
    ],
)
def test_what_an_adapters_file_cannot_hold_is_refused(tmp_path, settings, says):
    model = tiny_model("llama", torch.float32)
    inject(model, LoraConfig(**settings))
    with pytest.raises(ValueError, match=says):
        save_adapter_gguf(model, tmp_path / "adapter.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.errors
def test_a_dora_folder_is_refused(tmp_path):
    theirs = peft.get_peft_model(
        tiny_model("llama", torch.float32), peft.LoraConfig(target_modules=["v_proj"], use_dora=True)
    )
    theirs.save_pretrained(tmp_path / "dora")
    with pytest.raises(ValueError, match=r"lora_magnitude_vector.*DoRA's magnitudes.*merge_and_unload"):
        save_adapter_gguf(tmp_path / "dora", tmp_path / "adapter.gguf", base=theirs.config)


@pytest.mark.errors
def test_other_models_and_wrong_bases_are_refused(tmp_path):
    model = tiny_model("gpt2", torch.float32)
    inject(model, LoraConfig(target_modules=["c_attn"]))
    with pytest.raises(ValueError, match=r"model_type='gpt2'.*convert_lora_to_gguf"):
        save_adapter_gguf(model, tmp_path / "adapter.gguf")
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.mlp\.down_proj' do not fit the base.*\(192, 384\)"):
        save_adapter_gguf(SHIPPED, tmp_path / "adapter.gguf", base="tiny")
    llama = mixed_model()
    folder = save_adapter(llama, tmp_path / "folder")
    with pytest.raises(ValueError, match="names no base: give base"):
        save_adapter_gguf(folder, tmp_path / "adapter.gguf")
    put(folder, **{"base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.ones(4, 24)})
    with pytest.raises(ValueError, match=r"layers\.7\.mlp\.up_proj.*shape \(\)"):
        save_adapter_gguf(folder, tmp_path / "adapter.gguf", base=llama.config)
    assert [each.name for each in tmp_path.iterdir()] == ["folder"]


@pytest.mark.errors
def test_a_merged_model_that_does_not_fit_its_base_file_is_refused(tmp_path):
    model = tiny_model("llama", torch.float32)
    base_file = write_base_file(tmp_path / "base.gguf", model)
    with pytest.raises(ValueError, match="weight_type='int4': expected one of 'f32', 'f16', 'q8_0'"):
        save_model_gguf(model, tmp_path / "merged.gguf", base_file, "int4")
    grown = copy.deepcopy(model)
    grown.resize_token_embeddings(64, mean_resizing=False)
    with pytest.raises(ValueError, match=r"'output\.weight' has shape \(61, 24\) there and \(64, 24\) here"):
        save_model_gguf(grown, tmp_path / "merged.gguf", base_file)
    inject(model, LoraConfig(target_modules=["v_proj"]))
    with pytest.raises(ValueError, match="still has adapters: call merge_and_unload"):
        save_model_gguf(model, tmp_path / "merged.gguf", base_file)
    assert [each.name for each in tmp_path.iterdir()] == ["base.gguf"]


# llama.cpp


@pytest.fixture(scope="module")
def llama_cpp():
    """The package that runs it, or the reason to skip."""
    return pytest.importorskip(
        "xllamacpp", reason="xllamacpp is not installed: pip install -e '.[serve]' -c constraints.txt"
    )


def serve(base, adapters):
    """llama.cpp in this process, with its intermediate results in float32 as far as it lets one choose."""
    return LlamaCpp(base, adapters, context=256, float32=True)


def answer(server, ids, scales, tokens=24):
    """(the greedy answer's token ids, {id: logarithm of its probability} of the likeliest first tokens)."""
    content = server.complete(ids, scales, tokens, n_probs=10)["choices"][0]["logprobs"]["content"]
    return [each["id"] for each in content], {each["id"]: each["logprob"] for each in content[0]["top_logprobs"]}


def expected(model, ids, scales, tokens=24):
    """The same from transformers: the model's adapters, each scaled by a number."""
    used = {name: scale for name, scale in scales.items() if scale}
    set_adapter(model, list(used))
    kept = {layer: layer.scaling for name in used for layer in adapter_layers(model, name).values()}
    for layer in kept:
        layer.scaling *= used[layer.adapter_name]
    prompt = torch.tensor([ids])
    with torch.no_grad():
        out = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    for layer, scaling in kept.items():
        layer.scaling = scaling
    logprobs = out.logits[0][0].log_softmax(-1)
    return out.sequences[0, len(ids) :].tolist(), dict(enumerate(logprobs.tolist()))


def distance(found, reference):
    """The largest difference of two dictionaries' values, over the keys of the first."""
    return max(abs(value - reference[key]) for key, value in found.items())


@pytest.fixture(scope="module")
def tiny(llama_cpp, tmp_path_factory):
    """The course's small model in float32 and four adapters of it, in transformers and in llama.cpp."""
    folder = tmp_path_factory.mktemp("tiny")
    model, tokenizer = load_base("tiny")
    pattern = write_base_file(folder / "pattern.gguf", model, tokenizer)
    base = save_model_gguf(model, folder / "base.gguf", pattern, "f32")
    for name in ("devils-dictionary", "jargon"):
        load_adapter(model, data_path("adapters", f"tiny-{name}"), adapter_name=name)
    inject(model, LoraConfig(**MIXED), adapter_name="mixed")
    for layer in adapter_layers(model, "mixed").values():
        torch.nn.init.normal_(layer.lora_B, std=0.02, generator=torch.Generator().manual_seed(1))
    names = ("devils-dictionary", "jargon", "mixed")
    files = [save_adapter_gguf(model, folder / f"{name}.gguf", adapter_name=name) for name in names]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours, "permuted", lambda rows, heads: rows)
        files.append(save_adapter_gguf(model, folder / "unpermuted.gguf", adapter_name="devils-dictionary"))
    server = serve(base, files)
    ids = prompt_ids("politician (noun):", tokenizer)
    return SimpleNamespace(model=model.eval(), names=names, base=base, server=server, ids=ids)


@pytest.mark.parity
@pytest.mark.parametrize(
    "scales", [(0, 0, 0), (0.5, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0.5, 0.25, 1)], ids=str
)
def test_llama_cpp_answers_as_transformers_does(tiny, scales):
    text, logprobs = answer(tiny.server, tiny.ids, scales)
    their_text, their_logprobs = expected(tiny.model, tiny.ids, dict(zip(tiny.names, scales, strict=True)))
    assert text == their_text
    assert distance(logprobs, their_logprobs) < 1e-3
    if any(scales):  # a scale that is wrong by a tenth is seen
        other = {name: 1.1 * scale for name, scale in zip(tiny.names, scales, strict=True)}
        assert distance(logprobs, expected(tiny.model, tiny.ids, other, tokens=1)[1]) > 1e-2


@pytest.mark.parity
def test_without_the_permutation_llama_cpp_answers_otherwise(tiny):
    right, wrong = answer(tiny.server, tiny.ids, (1, 0, 0, 0)), answer(tiny.server, tiny.ids, (0, 0, 0, 1))
    assert wrong[0] != right[0]


@pytest.mark.parity
def test_a_merged_model_answers_as_its_adapter_beside_the_base(llama_cpp, tiny, tmp_path):
    model, _ = load_base("tiny")
    load_adapter(model, data_path("adapters", "tiny-jargon"))
    merged = save_model_gguf(merge_and_unload(model), tmp_path / "merged.gguf", tiny.base, "f32")
    text, logprobs = answer(serve(merged, []), tiny.ids, [])
    other_text, others = answer(tiny.server, tiny.ids, (0, 1, 0, 0))
    assert text == other_text
    assert distance(logprobs, others) < 1e-3


@pytest.mark.parity
def test_asked_for_text_it_answers_with_the_adapter_that_the_request_scales(tiny):
    ids, logprobs = answer(tiny.server, tiny.ids, (0, 1), tokens=8)
    said = load_base("tiny")[1].decode(ids, skip_special_tokens=True).strip()
    assert tiny.server.ask(tiny.ids, (0, 1), 8) == said != tiny.server.ask(tiny.ids, max_new_tokens=8)
    assert tiny.server.first_logprobs(tiny.ids, (0, 1)) == logprobs


@pytest.mark.errors
def test_without_the_package_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'lora-edu\[serve\]'"):
        LlamaCpp("base.gguf")


@pytest.mark.errors
def test_llama_cpp_refuses_an_adapter_of_another_base(llama_cpp, tiny, tmp_path):
    with pytest.raises(RuntimeError, match="Failed to init server"):
        serve(tiny.base, [save_adapter_gguf(SHIPPED, tmp_path / "adapter.gguf")])


@pytest.fixture(scope="module")
def smollm2(llama_cpp):
    """SmolLM2 with its shipped adapter in transformers, the 4-bit file that it came from, and two words to define."""
    try:
        base_file = require_gguf("smollm2-135m")
    except BaseMissing as missing:  # with CI=true it is another error, and no reason to skip
        pytest.skip(str(missing))
    model, tokenizer = load_base("smollm2-135m")
    entries = [{"word": word, "pos": "noun", "definition": ""} for word in ("bounty", "eccentricity")]
    prompts = [format_chat(entry, tokenizer)[0] for entry in entries]
    load_adapter(model, SHIPPED)
    return SimpleNamespace(model=model, base_file=base_file, tokenizer=tokenizer, prompts=prompts)


@pytest.mark.parity
def test_smollm2_and_its_adapter_answer_in_llama_cpp(llama_cpp, smollm2, tmp_path):
    base = save_model_gguf(load_base("smollm2-135m")[0], tmp_path / "base.gguf", smollm2.base_file, "f32")
    server = serve(base, [save_adapter_gguf(SHIPPED, tmp_path / "adapter.gguf")])
    for prompt in smollm2.prompts:
        text, logprobs = answer(server, prompt, [1])  # as text: llama.cpp's tokenizer has come along
        their_text, theirs = expected(smollm2.model, prompt_ids(prompt, smollm2.tokenizer), {"default": 1})
        assert text == their_text
        assert len(text) >= 10
        assert distance(logprobs, theirs) < 1e-2
    turns = [{"role": "user", "content": "What is a politician?"}]
    prompt = smollm2.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert server.chat(turns, [1]) == server.ask(prompt, [1]) != server.chat(turns, [0])


@pytest.mark.parity
def test_the_four_bit_base_answers_but_for_the_rounding_of_its_activations(llama_cpp, smollm2, tmp_path):
    # llama.cpp rounds what enters a 4-bit matrix to 8 bits. Which scale it was can still be told.
    server = serve(smollm2.base_file, [save_adapter_gguf(smollm2.model, tmp_path / "adapter.gguf")])
    for prompt in smollm2.prompts:
        ids, scales = prompt_ids(prompt, smollm2.tokenizer), (0, 0.5, 1)
        theirs = {scale: expected(smollm2.model, ids, {"default": scale}, tokens=1)[1] for scale in scales}
        for scale in scales:
            logprobs = answer(server, ids, [scale], tokens=1)[1]
            away = {other: distance(logprobs, there) for other, there in theirs.items()}
            assert away.pop(scale) < 0.5
            assert min(away.values()) > 0.6
