"""Other projects' environments behind the chunk interface, on one of Gymnasium's own simulators."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

from prophet_gym.compat.chunked import ChunkedEnv
from prophet_gym.sims.vector import make_sync_vector_env


def grey(observation: np.ndarray) -> np.ndarray:
    return np.full((8, 8, 3), 128, np.uint8)


def make_pendulum(**options) -> ChunkedEnv:
    return ChunkedEnv(gym.make("Pendulum-v1"), 4, image=grey, image_size=16, instruction="swing up", **options)


def test_chunk_equals_its_commands_one_by_one() -> None:
    env, single = make_pendulum(), gym.make("Pendulum-v1")
    check_env(env, skip_render_check=True)
    first, info = env.reset(seed=3)
    observation, _ = single.reset(seed=3)
    assert info["instruction"] == "swing up" and first["image"].shape == (16, 16, 3)
    np.testing.assert_array_equal(first["state"], observation.astype(np.float32))
    chunk = np.random.default_rng(0).uniform(-2, 2, (3, 1)).astype(np.float32)  # shorter than the space is fine
    seen, reward, terminated, truncated, info = env.step(chunk)
    total = 0.0
    for command in chunk:
        observation, one, *_ = single.step(command)
        total += float(one)
    np.testing.assert_array_equal(seen["state"], observation.astype(np.float32))
    assert reward == pytest.approx(total) and not terminated and not truncated
    assert info["num_executed"] == 3 and info["frames"].shape == (3, 16, 16, 3)


def test_chunk_stops_with_the_episode() -> None:
    env = ChunkedEnv(gym.make("InvertedPendulum-v5"), 50, image=grey, image_size=8)
    env.reset(seed=0)
    _, reward, terminated, truncated, info = env.step(np.full((50, 1), 3.0, np.float32))
    assert terminated and not truncated
    assert 1 < info["num_executed"] < 50 == len(info["frames"])
    assert (info["frames"][info["num_executed"] :] == info["frames"][-1]).all()
    assert reward == info["num_executed"] - 1  # the last command gives nothing: it has fallen


def test_slots_that_end_inside_a_chunk_beside_slots_that_do_not() -> None:
    def make() -> gym.Env:
        return ChunkedEnv(gym.make("InvertedPendulum-v5"), 10, image=grey, image_size=8)

    envs = make_sync_vector_env(make, 2, AutoresetMode.DISABLED)
    envs.reset(seed=[0, 1])
    chunks = np.zeros((2, 10, 1), np.float32)
    chunks[0] = 3.0
    _, _, terminated, _, info = envs.step(chunks)
    assert terminated.tolist() == [True, False] and info["num_executed"][0] < info["num_executed"][1] == 10
    assert info["frames"].shape == (2, 10, 8, 8, 3)


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        (np.zeros((5, 1)), "1 to 4"),
        (np.zeros((0, 1)), "1 to 4"),
        (np.zeros(4), "c, 1"),
        (np.full((1, 1), 3.0), "3.0"),
        (np.full((1, 1), np.nan), "nan"),
    ],
)
def test_bad_chunks(chunk: np.ndarray, message: str) -> None:
    env = make_pendulum()
    env.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        env.step(chunk)


def test_what_cannot_be_wrapped_says_why() -> None:
    with pytest.raises(ValueError, match="Discrete"):
        ChunkedEnv(gym.make("CartPole-v1"), 4, image=grey)
    with pytest.raises(ValueError, match="rgb_array"):
        ChunkedEnv(gym.make("Pendulum-v1"), 4)
    with pytest.raises(ValueError, match="chunk_length"):
        ChunkedEnv(gym.make("Pendulum-v1"), 0, image=grey)
