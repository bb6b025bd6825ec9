"""Any :class:`prophet_gym.sims.simulator.Simulator` behind the chunk interface of the world models.

Same observations, actions and infos as :class:`prophet_gym.ProphetEnv`, so a policy moves between a world and its
simulator without a change; only the pixels, the poses and the reward are ground truth here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from prophet_gym.arguments import known_options, per_slot, require_between, require_snapshot, require_snapshots
from prophet_gym.judges.base import Verdict
from prophet_gym.observations import make_observation, observation_space
from prophet_gym.sims.simulator import Simulator, take_snapshot
from prophet_gym.sims.vector import make_sync_vector_env
from prophet_gym.snapshot import Snapshot

__all__ = ["SimulatorEnv"]

_STATE_VERSION = 1


class SimulatorEnv(gym.Env):
    """One simulator, one action chunk per step.

    Observation: ``Dict(image (H, W, 3) uint8, state (8N,) float32)``, the state from ``sim.eef_pose`` and
    ``sim.gripper``. Action: a chunk ``Box(C, 7N)`` of native commands; 1 to C commands are accepted. Reward: 1 where
    the episode ends in success, else 0. ``terminated`` means success, ``truncated`` that the horizon is reached; the
    chunk that reaches it is executed to its end. When success ends an episode is the simulator's ``ends_at``.

    Info: ``instruction``, ``task``, ``env_step`` (chunks so far), ``is_success``, ``judge_valid`` (always True: the
    simulator knows), ``verdict`` (None where success is not asked for yet), ``checkpoint`` (says that this is no world
    model) and, after a step, ``num_executed`` (commands of the chunk that were executed) and ``frames`` (C, H, W, 3)
    uint8, the last one repeated for commands after success; no frames within
    :func:`prophet_gym.sims.vector.without_frames`.

    Args:
        make_simulator: makes the simulator, and those of forks.
        chunk_length: C, commands in ``action_space`` and the most that a step takes.
        horizon: Commands after which an episode is truncated.
        snapshots: Where episodes start, with a simulator state each; None leaves it to the seed.
        render_mode: None or ``"rgb_array"`` (``render`` returns the current frame).

    Raises:
        ValueError: An argument is out of range, or snapshots are none or have no simulator state.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 10.0}

    def __init__(
        self,
        make_simulator: Callable[[], Simulator],
        *,
        chunk_length: int,
        horizon: int,
        snapshots: Sequence[Snapshot] | None = None,
        render_mode: str | None = None,
    ) -> None:
        require_between("chunk_length", chunk_length, 1, None)
        require_between("horizon", horizon, 1, None)
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode={render_mode!r}: expected None or 'rgb_array'.")
        require_snapshots(snapshots)
        self.chunk_length, self.horizon = int(chunk_length), int(horizon)
        self.snapshots, self.render_mode = snapshots, render_mode
        self._make_simulator = make_simulator
        self.sim: Any = make_simulator()
        for index, snapshot in enumerate(snapshots or ()):
            self.state_of(snapshot, index)
        self.action_spec = self.sim.action_spec
        self.metadata = {**self.metadata, "render_fps": self.action_spec.control_hz}
        self.observation_space = observation_space(self.action_spec, self.sim.image_size)
        self.action_space = self.action_spec.action_space(self.chunk_length)
        self.every_frame = True  # see prophet_gym.sims.vector.without_frames
        self._frame: np.ndarray | None = None  # None before the first reset
        self._env_step, self._num_commands, self._done = 0, 0, False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Starts an episode.

        Args:
            seed: Of the scene, or of the draw from ``snapshots``; None goes on with the generator of the last reset.
            options: ``{"snapshot": Snapshot}`` to start there.

        Raises:
            ValueError: An unknown option, or a snapshot without a state of this simulator.
        """
        super().reset(seed=seed)
        snapshot = known_options(options, ("snapshot",)).get("snapshot")
        if snapshot is None and self.snapshots is not None:
            snapshot = self.snapshots[int(self.np_random.integers(len(self.snapshots)))]
        if snapshot is None:
            self.sim.reset(seed=int(self.np_random.integers(2**31)))
        else:
            self.sim.reset(state=self.state_of(snapshot, 0))
        self._env_step, self._num_commands, self._done = 0, 0, False
        self._frame = self.sim.render()
        return self._observe(), self._info(None)

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Executes a chunk (c, 7N) of native commands, 1 <= c <= C.

        Raises:
            ValueError: Called before ``reset`` or after the episode ended, or the action is of the wrong shape, not
                finite, out of bounds or too long.
        """
        self._require_started()
        if self._done:
            raise ValueError("step() was called after the episode ended. Call reset() first.")
        action = self.action_spec.check(action, self.chunk_length)
        frames, executed, over = [], 0, False
        while not over:
            self.sim.step(action[executed])
            executed += 1
            over = executed == len(action) or (self.sim.ends_at == "command" and self.sim.is_success())
            if over or self.every_frame:
                frames.append(self.sim.render())
        self._frame = frames[-1]
        self._env_step += 1
        self._num_commands += executed
        truncated = self._num_commands >= self.horizon
        asked = truncated or self.sim.ends_at != "horizon"
        success = asked and bool(self.sim.is_success())
        self._done = success or truncated
        info = self._info(Verdict(success, float(success), reason="simulator state") if asked else None)
        info["num_executed"] = executed
        if self.every_frame:
            info["frames"] = np.stack(frames + frames[-1:] * (len(action) - executed))
        return self._observe(), float(success), success, truncated, info

    def render(self) -> np.ndarray | None:
        """Returns the current frame (H, W, 3) uint8, or None without ``render_mode``."""
        if self.render_mode is None:
            return None
        return self._require_started().copy()

    def snapshot(self, name: str = "") -> Snapshot:
        """Returns the present moment as a start, for this simulator and for the world model."""
        self._require_started()
        return take_snapshot(self.sim, name)

    def get_state(self) -> dict[str, Any]:
        """Returns all that the future depends on: plain numbers, strings and one array."""
        self._require_started()
        return {
            "version": _STATE_VERSION,
            "simulator": self.sim.get_state(),
            "rng": copy.deepcopy(self.np_random.bit_generator.state),
            "env_step": self._env_step,
            "num_commands": self._num_commands,
            "done": self._done,
        }

    def set_state(self, state: dict[str, Any]) -> dict[str, np.ndarray]:
        """Restores :meth:`get_state`'s result, here or in another process, and returns the observation.

        Raises:
            ValueError: Not such a state.
        """
        if not isinstance(state, dict) or state.get("version") != _STATE_VERSION:
            found = state.get("version") if isinstance(state, dict) else type(state).__name__
            raise ValueError(f"set_state expects what get_state() returned (version {_STATE_VERSION}), got {found!r}.")
        self.sim.set_state(state["simulator"])
        self.np_random.bit_generator.state = copy.deepcopy(state["rng"])
        self._env_step, self._num_commands, self._done = state["env_step"], state["num_commands"], state["done"]
        self._frame = self.sim.render()
        return self._observe()

    def resume(self) -> None:
        """Lets an episode that ended in success, short of the horizon, go on; the next step may lose it again."""
        self._done = self._num_commands >= self.horizon

    def fork(self, n: int, *, seeds: Sequence[int] | None = None) -> SyncVectorEnv:
        """Returns n members that go on from here, as a vector environment with autoreset disabled.

        Physics has no noise: equal actions give equal futures.

        Args:
            n: Members.
            seeds: One per member, of its later resets; without them, members draw the same scenes.

        Raises:
            ValueError: Called before ``reset``, n below 1, or another number of seeds.
        """
        state = self.get_state()
        require_between("n", n, 1, None)
        given = iter(per_slot("seeds", seeds, n))

        def make_member() -> SimulatorEnv:
            member = self._another()
            member.set_state(state)
            if (seed := next(given)) is not None:
                member.np_random = seeding.np_random(seed)[0]
            return member

        return make_sync_vector_env(make_member, n, AutoresetMode.DISABLED)

    def state_of(self, snapshot: Snapshot, index: int) -> np.ndarray:
        """Returns the simulator's state of a snapshot, the one at ``index`` of those given.

        Raises:
            ValueError: It has none.
        """
        state = require_snapshot(snapshot, index).simulator_state
        if state is None:
            raise ValueError(
                f"Snapshot {index} ({snapshot.name!r}) has no simulator_state, so the simulator cannot start there. "
                "Take snapshots with snapshot() of this environment or from its recordings; others start world models "
                "only."
            )
        return state

    def close(self) -> None:
        """Closes the simulator."""
        self.sim.close()

    def _another(self) -> SimulatorEnv:
        """Returns an environment like this one that has not started."""
        return SimulatorEnv(
            self._make_simulator,
            chunk_length=self.chunk_length,
            horizon=self.horizon,
            snapshots=self.snapshots,
            render_mode=self.render_mode,
        )

    def _require_started(self) -> np.ndarray:
        if self._frame is None:
            raise ValueError("This environment has no episode yet. Call reset() first.")
        return self._frame

    def _observe(self) -> dict[str, np.ndarray]:
        return make_observation(self._require_started(), self.sim.eef_pose, self.sim.gripper)

    def _info(self, verdict: Verdict | None) -> dict[str, Any]:
        return {
            "instruction": self.sim.instruction,
            "task": self.sim.task,
            "env_step": self._env_step,
            "is_success": bool(verdict and verdict.success),
            "judge_valid": True,
            "verdict": verdict,
            "checkpoint": f"no weights: simulation ({self.sim.name})",
        }
