"""Find out what model servers are, by asking each about one small image. Done before anything else of a run."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from captioner.config import ModelConfig
from captioner.data import PixelSpec, Question
from captioner.errors import EndpointError, UsageError
from captioner.models.endpoint.api_key import ApiKey
from captioner.models.endpoint.asking import (
    JPEG_QUALITY,
    TEMPERATURE,
    BrokenError,
    BusyError,
    Client,
    RejectedError,
    checked_url,
    json_schema,
    request_body,
)
from captioner.models.endpoint.captioning import TEST_IMAGE, TEST_PIXELS, TEST_TOKENS
from captioner.models.endpoint.reply import Reply
from captioner.models.families import QUESTION
from captioner.models.questions import fill
from captioner.models.ref import Endpoint, ModelRef
from captioner.models.seeds import image_seed, request_sampling, sampling_settings

FAMILY = "endpoint"
BUSY_REST_S = 2.0
MAX_NAMES = 5  # models that an error names
# Settings of a model that is loaded here, with their values for none.
_OF_LOADED_MODELS = {
    "revision": None,
    "num_beams": 1,
    "dtype": "auto",
    "quantize": None,
    "batch_size": "auto",
    "preprocess": "fast",
}
_SAMPLING_OPTIONS = (("n", "seed"), ("seed",), ("n",), ())  # what a server is asked to take, until it does


@dataclass(frozen=True)
class Probe:
    """What one server said.

    `model`: the name that it was asked for. `error`: why it did not answer, or "". `sampling_options`: see
    `captioner.models.ref.Endpoint`. `takes_schemas`: whether it takes the schemas of all questions.
    """

    url: str
    model: str = ""
    reply: Reply = field(default_factory=Reply)
    error: str = ""
    sampling_options: tuple[str, ...] = _SAMPLING_OPTIONS[0]
    takes_schemas: bool = True


def resolve_endpoint(
    config: ModelConfig, notify: Callable[[str], None], questions: Sequence[Question] = ()
) -> ModelRef:
    """Return what the servers of --endpoint serve. Servers that do not answer now are kept and named.

    Raises EndpointError where none answers, one refuses, or two serve different models; UsageError for settings of
    models that are loaded here.
    """
    for name, none in _OF_LOADED_MODELS.items():
        if getattr(config, name) != none:
            raise UsageError(f"--{name.replace('_', '-')} has no effect on an --endpoint; leave it out")
    urls = tuple(dict.fromkeys(checked_url(url) for url in config.endpoint))
    schemas = [question.schema for question in questions if question.schema]
    probes = asyncio.run(probe_all(urls, config, notify, schemas))
    answering = [probe for probe in probes if not probe.error]
    if not answering:
        raise EndpointError(f"no --endpoint answers: {'; '.join(f'{probe.url}: {probe.error}' for probe in probes)}")
    for probe in probes:
        if probe.error:
            notify(f"{probe.url} does not answer ({probe.error}); going on with the others until it does")
        elif "seed" not in probe.sampling_options:
            notify(f"{probe.url} takes no seed: it gives other captions when it is asked again")
        if not probe.takes_schemas:
            notify(f"{probe.url} refuses response_format; the prompt tells the schema instead, and answers are checked")
    return _describe(config, urls, answering)


def _describe(config: ModelConfig, urls: tuple[str, ...], probes: list[Probe]) -> ModelRef:
    first = _identity(probes[0])
    for probe in probes[1:]:
        if _identity(probe) != first:
            raise EndpointError(
                f"{probes[0].url} serves {_in_words(*first)}, {probe.url} {_in_words(*_identity(probe))}; captions of "
                "two models are not mixed: give servers of the same"
            )
    endpoint = Endpoint(
        urls,
        probes[0].model,
        first[0],
        first[1],
        all(probe.reply.logprob_mean is not None for probe in probes),
        all(probe.takes_schemas for probe in probes),
        config.concurrency,
        config.max_side,
        config.request_timeout,
        config.endpoint_timeout,
        tuple(name for name in ("n", "seed") if all(name in probe.sampling_options for probe in probes)),
    )
    side = config.max_side
    return ModelRef(
        name=endpoint.model,
        path="",
        family=FAMILY,
        sha256=_sha256(first),
        settings_sha256=_sha256([side, JPEG_QUALITY, TEMPERATURE]),
        spec=PixelSpec(side, side, "own_edge", limit=side),
        dtype=FAMILY,
        max_new_tokens=config.max_new_tokens,
        prompt=config.prompt or QUESTION,
        endpoint=endpoint,
        **sampling_settings(config),
    )


def describe_server(url: str, config: ModelConfig, key: ApiKey) -> str:
    """Return in words what a server serves and how it answers one small image. Raises EndpointError where it does not.

    For `captioner doctor`.
    """

    async def ask() -> str:
        async with Client(key, config.request_timeout) as client:
            names = await _names(client, checked_url(url))
            started = time.perf_counter()
            try:
                probe = await _probe_once(client, checked_url(url), config)
            except (BrokenError, BusyError) as error:
                raise EndpointError(f"does not answer: {error}") from None
            seconds = time.perf_counter() - started
        logprobs = "" if probe.reply.logprob_mean is not None else ", gives no log-probabilities"
        return f"serves {_first_names(names)}; {probe.model} answers one image in {seconds:.2f} s{logprobs}"

    return asyncio.run(ask())


async def probe_all(
    urls: tuple[str, ...], config: ModelConfig, notify: Callable[[str], None], schemas: Sequence[str]
) -> list[Probe]:
    """Ask every server about one small image. Raises EndpointError where one refuses."""
    async with Client(ApiKey.from_environment(), config.request_timeout) as client:
        return await asyncio.gather(*(_probe(client, url, config, notify, schemas) for url in urls))


async def _probe(
    client: Client, url: str, config: ModelConfig, notify: Callable[[str], None], schemas: Sequence[str]
) -> Probe:
    """Ask one server; wait while it is busy, such as with loading the model."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + config.endpoint_timeout
    while True:
        try:
            return await _probe_once(client, url, config, schemas)
        except BrokenError as error:
            return Probe(url, error=str(error))
        except BusyError as error:
            rest = max(BUSY_REST_S, error.seconds or 0.0)
            if loop.time() + rest > deadline:
                return Probe(url, error=str(error))
            notify(f"{url} is busy ({error}); asking again in {rest:.0f} s")
            await asyncio.sleep(rest)


async def _probe_once(client: Client, url: str, config: ModelConfig, schemas: Sequence[str] = ()) -> Probe:
    model = config.name or await _only_model(client, url)
    try:
        probe = await _ask_about_test_image(client, url, model, config, schemas)
        options = await _sampling_options(client, probe, config) if config.temperature else _SAMPLING_OPTIONS[0]
        return replace(probe, sampling_options=options)
    except (EndpointError, RejectedError) as error:
        names = await _names(client, url)
        if names and model not in names:
            raise EndpointError(f"{url}: does not serve --model {model}; it serves {_first_names(names)}") from None
        if isinstance(error, EndpointError):
            raise
        raise EndpointError(
            f"{url}: {model} does not take a small test image ({error}); is it a vision model?"
        ) from None


async def _ask_about_test_image(
    client: Client, url: str, model: str, config: ModelConfig, schemas: Sequence[str]
) -> Probe:
    """Ask with log-probabilities and, where the server refuses that, without; then with each schema."""
    tokens = min(TEST_TOKENS, config.max_new_tokens)

    async def ask(logprobs: bool = False, schema: str | None = None) -> Reply:
        prompt = fill(config.prompt or QUESTION, {})
        body = request_body(
            TEST_IMAGE, model, prompt, tokens, system=config.system, logprobs=logprobs, schema=json_schema(schema)
        )
        return await client.ask(url, body)

    try:
        reply = await ask(logprobs=True)
    except RejectedError:
        reply = await ask()
    try:
        for schema in schemas:
            await ask(schema=schema)
    except RejectedError:
        return Probe(url, model, reply, takes_schemas=False)
    return Probe(url, model, reply)


async def _sampling_options(client: Client, probe: Probe, config: ModelConfig) -> tuple[str, ...]:
    """Return which settings of sampling a server takes besides the temperature. Raises RejectedError where not that."""
    tokens = min(TEST_TOKENS, config.max_new_tokens)
    for options in _SAMPLING_OPTIONS:
        sampling = request_sampling(config, options, image_seed(TEST_PIXELS, config.seed), config.num_captions)
        prompt = fill(config.prompt or QUESTION, {})
        body = request_body(TEST_IMAGE, probe.model, prompt, tokens, system=config.system, sampling=sampling)
        try:
            await client.ask(probe.url, body)
            break
        except RejectedError:
            if not options:
                raise
    return options


async def _only_model(client: Client, url: str) -> str:
    names = await client.models(url)
    if len(names) != 1:
        raise EndpointError(f"{url}: serves {_first_names(names)}; name one with --model")
    return names[0]


async def _names(client: Client, url: str) -> list[str]:
    """Return the names of the models of a server, none where it does not list them."""
    try:
        return await client.models(url)
    except (BrokenError, BusyError, RejectedError, EndpointError):
        return []


def _first_names(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMES:,} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more if names else "no model that it lists"


def _identity(probe: Probe) -> tuple[str, str | None]:
    return probe.reply.model or probe.model, probe.reply.system_fingerprint


def _in_words(model: str, system_fingerprint: str | None) -> str:
    return model if system_fingerprint is None else f"{model} (system_fingerprint {system_fingerprint})"


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
