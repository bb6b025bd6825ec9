"""Other projects' simulators behind the chunk interface: what is ours of it, on stand-ins with the documented keys."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

import prophet_gym
from prophet_gym.action_frames import Camera, project
from prophet_gym.actions import ACTION_SPECS, integrate_poses
from prophet_gym.compat import check
from prophet_gym.compat.simpler import CAMERA
from prophet_gym.data.folder import EpisodeFolder
from prophet_gym.data.record import record_wandering
from prophet_gym.errors import MissingExtraError
from prophet_gym.rotations import axis_angle_to_matrix, euler_to_matrix, matrix_to_quaternion
from prophet_gym.sims import libero, robosuite, robosuite_tasks
from prophet_gym.sims.bridge_backends import ManiSkillBackend, SimplerBackend
from prophet_gym.sims.simpler import BridgeSim, make_bridge
from prophet_gym.sims.simulator_env import SimulatorEnv
from prophet_gym.sims.wander import Wanderer
from prophet_gym.simulators import SIMULATORS
from prophrl_agents.config import WorldConfig
from prophrl_agents.environments import make_environment
from prophrl_agents.record import record_policy

K = np.array([[623.588, 0, 319.501], [0, 623.588, 239.545], [0, 0, 1]])
TURNED = np.diag([-1.0, -1.0, 1.0, 1.0])  # the base of both simulators, against their world
TURNED[:3, 3] = [0.147, 0.028, 0.87]
DOWN = np.array([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]])
CAMERA_TO_WORLD = np.array([[0.0, 0, -1, 1.0], [1, 0, 0, 0.0], [0, -1, 0, 1.1], [0, 0, 0, 1]])  # looks along -x


def vector(pose: np.ndarray) -> np.ndarray:
    return np.concatenate([pose[:3, 3], matrix_to_quaternion(pose[:3, :3])])


class Arm:
    """A hand that does at once what it is told, in the base frame, and the views that both simulators give of it."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.hand, self.fingers = np.eye(4), 0.037
        self.hand[:3, :3], self.hand[:3, 3] = DOWN, [0.3, 0.0, 0.15]

    def move(self, shift: np.ndarray, turn: np.ndarray, gripper: float) -> None:
        self.hand[:3, 3] += shift
        self.hand[:3, :3] = turn @ self.hand[:3, :3]
        self.fingers = 0.015 + 0.022 * (gripper + 1) / 2

    def image(self) -> np.ndarray:
        return np.full((480, 640, 3), round(1000 * self.hand[0, 3]) % 256, np.uint8)


class Simpler(Arm):
    """SimplerEnv's environment, as far as we use it; success lasts as long as the hand is beyond x = 0.4."""

    unwrapped: Any = property(lambda self: self)

    def reset(self, seed: int = 0, options: Any = None) -> Any:
        self.start()
        self.hand[1, 3] = (options or {}).get("obj_init_options", {}).get("episode_id", 0) / 100
        return self.observe(), {}

    def observe(self) -> Any:
        view = {"intrinsic_cv": K, "extrinsic_cv": np.linalg.inv(CAMERA_TO_WORLD)}
        return {
            "image": {CAMERA: {"rgb": self.image()}},
            "agent": {"base_pose": vector(TURNED), "qpos": np.array([0.0] * 6 + [self.fingers] * 2)},
            "extra": {"tcp_pose": vector(TURNED @ self.hand)},
            "camera_param": {CAMERA: view},
        }

    def step(self, command: np.ndarray) -> Any:
        self.move(command[:3], axis_angle_to_matrix(command[3:6]), command[6])
        return self.observe(), 0.0, self.hand[0, 3] > 0.4, False, {}

    def get_language_instruction(self) -> str:
        return "put carrot on plate"

    def close(self) -> None:
        pass


class ManiSkill(Simpler):
    """ManiSkill3's: tensors with a batch axis of one, Euler angles Rx @ Ry @ Rz, no poses in the observation."""

    def pose(self, matrix: np.ndarray) -> Any:
        return SimpleNamespace(pose=SimpleNamespace(raw_pose=torch.tensor(vector(matrix))[None]))

    @property
    def agent(self) -> Any:
        links = {"ee_gripper_link": self.pose(TURNED @ self.hand)}
        return SimpleNamespace(robot=SimpleNamespace(links_map=links, pose=self.pose(TURNED).pose))

    def reset(self, seed: int = 0, options: Any = None) -> Any:
        return super().reset(options={"obj_init_options": {"episode_id": int(options["episode_id"][0])}})

    def observe(self) -> Any:
        seen = super().observe()
        view = {"intrinsic_cv": K, "extrinsic_cv": np.linalg.inv(CAMERA_TO_WORLD)[:3]}
        return {
            "sensor_data": {CAMERA: {"rgb": torch.from_numpy(seen["image"][CAMERA]["rgb"])[None]}},
            "sensor_param": {CAMERA: {key: torch.from_numpy(value)[None] for key, value in view.items()}},
            "agent": {"qpos": torch.from_numpy(seen["agent"]["qpos"])[None]},
        }

    def step(self, command: np.ndarray) -> Any:
        roll, pitch, yaw = axis_angle_to_matrix(command[0, 3:6, None] * np.eye(3))
        self.move(command[0, :3], roll @ pitch @ yaw, command[0, 6])
        return self.observe(), None, torch.tensor([self.hand[0, 3] > 0.4]), torch.tensor([False]), {}

    def get_language_instruction(self) -> Any:
        return ["put carrot on plate"]


@pytest.fixture(params=["simpler", "maniskill"])
def installed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Stand-ins where the two projects would be."""
    project_of, stand_in = {"simpler": ("simpler_env", Simpler), "maniskill": ("mani_skill.envs", ManiSkill)}[
        request.param
    ]
    module = ModuleType(project_of)
    module.make = lambda task: stand_in()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, project_of.split(".")[0], module)
    monkeypatch.setitem(sys.modules, project_of, module)
    assets = ModuleType("data")
    assets.is_data_source_downloaded = lambda name: True  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mani_skill.utils.assets.data", assets)
    made = gym.make
    monkeypatch.setattr(gym, "make", lambda name, **o: stand_in() if name.endswith("-v1") else made(name, **o))
    return str(request.param)


@pytest.fixture
def sim(installed: str) -> BridgeSim:
    kind = {"simpler": SimplerBackend, "maniskill": ManiSkillBackend}[installed]
    bridge = BridgeSim(["widowx_carrot_on_plate"], kind, name="stand-in", image_size=(240, 320))
    bridge.reset(seed=0)
    return bridge


def command(x: float = 0.0, yaw: float = 0.0, opening: float = 1.0) -> np.ndarray:
    return np.array([x, 0, 0, 0, 0, yaw, opening], np.float32)


def test_bridge_commands_move_the_hand_in_the_base_frame(sim: BridgeSim) -> None:
    start = sim.eef_pose[0]
    np.testing.assert_allclose(start[:3, :3], np.eye(3), atol=1e-6)  # BridgeData calls straight down zero
    for _ in range(3):
        sim.step(command(x=0.02, yaw=0.1))
    np.testing.assert_allclose(sim.eef_pose[0, :3, 3] - start[:3, 3], [0.06, 0, 0], atol=1e-6)
    np.testing.assert_allclose(sim.eef_pose[0, :3, :3], euler_to_matrix([0, 0, 0.3]), atol=1e-6)


def test_measured_poses_are_the_integral_of_the_commands_where_the_arm_is_perfect(sim: BridgeSim) -> None:
    spec, rng = ACTION_SPECS["bridge"], np.random.default_rng(0)
    commands = rng.uniform(spec.low, spec.high, (12, 7)).astype(np.float32)
    wanted = integrate_poses(sim.eef_pose, spec.to_canonical(commands), spec)
    for one, pose in zip(commands, wanted, strict=True):
        sim.step(one)
        np.testing.assert_allclose(sim.eef_pose, pose, atol=1e-5)
        np.testing.assert_allclose(sim.gripper, [one[6]], atol=1e-6)


def test_the_camera_sees_the_hand_from_the_base_frame_as_it_does_from_the_world(sim: BridgeSim) -> None:
    in_world = Camera(K, np.linalg.inv(CAMERA_TO_WORLD), 640, 480).resized(320, 240)
    hand = TURNED @ sim.backend.env.hand
    np.testing.assert_allclose(project(sim.eef_pose[0, :3, 3], sim.camera), project(hand[:3, 3], in_world), atol=1e-6)
    assert sim.render().shape == (240, 320, 3) and (sim.camera.width, sim.camera.height) == (320, 240)


def test_a_bridge_state_is_its_start_and_the_commands_since(sim: BridgeSim) -> None:
    sim.reset(seed=4)
    sim.step(command(x=0.05, opening=0.0))
    state, pose = sim.get_state(), sim.eef_pose
    sim.step(command(x=0.05))
    sim.reset(seed=9)
    sim.set_state(state)
    np.testing.assert_array_equal(sim.eef_pose, pose)
    with pytest.raises(ValueError, match=r"a task from 0 to 0, a start from 0 to 23.*begins with \[0.0, 24.0\]"):
        sim.set_state(np.array([0.0, 24.0]))


def test_success_counts_at_the_horizon_and_may_be_lost_before_it(installed: str) -> None:
    env = make_bridge(backend=installed, task="widowx_carrot_on_plate", image_size=64, chunk_length=2, horizon=6)
    there, back = np.stack([command(x=0.06)] * 2), np.stack([command(x=-0.06)] * 2)
    for chunks, success in (((there, there, there), True), ((there, back, back), False)):
        env.reset(seed=0)
        results = [env.step(chunk) for chunk in chunks]
        assert [result[2] for result in results] == [False, False, success]
        assert [result[3] for result in results] == [False, False, True]
        assert [result[4]["verdict"] is None for result in results] == [True, True, False]
        assert results[0][4]["judge_valid"] and not results[0][4]["is_success"]
    assert env.reset(seed=0)[1]["instruction"] == "put carrot on plate"
    assert make_bridge(backend=installed, chunk_length=2).horizon == 120  # the eggplant's


def test_simulators_make_environments_that_learners_take(installed: str) -> None:
    env_id = {"simpler": "SimplerBridge-v0", "maniskill": "ManiSkillBridge-v0"}[installed]
    world = WorldConfig(num_envs=2, horizon=4, task="widowx_stack_cube", image_size=32)
    env = make_environment(env_id, world, chunk_length=2)
    observation, info = env.reset(seed=[3, 3])
    assert observation["image"].shape == (2, 32, 32, 3) and observation["state"].shape == (2, 8)
    assert list(info["task"]) == ["widowx_stack_cube"] * 2
    *_, info = env.step(np.zeros((2, 2, 7), np.float32))
    assert info["frames"].shape == (2, 2, 32, 32, 3) and list(info["num_executed"]) == [2, 2]
    env.close()


def test_simulators_show_images_of_the_policys_size_unless_told_otherwise(
    installed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env_id = {"simpler": "SimplerBridge-v0", "maniskill": "ManiSkillBridge-v0"}[installed]
    for given, shown in ((None, 24), (32, 32)):
        env = make_environment(env_id, WorldConfig(num_envs=1, image_size=given), chunk_length=2, image_size=24)
        assert env.single_observation_space["image"].shape == (shown, shown, 3)
        env.close()
    monkeypatch.setattr(BridgeSim, "instruction", "put the red block on the blue plate")  # words that it knows
    options: dict[str, Any] = {"env_id": env_id, "steps": 2, "workers": 0, "progress": False}
    assert record_policy(tmp_path, "tabletop-sft", 1, 0, task="widowx_carrot_on_plate", **options) == 1
    assert EpisodeFolder(tmp_path)[0].frames.shape == (3, 64, 64, 3)


def test_a_snapshot_starts_its_own_task_in_environments_of_any_task(installed: str) -> None:
    options: dict[str, Any] = {"backend": installed, "image_size": 16, "chunk_length": 2}
    env, every = make_bridge(task="widowx_stack_cube", **options), make_bridge(**options)
    env.reset(seed=0)
    _, info = every.reset(options={"snapshot": env.snapshot()})
    assert info["task"] == "widowx_stack_cube"
    other = make_bridge(task="widowx_spoon_on_towel", **options)
    assert other.reset(seed=0)[1]["task"] == "widowx_spoon_on_towel"
    assert other.reset(options={"snapshot": every.snapshot()})[1]["task"] == "widowx_stack_cube"


def test_the_suite_for_our_contract_passes(installed: str) -> None:
    env_id = {"simpler": "SimplerBridge-v0", "maniskill": "ManiSkillBridge-v0"}[installed]
    prophet_gym.check_world_env(gym.make(env_id, image_size=16, chunk_length=2, horizon=3))


def test_an_episode_ends_at_the_command_that_brings_success() -> None:
    class Counter(BridgeSim):
        ends_at = "command"

    env = SimulatorEnv(
        lambda: Counter(["one"], lambda task: SimplerBackendStandIn(), name="stand-in", image_size=(16, 16)),
        chunk_length=4,
        horizon=8,
    )
    env.reset(seed=0)
    _, reward, terminated, truncated, info = env.step(np.stack([command(x=0.06)] * 4))
    assert (reward, terminated, truncated, info["num_executed"]) == (1.0, True, False, 2)
    assert len(info["frames"]) == 4 and (info["frames"][1:] == info["frames"][1]).all()
    np.testing.assert_allclose(env.sim.eef_pose[0, 0, 3], 0.42, atol=1e-6)  # two commands, not four


class SimplerBackendStandIn(SimplerBackend):
    def __init__(self) -> None:
        self.env = Simpler()


@pytest.mark.parametrize(
    ("env_id", "pip", "then"),
    [
        ("Robosuite-v0", "pip install 'prophet-gym[robosuite]'", "nothing else to download"),
        ("LiberoSpatial-v0", "pip install 'prophet-gym[libero]'", "hf download lerobot/libero-assets"),
        ("ManiSkillBridge-v0", "pip install 'prophet-gym[maniskill]'", "download_asset bridge_v2_real2sim"),
        ("SimplerBridge-v0", "git clone --recurse-submodules", "pip install --no-deps"),
    ],
)
def test_what_is_missing_is_named_with_the_commands_that_bring_it(
    env_id: str, pip: str, then: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str, package: str | None = None) -> Any:
        if name.split(".")[0] in ("robosuite", "libero", "mani_skill", "simpler_env"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return imported(name, package)

    imported = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", missing)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(robosuite, "claim_backend", lambda: "osmesa")
    with pytest.raises(MissingExtraError) as error:
        gym.make(env_id)
    assert pip in str(error.value) and then in str(error.value)


def test_maniskill_without_assets_would_ask_on_the_terminal_so_it_is_not_made(
    sim: BridgeSim, monkeypatch: pytest.MonkeyPatch
) -> None:
    assets = sys.modules["mani_skill.utils.assets.data"]
    monkeypatch.setattr(assets, "is_data_source_downloaded", lambda name: name != "widowx250s")
    with pytest.raises(MissingExtraError, match=r"lacks the assets \['widowx250s'\].*download_asset widowx250s"):
        ManiSkillBackend("widowx_stack_cube")


def test_libero_without_settings_would_ask_on_the_terminal_so_it_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path))
    with pytest.raises(MissingExtraError, match="echo n . python -c 'import libero.libero'"):
        libero.libero_tasks("libero_goal")


def test_libero_states_are_read_without_running_pickles(tmp_path: Path) -> None:
    states = np.arange(12.0).reshape(2, 6)
    torch.save(states, tmp_path / "good.pruned_init")
    np.testing.assert_array_equal(libero._load_states(tmp_path / "good.pruned_init"), states)
    torch.save(Path("anything"), tmp_path / "bad.pruned_init")
    with pytest.raises(Exception, match="Weights only load failed"):
        libero._load_states(tmp_path / "bad.pruned_init")


def test_unknown_tasks_are_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="Did you mean 'widowx_stack_cube'"):
        make_bridge(backend="simpler", task="widowx_stack_cubes", chunk_length=2)
    with pytest.raises(ValueError, match="Did you mean 'Lift'"):
        robosuite_tasks.robosuite_task("Lifts")
    with pytest.raises(ValueError, match="Did you mean 'libero_goal'"):
        libero.libero_tasks("libero_gaol")
    tasks = [robosuite.RobosuiteTask(f"task_{i}", f"do {i}", lambda: None) for i in range(3)]
    assert [libero._find(tasks, wanted, "x") for wanted in (2, "2", "task_2", "do 2")] == [tasks[2]] * 4
    with pytest.raises(ValueError, match="x has no task 3; expected 0 to 2"):
        libero._find(tasks, 3, "x")


def test_every_simulator_is_registered_and_only_those_with_tasks_take_them() -> None:
    assert set(SIMULATORS) <= set(gym.registry) and not SIMULATORS["Tabletop-v0"].has_tasks
    with pytest.raises(ValueError, match="Tabletop-v0 has no image_size and task, as simulators with several tasks do"):
        make_environment("Tabletop-v0", WorldConfig(num_envs=1, task="3", image_size=32), chunk_length=2)


def test_the_sweep_of_a_simulator_without_snapshots_asks_for_some() -> None:
    with pytest.raises(ValueError, match="got 0 snapshots.*expected at least one"):
        check._sweep("Tabletop-v0", 0, {})


@pytest.mark.parametrize("name", ["tabletop", "libero", "bridge", "agibot"])
def test_wandering_commands_are_valid_smooth_and_a_function_of_the_seed(name: str) -> None:
    spec = ACTION_SPECS[name]
    runs = [np.stack([actor.act(None) for _ in range(200)]) for actor in (Wanderer(spec, 1), Wanderer(spec, 1))]
    np.testing.assert_array_equal(*runs)
    spec.check(runs[0], 200)
    x = runs[0][:, 0]
    assert np.corrcoef(x[1:], x[:-1])[0, 1] > 0.6 and len(np.unique(runs[0][:, 6])) == 2
    assert not np.array_equal(runs[0][0], Wanderer(spec, 2).act(None))


def test_wandering_is_recorded_in_any_simulator(installed: str, tmp_path: Path) -> None:
    env_id = {"simpler": "SimplerBridge-v0", "maniskill": "ManiSkillBridge-v0"}[installed]
    options: dict[str, Any] = {"env_id": env_id, "image_size": 32, "task": "widowx_carrot_on_plate", "progress": False}
    assert record_wandering(tmp_path, 2, seed=7, workers=0, steps=5, **options) == 2
    assert record_wandering(tmp_path, 2, seed=7, workers=0, steps=5, **options) == 0
    episode = EpisodeFolder(tmp_path)[0]
    assert episode.instruction == "put carrot on plate" and episode.metadata["sim"] == env_id
    assert episode.frames.shape == (6, 32, 32, 3) and episode.fps == 5.0 and episode.success is False
    moved = episode.eef_pose[1:, 0, :3, 3] - episode.eef_pose[:-1, 0, :3, 3]
    np.testing.assert_allclose(moved, episode.canonical_actions[:, 0, :3], atol=1e-5)
    assert episode.camera is not None and episode.camera.width == 32 and episode.snapshot().simulator_state is not None
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    other = {**options, "task": "widowx_stack_cube"}
    for seed in (7, 70):  # where all is there, and where none is
        with pytest.raises(ValueError, match="holds episodes of task 'widowx_carrot_on_plate'.*'widowx_stack_cube'"):
            record_wandering(tmp_path, 2, seed=seed, workers=0, steps=5, **other)
        with pytest.raises(ValueError, match=r"holds images of 32x32 pixels \(episode_000000007\), expected 48x48"):
            record_wandering(tmp_path, 2, seed=seed, workers=0, steps=5, **{**options, "image_size": 48})
    assert kept == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    meta = tmp_path / episode.name / "meta.json"
    meta.write_text(meta.read_text().replace(env_id, "Other-v0"))
    (tmp_path / EpisodeFolder(tmp_path)[1].name).rename(tmp_path / ".aside")
    with pytest.raises(ValueError, match=f"holds episodes of Other-v0, expected {env_id}"):
        record_wandering(tmp_path, 2, seed=7, workers=0, steps=5, **options)
