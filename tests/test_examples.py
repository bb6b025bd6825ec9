"""Every example runs to its end at the smallest size, on a checkpoint with other images, snapshots and no judge."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from small_policy import make_policy

EXAMPLES = Path(__file__).parents[1] / "examples"
RUNS = {
    "step_world": (["--horizon", "8"], "not judged"),
    "batched_rollouts": (["--num-envs", "2", "--horizon", "8", "--steps", "3"], "frames/s"),
    "best_of_n": (["--members", "3", "--horizon", "16"], "0 of 3 plans judged"),
    "write_a_judge": (["--horizon", "8", "--rollouts", "1"], "check_judge: passed"),
    "sb3_ppo": (["--total-timesteps", "8", "--n-envs", "2", "--n-steps", "4", "--horizon", "8"], "verdict"),
    "cleanrl_ppo": (
        ["--total-timesteps", "24", "--num-envs", "3", "--num-steps", "4"],
        "global_step=24 episodic_return=",
    ),
    "eval_simpler": (["--episodes", "1", "--horizon", "8"], "success rate 0.00 of 1"),
    "eval_maniskill": (["--episodes", "2", "--horizon", "8"], "success rate 0.00 of 2"),
    "eval_libero": (["--episodes", "1", "--max-steps", "8"], "success rate 0.00 of 1"),
    "eval_lerobot": (["--num-envs", "2", "--horizon", "8"], "success rate 0.00 of 2"),
    "twin": (["--horizon", "9"], "PSNR"),
    "fa_grpo_single_file": (
        ["--updates", "1", "--groups", "2", "--group-size", "2", "--mini-batch", "4", "--horizon", "8"],
        "groups_with_contrast",
    ),
    "your_simulator": (["--updates", "1", "--rollouts", "16", "--commands", "12", "--starts", "4"], "commands upright"),
}
OTHER_SIMULATOR = "your_simulator"  # needs no checkpoint


def run(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.render) if n == "twin" else n for n in RUNS])
def test_example_runs(
    name: str,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments, shown = RUNS[name]
    checkpoint = tiny_checkpoint
    if name == "twin":  # the simulator's images have 64x64 pixels
        checkpoint = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
        config = json.loads((checkpoint / "prophet.json").read_text())
        (checkpoint / "prophet.json").write_text(json.dumps({**config, "image_size": [64, 64]}))
    if name == "fa_grpo_single_file":
        make_policy(image_size=48).save_pretrained(tmp_path / "policy")
        arguments = ["--policy", str(tmp_path / "policy"), *arguments]
    monkeypatch.chdir(tmp_path)  # results go to runs/examples, relative to where the script is run
    if name != OTHER_SIMULATOR:
        arguments = ["--checkpoint", str(checkpoint), *arguments]
    assert shown in run(name, arguments, monkeypatch, capsys)
    written = [path.suffix for path in tmp_path.glob("runs/examples/*")]
    expected = {"step_world": [".mp4"], "twin": [".png"], "fa_grpo_single_file": [""], OTHER_SIMULATOR: [""]}
    assert written == expected.get(name, [])


@pytest.mark.parametrize("name", RUNS)
def test_example_explains_itself(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(name, ["--help"], monkeypatch, capsys)
    assert not stopped.value.code
    shown = capsys.readouterr().out
    assert (name == OTHER_SIMULATOR or "--checkpoint" in shown) and f"python examples/{name}.py" in shown


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(RUNS)


def test_a_colour_judge_decides(capsys: pytest.CaptureFixture[str]) -> None:
    import numpy as np

    judge = runpy.run_path(str(EXAMPLES / "write_a_judge.py"))["block_on_plate"]
    frames = np.full((2, 64, 64, 3), 170, np.uint8)
    frames[:, 20:34, 30:44] = (45, 85, 215)
    apart, together = frames.copy(), frames.copy()
    apart[-1, 50:56, 4:10] = together[-1, 24:30, 34:40] = (210, 35, 30)
    ask = "put the red block on the blue plate"
    assert judge(apart, ask).success is False and judge(together, ask).success is True
    assert not judge(frames, ask).valid and not judge(together, "push the red block to the left edge").valid
