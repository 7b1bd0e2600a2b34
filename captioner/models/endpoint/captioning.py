"""The captioner whose model is on servers. See `captioner.models.endpoint`."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from captioner.data import Captions, Pixels, Prompts, Usage
from captioner.errors import EndpointError
from captioner.models.answers import asked_again, misfit
from captioner.models.endpoint.api_key import ApiKey
from captioner.models.endpoint.asking import (
    BrokenError,
    BusyError,
    Client,
    RejectedError,
    image_url,
    json_schema,
    request_body,
)
from captioner.models.endpoint.reply import Reply, joined
from captioner.models.endpoint.sharing import Server, ServerPool
from captioner.models.questions import same_prompts, with_answers
from captioner.models.ref import Endpoint, ModelRef
from captioner.models.seeds import image_seed, request_sampling

T = TypeVar("T")

MAX_FAULTS = 3  # of one image, before its server is asked about another one to find out whose fault it is
# Of --endpoint-timeout: for how long an image is refused as one too many (429, 503) until the same is done. Rests at
# most double, so that a request falls between a third of the timeout and its end, which would stop the run.
BUSY_SHARE = 1 / 3
TEST_PIXELS = np.full((64, 64, 3), 128, np.uint8)
TEST_IMAGE = image_url(TEST_PIXELS)
TEST_TOKENS = 8
NOT_ASKED = Reply(error="not asked: the image has no caption")
STOPPED = "the run is stopped"
ANSWERED = Reply()  # in place of a reply to a question that is not asked


class Conversation:
    """The questions about one image, which are asked one after the other, and the replies so far.

    `body`: the next request. An image that gets no caption is asked nothing else. Used by one thread at a time.
    `schema`: of the first reply, see `request_body`.
    """

    def __init__(
        self, ref: ModelRef, image: npt.NDArray[np.uint8], prompts: Prompts, schema: dict[str, Any] | None = None
    ) -> None:
        self._ref, self._image, self._prompts, self._schema = ref, image_url(image), prompts, schema
        count = ref.num_captions if ref.temperature else 0
        self._seeds = [image_seed(image, ref.seed, sample) for sample in range(count)]
        self._sampled: list[Reply] = []  # to the requests for captions, with --num-captions
        self.replies: list[Reply] = []
        self._misfit: Reply | None = None
        self.body = b""
        self._ask_next()

    @property
    def is_over(self) -> bool:
        return len(self.replies) == len(self._prompts)

    def add(self, reply: Reply) -> None:
        """Add the reply to the latest request. An answer that does not fit its schema is asked for once more."""
        index = len(self.replies)
        question, prompt = self._ref.questions[index], self._prompts[index] or ""
        if not index and self._ref.num_captions > 1:
            self._sampled.append(reply)
            if self._num_sampled < self._ref.num_captions:
                self.body = self._next_body(prompt)
                return
            reply = joined(self._sampled, self._ref.num_captions)
        reason = reply.error or misfit(question, reply.text, reply.finished)
        if reason and not reply.error and self._misfit is None:
            self._misfit = reply
            self.body = self._next_body(asked_again(question, prompt, reason))
            return
        if self._misfit is not None:
            reply = replace(reply, usage=Usage.total([self._misfit.usage, reply.usage]))
        self._misfit, reply = None, replace(reply, error=reason)
        self.replies.append(reply)
        if self.replies[0].error:
            self.replies += [NOT_ASKED] * (len(self._prompts) - 1)
        self._ask_next()

    def _ask_next(self) -> None:
        """Make the request of the next question that is to be asked."""
        while not self.is_over:
            prompt = self._prompts[len(self.replies)]
            if prompt is not None:
                self.body = self._next_body(prompt)
                return
            self.replies.append(ANSWERED)

    @property
    def _num_sampled(self) -> int:
        """The captions that have come: a server may give fewer at once than it is asked for, many give one."""
        return sum(len(reply.samples) or 1 for reply in self._sampled)

    def _next_body(self, prompt: str) -> bytes:
        index, endpoint = len(self.replies), self._ref.endpoint
        assert endpoint is not None
        question = self._ref.questions[index]
        described = json_schema(question.schema) if endpoint.response_format else None
        seed = self._seeds[0 if index else self._num_sampled] if self._seeds else 0
        count = 1 if index else self._ref.num_captions - self._num_sampled
        return request_body(
            self._image,
            endpoint.model,
            prompt,
            question.max_new_tokens,
            system=self._ref.system,
            logprobs=endpoint.logprobs and not index and self._schema is None,
            sampling=request_sampling(self._ref, endpoint.sampling_options, seed, count),
            schema=self._schema if self._schema and not index else described,
        )


@dataclass
class Failures:
    """The requests in a row about one image that were not answered.

    `busy_since`: when it was first refused as one too many, in seconds of the event loop. `faults`: other failures.
    """

    faults: int = 0
    busy_since: float | None = None


class EndpointCaptioner:
    """Captions images on model servers. Several threads may call it; together they keep the servers busy.

    Requests run in an event loop of its own thread. Images are encoded in threads, a few ahead of the servers.
    """

    engine, device_name = "endpoint", "model server"
    schema: dict[str, Any] | None = None  # of the answers, see `request_body`

    def __init__(self, ref: ModelRef, key: ApiKey, notify: Callable[[str], None]) -> None:
        assert ref.endpoint is not None
        self._ref, self._endpoint = ref, ref.endpoint
        num_encoders = min(4, os.cpu_count() or 1)
        self._encoders = ThreadPoolExecutor(num_encoders, thread_name_prefix="encode")
        self._loop, self._is_stopped = asyncio.new_event_loop(), False
        self._busy_since: float | None = None  # the first refusal (429, 503) after the last answer about an image
        threading.Thread(target=self._loop.run_forever, name="requests", daemon=True).start()
        self._start(key, notify, self._endpoint, num_encoders)

    def _start(self, key: ApiKey, notify: Callable[[str], None], endpoint: Endpoint, num_encoders: int) -> None:
        async def start() -> None:
            self._client = Client(key, endpoint.request_timeout)
            self._pool = ServerPool(endpoint.urls, endpoint.concurrency, endpoint.endpoint_timeout, notify)
            self._encoded = asyncio.Semaphore(endpoint.concurrency * len(endpoint.urls) + 2 * num_encoders)

        self._run(start())

    def caption(self, pixels: Pixels, prompts: Sequence[Prompts] | None = None) -> Captions:
        """Ask all questions about images. Raises EndpointError where the run cannot go on with its servers."""
        replies = self._run(self._replies(pixels, prompts or [same_prompts(self._ref)] * len(pixels)))
        by_question = [_as_captions(column) for column in zip(*replies, strict=True)]
        return with_answers(self._ref.questions, by_question, prompts)

    def stop(self) -> None:
        """Break off all requests: calls of `caption` raise EndpointError, now and later."""
        self._loop.call_soon_threadsafe(self._stop)

    def _stop(self) -> None:
        self._is_stopped = True
        for task in asyncio.all_tasks(self._loop):
            task.cancel()

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        try:
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()
        except CancelledError:
            raise EndpointError(STOPPED) from None

    async def _replies(self, pixels: Pixels, prompts: Sequence[Prompts]) -> list[list[Reply]]:
        """Return the replies about each image, [N][questions]."""
        if self._is_stopped:
            raise EndpointError(STOPPED)
        try:
            async with asyncio.TaskGroup() as tasks:
                answers = [tasks.create_task(self._converse(*asked)) for asked in zip(pixels, prompts, strict=True)]
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        return [answer.result() for answer in answers]

    async def _converse(self, image: npt.NDArray[np.uint8], prompts: Prompts) -> list[Reply]:
        async with self._encoded:
            start = self._loop.run_in_executor(self._encoders, Conversation, self._ref, image, prompts, self.schema)
            conversation = await start
            await self._ask(conversation)
            return conversation.replies

    async def _ask(self, conversation: Conversation) -> None:
        """Ask all questions about an image: one server as long as it answers, then another one."""
        failures = Failures()
        while not conversation.is_over:
            server = await self._pool.take()
            try:
                while not conversation.is_over:
                    conversation.add(await self._ask_once(server, conversation.body))
                    failures = Failures()
            except (BusyError, BrokenError) as error:
                self._pool.failed(server, error)
                if self._may_be_its_fault(failures, error) and await self._answers(server):
                    conversation.add(Reply(error=f"the server answers, but not about this image: {error}"))
                    failures = Failures()
            finally:
                await self._pool.release(server)

    def _may_be_its_fault(self, failures: Failures, error: BusyError | BrokenError) -> bool:
        """Add a failure to those of an image; return whether it is time to find out if the image is the reason.

        A limit of requests or tokens a minute refuses any image for some time, and must not cost it. Where no image has
        been answered since an earlier one was refused, that time counts.
        """
        if isinstance(error, BrokenError):
            failures.faults += error.blames
            return failures.faults >= MAX_FAULTS
        now = self._loop.time()
        self._busy_since = now if self._busy_since is None else self._busy_since
        failures.busy_since = self._busy_since if failures.busy_since is None else failures.busy_since
        return now - failures.busy_since >= self._endpoint.endpoint_timeout * BUSY_SHARE

    async def _ask_once(self, server: Server, body: bytes) -> Reply:
        try:
            reply = await self._client.ask(server.url, body)
        except RejectedError as error:
            self._answered(server)
            return Reply(error=str(error))
        self._answered(server)
        check_same_model(self._endpoint, server.url, reply)
        return reply

    def _answered(self, server: Server) -> None:
        self._pool.answered(server)
        self._busy_since = None

    async def _answers(self, server: Server) -> bool:
        """Return whether a server answers about a small image that nothing is wrong with."""
        body = request_body(TEST_IMAGE, self._endpoint.model, same_prompts(self._ref)[0], TEST_TOKENS)
        try:
            await self._client.ask(server.url, body)
        except (BusyError, BrokenError, RejectedError):
            return False
        self._pool.answered(server)
        return True


def _as_captions(replies: Sequence[Reply]) -> Captions:
    """Return the replies to one question about N images."""
    return Captions(
        [reply.text for reply in replies],
        [reply.num_tokens for reply in replies],
        [reply.logprob_mean for reply in replies],
        [reply.finished for reply in replies],
        [reply.error for reply in replies],
        [reply.usage for reply in replies],
        samples=[reply.samples for reply in replies] if any(len(reply.samples) > 1 for reply in replies) else [],
    )


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
