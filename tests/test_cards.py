"""Dataset cards state what is known and no more, and images come to the size they name."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from prophet_gym import rotations
from prophet_gym.action_frames import Camera, project
from prophet_gym.actions import ACTION_SPECS, ActionSpec
from prophet_gym.data import CARDS, DatasetCard, EpisodeFolder, StateLayout
from prophet_gym.data.cards import get_card
from prophet_gym.data.columns import actions_from_poses
from prophet_gym.data.episode import Episode
from prophet_gym.data.fitting import fit_camera, fit_episode, fit_frames
from prophet_gym.training.clips import fingerprint
from prophet_gym.training.mixture import read_mixture

OPEN_X = (
    "austin_sailor",
    "dlr_wheelchair_shared_control",
    "bc_z",
    "cmu_stretch",
    "stanford_hydra",
    "usc_jaco_play",
    "furniture_bench",
    "nyu_franka_play",
    "rt_1",
)


def test_every_set_of_the_paper_has_a_card():
    assert tuple(CARDS) == ("agibot", "droid", "libero", "bridge", *OPEN_X)
    sizes = {"agibot": (240, 320), "droid": (240, 416), "libero": (256, 256), "bridge": (256, 256)}
    for name, card in CARDS.items():
        assert card.name == name and card.source
        assert card.resolution == sizes.get(name, (240, 320))


def test_unknown_facts_stay_unknown():
    for name in OPEN_X:
        card = CARDS[name]
        assert card.fit == "pad_or_crop" and card.action_frames is False
        assert set(card.unknown) == {"action_spec", "control_hz", "cameras", "state"}
        assert card.gripper is card.frame is None
        with pytest.raises(ValueError, match=f"card '{name}' states no action_spec.*dataclasses.replace"):
            card.require_action_spec()
    assert CARDS["bridge"].unknown == ("fit", "action_frames")
    assert CARDS["libero"].unknown == ("fit",)
    assert "control_hz" in CARDS["droid"].unknown and "cameras" in CARDS["agibot"].unknown


def test_conventions_are_those_of_the_environments():
    for name in ("agibot", "droid", "libero", "bridge"):
        assert CARDS[name].action_spec == ACTION_SPECS[name]
    assert {name: (CARDS[name].frame, CARDS[name].gripper) for name in ("agibot", "droid", "libero", "bridge")} == {
        "agibot": ("end-effector", "open_ratio"),
        "droid": ("base", "open_ratio"),
        "libero": ("base", "close_positive"),
        "bridge": ("base", "open_ratio"),
    }
    (droid,), (bridge,) = CARDS["droid"].state, CARDS["bridge"].state
    assert (droid.closed, droid.open) == (1.0, 0.0) and (bridge.closed, bridge.open) == (0.0, 1.0)


def test_cards_survive_json():
    for card in CARDS.values():
        assert DatasetCard.from_dict(json.loads(json.dumps(card.to_dict()))) == card
    with pytest.raises(ValueError, match=r"unknown key\(s\) \['resolutoin'\].*Did you mean 'resolution'"):
        DatasetCard.from_dict({"name": "own", "resolutoin": [1, 1]})


def test_cards_are_found_by_name():
    own = DatasetCard("own")
    assert get_card("rt_1") is CARDS["rt_1"] and get_card(own) is own
    with pytest.raises(ValueError, match="no dataset card 'droit'.*Did you mean 'droid'"):
        get_card("droit")


MINE = """
cameras = ["front"]
resolution = [256, 320]

[action_spec]
delta = "servo"
rotation = "axis_angle"
gripper = "closed_ratio"
low = [-0.2, -0.2, -0.2, -1, -1, -1, 0]
high = [0.2, 0.2, 0.2, 1, 1, 1, 1]

[[state]]
rotation_kind = "quaternion_xyzw"
rotation = [3, 4, 5, 6]
gripper = [7]
open = 0.08
"""


def test_a_card_of_ones_own_is_a_file(tmp_path):
    (tmp_path / "my_robot.toml").write_text(MINE)
    bounds = (0.2, 0.2, 0.2, 1, 1, 1)
    spec = ActionSpec(
        delta="servo", rotation="axis_angle", gripper="closed_ratio", low=(*(-b for b in bounds), 0), high=(*bounds, 1)
    )
    state = StateLayout(rotation_kind="quaternion_xyzw", rotation=(3, 4, 5, 6), gripper=(7,), open=0.08)
    expected = DatasetCard("my_robot", spec, (256, 320), cameras=("front",), state=(state,))
    assert get_card(str(tmp_path / "my_robot.toml")) == expected
    (tmp_path / "mixture.toml").write_text('[[dataset]]\npath = "set"\ncard = "my_robot.toml"\nclip_length = 20')
    (dataset,) = read_mixture(tmp_path / "mixture.toml").datasets
    assert dataset.source.card == str(tmp_path / "my_robot.toml") and dataset.source.image_size == (256, 320)
    before = fingerprint(tmp_path / "set", dataset.source)
    (tmp_path / "my_robot.toml").write_text(MINE.replace("servo", "local"))
    assert fingerprint(tmp_path / "set", dataset.source) != before, (
        "clips of another meaning would be taken from a cache"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read as a card in TOML .*No such file"),
        ("name = ", "cannot be read as a card in TOML"),
        ('cameras = "front"', "cameras='front'; expected list"),
        ('[action_spec]\ndelta = "servo"', r"\[action_spec\] lacks \['rotation', 'gripper'\]"),
        (MINE.replace("quaternion_xyzw", "xyzw"), "rotation_kind is 'xyzw'"),
        (MINE.replace("rotation_kind", "kind"), "unexpected keyword argument 'kind'"),
        (MINE.replace("cameras", "camera"), "unknown key.*Did you mean 'cameras'"),
        (MINE.replace("low =", "lower ="), "unknown key.*'lower'"),
    ],
)
def test_a_bad_card_file_is_named(tmp_path, text, message):
    if text is not None:
        (tmp_path / "card.toml").write_text(text)
    with pytest.raises(ValueError, match=f"card.toml: .*{message}"):
        get_card(str(tmp_path / "card.toml"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"actions_from": "joints"}, "actions_from is 'joints'"),
        ({"fit": "letterbox"}, "fit is 'letterbox'"),
        ({"action_spec": ACTION_SPECS["agibot"], "state": (StateLayout(),)}, r"lays out 1 end-effector.* drives 2"),
    ],
)
def test_contradictory_cards_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DatasetCard("own", **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rotation_kind": "euler"}, "rotation_kind is 'euler'; expected one of .*Did you mean 'euler_xyz'"),
        ({"rotation_kind": "quaternion_xyzw"}, "4 of rotation"),
        ({"open": 0.0}, "different readings of a closed and an open gripper"),
    ],
)
def test_contradictory_layouts_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        StateLayout(**fields)


def test_layouts_read_every_rotation():
    rng = np.random.default_rng(0)
    euler = rng.uniform(-1.5, 1.5, (5, 3))
    matrix = rotations.euler_to_matrix(euler)
    quaternion = rotations.matrix_to_quaternion(matrix)
    forms = {
        "euler_xyz": euler,
        "axis_angle": rotations.matrix_to_axis_angle(matrix),
        "quaternion_wxyz": quaternion,
        "quaternion_xyzw": quaternion[:, [1, 2, 3, 0]],
    }
    for kind, numbers in forms.items():
        width = numbers.shape[1]
        rows = np.concatenate([rng.normal(size=(5, 3)), numbers, np.full((5, 1), 25.0)], axis=1)
        turn = tuple(range(3, 3 + width))
        layout = StateLayout(rotation=turn, rotation_kind=kind, gripper=(3 + width,), closed=100.0, open=0.0)
        poses, ratio = layout.poses(rows)
        np.testing.assert_allclose(poses[:, :3, :3], matrix, atol=1e-9)
        np.testing.assert_allclose(poses[:, :3, 3], rows[:, :3])
        np.testing.assert_allclose(ratio, 0.75)
    with pytest.raises(ValueError, match="state rows have 6 numbers, but the card's state layout names column 6"):
        StateLayout().poses(np.zeros((2, 6)))
    with pytest.raises(ValueError, match="state quaternions have norms 0.000"):
        StateLayout(rotation=(3, 4, 5, 6), rotation_kind="quaternion_xyzw", gripper=(7,)).poses(np.zeros((2, 8)))


# Fitting


def coordinates(height: int, width: int) -> np.ndarray:
    """A frame that says where its pixels come from: red = column, green = row."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([columns, rows, np.full_like(rows, 255)], axis=-1).astype(np.uint8)[None]


def test_narrow_images_are_padded_with_black_and_wide_ones_cropped():
    narrow = fit_frames(coordinates(240, 240), (240, 320), "pad_or_crop")
    assert narrow.shape == (1, 240, 320, 3) and narrow.dtype == np.uint8
    np.testing.assert_array_equal(narrow[:, :, 40:280], coordinates(240, 240))
    assert not narrow[:, :, :40].any() and not narrow[:, :, 280:].any()
    wide = fit_frames(coordinates(240, 400)[..., [1, 1, 1]], (240, 320), "pad_or_crop")
    assert wide.shape == (1, 240, 320, 3)
    cropped = fit_frames(coordinates(120, 200), (120, 160), "pad_or_crop")
    np.testing.assert_array_equal(cropped, coordinates(120, 200)[:, :, 20:180])
    odd = fit_frames(coordinates(20, 27), (20, 20), "pad_or_crop")  # an odd number of columns too many
    np.testing.assert_array_equal(odd, coordinates(20, 27)[:, :, 4:24])


def test_stretching_and_shrinking_average():
    checkers = np.kron(np.indices((2, 2)).sum(0) % 2, np.ones((1, 1))).astype(np.uint8) * 200
    frames = np.repeat(np.tile(checkers, (8, 8))[None, ..., None], 3, axis=-1)
    assert fit_frames(frames, (8, 8), "stretch").mean() == 100  # areas are averaged, not sampled
    assert fit_frames(frames, (8, 4), "stretch").shape == (1, 8, 4, 3)
    with pytest.raises(ValueError, match="16x16 pixels and 4x8 are wanted, which changes their aspect ratio"):
        fit_frames(frames, (8, 4), None)
    assert fit_frames(frames, (8, 8), None).shape == (1, 8, 8, 3)


@pytest.mark.parametrize("size", [(48, 48), (48, 100), (30, 41)])
def test_cameras_follow_their_images(size):
    """A point is seen where the fitted image shows what the old image showed there."""
    height, width = size
    view = np.eye(4)
    view[2, 3] = 1.0
    camera = Camera(np.array([[50.0, 0, (width - 1) / 2], [0, 50.0, (height - 1) / 2], [0, 0, 1]]), view, width, height)
    fitted = fit_camera(camera, (24, 32), "pad_or_crop")
    assert (fitted.height, fitted.width) == (24, 32)
    points = np.array([[0.0, 0.0, 0.0], [0.1, -0.05, 0.2]])
    before, after = project(points, camera), project(points, fitted)
    scaled = round(width * 24 / height)
    left = (32 - scaled) // 2
    np.testing.assert_allclose(after[:, 0], (before[:, 0] + 0.5) * scaled / width - 0.5 + left)
    np.testing.assert_allclose(after[:, 1], (before[:, 1] + 0.5) * 24 / height - 0.5)


def test_episodes_are_fitted_when_they_are_decoded():
    frames = np.repeat(coordinates(240, 240), 3, axis=0)
    camera = Camera(np.diag([200.0, 200.0, 1.0]), np.eye(4), 240, 240)
    calls = []

    def decode() -> np.ndarray:
        calls.append(1)
        return frames

    episode = Episode(decode, np.zeros((2, 7)), ACTION_SPECS["bridge"], "", 5.0, camera=camera)
    fitted = fit_episode(episode, CARDS["bc_z"])
    assert not calls and fitted.camera.width == 320
    assert fitted.frames.shape == (3, 240, 320, 3)
    corners = np.array([[0.0, 0.0], [239.0, 239.0], [np.nan, np.nan]])
    for camera in (episode.camera, None):
        labelled = replace(episode, camera=camera, labels={"block_px": corners, "height": np.arange(3.0)})
        fitted = fit_episode(labelled, CARDS["bc_z"])  # 40 black columns to the left and to the right
        np.testing.assert_allclose(fitted.labels["block_px"], corners + [40, 0])
        np.testing.assert_array_equal(fitted.labels["height"], np.arange(3.0))
    with pytest.raises(ValueError, match="card 'own' states no resolution"):
        fit_episode(episode, DatasetCard("own"))


@pytest.mark.data
def test_cards_say_what_the_recordings_show(recordings):
    """Deriving DROID's commands from its poses gives the recorded ones; Bridge's gripper is an open ratio."""
    droid = EpisodeFolder(recordings / "droid")[0]
    native = actions_from_poses(droid.eef_pose, droid.gripper, CARDS["droid"].action_spec)
    np.testing.assert_allclose(native, droid.actions, atol=1e-4)
    bridge = EpisodeFolder(recordings / "bridge64")[0]
    with np.load(recordings / "bridge64" / bridge.name / "data.npz") as data:
        poses, ratio = CARDS["bridge"].state[0].poses(data["eef_pose"])
    np.testing.assert_allclose(poses, bridge.eef_pose[:, 0])
    np.testing.assert_allclose(ratio, bridge.gripper[:, 0])
