"""A small HTTP server: one base, several adapters, and each request names the one that answers it. Lesson 09.

From the repository's root::

    python -m lora_edu.serving.server devil=data/adapters/tiny-devils-dictionary jargon=data/adapters/tiny-jargon
    curl localhost:8000/generate -H "content-type: application/json" \\
        -d '{"adapter": "devil", "prompt": "politician (noun):"}'

How do concurrent requests stay apart? Two plain ways are a lock around "set_adapter, then generate", and one batch in
which each row names its adapter. This server does the second: a single worker thread owns the model, takes whatever
requests wait, and answers them together through ``adapter_names``. Nobody else touches the model, so there is no
moment at which a request could meet another one's adapter; and the base, which is nearly all of the work, is computed
once for all of them, where a lock would compute it once for each.

It is an example. A service for strangers also needs authentication, limits on the length of the queue, time-outs and
sampling; vLLM and others have them, and kernels for the mixed batch.
"""

import argparse
import queue
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_edu.core.peft_io import load_adapter
from lora_edu.core.state import list_adapters
from lora_edu.lab.bases import load_base
from lora_edu.lab.datasets import prompt_ids
from lora_edu.lab.training import generate
from lora_edu.serving.mixed import BASE, adapter_names, check_names


@dataclass
class Request:
    """One prompt, the adapter that should answer it, and the place where the answer will appear."""

    prompt: str
    adapter: str
    answer: Future[str] = field(default_factory=Future)


class Engine:
    """Answers prompts with a model and its adapters, from any number of threads, in mixed batches.

    Args:
        model: with adapters, or without; from now on only this engine may use it.
        tokenizer: the model's.
        max_new_tokens: where an answer ends at the latest.
        max_batch: rows of a batch at most; requests beyond that wait for the next one.

    ``batches`` notes the adapters of each batch that was answered.
    """

    def __init__(self, model: Any, tokenizer: Any, max_new_tokens: int = 40, max_batch: int = 16):
        self.model, self.tokenizer = model.eval(), tokenizer
        self.max_new_tokens, self.max_batch = max_new_tokens, max_batch
        self.adapters = [BASE, *list_adapters(model)]
        self.batches: list[list[str]] = []
        self._waiting: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._gate = threading.Lock()  # between "is it still open?" and "put into the queue"
        self._open = True
        self._worker = threading.Thread(target=self._work, name="lora_edu engine", daemon=True)
        self._worker.start()

    def submit(self, prompt: str, adapter: str = BASE) -> Future[str]:
        """Put a request into the queue and return at once; the result of the future is the text.

        Raises:
            KeyError: there is no adapter of that name; the message names the known ones.
            ValueError: the prompt is empty, leaves no room for an answer, or the adapter cannot answer row by row.
            RuntimeError: the engine was stopped.
        """
        if adapter not in self.adapters:
            raise KeyError(f"no adapter named {adapter!r}; this server has: {', '.join(self.adapters)}")
        if adapter != BASE:
            check_names(self.model, [adapter])  # or one request would fail its whole batch
        if not prompt.strip():
            raise ValueError("the prompt is empty; send some text, for example 'politician (noun):'")
        room = getattr(self.model.config, "max_position_embeddings", None)
        length = len(prompt_ids(prompt, self.tokenizer))
        if room is not None and length + self.max_new_tokens > room:
            raise ValueError(
                f"the prompt has {length} tokens; with an answer of up to {self.max_new_tokens} that is more than the "
                f"{room} that this model can take"
            )
        request = Request(prompt, adapter)
        with self._gate:
            if not self._open:
                raise RuntimeError("the server is shutting down")
            self._waiting.put(request)
        return request.answer

    def stop(self) -> None:
        """Answer what waits already, refuse what comes later, and end the worker."""
        with self._gate:
            if self._open:
                self._open = False
                self._waiting.put(None)
        self._worker.join()

    def _work(self) -> None:
        """The one thread that touches the model: wait for a request, take along what waits behind it, answer."""
        last = False
        while not last:
            requests = [self._waiting.get()]
            while requests[-1] is not None and len(requests) < self.max_batch and not self._waiting.empty():
                requests.append(self._waiting.get())
            last = requests[-1] is None
            # A caller who went away has cancelled the future; it takes no result.
            batch = [each for each in requests if each is not None and each.answer.set_running_or_notify_cancel()]
            if batch:
                self._answer(batch)

    def _answer(self, batch: list[Request]) -> None:
        names = [request.adapter for request in batch]
        try:
            texts = self._generate([request.prompt for request in batch], names)
        except Exception as error:  # the callers get it, and the worker lives on for the next batch
            for request in batch:
                request.answer.set_exception(error)
            return
        self.batches.append(names)
        for request, text in zip(batch, texts, strict=True):
            request.answer.set_result(text)

    def _generate(self, prompts: list[str], names: list[str]) -> list[str]:
        if set(names) == {BASE} and self.adapters == [BASE]:  # a plain model
            return generate(self.model, self.tokenizer, prompts, self.max_new_tokens)
        with adapter_names(self.model, names):
            return generate(self.model, self.tokenizer, prompts, self.max_new_tokens)


def create_app(engine: Engine) -> Any:
    """The FastAPI application: ``GET /adapters``, and ``POST /generate`` with a JSON object {prompt, adapter}.

    Errors of the caller are 404 (no such adapter; the known ones are named) and 422 (a prompt that cannot be
    answered, a missing or foreign field). Stopping the server stops the engine.

    Raises:
        ImportError: the extra is not installed.
    """
    try:
        from fastapi import FastAPI, HTTPException
        from pydantic import BaseModel, ConfigDict
    except ImportError as error:
        raise ImportError("the server needs FastAPI and uvicorn: pip install 'lora-edu[serve]'") from error
    import asyncio
    from contextlib import asynccontextmanager

    class Question(BaseModel):
        model_config = ConfigDict(extra="forbid")  # a misspelt field must not be answered by the base
        prompt: str
        adapter: str = BASE

    @asynccontextmanager
    async def lifespan(app: Any) -> Any:
        yield
        await asyncio.to_thread(engine.stop)

    app = FastAPI(title="lora-edu: one base, several adapters", lifespan=lifespan)

    @app.get("/adapters")
    async def adapters() -> dict[str, list[str]]:
        return {"adapters": engine.adapters}

    @app.post("/generate")
    async def answer(question: Question) -> dict[str, str]:
        try:
            future = engine.submit(question.prompt, question.adapter)
        except KeyError as error:
            raise HTTPException(404, error.args[0]) from None
        except ValueError as error:
            raise HTTPException(422, str(error)) from None
        except RuntimeError as error:
            raise HTTPException(503, str(error)) from None
        return {"adapter": question.adapter, "text": await asyncio.wrap_future(future)}

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


def main() -> None:
    """Command line: NAME=DIRECTORY for each adapter."""
    parser = argparse.ArgumentParser(
        prog="python -m lora_edu.serving.server", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("adapters", nargs="+", metavar="NAME=DIRECTORY")
    parser.add_argument("--base", default="tiny")
    parser.add_argument("--host", default="127.0.0.1", help="this machine only, unless you say otherwise")
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args()
    if wrong := [pair for pair in given.adapters if "=" not in pair]:
        parser.error(f"{wrong[0]!r}: expected NAME=DIRECTORY, for example devil=data/adapters/tiny-devils-dictionary")
    app = create_app(load_engine(given.base, dict(pair.split("=", 1) for pair in given.adapters)))
    import uvicorn

    uvicorn.run(app, host=given.host, port=given.port)


if __name__ == "__main__":
    main()
