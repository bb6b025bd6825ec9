"""Conventions round-trip, poses integrate as the paper says, bad actions are refused with reasons."""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import replace

import numpy as np
import pytest

from prophet_gym import rotations
from prophet_gym.actions import (
    ACTION_SPECS,
    PAD_GRIPPER,
    ActionSpec,
    gripper_from_open_ratio,
    gripper_to_open_ratio,
    integrate_poses,
    pad_chunk,
    pad_effectors,
    state_vector,
)

GRIPPERS = ("open_ratio", "closed_ratio", "open_positive", "close_positive")
DELTAS = ("local", "servo", "difference")


def spec_of(gripper: str = "open_ratio", rotation: str = "euler_xyz", delta: str = "servo", **changes) -> ActionSpec:
    low_gripper = 0.0 if gripper.endswith("ratio") else -1.0
    return ActionSpec(
        delta=delta, rotation=rotation, gripper=gripper, low=(-1.0,) * 6 + (low_gripper,), high=(1.0,) * 7, **changes
    )


def random_poses(rng: np.random.Generator, *batch: int) -> np.ndarray:
    poses = np.zeros((*batch, 4, 4))
    poses[..., :3, :3] = rotations.axis_angle_to_matrix(rng.normal(size=(*batch, 3)))
    poses[..., :3, 3] = rng.uniform(-0.1, 0.1, (*batch, 3))
    poses[..., 3, 3] = 1.0
    return poses


def random_actions(rng: np.random.Generator, *batch: int) -> np.ndarray:
    actions = rng.normal(0, 0.02, (*batch, 7))
    actions[..., 3:6] *= 5
    actions[..., 6] = rng.uniform(0, 1, batch)
    return actions


# Conversion


@pytest.mark.parametrize(("gripper", "rotation"), list(itertools.product(GRIPPERS, ("euler_xyz", "axis_angle"))))
def test_native_to_canonical_and_back(gripper, rotation):
    spec = spec_of(gripper, rotation, position_scale=0.05, rotation_scale=0.5, num_effectors=2)
    rng = np.random.default_rng(0)
    low, high = np.tile(spec.low, 2), np.tile(spec.high, 2)
    native = rng.uniform(low, high, (3, 5, 14)).astype(np.float32)
    canonical = spec.to_canonical(native)
    assert canonical.shape == (3, 5, 2, 7) and canonical.dtype == np.float32
    assert canonical[..., 6].min() >= 0 and canonical[..., 6].max() <= 1
    np.testing.assert_allclose(canonical[..., :3], native.reshape(3, 5, 2, 7)[..., :3] * 0.05, atol=1e-7)
    back = spec.from_canonical(canonical)
    assert back.shape == native.shape and back.dtype == np.float32
    np.testing.assert_allclose(back, native, atol=1e-6)


def test_axis_angle_becomes_the_same_rotation():
    spec = ACTION_SPECS["libero"]
    native = np.array([0, 0, 0, 0.4, -0.8, 0.6, 0.0])
    euler = spec.to_canonical(native)[0, 3:6]
    np.testing.assert_allclose(
        rotations.euler_to_matrix(euler), rotations.axis_angle_to_matrix(native[3:6] * 0.5), atol=1e-6
    )


def test_euler_differences_are_only_scaled():
    spec = spec_of(delta="difference")
    native = np.array([0, 0, 0, 3.5, -2.0, 4.0, 1.0])  # beyond what one rotation can be: still a difference of angles
    np.testing.assert_allclose(spec.to_canonical(native)[0, 3:6], native[3:6], rtol=1e-6)


@pytest.mark.parametrize(
    ("convention", "closed", "opened"),
    [("open_ratio", 0, 1), ("closed_ratio", 1, 0), ("open_positive", -1, 1), ("close_positive", 1, -1)],
)
def test_gripper_conventions(convention, closed, opened):
    values = np.array([closed, opened])
    np.testing.assert_array_equal(gripper_to_open_ratio(values, convention), [0, 1])
    np.testing.assert_array_equal(gripper_from_open_ratio(np.array([0, 1]), convention), values)


def test_libero_minus_one_opens():
    assert ACTION_SPECS["libero"].to_canonical(np.array([0, 0, 0, 0, 0, 0, -1.0]))[0, 6] == 1.0


@pytest.mark.parametrize("name", ACTION_SPECS)
def test_named_specs(name):
    spec = ACTION_SPECS[name]
    assert ActionSpec.from_dict(spec.to_dict()) == spec
    space = spec.action_space(5)
    assert space.shape == (5, 7 * spec.num_effectors) and space.dtype == np.float32
    space.seed(0)
    sample = space.sample()
    np.testing.assert_array_equal(spec.check(sample, 20), sample)
    assert spec.to_canonical(sample).shape == (5, spec.num_effectors, 7)


def test_spec_survives_json():
    for spec in ACTION_SPECS.values():
        assert ActionSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


# Integration


def reference(pose: np.ndarray, actions: np.ndarray, delta: str) -> list[np.ndarray]:
    """One end-effector, one command at a time, with 4x4 products and Euler angles as 3.2.1 puts it."""
    poses = []
    for action in actions:
        move = np.eye(4)
        move[:3, :3] = rotations.euler_to_matrix(action[3:6])
        move[:3, 3] = action[:3]
        if delta == "local":
            pose = pose @ move
        else:
            nxt = np.eye(4)
            nxt[:3, 3] = pose[:3, 3] + action[:3]
            if delta == "servo":
                nxt[:3, :3] = move[:3, :3] @ pose[:3, :3]
            else:
                nxt[:3, :3] = rotations.euler_to_matrix(rotations.matrix_to_euler(pose[:3, :3]) + action[3:6])
            pose = nxt
        poses.append(pose)
    return poses


@pytest.mark.parametrize("delta", DELTAS)
def test_integration_equals_the_definition(delta):
    rng = np.random.default_rng(1)
    spec = spec_of(delta=delta, num_effectors=2)
    poses, actions = random_poses(rng, 3, 2), random_actions(rng, 3, 6, 2)
    result = integrate_poses(poses, actions, spec)
    assert result.shape == (3, 6, 2, 4, 4) and result.dtype == np.float64
    for b, n in itertools.product(range(3), range(2)):
        np.testing.assert_allclose(result[b, :, n], reference(poses[b, n], actions[b, :, n], delta), atol=1e-12)


def test_differences_pass_vertical_pitch_like_single_commands():
    rng = np.random.default_rng(8)
    spec = spec_of(delta="difference")
    poses, actions = random_poses(rng, 1), np.zeros((60, 1, 7))
    actions[:, 0, 3:6] = [0.02, 0.35, -0.03]  # three turns of pitch
    np.testing.assert_allclose(
        integrate_poses(poses, actions, spec)[:, 0], reference(poses[0], actions[:, 0], "difference"), atol=1e-9
    )


def test_local_is_right_composition():
    pose = np.eye(4)
    pose[:3, :3] = rotations.euler_to_matrix(np.array([0, 0, np.pi / 2]))
    forward = np.array([[[0.1, 0, 0, 0, 0, 0, 1.0]]])  # along the effector's x, which is the world's y
    for delta, expected in (("local", [0, 0.1, 0]), ("servo", [0.1, 0, 0]), ("difference", [0.1, 0, 0])):
        result = integrate_poses(pose[None], forward, spec_of(delta=delta))
        np.testing.assert_allclose(result[0, 0, :3, 3], expected, atol=1e-15)


@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("workspace", [None, ((-0.05, -0.05, -0.05), (0.05, 0.05, 0.05))])
def test_chunks_can_be_split_anywhere(delta, workspace):
    rng = np.random.default_rng(2)
    spec = spec_of(delta=delta, workspace=workspace)
    poses, actions = random_poses(rng, 4, 1), random_actions(rng, 4, 20, 1)
    whole = integrate_poses(poses, actions, spec)
    first = integrate_poses(poses, actions[:, :7], spec)
    second = integrate_poses(first[:, -1], actions[:, 7:], spec)
    np.testing.assert_allclose(np.concatenate([first, second], 1), whole, atol=1e-12)


@pytest.mark.parametrize("delta", DELTAS)
def test_rotations_stay_orthonormal(delta):
    rng = np.random.default_rng(3)
    spec = spec_of(delta=delta)
    poses = integrate_poses(random_poses(rng, 2, 1), random_actions(rng, 2, 1000, 1), spec)
    last = poses
    for _ in range(50):  # and through chunks that hand their last pose on
        last = integrate_poses(last[:, -1], random_actions(rng, 2, 20, 1), spec)
    for result in (poses, last):
        R = result[..., :3, :3]
        assert np.abs(R @ np.swapaxes(R, -1, -2) - np.eye(3)).max() < 1e-12
        np.testing.assert_allclose(np.linalg.det(R), 1.0, atol=1e-12)
    np.testing.assert_array_equal(poses[..., 3, :], np.broadcast_to([0, 0, 0, 1.0], poses[..., 3, :].shape))


def test_workspace_clamps_every_command():
    spec = spec_of(workspace=((-0.1, -0.1, 0.02), (0.1, 0.1, 0.2)))
    pose = np.eye(4)[None]
    pose[0, :3, 3] = [0.09, 0, 0.1]
    actions = np.zeros((3, 1, 7))
    actions[:, 0, 0] = [0.03, 0.03, -0.03]
    x = integrate_poses(pose, actions, spec)[:, 0, 0, 3]
    np.testing.assert_allclose(x, [0.1, 0.1, 0.07])  # clamped at once, not accumulated beyond the wall


@pytest.mark.parametrize("delta", DELTAS)
def test_padding_repeats_the_last_pose(delta):
    rng = np.random.default_rng(4)
    spec = spec_of(delta=delta)
    poses = random_poses(rng, 1)
    actions = random_actions(rng, 3, 1)
    padded = integrate_poses(poses, pad_chunk(actions, 8), spec)
    np.testing.assert_allclose(padded[:3], integrate_poses(poses, actions, spec), atol=1e-15)
    np.testing.assert_allclose(padded[3:], np.broadcast_to(padded[2], (5, 1, 4, 4)), atol=1e-12)


def test_batch_rows_do_not_depend_on_each_other():
    rng = np.random.default_rng(5)
    for delta in DELTAS:
        spec = spec_of(delta=delta)
        poses, actions = random_poses(rng, 5, 1), random_actions(rng, 5, 9, 1)
        batch = integrate_poses(poses, actions, spec)
        for b in range(5):
            np.testing.assert_array_equal(batch[b], integrate_poses(poses[b], actions[b], spec))


@pytest.mark.parametrize("name", ["tabletop", "bridge"])
def test_integration_is_fast(name):
    rng = np.random.default_rng(6)
    poses, actions = random_poses(rng, 32, 1), random_actions(rng, 32, 20, 1)
    times = []
    for _ in range(20):
        start = time.process_time()
        integrate_poses(poses, actions, ACTION_SPECS[name])
        times.append(time.process_time() - start)
    assert min(times) < 3e-3


def test_inputs_are_not_written():
    rng = np.random.default_rng(7)
    poses, actions = random_poses(rng, 1), random_actions(rng, 4, 1)
    before = poses.copy(), actions.copy()
    integrate_poses(poses, actions, ACTION_SPECS["tabletop"])[:] = 0
    pad_chunk(actions, 4)[:] = 0
    pad_effectors(actions, 1)[:] = 0
    np.testing.assert_array_equal(poses, before[0])
    np.testing.assert_array_equal(actions, before[1])


# Padding and state


def test_pad_chunk_flags_the_gripper():
    actions = random_actions(np.random.default_rng(0), 2, 3, 1).astype(np.float32)
    padded = pad_chunk(actions, 5)
    assert padded.shape == (2, 5, 1, 7) and padded.dtype == np.float32
    np.testing.assert_array_equal(padded[:, :3], actions)
    assert (padded[:, 3:, :, :6] == 0).all() and (padded[:, 3:, :, 6] == PAD_GRIPPER).all()
    with pytest.raises(ValueError, match="3 commands; expected at most 2"):
        pad_chunk(actions, 2)


def test_pad_effectors_with_zeros():
    actions = random_actions(np.random.default_rng(0), 3, 1)
    padded = pad_effectors(actions, 2)
    np.testing.assert_array_equal(padded[:, :1], actions)
    assert (padded[:, 1] == 0).all()
    with pytest.raises(ValueError, match="N at most 1"):
        pad_effectors(padded, 1)


def test_state_vector_layout():
    poses = np.eye(4)[None, None].repeat(2, 1)
    poses[0, 0, :3, 3] = [0.1, 0.2, 0.3]
    poses[0, 1, :3, :3] = rotations.axis_angle_to_matrix(np.array([0, 0.5, 0]))
    state = state_vector(poses, np.array([[0.25, 1.0]]))
    assert state.shape == (1, 16) and state.dtype == np.float32
    np.testing.assert_allclose(state[0], [0.1, 0.2, 0.3, 0, 0, 0, 0.25, 0, 0, 0, 0, 0, 0.5, 0, 1, 0], atol=1e-7)
    with pytest.raises(ValueError, match=r"gripper \(1, 3\)"):
        state_vector(poses, np.zeros((1, 3)))


# Errors


def test_check_accepts_all_lengths_and_copies():
    spec = ACTION_SPECS["tabletop"]
    for length in range(1, 21):
        action = np.zeros((length, 7), np.float64)
        checked = spec.check(action, 20)
        assert checked.dtype == np.float32 and checked.shape == (length, 7)
    same = np.zeros((4, 7), np.float32)
    assert not np.shares_memory(spec.check(same, 20), same)
    assert spec.check(np.zeros((3, 4, 7)), 20, num_envs=3).shape == (3, 4, 7)


@pytest.mark.parametrize(
    ("action", "num_envs", "message"),
    [
        (np.zeros(7), None, r"shape \(7,\); expected \(C, 7\).*action\[None\]"),
        (np.zeros((4, 6)), None, r"shape \(4, 6\); expected \(C, 7\)"),
        (np.zeros((0, 7)), None, r"shape \(0, 7\); expected \(C, 7\) with 1 <= C <= 20"),
        (np.zeros((2, 4, 7)), None, r"shape \(2, 4, 7\); expected \(C, 7\)"),
        (np.zeros((2, 4, 7)), 3, r"shape \(2, 4, 7\); expected \(3, C, 7\)"),
        (np.zeros((21, 7)), None, r"21 commands; expected at most 20.*Split"),
        (np.full((4, 7), np.nan), None, r"action\[0, 0\] is nan; expected finite"),
        (np.full((4, 7), np.inf), None, r"action\[0, 0\] is inf; expected finite"),
        (np.array([["a"] * 7]), None, r"dtype <U1; expected real numbers"),
    ],
)
def test_check_refuses(action, num_envs, message):
    with pytest.raises(ValueError, match=message):
        ACTION_SPECS["tabletop"].check(action, 20, num_envs=num_envs)


def test_check_names_the_number_out_of_bounds():
    spec = ACTION_SPECS["tabletop"]
    action = np.zeros((4, 7))
    action[2, 1] = 0.05
    with pytest.raises(ValueError, match=r"action\[2, 1\] is 0.05; expected -0.04 to 0.04 \(dy\); 1 of 28"):
        spec.check(action, 20)
    action[2, 1] = 0.04 + 5e-7  # rounding is no error
    spec.check(action, 20)
    action[0, 6] = -1.0
    with pytest.raises(ValueError, match=r"action\[0, 6\] is -1; expected 0 to 1 \(gripper, open_ratio\)"):
        spec.check(action, 20)
    with pytest.raises(ValueError, match=r"action\[0, 9\].*\(dz, end-effector 1\)"):
        ACTION_SPECS["agibot"].check(np.eye(1, 14, 9), 20)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"delta": "serv"}, "delta is 'serv'.*Did you mean 'servo'"),
        ({"rotation": "quaternion"}, "rotation is 'quaternion'; expected one of"),
        ({"gripper": "open"}, "gripper is 'open'"),
        ({"num_effectors": 0}, "num_effectors is 0"),
        ({"delta": "difference"}, "must be 'euler_xyz'"),
        ({"position_scale": 0}, "position_scale is 0"),
        ({"control_hz": float("nan")}, "control_hz is nan"),
        ({"low": (0.0,) * 6}, "expected 7 numbers each"),
        ({"gripper": "open_positive"}, r"gripper \[0, 1\]; 'open_positive' spans \[-1"),
        ({"workspace": ((0, 0, 0), (1, 1, 0))}, "workspace is"),
    ],
)
def test_contradictory_specs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(ACTION_SPECS["tabletop"], **changes)


def test_from_dict_refuses_unknown_and_missing_keys():
    values = ACTION_SPECS["bridge"].to_dict()
    with pytest.raises(ValueError, match="unknown.*'griper'.*Did you mean 'gripper'"):
        ActionSpec.from_dict(values | {"griper": "open_ratio"})
    del values["delta"]
    with pytest.raises(ValueError, match=r"lacks key\(s\) \['delta'\]"):
        ActionSpec.from_dict(values)


def test_shapes_are_named():
    spec = ACTION_SPECS["tabletop"]
    with pytest.raises(ValueError, match=r"native action has shape \(3, 8\); expected \(..., 7\)"):
        spec.to_canonical(np.zeros((3, 8)))
    with pytest.raises(ValueError, match=r"canonical action has shape \(3, 7\); expected \(..., 1, 7\)"):
        spec.from_canonical(np.zeros((3, 7)))
    with pytest.raises(ValueError, match="Drop the padding"):
        spec.from_canonical(pad_chunk(np.zeros((2, 1, 7)), 4))
    with pytest.raises(ValueError, match=r"poses have shape \(4, 4\); expected \(..., 1, 4, 4\)"):
        integrate_poses(np.eye(4), np.zeros((2, 1, 7)), spec)
    with pytest.raises(ValueError, match=r"actions have shape \(2, 5, 1, 7\); expected \(3, T, 1, 7\)"):
        integrate_poses(np.zeros((3, 1, 4, 4)), np.zeros((2, 5, 1, 7)), spec)
    with pytest.raises(ValueError, match="chunk_length is 0"):
        spec.action_space(0)
