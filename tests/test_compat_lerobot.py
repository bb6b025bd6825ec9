"""LeRobot's rollout loop on a batch of worlds; `test_compat_same_frames.py` compares frames with the native ones."""

from __future__ import annotations

from pathlib import Path

import gymnasium
import numpy as np

from prophet_gym import SnapshotSet
from prophet_gym.compat.lerobot import make_env

ID, HORIZON = "Prophet-Tabletop-v0", 8


def test_lerobot_rollout_loop(tiny_checkpoint: Path) -> None:
    snapshots = SnapshotSet.load(tiny_checkpoint / "snapshots")
    options = {"checkpoint": str(tiny_checkpoint), "horizon": HORIZON, "chunk_length": 4}

    def second(frames: np.ndarray, instruction: str) -> bool:
        return "1" in instruction and len(frames) > 5

    envs = make_env(n_envs=2, use_async_envs=False, **{**options, "judge": second})
    ((suite, tasks),) = envs.items()
    env = tasks[0]
    assert suite == ID and isinstance(env, gymnasium.vector.SyncVectorEnv)
    assert env.unwrapped.metadata["render_fps"] == 10.0
    ep_frames, all_successes, all_tasks = [], [], []
    observation, info = env.reset(seed=[0, 1], options={"lerobot_new_rollout": True, "snapshots": snapshots[:2]})
    max_steps = env.call("_max_episode_steps")[0]
    assert max_steps == HORIZON and hasattr(env.envs[0], "task_description") and hasattr(env.envs[0], "task")
    done, step = np.array([False] * env.num_envs), 0
    while not np.all(done) and step < max_steps:
        assert observation["pixels"].shape == (2, 48, 48, 3) and observation["agent_pos"].shape == (2, 8)
        observation["task"] = list(env.call("task_description"))
        all_tasks.append(observation["task"])
        action_numpy = np.zeros((2, 7), np.float32)
        observation, reward, terminated, truncated, info = env.step(action_numpy)
        assert info["is_success"].shape == (2,)
        ep_frames.append(np.stack([env.envs[i].render() for i in range(2)]))
        successes = info["final_info"]["is_success"].tolist() if "final_info" in info else [False] * env.num_envs
        all_successes.append(np.array(successes) & ~done)
        done = terminated | truncated | done
        step += 1
    assert np.any(all_successes, axis=0).tolist() == [False, True] and step == max_steps
    assert all_tasks[0] == ["put block 0 on the plate", "put block 1 on the plate"]
    assert env.get_attr("task") == tuple(env.instructions) and np.stack(ep_frames, 1).shape == (2, 8, 48, 48, 3)
    env.close()


def test_single_environments_in_a_sync_vector_env(tiny_checkpoint: Path) -> None:
    """LeRobot 0.4 calls `gym.make` for every slot and steps them in a SyncVectorEnv of its own."""
    options = {"checkpoint": str(tiny_checkpoint), "horizon": 4, "judge": lambda frames, _: len(frames) > 3}
    slots = [lambda: gymnasium.make(ID, disable_env_checker=True, interface="lerobot", **options)] * 2
    env = gymnasium.vector.SyncVectorEnv(slots, autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP)
    _, info = env.reset(seed=[0, 1])
    tasks = env.call("task_description")
    assert env.call("_max_episode_steps") == (4, 4) and tasks == env.call("task") == tuple(info["instruction"])
    assert env.call("render")[0].shape == (48, 48, 3)
    for step in range(3):
        observation, reward, terminated, truncated, info = env.step(np.zeros((2, 7), np.float32))
        assert step == 2 or info["is_success"].tolist() == [False, False]
    assert terminated.all() and not truncated.any() and info["final_info"]["is_success"].tolist() == [True, True]
    assert observation["pixels"].dtype == np.uint8 and observation["agent_pos"].shape == (2, 8)
    env.close()


def test_the_config_of_an_envhub_file_is_taken(tiny_checkpoint: Path) -> None:
    env = make_env(2, True, object(), checkpoint=str(tiny_checkpoint))[ID][0]
    assert env.num_envs == 2
    env.close()
