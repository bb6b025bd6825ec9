"""Who answers a vision-language judge: a server over HTTP here, models in this process in ``in_process.py``.

A backend takes questions (a text and pictures) and gives several answers to each. It never raises for a single answer:
one that failed says why in :attr:`Answer.error`, and the judge counts it as no vote. What is wrong with the set-up
(nobody listens, another model is served, a key is missing) is found when a backend is made, before a run begins.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shlex
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import urlsplit

from prophet_gym.errors import MissingExtraError, nearest
from prophet_gym.judges.prompting import success_probability

__all__ = ["Answer", "Backend", "Question", "Sampling", "ServerBackend", "serve_command"]

TOP_LOGPROBS = 20
"""Alternatives asked for at every token: the most that OpenAI's interface and vLLM allow by default."""
CONTACT_SECONDS = 5.0
"""How long a server may take to accept a connection and to name its models."""
LONGEST_PAUSE = 8.0
"""Longest wait of the openai client before it tries again, in seconds, unless the server asks for more."""


@dataclass(frozen=True)
class Question:
    """One rollout as a model is asked about it.

    Attributes:
        text: the prompt.
        images: compressed pictures in order of time.
        labels: a few words before each picture, such as "Frame 5:".
        media_type: of the pictures, "image/jpeg" or "image/png".
        as_video: send the pictures as one video of JPEG frames instead of single images.
        seeds: one for each answer that is wanted.
    """

    text: str
    images: tuple[bytes, ...]
    labels: tuple[str, ...]
    media_type: str
    as_video: bool
    seeds: tuple[int, ...]

    def messages(self) -> list[dict[str, Any]]:
        """Returns the question in the form of OpenAI's chat completions, pictures as data URLs."""
        data = [base64.b64encode(image).decode() for image in self.images]
        parts: list[dict[str, Any]] = [{"type": "text", "text": self.text}]
        if self.as_video:  # vLLM's form; it keeps every frame, where an MP4 would be sampled again
            parts.append({"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{','.join(data)}"}})
        else:
            for label, picture in zip(self.labels, data, strict=True):
                url = f"data:{self.media_type};base64,{picture}"
                parts += [{"type": "text", "text": label}, {"type": "image_url", "image_url": {"url": url}}]
        return [{"role": "user", "content": parts}]


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Attributes:
        temperature: 0 always takes the likeliest token.
        max_tokens: where an answer is cut off.
        logprobs: also find :attr:`Answer.probability`.
    """

    temperature: float
    max_tokens: int
    logprobs: bool


@dataclass(frozen=True)
class Answer:
    """One answer, or why there is none.

    Attributes:
        text: what the model said.
        error: why there is no answer; empty if there is one.
        finished: False when it was cut off at ``max_tokens``.
        probability: of success, where :func:`prophet_gym.judges.prompting.success_probability` could tell.
    """

    text: str = ""
    error: str = ""
    finished: bool = True
    probability: float | None = None


Done = Callable[[int, list[Answer]], None]
"""What a backend calls once for every question: its index, its answers."""


class Backend(Protocol):
    """Anything that answers questions about pictures."""

    takes_video: bool
    """Whether ``Question.as_video`` is understood."""

    @property
    def identity(self) -> dict[str, Any]:
        """What of the backend decides the answers, as JSON values: part of the key of cached answers."""
        ...

    def ask(self, questions: Sequence[Question], sampling: Sampling, done: Done) -> list[list[Answer]]:
        """Answers every question as often as it has seeds; never raises because of a single answer.

        Calls ``done`` with the index of a question and its answers as soon as it has them all, so that an interruption
        costs the questions under way and no others.
        """
        ...


@dataclass(frozen=True)
class ServerBackend:
    """A server that speaks OpenAI's chat completions: vLLM, SGLang, ``transformers serve`` or a hosted service.

    Every answer is a request of its own: a vote that fails then costs no other vote, and every server understands it.
    vLLM recognises the repeated prompt and pictures and computes them once. Dropped connections, time-outs and the
    statuses 408, 409, 429 and 5xx are tried again by the openai client, which waits longer each time and heeds
    ``Retry-After``.

    Attributes:
        model: the name under which the server serves it.
        base_url: up to and with ``/v1``.
        api_key: default the environment variable ``OPENAI_API_KEY``; servers that ask for none take anything.
        concurrency: requests under way at once.
        timeout: seconds without a byte after which one attempt ends; no answer takes longer than this for every attempt
            and the waits between them.
        max_retries: further attempts after the first.

    Raises:
        MissingExtraError: the openai client is not installed.
        ValueError: a setting is out of range, nobody listens at ``base_url`` (the message holds the command that starts
            a server), the model is not served (it lists those that are), or the key is missing or refused.
    """

    model: str
    base_url: str = "http://localhost:8000/v1"
    api_key: str | None = field(default=None, repr=False)
    concurrency: int = 16
    timeout: float = 120.0
    max_retries: int = 3
    takes_video = True

    def __post_init__(self) -> None:
        if self.concurrency < 1 or self.timeout <= 0 or self.max_retries < 0:
            raise ValueError(
                f"concurrency={self.concurrency}, timeout={self.timeout}, max_retries={self.max_retries}: expected at "
                "least 1, more than 0 seconds, and at least 0."
            )
        if urlsplit(self.base_url).scheme not in ("http", "https"):
            raise ValueError(f"base_url={self.base_url!r}: expected http://HOST:PORT/v1 or https://...")
        self._first_contact()

    @property
    def identity(self) -> dict[str, Any]:
        """Model and server; how often and how patiently it is asked changes no answer."""
        return {"backend": "server", "model": self.model, "base_url": self.base_url}

    def ask(self, questions: Sequence[Question], sampling: Sampling, done: Done) -> list[list[Answer]]:
        """Sends all requests, at most ``concurrency`` at a time; see :class:`Backend`."""
        return _run(self._ask(questions, sampling, done))

    async def _ask(self, questions: Sequence[Question], sampling: Sampling, done: Done) -> list[list[Answer]]:
        gate = asyncio.Semaphore(self.concurrency)
        async with _openai().AsyncOpenAI(**self._client_options(self.max_retries)) as client:

            async def answers(index: int, question: Question) -> list[Answer]:
                given = await asyncio.gather(*(one(question, seed) for seed in question.seeds))
                done(index, given)
                return given

            async def one(question: Question, seed: int) -> Answer:
                async with gate:  # data URLs are made in here: only those under way take memory
                    return await self._request(client, question.messages(), seed, sampling)

            return await asyncio.gather(*(answers(*question) for question in enumerate(questions)))

    async def _request(self, client: Any, messages: list[dict[str, Any]], seed: int, sampling: Sampling) -> Answer:
        extra = {"logprobs": True, "top_logprobs": TOP_LOGPROBS} if sampling.logprobs else {}
        longest = self.timeout * (1 + self.max_retries) + LONGEST_PAUSE * self.max_retries
        try:
            async with asyncio.timeout(longest):  # a server that drips bytes never runs into the client's time-out
                reply = await client.chat.completions.with_raw_response.create(
                    model=self.model,
                    messages=messages,
                    temperature=sampling.temperature,
                    max_tokens=sampling.max_tokens,
                    seed=seed,
                    **extra,
                )
                return read_completion(reply.http_response.text)
        except Exception as error:  # whatever happens to one request, it ends as no vote
            return Answer(error=_describe(error))

    def _first_contact(self) -> None:
        """Raises ValueError unless this server answers for this model."""
        openai = _openai()
        with openai.OpenAI(**self._client_options(max_retries=1)) as client:
            try:
                served = self._served(client)
                if self.model not in served:  # some servers do not list what they serve: ask for one token
                    request = {"model": self.model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
                    reply = client.chat.completions.with_raw_response.create(**request)
                    json.loads(reply.http_response.text)["choices"][0]
            except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
                raise ValueError(
                    f"{self.base_url} demands an API key and refused {'this one' if self._key() else 'none'} "
                    f"({_describe(error)}). Set the environment variable OPENAI_API_KEY, or api_key=."
                ) from error
            except openai.APIConnectionError as error:
                raise ValueError(
                    f"No answer from {self.base_url} ({_describe(error)}). To start a server there:\n"
                    f"  {serve_command(self.model, self.base_url)}"
                ) from error
            except (openai.OpenAIError, ValueError, LookupError, TypeError) as error:
                listed = f"It serves {served}.{nearest(self.model, served)}" if served else "It lists no models."
                hint = "" if self.base_url.rstrip("/").endswith("/v1") else " base_url usually ends in /v1."
                raise ValueError(
                    f"{self.base_url} does not answer for the model {self.model!r} ({_describe(error)}). {listed}{hint}"
                ) from error

    def _served(self, client: Any) -> list[str]:
        """Names of the models that the server lists; none if it does not say."""
        openai = _openai()
        try:
            reply = client.with_options(timeout=CONTACT_SECONDS, max_retries=0).models.with_raw_response.list()
            return [str(model["id"]) for model in json.loads(reply.http_response.text)["data"]]
        except (openai.AuthenticationError, openai.PermissionDeniedError):
            raise
        except (openai.APIStatusError, ValueError, LookupError, TypeError):
            return []

    def _key(self) -> str | None:
        return self.api_key or os.environ.get("OPENAI_API_KEY")

    def _client_options(self, max_retries: int) -> dict[str, Any]:
        timeout = _openai().Timeout(self.timeout, connect=min(self.timeout, CONTACT_SECONDS))
        key = self._key() or "none"  # the client insists on one
        return {"base_url": self.base_url, "api_key": key, "timeout": timeout, "max_retries": max_retries}


def serve_command(model: str, base_url: str) -> str:
    """Returns the shell command that serves ``model`` with vLLM where ``base_url`` points.

    It allows up to 50 pictures, and keeps all frames of a video where vLLM's default would stop at 32.
    """
    port = urlsplit(base_url).port or 8000
    limits = shlex.quote('{"image": 50, "video": 1}')
    frames = shlex.quote('{"video": {"num_frames": -1}}')
    return f"vllm serve {shlex.quote(model)} --port {port} --limit-mm-per-prompt {limits} --media-io-kwargs {frames}"


def read_completion(body: str) -> Answer:
    """Reads the body of a chat completion; one of another form is an answer with ``error`` set."""
    try:
        choice = json.loads(body)["choices"][0]
        text, reason = choice["message"]["content"], choice.get("finish_reason")
        if not isinstance(text, str):
            raise TypeError(f"content is {text!r:.40}")
        probability = success_probability(_tokens(choice.get("logprobs")))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        return Answer(error=f"the reply is no chat completion ({_describe(error)}): {body[:60]!r}")
    if reason not in ("stop", "length"):
        return Answer(error=f"the reply ended with finish_reason {reason!r:.40}")
    return Answer(text, finished=reason == "stop", probability=probability)


def _tokens(logprobs: Any) -> list[tuple[str, dict[str, float]]]:
    """Tokens and alternatives in the "logprobs" of a choice; none if the server sent none."""
    rows = (logprobs or {}).get("content") or []
    return [(row["token"], {row["token"]: row["logprob"]} | {o["token"]: o["logprob"] for o in row["top_logprobs"]})
            for row in rows]  # fmt: skip


def _describe(error: Exception) -> str:
    """One line about an error; the openai client leaves out what a server said and why a connection failed."""
    response = getattr(error, "response", None)
    said = f"{error} {error.__cause__ or ''}" if response is None else f"status {response.status_code}, {response.text}"
    return " ".join(f"{type(error).__name__}: {said}".split()).removesuffix(":")[:200]


def _openai() -> Any:
    try:
        import openai
    except ImportError as error:
        raise MissingExtraError('A judge on a server needs openai: pip install "prophet-gym[vlm]"') from error
    return openai


def _run(work: Coroutine[Any, Any, list[list[Answer]]]) -> list[list[Answer]]:
    """Runs a coroutine to its end, also where an event loop is running already (a notebook, a Ray actor)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(asyncio.run, work).result()
