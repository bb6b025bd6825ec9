"""Bad input to judges: what is refused, when, and in which words. What a model answers badly: test_vlm_judge.py."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from loopback import free_port, start, stats

from prophet_gym.cli import main
from prophet_gym.judges import ServerBackend, VLMConfig, VLMJudge, open_judge
from prophet_gym.judges.prompting import load_prompt
from prophet_gym.registration import ASSETS

PACKAGED = ASSETS / "tabletop" / "judge"
SMALL = VLMConfig(num_frames=3, image_size=32)


def rollout(bright: bool, length: int = 5) -> np.ndarray:
    return np.full((length, 24, 24, 3), 220 if bright else 30, np.uint8)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with start("scripted", models=["tiny"]) as url:
        yield url


@pytest.fixture(scope="module")
def backend(server: str) -> ServerBackend:
    return ServerBackend("tiny", server, timeout=5, max_retries=0)


@pytest.mark.parametrize(
    ("frames", "instruction", "message"),
    [
        (rollout(True)[..., :1], "look", "RGB frames .*drop alpha"),
        (rollout(True).astype(np.float32), "look", "uint8 numpy array .*float32"),
        (rollout(True)[:1], "look", "at least 2 frames .*T = 1"),
        (rollout(True), " ", "non-empty instruction"),
    ],
)
def test_bad_rollouts_are_refused_before_anything_is_asked(
    server: str, backend: ServerBackend, frames: np.ndarray, instruction: str, message: str
) -> None:
    before, judge = stats(server)["requests"], VLMJudge(backend, SMALL)
    with pytest.raises(ValueError, match=message):
        judge(frames, instruction)
    with pytest.raises(ValueError, match="Rollout 1: .*" + message):
        judge.judge_batch([rollout(True), frames], ["look", instruction])
    assert stats(server)["requests"] == before


def test_a_command_whose_server_is_unreachable_says_so_before_it_reads_any_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url, path = f"http://127.0.0.1:{free_port()}/v1", tmp_path / "judge.json"
    path.write_text(json.dumps({"backend": {"model": "tiny", "base_url": url}}))
    for verb in ("eval", "calibrate"):
        monkeypatch.setattr(sys, "argv", ["prophet", "judge", verb, str(tmp_path / "no-data"), "--judge", str(path)])
        began = time.monotonic()
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 2 and time.monotonic() - began < 8
        said = capsys.readouterr().err
        assert f"prophet: No answer from {url}" in said and f"vllm serve tiny --port {url[17:-3]}" in said


def test_files_that_open_no_judge_say_what_to_give_instead(tmp_path: Path) -> None:
    path, fields = tmp_path / "judge.json", {"backend": {"model": "tiny", "base_url": "http://none"}}
    path.write_text(json.dumps(fields | {"prompt": "libreo"}))
    with pytest.raises(ValueError, match="Unknown prompt 'libreo'"):  # and not: no answer from http://none
        open_judge(path)
    with pytest.raises(ValueError, match=r"holds no judge.safetensors.*give its file: .*judge\.json"):
        open_judge(tmp_path)
    with pytest.raises(ValueError, match="A classifier is opened by its folder"):
        open_judge(PACKAGED / "judge.json")


def test_a_prompt_beside_the_file_travels_with_it(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "own.txt").write_text(load_prompt("general") + "\nLook twice.")
    fields = {"num_frames": 2, "prompt": "own.txt", "backend": {"model": "tiny", "base_url": server}}
    (tmp_path / "mine" / "judge.json").write_text(json.dumps(fields))
    monkeypatch.chdir(tmp_path)
    open_judge("mine/judge.json")(rollout(True), "look")
    assert "Look twice." in stats(server)["bodies"][-1]["messages"][0]["content"][0]["text"]
