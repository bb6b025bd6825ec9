"""Ids, keyword arguments, where weights come from, the flat interface, and a light import."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import huggingface_hub.constants
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

import prophet_gym
from prophet_gym import ACTION_SPECS, WORLDS, MissingCheckpointError, ProphetEnv, ProphetVectorEnv
from prophet_gym.compat.flat import to_chunk
from prophet_gym.registration import find_world, resolve_checkpoint

ID = "Prophet-Tabletop-v0"


def always(frames: np.ndarray, instruction: str) -> bool:
    return True


def test_import_registers_every_id_and_loads_no_network() -> None:
    code = (
        "import sys, prophet_gym, gymnasium as gym\n"
        "assert not {'torch', 'mujoco', 'diffusers', 'cv2'} & set(sys.modules), sorted(sys.modules)\n"
        "assert {*prophet_gym.WORLDS, 'Tabletop-v0'} <= set(gym.registry)\n"
        "assert set(prophet_gym.__all__) <= set(dir(prophet_gym))"
    )
    root = Path(__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_table_is_consistent() -> None:
    assert all(world.id == key and world.action_spec in (*ACTION_SPECS, None) for key, world in WORLDS.items())
    for name in prophet_gym.__all__:
        assert getattr(prophet_gym, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Prophet'"):
        _ = prophet_gym.Prophet


@pytest.mark.parametrize("env_id", [ID, f"prophet_gym:{ID}"])
def test_make(tiny_checkpoint: Path, env_id: str) -> None:
    env = gym.make(env_id, checkpoint=str(tiny_checkpoint), judge=always, num_inference_steps=2, dtype="float32")
    assert isinstance(env.unwrapped, ProphetEnv) and env.action_space.shape == (8, 7)
    _, info = env.reset(seed=0)
    assert info["checkpoint"] == "tiny-test, trained on nothing: random weights for tests"
    for _ in range(5):
        *_, terminated, truncated, info = env.step(env.action_space.sample())
    assert terminated and truncated and info["is_success"]


@pytest.mark.parametrize("mode", [*AutoresetMode, "SameStep"])
def test_make_vec(tiny_checkpoint: Path, mode: AutoresetMode | str) -> None:
    env = gym.make_vec(
        ID, num_envs=2, checkpoint=str(tiny_checkpoint), judge=always, autoreset_mode=mode, chunk_length=4, horizon=8
    )
    assert isinstance(env, ProphetVectorEnv) and env.metadata["autoreset_mode"] is AutoresetMode(mode)
    assert env.action_space.shape == (2, 4, 7)
    env.reset(seed=0)
    env.step(env.action_space.sample())
    *_, truncated, info = env.step(env.action_space.sample())
    assert truncated.all()


def test_judge_and_snapshots_by_path_or_object(tiny_checkpoint: Path, tmp_path: Path) -> None:
    chosen = prophet_gym.SnapshotSet.load(tiny_checkpoint / "snapshots")[1:2]
    chosen.save(tmp_path / "starts")
    for snapshots in (chosen, tmp_path / "starts", str(tmp_path / "starts")):
        env = gym.make(ID, checkpoint=str(tiny_checkpoint), judge=always, snapshots=snapshots)
        assert env.reset(seed=0)[1]["instruction"] == chosen[0].instruction
    with pytest.raises(ValueError, match="judge"):
        gym.make(ID, checkpoint=str(tiny_checkpoint), judge=str(tmp_path / "judge"))


def test_one_snapshot_is_given_in_a_list(tiny_checkpoint: Path) -> None:
    snapshot = prophet_gym.SnapshotSet.load(tiny_checkpoint / "snapshots")[0]
    for env_id, options in ((ID, {"checkpoint": str(tiny_checkpoint)}), ("Tabletop-v0", {})):
        with pytest.raises(ValueError, match=r"^snapshots is a Snapshot; expected .*: give \[snapshot\]\.$"):
            gym.make(env_id, snapshots=snapshot, **options)


def test_a_checkpoint_without_snapshots_needs_them_at_reset(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(tiny_checkpoint, folder, ignore=shutil.ignore_patterns("snapshots"))
    env = gym.make(ID, checkpoint=str(folder), judge=always)
    with pytest.raises(ValueError, match="no snapshots to start from"):
        env.reset()
    snapshot = prophet_gym.SnapshotSet.load(tiny_checkpoint / "snapshots")[0]
    assert env.reset(options={"snapshot": snapshot})[1]["instruction"] == snapshot.instruction


@pytest.mark.parametrize("env_id", [env_id for env_id, world in WORLDS.items() if world.packaged is None])
def test_missing_weights_name_the_command(env_id: str) -> None:
    with pytest.raises(MissingCheckpointError, match=r"prophet train world-model --data") as error:
        gym.make(env_id)
    assert f'gym.make("{env_id}", checkpoint=' in str(error.value)


def test_unknown_names_suggest_the_nearest(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="Did you mean 'Prophet-Bridge-v0'"):
        find_world("Prophet-Brigde-v0")
    with pytest.raises(gym.error.NameNotFound, match="Did you mean: `Prophet-Bridge`"):
        gym.make("Prophet-Brigde-v0")
    (tiny_checkpoint.parent / "tinnys").mkdir()  # nearer, but no checkpoint
    wrong = tiny_checkpoint.parent / "tinny"
    with pytest.raises(MissingCheckpointError, match=f"No checkpoint .*Did you mean '{tiny_checkpoint}'"):
        gym.make(ID, checkpoint=str(wrong))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingCheckpointError, match="nor a packaged name, and the hub does not give it"):
        resolve_checkpoint(WORLDS[ID], "someone/prophet-tabletop")


def test_foreign_checkpoints_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no prophet.json"):
        gym.make(ID, checkpoint=str(tmp_path))
    with pytest.raises(MissingCheckpointError, match=r"5 \(int\): expected a folder, a packaged name or a hub id"):
        gym.make(ID, checkpoint=5)
    with pytest.raises(ValueError, match="'libero' actions.*gripper='open_ratio'.*'close_positive'"):
        gym.make("Prophet-LiberoGoal-v0", checkpoint=str(tiny_checkpoint))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"interface": "flaat"}, "interface='flaat': expected one of .*Did you mean 'flat'"),
        ({"dtype": "float23"}, "Did you mean 'float32'"),
        ({"chunk_length": 21}, "from 1 to 20"),
        ({"device": "gpu"}, r"^device='gpu': expected a device of torch, such as 'cpu', 'cuda'[^,]* or 'cuda:1'$"),
        ({"device": "cuda:99"}, "device='cuda:99' cannot be used here .*expected 'cpu'"),
        ({"image_size": 64}, "image_size=64: expected height and width"),
        ({"image_size": (64.5, 64)}, "image_size=.*expected"),
        ({"snapshots": ["a"]}, r"snapshots\[0\] is a str"),
        ({"snapshots": np.zeros((48, 48, 3), np.uint8)}, "snapshots is a ndarray; expected a SnapshotSet"),
        ({"snapshots": 5}, "snapshots is a int"),
        ({"snapshots": iter(())}, "snapshots is a tuple_iterator"),
        ({"snapshots": []}, "snapshots is empty"),
    ],
)
def test_bad_keywords(tiny_checkpoint: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gym.make(ID, checkpoint=str(tiny_checkpoint), judge=always, **options)
    with pytest.raises(ValueError, match=message):
        gym.make_vec(ID, num_envs=2, checkpoint=str(tiny_checkpoint), judge=always, **options)


@pytest.mark.parametrize(
    "capabilities, expected",
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ({"avx2": True, "avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ({"neon": True, "sve_bf16": True}, torch.bfloat16),
        (None, torch.float32),
    ],
)
def test_automatic_precision_is_what_the_processor_multiplies(tiny_checkpoint, monkeypatch, capabilities, expected):
    """Emulated bfloat16 is several times slower than float32; torch before 2.10 cannot tell."""
    if capabilities is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    env = gym.make(ID, checkpoint=str(tiny_checkpoint), judge=always, dtype="auto")
    assert next(env.unwrapped.world_model.transformer.parameters()).dtype == expected


def test_flat_interface_is_the_chunk_interface_scaled(tiny_checkpoint: Path) -> None:
    native = gym.make(ID, checkpoint=str(tiny_checkpoint), judge=always)
    flat = gym.make(ID, checkpoint=str(tiny_checkpoint), judge=always, interface="flat")
    assert flat.observation_space.shape == (48, 48, 3) and flat.action_space.shape == (56,)
    action = native.action_space.sample()
    low, high = native.action_space.low, native.action_space.high
    native.reset(seed=0)
    flat.reset(seed=0)
    expected = native.step(action)[0]["image"]
    image, reward, terminated, truncated, info = flat.step(((action - low) / (high - low) * 2 - 1).ravel())
    np.testing.assert_allclose(image.astype(int), expected, atol=1)
    assert info["frames"].shape == (8, 48, 48, 3)
    for corner, bound in ((-1.0, low), (1.0, high)):
        np.testing.assert_array_equal(to_chunk(np.full(56, corner), native.action_space), bound)
    for bad, message in (
        (np.zeros(55), r"shape \(55,\); expected"),
        (np.zeros((1, 56)), r"shape \(1, 56\)"),
        (np.full(56, np.nan), "finite"),
        (np.full(56, 1.1), r"in \[-1, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            flat.step(bad)


def test_flat_vector_interface(tiny_checkpoint: Path) -> None:
    env = gym.make_vec(
        ID,
        num_envs=2,
        checkpoint=str(tiny_checkpoint),
        judge=always,
        interface="flat",
        horizon=8,
        autoreset_mode="SameStep",
    )
    images, _ = env.reset(seed=0)
    assert images.shape == (2, 48, 48, 3) and env.action_space.shape == (2, 56)
    images, *_, info = env.step(env.action_space.sample())
    assert info["final_obs"][1].shape == (48, 48, 3) and env.observation_space.contains(images)
    with pytest.raises(ValueError, match=r"expected \(2, 56\)"):
        env.step(np.zeros((2, 8, 7)))


def test_sb3_ppo_learns_without_complaint(tiny_checkpoint: Path) -> None:
    from stable_baselines3 import PPO
    from stable_baselines3.common.monitor import Monitor
    from stable_baselines3.common.vec_env import DummyVecEnv

    def bright(frames: np.ndarray, instruction: str) -> bool:
        return bool(frames[-1].mean() > frames[0].mean())

    def make() -> Monitor:
        return Monitor(gym.make(ID, checkpoint=str(tiny_checkpoint), judge=bright, interface="flat", horizon=16))

    model = PPO("CnnPolicy", DummyVecEnv([make] * 2), n_steps=16, batch_size=16, n_epochs=1, seed=0)
    model.learn(64)
    assert model.num_timesteps == 64 and len(model.ep_info_buffer) == 64 // 2


@pytest.mark.render
def test_simulator_has_the_spaces_of_its_twin(tiny_checkpoint: Path) -> None:
    prophet = gym.make(ID, checkpoint=str(tiny_checkpoint), judge=always)
    simulator = gym.make("Tabletop-v0")
    assert simulator.action_space == prophet.action_space
    assert simulator.observation_space["state"] == prophet.observation_space["state"]
    assert simulator.unwrapped.horizon == prophet.unwrapped.horizon
    _, info = simulator.reset(seed=0)
    simulator.close()
    _, own = prophet.reset(seed=0)
    assert info.keys() == {*own.keys(), "task"}


@pytest.mark.render
def test_simulators_take_one_snapshot_per_slot() -> None:
    env = gym.make_vec("Tabletop-v0", num_envs=2, horizon=8)
    env.reset(seed=0)
    snapshot = env.envs[1].unwrapped.snapshot()
    env.reset(seed=5)
    observation, info = env.reset(options={"snapshots": [snapshot, snapshot]})
    np.testing.assert_array_equal(observation["image"][0], observation["image"][1])
    with pytest.raises(ValueError, match="2 slots, got 1"):
        env.reset(options={"snapshots": [snapshot]})
    env.close()
