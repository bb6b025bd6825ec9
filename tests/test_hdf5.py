"""Demonstrations in HDF5: LIBERO's files (upside down, seen after the command) and robomimic's (neither)."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from prophet_gym import rotations
from prophet_gym.actions import ACTION_SPECS
from prophet_gym.data import CARDS, StateLayout, open_dataset
from prophet_gym.errors import MissingExtraError

LENGTH = 6


def pictures(seed: int, camera: str = "agentview") -> np.ndarray:
    """Random upright images (LENGTH, 12, 16, 3)."""
    return np.random.default_rng((seed, len(camera))).integers(0, 256, (LENGTH, 12, 16, 3), dtype=np.uint8)


def numbers(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng((seed, 1))
    return {
        "actions": rng.uniform(-1, 1, (LENGTH, 7)),
        "position": rng.normal(size=(LENGTH, 3)),
        "turn": rng.uniform(-1, 1, (LENGTH, 3)),
        "fingers": rng.uniform(0, 0.04, (LENGTH, 1)) * [1, -1],
    }


def make_libero(path: Path, demos: tuple[int, ...] = (0, 1, 10, 2), rate: int = 20, **attributes) -> Path:
    """As LIBERO's create_dataset.py writes them."""
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        problem = {"problem_name": "tabletop", "language_instruction": "pick up the black bowl"}
        data.attrs["problem_info"] = json.dumps(problem)
        data.attrs["env_args"] = json.dumps({"type": 1, "env_kwargs": {"control_freq": rate}})
        data.attrs["macros_image_convention"] = "opengl"
        for key, value in attributes.items():
            data.attrs[key] = value
        for i in demos:
            rows, demo = numbers(i), data.create_group(f"demo_{i}")
            demo["actions"] = rows["actions"]
            demo["rewards"] = np.arange(LENGTH) == LENGTH - 1
            obs = demo.create_group("obs")
            obs["ee_states"] = np.concatenate([rows["position"], rows["turn"]], axis=1)
            obs["ee_pos"], obs["ee_ori"], obs["gripper_states"] = rows["position"], rows["turn"], rows["fingers"]
            obs["agentview_rgb"] = pictures(i)[:, ::-1]
            obs["eye_in_hand_rgb"] = pictures(i, "eye_in_hand")[:, ::-1]
    return path


def make_robomimic(path: Path) -> Path:
    """As robomimic's dataset_states_to_obs.py writes them: next to obs, and quaternions x y z w."""
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps({"env_name": "Lift", "type": 1, "env_kwargs": {"control_freq": 20}})
        rows, demo = numbers(0), data.create_group("demo_0")
        demo["actions"] = rows["actions"]
        obs = demo.create_group("obs")
        quaternion = rotations.axis_angle_to_quaternion(rows["turn"])
        obs["robot0_eef_pos"], obs["robot0_eef_quat"] = rows["position"], quaternion[:, [1, 2, 3, 0]]
        obs["robot0_gripper_qpos"], obs["agentview_image"] = rows["fingers"], pictures(0)
    return path


def test_libero_files_are_upright_aligned_and_in_order(tmp_path):
    episodes = open_dataset(make_libero(tmp_path / "bowl_demo.hdf5"))
    assert episodes.names == ("demo_0", "demo_1", "demo_2", "demo_10")  # by number, not by spelling
    for i, episode in zip((0, 1, 2, 10), episodes, strict=True):
        rows = numbers(i)
        assert callable(episode.images)
        np.testing.assert_array_equal(episode.frames, pictures(i))  # stored upside down
        np.testing.assert_array_equal(
            episode.actions, rows["actions"][1:].astype(np.float32)
        )  # obs[t] follows action t
        np.testing.assert_allclose(episode.eef_pose[:, 0, :3, 3], rows["position"])
        np.testing.assert_allclose(episode.eef_pose[:, 0, :3, :3], rotations.axis_angle_to_matrix(rows["turn"]))
        np.testing.assert_allclose(episode.gripper[:, 0], rows["fingers"][:, 0] / 0.04)
        assert (episode.instruction, episode.fps, episode.success) == ("pick up the black bowl", 20.0, True)
    assert episode.action_spec == ACTION_SPECS["libero"]
    # OSC_POSE: 1 is 5 cm, and -1 opens the gripper
    np.testing.assert_allclose(episode.canonical_actions[:, 0, 0], episode.actions[:, 0] * 0.05, rtol=1e-6)
    np.testing.assert_allclose(episode.canonical_actions[:, 0, 6], (1 - episode.actions[:, 6]) / 2, atol=1e-6)


def test_the_image_convention_of_the_file_counts(tmp_path):
    """Files rendered with robosuite's "opencv" convention are upright already."""
    path = make_libero(tmp_path / "a.hdf5", macros_image_convention="opencv")
    np.testing.assert_array_equal(open_dataset(path)[0].frames, pictures(0)[:, ::-1])


def test_robomimic_files_are_upright_and_seen_before_the_command(tmp_path):
    layout = StateLayout(rotation=(3, 4, 5, 6), rotation_kind="quaternion_xyzw", gripper=(7, 8), closed=0.0, open=0.04)
    episode = open_dataset(make_robomimic(tmp_path / "lift.hdf5"), card=replace(CARDS["libero"], state=(layout,)))[0]
    rows = numbers(0)
    np.testing.assert_array_equal(episode.frames, pictures(0))
    np.testing.assert_array_equal(episode.actions, rows["actions"][:-1].astype(np.float32))
    np.testing.assert_allclose(episode.eef_pose[:, 0, :3, :3], rotations.axis_angle_to_matrix(rows["turn"]), atol=1e-9)
    assert (
        episode.instruction == "" and episode.success is None and episode.metadata["camera_name"] == "agentview_image"
    )


@pytest.mark.parametrize(
    ("make", "kind", "held"),
    [
        (make_robomimic, "axis_angle", r"robot0_eef_quat, robot0_gripper_qpos hold rotations as quaternion_xyzw"),
        (make_robomimic, "quaternion_wxyz", r"hold rotations as quaternion_xyzw"),
        (make_libero, "quaternion_xyzw", r"ee_states, gripper_states hold rotations as axis_angle"),
    ],
)
def test_rotations_of_another_kind_are_refused_with_the_layout_to_use(tmp_path, make, kind, held):
    card = CARDS["libero"]
    if kind != "axis_angle":
        card = replace(card, state=(StateLayout(rotation=(3, 4, 5, 6), rotation_kind=kind, gripper=(7,), open=0.04),))
    with pytest.raises(
        ValueError, match=held + rf", but card 'libero' reads {kind}. Use dataclasses.replace"
    ) as caught:
        open_dataset(make(tmp_path / "a.hdf5"), card=card)[0]
    shown = re.search(r"state=\((.*\)),\)\), the same", str(caught.value))
    assert shown is not None
    fitting = eval(shown[1], {"StateLayout": StateLayout})
    episode = open_dataset(tmp_path / "a.hdf5", card=replace(card, state=(fitting,)))[0]
    turn = rotations.axis_angle_to_matrix(numbers(0)["turn"])
    np.testing.assert_allclose(episode.eef_pose[:, 0, :3, :3], turn, atol=1e-9)
    np.testing.assert_allclose(episode.gripper[:, 0], numbers(0)["fingers"][:, 0] / 0.04)
    assert open_dataset(tmp_path / "a.hdf5", card=replace(card, state=None))[0].eef_pose is None


def test_folders_and_cameras(tmp_path):
    make_libero(tmp_path / "b_demo.hdf5", demos=(0,))
    make_libero(tmp_path / "a_demo.hdf5", demos=(0, 1))
    episodes = open_dataset(tmp_path, camera="eye_in_hand_rgb")
    assert episodes.names == ("a_demo/demo_0", "a_demo/demo_1", "b_demo/demo_0")
    np.testing.assert_array_equal(episodes[1].frames, pictures(1, "eye_in_hand"))
    with pytest.raises(ValueError, match=r"'demo_0': no images 'agentview_rbg'.*Did you mean 'agentview_rgb'"):
        open_dataset(tmp_path, camera="agentview_rbg")[0]


def test_faults_name_file_demonstration_and_fix(tmp_path):
    path = make_libero(tmp_path / "a.hdf5")
    with h5py.File(path, "r+") as file:
        file["data/demo_1/actions"][3, 5] = np.nan
        del file["data/demo_2/actions"]
        del file["data/demo_10/obs/gripper_states"]
        file["data/demo_10/obs/gripper_states"] = np.zeros((LENGTH - 1, 2))
    episodes = open_dataset(path)
    with pytest.raises(ValueError, match=r"a.hdf5, episode 'demo_1': action row 3, number 5 is nan.*on_error=.skip."):
        episodes[1]
    with pytest.raises(ValueError, match=r"a.hdf5, episode 'demo_2': no 'actions' in .*expected one of"):
        episodes[2]
    with pytest.raises(ValueError, match=r"'demo_10': \{'ee_states': 6, 'gripper_states': 5\} rows; expected as many"):
        episodes[3]
    sound = open_dataset(path, on_error="skip")
    assert sound.names == ("demo_0",) and [bad.name for bad in sound.skipped] == ["demo_1", "demo_2", "demo_10"]


def test_flipped_gripper_units_are_refused(tmp_path):
    metres = replace(CARDS["libero"], state=(StateLayout(rotation_kind="axis_angle", gripper=(6,), open=0.004),))
    with pytest.raises(ValueError, match="measured gripper reads"):
        open_dataset(make_libero(tmp_path / "a.hdf5"), card=metres)[0]


def test_rates_must_agree(tmp_path):
    path = make_libero(tmp_path / "a.hdf5", rate=10)
    with pytest.raises(ValueError, match=r"a.hdf5: recorded at 10 Hz, but card 'libero' says 20 Hz"):
        open_dataset(path)[0]
    assert open_dataset(path, card=replace(CARDS["libero"], control_hz=None))[0].fps == 10


def test_truncated_and_foreign_files(tmp_path):
    path = make_libero(tmp_path / "a.hdf5")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="a.hdf5 cannot be read as HDF5 .*restore the file"):
        open_dataset(path)
    with h5py.File(tmp_path / "b.hdf5", "w") as file:
        file["x"] = 1
    with pytest.raises(ValueError, match="b.hdf5 holds no data/demo_<i>"):
        open_dataset(tmp_path / "b.hdf5")


def test_without_h5py_the_pip_line_is_shown(tmp_path, monkeypatch):
    path = make_libero(tmp_path / "a.hdf5")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(MissingExtraError, match=r'HDF5 demonstrations needs h5py: pip install "prophet-gym\[data\]"'):
        open_dataset(path)
