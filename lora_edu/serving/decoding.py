"""One batch of requests, decoded together, while every row reports its text as it comes. Lesson 09.

``generate`` of transformers takes one set of options for a whole batch, and gives the texts back at the end. A server
needs more: each row its own adapter, length, temperature and stop sequences, and each new piece at once. Two places in
``generate`` are open for that, and both are called at every step: a logits processor, which may change the scores of
the next token, and a stopping criterion, which sees the token and says which rows are done. So everything else, the
cache and the padding, stays the library's, and a greedy answer is the one that ``generate`` gives.
"""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria, TopPLogitsWarper

from lora_edu.lab.training import generate
from lora_edu.serving.mixed import BASE


@dataclass(eq=False)
class Request:
    """One prompt, who should answer it and how, and the place where the answer will appear.

    Args:
        prompt: as the model should see it; a chat template has been applied already.
        adapter: a name; the pretrained model by default.
        max_tokens: where the answer ends at the latest; ``None`` means the engine's limit.
        temperature: 0 takes the most probable token, 1 draws from the model's distribution.
        top_p: draws only among the most probable tokens that together have this probability.
        seed: fixes what is drawn, whoever else is in the batch.
        stop: texts that end the answer; they are no part of it.
        hear: called with each new piece of the text, by the thread that computes it.

    The worker writes ``text``, ``tokens`` (the new ones) and ``finish_reason`` ("stop" or "length"), then ``answer``.
    """

    prompt: str
    adapter: str = BASE
    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    hear: Callable[[str], None] | None = None
    answer: Future[str] = field(default_factory=Future)
    prompt_tokens: int = 0
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    gone: bool = False

    def cancel(self) -> None:
        """Nobody waits for the answer any more: it is not begun, or not gone on with."""
        self.gone = True
        self.answer.cancel()

    def take(self, token: int, tokenizer: Any) -> bool:
        """Add a token to the answer, report the text that it completes, and say whether the answer is at its end."""
        self.tokens.append(token)
        text = tokenizer.decode(self.tokens, skip_special_tokens=True)
        cut = min((place for each in self.stop if (place := text.find(each)) >= 0), default=None)
        if cut is not None or token == tokenizer.eos_token_id:
            self.finish_reason = "stop"
        elif len(self.tokens) == self.max_tokens:
            self.finish_reason = "length"
        if self.finish_reason is None:
            if text.endswith("�"):  # the first bytes of a character; the next token brings the others
                return self.gone
            held = max((len(each) - 1 for each in self.stop), default=0)  # they may be the start of a stop text
            cut = max(0, len(text) - held)
        # Spaces at the end wait until more text follows: so the pieces together are the stripped text of ``generate``.
        told, self.text = len(self.text), text[:cut].strip()
        if self.hear is not None and len(self.text) > told:
            self.hear(self.text[told:])
        return self.gone or self.finish_reason is not None


class Draw(LogitsProcessor):
    """Draws the next token of each row with a temperature above 0, and leaves it the only possible one of its row."""

    def __init__(self, requests: list[Request], device: torch.device):
        self.requests = requests
        self.generators = [torch.Generator(device) for _ in requests]
        for request, generator in zip(requests, self.generators, strict=True):
            generator.seed() if request.seed is None else generator.manual_seed(request.seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (rows, vocabulary) in, scores out: rows with temperature 0 as they were."""
        scores = scores.clone()
        for i, request in enumerate(self.requests):
            if request.temperature > 0:
                row = scores[i : i + 1] / max(request.temperature, 1e-6)  # less would overflow, and fail the batch
                likely = TopPLogitsWarper(request.top_p)(input_ids[i : i + 1], row).softmax(-1)
                token = torch.multinomial(likely, 1, generator=self.generators[i])
                scores[i] = -torch.inf
                scores[i, token] = 0.0
        return scores


class Report(StoppingCriteria):
    """Hands each row its new token; a row whose answer is at its end has it at once, and waits for nobody."""

    def __init__(self, requests: list[Request], tokenizer: Any):
        self.requests, self.tokenizer = requests, tokenizer

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Which rows are done, as booleans (rows); those that were done before get padding, which is not looked at."""
        for request, token in zip(self.requests, input_ids[:, -1].tolist(), strict=True):
            if not request.answer.done() and request.take(token, self.tokenizer):
                request.answer.set_result(request.text)
        return torch.tensor([request.answer.done() for request in self.requests], device=input_ids.device)


def decode(model: Any, tokenizer: Any, requests: list[Request]) -> None:
    """Answer a batch; the block around this call says which adapter answers which row."""
    generate(
        model,
        tokenizer,
        [request.prompt for request in requests],
        max(request.max_tokens or 0 for request in requests),
        logits_processor=[Draw(requests, next(model.parameters()).device)],
        stopping_criteria=[Report(requests, tokenizer)],
    )
