"""The captioner whose model is on servers. See `captioner.models.endpoint`."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from captioner.data import Captions, Pixels
from captioner.errors import EndpointError
from captioner.models.endpoint.api_key import ApiKey
from captioner.models.endpoint.asking import BrokenError, BusyError, Client, RejectedError, request_body
from captioner.models.endpoint.reply import Reply
from captioner.models.endpoint.sharing import Server, ServerPool
from captioner.models.ref import Endpoint, ModelRef

T = TypeVar("T")

MAX_FAULTS = 3  # of one image, before its server is asked about another one to find out whose fault it is
TEST_IMAGE = np.full((64, 64, 3), 128, np.uint8)
TEST_TOKENS = 8


class EndpointCaptioner:
    """Captions images on model servers. Several threads may call it; together they keep the servers busy.

    Requests run in an event loop of its own thread. Images are encoded in threads, a few ahead of the servers.
    """

    engine, device_name = "endpoint", "model server"

    def __init__(self, ref: ModelRef, key: ApiKey, notify: Callable[[str], None]) -> None:
        assert ref.endpoint is not None
        self._ref, self._endpoint = ref, ref.endpoint
        self.max_calls = ref.endpoint.chunks_at_once
        num_encoders = min(4, os.cpu_count() or 1)
        self._encoders = ThreadPoolExecutor(num_encoders, thread_name_prefix="encode")
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="requests", daemon=True).start()
        self._start(key, notify, self._endpoint, num_encoders)

    def _start(self, key: ApiKey, notify: Callable[[str], None], endpoint: Endpoint, num_encoders: int) -> None:
        async def start() -> None:
            self._client = Client(key, endpoint.request_timeout)
            self._pool = ServerPool(endpoint.urls, endpoint.concurrency, endpoint.endpoint_timeout, notify)
            self._encoded = asyncio.Semaphore(endpoint.concurrency * len(endpoint.urls) + 2 * num_encoders)

        self._run(start())

    def caption(self, pixels: Pixels) -> Captions:
        """Caption images. Raises EndpointError where the run cannot go on with its servers."""
        replies = self._run(self._replies(pixels))
        return Captions(
            [reply.text for reply in replies],
            [reply.num_tokens for reply in replies],
            [reply.logprob_mean for reply in replies],
            [reply.finished for reply in replies],
            [reply.error for reply in replies],
            [reply.usage for reply in replies],
        )

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _replies(self, pixels: Pixels) -> list[Reply]:
        try:
            async with asyncio.TaskGroup() as tasks:
                answers = [tasks.create_task(self._answer(image)) for image in pixels]
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        return [answer.result() for answer in answers]

    async def _answer(self, image: npt.NDArray[np.uint8]) -> Reply:
        async with self._encoded:
            return await self._ask(await self._loop.run_in_executor(self._encoders, self._body, image))

    def _body(self, image: npt.NDArray[np.uint8]) -> bytes:
        ref, endpoint = self._ref, self._endpoint
        return request_body(image, endpoint.model, ref.prompt, ref.max_new_tokens, endpoint.logprobs)

    async def _ask(self, body: bytes) -> Reply:
        """Return the reply to an image, from whichever server gives one."""
        faults = 0
        while True:
            server = await self._pool.take()
            try:
                return await self._ask_once(server, body)
            except BusyError as error:
                self._pool.was_busy(server, error)
            except BrokenError as error:
                self._pool.broke(server, error)
                faults += error.blames
                if faults >= MAX_FAULTS and await self._answers(server):
                    return Reply(error=f"the server answers, but not about this image: {error}")
            finally:
                await self._pool.release(server)

    async def _ask_once(self, server: Server, body: bytes) -> Reply:
        try:
            reply = await self._client.ask(server.url, body)
        except RejectedError as error:
            self._pool.answered(server)
            return Reply(error=str(error))
        self._pool.answered(server)
        check_same_model(self._endpoint, server.url, reply)
        return reply

    async def _answers(self, server: Server) -> bool:
        """Return whether a server answers about a small image that nothing is wrong with."""
        body = request_body(TEST_IMAGE, self._endpoint.model, self._ref.prompt, TEST_TOKENS, False)
        try:
            await self._client.ask(server.url, body)
        except (BusyError, BrokenError, RejectedError):
            return False
        self._pool.answered(server)
        return True


def check_same_model(endpoint: Endpoint, url: str, reply: Reply) -> None:
    """Raise EndpointError where another model answered than the one that the table is bound to."""
    for name, bound, answered in (
        ("model", endpoint.served_model, reply.model),
        ("system_fingerprint", endpoint.system_fingerprint, reply.system_fingerprint),
    ):
        if answered is not None and bound is not None and answered != bound:
            raise EndpointError(
                f"{url}: the answers now come from {name} {answered!r}, before from {bound!r}; captions of two models "
                "are not mixed: serve the first one again, or give another OUT"
            )
