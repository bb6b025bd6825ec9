"""One sequence of commands, spoken in the convention of every interface, gives the frames of the native environment.

What may differ is documented: SimplerEnv's and ManiSkill's images are resized, LIBERO's (LeRobot's, if asked) flipped.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import cv2
import gymnasium
import numpy as np
import pytest
import torch

from prophet_gym import ACTION_SPECS, SnapshotSet
from prophet_gym.compat import libero, maniskill, simpler
from prophet_gym.compat.lerobot import make_env
from prophet_gym.compat.sb3 import make_vec_env
from prophet_gym.registration import INTERFACES
from prophet_gym.rotations import axis_angle_to_matrix

ID, CHUNK, HORIZON, START, SEED = "Prophet-Tabletop-v0", 4, 8, 2, 5
TABLETOP = ACTION_SPECS["tabletop"]
LOW, HIGH = np.float32(TABLETOP.low), np.float32(TABLETOP.high)
CAMERA = "3rd_view_camera"


def never(frames: np.ndarray, instruction: str) -> bool:
    return False


@pytest.fixture(scope="module")
def options(tiny_checkpoint: Path) -> dict[str, Any]:
    return {"checkpoint": str(tiny_checkpoint), "judge": never, "horizon": HORIZON, "chunk_length": CHUNK}


@pytest.fixture(scope="module")
def start(tiny_checkpoint: Path) -> SnapshotSet:
    """The one snapshot from which all begin: Stable-Baselines3's reset takes no options."""
    return SnapshotSet.load(tiny_checkpoint / "snapshots")[START : START + 1]


@pytest.fixture(scope="module")
def commands() -> np.ndarray:
    """Native commands (T, 7)."""
    return np.random.default_rng(0).uniform(LOW, HIGH, (HORIZON, 7)).astype(np.float32).clip(LOW, HIGH)


@pytest.fixture(scope="module")
def native(options: dict[str, Any], start: SnapshotSet, commands: np.ndarray) -> np.ndarray:
    """The native frames at the end of the two chunks, (2, 48, 48, 3)."""
    env = gymnasium.make(ID, **options)
    env.reset(seed=SEED, options={"snapshot": start[0]})
    ends = [env.step(commands[i : i + CHUNK])[0]["image"] for i in range(0, HORIZON, CHUNK)]
    assert np.abs(ends[1].astype(int) - ends[0]).mean() > 2  # otherwise any frame would do
    return np.stack(ends)


def large(frames: np.ndarray) -> np.ndarray:
    return np.stack([cv2.resize(frame, (640, 480), interpolation=cv2.INTER_LINEAR) for frame in frames])


def through_simpler(options: dict[str, Any], start: SnapshotSet, commands: np.ndarray) -> list[np.ndarray]:
    env = simpler.make("widowx_carrot_on_plate", env_id=ID, action_buffer="chunk", snapshots=start, **options)
    env.reset(seed=SEED, options={"obj_init_options": {"episode_id": 0}})
    spoken = np.concatenate([commands[:, :6], 2 * commands[:, 6:] - 1], axis=1)
    return [env.step(command)[0]["image"][CAMERA]["rgb"] for command in spoken]


def through_maniskill(options: dict[str, Any], start: SnapshotSet, commands: np.ndarray) -> list[np.ndarray]:
    env = maniskill.make(
        "PutCarrotOnPlateInScene-v1", num_envs=2, env_id=ID, action_buffer="chunk", snapshots=start, **options
    )
    env.reset(seed=[SEED, SEED], options={"episode_id": torch.tensor([0, 0])})
    seen = []
    for command in commands:
        m = axis_angle_to_matrix(command[3:6])  # Rx @ Ry @ Rz
        euler = math.atan2(-m[1, 2], m[2, 2]), math.asin(m[0, 2]), math.atan2(-m[0, 1], m[0, 0])
        spoken = torch.tensor([[*command[:3], *euler, 2 * command[6] - 1]])
        seen.append(env.step(spoken.repeat(2, 1))[0]["sensor_data"][CAMERA]["rgb"].numpy())
    assert all((image[0] == image[1]).all() for image in seen)
    return [image[1] for image in seen]


def through_libero(options: dict[str, Any], start: SnapshotSet, commands: np.ndarray) -> list[np.ndarray]:
    env = libero.OffScreenRenderEnv(
        "task.bddl", camera_heights=48, camera_widths=48, env_id=ID, action_buffer="chunk", **options
    )
    env.seed(SEED)
    env.set_init_state(start[0])
    spoken = np.concatenate([commands[:, :3] / 0.05, commands[:, 3:6] / 0.5, 1 - 2 * commands[:, 6:]], axis=1)
    return [env.step(command.tolist())[0]["agentview_image"] for command in spoken]


def lerobot_batch(env: Any, start: SnapshotSet, commands: np.ndarray) -> list[np.ndarray]:
    env.reset(seed=[SEED, SEED], options={"snapshots": [start[0]] * 2})
    steps = [env.step(np.stack([command, command])) for command in commands]
    return [step[0]["pixels"][1] for step in steps[:-1]] + [steps[-1][4]["final_obs"][1]["pixels"]]


def through_lerobot(options: dict[str, Any], start: SnapshotSet, commands: np.ndarray) -> list[np.ndarray]:
    return lerobot_batch(make_env(2, action_buffer="chunk", **options)[ID][0], start, commands)


def through_lerobot_flipped(options: dict[str, Any], start: SnapshotSet, commands: np.ndarray) -> list[np.ndarray]:
    return lerobot_batch(make_env(2, flipped=True, action_buffer="chunk", **options)[ID][0], start, commands)


def through_lerobot_single(options: dict[str, Any], start: SnapshotSet, commands: np.ndarray) -> list[np.ndarray]:
    env = gymnasium.make(ID, interface="lerobot", action_buffer="chunk", **options)
    env.reset(seed=SEED, options={"snapshots": [start[0]]})
    return [env.step(command)[0]["pixels"] for command in commands]


def normalised(commands: np.ndarray) -> np.ndarray:
    """The flat interface's actions (2, C * 7): chunks, scaled to [-1, 1]."""
    return (2 * (commands - LOW) / (HIGH - LOW) - 1).reshape(-1, CHUNK * 7).clip(-1, 1).astype(np.float32)


def through_flat(options: dict[str, Any], start: SnapshotSet, commands: np.ndarray) -> list[np.ndarray]:
    env = gymnasium.make(ID, interface="flat", **options)
    env.reset(seed=SEED, options={"snapshot": start[0]})
    return [env.step(action)[0] for action in normalised(commands)]


def through_flat_batch(options: dict[str, Any], start: SnapshotSet, commands: np.ndarray) -> list[np.ndarray]:
    env = gymnasium.make_vec(ID, num_envs=2, interface="flat", **options)
    env.reset(seed=[SEED, SEED], options={"snapshots": [start[0]] * 2})
    return [env.step(np.stack([action, action]))[0][1] for action in normalised(commands)]


def through_sb3(options: dict[str, Any], start: SnapshotSet, commands: np.ndarray) -> list[np.ndarray]:
    env = make_vec_env(ID, 2, SEED, env_kwargs={**options, "snapshots": start})
    env.reset()
    first, last = (env.step(np.stack([action, action])) for action in normalised(commands))
    return [first[0][0], last[3][0]["terminal_observation"]]  # slot 0 has the seed itself


WAYS = {
    "simpler": (through_simpler, large),
    "maniskill": (through_maniskill, large),
    "libero": (through_libero, lambda frames: frames[:, ::-1]),
    "lerobot": (through_lerobot, np.asarray),
    "lerobot, flipped": (through_lerobot_flipped, lambda frames: frames[:, ::-1]),
    "lerobot, single": (through_lerobot_single, np.asarray),
    "flat": (through_flat, np.asarray),
    "flat, batched": (through_flat_batch, np.asarray),
    "sb3": (through_sb3, np.asarray),
}


@pytest.mark.parametrize("way", WAYS)
def test_one_sequence_gives_the_native_frames(
    way: str, options: dict[str, Any], start: SnapshotSet, commands: np.ndarray, native: np.ndarray
) -> None:
    play, shown = WAYS[way]
    seen = play(options, start, commands)
    ends = seen if len(seen) == 2 else seen[CHUNK - 1 :: CHUNK]  # per chunk, or per command
    np.testing.assert_allclose(np.stack(ends).astype(int), shown(native), atol=2)  # conversions round in float32
    if way in ("simpler", "maniskill"):  # between two predictions the latest real image stays
        np.testing.assert_array_equal(np.stack(seen[: CHUNK - 1]), large(np.stack([start[0].image] * (CHUNK - 1))))


def test_no_interface_is_left_out() -> None:
    assert {*INTERFACES, "sb3"} - {"chunk"} == {way.split(",")[0] for way in WAYS}
