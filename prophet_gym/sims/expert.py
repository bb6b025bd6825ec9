"""Scripted behaviours on Tabletop: an expert, a deliberately mediocre one, typical failures and random motion.

A world model that has only seen success imagines success. So the recorder (:mod:`prophet_gym.data.record`) mixes these
behaviours: noise, offsets that make a grasp miss, jaws that never close, drops, wrong places, pushes and hovering. They
see the simulator's state and command through the same actions as any policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prophet_gym.sims.tabletop import BLOCK_HALF, EDGE_X, PLATE_TOP, TabletopSim

BEHAVIOURS = (
    "expert",
    "half_good",
    "never_close",
    "close_early",
    "drop",
    "wrong_place",
    "push_aside",
    "hover",
    "random",
)
FAILURES = BEHAVIOURS[2:8]

_HAND_OUTER = 0.010  # m from the pinch point to the outer face of a closed finger
_GRASP_Z = BLOCK_HALF


@dataclass(frozen=True)
class ExpertConfig:
    """How one episode is played.

    Attributes:
        behaviour: One of ``BEHAVIOURS``.
        speed: Largest translation per command in metres.
        gain: Fraction of the remaining distance commanded per step.
        white_noise: Standard deviation of the independent command noise in metres.
        smooth_noise: Standard deviation of the correlated command noise in metres.
        grasp_bias: Offset (x, y, z) of the grasp in the block's frame in metres.
        place_bias: Offset (x, y) of the place from the goal in metres.
        travel_height: Height of the pinch point between grasp and place in metres.
        fault_step: When a fault strikes: steps carried before a drop, steps before closing early.
        restless: Move at random near the block once the script has ended, instead of holding still.
    """

    behaviour: str = "expert"
    speed: float = 0.036
    gain: float = 0.9
    white_noise: float = 0.0
    smooth_noise: float = 0.0
    grasp_bias: tuple[float, float, float] = (0.0, 0.0, 0.0)
    place_bias: tuple[float, float] = (0.0, 0.0)
    travel_height: float = 0.11
    fault_step: int = 3
    restless: bool = False

    def __post_init__(self) -> None:
        if self.behaviour not in BEHAVIOURS:
            raise ValueError(f"Unknown behaviour {self.behaviour!r}. Choose one of {', '.join(BEHAVIOURS)}.")
        limit = TabletopSim.action_spec.high[0]
        if not 0 < self.speed <= limit:
            raise ValueError(f"speed is {self.speed} m per command, expected a value in (0, {limit}].")


def sample_config(behaviour: str, rng: np.random.Generator) -> ExpertConfig:
    """Draw speed, gains, noise and offsets of one episode.

    Args:
        behaviour: One of ``BEHAVIOURS``.
        rng: Source of the draw.

    Returns:
        The episode's configuration.
    """
    noise = rng.uniform(0.0, 1.0)
    grasp, place = rng.normal(0.0, (0.003, 0.005, 0.002)), rng.normal(0.0, 0.010, 2)
    if behaviour == "half_good":
        noise = rng.uniform(1.0, 3.0)
        grasp = rng.normal(0.0, (0.020, 0.031, 0.006))
        place = rng.normal(0.0, 0.039, 2)
    elif behaviour == "wrong_place":
        angle, distance = rng.uniform(0, 2 * np.pi), rng.uniform(0.09, 0.18)
        place = distance * np.array([np.cos(angle), np.sin(angle)])
    return ExpertConfig(
        behaviour=behaviour,
        speed=float(rng.uniform(0.025, 0.039)),
        gain=float(rng.uniform(0.75, 1.0)),
        white_noise=float(0.0015 * noise),
        smooth_noise=float(0.0015 * noise),
        grasp_bias=(float(grasp[0]), float(grasp[1]), float(grasp[2])),
        place_bias=(float(place[0]), float(place[1])),
        travel_height=float(rng.uniform(0.095, 0.125)),
        fault_step=int(rng.integers(1, 8)),
        restless=behaviour in FAILURES and bool(rng.random() < 0.6),
    )


class ScriptedExpert:
    """A closed-loop script for one episode on one simulator.

    Args:
        config: How to play.
        seed: Seed of the command noise.
    """

    def __init__(self, config: ExpertConfig, seed: int = 0) -> None:
        self.config = config
        self._rng = np.random.default_rng(seed)
        self._phase, self._ticks, self._drift = "start", 0, np.zeros(3)
        self._velocity, self._turn, self._tilt, self._open = np.zeros(3), 0.0, np.zeros(2), 1.0
        self._offset = np.zeros(2)  # of the pinch point from the block while it is held
        self._goal = np.zeros(3)
        self._side = 1.0
        self._after = 0  # commands since the script ended

    def act(self, sim: TabletopSim) -> np.ndarray:
        """The next command.

        Args:
            sim: The simulator, read only.

        Returns:
            (7,) float32 native command within the action spec's bounds.
        """
        if self._phase == "start":
            self._start(sim)
        if self.config.behaviour == "random" or (self.config.restless and self._after > 3):
            return self._random(sim)
        self._after += self._phase == "retreat"
        target, yaw, opening = getattr(self, f"_{self._plan}")(sim)
        return self._towards(sim, target, yaw, opening)

    def _start(self, sim: TabletopSim) -> None:
        behaviour = self.config.behaviour
        self._side = -1.0 if sim.task == "push_left" else 1.0
        if behaviour == "push_aside":
            self._plan, self._side = "push", float(self._rng.choice((-1.0, 1.0)))
        elif behaviour == "hover":
            self._plan = "hover"
        elif behaviour in ("expert", "half_good", "wrong_place") and sim.task != "put":
            self._plan = "push"
        else:
            self._plan = "pick"
        self._enter("approach")

    def _enter(self, phase: str) -> None:
        self._phase, self._ticks = phase, 0

    def _grasp_point(self, sim: TabletopSim) -> np.ndarray:
        cos, sin = np.cos(sim.block_yaw), np.sin(sim.block_yaw)
        x, y, z = self.config.grasp_bias
        return np.array([*(sim.block_pos[:2] + (cos * x - sin * y, sin * x + cos * y)), max(_GRASP_Z + z, 0.02)])

    def _pick(self, sim: TabletopSim) -> tuple[np.ndarray, float, float]:
        """Target point, yaw and open ratio of the pick-and-place phases."""
        config, hand = self.config, sim.commanded_pose[0, :3, 3]
        self._ticks += 1
        if self._phase == "approach":
            self._goal = self._grasp_point(sim)
            self._yaw = sim.block_yaw
            error = np.linalg.norm(hand[:2] - self._goal[:2])
            if error < 0.012 and abs(_yaw_of(sim) - self._yaw) < 0.08:
                self._enter("descend")
            elif error > 0.03 or hand[2] > config.travel_height:
                opening = 0.0 if config.behaviour == "close_early" and self._ticks > config.fault_step else 1.0
                return np.array([*self._goal[:2], config.travel_height]), self._yaw, opening
            else:
                return np.array([*self._goal[:2], 0.085]), self._yaw, 1.0
        early = config.behaviour == "close_early"
        if self._phase == "descend":
            if abs(hand[2] - self._goal[2]) < 0.006:
                self._enter("close")
            else:
                return self._goal, self._yaw, 0.0 if early else 1.0
        opening = 1.0 if config.behaviour == "never_close" else 0.0
        if self._phase == "close":
            if self._ticks >= 3:
                self._enter("lift")
            else:
                return self._goal, self._yaw, opening
        if self._phase == "lift":
            self._offset = hand[:2] - sim.block_pos[:2]
            if np.linalg.norm(self._offset) > 0.035:
                self._offset = np.zeros(2)  # an empty hand carries on
            if hand[2] > config.travel_height - 0.02:
                self._enter("carry")
            else:
                return np.array([*self._goal[:2], config.travel_height]), self._yaw, opening
        if self._phase == "carry":
            goal = np.clip(self._place(sim) + self._offset, -0.19, 0.19)
            if config.behaviour == "drop" and self._ticks >= config.fault_step % 3:
                opening = 1.0
            if np.linalg.norm(hand[:2] - goal) < 0.012:
                self._goal = np.array([*goal, hand[2] - sim.block_pos[2] + PLATE_TOP + BLOCK_HALF + 0.003])
                self._goal[2] = np.clip(self._goal[2], 0.025, 0.06)
                self._enter("lower")
            else:
                return np.array([*goal, config.travel_height]), self._yaw, opening
        if self._phase == "lower":
            if abs(hand[2] - self._goal[2]) < 0.006:
                self._enter("open")
            else:
                return self._goal, self._yaw, 1.0 if config.behaviour == "drop" else opening
        if self._phase == "open":
            if self._ticks >= 3:
                self._enter("retreat")
            else:
                return self._goal, self._yaw, 1.0
        return np.array([*self._goal[:2], 0.13]), self._yaw, 1.0

    def _place(self, sim: TabletopSim) -> np.ndarray:
        goal = sim.plate_pos[:2]
        if sim.task != "put":  # carried to the edge: a wrong way of doing a push
            goal = np.array([self._side * 0.17, sim.block_pos[1]])
        return goal + self.config.place_bias

    def _push(self, sim: TabletopSim) -> tuple[np.ndarray, float, float]:
        """Target point, yaw and open ratio of the pushing phases: closed jaws push along x."""
        config, hand, block = self.config, sim.commanded_pose[0, :3, 3], sim.block_pos
        self._ticks += 1
        bias = config.grasp_bias
        if self._phase == "approach":
            gap = BLOCK_HALF * 1.35 + _HAND_OUTER + 0.022
            self._goal = np.array([block[0] - self._side * gap, block[1] + bias[1], 0.026])
            if np.linalg.norm(hand[:2] - self._goal[:2]) < 0.012:
                self._enter("descend")
            else:
                return np.array([*self._goal[:2], 0.095]), 0.0, 0.0
        if self._phase == "descend":
            if abs(hand[2] - self._goal[2]) < 0.008:
                self._enter("push")
            else:
                return self._goal, 0.0, 0.0
        if self._phase == "push":
            reach = EDGE_X + 0.02 + self._side * config.place_bias[0]
            if config.behaviour == "wrong_place":
                reach = EDGE_X - 0.025 - 0.4 * float(np.linalg.norm(config.place_bias))  # stops short
            elif config.behaviour == "push_aside":
                reach = self._side * self._goal[0] + 0.02 * config.fault_step + 0.06
            if self._side * block[0] > reach or self._ticks > 14:
                self._goal = hand - (self._side * 0.03, 0.0, 0.0)
                self._enter("back")
            else:
                step = 0.75 * config.speed  # slower than the hand could: the block must not run ahead
                along = min(self._side * hand[0] + step / config.gain, 0.2)
                return np.array([self._side * along, block[1] + bias[1], self._goal[2]]), 0.0, 0.0
        if self._phase == "back" and self._ticks < 2:
            return self._goal, 0.0, 0.0
        self._phase = "retreat"
        return np.array([*self._goal[:2], 0.12]), 0.0, 0.0

    def _hover(self, sim: TabletopSim) -> tuple[np.ndarray, float, float]:
        """Target point, yaw and open ratio of a hand that stays above the block."""
        self._ticks += 1
        angle = 0.35 * self._ticks
        wander = 0.02 * np.array([np.cos(angle), np.sin(angle)])
        height = 0.08 + 0.012 * np.cos(0.2 * self._ticks)
        opening = float(self.config.fault_step % 2 or self._ticks % 16 < 8)
        return np.array([*(self._grasp_point(sim)[:2] + wander), height]), sim.block_yaw, opening

    def _random(self, sim: TabletopSim) -> np.ndarray:
        """Smooth random motion with a pull towards the block, jaws switching now and then."""
        rng, hand = self._rng, sim.commanded_pose[0, :3, 3]
        pull = sim.block_pos - hand + (0.0, 0.0, 0.015)
        self._velocity = 0.75 * self._velocity + rng.normal(0.0, 0.011, 3) + 0.05 * pull
        self._turn = 0.8 * self._turn + float(rng.normal(0.0, 0.02)) - 0.05 * _yaw_of(sim)
        if rng.random() < 0.12:
            self._open = float(rng.choice((0.0, 1.0)))
        self._tilt = 0.8 * self._tilt + rng.normal(0.0, 0.015, 2) - 0.1 * _tilt_of(sim)
        return _command(self._velocity, [*self._tilt, self._turn], self._open)

    def _towards(self, sim: TabletopSim, target: np.ndarray, yaw: float, opening: float) -> np.ndarray:
        config = self.config
        delta = config.gain * (target - sim.commanded_pose[0, :3, 3])
        length = float(np.linalg.norm(delta))
        delta *= min(1.0, config.speed / max(length, 1e-9))
        self._drift = 0.8 * self._drift + 0.6 * self._rng.normal(0.0, config.smooth_noise, 3)
        noise = self._drift + self._rng.normal(0.0, config.white_noise, 3)
        if self._phase == "retreat" and length < 0.01:
            noise *= 0.3  # holding still
        turn = np.clip(0.6 * (yaw - _yaw_of(sim)), -0.15, 0.15) + 4.0 * noise[0]
        tilt = -0.4 * _tilt_of(sim) + 8.0 * self._rng.normal(0.0, config.white_noise, 2)
        return _command(delta + noise, [*tilt, turn], opening)


def _yaw_of(sim: TabletopSim) -> float:
    rotation = sim.commanded_pose[0]
    return float(np.arctan2(rotation[1, 0], rotation[0, 0]))


def _tilt_of(sim: TabletopSim) -> np.ndarray:
    """Small-angle roll and pitch of the commanded pose in radians, (2,)."""
    rotation = sim.commanded_pose[0]
    return np.array([rotation[2, 1], -rotation[2, 0]])


def _command(delta: np.ndarray, turn: Sequence[float], opening: float) -> np.ndarray:
    """(7,) float32 within the bounds of the action spec."""
    spec = TabletopSim.action_spec
    command = np.array([*delta, *turn, opening], np.float32)
    return np.clip(command, np.array(spec.low, np.float32), np.array(spec.high, np.float32))
