"""The HTTP service of chapter 13: a model, a batcher for each setting that is asked for, and a
token that every request must carry. It is a program, for `serving.server`:

    service.py MODULE:FACTORY ARGUMENT [--threads N] [--workers N] [--limit SECONDS]

    POST /embed?batch=32&wait=5&budget=512  {"text": …} → {"vector": base64 of 384 float32}
    GET /                                   whether it is up
    GET /bill?batch=32&wait=5&budget=512    what that setting's answers have cost, and each batch

The setting stands in the address, so that one process can be asked in several settings in turn:
they share its moods, as two arms of a comparison do. A service for others would have one.
"""

import argparse
import asyncio
import base64
import concurrent.futures
import contextlib
import dataclasses
import hmac
import importlib
import os
from collections.abc import Callable

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from course_utils.batching import Batcher, Closed, Full
from course_utils.embed import tokenizer
from course_utils.workers import Workers

__all__ = ["Service"]


class Service:
    """One model, in threads of this process or in worker processes, behind its batchers.

    >>> Service(Workers("course_utils.embed:Model", "minilm.onnx", 2), 2).batchers
    {}
    """

    def __init__(self, model: Callable | Workers, parallel: int, limit: float = 30.0) -> None:
        self.model, self.parallel, self.limit = model, parallel, limit
        self.encode, self.batchers, self.closing = tokenizer(), {}, False
        self.threads = concurrent.futures.ThreadPoolExecutor(parallel)

    async def run(self, lists: list[list[int]]) -> object:
        """A batch's vectors, computed beside the event loop, which talks to clients meanwhile."""
        if isinstance(self.model, Workers):
            return await self.model.run(lists)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.threads, self.model, lists)

    def batcher(self, request: Request) -> Batcher:
        """The batcher of the setting in the address. Raises ValueError for nonsense, Closed once
        the service is told to end.
        """
        query = request.query_params
        setting = tuple(
            float(query.get(k, d)) for k, d in (("batch", 32), ("wait", 0), ("budget", 0))
        )
        batch, wait, budget = setting
        if setting not in self.batchers:
            if self.closing:
                raise Closed("the server is shutting down")
            if len(self.batchers) == 16 or not (1 <= batch <= 256 and wait >= 0 and budget >= 0):
                raise ValueError("batch is 1 to 256, and at most 16 settings are open")
            self.batchers[setting] = Batcher(
                self.run,
                max_batch=int(batch),
                max_wait=wait / 1000,
                workers=self.parallel,
                limit=self.limit,
                size=len if budget else None,
                budget=int(budget) or None,
            )
        return self.batchers[setting]

    async def embed(self, request: Request) -> Response:
        """One request: asks the batcher, and listens meanwhile whether its client has hung up."""
        try:
            numbers = self.encode([(await request.json())["text"]])[0]
            batcher = self.batcher(request)
        except (ValueError, KeyError, TypeError) as error:
            return JSONResponse({"error": f"{type(error).__name__}: {error}"}, 400)
        except Closed as error:
            return JSONResponse({"error": str(error)}, 503, {"Retry-After": "1"})
        asked = asyncio.ensure_future(batcher.ask(numbers))
        gone = asyncio.ensure_future(request.receive())  # after the body only the hang-up comes
        try:
            await asyncio.wait([asked, gone], return_when=asyncio.FIRST_COMPLETED)
            if not asked.done():
                return Response(status_code=499)  # nobody reads it
            vector = asked.result()
        except (Full, Closed) as error:
            return JSONResponse({"error": str(error)}, 503, {"Retry-After": "1"})
        except TimeoutError as error:
            return JSONResponse({"error": str(error)}, 504)
        except Exception as error:
            return JSONResponse({"error": f"{type(error).__name__}: {error}"}, 500)
        finally:
            gone.cancel()
            asked.cancel()  # a caller who has gone leaves the queue
        return JSONResponse({"vector": base64.b64encode(vector.tobytes()).decode()})

    async def up(self, _: Request) -> Response:
        return JSONResponse({"up": True})

    async def bill(self, request: Request) -> Response:
        batcher = self.batcher(request)
        log = list(batcher.log)
        batcher.log.clear()
        return JSONResponse(dataclasses.asdict(batcher.bill) | {"log": log})

    async def close(self) -> None:
        """Every batcher answers what it has, at once."""
        self.closing = True
        await asyncio.gather(*(batcher.close() for batcher in self.batchers.values()))


class Server(uvicorn.Server):
    """uvicorn waits, once it is told to end, until all open requests are answered, and only then
    tells the application. The batchers must hear of it first: they would wait for company.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service

    async def shutdown(self, sockets: list | None = None) -> None:
        closing = asyncio.create_task(self.service.close())
        await super().shutdown(sockets)
        await closing


def guarded(app: Callable, token: str) -> Callable:
    """Ask every HTTP request for `Authorization: Bearer TOKEN`; 401 otherwise, in a time that tells
    nothing about the token.
    """
    wanted = f"Bearer {token}".encode()

    async def wrapped(scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] == "http":
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, wanted):
                return await Response(status_code=401)(scope, receive, send)
        await app(scope, receive, send)

    return wrapped


async def main() -> None:
    """Read the arguments, load the model, serve until told to end."""
    parser = argparse.ArgumentParser()
    parser.add_argument("factory")
    parser.add_argument("argument")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--limit", type=float, default=30.0)
    asked = parser.parse_args()
    if asked.workers:
        model = Workers(asked.factory, asked.argument, asked.workers)
        await model.start()
    else:
        module, _, name = asked.factory.partition(":")
        model = getattr(importlib.import_module(module), name)(asked.argument)
    service = Service(model, asked.workers or asked.threads, asked.limit)
    routes = [
        Route("/embed", service.embed, methods=["POST"]),
        Route("/", service.up),
        Route("/bill", service.bill),
    ]
    config = uvicorn.Config(
        guarded(Starlette(routes=routes), os.environ["COURSE_TOKEN"]),
        host="127.0.0.1",
        port=int(os.environ["PORT"]),
        log_level="warning",
        access_log=False,
        lifespan="off",
    )
    try:
        await Server(config, service).serve()
    finally:
        if isinstance(model, Workers):
            with contextlib.suppress(ProcessLookupError):
                await model.stop()


if __name__ == "__main__":
    asyncio.run(main())
