"""Stable-Baselines3 and CleanRL loops on the batched engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3 import PPO

from prophet_gym.compat.sb3 import ProphetVecEnv, make_vec_env

ID = "Prophet-Tabletop-v0"


def long_enough(frames: np.ndarray, instruction: str) -> bool:
    return "2" in instruction or len(frames) > 9


def kwargs(tiny_checkpoint: Path, **options: Any) -> dict[str, Any]:
    return {"checkpoint": str(tiny_checkpoint), "judge": long_enough, "horizon": 8, "chunk_length": 4, **options}


def test_infos_tell_how_rollouts_end(tiny_checkpoint: Path) -> None:
    env = make_vec_env(ID, n_envs=3, seed=0, env_kwargs=kwargs(tiny_checkpoint))
    images = env.reset()
    assert images.shape == (3, 48, 48, 3) and images.dtype == np.uint8
    native = gym.make_vec(ID, num_envs=3, interface="flat", autoreset_mode="SameStep", **kwargs(tiny_checkpoint))
    expected, _ = native.reset(seed=0)
    np.testing.assert_array_equal(images, expected)
    action = np.linspace(-1, 1, 3 * 28).reshape(3, 28).astype(np.float32)
    images, reward, done, infos = env.step(action)
    expected, *_ = native.step(action)
    np.testing.assert_array_equal(images, expected)
    assert not done.any() and all("terminal_observation" not in info for info in infos)
    images, reward, done, infos = env.step(action)
    expected, *_, known = native.step(action)
    np.testing.assert_array_equal(images, expected)
    assert done.all()
    for i, info in enumerate(infos):
        success = long_enough(np.zeros(9), info["instruction"])
        assert info["is_success"] is success and reward[i] == float(success)
        assert info["TimeLimit.truncated"] is not success and info["episode"]["l"] == 2
        np.testing.assert_array_equal(info["terminal_observation"], known["final_obs"][i])
        assert not np.array_equal(info["terminal_observation"], images[i])
    assert {info["is_success"] for info in infos} <= {True, False}


def test_seeds_repeat_and_attributes_are_the_engines(tiny_checkpoint: Path) -> None:
    env = make_vec_env(ID, n_envs=2, env_kwargs=kwargs(tiny_checkpoint))
    runs = []
    for _ in range(2):
        env.seed(3)
        env.reset()
        runs.append(env.step(np.zeros((2, 28), np.float32))[0])
    np.testing.assert_array_equal(*runs)
    assert env.get_attr("horizon") == [8, 8] and env.env_is_wrapped(gym.Wrapper) == [False, False]
    with pytest.raises(ValueError, match="share one engine"):
        env.env_method("reset")
    with pytest.raises(ValueError, match="expected what gym.make_vec"):
        ProphetVecEnv(gym.make_vec(ID, num_envs=2, interface="flat", **kwargs(tiny_checkpoint)))


def test_ppo_learns_on_the_batched_engine(tiny_checkpoint: Path) -> None:
    """Success is a bright end, which the random weights of the tiny world tie to the commands."""
    options = kwargs(tiny_checkpoint, judge=lambda frames, _: bool(frames[-1, ..., 0].mean() > 142.5), horizon=4)
    env = make_vec_env(ID, 16, 0, env_kwargs=options)
    small = {"net_arch": [32], "features_extractor_kwargs": {"features_dim": 32}}
    rates = {"n_steps": 16, "batch_size": 64, "n_epochs": 4, "learning_rate": 1e-3, "gamma": 0.0, "gae_lambda": 0.0}
    model = PPO("CnnPolicy", env, seed=0, device="cpu", policy_kwargs=small, **rates)
    returns = []
    for update in range(4):
        model.ep_info_buffer = None
        model.learn(16 * 16, reset_num_timesteps=update == 0)
        returns.append(np.mean([episode["r"] for episode in model.ep_info_buffer]))
    assert returns[-1] > returns[0] + 0.15, returns


def test_cleanrl_style_loop(tiny_checkpoint: Path) -> None:
    envs = gym.make_vec(ID, num_envs=2, interface="flat", autoreset_mode="SameStep", **kwargs(tiny_checkpoint))
    assert isinstance(envs.single_action_space, gym.spaces.Box)
    next_obs, _ = envs.reset(seed=1)
    returns = []
    for _ in range(4):
        action = np.stack([envs.single_action_space.sample() for _ in range(envs.num_envs)])
        next_obs, reward, terminations, truncations, infos = envs.step(action)
        next_done = np.logical_or(terminations, truncations)
        real_next_obs = next_obs.copy()
        for idx, done in enumerate(next_done):
            if done:
                real_next_obs[idx] = infos["final_obs"][idx]
                returns.append(float(reward[idx]))
        assert real_next_obs.shape == (2, 48, 48, 3)
    assert len(returns) == 4
