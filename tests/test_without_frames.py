"""Simulators render what someone looks at: rollouts that keep no frames are the same ones, with fewer pictures."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from small_policy import CHUNK, make_policy

from prophet_gym.sims.tabletop import TabletopSim
from prophet_gym.sims.tabletop_env import TabletopEnv
from prophet_gym.sims.vector import make_sync_vector_env, without_frames
from prophrl_agents.batch import Start
from prophrl_agents.governor import SimulatorReference
from prophrl_agents.rollout import collect_groups

pytestmark = pytest.mark.render
CHUNKS = 2


@pytest.fixture
def env() -> Any:
    made = gym.make_vec("Tabletop-v0", 2, autoreset_mode="Disabled", chunk_length=CHUNK, horizon=CHUNKS * CHUNK)
    yield made
    made.close()


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for every picture that a Tabletop renders."""
    taken: list[int] = []
    render = TabletopSim.render

    def counted(sim: TabletopSim) -> np.ndarray:
        taken.append(sim.num_steps)
        return render(sim)

    monkeypatch.setattr(TabletopSim, "render", counted)
    return taken


def test_rollouts_are_the_same_with_fewer_pictures(env: Any, pictures: list[int]) -> None:
    starts, policy = [Start(0), Start(1)], make_policy()
    seen = collect_groups(env, policy, starts, 2, noise_seed=0, keep_frames=True)
    assert len(pictures) == 4 * (1 + CHUNKS * CHUNK)
    pictures.clear()
    unseen = collect_groups(env, policy, starts, 2, noise_seed=0)
    assert len(pictures) == 4 * (1 + CHUNKS) and set(pictures) == {0, CHUNK, CHUNKS * CHUNK}
    for field in fields(seen):
        if field.name not in ("frames", "seconds", "starts"):
            one, other = getattr(seen, field.name), getattr(unseen, field.name)
            if isinstance(one, torch.Tensor):
                torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
            else:
                assert one == other
    assert not unseen.frames and [len(video) for video in seen.frames] == [1 + CHUNKS * CHUNK] * 4
    pictures.clear()
    replayed = SimulatorReference(env, same_seeds=True).outcomes(unseen, range(4))
    assert replayed == unseen.success.tolist() and len(pictures) == 4 * (1 + CHUNKS)


def test_frames_are_back_afterwards(env: Any) -> None:
    for _ in range(2):
        env.reset(seed=[0, 1])
        with pytest.raises(KeyError), without_frames(env):
            env.step(np.zeros(env.action_space.shape, np.float32))[4]["frames"]
        env.reset(seed=[0, 1])
        info = env.step(np.zeros(env.action_space.shape, np.float32))[4]
        assert info["frames"].shape == (2, CHUNK, 64, 64, 3) and info["num_executed"].tolist() == [CHUNK] * 2


def test_success_that_ends_a_chunk_early_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A simulator that ends at the command of success shows that moment, not the end of the chunk."""
    monkeypatch.setattr(TabletopSim, "ends_at", "command")
    monkeypatch.setattr(TabletopSim, "is_success", lambda sim: sim.num_steps == 3)
    shown = []
    for hidden in (False, True):
        env = make_sync_vector_env(lambda: TabletopEnv(chunk_length=CHUNK), 1, AutoresetMode.DISABLED)
        env.reset(seed=0)
        actions = np.zeros(env.action_space.shape, np.float32)
        actions[..., 0] = 0.02
        if hidden:
            with without_frames(env):
                observation, _, terminated, _, info = env.step(actions)
            assert "frames" not in info
        else:
            observation, _, terminated, _, info = env.step(actions)
            assert (info["frames"][0, 2:] == info["frames"][0, -1]).all()
            assert (info["frames"][0, 1] != info["frames"][0, 2]).any()
        assert terminated[0] and info["num_executed"][0] == 3
        shown.append(observation["image"].copy())
        env.close()
    np.testing.assert_array_equal(*shown)
