"""What the environments and the recorder need of a simulator: one scene, native commands in, image and truth out."""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np

from prophet_gym.action_frames import Camera
from prophet_gym.actions import ActionSpec
from prophet_gym.snapshot import Snapshot

__all__ = ["EndsAt", "Simulator", "take_snapshot"]

EndsAt = Literal["command", "chunk", "horizon"]
"""When success ends an episode: at the command that brings it (LIBERO's loops), after its chunk (Tabletop), or only at
the horizon, where it may have been lost again (SimplerEnv's published protocol)."""


class Simulator(Protocol):
    """One scene with N end-effectors.

    Poses are end-effector to world, in metres; the world is the frame of the commands, and does not move.
    """

    @property
    def name(self) -> str:
        """Where it comes from, for metadata and errors."""
        ...

    @property
    def action_spec(self) -> ActionSpec:
        """Meaning of the commands."""
        ...

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the image, pixels."""
        ...

    @property
    def ends_at(self) -> EndsAt:
        """When success ends an episode."""
        ...

    @property
    def task(self) -> str:
        """Name of the task of the present episode."""
        ...

    @property
    def instruction(self) -> str:
        """The goal in words."""
        ...

    @property
    def camera(self) -> Camera | None:
        """Calibration of all images of an episode (K, E from the frame of the poses); None: unknown, or it moves."""
        ...

    @property
    def eef_pose(self) -> np.ndarray:
        """(N, 4, 4) float64: commanded poses in Tabletop, measured ones elsewhere."""
        ...

    @property
    def gripper(self) -> np.ndarray:
        """(N,) float64 open ratio, likewise."""
        ...

    def reset(self, seed: int | None = None, state: np.ndarray | None = None) -> None:
        """Starts an episode: one that the seed draws, or the one with this state."""
        ...

    def step(self, command: np.ndarray) -> None:
        """Executes one native command (7N,) for one control period."""
        ...

    def render(self) -> np.ndarray:
        """Returns the present image (H, W, 3) uint8 RGB, upright."""
        ...

    def is_success(self) -> bool:
        """Returns whether the instruction is fulfilled now."""
        ...

    def labels(self) -> dict[str, np.ndarray]:
        """Returns what else is known about the present image, for recordings."""
        ...

    def get_state(self) -> np.ndarray:
        """Returns all that decides the future: flat float64."""
        ...

    def set_state(self, state: np.ndarray) -> None:
        """Restores :meth:`get_state`'s result, and refuses another simulator's."""
        ...

    def close(self) -> None:
        """Frees what the operating system or the graphics card lent."""
        ...


def take_snapshot(sim: Simulator, name: str = "") -> Snapshot:
    """Returns the present moment as the start of a rollout, for a world model and for this simulator."""
    return Snapshot(
        image=sim.render(),
        instruction=sim.instruction,
        eef_pose=sim.eef_pose.copy(),
        gripper=sim.gripper.copy(),
        camera=sim.camera,
        simulator_state=sim.get_state(),
        name=name,
    )
