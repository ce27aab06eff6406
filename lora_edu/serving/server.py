"""A small HTTP server: one base, several adapters, and each request names the one that answers it. Lesson 09.

From the repository's root::

    python -m lora_edu.serving.server bierce=data/adapters/smollm2-devils-dictionary --base smollm2-135m
    curl localhost:8000/v1/chat/completions -H "content-type: application/json" \\
        -d '{"model": "bierce", "messages": [{"role": "user", "content": "Define: politician, noun"}]}'

The answer is "One who has the power to make the laws."; with ``"model": "base"`` it begins "A politician is a person
who holds a position of power". With ``"stream": true`` it comes token by token.

This is OpenAI's API, so any program that speaks it can be given the address ``http://localhost:8000/v1``; ``chat.py``
says what of it there is. For a base that continues text there is a plainer question, too::

    python -m lora_edu.serving.server devil=data/adapters/tiny-devils-dictionary jargon=data/adapters/tiny-jargon
    curl localhost:8000/generate -H "content-type: application/json" \\
        -d '{"adapter": "devil", "prompt": "politician (noun):"}'

``engine.py`` keeps concurrent requests apart, ``decoding.py`` computes a batch, ``connection.py`` holds the limits.

It is an example. A service for strangers also needs encryption and authentication; vLLM and others fill the places of
rows that are done, and have kernels for the mixed batch.
"""

import argparse
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_edu.core.peft_io import load_adapter
from lora_edu.lab.bases import load_base
from lora_edu.serving.engine import Engine
from lora_edu.serving.mixed import BASE


def create_app(engine: Engine, timeout: float = 120.0, max_body: int = 65_536) -> Any:
    """The FastAPI application: ``/v1``, ``GET /adapters``, and ``POST /generate`` with a JSON object {prompt, adapter}.

    Errors of the caller are 404 (no such adapter; the known ones are named), 413 (a body that is too long) and 422 (a
    prompt that cannot be answered, a missing or foreign field); 429 asks to come back later. Under ``/v1`` they have
    OpenAI's shape. Stopping the server stops the engine.

    Args:
        engine: answers.
        timeout: seconds that a request may take, waiting included; then it is cancelled, with status 504.
        max_body: bytes that a request's body may have.

    Raises:
        ImportError: the extra is not installed.
        ValueError: an adapter is called "base".
    """
    try:
        from fastapi import FastAPI
        from fastapi import Request as HTTPRequest
        from pydantic import BaseModel, ConfigDict

        from lora_edu.serving.chat import create_api
        from lora_edu.serving.connection import BodyLimit, begin, whole
    except ImportError as error:
        raise ImportError("the server needs FastAPI and uvicorn: pip install 'lora-edu[serve]'") from error
    import asyncio
    from contextlib import asynccontextmanager

    from lora_edu.serving.decoding import Request

    class Question(BaseModel):
        model_config = ConfigDict(extra="forbid")  # a misspelt field must not be answered by the base
        prompt: str
        adapter: str = BASE

    @asynccontextmanager
    async def lifespan(app: Any) -> Any:
        yield
        await asyncio.to_thread(engine.stop)

    app = FastAPI(title="lora-edu: one base, several adapters", lifespan=lifespan)
    app.add_middleware(BodyLimit, most=max_body)
    app.mount("/v1", create_api(engine, timeout))

    @app.get("/adapters")
    async def adapters() -> dict[str, list[str]]:
        return {"adapters": engine.adapters}

    @app.post("/generate")
    async def answer(question: Question, http: HTTPRequest) -> dict[str, str]:
        pieces = begin(engine, Request(question.prompt, question.adapter), timeout)
        return {"adapter": question.adapter, "text": await whole(http, pieces)}

    return app


@contextmanager
def running(app: Any, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """Run the application in a thread while the block lasts; gives its address. Port 0 takes a free one.

    Raises:
        OSError: the port is taken, or may not be used.
    """
    import uvicorn

    with socket.create_server((host, port)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, args=([listening],), name="lora_edu server", daemon=True)
        thread.start()
        try:
            while thread.is_alive() and not server.started:
                thread.join(0.01)
            yield f"http://{host}:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def load_engine(base: str, adapters: dict[str, str | Path], **options: Any) -> Engine:
    """An engine with a base by name and adapters from directories: {name: directory}."""
    model, tokenizer = load_base(base)
    for name, directory in adapters.items():
        load_adapter(model, directory, adapter_name=name)
    return Engine(model, tokenizer, **options)


def positive(text: str) -> int:
    """An option's value as a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 1")
    return int(text)


def main() -> None:
    """Command line: NAME=DIRECTORY for each adapter."""
    parser = argparse.ArgumentParser(
        prog="python -m lora_edu.serving.server", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add("adapters", nargs="+", metavar="NAME=DIRECTORY", help="An adapter, and the name that requests use for it.")
    add("--base", default="tiny", help="The model that the adapters belong to, by default %(default)s.")
    add("--host", default="127.0.0.1", help="Where to listen, by default where only this machine can reach it.")
    add("--port", type=positive, default=8000, help="The port to listen on, by default %(default)s.")
    limits = {
        "--max-tokens": (128, "An answer has at most this many tokens"),
        "--max-body": (65_536, "A request has at most this many bytes"),
        "--max-batch": (16, "At most this many requests are answered together"),
        "--max-waiting": (128, "When this many requests wait, further ones are refused with status 429"),
        "--timeout": (120, "A request that takes more seconds than this is cancelled"),
    }
    for name, (default, words) in limits.items():
        add(name, type=positive, default=default, metavar="N", help=f"{words} (by default {default}).")
    add("--max-prompt-tokens", type=positive, metavar="N", help="A prompt has at most this many tokens (no limit of "
        "its own by default: prompt and answer must fit into the model's positions).")  # fmt: skip
    given = parser.parse_args()
    if wrong := [pair for pair in given.adapters if "=" not in pair]:
        parser.error(f"{wrong[0]!r}: expected NAME=DIRECTORY, for example devil=data/adapters/tiny-devils-dictionary")
    engine = load_engine(
        given.base,
        dict(pair.split("=", 1) for pair in given.adapters),
        max_new_tokens=given.max_tokens,
        max_batch=given.max_batch,
        max_waiting=given.max_waiting,
        max_prompt_tokens=given.max_prompt_tokens,
    )
    app = create_app(engine, given.timeout, given.max_body)
    import uvicorn

    uvicorn.run(app, host=given.host, port=given.port)


if __name__ == "__main__":
    main()
