"""Snapshots are validated and immutable; sets survive a folder bit for bit and never appear by halves."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import cv2
import numpy as np
import pytest

from prophet_gym import rotations
from prophet_gym.action_frames import Camera
from prophet_gym.atomic import atomic_folder
from prophet_gym.snapshot import Snapshot, SnapshotSet


def make_snapshot(seed: int = 0, effectors: int = 1, bare: bool = False) -> Snapshot:
    rng = np.random.default_rng(seed)
    pose = np.broadcast_to(np.eye(4), (effectors, 4, 4)).copy()
    pose[:, :3, :3] = rotations.axis_angle_to_matrix(rng.normal(size=(effectors, 3)))
    pose[:, :3, 3] = rng.normal(size=(effectors, 3))
    return Snapshot(
        image=rng.integers(0, 256, (12, 16, 3), dtype=np.uint8),
        instruction=f"put the red block on plate {seed} – gently",
        eef_pose=pose,
        gripper=rng.uniform(size=effectors),
        camera=None if bare else Camera(np.diag([20.1, 20.2, 1]), np.eye(4), 16, 12),
        simulator_state=None if bare else rng.normal(size=9),
        name=f"start_{seed}",
    )


def assert_equal(a: Snapshot, b: Snapshot) -> None:
    for name in (field.name for field in fields(Snapshot)):
        left, right = getattr(a, name), getattr(b, name)
        if isinstance(left, Camera):
            assert left.to_dict() == right.to_dict()
        elif isinstance(left, np.ndarray):
            assert left.dtype == right.dtype
            np.testing.assert_array_equal(left, right)
        else:
            assert left == right


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": np.zeros((12, 16), np.uint8)}, r"image has shape \(12, 16\); expected \(H, W, 3\) RGB"),
        ({"image": np.zeros((12, 16, 4), np.uint8)}, r"image has shape \(12, 16, 4\).*alpha"),
        ({"image": np.zeros((3, 12, 16), np.uint8)}, r"image has shape \(3, 12, 16\)"),
        ({"image": np.zeros((12, 16, 3), np.float32)}, "dtype float32; expected uint8"),
        ({"instruction": None}, "instruction is None; expected a string"),
        ({"eef_pose": np.eye(4)}, r"eef_pose has shape \(4, 4\) and gripper \(1,\); expected \(N, 4, 4\) and \(N,\)"),
        ({"eef_pose": 2 * np.eye(4)[None]}, "rigid transforms"),
        ({"eef_pose": np.full((1, 4, 4), np.nan)}, "rigid transforms"),
        ({"gripper": np.array([-1.0])}, r"gripper is \[-1.0\]; expected open ratios in \[0, 1\]"),
        ({"gripper": np.array([np.nan])}, r"gripper is \[nan\]"),
        ({"gripper": np.zeros(2)}, r"gripper \(2,\)"),
        ({"camera": Camera(np.eye(3), np.eye(4), 64, 64)}, "camera is 64x64 pixels but the image 16x12"),
        ({"simulator_state": np.zeros((2, 2))}, r"simulator_state has shape \(2, 2\)"),
        ({"simulator_state": np.array([0.0, np.nan])}, "finite: False; expected a flat vector of finite"),
    ],
)
def test_bad_fields_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(make_snapshot(), **changes)


def test_arrays_are_copied_and_read_only():
    image = np.zeros((12, 16, 3), np.uint8)
    snapshot = replace(make_snapshot(), image=image)
    image[:] = 7
    assert not snapshot.image.any()
    for array in (snapshot.image, snapshot.eef_pose, snapshot.gripper, snapshot.simulator_state):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0


@pytest.mark.parametrize("effectors", [1, 2])
@pytest.mark.parametrize("bare", [False, True])
def test_sets_survive_a_folder(tmp_path, effectors, bare):
    snapshots = SnapshotSet(make_snapshot(seed, effectors, bare) for seed in range(3))
    snapshots.save(tmp_path / "set")
    again = SnapshotSet.load(tmp_path / "set")
    assert len(again) == 3
    for a, b in zip(snapshots, again, strict=True):
        assert_equal(a, b)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_files_are_plain_rgb_images(tmp_path):
    image = np.zeros((12, 16, 3), np.uint8)
    image[..., 0] = 255
    SnapshotSet([replace(make_snapshot(), image=image)]).save(tmp_path / "set")
    assert cv2.imread(str(tmp_path / "set" / "0000.png"))[0, 0].tolist() == [0, 0, 255]  # cv2 reads BGR: it is red


def test_overwriting_is_refused_unless_asked(tmp_path):
    SnapshotSet([make_snapshot(0), make_snapshot(1)]).save(tmp_path / "set")
    with pytest.raises(ValueError, match="exists already.*overwrite=True"):
        SnapshotSet([make_snapshot(2)]).save(tmp_path / "set")
    assert len(SnapshotSet.load(tmp_path / "set")) == 2
    SnapshotSet([make_snapshot(2)]).save(tmp_path / "set", overwrite=True)
    assert_equal(SnapshotSet.load(tmp_path / "set")[0], make_snapshot(2))
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_sequence_behaviour():
    snapshots = SnapshotSet([make_snapshot(seed) for seed in range(5)])
    assert [s.name for s in snapshots[1:3]] == ["start_1", "start_2"]
    assert isinstance(snapshots[1:3], SnapshotSet) and snapshots[-1].name == "start_4"
    drawn = [snapshots.sample(np.random.default_rng(seed)).name for seed in range(30)]
    assert set(drawn) == {f"start_{i}" for i in range(5)}
    assert drawn == [snapshots.sample(np.random.default_rng(seed)).name for seed in range(30)]
    with pytest.raises(ValueError, match="at least one"):
        SnapshotSet([])
    with pytest.raises(ValueError, match="item 1 is a ndarray"):
        SnapshotSet([make_snapshot(), np.zeros(3)])


def test_foreign_and_damaged_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match="holds no snapshots.json"):
        SnapshotSet.load(tmp_path)
    folder = tmp_path / "set"
    SnapshotSet([make_snapshot()]).save(folder)
    index = folder / "snapshots.json"
    content = json.loads(index.read_text(encoding="utf-8"))

    (folder / "0000.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match="0000.png is missing or damaged"):
        SnapshotSet.load(folder)
    cv2.imwrite(str(folder / "0000.png"), np.zeros((12, 16), np.uint8))
    with pytest.raises(ValueError, match=r"0000.png is an image of shape \(12, 16\).*three channels"):
        SnapshotSet.load(folder)
    (folder / "0000.png").unlink()
    with pytest.raises(ValueError, match="0000.png is missing or damaged"):
        SnapshotSet.load(folder)

    del content["snapshots"][0]["gripper"]
    index.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match="entry with keys"):
        SnapshotSet.load(folder)
    index.write_text(json.dumps({**content, "snapshots": []}), encoding="utf-8")
    with pytest.raises(ValueError, match="set.snapshots.json lists no snapshots"):
        SnapshotSet.load(folder)
    index.write_text('{"format": "other"}', encoding="utf-8")
    with pytest.raises(ValueError, match="format 'other'; expected"):
        SnapshotSet.load(folder)
    index.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="not valid JSON"):
        SnapshotSet.load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (None, "number 1 is None; expected an entry with keys"),
        ({"eef_pose": "x"}, "number 1 is no snapshot: could not convert string to float"),
        ({"gripper": {}}, "number 1 is no snapshot: "),
        ({"camera": 3}, "number 1 is no snapshot: "),
        ({"camera": {"K": 1}}, "number 1 is no snapshot: camera has keys"),
        ({"image": 7}, "7 is missing or damaged"),
    ],
)
def test_damaged_entries_are_named(tmp_path, changes, message):
    SnapshotSet([make_snapshot(0), make_snapshot(1)]).save(tmp_path / "set")
    index = tmp_path / "set" / "snapshots.json"
    content = json.loads(index.read_text(encoding="utf-8"))
    content["snapshots"][1] = None if changes is None else {**content["snapshots"][1], **changes}
    index.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as stopped:
        SnapshotSet.load(tmp_path / "set")
    assert str(tmp_path / "set") in str(stopped.value)


def test_paths_that_are_no_folder_are_told(tmp_path):
    SnapshotSet([make_snapshot()]).save(tmp_path / "set")
    with pytest.raises(ValueError, match="nope is no folder; expected a folder written by SnapshotSet.save"):
        SnapshotSet.load(tmp_path / "nope")
    with pytest.raises(ValueError, match=r"snapshots.json is a file; give its folder, .*set;"):
        SnapshotSet.load(tmp_path / "set" / "snapshots.json")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("thesis.txt", "set also holds thesis.txt, which replacing it would delete"),
        ("photo.png", "also holds photo.png"),
    ],
)
def test_a_folder_with_other_things_is_not_replaced(tmp_path, name, message):
    SnapshotSet([make_snapshot()]).save(tmp_path / "set")
    (tmp_path / "set" / name).write_text("mine")
    with pytest.raises(ValueError, match=message):
        SnapshotSet([make_snapshot(2)]).save(tmp_path / "set", overwrite=True)
    assert (tmp_path / "set" / name).read_text() == "mine" and SnapshotSet.load(tmp_path / "set")[0].name == "start_0"
    (tmp_path / "set" / "snapshots.json").unlink()
    with pytest.raises(ValueError, match=r"set holds no snapshots.json: it is something else"):
        SnapshotSet([make_snapshot(2)]).save(tmp_path / "set", overwrite=True)
    (tmp_path / "empty").mkdir()
    SnapshotSet([make_snapshot(2)]).save(tmp_path / "empty", overwrite=True)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file is a file; expected a folder to replace"):
        SnapshotSet([make_snapshot(2)]).save(tmp_path / "file", overwrite=True)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_writer_in_between_is_not_overrun(tmp_path):
    with (
        pytest.raises(ValueError, match="also holds thesis.txt"),
        atomic_folder(tmp_path / "set", overwrite=True, contents=("index", "*.png")),
    ):
        (tmp_path / "set").mkdir()
        for name in ("index", "thesis.txt"):
            (tmp_path / "set" / name).touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["index", "set", "thesis.txt"]


def test_atomic_folder_leaves_nothing_when_it_fails(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "kept").touch()
    for target in ("new", "old"):
        with pytest.raises(RuntimeError, match="stop"), atomic_folder(tmp_path / target, overwrite=True) as folder:
            (folder / "half").touch()
            raise RuntimeError("stop")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["kept", "old"]
