"""``SingleStepVectorEnv``: one command at a time in worlds that step in chunks; what every interface here is built on.

Data flow: commands (B, 7) of the interface's convention -> ``convert_commands`` -> a buffer -> the chunk engine, a
:class:`prophet_gym.ProphetVectorEnv` or a batch of simulators -> observations of that engine. With
``action_buffer="immediate"`` the world runs for every command. With ``"chunk"`` it runs once per policy chunk; between
two runs a step returns the latest real observation and ``info["stale"]``.

Success does not end a rollout where the engine's autoreset is disabled: other projects' loops step on after it, and it
may be lost again.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from gymnasium.spaces import Box, Dict
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from ..action_frames import Camera
from ..actions import ActionSpec, integrate_poses
from ..errors import nearest
from .commands import convert_commands, poses_from_state

__all__ = ["ACTION_BUFFERS", "SingleStepVectorEnv"]

logger = logging.getLogger(__name__)

ACTION_BUFFERS = ("immediate", "chunk")


class SingleStepVectorEnv(VectorEnv):
    """A batch of worlds with one command per step.

    Observation: the engine's, ``Dict(image (B, H, W, 3) uint8, state (B, 8) float32)``. Action: ``Box(B, 7)`` of native
    commands of ``action_spec``; what passes its bounds or the world's is cut, as controllers do, and
    ``info["clipped"]`` says so. Reward: 1 where the latest verdict is success. ``terminated`` is that verdict,
    ``truncated`` the horizon.

    Info: the engine's latest, and ``stale`` (no new prediction: observation and verdict are those of an earlier step),
    ``clipped`` and ``elapsed_steps`` (commands since the reset, this one included), each (B,). ``frames`` comes with
    real steps only.

    Args:
        engine: chunk engine with autoreset disabled, or in the mode ``SAME_STEP``: then slots restart as they end.
        action_spec: convention of the commands; default the world's own.
        action_buffer: "immediate", one prediction per command, or "chunk", one per ``engine``'s chunk length.

    Raises:
        ValueError: another autoreset mode, more than one end-effector, an unknown ``action_buffer``, or, with
            ``SAME_STEP``, a horizon that is no whole number of chunks.
    """

    def __init__(self, engine: Any, *, action_spec: ActionSpec | None = None, action_buffer: str = "immediate") -> None:
        if action_buffer not in ACTION_BUFFERS:
            hint = nearest(action_buffer, ACTION_BUFFERS)
            raise ValueError(f"action_buffer={action_buffer!r}: expected one of {ACTION_BUFFERS}.{hint}")
        self.autoreset_mode = engine.metadata["autoreset_mode"]
        if self.autoreset_mode is AutoresetMode.NEXT_STEP:
            raise ValueError("autoreset_mode='NextStep' would swallow a chunk: expected 'Disabled' or 'SameStep'.")
        self._world = engine if hasattr(engine, "world_model") else engine.envs[0].unwrapped
        self.world_spec: ActionSpec = getattr(self._world, "world_model", self._world).action_spec
        self.action_spec = self.world_spec if action_spec is None else action_spec
        if (self.world_spec.num_effectors, self.action_spec.num_effectors) != (1, 1):
            raise ValueError(
                f"the world has {self.world_spec.num_effectors} end-effectors; expected 1: an interface of single "
                "commands has 7 numbers. Use interface='chunk' or 'flat'."
            )
        self.engine, self.num_envs, self.horizon = engine, engine.num_envs, int(self._world.horizon)
        self.chunk_length = 1 if action_buffer == "immediate" else engine.single_action_space.shape[0]
        if self.autoreset_mode is AutoresetMode.SAME_STEP and self.horizon % self.chunk_length:
            raise ValueError(
                f"horizon={self.horizon} is no multiple of chunk_length={self.chunk_length}: slots that restart would "
                "run out of step with their neighbours. Change one of the two."
            )
        self.metadata = {**engine.metadata, "render_fps": self.world_spec.control_hz}
        low, high = (np.asarray(bound, np.float32) for bound in (self.action_spec.low, self.action_spec.high))
        self.single_action_space = Box(low, high, dtype=np.float32)
        self.single_observation_space: Dict = engine.single_observation_space
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.observation_space = engine.observation_space
        self._buffer: list[np.ndarray] = []
        self._observation: dict[str, np.ndarray] | None = None  # None before the first reset

    @property
    def snapshots(self) -> Any:
        """Where rollouts start, or None."""
        return self._world.snapshots

    def reset(
        self, *, seed: Any = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Starts every rollout; arguments and errors as the engine's, without ``reset_mask``."""
        if "reset_mask" in (options or {}):
            raise ValueError("reset_mask: slots of single commands start together; reset all of them.")
        self._observation, info = self.engine.reset(seed=seed, options=options)
        self._buffer, self._warned = [], False
        self._terminated, self._truncated = np.zeros((2, self.num_envs), dtype=bool)
        self._elapsed = np.zeros(self.num_envs, dtype=np.int64)
        self._poses = poses_from_state(self._observation["state"])
        return self._report(info, np.zeros(self.num_envs, dtype=bool), stale=False)

    def step(
        self, actions: np.ndarray
    ) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Takes one command (B, 7) in every slot.

        Raises:
            ValueError: called before ``reset`` or after the horizon, or the commands are of the wrong shape or not
                finite.
        """
        native, clipped = self._convert(actions)
        self._buffer.append(native)
        self._elapsed += 1
        if len(self._buffer) < self.chunk_length and not (self._elapsed >= self.horizon).any():
            observation, info = self._report(self._info, clipped, stale=True)
        else:
            observation, info = self._run(clipped)
        terminated, truncated = self._terminated.copy(), self._truncated.copy()
        if self.autoreset_mode is AutoresetMode.SAME_STEP:  # what stale steps repeat is the fresh rollout's
            self._terminated[:], self._truncated[:] = False, False
        return observation, terminated.astype(np.float64), terminated, truncated, info

    def render(self) -> tuple[np.ndarray, ...]:
        """Returns the latest real frame (H, W, 3) uint8 of every slot."""
        return tuple(self.latest()["image"].copy())

    def cameras(self) -> list[Camera | None]:
        """Returns the calibrated camera of every slot's image, None where none is known."""
        if hasattr(self.engine, "envs"):
            return [slot.unwrapped.sim.camera for slot in self.engine.envs]
        state = self.engine.get_state()["world_model"]
        world = self._world.world_model
        shown_height, shown_width = world.image_size
        height, width = getattr(world, "world_model", world).image_size  # a ResizedWorldModel's state is its model's
        pairs = zip(state["intrinsics"].numpy(), state["extrinsics"].numpy(), strict=True)
        return [
            Camera(k, e, width, height).resized(shown_width, shown_height) if np.isfinite(k).all() else None
            for k, e in pairs
        ]

    def close_extras(self, **kwargs: Any) -> None:
        """Closes the engine."""
        self.engine.close()

    def _convert(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.latest()
        actions = np.asarray(actions, np.float64)
        if actions.shape != self.action_space.shape:
            raise ValueError(f"commands of shape {actions.shape}; expected {self.action_space.shape}: one per slot.")
        if not np.isfinite(actions).all():
            raise ValueError(
                f"commands {actions.tolist()} are not finite. Does the policy read what an imagined world does not "
                "know and gives as NaN (joint angles, a camera without calibration)?"
            )
        if self._truncated.all() and self.autoreset_mode is AutoresetMode.DISABLED:
            raise ValueError(f"step() was called after the horizon of {self.horizon} commands. Call reset() first.")
        native, clipped = convert_commands(actions, self.action_spec, self.world_spec, self._poses)
        if clipped.any() and not self._warned:
            logger.warning("Commands beyond the world's bounds are cut to them: %s -> %s", actions[0], native[0])
            self._warned = True
        canonical = self.world_spec.to_canonical(native)
        self._poses = integrate_poses(self._poses, canonical[:, None], self.world_spec)[:, 0]
        return native, clipped

    def _run(self, clipped: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Executes the buffer."""
        chunk, self._buffer = np.stack(self._buffer, axis=1), []
        if self.autoreset_mode is AutoresetMode.DISABLED:
            self.engine.resume()
        self._observation, _, terminated, truncated, info = self.engine.step(chunk)
        self._poses = poses_from_state(self._observation["state"])
        self._terminated, self._truncated = np.array(terminated), np.array(truncated)
        if self.autoreset_mode is AutoresetMode.SAME_STEP:
            self._elapsed[self._terminated | self._truncated] = 0
        return self._report(info, clipped, stale=False)

    def _report(
        self, info: dict[str, Any], clipped: np.ndarray, *, stale: bool
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Returns the latest observation and info, copied: callers may write into them."""
        latest = self.latest()
        self._info = info
        fresh = ("frames", "_frames", "final_obs", "_final_obs", "final_info", "_final_info")
        kept = {key: value for key, value in info.items() if not (stale and key in fresh)}
        everyone = np.ones(self.num_envs, dtype=bool)
        own = {"stale": everyone & stale, "clipped": clipped, "elapsed_steps": self._elapsed.copy()}
        masks = {f"_{key}": everyone.copy() for key in own}
        return {key: value.copy() for key, value in latest.items()}, {**kept, **own, **masks}

    def latest(self) -> dict[str, np.ndarray]:
        """Returns the latest real observation.

        Raises:
            ValueError: before the first reset.
        """
        if self._observation is None:
            raise ValueError("The environment has not started: call reset() first.")
        return self._observation
