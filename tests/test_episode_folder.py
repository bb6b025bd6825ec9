"""Episodes come back from disk as they went, never by halves; recorded robot data is read as documented."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from prophet_gym import rotations
from prophet_gym.action_frames import Camera
from prophet_gym.actions import ACTION_SPECS, integrate_poses
from prophet_gym.data import Episode, EpisodeFolder, open_dataset, read_episode, write_episode
from prophet_gym.data.video import read_video, write_video


def make_episode(length: int = 6, size: tuple[int, int] = (24, 32), **changes) -> Episode:
    rng = np.random.default_rng(length)
    spec = ACTION_SPECS["tabletop"]
    actions = spec.action_space(length).low + rng.uniform(size=(length, 7)).astype(np.float32) * 0.05
    start = np.eye(4)[None]
    start[0, 2, 3] = 0.1
    poses = np.concatenate([start[None], integrate_poses(start, spec.to_canonical(actions), spec)])
    values = {
        "images": rng.integers(0, 256, (length + 1, *size, 3), dtype=np.uint8),
        "actions": actions,
        "action_spec": spec,
        "instruction": "put the red block on the blue plate",
        "fps": 10.0,
        "camera": Camera(np.diag([30.3, 30.1, 1]), np.eye(4), size[1], size[0]),
        "eef_pose": poses,
        "gripper": rng.uniform(size=(length + 1, 1)),
        "success": True,
        "labels": {"block_px": rng.normal(size=(length + 1, 2)), "success": np.arange(length + 1) > 3},
        "name": "first",
        "simulator_state": rng.normal(size=21),
        "metadata": {"behaviour": "expert", "seed": 5, "noise": [0.1, None]},
    }
    return Episode(**(values | changes))


def test_round_trip_is_bit_exact(tmp_path):
    episode = make_episode()
    write_episode(tmp_path / "first", episode)
    again = read_episode(tmp_path / "first")
    assert callable(again.images)  # nothing decoded yet
    np.testing.assert_array_equal(again.frames, episode.frames)
    assert again.frames is again.frames and again.frames.dtype == np.uint8
    for key in ("actions", "eef_pose", "gripper", "simulator_state"):
        left, right = getattr(again, key), getattr(episode, key)
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)
    for key in ("action_spec", "instruction", "fps", "success", "name", "metadata"):
        assert getattr(again, key) == getattr(episode, key)
    assert again.camera.to_dict() == episode.camera.to_dict()
    assert set(again.labels) == {"block_px", "success"}
    for key, value in again.labels.items():
        assert value.dtype == episode.labels[key].dtype
        np.testing.assert_array_equal(value, episode.labels[key])
    assert sorted(path.name for path in (tmp_path / "first").iterdir()) == ["data.npz", "image_0.mp4", "meta.json"]


def test_minimal_episode_and_long_gop(tmp_path):
    bare = make_episode(
        40,
        (17, 33),
        camera=None,
        eef_pose=None,
        gripper=None,
        success=None,
        labels={},
        simulator_state=None,
        metadata={},
    )
    write_episode(tmp_path / "bare", bare)
    again = read_episode(tmp_path / "bare")
    np.testing.assert_array_equal(again.frames, bare.frames)
    assert again.camera is again.eef_pose is again.gripper is again.success is again.simulator_state is None
    assert len(again) == 40 and again.labels == {}
    with pytest.raises(ValueError, match="no eef_pose and gripper"):
        again.snapshot()


def test_nothing_is_pickled(tmp_path):
    write_episode(tmp_path / "a", make_episode())
    with np.load(tmp_path / "a" / "data.npz", allow_pickle=False) as data:
        assert all(not data[key].dtype.hasobject for key in data.files)
    with pytest.raises(ValueError, match="label 'x' has dtype object"):
        write_episode(tmp_path / "b", make_episode(labels={"x": np.array([None] * 7)}))
    assert not (tmp_path / "b").exists()


def test_writing_is_atomic_and_refuses_to_overwrite(tmp_path):
    write_episode(tmp_path / "a", make_episode(3))
    with pytest.raises(ValueError, match="exists already.*overwrite=True"):
        write_episode(tmp_path / "a", make_episode(4))
    with pytest.raises(ValueError, match="even sizes"):  # fails half way: neither the old is hurt nor a new one begun
        write_episode(tmp_path / "a", make_episode(4, (17, 33)), overwrite=True, lossless=False)
    assert len(read_episode(tmp_path / "a")) == 3
    write_episode(tmp_path / "a", make_episode(4), overwrite=True)
    assert len(read_episode(tmp_path / "a")) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    (tmp_path / "a" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="also holds notes.txt"):
        write_episode(tmp_path / "a", make_episode(5), overwrite=True)
    assert (tmp_path / "a" / "notes.txt").read_text() == "mine" and len(read_episode(tmp_path / "a")) == 4


def test_lossy_video_is_close_and_even(tmp_path):
    smooth = np.linspace(0, 255, 32)[None, None, :, None] * np.ones((7, 24, 32, 3))
    episode = make_episode(images=smooth.astype(np.uint8))
    write_episode(tmp_path / "a", episode, lossless=False)
    again = read_episode(tmp_path / "a").frames
    assert 0 < np.abs(again.astype(int) - episode.frames).mean() < 6
    with pytest.raises(ValueError, match="33x17 pixels; expected even sizes"):
        write_episode(tmp_path / "b", make_episode(3, (17, 33)), lossless=False)
    assert not (tmp_path / "b").exists()


def test_video_errors(tmp_path):
    with pytest.raises(ValueError, match=r"float64 \(2, 8, 8, 3\); expected uint8"):
        write_video(tmp_path / "x.mp4", np.zeros((2, 8, 8, 3)), 5)
    with pytest.raises(ValueError, match="missing.mp4 cannot be decoded"):
        read_video(tmp_path / "missing.mp4")
    (tmp_path / "bad.mp4").write_bytes(b"nothing of value")
    with pytest.raises(ValueError, match="bad.mp4 cannot be decoded"):
        read_video(tmp_path / "bad.mp4")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": np.zeros((6, 24, 32, 3), np.uint8)}, "6 images for 6 actions; expected 7"),
        ({"images": np.zeros((7, 24, 32), np.uint8)}, r"uint8 \(7, 24, 32\); expected uint8 \(T \+ 1, H, W, 3\)"),
        ({"images": np.zeros((7, 24, 32, 3))}, "float64"),
        ({"images": np.zeros((7, 32, 32, 3), np.uint8)}, "camera is 32x24 pixels but the images 32x32"),
        ({"actions": np.zeros((6, 6))}, r"actions have shape \(6, 6\); expected \(T, 7\)"),
        ({"actions": np.full((6, 7), np.nan)}, "NaN"),
        (
            {"eef_pose": np.zeros((6, 1, 4, 4))},
            r"eef_pose has shape \(6, 1, 4, 4\); expected \(7, 1, 4, 4\) for 6 actions",
        ),
        ({"gripper": np.zeros((7, 2))}, r"gripper has shape \(7, 2\); expected \(7, 1\)"),
        ({"gripper": None}, "only one of eef_pose and gripper"),
        ({"labels": {"a": np.zeros(6)}}, r"label 'a' has shape \(6,\); expected 7 rows for 6 actions"),
        ({"fps": 0}, "fps is 0"),
        ({"instruction": None}, "instruction is None"),
    ],
)
def test_mismatches_are_refused_with_numbers(changes, message):
    with pytest.raises(ValueError, match=message):
        make_episode(**changes)


def test_lazy_images_are_checked_when_decoded():
    episode = make_episode(images=lambda: np.zeros((5, 24, 32, 3), np.uint8))
    with pytest.raises(ValueError, match="episode 'first': 5 images for 6 actions; expected 7"):
        len(episode.frames)


def test_snapshots():
    episode = make_episode()
    start, later = episode.snapshot(), episode.snapshot(6)
    np.testing.assert_array_equal(start.image, episode.frames[0])
    np.testing.assert_array_equal(later.image, episode.frames[6])
    np.testing.assert_array_equal(later.eef_pose, episode.eef_pose[6])
    np.testing.assert_array_equal(start.simulator_state, episode.simulator_state)
    assert later.simulator_state is None  # the recorded state is that of the first image
    assert (start.name, later.name, start.camera) == ("first", "first@6", episode.camera)
    with pytest.raises(ValueError, match="image 7 asked for; expected 0 to 6"):
        episode.snapshot(7)


def test_folder_is_a_sorted_lazy_sequence(tmp_path):
    for name, length in (("b", 3), ("a", 2), ("c", 4)):
        write_episode(tmp_path / name, make_episode(length))
    (tmp_path / ".a.unfinished").mkdir()
    (tmp_path / ".a.unfinished" / "meta.json").touch()
    (tmp_path / "notes.txt").touch()
    folder = EpisodeFolder(tmp_path)
    assert folder.names == ("a", "b", "c") and len(folder) == 3
    assert [len(episode) for episode in folder] == [2, 3, 4]
    assert folder[-1].name == "c" and [e.name for e in folder[:2]] == ["a", "b"]
    with pytest.raises(IndexError):
        folder[3]
    with pytest.raises(ValueError, match="holds no episodes"):
        EpisodeFolder(tmp_path / "a")
    with pytest.raises(ValueError, match="is no folder"):
        EpisodeFolder(tmp_path / "nowhere")


def test_damaged_folders_are_named(tmp_path):
    folder = tmp_path / "a"
    write_episode(folder, make_episode())
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))

    def rewrite(**changes) -> None:
        (folder / "meta.json").write_text(json.dumps(meta | changes), encoding="utf-8")

    with pytest.raises(ValueError, match="no camera 'wrist'; expected 'image_0'"):
        read_episode(folder, camera_name="wrist")
    rewrite(format="prophet_gym.episode/9")
    with pytest.raises(ValueError, match="format 'prophet_gym.episode/9'; this version reads"):
        read_episode(folder)
    rewrite(action_spec=meta["action_spec"] | {"unit": "mm"})
    with pytest.raises(ValueError, match="unknown key.*'unit'"):
        read_episode(folder)
    (folder / "meta.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match="holds a list"):
        read_episode(folder)
    (folder / "meta.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_episode(folder)
    rewrite()
    (folder / "image_0.mp4").unlink()
    with pytest.raises(ValueError, match="image_0.mp4 cannot be decoded"):
        read_episode(folder).frames  # noqa: B018
    (folder / "data.npz").write_bytes(b"zip?")
    with pytest.raises(ValueError, match="data.npz cannot be read"):
        read_episode(folder)
    with pytest.raises(ValueError, match="holds no meta.json"):
        read_episode(tmp_path)


def write_recording(folder, *, frames: int = 5, rows: int = 5, dataset: str = "DROID", gripper: float = 0.25) -> None:
    """A miniature of the recorded layout: T images and T rows, two cameras, closed ratio in the poses."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index, camera in enumerate(("exterior_1", "wrist")):
        write_video(folder / f"{camera}.mp4", np.full((frames, 16, 16, 3), 50 + 100 * index, np.uint8), 4)
    pose = np.concatenate([rng.normal(size=(rows, 6)) * 0.3, np.full((rows, 1), gripper)], axis=1)
    np.savez(folder / "data.npz", action=np.zeros((rows, 7), np.float32), eef_pose=pose, joints=np.zeros((rows, 3)))
    meta = {"dataset": dataset, "instruction": None, "num_frames": 5, "fps": 4, "success": 0}
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


@pytest.mark.parametrize("frames", [5, 6])
def test_recording_layout(tmp_path, frames):
    write_recording(tmp_path / "r", frames=frames)  # one extra video frame is dropped
    episode = read_episode(tmp_path / "r")
    assert len(episode) == 4 and episode.frames.shape == (5, 16, 16, 3)
    assert episode.gripper.tolist() == [[0.75]] * 5
    assert (episode.instruction, episode.fps, episode.success) == ("", 4.0, False)
    assert episode.action_spec == replace(ACTION_SPECS["droid"], control_hz=4.0)
    assert list(episode.labels) == ["joints"] and episode.metadata["camera_name"] == "exterior_1"
    assert read_episode(tmp_path / "r", camera_name="wrist").frames.mean() == 150
    assert EpisodeFolder(tmp_path, camera_name="wrist")[0].frames.mean() == 150
    with pytest.raises(ValueError, match=r"no camera 'top'; expected one of \['exterior_1', 'wrist'\]"):
        read_episode(tmp_path / "r", camera_name="top")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": 7}, "7 images for 4 actions; expected 5"),
        ({"rows": 4}, "4 actions for num_frames=5"),
        ({"dataset": "RT-1"}, "dataset is 'RT-1', whose conventions are unknown"),
        ({"gripper": -1.0}, r"grippers span \[2.000, 2.000\] as open ratios; expected \[0, 1\]"),
    ],
)
def test_contradictory_recordings_are_refused(tmp_path, changes, message):
    write_recording(tmp_path / "r", **changes)
    with pytest.raises(ValueError, match=message):
        read_episode(tmp_path / "r").frames  # noqa: B018


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("num_frames", "meta.json: KeyError 'num_frames'; expected numbers"),
        ("fps", "meta.json: KeyError 'fps_native_control'; expected numbers as num_frames and as fps"),
        ("action", r"data.npz holds \['eef_pose', 'joints'\], no 'action': restore the file"),
        ("eef_pose", r"data.npz: 'eef_pose' is float64 \(5, 6\); expected numbers \(T, 7\)"),
    ],
)
def test_damaged_recordings_are_named_and_skipped(tmp_path, lost, message):
    write_recording(tmp_path / "a")
    write_recording(tmp_path / "b")
    meta = json.loads((tmp_path / "a" / "meta.json").read_text(encoding="utf-8"))
    meta.pop(lost, None)
    (tmp_path / "a" / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    with np.load(tmp_path / "a" / "data.npz") as data:
        arrays = {key: data[key] for key in data.files if key != lost}
    if lost == "eef_pose":
        arrays[lost] = np.zeros((5, 6))
    np.savez(tmp_path / "a" / "data.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        read_episode(tmp_path / "a")
    sound = open_dataset(tmp_path, on_error="skip")
    assert sound.names == ("b",) and [bad.name for bad in sound.skipped] == ["a"]
    (tmp_path / "a" / "meta.json").write_text(json.dumps(meta | {"num_frames": None}), encoding="utf-8")
    with pytest.raises(ValueError, match="meta.json: TypeError"):
        read_episode(tmp_path / "a")


# Recorded robot data


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "count", "size"), [("bridge", 8, (256, 256)), ("bridge64", 20, (64, 64)), ("droid", 19, (192, 320))]
)
def test_recorded_sets(recordings, name, count, size):
    folder = EpisodeFolder(recordings / name)
    assert len(folder) == count
    for episode in folder:
        assert (episode.eef_pose is None) == (name == "bridge")
        episode.action_spec.check(episode.actions, len(episode))  # in bounds
    longest = folder[0]
    assert longest.frames.shape == (len(longest) + 1, *size, 3)


@pytest.mark.data
def test_extra_video_frames_are_dropped(recordings):
    for name in ("droid_new_setup_val_0003", "droid_new_setup_val_0006"):
        episode = read_episode(recordings / "droid" / name, camera_name="wrist")
        assert len(episode.frames) == len(episode) + 1 == len(episode.eef_pose)


@pytest.mark.data
def test_jpeg_cameras_differ(recordings):
    path = recordings / "bridge64" / "ep_000"
    views = [read_episode(path, camera_name=f"image_{i}").frames for i in range(3)]
    assert views[0].shape == (10, 64, 64, 3)
    assert np.abs(views[0].astype(int) - views[1]).mean() > 5 and np.abs(views[1].astype(int) - views[2]).mean() > 5
    with pytest.raises(ValueError, match="expected one of"):
        read_episode(path, camera_name="wrist")


@pytest.mark.data
def test_droid_actions_integrate_to_the_measured_poses(recordings):
    """The servo semantics, Euler order and frames are right: the derived actions lead along the measured path."""
    for episode in EpisodeFolder(recordings / "droid"):
        poses = integrate_poses(episode.eef_pose[0], episode.canonical_actions, episode.action_spec)
        np.testing.assert_allclose(poses[..., :3, 3], episode.eef_pose[1:, :, :3, 3], atol=1e-4)
        turned = np.swapaxes(poses[..., :3, :3], -1, -2) @ episode.eef_pose[1:, :, :3, :3]
        assert np.linalg.norm(rotations.matrix_to_axis_angle(turned), axis=-1).max() < 1e-3
        # The gripper command is the opening of the next image: same convention, whatever the state's was.
        np.testing.assert_allclose(episode.canonical_actions[:, 0, 6], episode.gripper[1:, 0], atol=1e-5)


@pytest.mark.data
def test_bridge_motion_follows_the_commands(recordings):
    """Sign and frame of the 'difference' semantics: measured motion goes where the commands say."""
    commanded, measured = [], []
    for episode in EpisodeFolder(recordings / "bridge64"):
        poses = integrate_poses(episode.eef_pose[0], episode.canonical_actions, episode.action_spec)
        commanded.append(poses[-1, 0, :3, 3] - episode.eef_pose[0, 0, :3, 3])
        measured.append(episode.eef_pose[-1, 0, :3, 3] - episode.eef_pose[0, 0, :3, 3])
    a, b = np.concatenate(commanded), np.concatenate(measured)
    assert a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) > 0.9


@pytest.mark.data
def test_recorded_episode_can_be_rewritten_in_our_layout(recordings, tmp_path):
    episode = read_episode(recordings / "bridge64" / "ep_010", camera_name="image_1")
    write_episode(tmp_path / "copy", episode)
    again = read_episode(tmp_path / "copy")
    np.testing.assert_array_equal(again.frames, episode.frames)
    np.testing.assert_array_equal(again.eef_pose, episode.eef_pose)
    assert again.metadata == episode.metadata and again.instruction == episode.instruction
    assert again.snapshot(3).num_effectors == 1


def test_metadata_that_is_no_json_is_refused(tmp_path):
    broken = make_episode(metadata={"distance": float("nan")})
    with pytest.raises(ValueError, match=r"metadata \{'distance': nan\}.*expected strings, finite numbers"):
        write_episode(tmp_path / "nan", broken)
    with pytest.raises(ValueError, match="object is not JSON serializable"):
        write_episode(tmp_path / "object", make_episode(metadata={"x": object()}))
    assert not list(tmp_path.iterdir())
