"""The table of reinforcement keeps finished runs, and only those that were made with the settings asked for."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.reinforcement import Config, Run, play, training
from prophrl_agents.run_folder import RunFolder


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"updates": 9}, "updates: 8 -> 9"), ({"ema_decay": 0.0}, "ema_decay: 0.9 -> 0.0"), ({}, None)],
    ids=["updates", "ema_decay", "same"],
)
def test_a_finished_run_of_other_settings_is_not_taken_for_this_one(
    tmp_path: Path, changes: dict, message: str
) -> None:
    config, run = Config(policy=Path("tabletop-sft"), out=tmp_path, updates=8, starts=4), Run("flowscale", "E-v0", 8, 0)
    made = RunFolder(tmp_path / run.name)
    made.open(training(config, run))
    made.close()
    for name in ("checkpoints/last.pt", "policy/config.json"):
        (made.path / name).parent.mkdir(exist_ok=True)
        (made.path / name).touch()
    np.save(tmp_path / "before.npy", np.array([0, 0, 0, 1], bool))
    np.save(made.path / "success.npy", np.array([0, 1, 1, 1], bool))
    if message is None:
        assert play(config, run).difference == 50
        return
    with pytest.raises(ValueError, match=message):
        play(replace(config, **changes), run)
