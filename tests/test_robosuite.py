"""The real robosuite, where it is installed (the extra `robosuite`): its Lift task stands in for LIBERO."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prophet_gym.action_frames import project
from prophet_gym.audit import audit
from prophet_gym.compat import conformance as rules
from prophet_gym.data.folder import EpisodeFolder, write_episode
from prophet_gym.data.record import play
from prophet_gym.rotations import matrix_to_axis_angle
from prophet_gym.sims.robosuite import RobosuiteSim, import_robosuite
from prophet_gym.sims.robosuite_tasks import robosuite_task
from prophet_gym.sims.simulator_env import SimulatorEnv
from prophet_gym.sims.wander import Wanderer

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("robosuite") is None, reason="robosuite is not installed"),
    pytest.mark.render,
    pytest.mark.filterwarnings("ignore"),  # robosuite's own
]


@pytest.fixture(scope="module")
def sim() -> Iterator[RobosuiteSim]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = RobosuiteSim([robosuite_task("Lift")], name="Robosuite-v0", size=64)
        made.reset(seed=2)
    yield made
    made.close()


def run(sim: RobosuiteSim, axis: int, value: float, times: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Shift (3,) and rotation vector (3,) of the hand after the same command several times, gripper open."""
    sim.reset(seed=2)
    before, command = sim.eef_pose[0], np.zeros(7)
    command[axis], command[6] = value, -1.0
    for _ in range(times):
        sim.step(command)
    after = sim.eef_pose[0]
    return after[:3, 3] - before[:3, 3], matrix_to_axis_angle(after[:3, :3] @ before[:3, :3].T)


@pytest.mark.parametrize("axis", range(6))
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_hand_goes_where_it_is_sent_and_a_fifth_of_the_way(sim: RobosuiteSim, axis: int, sign: float) -> None:
    moved = run(sim, axis, 0.5 * sign)[axis // 3]
    reached = sign * moved[axis % 3] / (8 * 0.5 * (0.05 if axis < 3 else 0.5))
    assert 0.12 < reached < 0.30 and np.abs(np.delete(moved, axis % 3)).max() < 0.2 * abs(moved[axis % 3])


def test_minus_one_opens_the_gripper(sim: RobosuiteSim) -> None:
    sim.reset(seed=2)
    widths = []
    for value in (1.0, -1.0):
        for _ in range(20):
            sim.step(np.array([0, 0, 0, 0, 0, 0, value]))
        widths.append(float(sim.gripper[0]))
    assert widths[0] < 0.1 and widths[1] > 0.9


def test_the_projected_pose_lies_between_the_finger_tips_of_the_picture(sim: RobosuiteSim) -> None:
    run(sim, 2, -0.5)
    model = sim.env.sim.model._model
    fingers = [g for g in range(model.ngeom) if "finger" in model.body(model.geom_bodyid[g]).name]
    kept = model.geom_rgba.copy(), model.geom_matid.copy()
    model.geom_rgba[fingers], model.geom_matid[fingers] = (1, 0, 1, 1), -1  # nothing else in the scene is magenta
    red, green, blue = np.moveaxis(sim.render().astype(int), -1, 0)
    model.geom_rgba[:], model.geom_matid[:] = kept
    rows, columns = np.nonzero((red > green + 60) & (blue > green + 60))
    u, v = project(sim.eef_pose[0, :3, 3], sim.camera)
    assert columns.min() - 1 <= u <= columns.max() + 1 and rows.min() - 2 <= v <= rows.max() + 2
    assert not np.array_equal(sim.render(), sim.render()[::-1])


def test_a_restored_state_goes_on_with_the_same_bytes_here_and_in_another_simulator(sim: RobosuiteSim) -> None:
    sim.reset(seed=2)
    sim.step(np.array([0.5, 0.5, 0, 0, 0, 0.5, -1.0]))
    state, image = sim.get_state(), sim.render()
    commands = np.random.default_rng(0).uniform(-1, 1, (5, 7))
    commands[0, 3:6] = 0.0  # then the controller keeps its last goal of rotation, which is part of the state
    for command in commands:
        sim.step(command)
    end, last = sim.get_state(), sim.render()
    other = RobosuiteSim([robosuite_task("Lift")], name="Robosuite-v0", size=64)
    for one in (sim, other):
        one.set_state(state)
        np.testing.assert_array_equal(one.get_state(), state)
        np.testing.assert_array_equal(one.render(), image)
        for command in commands:
            one.step(command)
        np.testing.assert_array_equal(one.get_state(), end)
        np.testing.assert_array_equal(one.render(), last)
    other.close()
    np.testing.assert_array_equal(sim.render(), last)  # closing one leaves the other's pictures alone
    with pytest.raises(ValueError, match="begins with the index of a task, 0 to 0"):
        sim.set_state(np.concatenate([[1.0], state[1:]]))
    with pytest.raises(ValueError, match="has shape"):
        sim.set_state(state[:-1])


def test_scenes_depend_on_the_seed_alone_and_leave_numpys_generator(sim: RobosuiteSim) -> None:
    np.random.seed(5)
    expected = np.random.get_state()[1].copy()
    images = []
    for seed in (1, 2, 1):
        sim.reset(seed=seed)
        images.append(sim.render())
    np.testing.assert_array_equal(np.random.get_state()[1], expected)
    np.testing.assert_array_equal(images[0], images[2])
    assert not np.array_equal(images[0], images[1])


def test_the_environment_speaks_chunks_and_success_is_robosuites(sim: RobosuiteSim) -> None:
    env = SimulatorEnv(lambda: sim, chunk_length=3, horizon=6)
    observation, info = env.reset(seed=0)
    assert observation in env.observation_space and info["instruction"] == "lift the red cube"
    _, reward, terminated, truncated, info = env.step(np.zeros((3, 7), np.float32))
    assert (reward, terminated, truncated, info["num_executed"]) == (0.0, False, False, 3)
    cube = sim.env.sim.data.get_joint_qpos(sim.env.cube.joints[0]).copy()
    cube[2] += 0.3
    sim.env.sim.data.set_joint_qpos(sim.env.cube.joints[0], cube)  # lifted by an invisible hand
    _, reward, terminated, truncated, info = env.step(np.zeros((3, 7), np.float32))
    assert (reward, terminated, info["num_executed"], len(info["frames"])) == (1.0, True, 1, 3)


def test_recordings_pass_the_audit(sim: RobosuiteSim, tmp_path: Path) -> None:
    for seed in range(4):
        sim.reset(seed=seed)
        episode = play(sim, seed, Wanderer(sim.action_spec, seed).act, steps=40, behaviour="random")
        write_episode(tmp_path / episode.name, episode)
    report = audit(EpisodeFolder(tmp_path))
    assert report.exit_code == 0, report.findings
    assert any(finding.check == "camera" and "correlate" in finding.message for finding in report.findings)


def test_liberos_table_holds_for_robosuites_own_observations(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dressed:
        """Lift with the signature of LIBERO's OffScreenRenderEnv: nothing between the rules and robosuite."""

        def __init__(self) -> None:
            suite = import_robosuite()
            controller = suite.load_controller_config(default_controller="OSC_POSE")
            self.env: Any = suite.make(
                "Lift", robots="Panda", controller_configs=controller, initialization_noise=None, control_freq=20,
                camera_heights=64, camera_widths=64, hard_reset=False,
            )  # fmt: skip
            self.env._observables["robot0_joint_pos"]._active = True  # as LIBERO does
            self.reset, self.seed = self.env.reset, np.random.seed

        def step(self, command: Any) -> Any:
            observation, *_, info = self.env.step(command)
            return observation, float(self.check_success()), self.check_success(), info

        def check_success(self) -> bool:
            return bool(self.env._check_success())

    monkeypatch.setattr(rules, "_PATIENCE", 3)
    dressed = Dressed()
    table = rules.conformance(dressed, "libero")
    dressed.env.sim._render_context_offscreen.gl_ctx.make_current()
    dressed.env.close()
    assert not [rule for rule in table if rule.holds is False], rules.format_conformance(table)
    assert {"+x", "-z", "+yaw", "gripper", "upside down"} <= {rule.name for rule in table if rule.holds}
