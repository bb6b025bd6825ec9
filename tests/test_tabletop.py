"""The Tabletop simulator: state, camera, contacts, success, and the environment around it."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import prophet_gym  # noqa: F401  (registers the ids)
from prophet_gym.checker import check_world_env
from prophet_gym.registration import ASSETS
from prophet_gym.sims.expert import ExpertConfig, ScriptedExpert
from prophet_gym.sims.tabletop import EDGE_X, PLATE_TOP, TASKS, TabletopSim
from prophet_gym.sims.tabletop_env import TabletopEnv
from prophet_gym.snapshot import Snapshot, SnapshotSet

HOLD_OPEN = np.array([0, 0, 0, 0, 0, 0, 1], np.float32)


@pytest.fixture(scope="module")
def sim():
    simulator = TabletopSim()
    yield simulator
    simulator.close()


def hand_position(sim):
    return sim.data.qpos[sim.model.joint("x").qposadr[0] :][:3].copy()


def seed_of(sim, task):
    for seed in range(100):
        sim.reset(seed=seed)
        if sim.task == task:
            return seed
    raise AssertionError(f"no {task} among 100 seeds")


def commands(count, seed=0):
    rng = np.random.default_rng(seed)
    spec = TabletopSim.action_spec
    drawn = rng.uniform(spec.low, spec.high, (count, 7)) * 0.7
    drawn[:, 6] = rng.integers(2, size=count)
    return drawn.astype(np.float32)


def test_reset_is_a_function_of_the_seed(sim):
    states = []
    for seed in (3, 4, 3):
        sim.reset(seed=seed)
        states.append(sim.get_state())
    assert np.array_equal(states[0], states[2])
    assert not np.array_equal(states[0], states[1])


def test_state_restores_physics_bit_for_bit_in_another_simulator(sim):
    other = TabletopSim()
    for seed in range(3):
        sim.reset(seed=seed)
        expert = ScriptedExpert(ExpertConfig())
        for _ in range(13):  # mostly in the middle of a grasp or a push
            sim.step(expert.act(sim))
        state = sim.get_state()
        ends = []
        for simulator in (sim, other, sim):
            simulator.reset(state=state)
            for command in commands(8, seed):
                simulator.step(command)
            ends.append(simulator.get_state())
        assert np.array_equal(ends[0], ends[1])
        assert np.array_equal(ends[0], ends[2])


@pytest.mark.render
def test_state_restores_the_image_with_its_colours(sim):
    other = TabletopSim()
    for seed in range(4):
        sim.reset(seed=seed)
        other.set_state(sim.get_state())
        assert np.array_equal(sim.render(), other.render())
        assert sim.instruction == other.instruction
    other.close()


@pytest.mark.parametrize("state", [np.zeros(3), np.zeros((2, 158))])
def test_foreign_state_is_refused(sim, state):
    with pytest.raises(ValueError, match="A Tabletop state has shape"):
        sim.set_state(state)


def test_seed_and_state_together_are_refused(sim):
    with pytest.raises(ValueError, match="both a seed and a state"):
        sim.reset(seed=0, state=sim.get_state())


def test_hand_tracks_the_commanded_pose(sim):
    sim.reset(seed=0)
    for command in ([0.03, 0, 0, 0, 0, 0.1, 1], [0, -0.04, 0.02, 0, 0, 0, 0], [-0.04, 0.04, 0.02, 0.1, 0, 0, 1]):
        sim.step(np.array(command, np.float32))
        assert np.abs(hand_position(sim) - sim.commanded_pose[0, :3, 3]).max() < 0.005  # lag: about 10 ms
    for _ in range(2):
        sim.step(HOLD_OPEN)
    assert np.abs(hand_position(sim) - sim.commanded_pose[0, :3, 3]).max() < 5e-4


def test_commanded_pose_is_clamped_to_the_workspace(sim):
    sim.reset(seed=0)
    for _ in range(12):
        sim.step(np.array([0.04, 0.04, 0.04, 0, 0, 0, 1], np.float32))
    assert np.array_equal(sim.commanded_pose[0, :3, 3], sim.action_spec.workspace[1])


def test_rotation_through_the_hinges_singularity_stays_continuous(sim):
    sim.reset(seed=0)
    for _ in range(5):
        sim.step(np.array([0, 0, 0.04, 0, 0, 0, 1], np.float32))
    for _ in range(14):  # 3.5 rad about y passes a pitch of 90 degrees and 180
        sim.step(np.array([0, 0, 0, 0, 0.25, 0, 1], np.float32))
    sim.step(HOLD_OPEN)
    measured = sim.data.body("hand").xmat.reshape(3, 3)
    assert np.abs(measured - sim.commanded_pose[0, :3, :3]).max() < 0.05


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (np.zeros((2, 7)), "one command of shape"),
        (np.full(7, np.nan), "finite"),
        (np.full(7, 0.5), "out of bounds"),
    ],
)
def test_bad_commands_are_refused(sim, command, message):
    sim.reset(seed=0)
    before = sim.get_state()
    with pytest.raises(ValueError, match=message):
        sim.step(command)
    assert np.array_equal(before, sim.get_state())


def test_an_undisturbed_block_stays_where_it_is(sim):
    for seed in range(4):
        sim.reset(seed=seed)
        start = sim.block_pos
        sim.step(np.array([0, 0, 0.04, 0, 0, 0, 1], np.float32))
        for _ in range(10):
            sim.step(HOLD_OPEN)
        assert np.abs(sim.block_pos - start).max() < 2e-4


def test_a_grasped_block_follows_the_hand_and_a_released_one_rests(sim):
    sim.reset(seed=seed_of(sim, "put"))
    expert = ScriptedExpert(ExpertConfig())
    offsets, success = [], []
    for _ in range(40):
        sim.step(expert.act(sim))
        if sim.pads_touching == 2 and sim.block_pos[2] > 0.05:
            offsets.append(sim.block_pos - hand_position(sim))
        success.append(sim.is_success())
    assert len(offsets) > 4
    assert np.ptp(offsets, axis=0).max() < 0.004  # neither slips nor spins
    assert success[-1]
    assert not success[0]
    assert sum(np.diff(np.array(success, int)) != 0) == 1  # once on the plate, it stays
    assert sim.block_pos[2] == pytest.approx(PLATE_TOP + 0.027, abs=1e-3)


@pytest.mark.parametrize("task", TASKS)
def test_success_names_the_right_place(sim, task):
    sim.reset(seed=seed_of(sim, task))
    start = sim._block.qposadr[0]
    plate = sim.plate_pos
    places = {
        "put": [*plate[:2], PLATE_TOP + 0.027],
        "push_left": [-EDGE_X - 0.02, 0.18, 0.027],
        "push_right": [EDGE_X + 0.02, 0.18, 0.027],
    }
    for name, place in places.items():
        state = sim.get_state()
        sim.data.qpos[start : start + 3] = place
        sim.step(HOLD_OPEN)
        assert sim.is_success() == (name == task)
        sim.set_state(state)
    words = sim.instruction.split()
    assert words[0] == task.split("_")[0]
    assert (words[-1] == "plate" and words[-2] in sim.look.plates) or words[-2:] == [task.removeprefix("push_"), "edge"]


@pytest.mark.render
def test_projection_hits_the_rendered_block(sim):
    errors = []
    for seed in range(12):
        sim.reset(seed=seed)
        mask = sim._get_renderer().mask(sim.data, sim._block_geom)
        if mask.sum() > 50:  # not hidden by the hand
            rows, columns = np.nonzero(mask)
            errors.append([columns.mean(), rows.mean()] - sim.block_px())
            assert sim.block_visible == mask.sum()
    assert len(errors) > 8
    assert np.abs(errors).max() < 0.5
    assert np.abs(np.mean(errors, axis=0)).max() < 0.15


@pytest.mark.render
def test_block_pixels_have_the_named_colour(sim):
    dominant = {"red": [0], "green": [1], "yellow": [0, 1], "purple": [0, 2]}
    for seed in range(8):
        sim.reset(seed=seed)
        mask = sim._get_renderer().mask(sim.data, sim._block_geom)
        colour = sim.render()[mask].mean(0)
        strong = dominant[sim.instruction.split()[2]]
        weak = [channel for channel in range(3) if channel not in strong]
        assert colour[strong].min() > colour[weak].max() + 25


@pytest.mark.render
def test_a_closed_renderer_says_so(sim):
    other = TabletopSim()
    renderer = other._get_renderer()
    other.close()
    with pytest.raises(ValueError, match="closed"):
        renderer.render(other.data)
    assert other.render().shape == (64, 64, 3)  # the simulator makes itself a new one


@pytest.mark.render
def test_env_keeps_both_contracts():
    env = gym.make("Tabletop-v0", chunk_length=3, horizon=7, render_mode="rgb_array")
    check_env(env.unwrapped)
    check_world_env(env)
    assert env.render().shape == (64, 64, 3)
    env.close()


@pytest.mark.render
def test_env_starts_at_a_snapshot_and_rewards_success():
    env = TabletopEnv(chunk_length=8, horizon=40)
    env.reset(seed=1)
    snapshot = env.snapshot("here")
    env.reset(seed=2)
    observation, info = env.reset(options={"snapshot": snapshot})
    assert np.array_equal(observation["image"], snapshot.image)
    assert info["instruction"] == snapshot.instruction
    expert, total = ScriptedExpert(ExpertConfig()), 0.0
    for _ in range(5):
        # The expert looks at the simulator after every command: plan the chunk, go back, execute it as one.
        state, chunk = env.sim.get_state(), []
        for _ in range(8):
            chunk.append(expert.act(env.sim))
            env.sim.step(chunk[-1])
        env.sim.set_state(state)
        _, reward, terminated, truncated, info = env.step(np.stack(chunk))
        total += reward
        if terminated or truncated:
            break
    assert terminated
    assert total == 1.0
    assert info["verdict"].success
    with pytest.raises(ValueError, match="after the episode ended"):
        env.step(np.stack(chunk))
    env.close()


@pytest.mark.render
def test_env_refuses_what_it_cannot_start_from():
    env = TabletopEnv(chunk_length=2)
    with pytest.raises(ValueError, match="no episode yet"):
        env.step(HOLD_OPEN[None])
    with pytest.raises(ValueError, match="Did you mean 'snapshot'"):
        env.reset(options={"snapshots": None})
    image = np.zeros((64, 64, 3), np.uint8)
    foreign = Snapshot(image=image, instruction="", eef_pose=np.eye(4)[None], gripper=np.ones(1), name="elsewhere")
    with pytest.raises(ValueError, match="'elsewhere'.*no simulator_state"):
        env.reset(options={"snapshot": foreign})
    with pytest.raises(ValueError, match="no simulator_state"):
        TabletopEnv(snapshots=[foreign])
    with pytest.raises(ValueError, match="chunk_length=0"):
        TabletopEnv(chunk_length=0)
    with pytest.raises(ValueError, match="render_mode"):
        TabletopEnv(render_mode="human")
    with pytest.raises(ValueError, match="version 1"):
        env.set_state({})


@pytest.mark.render
def test_packaged_snapshots_match_the_simulator(sim):
    snapshots = SnapshotSet.load(ASSETS / "tabletop" / "snapshots")
    assert len(snapshots) == 64
    for snapshot in snapshots[:6]:
        sim.reset(state=snapshot.simulator_state)
        assert sim.instruction == snapshot.instruction
        assert np.array_equal(sim.commanded_pose, snapshot.eef_pose)
        assert np.abs(sim.render().astype(int) - snapshot.image).mean() < 1.0  # drivers differ in rounding
