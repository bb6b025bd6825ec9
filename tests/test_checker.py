"""The conformance suite passes on our worlds and names the cause when a rule is broken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

import prophet_gym
from prophet_gym import check_world_env

ID = "Prophet-Tabletop-v0"


def judge(frames: np.ndarray, instruction: str) -> float:
    """Deterministic, and neither always right nor always wrong."""
    return float(frames.astype(np.int64).sum() % 2)


def make(checkpoint: Path, **options: Any) -> gym.Env:
    return gym.make(ID, checkpoint=str(checkpoint), judge=judge, **options)


def test_world_passes_both_suites(tiny_checkpoint: Path) -> None:
    check_world_env(make(tiny_checkpoint))
    check_env(make(tiny_checkpoint, render_mode="rgb_array").unwrapped)


def test_shipped_world_passes_all_suites() -> None:
    from stable_baselines3.common.env_checker import check_env as check_sb3_env

    check_world_env(gym.make(ID))
    check_env(gym.make(ID, render_mode="rgb_array").unwrapped)
    check_sb3_env(gym.make(ID, interface="flat"))


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_vector_world_passes(tiny_checkpoint: Path, mode: AutoresetMode) -> None:
    env = gym.make_vec(ID, num_envs=3, checkpoint=str(tiny_checkpoint), judge=judge, autoreset_mode=mode, horizon=16)
    check_world_env(env)


@pytest.mark.parametrize("simulator_mode", ["single", *AutoresetMode])
@pytest.mark.render
def test_simulator_passes(simulator_mode: str | AutoresetMode) -> None:
    if simulator_mode == "single":
        env = gym.make("Tabletop-v0")
        check_world_env(env)
        env.close()
        env = gym.make("Tabletop-v0")
        check_env(env.unwrapped)
    else:
        env = gym.make_vec("Tabletop-v0", num_envs=2, autoreset_mode=simulator_mode, horizon=16)
        check_world_env(env)
    env.close()


def test_sb3_check_env_passes_on_the_flat_interface(tiny_checkpoint: Path) -> None:
    from stable_baselines3.common.env_checker import check_env as check_sb3_env

    check_sb3_env(make(tiny_checkpoint, interface="flat"))


@pytest.mark.render
def test_sb3_check_env_passes_on_the_flat_simulator() -> None:
    from stable_baselines3.common.env_checker import check_env as check_sb3_env

    env = gym.make("Tabletop-v0", interface="flat")
    check_sb3_env(env)
    env.close()


class SharedBuffer(gym.Wrapper):
    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(**options)
        self.image = observation["image"]
        return observation, info

    def step(self, action: np.ndarray) -> tuple[Any, ...]:
        observation, *rest = self.env.step(action)
        self.image[:] = observation["image"]
        return {**observation, "image": self.image}, *rest


class GlobalNoise(gym.Wrapper):
    def step(self, action: np.ndarray) -> tuple[Any, ...]:
        observation, *rest, info = self.env.step(action)
        noise = np.random.default_rng().integers(0, 9, observation["image"].shape, dtype=np.uint8)
        observation["image"] = info["frames"][-1] = observation["image"] // 2 + noise
        return observation, *rest, info


class Clipped(gym.Wrapper):
    def step(self, action: np.ndarray) -> tuple[Any, ...]:
        space = self.env.action_space
        return self.env.step(np.clip(action, space.low[0], space.high[0]) if action.ndim == 2 else action)


class AbstentionIsSuccess(gym.Wrapper):
    def step(self, action: np.ndarray) -> tuple[Any, ...]:
        *rest, info = self.env.step(action)
        return *rest, {**info, "judge_valid": False, "is_success": True}


class PaddedFrames(gym.Wrapper):
    def step(self, action: np.ndarray) -> tuple[Any, ...]:
        *rest, info = self.env.step(action)
        frames = info["frames"]
        info["frames"] = np.concatenate([frames, np.repeat(frames[-1:], 20 - len(frames), axis=0)])
        return *rest, info


class ForgetfulState(gym.Wrapper):
    """Not a world of ours by itself: what ``env.unwrapped`` returns lacks the noise counter."""

    @property
    def unwrapped(self) -> Any:
        return self

    @property
    def world_model(self) -> Any:
        return self.env.unwrapped.world_model

    def get_state(self) -> dict[str, Any]:
        return self.env.unwrapped.get_state()

    def set_state(self, state: dict[str, Any]) -> Any:
        state["world_model"]["env_step"] += 1
        return self.env.unwrapped.set_state(state)

    def fork(self, n: int) -> Any:
        return self.env.unwrapped.fork(n)


@pytest.mark.parametrize(
    "fault, message",
    [
        (SharedBuffer, "share memory.*without .copy"),
        (GlobalNoise, "same seed and actions.*global random numbers"),
        (Clipped, "out of bounds.*clipped"),
        (AbstentionIsSuccess, "judge_valid is False.*abstention"),
        (PaddedFrames, "expected uint8 \\(8, 48, 48, 3\\).*padding returned"),
        (ForgetfulState, "other bytes.*the state lacks something"),
    ],
)
def test_a_broken_world_is_named(tiny_checkpoint: Path, fault: type[gym.Wrapper], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_world_env(fault(make(tiny_checkpoint)))


def test_other_interfaces_are_told_apart(tiny_checkpoint: Path) -> None:
    with pytest.raises(AssertionError, match="interface='chunk'"):
        check_world_env(make(tiny_checkpoint, interface="flat"))


def test_a_batch_with_shared_noise_is_named(tiny_checkpoint: Path) -> None:
    class SharedNoise(prophet_gym.ProphetWorldModel):
        def begin(self, snapshots: Any, seeds: Any) -> Any:
            return super().begin(snapshots, range(len(seeds)))  # the mistake: a slot's place is its noise

    world_model = SharedNoise.from_pretrained(tiny_checkpoint)
    snapshots = prophet_gym.SnapshotSet.load(tiny_checkpoint / "snapshots")
    env = prophet_gym.ProphetVectorEnv(world_model, 3, horizon=40, snapshots=snapshots, judge=judge, chunk_length=8)
    with pytest.raises(AssertionError, match="traded places.*noise"):
        check_world_env(env)
