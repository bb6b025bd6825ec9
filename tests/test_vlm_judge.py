"""The vision-language judge against real servers on loopback: votes, first contact, faults on the wire, cache."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from loopback import BOX, FAULTS, free_port, start, stats
from PIL import Image

from prophet_gym import check_judge
from prophet_gym.errors import MissingExtraError
from prophet_gym.judges import (
    Judge,
    ServerBackend,
    VLLMBackend,
    VLMConfig,
    VLMJudge,
    open_judge,
)
from prophet_gym.judges.backends import Answer
from prophet_gym.judges.prompting import load_prompt

YES, NO = BOX[True], BOX[False]
SMALL = VLMConfig(num_frames=3, image_size=32)
SCRIPTS: dict[str, list[Any]] = {
    "three-two": [YES, NO, YES, NO, YES],
    "two-three": [NO, NO, YES, YES, NO],
    "two-readable": [YES, "no idea", YES, "", NO + YES],
    "tie": [YES, NO, "\\box{Maybe}", YES, NO],
    "cut-off": [{"message": {"content": YES}, "finish_reason": "length"}],
    "filtered": [{"message": {"content": YES}, "finish_reason": "content_filter"}],
    "null": [{"message": {"content": None}}],
    "doomed": [500],
    "refused": [400],
    "likely": [
        {
            "message": {"content": YES},
            "logprobs": {
                "content": [
                    {"token": "\\box", "logprob": -0.1, "top_logprobs": []},
                    {"token": "{S", "logprob": -0.2, "top_logprobs": [{"token": "{F", "logprob": -1.8}]},
                    {"token": "uccess}", "logprob": 0.0, "top_logprobs": []},
                ]
            },
        }
    ],
}


def rollout(bright: bool, length: int = 5, size: int = 24, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(0, 60, (length, size, size, 3))
    return (noise + (190 if bright else 0)).astype(np.uint8)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with start("scripted", models=["tiny", "other"], answers=SCRIPTS) as url:
        yield url


@pytest.fixture(scope="module")
def backend(server: str) -> ServerBackend:
    return ServerBackend("tiny", server, timeout=5, max_retries=0)


# --- what is shown and asked ---


def test_the_server_gets_prompt_labels_and_pictures(server: str, backend: ServerBackend) -> None:
    VLMJudge(backend, SMALL)(rollout(True, length=9), "put carrot on plate")
    body = stats(server)["bodies"][-1]
    text, *parts = body["messages"][0]["content"]
    assert 'told: "put carrot on plate"' in text["text"] and "{instruction}" not in text["text"]
    assert [part["text"] for part in parts[::2]] == ["Frame 0:", "Frame 4:", "Frame 8:"]
    head, data = parts[1]["image_url"]["url"].split(",")
    assert head == "data:image/jpeg;base64" and Image.open(io.BytesIO(base64.b64decode(data))).size == (32, 32)
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("tiny", 0.7, 1024) and "logprobs" not in body
    VLMJudge(backend, replace(SMALL, media="video"))(rollout(True, length=9), "put carrot on plate")
    bodies = stats(server)["bodies"]
    (video,) = bodies[-1]["messages"][0]["content"][1:]
    head, *frames = video["video_url"]["url"].split(",")
    assert head == "data:video/jpeg;base64" and len(frames) == 3 and frames[0].startswith("/9j/")
    assert len({body["seed"] for body in bodies}) == 3, "votes with one seed would all be the same vote"


# --- votes ---


def test_the_majority_of_readable_votes_decides(backend: ServerBackend) -> None:
    judge = VLMJudge(backend, SMALL)
    won, lost = judge.judge_batch([rollout(True)] * 2, ["three-two", "two-three"])
    assert (won.success, won.score, sum(won.votes), len(won.votes)) == (True, 0.6, 3, 5)
    assert (lost.success, lost.score) == (False, 0.4) and "2 of 5 votes for success" in lost.reason
    few = judge(rollout(True), "two-readable")
    assert not few.valid and few.votes == (True, True) and few.score == 1.0
    assert all(why in few.reason for why in ("no \\box", "an empty answer", "contradict", "3 readable votes"))
    tie = judge(rollout(True), "tie")
    assert not tie.valid and tie.score == 0.5 and "margin of 0.00" in tie.reason and "'Maybe'" in tie.reason
    careful = VLMJudge(backend, replace(SMALL, min_margin=0.5))(rollout(True), "three-two")
    assert not careful.valid and "margin of 0.20" in careful.reason
    assert VLMJudge(backend, replace(SMALL, min_votes=2))(rollout(True), "two-readable").success is True


@pytest.mark.parametrize(
    ("instruction", "why"),
    [
        ("cut-off", "cut off after 1024 tokens"),
        ("filtered", "finish_reason 'content_filter'"),
        ("null", "content is None"),
        ("doomed", "InternalServerError"),
        ("refused", "BadRequestError.*as scripted"),
    ],
)
def test_a_failed_answer_is_no_vote(backend: ServerBackend, instruction: str, why: str) -> None:
    verdicts = VLMJudge(backend, SMALL).judge_batch([rollout(True), rollout(False)], [instruction, "look"])
    assert not verdicts[0].valid and verdicts[0].votes == () and math.isnan(verdicts[0].score)
    assert verdicts[1].success is False, "a failure cost another rollout its verdict"
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(verdicts[0].reason)


def test_log_probabilities_replace_votes(server: str, backend: ServerBackend) -> None:
    judge = VLMJudge(backend, replace(SMALL, method="logprobs"))
    verdict = judge(rollout(False), "likely")
    expected = math.exp(-0.2) / (math.exp(-0.2) + math.exp(-1.8))
    assert verdict.success is True and verdict.score == pytest.approx(expected)
    body = stats(server)["bodies"][-1]
    assert (body["temperature"], body["logprobs"], body["top_logprobs"]) == (0, True, 20)
    without = judge(rollout(True), "look")
    assert not without.valid and "does the server send logprobs?" in without.reason
    careful = VLMJudge(backend, replace(SMALL, method="logprobs", min_margin=0.9))(rollout(True), "likely")
    assert not careful.valid and careful.score == pytest.approx(expected)


def test_it_keeps_the_contract_of_a_judge(backend: ServerBackend) -> None:
    judge = VLMJudge(backend, VLMConfig(num_frames=2, image_size=16, votes=1, min_votes=1))
    assert isinstance(judge, Judge)
    check_judge(judge)


def test_an_unknown_prompt_is_refused_when_the_judge_is_made(backend: ServerBackend) -> None:
    with pytest.raises(ValueError, match="Unknown prompt 'libreo'"):
        VLMJudge(backend, VLMConfig(prompt="libreo"))


# --- first contact ---


def test_an_unreachable_server_fails_at_once_with_the_command_that_starts_one() -> None:
    url, began = f"http://127.0.0.1:{free_port()}/v1", time.monotonic()
    command = rf"vllm serve Qwen/Qwen2\.5-VL-7B-Instruct --port {url[17:-3]} --limit-mm-per-prompt '.\"image\": 50"
    with pytest.raises(ValueError, match=rf"(?s)No answer from {url}.*{command}"):
        ServerBackend("Qwen/Qwen2.5-VL-7B-Instruct", url)
    assert time.monotonic() - began < 4


def test_a_server_that_accepts_and_stays_silent_fails_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prophet_gym.judges.backends.CONTACT_SECONDS", 1.0)
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        began = time.monotonic()
        with pytest.raises(ValueError, match="(?s)No answer.*APITimeoutError.*vllm serve"):
            ServerBackend("tiny", f"http://127.0.0.1:{deaf.getsockname()[1]}/v1")
    assert time.monotonic() - began < 4


def test_an_unknown_model_is_refused_with_those_that_are_served(server: str) -> None:
    with pytest.raises(ValueError, match=r"(?s)'tinny'.*It serves \['tiny', 'other'\]. Did you mean 'tiny'"):
        ServerBackend("tinny", server)
    with pytest.raises(ValueError, match="usually ends in /v1"):
        ServerBackend("tiny", server.removesuffix("/v1"))
    with pytest.raises(ValueError, match="expected http://HOST:PORT/v1"):
        ServerBackend("tiny", server.removeprefix("http://"))


def test_a_server_that_lists_nothing_is_asked_for_a_token() -> None:
    with start("scripted", models=["tiny"], listing=False) as url:
        assert VLMJudge(ServerBackend("tiny", url), SMALL)(rollout(True), "look").success is True
        with pytest.raises(ValueError, match="It lists no models"):
            ServerBackend("other", url)


def test_a_missing_or_wrong_key_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with start("scripted", models=["tiny"], key="secret") as url:
        with pytest.raises(ValueError, match="demands an API key and refused none.*OPENAI_API_KEY"):
            ServerBackend("tiny", url)
        with pytest.raises(ValueError, match="refused this one"):
            ServerBackend("tiny", url, api_key="wrong")
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        judge = VLMJudge(ServerBackend("tiny", url), SMALL)
        assert judge(rollout(True), "look").success is True and "secret" not in repr(judge.backend)


def test_packages_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("openai", "vllm"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=r"pip install \"prophet-gym\[vlm\]\""):
        ServerBackend("tiny")
    with pytest.raises(MissingExtraError, match=r"pip install \"prophet-gym\[vllm\]\""):
        VLLMBackend("tiny")


# --- faults ---


def test_a_hundred_rollouts_survive_a_tenth_of_faults() -> None:
    truth = [bool(index % 3) for index in range(100)]
    frames = [rollout(bright, seed=index) for index, bright in enumerate(truth)]
    instructions = ["doomed" if index % 10 == 9 else "look" for index in range(100)]
    with ExitStack() as stack:
        upstream = stack.enter_context(start("scripted", models=["tiny"], answers=SCRIPTS, delay=0.01))
        url = stack.enter_context(start("proxy", upstream=upstream, every=10, faults=FAULTS, seconds=3))
        backend = ServerBackend("tiny", url, concurrency=16, timeout=2, max_retries=1)
        verdicts = VLMJudge(backend, SMALL).judge_batch(frames, instructions)
        faults, seen = stats(url)["faults"], stats(upstream)
    assert len(verdicts) == 100 and set(FAULTS) <= set(faults) and sum(faults.values()) - faults["none"] >= 50
    assert 4 <= seen["most_at_once"] <= 16 + 8, (
        "concurrency is not what was asked for"
    )  # a slow one may overlap its retry
    for verdict, bright, instruction in zip(verdicts, truth, instructions, strict=True):
        assert all(vote is bright for vote in verdict.votes), "a vote that the model did not give"
        assert verdict.valid != (instruction == "doomed"), verdict
        assert verdict.success is (bright if verdict.valid else None) and verdict.reason


def test_a_server_that_dies_ends_in_abstentions() -> None:
    with start("scripted", models=["tiny"]) as url:
        judge = VLMJudge(ServerBackend("tiny", url, max_retries=0), SMALL)
        assert judge(rollout(True), "look").success is True
    verdicts = judge.judge_batch([rollout(True)] * 3, ["look"] * 3)
    assert all(not verdict.valid and "APIConnectionError" in verdict.reason for verdict in verdicts)


def test_an_answer_that_only_drips_is_given_up() -> None:
    with start("scripted", models=["tiny"], drip=0.05) as url:
        judge = VLMJudge(ServerBackend("tiny", url, timeout=1, max_retries=0), SMALL)
        began = time.monotonic()
        verdict = judge(rollout(True), "look")
    assert not verdict.valid and "unread: TimeoutError" in verdict.reason and time.monotonic() - began < 4


def test_it_works_inside_a_running_event_loop(backend: ServerBackend) -> None:
    async def notebook() -> bool | None:
        return VLMJudge(backend, SMALL)(rollout(True), "look").success

    assert asyncio.run(notebook()) is True


# --- cache ---


def test_answers_are_kept_and_errors_are_not(server: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    backend = ServerBackend("tiny", server, timeout=5, max_retries=0)
    config = replace(SMALL, cache=str(tmp_path))
    batch = [rollout(True), rollout(True), rollout(False)], ["three-two", "doomed", "look"]

    def asked(config: VLMConfig, backend: ServerBackend = backend) -> tuple[int, list[Any]]:
        before = stats(server)["requests"]
        verdicts = VLMJudge(backend, config).judge_batch(*batch)
        return stats(server)["requests"] - before, verdicts

    count, first = asked(config)
    files = list(tmp_path.rglob("*.json"))
    assert count == 15 and len(files) == 2 and not list(tmp_path.rglob(".*"))
    again, second = asked(config)
    assert again == 5, "only the rollout that failed is asked about again"
    assert second[::2] == first[::2] and not second[1].valid
    assert asked(replace(config, min_margin=0.5))[0] == 5, "how votes are counted changes no answer"
    for change in ({"temperature": 0.5}, {"seed": 1}, {"prompt": "libero"}, {"num_frames": 2}, {"image_format": "png"}):
        assert asked(replace(config, **change))[0] == 15, change
    assert asked(config, ServerBackend("other", server, timeout=5, max_retries=0))[0] == 15
    for file, content in zip(
        files, ("{", '{"answers": [{"text": 5, "finished": true, "probability": null}]}'), strict=True
    ):
        json.loads(file.read_text(), parse_constant=pytest.fail)
        file.write_text(content)
    assert asked(config)[0] == 15 and "cannot be read and are asked for again" in caplog.text


def test_answers_before_an_interruption_are_kept(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = ServerBackend("tiny", server, timeout=5, max_retries=0, concurrency=1)
    judge = VLMJudge(backend, replace(SMALL, cache=str(tmp_path)))
    batch = [rollout(True), rollout(False), rollout(True, seed=1)], ["look"] * 3
    request, asked = ServerBackend._request, []

    async def interrupted(*arguments: Any) -> Any:
        asked.append(arguments)
        if len(asked) > 8:
            signal.raise_signal(signal.SIGINT)
            await asyncio.sleep(5)
            pytest.fail("Ctrl-C was not heard")
        return await request(*arguments)

    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job is started without one
    try:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(ServerBackend, "_request", interrupted)
            judge.judge_batch(*batch)
    finally:
        signal.signal(signal.SIGINT, ignored)
    assert len(list(tmp_path.rglob("*.json"))) == 1, "five answers of eight complete a question"
    before = stats(server)["requests"]
    assert [verdict.success for verdict in judge.judge_batch(*batch)] == [True, False, True]
    assert stats(server)["requests"] - before == 10


def test_a_backend_that_does_not_say_what_it_has_is_cached_too(tmp_path: Path) -> None:
    class Silent:
        takes_video, identity, asked = False, {"backend": "silent"}, 0

        def ask(self, questions: list[Any], sampling: Any, done: Any) -> list[list[Answer]]:
            self.asked += len(questions)
            return [[Answer(YES)] * len(question.seeds) for question in questions]

    judge = VLMJudge(Silent(), replace(SMALL, cache=str(tmp_path)))
    assert judge(rollout(True), "look") == judge(rollout(True), "look") and judge.backend.asked == 1


def test_a_cache_serves_other_people_and_leaves_nothing_half_written(
    backend: ServerBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(SMALL, cache=str(tmp_path / "answers"))
    VLMJudge(backend, config)(rollout(True), "look")
    (kept,) = (tmp_path / "answers").rglob("*.json")
    (plain := tmp_path / "plain").touch()
    assert kept.stat().st_mode == plain.stat().st_mode, "readable by whom the umask allows"
    kept.unlink()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("prophet_gym.judges.answer_cache.os.replace", full)
        assert VLMJudge(backend, config)(rollout(True), "look").success is True, "the verdict was paid for"
    assert "No space left" in caplog.text and not [p for p in (tmp_path / "answers").rglob("*") if p.is_file()]
    with pytest.raises(ValueError, match="cache=.*plain' is no folder"):
        VLMJudge(backend, replace(SMALL, cache=str(plain)))


# --- how a user picks it ---


def test_a_path_opens_a_judge(server: str, tmp_path: Path) -> None:
    path = tmp_path / "judge.json"
    fields = {"prompt": "libero", "num_frames": 50, "backend": {"model": "tiny", "base_url": server}}
    path.write_text(json.dumps(fields))
    judge = open_judge(path)
    assert isinstance(judge, VLMJudge) and judge.config == VLMConfig(prompt="libero", num_frames=50)
    assert judge.backend.model == "tiny"
    for change, message in (
        ({"num_frame": 5}, "unknown field 'num_frame'.*Did you mean 'num_frames'"),
        ({"backend": "tiny"}, 'expected an object with "backend"'),
        ({"backend": {"kind": "sever"}}, "backend kind 'sever'.*Did you mean 'server'"),
        ({"backend": {"model": "tiny", "url": server}}, "does not take.*unexpected keyword argument 'url'"),
        ({"backend": {"model": "tiny", "api_key": "secret"}}, "OPENAI_API_KEY"),
        ({"votes": "five"}, "votes='five'"),
    ):
        path.write_text(json.dumps(fields | change))
        with pytest.raises(ValueError, match=message):
            open_judge(path)
    with pytest.raises(ValueError, match="not the JSON file of a judge"):
        open_judge(tmp_path / "none.json")


def test_an_environment_takes_it_and_masks_what_it_abstains_on(
    server: str, backend: ServerBackend, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    path = tmp_path / "judge.json"
    own = tmp_path / "own.txt"
    own.write_text(load_prompt("general") + "\ntwo-readable")
    fields = {"num_frames": 3, "image_size": 32, "backend": {"model": "tiny", "base_url": server}}
    path.write_text(json.dumps(fields | {"prompt": str(own)}))
    for judge, valid in ((VLMJudge(backend, SMALL), True), (path, False)):
        options = {"checkpoint": tiny_checkpoint, "judge": judge, "chunk_length": 4, "horizon": 4}
        env = gym.make("prophet_gym:Prophet-Tabletop-v0", **options)
        env.reset(seed=0)
        _, reward, terminated, truncated, info = env.step(env.action_space.sample() * 0)
        assert info["judge_valid"] is valid and truncated and reward == float(terminated)
        assert (
            info["verdict"]["valid"] is valid if isinstance(info["verdict"], dict) else info["verdict"].valid is valid
        )
        env.close()
