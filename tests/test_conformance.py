"""The table of each interface: ours keep it, and each way in which such environments differ breaks its rule."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from prophet_gym.compat.check import check_environment
from prophet_gym.compat.conformance import PROBES, Rule, conformance, format_conformance
from prophet_gym.compat.libero import HORIZON as LIBERO_HORIZON

ID, HORIZON, CAMERA = "Prophet-Tabletop-v0", 6, "3rd_view_camera"


def made(interface: str, checkpoint: Path, success: bool = True) -> Any:
    options: dict[str, Any] = {"checkpoint": str(checkpoint), "interface": interface, "horizon": HORIZON}
    options |= {"judge": lambda frames, instruction: success, "chunk_length": 4}
    if interface == "lerobot":
        return gym.make_vec(ID, num_envs=1, **options)
    if interface == "libero":
        options["horizon"] = LIBERO_HORIZON
    return gym.make(ID, **options)


class Altered:
    """An environment with something changed on its way in or out."""

    def __init__(self, env: Any, action: Callable | None = None, out: Callable | None = None) -> None:
        self.env, self.action, self.out = env, action or (lambda a: a), out or (lambda values: values)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.env, name)

    def reset(self, **options: Any) -> Any:
        return self.out(self.env.reset(**options))

    def step(self, action: Any) -> Any:
        return self.out(self.env.step(self.action(np.array(action, np.float64))))


def table(env: Any, interface: str) -> dict[str, Rule]:
    return {r.name: r for r in conformance(env, interface, horizon=None if interface == "libero" else HORIZON)}


def broken(env: Any, interface: str) -> set[str]:
    return {rule.name for rule in table(env, interface).values() if rule.holds is False}


@pytest.mark.parametrize("interface", PROBES)
def test_our_worlds_keep_every_table(tiny_checkpoint: Path, interface: str) -> None:
    env = made(interface, tiny_checkpoint, success=interface != "lerobot")
    rules = table(env, interface)
    # An untrained world does not show which way is up.
    assert {name for name, rule in rules.items() if rule.holds is False} <= {"upside down"}, rules
    assert "| time limit |" in format_conformance(list(rules.values()))


def exchanged(first: int, second: int) -> Callable:
    def change(action: np.ndarray) -> np.ndarray:
        action[..., [first, second]] = action[..., [second, first]]
        return action

    return change


def negated(index: int) -> Callable:
    def change(action: np.ndarray) -> np.ndarray:
        action[..., index] *= -1
        return action

    return change


def observed(*path: str, change: Callable) -> Callable:
    """Changes one entry of the observation that reset and step return."""

    def out(values: Any) -> Any:
        inner = values[0] if isinstance(values, tuple) else values
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = change(inner[path[-1]])
        return values

    return out


def informed(change: Callable) -> Callable:
    """Changes the info that step returns."""
    return lambda values: (*values[:-1], change(values[-1])) if len(values) > 3 else values


SHARED = np.zeros((480, 640, 3), np.uint8)


def shared(image: np.ndarray) -> np.ndarray:
    SHARED[:] = image
    return SHARED


def turned(pose: np.ndarray) -> np.ndarray:
    """The same pose in a world that is turned by 180 degrees about z."""
    (x, y, z), (w, i, j, k) = pose[:3], pose[3:]
    return np.array([-x, -y, z, -k, -j, i, w])


RGB, TCP = ("image", CAMERA, "rgb"), ("extra", "tcp_pose")
FAULTS: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "gripper inverted": ("simpler", {"action": negated(-1)}, {"gripper"}),
    "x and y exchanged": ("simpler", {"action": exchanged(0, 1)}, {"+x", "-x", "+y", "-y"}),
    "a hand that stands still": (
        "simpler", {"out": observed(*TCP, change=lambda p: p * [0, 0, 0, 1, 1, 1, 1])}, {"+x", "-z"}
    ),
    "a hand that does a tenth of it": (
        "simpler", {"out": observed(*TCP, change=lambda p: p * [0.1, 0.1, 0.1, 1, 1, 1, 1])},
        {f"{sign}{axis}" for sign in "+-" for axis in "xyz"},
    ),
    "quaternion x y z w": (
        "simpler",
        {"out": observed(*TCP, change=lambda p: np.concatenate([p[:3], np.roll(p[3:], -1)]))},
        {"gripper link"},
    ),
    "a turned world that base_pose does not tell of": (
        "simpler", {"out": observed(*TCP, change=lambda p: turned(p))}, {"+x", "-x", "+y", "-y"}
    ),
    "images as floats": ("simpler", {"out": observed(*RGB, change=lambda i: i / 255)}, {"image"}),
    "images without the camera's size": ("simpler", {"out": observed(*RGB, change=lambda i: i[::2])}, {"image"}),
    "one image buffer": (
        "simpler", {"out": observed(*RGB, change=shared)}, {"images are the caller's own", "episode_id"},
    ),
    "OpenGL axes": (
        "simpler",
        {"out": observed("camera_param", CAMERA, "cam2world_gl", change=lambda m: m @ np.diag([1.0, -1, -1, 1]))},
        {"camera"},
    ),
    "info without success": (
        "simpler",
        {"out": informed(lambda i: {k: v for k, v in i.items() if k != "success"})},
        {"info", "success"},
    ),
    "tensors without a batch": (
        "maniskill",
        {"out": lambda values: (values[0], values[1].squeeze(), *values[2:]) if len(values) > 2 else values},
        {"batch"},
    ),
    "quaternion w x y z": (
        "libero", {"out": observed("robot0_eef_quat", change=lambda q: np.roll(q, 1))}, {"+yaw", "-yaw"}
    ),
    "+1 opens": ("libero", {"action": negated(-1)}, {"gripper"}),
    "reward that is not success": (
        "libero", {"out": lambda v: (v[0], 0.5, *v[2:]) if isinstance(v, tuple) else v}, {"reward"}
    ),
    "done that the check denies": (
        "libero", {"out": lambda v: (*v[:2], not v[2], v[3]) if isinstance(v, tuple) else v}, {"done", "reward"}
    ),
    "is_success only at the end": (
        "lerobot",
        {"out": informed(lambda i: {k: v for k, v in i.items() if k != "is_success"})},
        {"info['is_success']"},
    ),
    "no final_info": (
        "lerobot",
        {"out": informed(lambda i: {k: v for k, v in i.items() if k != "final_info"})},
        {"end of an episode"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_breaks_its_rule(tiny_checkpoint: Path, fault: str) -> None:
    interface, change, rules = FAULTS[fault]
    env = made(interface, tiny_checkpoint, success=interface != "lerobot")
    found = broken(Altered(env, **change), interface) - {"upside down"}
    assert rules <= found, found
    if fault != "images as floats":  # whose comparisons break too
        assert found <= rules | (
            {f"{s}{a}" for s in "+-" for a in "xyz"} if fault == "a hand that stands still" else set()
        ), found


def test_time_and_success_that_end_too_early_are_found(tiny_checkpoint: Path) -> None:
    env, count = made("simpler", tiny_checkpoint), {"steps": 0}

    def early(values: Any) -> Any:
        count["steps"] = count["steps"] + 1 if len(values) > 2 else 0
        return (*values[:3], count["steps"] == HORIZON - 1, values[4]) if len(values) > 2 else values

    assert broken(Altered(env, out=early), "simpler") == {"time limit"}

    class EndsWithSuccess(Altered):
        over = False

        def step(self, action: Any) -> Any:
            if self.over:
                raise RuntimeError("the episode is over")
            values = super().step(action)
            self.over = bool(values[2])
            return values

        def reset(self, **options: Any) -> Any:
            self.over = False
            return super().reset(**options)

    rules = table(EndsWithSuccess(made("simpler", tiny_checkpoint)), "simpler")
    assert rules["stepping on after success"].holds is False
    assert "the episode is over" in rules["stepping on after success"].seen
    assert table(made("simpler", tiny_checkpoint, success=False), "simpler")["stepping on after success"].holds is None


def test_poses_of_simplerenv_are_read_in_the_frame_of_its_base(tiny_checkpoint: Path) -> None:
    def turn(values: Any) -> Any:
        observed(*TCP, change=turned)(values)
        return observed("agent", "base_pose", change=turned)(values)

    assert not broken(Altered(made("simpler", tiny_checkpoint), out=turn), "simpler")


def test_the_trained_world_is_upside_down_for_libero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prophet_gym.compat.conformance._PATIENCE", 2)
    env = gym.make(ID, interface="libero", judge=lambda frames, instruction: False, horizon=LIBERO_HORIZON)
    assert table(env, "libero")["upside down"].holds
    flipped = Altered(env, out=observed("agentview_image", change=lambda image: image[::-1]))
    assert broken(flipped, "libero") == {"upside down"}


def test_the_command_prints_the_table_and_exits_with_the_verdict(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from prophet_gym.cli import main

    def run(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["prophet", "check", ID, "--checkpoint", str(tiny_checkpoint), *words])
        main()
        return capsys.readouterr().out

    assert "| episode_id | chooses the start |" in run("--interface", "simpler")
    assert "| SB3's check_env | passed |" in run("--interface", "flat")
    with pytest.raises(SystemExit) as stopped:  # an untrained world does not move as commanded
        run("--interface", "lerobot", "--motion")
    shown = capsys.readouterr().out
    assert stopped.value.code == 1 and "| +x |" in shown and "| autoreset | SAME_STEP |" in shown


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Unknown interface 'simplar'; expected one of \['lerobot'"):
        conformance(None, "simplar")
    with pytest.raises(ValueError, match="horizon=0; expected at least 1"):
        conformance(None, "simpler", horizon=0)


@pytest.mark.parametrize(
    ("env_id", "message"),
    [
        ("Nope-v0", "no environment 'Nope-v0'"),
        ("Nope v0", "no environment 'Nope v0'"),
        ("CartPole-v1", "'CartPole-v1' is none of our worlds.*check_world_env"),
    ],
)
def test_ids_that_are_no_worlds_are_refused(env_id: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_environment(env_id)
