"""Does an environment keep the contract of the project whose interface it shows? A table of rules, expected and seen.

The same rules run on our worlds and on the real SimplerEnv, ManiSkill3, LIBERO or LeRobot environment, so that both
tables can be laid side by side. Those projects pin other versions of Gymnasium: this file needs numpy alone and can be
copied into their installation (``from conformance import conformance``).

A rule whose occasion did not arise, for example stepping on after success, is reported as "not seen".
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["PROBES", "Rule", "conformance", "format_conformance"]

PUSH_M, TURN_RAD, REPEATS = 0.01, 0.1, 4
"""Motion of one command, and commands of one test motion."""
ANSWERED = 0.25
"""Share of the commanded motion that must have happened at the end of it: controllers lag behind."""
ANSWERED_OSC = 0.1
"""The same for LIBERO: robosuite adds each command to the measured pose and reaches a fifth of it. Measured in its Lift
task with LIBERO's controller: 0.17 to 0.20 of four centimetres, 0.18 of 0.4 rad."""
_PATIENCE = 60
"""Commands without an end that count as no end."""
_CAMERA = "3rd_view_camera"
_INFO = (
    "elapsed_steps", "moved_correct_obj", "moved_wrong_obj", "is_src_obj_grasped", "consecutive_grasp",
    "src_on_target", "success",
)  # fmt: skip
_LIMITS = np.array([1.0] * 3 + [math.pi / 2] * 3 + [1.0])


@dataclass(frozen=True)
class Rule:
    """One line of the table.

    Attributes:
        name: what the rule is about.
        expected: the contract.
        seen: what the environment does.
        holds: whether it keeps the contract; None where the occasion did not arise.
    """

    name: str
    expected: str
    seen: str
    holds: bool | None


class _Probe(ABC):
    """How the rules talk to one interface: metres, rotation vector and open ratio in; image and hand out."""

    images: tuple[int, ...] | None = None
    answered = ANSWERED

    def __init__(self, env: Any) -> None:
        self.env = env

    @abstractmethod
    def reset(self, seed: int) -> Any:
        """Starts and returns the observation."""

    @abstractmethod
    def step(self, motion: np.ndarray, open_ratio: float) -> tuple[Any, bool, bool]:
        """Commands a motion (6,) and an opening; returns the observation, success, and whether the time is up."""

    @abstractmethod
    def image(self, observation: Any) -> np.ndarray:
        """Returns the image (H, W, 3) as the interface shows it."""

    @abstractmethod
    def hand(self, observation: Any) -> tuple[np.ndarray, np.ndarray, float] | None:
        """Returns position (3,), quaternion (4,), opening; None where the observation does not tell."""

    @abstractmethod
    def own_rules(self) -> Iterator[tuple[str, str, str, bool | None]]:
        """Yields the rules that only this interface has, after a reset and a step."""


def conformance(env: Any, interface: str, *, horizon: int | None = None, seed: int = 0) -> list[Rule]:
    """Resets and steps ``env`` and returns the table of its interface.

    Args:
        env: a real environment or one of ours, of one slot.
        interface: a key of :data:`PROBES`.
        horizon: commands after which the environment is to say that the time is up; None if it never does (LIBERO).
        seed: of the starts.

    Raises:
        ValueError: an unknown interface, or a horizon below 1.
    """
    if interface not in PROBES:
        raise ValueError(f"Unknown interface {interface!r}; expected one of {sorted(PROBES)}.")
    if horizon is not None and horizon < 1:
        raise ValueError(f"horizon={horizon}; expected at least 1, or None where nothing ends by time.")
    table: list[Rule] = []

    @contextmanager
    def rule(name: str, expected: str) -> Iterator[Callable[[Any, bool | None], None]]:
        try:
            yield lambda seen, holds: table.append(Rule(name, expected, seen, None if holds is None else bool(holds)))
        except Exception as error:
            table.append(Rule(name, expected, f"{type(error).__name__}: {error}", False))

    probe = PROBES[interface](env)
    _check_images(probe, rule, seed)
    _check_motions(probe, rule, seed)
    _check_time(probe, rule, seed, horizon)
    with rule(f"the rules of {interface} alone", "can be looked at"):
        probe.reset(seed)
        probe.step(np.zeros(6), 1.0)
        for name, expected, shown, holds in probe.own_rules():
            table.append(Rule(name, expected, shown, None if holds is None else bool(holds)))
    return table


def format_conformance(table: list[Rule]) -> str:
    """Returns the table as Markdown."""
    marks = {True: "yes", False: "NO", None: "not seen"}
    lines = ["| rule | expected | seen | holds |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {r.name} | {r.expected} | {r.seen} | {marks[r.holds]} |" for r in table)])


def _check_images(probe: _Probe, rule: Callable[..., Any], seed: int) -> None:
    size = "(H, W, 3)" if probe.images is None else str(probe.images)
    with rule("image", f"uint8 {size}, not blank") as seen:
        image = probe.image(probe.reset(seed))
        fits = image.ndim == 3 and image.shape[-1] == 3 if probe.images is None else image.shape == probe.images
        seen(f"{image.dtype} {image.shape}", image.dtype == np.uint8 and fits and image.std() > 0)
    with rule("same seed", "same first image") as seen:
        again = np.abs(probe.image(probe.reset(seed)).astype(int) - image)
        seen(f"differs by {again.max()} grey levels", again.max() <= 1)
    with rule("images are the caller's own", "no step changes one that was returned") as seen:
        first = probe.image(probe.reset(seed))
        kept = first.copy()
        for _ in range(REPEATS):
            probe.step(np.array([PUSH_M, 0, 0, 0, 0, 0]), 1.0)
        seen("unchanged" if np.array_equal(first, kept) else "changed", np.array_equal(first, kept))


def _check_motions(probe: _Probe, rule: Callable[..., Any], seed: int) -> None:
    if probe.hand(probe.reset(seed)) is None:
        with rule("motion", "the hand goes where it is sent") as seen:
            seen("the observation does not tell where the hand is", None)
        return
    for axis, name in enumerate("xyz"):
        for sign in (1.0, -1.0):
            with rule(f"{'+' if sign > 0 else '-'}{name}", f"{100 * REPEATS * PUSH_M:g} cm along {name}") as seen:
                before, after = _ends(probe, sign * PUSH_M * np.eye(6)[axis], seed)
                moved = sign * (after[0] - before[0])
                others = np.abs(np.delete(moved, axis)).max()
                cm = np.round(100 * sign * moved, 1).tolist()
                seen(f"{cm} cm", moved[axis] > probe.answered * REPEATS * PUSH_M and others < 0.5 * moved[axis])
    for sign in (1.0, -1.0):
        with rule(f"{'+' if sign > 0 else '-'}yaw", f"{REPEATS * TURN_RAD:g} rad about the base's z") as seen:
            before, after = _ends(probe, sign * TURN_RAD * np.eye(6)[5], seed)
            turn = _turn(before[1], after[1])
            holds = sign * turn[2] > probe.answered * REPEATS * TURN_RAD and np.abs(turn[:2]).max() < 0.5 * abs(turn[2])
            seen(f"{np.round(turn, 2).tolist()} rad", holds)
    with rule("gripper", "the open command opens, the close command closes") as seen:
        closed, opened = (_ends(probe, np.zeros(6), seed, ratio)[1][2] for ratio in (0.0, 1.0))
        seen(f"{closed:.3f} after closing, {opened:.3f} after opening", closed < opened)


def _ends(probe: _Probe, motion: np.ndarray, seed: int, open_ratio: float = 1.0) -> tuple[Any, Any]:
    """The hand before and after a repeated command."""
    before = probe.hand(probe.reset(seed))
    for _ in range(REPEATS):
        observation, *_ = probe.step(motion, open_ratio)
    return before, probe.hand(observation)


def _turn(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Rotation vector (3,), base frame, between two quaternions w x y z."""
    scalar, *vector = _product(after, before * [1, -1, -1, -1])
    norm = np.linalg.norm(vector)
    angle = 2 * math.atan2(norm, abs(scalar))
    return np.sign(scalar or 1.0) * np.array(vector) / max(norm, 1e-9) * angle


def _product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Product (4,) of two quaternions w x y z."""
    vector = left[0] * right[1:] + right[0] * left[1:] + np.cross(left[1:], right[1:])
    return np.concatenate([[left[0] * right[0] - left[1:] @ right[1:]], vector])


def _check_time(probe: _Probe, rule: Callable[..., Any], seed: int, horizon: int | None) -> None:
    outcomes: list[tuple[bool, bool]] = []
    with rule("stepping on after success", "is allowed; the next verdict may differ") as seen:
        probe.reset(seed)
        while len(outcomes) < (horizon or _PATIENCE) and not (outcomes and outcomes[-1][1]):
            outcomes.append(probe.step(np.zeros(6), 1.0)[1:])
        successes = [success for success, _ in outcomes]
        after = successes[successes.index(True) + 1 :] if True in successes else []
        seen(f"{len(after)} commands after it, {sum(after)} successes" if after else "no success", after != [] or None)
    with rule("time limit", "never" if horizon is None else f"after {horizon} commands, not before") as seen:
        ended = bool(outcomes) and outcomes[-1][1]
        text = f"{'ended' if ended else 'no end'} after {len(outcomes)} commands"
        seen(text, ended == (horizon is not None) and len(outcomes) == (horizon or _PATIENCE))


def _rigid(matrix: np.ndarray) -> bool:
    """Whether a (3 or 4, 4) matrix is a rotation and a shift."""
    turn = np.asarray(matrix, float)[:3, :3]
    return np.allclose(turn @ turn.T, np.eye(3), atol=1e-4) and np.linalg.det(turn) > 0


class _SimplerProbe(_Probe):
    """SimplerEnv's WidowX tasks."""

    images = (480, 640, 3)

    def reset(self, seed: int) -> Any:
        self.first = self.env.reset(seed=seed)
        return self.first[0]

    def step(self, motion: np.ndarray, open_ratio: float) -> tuple[Any, bool, bool]:
        self.last = self.env.step(np.concatenate([motion, [2 * open_ratio - 1]]))
        return self.last[0], bool(self.last[2]), bool(self.last[3])

    def image(self, observation: Any) -> np.ndarray:
        return observation["image"][_CAMERA]["rgb"]

    def hand(self, observation: Any) -> Any:
        pose, joints = (np.asarray(observation[a][b], float) for a, b in (("extra", "tcp_pose"), ("agent", "qpos")))
        base = np.asarray(observation["agent"]["base_pose"], float)  # turned against the world
        inverse = base[3:] * [1, -1, -1, -1]
        place = _product(_product(inverse, np.concatenate([[0.0], pose[:3] - base[:3]])), base[3:])[1:]
        return place, _product(inverse, pose[3:]), float(joints[-2:].sum())

    def own_rules(self) -> Iterator[tuple[str, str, str, bool | None]]:
        space, env = self.env.action_space, self.env
        box = np.allclose(space.low, -_LIMITS, atol=1e-5) and np.allclose(space.high, _LIMITS, atol=1e-5)
        yield "action space", "Box(7): ±1 m, ±π/2 rad, ±1", f"up to {np.round(space.high, 2).tolist()}", box
        yield "reset", "(observation, info)", f"{len(self.first)} values", len(self.first) == 2
        yield "step", "5 values", f"{len(self.last)} values", len(self.last) == 5
        info = self.last[4]
        keys = (*_INFO, "episode_stats")
        missing = [key for key in keys if key not in info]
        yield "info", ", ".join(keys), f"without {missing}" if missing else "all there", not missing
        agrees = bool(info.get("success")) == bool(self.last[2])
        yield "success", "info['success'] is terminated", f"{info.get('success')}, {self.last[2]}", agrees
        words = env.get_language_instruction()
        yield "instruction", "a sentence", repr(words), isinstance(words, str) and bool(words)
        yield "robot_uid", "contains 'widowx'", repr(env.robot_uid), "widowx" in env.robot_uid
        yield "is_final_subtask()", "bool", "an answer", isinstance(env.is_final_subtask(), bool | np.bool_)
        _, (w, x, y, z), _ = self.hand(self.first[0])
        down = 2 * (w * y - x * z)
        yield "gripper link", "w x y z; its x axis points down at the start", f"{down:+.2f} of it down", down > 0.5
        view = self.last[0]["camera_param"][_CAMERA]
        to_camera = np.asarray(view["extrinsic_cv"], float)
        to_camera = np.vstack([to_camera, [0, 0, 0, 1]]) if to_camera.shape == (3, 4) else to_camera
        if not np.isfinite(to_camera).all():
            yield "camera", "extrinsic_cv and cam2world_gl agree", "not calibrated", None
        else:
            back = np.linalg.inv(to_camera) @ np.diag([1.0, -1.0, -1.0, 1.0])
            holds = _rigid(to_camera) and np.allclose(back, view["cam2world_gl"], atol=1e-3)
            text = f"up to {np.abs(back - view['cam2world_gl']).max():.1g}"
            yield "camera", "extrinsic_cv and cam2world_gl agree", text, holds
        starts = [self.env.reset(options={"obj_init_options": {"episode_id": i}})[0] for i in (0, 1, 0)]
        images = [self.image(start).astype(int) for start in starts]
        same, other = np.abs(images[0] - images[2]).max(), np.abs(images[0] - images[1]).max()
        text = f"same id differs by {same}, another by {other} grey levels"
        yield "episode_id", "chooses the start", text, same <= 1 and other > 1


class _ManiSkillProbe(_SimplerProbe):
    """ManiSkill3's digital twins: torch tensors with a batch axis of one."""

    def step(self, motion: np.ndarray, open_ratio: float) -> tuple[Any, bool, bool]:
        self.last = self.env.step(np.concatenate([motion, [2 * open_ratio - 1]])[None].astype(np.float32))
        return self.last[0], bool(self.last[2][0]), bool(self.last[3][0])

    def image(self, observation: Any) -> np.ndarray:
        return observation["sensor_data"][_CAMERA]["rgb"][0].cpu().numpy()

    def hand(self, observation: Any) -> Any:
        return None

    def own_rules(self) -> Iterator[tuple[str, str, str, bool | None]]:
        info, env = self.last[4], self.env
        batched = {name: tuple(self.last[i].shape) for i, name in ((1, "reward"), (2, "terminated"), (3, "truncated"))}
        yield "batch", "tensors (1,)", str(batched), set(batched.values()) == {(1,)}
        missing = [key for key in _INFO if key not in info]
        yield "info", "SimplerEnv's keys, flat", f"without {missing}" if missing else "all there", not missing
        words = env.get_language_instruction()
        holds = isinstance(words, list) and len(words) == 1 and isinstance(words[0], str)
        yield "instruction", "a list of one sentence", repr(words), holds
        matrix = np.asarray(self.last[0]["sensor_param"][_CAMERA]["extrinsic_cv"].cpu())
        shown = "not calibrated" if not np.isfinite(matrix).all() else str(matrix.shape)
        yield "camera", "extrinsic_cv (1, 3, 4)", shown, None if "not" in shown else matrix.shape == (1, 3, 4)


class _LiberoProbe(_Probe):
    """LIBERO's ``OffScreenRenderEnv``: robosuite's observations and controller."""

    answered = ANSWERED_OSC

    def reset(self, seed: int) -> Any:
        self.env.seed(seed)
        return self.env.reset()

    def step(self, motion: np.ndarray, open_ratio: float) -> tuple[Any, bool, bool]:
        command = np.concatenate([motion[:3] / 0.05, motion[3:] / 0.5, [1 - 2 * open_ratio]])
        self.last = self.env.step(command.tolist())
        return self.last[0], bool(self.last[2]), False

    def image(self, observation: Any) -> np.ndarray:
        return observation["agentview_image"]

    def hand(self, observation: Any) -> Any:
        quaternion, fingers = observation["robot0_eef_quat"], observation["robot0_gripper_qpos"]
        return observation["robot0_eef_pos"], np.roll(quaternion, 1), float(fingers[0] - fingers[1])

    def own_rules(self) -> Iterator[tuple[str, str, str, bool | None]]:
        observation = self.last[0]
        yield "step", "(observation, reward, done, info)", f"{len(self.last)} values", len(self.last) == 4
        sizes = {"robot0_eef_pos": 3, "robot0_eef_quat": 4, "robot0_gripper_qpos": 2, "robot0_joint_pos": 7}
        shapes = {key: np.shape(observation[key]) for key in sizes}
        wanted = {key: (size,) for key, size in sizes.items()}
        yield "proprioception", str(wanted), str(shapes), shapes == wanted
        norm = float(np.linalg.norm(observation["robot0_eef_quat"]))
        yield "quaternion", "unit, x y z w", f"norm {norm:.4f}", abs(norm - 1) < 1e-3
        reward, done = float(self.last[1]), bool(self.last[2])
        yield "reward", "1 with success, else 0", f"{reward:g}, done {done}", reward == float(done)
        success = bool(self.env.check_success())
        yield "done", "is check_success()", f"{done}, {success}", done == success
        start = self.image(self.reset(0)).astype(int)
        for _ in range(REPEATS):
            raised, *_ = self.step(np.array([0, 0, 2 * PUSH_M, 0, 0, 0]), 1.0)
        rows = _changed_rows(start, self.image(raised).astype(int))
        text = "no change" if rows is None else f"the hand's rows go from {rows[0]:.0f} to {rows[1]:.0f}"
        yield "upside down", "a rising hand moves to higher rows", text, None if rows is None else rows[1] > rows[0]


def _changed_rows(before: np.ndarray, after: np.ndarray) -> tuple[float, float] | None:
    """Mean rows of what left and of what came: pixels far from the background, which is the images' common median."""
    background = np.median(before.reshape(-1, 3), axis=0)
    moved = np.abs(after - before).sum(axis=-1) > 60
    if not moved.any():
        return None
    rows = np.arange(len(before))[:, None]
    strength = [np.abs(image - background).sum(axis=-1) * moved for image in (before, after)]
    left, right = (float((rows * s).sum() / max(s.sum(), 1e-9)) for s in strength)
    return left, right


class _LeRobotProbe(_Probe):
    """LeRobot's vector environments, of one slot."""

    def reset(self, seed: int) -> Any:
        return self.env.reset(seed=[seed])[0]

    def step(self, motion: np.ndarray, open_ratio: float) -> tuple[Any, bool, bool]:
        self.last = self.env.step(np.concatenate([motion, [open_ratio]])[None].astype(np.float32))
        return self.last[0], bool(self.last[2][0]), bool(self.last[3][0])

    def image(self, observation: Any) -> np.ndarray:
        pixels = observation["pixels"]
        return (next(iter(pixels.values())) if isinstance(pixels, dict) else pixels)[0]

    def hand(self, observation: Any) -> Any:
        return None

    def own_rules(self) -> Iterator[tuple[str, str, str, bool | None]]:
        env = self.env
        keys = set(self.last[0])
        yield "observation", "pixels, agent_pos", str(sorted(keys)), {"pixels", "agent_pos"} <= keys
        limit = env.call("_max_episode_steps")[0]
        yield "_max_episode_steps", "int, through call()", repr(limit), isinstance(limit, int)
        words = [env.get_attr(name)[0] for name in ("task", "task_description")]
        yield "task, task_description", "sentences", str(words), all(isinstance(text, str) and text for text in words)
        rate = env.metadata.get("render_fps")
        yield "metadata['render_fps']", "a number", repr(rate), isinstance(rate, int | float) and rate > 0
        mode = str(env.metadata.get("autoreset_mode"))
        yield "autoreset", "SAME_STEP", mode, "SAME_STEP" in mode or "SameStep" in mode
        always = "is_success" in self.last[4]
        yield "info['is_success']", "at every step", "there" if always else "missing", always
        for _ in range(limit + 1):
            *_, terminated, truncated, info = env.step(np.zeros((1, 7), np.float32))
            if terminated[0] or truncated[0]:
                break
        ends = "is_success" in info.get("final_info", {}) and "final_obs" in info
        yield "end of an episode", "final_info['is_success'], final_obs", "there" if ends else str(sorted(info)), ends


PROBES: dict[str, type[_Probe]] = {
    "simpler": _SimplerProbe,
    "maniskill": _ManiSkillProbe,
    "libero": _LiberoProbe,
    "lerobot": _LeRobotProbe,
}
"""Interfaces that have a table."""
