"""OpenAI's API of the server, spoken by OpenAI's own client: text, streams, limits, errors, and clients who leave."""

import http.client
import json
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import openai
import pytest
import torch

from lora_edu import disable_adapter, load_adapter, load_base, set_adapter
from lora_edu.files import data_path
from lora_edu.lab.training import generate
from lora_edu.serving.chat import Message, prompt_of
from lora_edu.serving.connection import Refused
from lora_edu.serving.decoding import Request
from lora_edu.serving.server import Engine, create_app, main, running

ADAPTERS = {"devil": "tiny-devils-dictionary", "jargon": "tiny-jargon"}
MODELS = ("base", *ADAPTERS)
PROMPTS = [f"{word} (noun):" for word in ("politician", "computer", "history", "love", "money", "truth")]
TOKENS = 24


@pytest.fixture(scope="module")
def model_and_tokenizer():
    """``tiny`` with its two adapters, in float64: rounding that depends on the batch must not turn a word."""
    model, tokenizer = load_base("tiny", dtype=torch.float64)
    for name, folder in ADAPTERS.items():
        load_adapter(model, data_path("adapters", folder), adapter_name=name)
    return model.eval(), tokenizer


@pytest.fixture(scope="module")
def alone(model_and_tokenizer):
    """{(prompt, model): what ``generate`` says}, each prompt by itself."""
    model, tokenizer = model_and_tokenizer
    answers = {}
    for prompt in PROMPTS:
        with disable_adapter(model):
            answers[prompt, "base"] = generate(model, tokenizer, [prompt], TOKENS)[0]
        for name in ADAPTERS:
            set_adapter(model, name)
            answers[prompt, name] = generate(model, tokenizer, [prompt], TOKENS)[0]
    assert all(len({answers[prompt, name] for name in MODELS}) == 3 for prompt in PROMPTS)
    return answers


@pytest.fixture
def serve(model_and_tokenizer, alone):
    """Starts a server and gives (its engine, OpenAI's client for it); all of them end with the test."""
    started = []

    def start(timeout=60.0, max_body=65_536, **options):
        engine = Engine(*model_and_tokenizer, **{"max_new_tokens": TOKENS} | options)
        address = running(create_app(engine, timeout, max_body))
        started.append(address)
        client = openai.OpenAI(base_url=f"{address.__enter__()}/v1", api_key="none", max_retries=0, timeout=60)
        return engine, client

    yield start
    for address in started:
        address.__exit__(None, None, None)


@pytest.fixture
def gate(model_and_tokenizer):
    """Lets the model take as many steps as are released; afterwards it runs freely."""
    steps = threading.Semaphore(0)
    handle = model_and_tokenizer[0].model.register_forward_pre_hook(lambda *_: steps.acquire(timeout=60) and None)
    yield steps
    handle.remove()
    steps.release(10_000)


def chat(client, model="devil", prompt=PROMPTS[0], **options):
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": prompt}], **options)


def text_of(stream):
    """(the text, the finish reason) of a stream."""
    chunks = [chunk for chunk in stream if chunk.choices]
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks), chunks[-1].choices[0].finish_reason


def seen_by(engine, monkeypatch):
    """The requests that the engine takes from now on."""
    seen, put = [], engine.put
    monkeypatch.setattr(engine, "put", lambda request: seen.append(request) or put(request))
    return seen


def until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def answers_as_ever(client, alone):
    return chat(client).choices[0].message.content == alone[PROMPTS[0], "devil"]


def test_a_greedy_answer_is_generates_whole_and_streamed_whoever_asks_beside(serve, alone):
    engine, client = serve()
    questions = [(prompt, model, stream) for prompt in PROMPTS for model in MODELS for stream in (False, True)]

    def one(question):
        prompt, model, stream = question
        answer = chat(client, model, prompt, stream=stream)
        return text_of(answer)[0] if stream else answer.choices[0].message.content

    with ThreadPoolExecutor(len(questions)) as pool:
        texts = list(pool.map(one, questions))
    assert texts == [alone[prompt, model] for prompt, model, _ in questions]
    assert any(len(set(batch)) == 3 for batch in engine.batches)


def test_the_models_are_the_base_and_the_adapters(serve):
    assert [model.id for model in serve()[1].models.list()] == list(MODELS)


def test_what_else_an_answer_says(serve, model_and_tokenizer, alone):
    _, client = serve(max_new_tokens=60)
    tokenizer = model_and_tokenizer[1]
    answer = chat(client, max_tokens=5)
    assert (answer.object, answer.model, answer.choices[0].finish_reason) == ("chat.completion", "devil", "length")
    assert alone[PROMPTS[0], "devil"].startswith(answer.choices[0].message.content)
    read = len(tokenizer(PROMPTS[0], add_special_tokens=False)["input_ids"]) + 1
    assert answer.usage.to_dict() == {"prompt_tokens": read, "completion_tokens": 5, "total_tokens": read + 5}
    assert chat(client, max_completion_tokens=5).choices[0].message == answer.choices[0].message
    ended = chat(client, max_tokens=60)
    assert ended.choices[0].finish_reason == "stop"
    written = len(tokenizer(ended.choices[0].message.content, add_special_tokens=False)["input_ids"])
    assert ended.usage.completion_tokens == written + 1  # and the end
    chunks = list(chat(client, max_tokens=5, stream=True, stream_options={"include_usage": True}))
    assert {(chunk.object, chunk.model, chunk.id) for chunk in chunks} == {
        ("chat.completion.chunk", "devil", chunks[0].id)
    }
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == answer.usage
    neutral = {"n": 1, "logprobs": False, "presence_penalty": 0.0, "tools": [], "user": None}
    assert chat(client, max_tokens=5, **neutral).choices[0].message == answer.choices[0].message


def test_a_stream_comes_while_the_batch_is_computed(serve, gate, alone):
    _, client = serve()
    stream = iter(chat(client, stream=True))
    next(stream)  # the role
    gate.release(1)
    assert next(stream).choices[0].delta.content == alone[PROMPTS[0], "devil"].split()[0]
    gate.release(1000)
    assert text_of(stream)[1] in ("stop", "length")


def test_a_short_answer_waits_for_no_long_one(serve, gate, alone):
    """Its row stays in the batch, and the answer is there."""
    engine, client = serve()
    first = engine.submit(PROMPTS[1])  # holds the worker, so that the next two meet in one batch
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(chat, client, name, max_tokens=n) for name, n in (("devil", 2), ("jargon", TOKENS))]
        until(lambda: engine._waiting.qsize() == 2)
        gate.release(TOKENS + 2)
        short = answers[0].result(60)
        assert short.usage.completion_tokens == 2
        assert first.result(60) == alone[PROMPTS[1], "base"]
        assert not answers[1].done()
        gate.release(1000)
        assert answers[1].result(60).choices[0].message.content == alone[PROMPTS[0], "jargon"]
    assert len(engine.batches[-1]) == 2


def test_a_seed_fixes_what_is_drawn_whoever_asks_beside(serve, alone):
    _, client = serve()
    options = [{"temperature": 1.0, "seed": seed, "top_p": 0.9} for seed in range(8)]

    def drawn(given):
        return chat(client, **given).choices[0].message.content

    one_by_one = [drawn(given) for given in options]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(drawn, options)) == one_by_one
    assert len(set(one_by_one)) > 4
    assert len({drawn({"temperature": 1.0}) for _ in range(6)}) > 1  # without a seed, another one each time
    for given in ({"temperature": 1e-300, "seed": 1}, {"temperature": 1.0, "top_p": 1e-9}):
        assert drawn(given) == alone[PROMPTS[0], "devil"]  # nothing but the most probable token is left


def test_a_stop_text_ends_the_answer_and_is_no_part_of_it(serve, alone):
    _, client = serve()
    words = alone[PROMPTS[0], "devil"].split(" ")
    stop = f"{words[3]} {words[4]}"  # longer than one token
    for given in (stop, [stop, "never said"]):
        answer = chat(client, stop=given).choices[0]
        assert (answer.message.content, answer.finish_reason) == (" ".join(words[:3]), "stop")
        assert text_of(chat(client, stop=given, stream=True)) == (" ".join(words[:3]), "stop")
    assert text_of(chat(client, stop=" ".join(words[:3]), stream=True)) == ("", "stop")  # nothing of it was told early
    assert text_of(chat(client, stop="never said", stream=True))[0] == alone[PROMPTS[0], "devil"]


def test_a_character_of_several_tokens_is_told_whole():
    """With a tokenizer of bytes."""
    tokenizer = SimpleNamespace(eos_token_id=0, decode=lambda ids, **_: bytes(ids).decode(errors="replace"))
    told = []
    request = Request("", max_tokens=10, hear=told.append)
    assert [request.take(byte, tokenizer) for byte in " né €".encode()] == [False] * 8
    assert told == ["n", "é", " €"]
    assert request.take(ord("!"), tokenizer) is False
    assert request.take(195, tokenizer) is True  # at its end, half a character is what ``generate`` makes of it
    assert "".join(told) == request.text == "né €!�"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_who_goes_away_is_cancelled(serve, gate, monkeypatch, alone, stream):
    engine, client = serve()
    seen = seen_by(engine, monkeypatch)
    gone = http.client.HTTPConnection(client.base_url.host, client.base_url.port)
    body = {"model": "devil", "stream": stream, "messages": [{"role": "user", "content": PROMPTS[0]}]}
    gone.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
    until(lambda: engine.batches)
    waits = engine.submit(PROMPTS[1], "jargon")
    gone.sock.close()
    gone.close()
    until(lambda: seen[0].gone)
    gate.release(1000)
    assert waits.result(60) == alone[PROMPTS[1], "jargon"]
    assert len(seen[0].tokens) <= 1
    assert answers_as_ever(client, alone)


@pytest.mark.errors
def test_who_waits_too_long_is_told_and_cancelled(serve, gate, monkeypatch, alone):
    engine, client = serve(timeout=0.5)
    seen = seen_by(engine, monkeypatch)
    with pytest.raises(openai.APIStatusError, match=r"no complete answer within 0\.5 seconds") as found:
        chat(client)
    assert (found.value.status_code, found.value.type, found.value.code) == (504, "server_error", "timeout")
    with pytest.raises(openai.APIError, match="no complete answer within"):
        list(chat(client, stream=True))  # the status of a stream has been sent: the error is an event
    assert all(request.gone for request in seen)
    gate.release(1000)
    assert engine.submit(PROMPTS[0], "devil").result(60) == alone[PROMPTS[0], "devil"]
    assert len(seen[0].tokens) <= 1


@pytest.mark.errors
def test_more_than_may_wait_are_asked_to_come_back(serve, gate, alone):
    engine, client = serve(max_batch=1, max_waiting=1)
    first = engine.submit(PROMPTS[0], "jargon")
    until(lambda: engine.batches)  # the worker has it
    second = engine.submit(PROMPTS[0], "jargon")
    with pytest.raises(openai.RateLimitError, match="1 requests wait already") as found:
        chat(client)
    assert int(found.value.response.headers["retry-after"]) >= 1
    assert found.value.type == "rate_limit_error"
    gate.release(1000)
    assert first.result(60) == second.result(60) == alone[PROMPTS[0], "jargon"]
    assert answers_as_ever(client, alone)


@pytest.mark.errors
@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "user", "content": " "}]}, None, "the prompt is empty"),
        ({"messages": [{"role": "user", "content": "love " * 300}]}, None, "more than the 256"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, None, "half a character"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "'system', 'user' or 'assistant'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content", "valid string"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages", "this base has no chat template"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": "5"}, "max_tokens", "valid integer"),
        ({"max_tokens": TOKENS + 1}, None, "this server gives 1 to 24 tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "two names of one limit"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"temperature": float("nan")}, "temperature", "finite"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"seed": 2**70}, "seed", "less than"),
        ({"stop": [""]}, "stop.0", "at least 1 character"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "at most 4 items"),
        ({"stream": "yes"}, "stream", "valid boolean"),
        ({"n": 2}, "n", "takes only 1 here"),
        ({"logprobs": True}, "logprobs", "takes only false here"),
        ({"tools": [{"type": "function"}]}, "tools", "tools is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"temprature": 1}, "temprature", "this server takes model, messages"),
        ({"\ud800": 1}, None, "no JSON object"),
    ],
)
def test_what_cannot_be_answered_is_refused_and_the_field_named(serve, alone, body, param, words):
    _, client = serve()
    whole = {"model": "devil", "messages": [{"role": "user", "content": PROMPTS[0]}]} | body
    status, answer = post(client, json.dumps(whole).encode())
    error = answer["error"]
    assert (status, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert words in error["message"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert answers_as_ever(client, alone)


def post(client, body, path="/v1/chat/completions", **headers):
    """(status, JSON) of what the client would not send."""
    headers = {"content-type": "application/json"} | headers
    try:
        urllib.request.urlopen(urllib.request.Request(str(client.base_url.join(path)), body, headers), timeout=60)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)
    raise AssertionError("it was answered")


@pytest.mark.errors
def test_other_errors_have_the_same_shape(serve, alone):
    _, client = serve(max_body=1000)
    with pytest.raises(
        openai.NotFoundError, match="no model named 'pirate'; this server has: base, devil, jargon"
    ) as e:
        chat(client, "pirate")
    assert (e.value.code, e.value.param) == ("model_not_found", "model")
    for body in (b"", b"{", b"[]", b'"text"'):
        assert "the body is no JSON object" in post(client, body)[1]["error"]["message"]
    assert post(client, b"[" * 900)[0] == 400
    assert post(client, b"{}", **{"content-type": "text/plain"})[0] == 400
    assert (post(client, None)[0], post(client, None, "/v1/embeddings")[0]) == (405, 404)
    status, answer = post(client, b" " * 1001)
    assert (status, answer["error"]["message"].split(",")[0]) == (
        413,
        "the body of the request has more than 1000 bytes",
    )
    assert post(client, b" " * 1001, "/generate")[0] == 413
    assert answers_as_ever(client, alone)


@pytest.mark.errors
def test_a_failed_batch_is_an_error_of_the_server(serve, monkeypatch, alone):
    _, client = serve()
    monkeypatch.setattr("lora_edu.serving.engine.decode", lambda *batch: 1 / 0)
    with pytest.raises(openai.InternalServerError, match="the model failed at this batch: ZeroDivisionError"):
        chat(client)
    with pytest.raises(openai.APIError, match="the model failed at this batch"):
        list(chat(client, stream=True))
    monkeypatch.undo()
    monkeypatch.setattr("lora_edu.serving.chat.prompt_of", lambda *messages: {}["x"])
    with pytest.raises(openai.InternalServerError, match="the server failed at this request: KeyError"):
        chat(client)
    monkeypatch.undo()
    assert answers_as_ever(client, alone)


@pytest.mark.errors
def test_a_prompt_may_have_its_own_limit(serve, alone):
    engine, client = serve(max_prompt_tokens=10)
    with pytest.raises(openai.BadRequestError, match="this server takes up to 10"):
        chat(client, prompt="love " * 20)
    assert answers_as_ever(client, alone)
    with pytest.raises(ValueError, match="this server takes up to 10"):
        engine.submit("love " * 20)


TEMPLATE = (
    "{% for turn in messages %}{% if turn.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "[{{ turn.role }}] {{ turn.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_the_chat_template_writes_the_prompt(model_and_tokenizer, monkeypatch):
    tokenizer = model_and_tokenizer[1]
    turns = [("user", "Who?"), ("assistant", "You."), ("user", "Why?")]
    messages = [Message(role=role, content=content) for role, content in turns]
    with pytest.raises(Refused, match="no chat template"):
        prompt_of(messages, tokenizer)
    assert prompt_of(messages[:1], tokenizer) == "Who?"
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    assert prompt_of(messages, tokenizer) == "[user] Who?\n[assistant] You.\n[user] Why?\n[assistant]"
    with pytest.raises(Refused, match="refuses the messages: no system here"):
        prompt_of([Message(role="system", content="x"), *messages], tokenizer)


@pytest.mark.errors
def test_an_adapter_may_not_be_called_like_the_base(model_and_tokenizer, monkeypatch):
    engine = Engine(*model_and_tokenizer)
    monkeypatch.setattr(engine, "adapters", ["__base__", "base"])
    with pytest.raises(ValueError, match="an adapter is called 'base'"):
        create_app(engine)
    engine.stop()


def test_the_limits_are_options_of_the_command(monkeypatch, capsys):
    served = {}
    monkeypatch.setattr("uvicorn.run", lambda app, **options: served.update(app=app))
    folder = data_path("adapters", "tiny-devils-dictionary")
    limits = {"max-tokens": 7, "max-prompt-tokens": 30, "max-batch": 2, "max-waiting": 3, "max-body": 500, "timeout": 9}
    options = [part for name, value in limits.items() for part in (f"--{name}", str(value))]
    monkeypatch.setattr("sys.argv", ["serving", f"devil={folder}", *options])
    main()
    with running(served["app"]) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        assert chat(client).usage.completion_tokens == 7
        for given, words in ({"max_tokens": 8}, "1 to 7"), ({"prompt": "love " * 40}, "up to 30"):
            with pytest.raises(openai.BadRequestError, match=words):
                chat(client, **given)
        assert post(client, b" " * 501)[0] == 413
    monkeypatch.setattr("sys.argv", ["serving", f"devil={folder}", "--max-waiting", "0"])
    with pytest.raises(SystemExit):
        main()
    assert "'0': expected a whole number of at least 1" in capsys.readouterr().err
