"""LeRobot's own configuration, factory and evaluation loop on a world; skipped where lerobot is not installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lerobot")

from prophet_gym import MissingCheckpointError  # noqa: E402
from prophet_gym.compat.lerobot import make_env as make_worlds  # noqa: E402
from prophet_gym.lerobot_env.config import ProphetEnvConfig  # noqa: E402
from prophet_gym.registration import ASSETS  # noqa: E402

HUB_FILE = Path(__file__).parents[1] / "examples" / "lerobot_hub" / "env.py"


def config(checkpoint: Path, **options: Any) -> ProphetEnvConfig:
    return ProphetEnvConfig(checkpoint=str(checkpoint), episode_length=4, **options)


def test_the_plugin_registers_and_its_features_are_the_worlds(tiny_checkpoint: Path) -> None:
    from lerobot.configs.parser import load_plugin
    from lerobot.envs.configs import EnvConfig
    from lerobot.envs.utils import env_to_policy_features

    load_plugin("prophet_gym.lerobot_env")
    assert EnvConfig.get_choice_class("prophet") is ProphetEnvConfig
    features = env_to_policy_features(config(tiny_checkpoint))
    shapes = {key: tuple(feature.shape) for key, feature in features.items()}
    assert shapes == {"action": (7,), "observation.state": (8,), "observation.image": (3, 48, 48)}
    assert ProphetEnvConfig(task="Tabletop-v0").features["pixels"].shape == (64, 64, 3)
    for world in ("Prophet-Tabletop-v0", "Prophet-Bridge-v0", "Prophet-Droid-v0"):  # the last two show enlarged frames
        env = make_worlds(1, env_id=world, judge=lambda frames, instruction: True)[world][0]
        shown = env.single_observation_space["pixels"].shape
        env.close()
        assert ProphetEnvConfig(task=world).features["pixels"].shape == shown
    droid = ASSETS / "droid"
    assert ProphetEnvConfig(task="Prophet-Droid-v0", checkpoint=str(droid)).features["pixels"].shape == (64, 64, 3)
    with pytest.raises(ValueError, match="Tabletop-v0 has neither"):
        config(tiny_checkpoint, task="Tabletop-v0")
    with pytest.raises(ValueError, match="Did you mean 'Prophet-Tabletop-v0'"):
        ProphetEnvConfig(task="Prophet-Tabletp-v0")
    with pytest.raises(MissingCheckpointError, match="No weights come with Prophet-AgiBot-v0"):
        ProphetEnvConfig(task="Prophet-AgiBot-v0")


class Still(torch.nn.Module):
    """A policy without weights; it writes down what LeRobot's preprocessing gave it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, Any]] = []

    def reset(self) -> None:
        self.seen.clear()

    def select_action(self, batch: dict[str, Any]) -> torch.Tensor:
        self.seen.append(dict(batch))
        return torch.zeros(len(batch["observation.state"]), 7)


def test_lerobots_factory_and_rollout(tiny_checkpoint: Path) -> None:
    from lerobot.envs.factory import make_env
    from lerobot.envs.utils import close_envs

    evaluation = pytest.importorskip("lerobot.scripts.lerobot_eval")
    envs = make_env(config(tiny_checkpoint), n_envs=2)
    assert list(envs) == ["prophet"]
    policy = Still()

    def unchanged(item: Any) -> Any:
        return item

    ways = [unchanged] * 4
    result = evaluation.rollout(envs["prophet"][0], policy, *ways, seeds=[0, 1], return_observations=True)
    assert result["action"].shape == (2, 4, 7) and result["done"][:, -1].all() and not result["success"].any()
    assert result["observation"]["observation.image"].shape == (2, 5, 3, 48, 48)
    batch = make_worlds(2, checkpoint=str(tiny_checkpoint), horizon=4)["Prophet-Tabletop-v0"][0]
    _, info = batch.reset(seed=[0, 1])
    assert [seen["task"] for seen in policy.seen] == [info["instruction"].tolist()] * 4
    for step in range(1, 4):  # LeRobot's slots, batched or one by one, show what our batch shows
        pixels = batch.step(np.zeros((2, 7)))[0]["pixels"]
        shown = result["observation"]["observation.image"][:, step].permute(0, 2, 3, 1).numpy() * 255
        np.testing.assert_allclose(shown, pixels, atol=2)
    close_envs([*envs.values(), {0: batch}])


def test_envhub_loads_the_example(tiny_checkpoint: Path) -> None:
    from lerobot.envs import utils

    module = utils._import_hub_module(str(HUB_FILE), "owner/world")
    made = utils._call_make_env(module, n_envs=2, use_async_envs=True, cfg=config(tiny_checkpoint))
    env = utils._normalize_hub_result(made)["Prophet-Tabletop-v0"][0]
    observation, _ = env.reset(seed=[0, 1])
    assert env.num_envs == 2 and observation["pixels"].shape == (2, 64, 64, 3)
    observation, *_ = env.step(np.zeros((2, 7), np.float32))
    assert utils.preprocess_observation(observation)["observation.image"].shape == (2, 3, 64, 64)
    utils.close_envs({"hub": {0: env}})
