"""Training on data that do not do, or were recorded anew; the set-up is that of test_training."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_training import config, data, fresh_accelerator, square_episode, vae_folder  # noqa: F401

from prophet_gym.data.cards import CARDS
from prophet_gym.data.folder import write_episode
from prophet_gym.training.clips import ClipSource, fingerprint, load_clips
from prophet_gym.training.config import WorldModelConfig
from prophet_gym.training.loop import LoopConfig
from prophet_gym.training.world_model import train_world_model


def test_bad_data(config: WorldModelConfig, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(ValueError, match="no"):
        train_world_model(replace(config, data=tmp_path / "absent"))
    write_episode(tmp_path / "short" / "episode_0", square_episode(0, steps=12))
    with pytest.raises(ValueError, match="12 commands"):
        train_world_model(replace(config, data=tmp_path / "short", cache=tmp_path / "short cache"))
    (tmp_path / "blind").mkdir()
    blind = replace(square_episode(0), camera=None)
    write_episode(tmp_path / "blind" / "episode_0", blind)
    with pytest.raises(ValueError, match="no camera"):
        train_world_model(replace(config, data=tmp_path / "blind", cache=tmp_path / "blind cache"))
    with pytest.raises(ValueError, match="sideways"):
        replace(config, action_frames="sideways")
    with pytest.raises(ValueError, match="steps=0"):
        LoopConfig(steps=0)


def test_misspelled_weights_are_not_looked_for_on_the_hub(config: WorldModelConfig, tmp_path: Path) -> None:  # noqa: F811
    for wrong in ({"vae": Path("nope")}, {"init": tmp_path / "nope"}):
        with pytest.raises(ValueError, match="nope.*: no config.json, so no saved network"):
            train_world_model(replace(config, **wrong))
    assert not config.run.exists()


def test_learning_rate_trapezoid() -> None:
    loop = LoopConfig(steps=100, warmup_steps=10, decay_fraction=0.2)
    assert loop.learning_rate_factor(0) == pytest.approx(0.1)
    assert loop.learning_rate_factor(50) == 1.0
    assert loop.learning_rate_factor(90) == pytest.approx(0.5)


def test_recorded_anew_data_is_decoded_anew(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_episode(root / "episode_0", square_episode(0))
    first = load_clips(root, tmp_path / "cache").actions.copy()
    write_episode(root / "episode_0", square_episode(7), overwrite=True)
    second = load_clips(root, tmp_path / "cache")
    assert not np.array_equal(first, second.actions)


def test_clips_are_decoded_anew_when_a_packaged_card_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A version may correct a card: its name stays, and the clips of the old one would mean something else."""
    source = ClipSource(card="droid")
    before = fingerprint(tmp_path, source)
    monkeypatch.setitem(CARDS, "droid", replace(CARDS["droid"], control_hz=7.0))
    assert fingerprint(tmp_path, source) != before
