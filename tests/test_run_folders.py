"""What a run's folder may hold before it starts, what may differ when it resumes, and what its settings may be."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from reach import make_reach, make_reach_policy
from small_policy import make_policy

from prophet_gym.training.loop import LoopConfig, load_checkpoint, prepare_run, settled, train_loop
from prophrl_agents.config import TrainConfig
from prophrl_agents.run_folder import RunFolder
from prophrl_agents.trainer import GRPOTrainer

LOOP = LoopConfig(steps=2, batch_size=1, warmup_steps=1, mixed_precision="no", log_every=1, save_every=1, eval_every=0)


def train(run: Path, resume: bool = False, evaluations: list[int] | None = None) -> None:
    torch.manual_seed(0)
    data = torch.randn(LOOP.steps, 4, 3)

    def evaluate(model: torch.nn.Module, step: int) -> dict[str, float]:
        if evaluations is not None:
            evaluations.append(step)
        return {"score": 0.5}

    prepare_run(run, {"run": str(run), "loop": dataclasses.asdict(LOOP)}, resume)
    train_loop(
        torch.nn.Linear(3, 1),
        lambda net, step: (net(data[step]).square().mean(), {}),
        LOOP,
        run,
        accelerator=Accelerator(cpu=True),
        resume=resume,
        evaluate=evaluate,
        progress=False,
    )


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_of_something_else_is_left_as_it_is(tmp_path: Path, resume: bool) -> None:
    make_policy().save_pretrained(tmp_path / "policy")
    before = {path.name: path.read_bytes() for path in (tmp_path / "policy").iterdir()}
    with pytest.raises(ValueError, match=r"policy.config.json is not the configuration of such a run; give an empty"):
        prepare_run(tmp_path / "policy", {"run": "policy", "data": "episodes"}, resume)
    with pytest.raises(ValueError, match="give an empty folder"):
        RunFolder(tmp_path / "policy").open(TrainConfig(run=tmp_path / "policy", resume=resume))
    assert {path.name: path.read_bytes() for path in (tmp_path / "policy").iterdir()} == before


def test_a_run_that_never_came_to_a_checkpoint_starts_again(tmp_path: Path) -> None:
    """Most such runs failed on their settings, so that these may change."""
    prepare_run(tmp_path, {"run": "here", "data": "absent"}, False)
    prepare_run(tmp_path, {"run": "here", "data": "found"}, False)
    prepare_run(tmp_path, {"run": "here", "data": "found"}, True)
    assert json.loads((tmp_path / "config.json").read_text()) == {"run": "here", "data": "found"}


def test_a_run_resumes_under_any_spelling_of_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"run": "mine", "cache": "mine/cache", "seed": 3}
    prepare_run(tmp_path / "mine", config, False)
    (tmp_path / "mine" / "checkpoints" / "last.pt").touch()
    monkeypatch.chdir(tmp_path)
    prepare_run(Path("./mine"), {**config, "run": str(tmp_path / "mine"), "cache": "elsewhere"}, True)
    with pytest.raises(ValueError, match="already holds a run; give --resume"):
        prepare_run(Path("mine"), config, False)


def test_settings_that_differ_are_named(tmp_path: Path) -> None:
    config = {"run": "mine", "data": Path("a"), "old": 1, "loop": {"steps": 60, "seed": 0}, "options": {}}
    prepare_run(tmp_path, config, False)
    (tmp_path / "checkpoints" / "last.pt").touch()
    other = {"run": "mine", "data": Path("b"), "new": None, "loop": {"steps": 80, "seed": 0}, "options": {}}
    with pytest.raises(ValueError, match="resume with the same settings") as stopped:
        prepare_run(tmp_path, other, True)
    found = 'stored -> given: data: "a" -> "b", old: 1 -> absent, loop.steps: 60 -> 80, new: absent -> null;'
    assert found in str(stopped.value)
    prepare_run(tmp_path, config, True)


@pytest.mark.parametrize(("text", "message"), [("{", "is not valid JSON"), ("[1]", "is not the configuration")])
def test_a_damaged_configuration_is_named(tmp_path: Path, text: str, message: str) -> None:
    prepare_run(tmp_path, {"run": "mine"}, False)
    (tmp_path / "config.json").write_text(text)
    for trained in (False, True):
        with pytest.raises(ValueError, match=f"config.json {message}"):
            prepare_run(tmp_path, {"run": "mine"}, trained)
        (tmp_path / "checkpoints" / "last.pt").touch()
    assert (tmp_path / "config.json").read_text() == text


def test_a_file_is_no_run_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for resume in (False, True):
        with pytest.raises(ValueError, match="file is a file; expected a folder for the run"):
            prepare_run(tmp_path / "file", {}, resume)


@pytest.mark.parametrize("kept", [0, 300, -50])
def test_a_truncated_checkpoint_is_named(tmp_path: Path, kept: int) -> None:
    train(tmp_path)
    path = tmp_path / "checkpoints" / "last.pt"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(
        ValueError, match=r"last.pt is missing or damaged \(.*\); put a whole copy in its place, or start again"
    ):
        train(tmp_path, resume=True)


def test_a_truncated_checkpoint_of_a_reinforcement_is_named(tmp_path: Path) -> None:
    config = TrainConfig(
        run=tmp_path, updates=1, rollouts_per_update=16, mini_batch=16, eval_every=0, videos_every=0, warmup_updates=0
    )
    GRPOTrainer(config, make_reach_policy(), make_reach(4)).train()
    for name in ("last.pt", "best-0.pt"):
        path = tmp_path / "checkpoints" / name
        path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match="last.pt is missing or damaged"):
        GRPOTrainer(dataclasses.replace(config, resume=True), make_reach_policy(), make_reach(4)).train()
    with pytest.raises(ValueError, match=r"best-0.pt is missing or damaged"):
        RunFolder(tmp_path).load_best(0)


def test_a_finished_run_that_resumes_adds_nothing_to_its_log(tmp_path: Path) -> None:
    evaluations: list[int] = []
    train(tmp_path, evaluations=evaluations)
    lines = lines_of(tmp_path)
    train(tmp_path, resume=True, evaluations=evaluations)
    assert evaluations == [2] and lines_of(tmp_path) == lines
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-1]))  # killed in the evaluation
    train(tmp_path, resume=True, evaluations=evaluations)
    assert evaluations == [2, 2] and lines_of(tmp_path) == lines


def test_a_checkpoint_holds_the_seconds_of_all_sessions(tmp_path: Path) -> None:
    train(tmp_path)
    path = tmp_path / "checkpoints" / "last.pt"
    saved = torch.load(path, weights_only=True)
    assert 0 < saved["seconds"] < 60
    torch.save({**saved, "step": 1, "seconds": 1000.0}, path)  # as if interrupted after a long first session
    train(tmp_path, resume=True)
    assert 1000 < load_checkpoint(path)["seconds"] < 1060


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_every": -5}, "eval_every=-5: expected at least 0"),
        ({"warmup_steps": -1}, "warmup_steps=-1: expected at least 0"),
        ({"seed": -1}, "seed=-1: expected at least 0"),
        ({"batch_size": 0}, "batch_size=0: expected at least 1"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0: expected a finite number of at least 0"),
        ({"muon_learning_rate": math.nan}, "muon_learning_rate=nan: expected a finite"),
        ({"weight_decay": math.inf}, "weight_decay=inf: expected a finite"),
        ({"grad_clip": 0.0}, "grad_clip=0.0: expected a norm above 0"),
        ({"ema_decay": 1.5}, "ema_decay=1.5: expected a share from 0 to 1"),
        ({"decay_fraction": math.nan}, "decay_fraction=nan: expected a share"),
    ],
)
def test_settings_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoopConfig(**changes)


@pytest.mark.parametrize(("able", "expected"), [({"avx512_bf16": True}, "bf16"), ({"avx512_bf16": False}, "no")])
def test_automatic_precision_asks_the_processor(monkeypatch, able, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    assert LoopConfig().mixed_precision == "auto"
    found = [settled(LoopConfig(mixed_precision=choice)).mixed_precision for choice in ("auto", "no", "bf16")]
    assert found == [expected, "no", "bf16"]
