"""Other projects' evaluation loops, as their users write them, on worlds behind their interfaces.

Every loop here differs from the original in the import line alone (and in the checkpoint it is pointed to).
"""

from __future__ import annotations

import json
import math
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import cv2
import gymnasium
import numpy as np
import pytest
import torch

from prophet_gym import ACTION_SPECS, SnapshotSet
from prophet_gym.compat import libero as prophet_libero
from prophet_gym.compat import maniskill, simpler
from prophet_gym.rotations import quaternion_to_matrix

ID = "Prophet-Tabletop-v0"
CHUNK, HORIZON = 4, 8


def never(frames: np.ndarray, instruction: str) -> bool:
    return False


@pytest.fixture(scope="module")
def options(tiny_checkpoint: Path) -> dict[str, Any]:
    return {
        "env_id": ID, "checkpoint": str(tiny_checkpoint), "judge": never, "horizon": HORIZON, "chunk_length": CHUNK,
    }  # fmt: skip


@pytest.fixture(scope="module")
def snapshots(tiny_checkpoint: Path) -> SnapshotSet:
    return SnapshotSet.load(tiny_checkpoint / "snapshots")


def close(seen: Any, expected: np.ndarray) -> None:
    np.testing.assert_allclose(np.asarray(seen).astype(int), expected, atol=2)  # conversions round in float32


def large(frame: np.ndarray) -> np.ndarray:
    return cv2.resize(frame, (640, 480), interpolation=cv2.INTER_LINEAR)


def test_simpler_readme_loop(options: dict[str, Any]) -> None:
    from prophet_gym.compat import simpler as simpler_env
    from prophet_gym.compat.simpler import get_image_from_maniskill2_obs_dict

    env = simpler_env.make("widowx_carrot_on_plate", **options)
    obs, reset_info = env.reset()
    instruction = env.get_language_instruction()
    done, truncated = False, False
    while not (done or truncated):
        image = get_image_from_maniskill2_obs_dict(env, obs)
        assert image.shape == (480, 640, 3) and image.dtype == np.uint8
        action = env.action_space.sample()
        obs, reward, done, truncated, info = env.step(action)
        new_instruction = env.get_language_instruction()
        assert new_instruction == instruction
    episode_stats = info.get("episode_stats", {})
    assert episode_stats["src_on_target"] is False and episode_stats["moved_wrong_obj"] is None
    assert info["elapsed_steps"] == HORIZON and info["clipped"] is True  # samples go up to a metre


def test_simpler_evaluator_loop_takes_the_last_steps_success(options: dict[str, Any]) -> None:
    from prophet_gym.compat import simpler as simpler_env

    def in_the_middle(frames: np.ndarray, instruction: str) -> bool:
        return len(frames) in (4, 5)

    success_arr, early = [], []
    for judge in (in_the_middle, lambda frames, _: len(frames) > 6):
        env = simpler_env.make("widowx_spoon_on_towel", **{**options, "judge": judge})
        assert "widowx" in env.robot_uid
        for episode_id in range(2):
            env_reset_options = {
                "robot_init_options": {"init_xy": np.array([0.147, 0.028]), "init_rot_quat": np.array([0, 0, 0, 1])},
                "obj_init_options": {"episode_id": episode_id},
            }
            obs, _ = env.reset(options=env_reset_options)
            is_final_subtask = env.is_final_subtask()
            assert env.get_language_instruction() == f"put block {episode_id} on the plate"
            predicted_terminated, done, truncated = False, False, False
            timestep = 0
            while not (predicted_terminated or truncated):
                raw = {"terminate_episode": np.array([0.0])}
                predicted_terminated = bool(raw["terminate_episode"][0] > 0)
                if predicted_terminated and not is_final_subtask:
                    predicted_terminated = False
                    env.advance_to_next_subtask()
                obs, reward, done, truncated, info = env.step(np.concatenate([np.zeros(3), np.zeros(3), [1.0]]))
                early.append(done)
                is_final_subtask = env.is_final_subtask()
                timestep += 1
            assert timestep == HORIZON
            success_arr.append(done)
    assert success_arr == [False, False, True, True] and any(early[:HORIZON])


def test_simpler_observation_and_episodes(options: dict[str, Any], snapshots: SnapshotSet) -> None:
    env = simpler.make("widowx_stack_cube", **options)
    obs, info = env.reset(seed=0, options={"obj_init_options": {"episode_id": 6}})  # 6 modulo 4 snapshots
    assert env.get_language_instruction() == snapshots[2].instruction and info["episode_id"] == 6
    np.testing.assert_array_equal(obs["image"][simpler.CAMERA]["rgb"], large(snapshots[2].image))
    assert np.isnan(obs["agent"]["qpos"][:6]).all() and obs["agent"]["qpos"][6:].tolist() == pytest.approx([0.037] * 2)
    np.testing.assert_allclose(obs["extra"]["tcp_pose"][:3], snapshots[2].eef_pose[0, :3, 3], atol=1e-6)
    link = quaternion_to_matrix(obs["extra"]["tcp_pose"][3:].astype(float))
    np.testing.assert_allclose(link[:, 0], [0, 0, -1], atol=1e-6)  # its x axis points to what it holds: down
    np.testing.assert_allclose(link[:, 2], [1, 0, 0], atol=1e-6)
    view = obs["camera_param"][simpler.CAMERA]
    np.testing.assert_allclose(view["extrinsic_cv"], snapshots[2].camera.E, atol=1e-6)
    np.testing.assert_allclose(view["cam2world_gl"][:3, 2], [0, 0, 1], atol=1e-6)  # looks down: -z is forward
    assert view["intrinsic_cv"][0, 0] == pytest.approx(60 * 640 / 48)
    for key, space in env.observation_space["image"][simpler.CAMERA].items():
        assert obs["image"][simpler.CAMERA][key] in space
    assert env.action_space.low[3] == pytest.approx(-math.pi / 2) and env.action_space.high[6] == 1
    for bad, message in (
        ({"obj_init_option": {}}, "Did you mean 'obj_init_options'"),
        ({"obj_init_options": {"init_xy": [0, 0]}}, "starts from snapshots"),
    ):
        with pytest.raises(ValueError, match=message):
            env.reset(options=bad)


def test_maniskill_loop(options: dict[str, Any]) -> None:
    from prophet_gym.compat import maniskill as gym

    num_envs, eval_metrics = 2, defaultdict(list)
    env = gym.make(
        "PutCarrotOnPlateInScene-v1",
        num_envs=num_envs,
        obs_mode="rgb+segmentation",
        control_mode="arm_pd_ee_target_delta_pose_align2_gripper_pd_joint_pos",
        sim_config={"sim_freq": 500, "control_freq": 5},
        max_episode_steps=5,
        sensor_configs={"shader_pack": "default"},
        **{**options, "judge": lambda frames, _: len(frames) > 3, "horizon": 5},
    )
    assert env.device.type == "cpu" and "widowx" in env.unwrapped.robot_uids.uid
    eps_count = 0
    while eps_count < 4:
        ids = torch.tensor([eps_count + i for i in range(num_envs)])
        obs, _ = env.reset(seed=eps_count, options={"episode_id": ids})
        instruction = env.unwrapped.get_language_instruction()
        assert instruction == [f"put block {i} on the plate" for i in ids.tolist()]
        predicted_terminated, truncated, elapsed_steps = False, False, 0
        while not (predicted_terminated or truncated):
            obs, reward, terminated, truncated, info = env.step(env.action_space.sample())
            assert terminated.dtype == torch.bool and reward.shape == (num_envs,)
            elapsed_steps += 1
            truncated = bool(truncated.any())
            image = obs["sensor_data"]["3rd_view_camera"]["rgb"].to(torch.uint8)
            assert image.shape == (num_envs, 480, 640, 3)
        assert elapsed_steps == 5
        for k, v in info.items():
            eval_metrics[k].append(v.flatten().numpy())
        eps_count += num_envs
    assert np.mean(eval_metrics["success"]) == 1.0 and np.isnan(np.mean(eval_metrics["is_src_obj_grasped"]))
    assert obs["agent"]["qpos"].shape == (2, 8)
    assert obs["sensor_param"]["3rd_view_camera"]["extrinsic_cv"].shape == (2, 3, 4)
    for bad in ({"obs_mode": "state"}, {"control_mode": "pd_joint_pos"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            gym.make("PutCarrotOnPlateInScene-v1", **bad, **options)


def libero_loop(task: Any, initial_states: list[Any], options: dict[str, Any]) -> tuple[list[bool], list[int]]:
    """OpenVLA's loop over one task."""
    from prophet_gym.compat.libero import OffScreenRenderEnv

    env_args = {"bddl_file_name": task["bddl_file"], "camera_heights": 64, "camera_widths": 96}
    env = OffScreenRenderEnv(**env_args, **options)
    env.seed(0)
    successes, lengths = [], []
    max_steps, num_steps_wait = 6, 2
    for initial_state in initial_states:
        env.reset()
        obs = env.set_init_state(initial_state)
        t, done = 0, False
        while t < max_steps + num_steps_wait:
            if t < num_steps_wait:
                obs, reward, done, info = env.step([0, 0, 0, 0, 0, 0, -1])
                t += 1
                continue
            img = obs["agentview_image"][::-1, ::-1]
            assert img.shape == (64, 96, 3)
            state = np.concatenate((obs["robot0_eef_pos"], obs["robot0_eef_quat"][:3], obs["robot0_gripper_qpos"]))
            assert np.isfinite(state).all() and state.shape == (8,)
            obs, reward, done, info = env.step(np.full(7, 0.1).tolist())
            if done:
                break
            t += 1
        assert env.check_success() == done
        successes.append(done)
        lengths.append(t)
    env.close()
    return successes, lengths


def other_world(tiny_checkpoint: Path, folder: Path, spec: str, instruction: str) -> Path:
    """The tiny checkpoint with another robot's conventions, its snapshots with a task's instruction and states."""
    shutil.copytree(tiny_checkpoint, folder)
    config = json.loads((folder / "prophet.json").read_text())
    config["action_spec"] = ACTION_SPECS[spec].to_dict()
    (folder / "prophet.json").write_text(json.dumps(config))
    index = json.loads((folder / "snapshots" / "snapshots.json").read_text())
    for i, entry in enumerate(index["snapshots"]):
        entry["instruction"] = instruction if i % 2 else "another task"
        entry["simulator_state"] = [float(i), 0.5, 0.25]
    (folder / "snapshots" / "snapshots.json").write_text(json.dumps(index))
    return folder


def test_libero_loop(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = other_world(tiny_checkpoint, tmp_path / "libero", "libero", "put the bowl on the plate")
    task = {"bddl_file": "bddl_files/libero_goal/put_the_bowl_on_the_plate.bddl"}
    given = {"checkpoint": str(checkpoint), "judge": lambda frames, _: len(frames) > 7}
    states = [np.array([i, 0.5, 0.25]) for i in (1.0, 3.0)]
    assert libero_loop(task, states, given) == ([True, True], [6, 6])
    assert libero_loop(task, states, {**given, "judge": never}) == ([False, False], [8, 8])
    with pytest.raises(ValueError, match="None of the world's 2 snapshots has this simulator state"):
        libero_loop(task, [np.array([0, 0.5, 0.25])], given)  # a start of another task
    with pytest.raises(ValueError, match="no snapshot with the instruction 'open the drawer'"):
        prophet_libero.OffScreenRenderEnv("x/libero_goal/open_the_drawer.bddl", **given)
    with pytest.raises(ValueError, match="Did you mean 'libero_goal'"):
        prophet_libero.OffScreenRenderEnv("x/libero_goals/open_the_drawer.bddl", **given)
    scene = "libero_10/KITCHEN_SCENE3_turn_on_the_stove.bddl"
    assert prophet_libero.task_language(scene) == "turn on the stove"


def test_libero_observation(options: dict[str, Any], snapshots: SnapshotSet) -> None:
    env = prophet_libero.OffScreenRenderEnv("task.bddl", camera_heights=48, camera_widths=48, **options)
    obs = env.set_init_state(snapshots[1])
    np.testing.assert_array_equal(obs["agentview_image"][::-1], snapshots[1].image)
    np.testing.assert_allclose(obs["robot0_eef_quat"], [0, 0, 0, 1], atol=1e-6)
    assert obs["robot0_gripper_qpos"].tolist() == pytest.approx([0.04, -0.04])  # open
    assert np.isnan(obs["robot0_joint_pos"]).all() and env.language_instruction == snapshots[1].instruction
    with pytest.raises(KeyError, match="does not imagine it"):
        obs["robot0_eye_in_hand_image"]
    opened, closed = env.step([1, 0, 0, 0, 0, 0, -1])[0], env.step([0, 0, 0, 0, 0, 0, 1])[0]
    assert opened["robot0_gripper_qpos"][0] == pytest.approx(0.04) and closed["robot0_gripper_qpos"][0] == 0
    moved = opened["robot0_eef_pos"] - obs["robot0_eef_pos"]
    np.testing.assert_allclose(moved, [0.04, 0, 0], atol=1e-6)  # 0.05 m, cut to Tabletop's bound


def test_bridge_world_by_default(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """`make` without `env_id`: the task gives snapshots and horizon, and commands become Bridge's differences."""
    for make, name in ((simpler.make, "widowx_carrot_on_plate"), (maniskill.make, "PutCarrotOnPlateInScene-v1")):
        with pytest.raises(ValueError, match=r"no snapshot with .*'put carrot on plate'.*Give snapshots="):
            make(name)  # the packaged weights know other scenes
        with pytest.raises(ValueError, match=f"Did you mean '{name}'"):
            make(name[:-1])
    checkpoint = other_world(tiny_checkpoint, tmp_path / "bridge", "bridge", "put eggplant into yellow basket")
    env = simpler.make("widowx_put_eggplant_in_basket", checkpoint=str(checkpoint), judge=never)
    start, _ = env.reset(seed=0)
    assert env.get_language_instruction() == "put eggplant into yellow basket" and env.world.horizon == 120
    assert len(env.world.snapshots) == 2
    obs, *_, info = env.step(np.array([0.02, -0.01, 0.03, 0.1, 0.2, -0.1, -1.0]))
    moved = obs["extra"]["tcp_pose"][:3] - start["extra"]["tcp_pose"][:3]
    np.testing.assert_allclose(moved, [0.02, -0.01, 0.03], atol=1e-6)
    assert obs["agent"]["qpos"][7] == pytest.approx(0.015) and not info["clipped"]
    with pytest.raises(ValueError, match="no snapshot with the instruction 'put carrot on plate'"):
        simpler.make("widowx_carrot_on_plate", checkpoint=str(checkpoint))


def test_attributes_survive_gymnasium(tiny_checkpoint: Path, options: dict[str, Any]) -> None:
    given = {key: value for key, value in options.items() if key != "env_id"}
    env = gymnasium.make(ID, interface="simpler", action_buffer="chunk", **given)
    env.reset(seed=0)
    assert isinstance(env.get_language_instruction(), str) and env.robot_uid and env.spec.id == ID
    assert isinstance(gymnasium.make(ID, interface="maniskill", **given), maniskill.ManiSkillEnv)
    libero = gymnasium.make(ID, interface="libero", **given)
    assert set(libero.reset()) >= {"agentview_image", "robot0_eef_pos"} and len(libero.step(np.zeros(7))) == 4
    lerobot = gymnasium.make_vec(ID, num_envs=2, interface="lerobot", **given)
    lerobot.reset(seed=0)
    assert len(lerobot.call("task")) == 2
    with pytest.raises(ValueError, match=r"'simpler' has no batches.*takes \['chunk', 'flat', 'lerobot'\]") as error:
        gymnasium.make_vec(ID, interface="simpler", **given)
    assert "maniskill" not in str(error.value)
    with pytest.raises(ValueError, match=r"or prophet_gym.compat.maniskill.make\(..., num_envs=...\)"):
        gymnasium.make_vec(ID, interface="maniskill", **given)
    with pytest.raises(ValueError, match="takes whole chunks"):
        gymnasium.make(ID, action_buffer="chunk", **given)


@pytest.mark.render
def test_the_simulator_stands_behind_the_same_interface() -> None:
    from prophet_gym.registration import ASSETS

    starts = SnapshotSet.load(ASSETS / "tabletop" / "snapshots")[:3]
    env = simpler.make("widowx_carrot_on_plate", env_id="Tabletop-v0", snapshots=starts, horizon=3)
    obs, _ = env.reset(options={"obj_init_options": {"episode_id": 4}})
    close(obs["image"][simpler.CAMERA]["rgb"], large(starts[1].image))
    assert env.get_language_instruction() == starts[1].instruction
    steps = [env.step(np.array([0.02, 0, 0, 0, 0, 0, 1.0])) for _ in range(3)]
    assert [step[3] for step in steps] == [False, False, True]
    moved = steps[-1][0]["extra"]["tcp_pose"][:3] - obs["extra"]["tcp_pose"][:3]
    np.testing.assert_allclose(moved, [0.06, 0, 0], atol=1e-6)
    env.close()
    without = simpler.make("widowx_carrot_on_plate", env_id="Tabletop-v0", horizon=3)
    with pytest.raises(ValueError, match="no snapshots to choose from"):
        without.reset(options={"obj_init_options": {"episode_id": 0}})
    without.close()
