"""The engine of the server: one worker owns the model, and answers whatever waits as one mixed batch. Lesson 09.

How do concurrent requests stay apart? Two plain ways are a lock around "set_adapter, then generate", and one batch in
which each row names its adapter. This engine does the second: a single worker thread owns the model, takes whatever
requests wait, and answers them together through ``adapter_names``. Nobody else touches the model, so there is no
moment at which a request could meet another one's adapter; and the base, which is nearly all of the work, is computed
once for all of them, where a lock would compute it once for each.

A row that is done has its answer at once, but its place stays empty until the longest row of the batch is done, and
who comes meanwhile waits for the next batch. Large servers fill the place at once (*continuous batching*).
"""

import math
import queue
import threading
import time
from concurrent.futures import Future
from typing import Any

from lora_edu.core.state import list_adapters
from lora_edu.lab.datasets import prompt_ids
from lora_edu.serving.decoding import Request, decode
from lora_edu.serving.mixed import BASE, adapter_names, check_names

KEPT = 1000  # batches that the engine remembers


class Engine:
    """Answers prompts with a model and its adapters, from any number of threads, in mixed batches.

    Args:
        model: with adapters, or without; from now on only this engine may use it.
        tokenizer: the model's.
        max_new_tokens: where an answer ends at the latest.
        max_batch: rows of a batch at most; requests beyond that wait for the next one.
        max_waiting: requests that may wait; further ones are refused.
        max_prompt_tokens: the longest prompt; ``None`` leaves it to the positions that the model has.

    ``batches`` notes the adapters of each batch that was begun, of the last 1,000.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        max_new_tokens: int = 40,
        max_batch: int = 16,
        max_waiting: int = 128,
        max_prompt_tokens: int | None = None,
    ):
        self.model, self.tokenizer = model.eval(), tokenizer
        self.max_new_tokens, self.max_batch, self.max_waiting = max_new_tokens, max_batch, max_waiting
        self.max_prompt_tokens = max_prompt_tokens
        self.adapters = [BASE, *list_adapters(model)]
        self.batches: list[list[str]] = []
        self._last_seconds = 0.0
        self._waiting: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._gate = threading.Lock()  # between "is it still open, is there room?" and "put into the queue"
        self._open = True
        self._worker = threading.Thread(target=self._work, name="lora_edu engine", daemon=True)
        self._worker.start()

    def submit(self, prompt: str, adapter: str = BASE) -> Future[str]:
        """Put a prompt into the queue and return at once; the result of the future is the greedy text.

        Raises:
            As ``put``.
        """
        return self.put(Request(prompt, adapter)).answer

    def put(self, request: Request) -> Request:
        """Put a request into the queue and return it at once; its ``answer`` comes later.

        Raises:
            KeyError: there is no adapter of that name; the message names the known ones.
            ValueError: the prompt is empty or too long, the answer asked for is too long, or the adapter cannot answer
                row by row.
            queue.Full: as many requests as may wait do so already.
            RuntimeError: the engine was stopped.
        """
        if request.adapter not in self.adapters:
            raise KeyError(f"no adapter named {request.adapter!r}; this server has: {', '.join(self.adapters)}")
        if request.adapter != BASE:
            check_names(self.model, [request.adapter])  # or one request would fail its whole batch
        self._check_length(request)
        with self._gate:
            if not self._open:
                raise RuntimeError("the server is shutting down")
            if self._waiting.qsize() >= self.max_waiting:
                raise queue.Full(f"{self.max_waiting} requests wait already, which is this server's limit: try later")
            self._waiting.put(request)
        return request

    def seconds_to_wait(self) -> int:
        """When it is worth trying again after ``queue.Full``: the next batch takes about as long as the last one."""
        return max(1, math.ceil(self._last_seconds))

    def stop(self) -> None:
        """Answer what waits already, refuse what comes later, and end the worker."""
        with self._gate:
            if self._open:
                self._open = False
                self._waiting.put(None)
        self._worker.join()

    def _check_length(self, request: Request) -> None:
        """Fill in what the request leaves open, and raise unless prompt and answer are within the limits."""
        if not request.prompt.strip():
            raise ValueError("the prompt is empty; send some text, for example 'politician (noun):'")
        try:
            request.prompt.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the prompt is no text: {request.prompt[error.start]!r} is half a character") from None
        if request.max_tokens is None:
            request.max_tokens = self.max_new_tokens
        if not 1 <= request.max_tokens <= self.max_new_tokens:
            raise ValueError(f"max_tokens={request.max_tokens}: this server gives 1 to {self.max_new_tokens} tokens")
        length = request.prompt_tokens = len(prompt_ids(request.prompt, self.tokenizer))
        if self.max_prompt_tokens is not None and length > self.max_prompt_tokens:
            raise ValueError(f"the prompt has {length} tokens; this server takes up to {self.max_prompt_tokens}")
        room = getattr(self.model.config, "max_position_embeddings", None)
        if room is not None and length + request.max_tokens > room:
            raise ValueError(
                f"the prompt has {length} tokens; with an answer of up to {request.max_tokens} that is more than the "
                f"{room} that this model can take"
            )

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
        self.batches = [*self.batches[1 - KEPT :], names]
        start = time.monotonic()
        try:
            if set(names) == {BASE} and self.adapters == [BASE]:  # a plain model
                decode(self.model, self.tokenizer, batch)
            else:
                with adapter_names(self.model, names):
                    decode(self.model, self.tokenizer, batch)
        except Exception as error:  # the callers get it, and the worker lives on for the next batch
            for request in batch:
                if not request.answer.done():
                    request.answer.set_exception(error)
        self._last_seconds = time.monotonic() - start
