"""``prophet convert``: what changes, what stays, and what is refused."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from prophet_gym.action_frames import Camera
from prophet_gym.actions import ActionSpec
from prophet_gym.cli import main
from prophet_gym.data.episode import Episode
from prophet_gym.data.folder import EpisodeFolder, write_episode
from prophet_gym.data.opening import open_dataset
from prophet_gym.training.adapt_config import AdaptConfig
from prophet_gym.training.adapt_data import split_data
from prophet_gym.world_model.prophet import ProphetWorldModel

NAMES = ("a", "b", "c")


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in NAMES:
        poses = np.tile(np.eye(4), (6, 1, 1, 1))
        episode = Episode(
            images=rng.integers(0, 256, (6, 32, 64, 3), np.uint8),
            actions=rng.uniform(0, 0.01, (5, 7)),
            action_spec=ActionSpec(),
            instruction=f"do {name}",
            fps=5.0,
            camera=Camera(np.array([[40.0, 0, 32], [0, 40, 16], [0, 0, 1]]), np.eye(4), 64, 32),
            eef_pose=poses,
            gripper=np.ones((6, 1)),
            labels={"block_px": np.full((6, 2), 15.5), "height_m": np.arange(6.0)},
        )
        write_episode(tmp_path / "from" / name, episode)
    return tmp_path / "from"


def convert(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["prophet", "convert", *map(str, words)])
    try:
        main()
    except SystemExit as stopped:
        return stopped.code
    return 0


def test_images_calibration_and_labels_in_pixels_are_stretched_together(
    recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not convert(monkeypatch, recorded, tmp_path / "to", "--image-size", "16", "16")
    before, after = EpisodeFolder(recorded)[1], EpisodeFolder(tmp_path / "to")[1]
    assert after.frames.shape == (6, 16, 16, 3) and after.instruction == "do b"
    mean = before.frames.reshape(6, 16, 2, 16, 4, 3).mean(axis=(2, 4))
    assert np.abs(after.frames - mean).max() <= 1
    np.testing.assert_array_equal(after.actions, before.actions)
    assert before.camera is not None and after.camera is not None
    np.testing.assert_allclose(after.camera.K[0, 0], before.camera.K[0, 0] / 4)
    np.testing.assert_allclose(after.camera.K[1, 1], before.camera.K[1, 1] / 2)
    np.testing.assert_allclose(after.labels["block_px"], np.tile([3.5, 7.5], (6, 1)))
    np.testing.assert_array_equal(after.labels["height_m"], np.arange(6.0))


def test_sets_are_gathered_in_one_folder(recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "to"
    assert not convert(monkeypatch, recorded, out, "--leave-out", "1")
    assert not convert(monkeypatch, recorded, out, "--episodes", "1", "0", "1", "--prefix", "again_")
    assert EpisodeFolder(out).names == ("a", "again_a", "again_b", "c")
    assert EpisodeFolder(out)[2].instruction == "do b"


def test_another_rate_is_stated_and_nothing_else_changes(
    recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not convert(monkeypatch, recorded, tmp_path / "to", "--control-hz", "4")
    before, after = EpisodeFolder(recorded)[0], EpisodeFolder(tmp_path / "to")[0]
    assert after.fps == after.action_spec.control_hz == 4.0
    np.testing.assert_array_equal(after.frames, before.frames)
    np.testing.assert_array_equal(after.actions, before.actions)


def test_lerobot(recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not convert(monkeypatch, recorded, tmp_path / "to", "--format", "lerobot")
    written = open_dataset(tmp_path / "to")
    assert len(written) == 3 and written[2].instruction == "do c"


def test_variants_are_other_crops_with_their_calibration(
    recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "to"
    assert not convert(monkeypatch, recorded, out, "--episodes", "0", "--variants", "3", "--image-size", "32", "64")
    episodes = EpisodeFolder(out)
    assert episodes.names == ("a", "a_v01", "a_v02", "a_v03")
    plain, first, second = episodes[0], episodes[1], episodes[2]
    np.testing.assert_array_equal(first.actions, plain.actions)
    assert np.abs(first.frames.astype(int) - second.frames).mean() > 5
    # The label stays on the same thing: where a point of the world is projected to.
    point = np.array([-16.5, -0.5, 40.0])
    for episode in (plain, first, second):
        assert episode.camera is not None and 1 <= episode.camera.K[0, 0] / 40 <= 1 / 0.75 + 0.02
        seen = (episode.camera.K @ point)[:2] / point[2]
        np.testing.assert_allclose(episode.labels["block_px"][0], seen, atol=1e-6)
    again = tmp_path / "again"
    assert not convert(monkeypatch, recorded, again, "--episodes", "0", "--variants", "1", "--image-size", "32", "64")
    np.testing.assert_array_equal(EpisodeFolder(again)[1].frames, first.frames)


def test_a_set_with_variants_has_one_image_size(
    recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--variants", "3", "--mirror")
    assert not convert(monkeypatch, recorded, tmp_path / "to", *words)
    assert not convert(monkeypatch, recorded, tmp_path / "stated", *words, "--image-size", "32", "64")
    plain, stated = EpisodeFolder(tmp_path / "to"), EpisodeFolder(tmp_path / "stated")
    assert len(plain) == 12
    for episode, other in zip(plain, stated, strict=True):
        assert episode.camera is not None and (episode.camera.height, episode.camera.width) == (32, 64)
        np.testing.assert_array_equal(episode.frames, other.frames)
    np.testing.assert_array_equal(plain[0].frames, EpisodeFolder(recorded)[0].frames)


def test_half_of_the_variants_are_mirrored_or_reversed_where_asked(
    recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES:
        episode = EpisodeFolder(recorded)[NAMES.index(name)]
        servo = replace(episode, action_spec=replace(episode.action_spec, delta="servo"))
        write_episode(tmp_path / "servo" / name, servo)
    out = tmp_path / "to"
    words = ("--episodes", "0", "--variants", "12", "--mirror", "--reverse")
    assert not convert(monkeypatch, tmp_path / "servo", out, *words)
    plain, *others = EpisodeFolder(out)
    signs = [tuple(np.sign(episode.actions[0, :2]).astype(int)) for episode in others]
    assert np.sign(plain.actions[0, :2]).tolist() == [1, 1]
    assert {(1, 1), (1, -1), (-1, -1), (-1, 1)} == set(signs), "neither, mirrored, reversed, both"
    assert convert(monkeypatch, recorded, tmp_path / "local", "--variants", "12", "--reverse") == 2


def test_names_with_a_slash_are_found_again(recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not convert(monkeypatch, recorded, tmp_path / "to", "--prefix", "kitchen/", "--variants", "1")
    episodes = EpisodeFolder(tmp_path / "to")
    assert episodes.names == tuple(f"kitchen_{name}{v}" for name in NAMES for v in ("", "_v01"))
    assert episodes[1].metadata == {"variant_of": "kitchen_a"}


def test_adaptation_refuses_to_measure_on_variants_of_what_it_trains_on(
    recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "to"
    assert not convert(monkeypatch, recorded, out, "--variants", "2")
    config = AdaptConfig(data=out, base="tabletop", out=tmp_path / "world")
    with pytest.raises(ValueError, match=r"variants of the same recordings \(c\).*--held-out"):
        split_data(config, (32, 64), 4, 8)
    assert split_data(replace(config, held_out=3), (32, 64), 4, 8).num_training == 6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--episodes", "3"), "numbers from 0 to 2"),
        (("--leave-out", "-1"), "numbers from 0 to 2"),
        (("--leave-out", "0", "1", "2"), "all 3 episodes are left out"),
    ],
)
def test_what_does_not_exist_is_refused(
    recorded: Path,
    tmp_path: Path,
    words: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert convert(monkeypatch, recorded, tmp_path / "to", *words) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "to").exists()


def test_an_episode_is_never_replaced(
    recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not convert(monkeypatch, recorded, tmp_path / "to", "--episodes", "0")
    assert convert(monkeypatch, recorded, tmp_path / "to", "--episodes", "0") == 2
    assert "exists" in capsys.readouterr().err


def test_evaluation_cuts_and_stretches_recordings(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``prophet eval --stride``: two recordings of 12 commands are six windows of 4, at the checkpoint's size."""
    spec = ProphetWorldModel.from_pretrained(tiny_checkpoint).action_spec
    camera = Camera(np.array([[80.0, 0, 47.5], [0, 80, 35.5], [0, 0, 1]]), np.eye(4), 96, 72)
    for i in range(2):
        pose = np.eye(4)
        pose[2, 3] = 1.0
        episode = Episode(
            images=np.random.default_rng(i).integers(0, 256, (13, 72, 96, 3), np.uint8),
            actions=np.tile(np.array([0.01, 0, 0, 0, 0, 0, 1.0]), (12, 1)),
            action_spec=spec,
            instruction="move",
            fps=5.0,
            camera=camera,
            eef_pose=np.tile(pose, (13, 1, 1, 1)),
            gripper=np.ones((13, 1)),
        )
        write_episode(tmp_path / "data" / f"episode_{i}", episode)
    words = ["eval", tmp_path / "data", "--checkpoint", tiny_checkpoint, "--steps", "4", "--stride", "4"]
    monkeypatch.setattr(sys, "argv", ["prophet", *map(str, [*words, "--out", tmp_path / "out"])])
    main()
    protocol = json.loads((tmp_path / "out" / "metrics.json").read_text())["protocol"]
    assert protocol["num_episodes"] == 6 and protocol["image_size"] == [48, 48] and protocol["steps"] == 4
