"""The vision-language judge with real, tiny models: Qwen2.5-VL in this process, LLaVA behind `transformers serve`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from loopback import BOX, free_port

from prophet_gym.judges import (
    Answer,
    Question,
    Sampling,
    ServerBackend,
    TransformersBackend,
    VLLMBackend,
    VLMConfig,
    VLMJudge,
)
from prophet_gym.judges.pictures import encode_frames

NOISE = np.random.default_rng(0).integers(0, 256, (2, 6, 40, 40, 3), dtype=np.uint8)
MOVIES = [np.full((6, 40, 40, 3), value, np.uint8) for value in (0, 255)] + list(NOISE)
REAL = VLMConfig(num_frames=4, image_size=56, max_tokens=8)


@pytest.fixture(scope="module")
def qwen() -> TransformersBackend:
    from tiny_vlm import qwen as make

    return TransformersBackend(*make(), name="tiny random Qwen2.5-VL")


def test_qwen_in_this_process_votes_and_gives_probabilities(qwen: TransformersBackend) -> None:
    judge = VLMJudge(qwen, REAL)
    verdicts = judge.judge_batch(MOVIES, ["look"] * 4)
    assert all(len(verdict.votes) == 5 and verdict.valid for verdict in verdicts)
    assert len({vote for verdict in verdicts for vote in verdict.votes}) == 2, "sampling always says the same"
    assert judge.judge_batch(MOVIES, ["look"] * 4) == verdicts, "same seeds, other votes"
    likely = VLMJudge(qwen, replace(REAL, method="logprobs")).judge_batch(MOVIES, ["look"] * 4)
    scores = [verdict.score for verdict in likely]
    assert all(0.05 < score < 0.95 for score in scores) and np.ptp(scores) > 1e-3, "the pictures make no difference"
    short = VLMJudge(qwen, replace(REAL, max_tokens=1))(MOVIES[0], "look")
    assert not short.valid and "cut off after 1 tokens" in short.reason
    with pytest.raises(ValueError, match="takes no video"):
        VLMJudge(qwen, replace(REAL, media="video"))


def test_a_question_that_breaks_the_model_costs_only_itself(qwen: TransformersBackend) -> None:
    sampling = Sampling(0.7, 8, logprobs=False)
    sound = Question("look", encode_frames(MOVIES[0][:2], 56, "jpeg"), ("a", "b"), "image/jpeg", False, (1, 2))
    seen = {}
    good, bad = qwen.ask([sound, replace(sound, images=(b"no picture", b""))], sampling, seen.__setitem__)
    assert seen == {0: good, 1: bad}
    assert [answer.error for answer in good] == ["", ""] and all("UnidentifiedImageError" in a.error for a in bad)
    assert all(isinstance(answer, Answer) and answer.text in BOX.values() for answer in good)


def test_transformers_models_that_cannot_be_loaded_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No vision-language model"):
        TransformersBackend.from_pretrained(str(tmp_path / "nothing"))


def test_cached_answers_know_weights_precision_and_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else another model trained into the same folder would be given the answers of the first."""
    from tiny_vlm import write_llava

    write_llava(tmp_path / "llava")
    model = str(tmp_path / "llava")
    first, again, half = (TransformersBackend.from_pretrained(model, dtype=d) for d in ("auto", "auto", "bfloat16"))
    assert first.identity == again.identity != half.identity
    weights = tmp_path / "llava" / "model.safetensors"
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))
    assert TransformersBackend.from_pretrained(model).identity != first.identity
    vllm = SimpleNamespace(LLM=lambda **settings: None, SamplingParams=dict)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    assert VLLMBackend("org/model").identity == {"backend": "vllm", "model": "org/model"}
    engines = [
        VLLMBackend(model, **settings).identity for settings in ({}, {"dtype": "half"}, {"dtype": torch.float32})
    ]
    assert len({json.dumps(identity) for identity in engines}) == 3
    os.utime(weights, ns=(0, 5))
    assert VLLMBackend(model).identity != engines[0]


@pytest.mark.programs
def test_transformers_serve_answers_with_a_real_model(tmp_path: Path) -> None:
    """Somebody else's server, which lists no folders, knows no logprobs and refuses unknown fields."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    from tiny_vlm import write_llava

    write_llava(tmp_path / "llava")
    port, model = free_port(), str(tmp_path / "llava")
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", model, "--device", "cpu"]
    quiet = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen([*command, "--port", str(port)], stdout=log, stderr=log, env=os.environ | quiet)
    try:
        wait_until_healthy(f"http://localhost:{port}/health", process, tmp_path / "log")
        judge = VLMJudge(ServerBackend(model, f"http://localhost:{port}/v1"), replace(REAL, image_size=32))
        verdicts = judge.judge_batch(MOVIES, ["look"] * 4)
        assert all(verdict.valid and len(verdict.votes) == 5 for verdict in verdicts), verdicts
        with pytest.raises(ValueError, match="Server is pinned to"):
            ServerBackend("another", f"http://localhost:{port}/v1")
    finally:
        process.kill()
        process.wait()
    here = VLMJudge(TransformersBackend.from_pretrained(model), replace(REAL, image_size=32))
    assert all(verdict.valid for verdict in here.judge_batch(MOVIES, ["look"] * 4))


def wait_until_healthy(url: str, process: subprocess.Popen, log: Path) -> None:
    for _ in range(600):
        assert process.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(url).close()
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(log.read_text())
