"""The server over loopback: concurrent requests never mix, errors say what is known, and it ends cleanly."""

import json
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lora_edu import LoraConfig, disable_adapter, inject, load_base, set_adapter
from lora_edu.core.adapter import adapter_layers
from lora_edu.files import data_path
from lora_edu.lab.training import generate
from lora_edu.serving.mixed import BASE
from lora_edu.serving.server import Engine, create_app, main, running

NAMES = ("one", "two", "three")
WORDS = ["politician", "computer", "history", "love", "war", "money", "piano", "doctor", "king", "hope", "truth", "bug"]
PROMPTS = [f"{word} (noun):" for word in WORDS]
TOKENS = 10


@pytest.fixture(scope="module")
def model_and_tokenizer():
    """``tiny`` with three random adapters, in float64: rounding that depends on the batch must not turn a word."""
    model, tokenizer = load_base("tiny", dtype=torch.float64)
    for seed, name in enumerate(NAMES):
        torch.manual_seed(seed)
        inject(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False), adapter_name=name)
        with torch.no_grad():
            for layer in adapter_layers(model, name).values():
                layer.lora_B.mul_(0.3)
    return model, tokenizer


@pytest.fixture(scope="module")
def alone(model_and_tokenizer):
    """{(prompt, adapter): its answer when nobody else asks}, each prompt by itself."""
    model, tokenizer = model_and_tokenizer
    answers = {}
    for name in (BASE, *NAMES):
        if name != BASE:
            set_adapter(model, name)
        for prompt in PROMPTS:
            if name == BASE:
                with disable_adapter(model):
                    answers[prompt, name] = generate(model, tokenizer, [prompt], TOKENS)[0]
            else:
                answers[prompt, name] = generate(model, tokenizer, [prompt], TOKENS)[0]
    assert all(len({answers[prompt, name] for name in (BASE, *NAMES)}) > 2 for prompt in PROMPTS)
    return answers


@pytest.fixture
def engine(model_and_tokenizer, alone):
    engine = Engine(*model_and_tokenizer, max_new_tokens=TOKENS)
    yield engine
    engine.stop()


@pytest.fixture
def address(engine):
    with running(create_app(engine)) as address:
        yield address


def ask(address, path="/generate", **question):
    """(status, answer) of a request; without a question a GET."""
    data = json.dumps(question).encode() if question else None
    request = urllib.request.Request(address + path, data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_concurrent_requests_never_mix(engine, address, alone):
    questions = [(prompt, name) for prompt in PROMPTS for name in (BASE, *NAMES)]
    assert len(questions) >= 32
    start = threading.Barrier(len(questions))

    def one(question):
        prompt, name = question
        start.wait()
        return ask(address, prompt=prompt, adapter=name)

    with ThreadPoolExecutor(len(questions)) as pool:
        answers = list(pool.map(one, questions))
    for (prompt, name), (status, answer) in zip(questions, answers, strict=True):
        assert status == 200
        assert answer == {"adapter": name, "text": alone[prompt, name]}
    assert sum(map(len, engine.batches)) == len(questions)
    assert max(map(len, engine.batches)) <= engine.max_batch
    assert any(len(set(batch)) > 1 for batch in engine.batches)  # adapters did share batches


def test_the_adapters_are_listed_and_the_base_answers_by_default(address, alone):
    assert ask(address, "/adapters") == (200, {"adapters": [BASE, *NAMES]})
    assert ask(address, prompt=PROMPTS[0]) == (200, {"adapter": BASE, "text": alone[PROMPTS[0], BASE]})


@pytest.mark.errors
@pytest.mark.parametrize(
    ("question", "status", "words"),
    [
        ({"prompt": "love (noun):", "adapter": "four"}, 404, "this server has: __base__, one, two, three"),
        ({"prompt": "", "adapter": "one"}, 422, "the prompt is empty"),
        ({"prompt": " \n", "adapter": "one"}, 422, "the prompt is empty"),
        ({"prompt": "love " * 300, "adapter": "one"}, 422, "more than the 256"),
        ({"adapter": "one"}, 422, "prompt"),
        ({"prompt": "love (noun):", "adaptor": "one"}, 422, "adaptor"),
        ({"prompt": 5}, 422, "string"),
        ({"prompt": "\ud800"}, 422, "half a character"),
    ],
)
def test_errors_of_the_caller(address, alone, question, status, words):
    found, answer = ask(address, **question)
    assert found == status
    assert words in json.dumps(answer)
    assert ask(address, prompt=PROMPTS[0], adapter="one")[1]["text"] == alone[PROMPTS[0], "one"]  # it lives on


def test_it_shuts_down_cleanly(model_and_tokenizer, alone):
    threads = set(threading.enumerate())
    engine = Engine(*model_and_tokenizer, max_new_tokens=TOKENS)
    with running(create_app(engine)) as address:
        assert ask(address, prompt=PROMPTS[0], adapter="two")[1]["text"] == alone[PROMPTS[0], "two"]
    with pytest.raises(urllib.error.URLError):
        ask(address, prompt=PROMPTS[0])
    with pytest.raises(RuntimeError, match="shutting down"):
        engine.submit(PROMPTS[0])
    left = [thread for thread in set(threading.enumerate()) - threads if thread.name.startswith("lora_edu")]
    assert left == []


def test_what_waits_is_still_answered_when_it_stops(model_and_tokenizer, alone):
    engine = Engine(*model_and_tokenizer, max_new_tokens=TOKENS, max_batch=2)
    futures = {(prompt, "one"): engine.submit(prompt, "one") for prompt in PROMPTS[:5]}
    engine.stop()
    engine.stop()  # twice does no harm
    assert {question: future.result(0) for question, future in futures.items()} == {q: alone[q] for q in futures}


def test_a_failed_batch_reaches_its_callers_and_no_other(engine, alone, monkeypatch):
    monkeypatch.setattr("lora_edu.serving.engine.decode", lambda *batch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.submit(PROMPTS[0], "one").result(60)
    monkeypatch.undo()
    assert engine.submit(PROMPTS[0], "one").result(60) == alone[PROMPTS[0], "one"]


def test_a_caller_who_went_away_harms_nobody(engine, alone):
    futures = [engine.submit(PROMPTS[i % 12], "two") for i in range(40)]
    gone = [future for future in futures[20:30] if future.cancel()]
    kept = [(i, future) for i, future in enumerate(futures) if future not in gone]
    assert all(future.result(60) == alone[PROMPTS[i % 12], "two"] for i, future in kept)


@pytest.mark.errors
def test_an_adapter_with_trained_biases_is_refused_alone():
    """It cannot answer row by row. Others that wait for the same batch must not fail with it."""
    model, tokenizer = load_base("tiny", dtype=torch.float64)
    for layer in (block.mlp.down_proj for block in model.model.layers):
        layer.bias = torch.nn.Parameter(torch.zeros(layer.out_features, dtype=torch.float64))
    for name, bias in (("one", "none"), ("biased", "all")):
        inject(model, LoraConfig(r=2, target_modules="all-linear", bias=bias, init_lora_weights=False), name)
    engine = Engine(model, tokenizer, max_new_tokens=5)
    answers = [engine.submit(prompt, "one") for prompt in PROMPTS[:4]]
    with pytest.raises(ValueError, match="'biased'"):
        engine.submit(PROMPTS[0], "biased")
    answers += [engine.submit(prompt, "one") for prompt in PROMPTS[:4]]
    texts = [answer.result(60) for answer in answers]
    assert texts[:4] == texts[4:] == [engine.submit(prompt, "one").result(60) for prompt in PROMPTS[:4]]
    with running(create_app(engine)) as address:
        status, answer = ask(address, prompt=PROMPTS[0], adapter="biased")
        assert status == 422
        assert "'biased'" in json.dumps(answer)
        assert ask(address, prompt=PROMPTS[0], adapter="one") == (200, {"adapter": "one", "text": texts[0]})
    assert all("biased" not in batch for batch in engine.batches)


def test_a_plain_model_is_served_too():
    model, tokenizer = load_base("tiny")
    engine = Engine(model, tokenizer, max_new_tokens=5)
    assert engine.adapters == [BASE]
    assert engine.submit(PROMPTS[0]).result(60) == generate(model, tokenizer, PROMPTS[:1], 5)[0]
    engine.stop()


def test_from_the_command_line(monkeypatch, capsys):
    served = {}
    monkeypatch.setattr("uvicorn.run", lambda app, **options: served.update(app=app, **options))
    folder = data_path("adapters", "tiny-devils-dictionary")
    monkeypatch.setattr("sys.argv", ["serving", f"devil={folder}", "--port", "8123"])
    main()
    assert (served["host"], served["port"]) == ("127.0.0.1", 8123)
    with running(served["app"]) as address:
        assert ask(address, "/adapters") == (200, {"adapters": [BASE, "devil"]})
    monkeypatch.setattr("sys.argv", ["serving", "devil"])
    with pytest.raises(SystemExit):
        main()
    assert "expected NAME=DIRECTORY" in capsys.readouterr().err


def test_a_taken_port_is_an_error_and_not_a_wait(engine, address):
    port = int(address.rpartition(":")[2])
    with pytest.raises(OSError, match="ddress already in use"), running(create_app(engine), port=port):
        pass
    assert ask(address, "/adapters")[0] == 200  # the first server lives on
