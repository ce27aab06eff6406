"""Between one HTTP connection and the engine: text as it comes, within limits, until the client goes away. Lesson 09.

The engine's worker is a thread, and the server lives in an event loop. Each request has a queue of its own in that
loop, into which the worker puts the pieces of the text. Who stops taking them out, because the time is over or the
client has left, cancels the request, so that its row of the batch ends, too.
"""

import asyncio
import logging
import queue
from collections.abc import AsyncIterator
from typing import Any

from fastapi import HTTPException
from fastapi import Request as HTTPRequest

from lora_edu.serving.decoding import Request
from lora_edu.serving.engine import Engine


class Refused(HTTPException):
    """An error with its HTTP status; ``param`` and ``code`` are what OpenAI's clients look at besides the message."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(status, message, headers)
        self.param, self.code = param, code


def begin(engine: Engine, request: Request, timeout: float, invalid: int = 422) -> AsyncIterator[str]:
    """Put a request into the engine's queue; gives its text piece by piece, for at most ``timeout`` seconds.

    Raises:
        Refused: at once if the engine does not take it (404, 429, 503, or ``invalid``); later, in the iteration, if the
            time is over (504) or the model failed (500).
    """
    loop = asyncio.get_running_loop()
    arrived: asyncio.Queue[str | None] = asyncio.Queue()

    def tell(piece: str | None) -> None:
        try:
            loop.call_soon_threadsafe(arrived.put_nowait, piece)
        except RuntimeError:  # the loop is closed: the server has ended before the worker
            request.gone = True

    request.hear = tell
    try:
        engine.put(request)
    except KeyError as error:
        raise Refused(404, error.args[0], "model", "model_not_found") from None
    except ValueError as error:
        raise Refused(invalid, str(error)) from None
    except queue.Full as error:
        wait = {"Retry-After": str(engine.seconds_to_wait())}
        raise Refused(429, str(error), code="rate_limit_exceeded", headers=wait) from None
    except RuntimeError as error:
        raise Refused(503, str(error)) from None
    request.answer.add_done_callback(lambda _: tell(None))
    return _pieces(request, arrived, timeout)


async def _pieces(request: Request, arrived: "asyncio.Queue[str | None]", timeout: float) -> AsyncIterator[str]:
    clock = asyncio.get_running_loop().time
    end = clock() + timeout
    try:
        while (piece := await asyncio.wait_for(arrived.get(), end - clock())) is not None:
            yield piece
        request.answer.result(0)
    except TimeoutError:
        raise Refused(504, f"there was no complete answer within {timeout:g} seconds", code="timeout") from None
    except Exception as error:
        logging.getLogger(__name__).error("a batch failed", exc_info=error)
        raise Refused(500, f"the model failed at this batch: {type(error).__name__}") from error
    finally:
        request.cancel()  # whatever the reason is: nobody listens any more


async def whole(http: HTTPRequest, pieces: AsyncIterator[str]) -> str:
    """All pieces as one text.

    Raises:
        Refused: the client has gone away (499, which nobody will read), or as ``begin``.
    """

    async def joined() -> str:
        return "".join([piece async for piece in pieces])

    async def left() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    reading, leaving = asyncio.create_task(joined()), asyncio.create_task(left())
    done, other = await asyncio.wait({reading, leaving}, return_when=asyncio.FIRST_COMPLETED)
    for task in other:
        task.cancel()
    if reading not in done:
        raise Refused(499, "the client has gone away")
    return reading.result()


class BodyLimit:
    """A layer around the application that reads no more of a request's body than it may have."""

    def __init__(self, app: Any, most: int):
        self.app, self.most = app, most

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request; where its body is longer, the application meets status 413 while it reads."""
        size = 0

        async def counted() -> Any:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.most:
                raise Refused(413, f"the body of the request has more than {self.most} bytes, this server's limit")
            return message

        await self.app(scope, counted, send)
