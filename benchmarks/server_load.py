"""The server of lesson 09 under load, over loopback: is anything mixed up, and what does the crowd cost each?

    python benchmarks/server_load.py                             # writes data/runs/server_load.json, about a minute
    python benchmarks/server_load.py --requests 24 --threads 6 --rounds 2 --out build/server_load.json

The base tiny with its two adapters answers requests to ``/v1/chat/completions``: of base, devil and jargon, half of
them as streams, half of them drawn with a temperature and a seed of their own, with answers of up to 6, 12 or 18
tokens. A round asks its questions one after another, and then all together from as many threads as are named; figures
are ratios of the two, so that another machine, or a busy one, gives about the same. Every answer is compared with the
one that the same question had when it stood alone, and greedy ones with what ``generate`` says with that adapter set.
A burst follows, in which few may wait: who is refused comes back when the server said, until all are answered.

Weights are in float64, so that rounding, which depends on who else is in the batch, turns no word. The clients are
threads of the server's process.
"""

import argparse
import json
import os
import random
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from statistics import median, quantiles
from threading import Barrier
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from lora_edu import disable_adapter, load_adapter, load_base, load_dataset, set_adapter
from lora_edu.files import data_path
from lora_edu.lab.recording.records import processor, provenance, write_record
from lora_edu.lab.training import generate
from lora_edu.serving.server import Engine, create_app, running

OUT = Path(__file__).resolve().parents[1] / "data" / "runs" / "server_load.json"
ADAPTERS = {"devil": "tiny-devils-dictionary", "jargon": "tiny-jargon"}
MODELS = ("base", *ADAPTERS)
LENGTHS = (6, 12, 18)
SEED = 0
MAX_BATCH, BURST_MAY_WAIT = 16, 4


class Answer(NamedTuple):
    """What came back: the text, seconds to its first piece and to its end, and how often it was refused before."""

    text: str
    first: float
    seconds: float
    refused: int


def questions(number: int) -> list[dict[str, Any]]:
    """Bodies of requests; model, way, temperature and length take turns in every combination, in a mixed order."""
    draw = random.Random(SEED)
    entries = load_dataset("devils_dictionary", "test") + load_dataset("jargon", "test")
    nouns = [entry["word"] for entry in entries if entry["pos"] == "noun"]
    found = []
    for i in range(number):
        body = {"model": MODELS[i % 3], "stream": i // 3 % 2 == 0, "max_tokens": LENGTHS[i // 12 % 3]}
        body |= {"temperature": 0.8, "top_p": 0.95, "seed": i} if i // 6 % 2 else {"temperature": 0.0}
        found.append(body | {"messages": [{"role": "user", "content": f"{draw.choice(nouns)} (noun):"}]})
    draw.shuffle(found)
    return found


def place(question: dict[str, Any]) -> tuple[str, int]:
    """What ``generate`` needs of a question: the text that the model goes on with, and the length."""
    return question["messages"][0]["content"], question["max_tokens"]


def greedy_texts(model: Any, tokenizer: Any, asked: list[dict[str, Any]]) -> dict[tuple[str, str, int], str]:
    """{(model, prompt, length): text} by ``generate`` with one adapter set, for every model and question."""
    found = {}
    for name, length in product(MODELS, LENGTHS):
        prompts = [prompt for prompt, own in map(place, asked) if own == length]
        set_adapter(model, name if name in ADAPTERS else "devil")
        with nullcontext() if name in ADAPTERS else disable_adapter(model):
            texts = generate(model, tokenizer, prompts, length) if prompts else []
        found |= {(name, prompt, length): text for prompt, text in zip(prompts, texts, strict=True)}
    return found


def ask(address: str, question: dict[str, Any]) -> Answer:
    """One request, repeated for as long as the server says that too many wait."""
    body = json.dumps(question).encode()
    request = urllib.request.Request(f"{address}/v1/chat/completions", body, {"content-type": "application/json"})
    refused = 0
    while True:
        start = time.perf_counter()
        try:
            with urllib.request.urlopen(request, timeout=300) as response:
                pieces, first = [], None
                for piece in streamed(response) if question["stream"] else whole(response):
                    pieces.append(piece)
                    first = first or time.perf_counter() - start
            seconds = time.perf_counter() - start
            return Answer("".join(pieces), first or seconds, seconds, refused)
        except urllib.error.HTTPError as error:
            if error.code != 429:
                raise
            refused += 1
            time.sleep(int(error.headers["Retry-After"]))


def streamed(response: Any) -> Any:
    """The pieces of a stream as they arrive.

    Raises:
        ValueError: if the stream ends before its end.
    """
    for line in response:
        content = line.decode().strip().removeprefix("data: ")
        if content == "[DONE]":
            return
        if content:
            yield from filter(None, [json.loads(content)["choices"][0]["delta"].get("content")])
    raise ValueError("the stream ended without [DONE]")


def whole(response: Any) -> list[str]:
    """An answer that comes in one piece."""
    return [json.load(response)["choices"][0]["message"]["content"]]


def together(address: str, asked: list[dict[str, Any]], threads: int) -> tuple[list[Answer], float]:
    """The answers of as many clients at once, and the seconds that all of them took."""
    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        answers = list(pool.map(lambda question: ask(address, question), asked))
    return answers, time.perf_counter() - start


def burst(address: str, asked: list[dict[str, Any]]) -> list[Answer]:
    """Everybody asks at the same moment."""
    begin = Barrier(len(asked))

    def one(question: dict[str, Any]) -> Answer:
        begin.wait()
        return ask(address, question)

    with ThreadPoolExecutor(len(asked)) as pool:
        return list(pool.map(one, asked))


def figures(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """What the timed requests say; all but the first are ratios to one request alone."""
    alone = [seconds for each in rounds for seconds in each["alone"]]
    crowd = [seconds for each in rounds for seconds in each["together"]]
    wall = sum(each["wall"] for each in rounds)
    one = median(alone)
    return {
        "requests_per_second": round(len(crowd) / wall, 1),
        "throughput": round(sum(alone) / wall, 2),
        "latency_median": round(median(crowd) / one, 2),
        "latency_95": round(quantiles(crowd, n=20)[-1] / one, 2),
        "first_piece_median": round(median(first for each in rounds for first in each["first"]) / one, 2),
    }


def one_round(address: str, engine: Engine, asked: list[dict[str, Any]], threads: int) -> Any:
    """The same questions one after another and then together: (the record's line, answers alone, answers together)."""
    alone = [ask(address, question) for question in asked]
    engine.batches = []
    crowd, wall = together(address, asked, threads)
    line = {
        "alone": [round(answer.seconds, 5) for answer in alone],
        "together": [round(answer.seconds, 5) for answer in crowd],
        "first": [round(a.first, 5) for a, q in zip(crowd, asked, strict=True) if q["stream"]],
        "wall": round(wall, 5),
        "batches": [len(batch) for batch in engine.batches],
        "mixed_batches": sum(len(set(batch)) > 1 for batch in engine.batches),
    }
    return line, [answer.text for answer in alone], [answer.text for answer in crowd]


def measure(requests: int, threads: int, rounds: int, burst_size: int) -> dict[str, Any]:
    """All rounds and the burst; the part of the record that was measured."""
    model, tokenizer = load_base("tiny", dtype=torch.float64)
    for name, folder in ADAPTERS.items():
        load_adapter(model, data_path("adapters", folder), adapter_name=name)
    asked = questions(requests)
    expected = greedy_texts(model, tokenizer, [question for question in asked if question["temperature"] == 0])
    engine = Engine(model, tokenizer, max_new_tokens=max(LENGTHS), max_batch=MAX_BATCH)
    lines, alone, crowd = [], [], []
    with running(create_app(engine)) as address:
        ask(address, asked[0]), ask(address, asked[1])  # what only the first requests do is not timed
        size = -(-requests // rounds)
        for start in range(0, requests, size):
            line, *texts = one_round(address, engine, asked[start : start + size], threads)
            lines.append(line)
            alone += texts[0]
            crowd += texts[1]
        engine.max_waiting = BURST_MAY_WAIT
        after = burst(address, asked[:burst_size])
    greedy = [i for i, question in enumerate(asked) if question["temperature"] == 0]
    of_models = [{expected[name, *place(asked[i])] for name in MODELS} for i in greedy]
    return {
        "requests": requests,
        "greedy": len(greedy),
        "greedy_that_differ_between_all_models": sum(len(texts) == len(MODELS) for texts in of_models),
        "right": {
            "as_alone": sum(one == many for one, many in zip(alone, crowd, strict=True)),
            "as_generate": sum(alone[i] == crowd[i] == expected[asked[i]["model"], *place(asked[i])] for i in greedy),
        },
        "figures": figures(lines),
        "largest_batch": max(size for line in lines for size in line["batches"]),
        "burst": {
            "requests": len(after),
            "may_wait": BURST_MAY_WAIT,
            "refused": sum(answer.refused > 0 for answer in after),
            "right": sum(answer.text == text for answer, text in zip(after, alone, strict=False)),
        },
        "rounds": lines,
    }


def main() -> None:
    """Measure, write the record, and say what is in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=300, help="questions over all rounds")
    parser.add_argument("--threads", type=int, default=24, help="clients that ask at the same time")
    parser.add_argument("--rounds", type=int, default=6, help="rounds, each first alone and then together")
    parser.add_argument("--burst", type=int, default=60, help="questions of the burst")
    parser.add_argument("--out", type=Path, default=OUT, help="the file to write")
    parser.add_argument("--commit", help="the commit, where git cannot tell")
    given = parser.parse_args()
    torch.set_num_threads(1)  # the matrices are small: a second thread would mostly wait
    record = {
        "what": "the server of lesson 09, base tiny in float64: requests alone and together, a burst; see the script"
    }
    record |= provenance("benchmarks/server_load.py", processor(), given.commit, "fastapi", "uvicorn")
    record |= {"seed": SEED, "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None}
    record |= {"torch_threads": torch.get_num_threads(), "clients": given.threads, "max_batch": MAX_BATCH}
    found = measure(given.requests, given.threads, given.rounds, given.burst)
    write_record(record | found, given.out)
    right, figures_ = found["right"], found["figures"]
    print(f"{right['as_alone']} of {found['requests']} answers are those that the same question had alone")
    print(f"{right['as_generate']} of {found['greedy']} greedy ones are those of generate")
    print(f"largest batch {found['largest_batch']}; {json.dumps(figures_)}")
    print(f"burst: {json.dumps(found['burst'])}")


if __name__ == "__main__":
    main()
