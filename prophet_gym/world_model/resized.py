"""A world model that shows images of another size than it works at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ..data.fitting import fit_camera, fit_frames
from ..snapshot import Snapshot
from .state import RolloutState, WorldModel


class ResizedWorldModel:
    """Start images are shrunk to the model's size and imagined frames enlarged (both stretched); nothing is added.

    The rollout state stays at the model's size: enlarged frames never go back into the model.

    Args:
        world_model: the model.
        image_size: (H, W) of the frames shown, pixels.

    Raises:
        ValueError: ``image_size`` is no pair of positive integers.
    """

    def __init__(self, world_model: WorldModel, image_size: tuple[int, int]) -> None:
        given = np.asarray(image_size)
        if given.shape != (2,) or given.dtype.kind not in "iu" or given.min() < 1:
            raise ValueError(f"image_size={image_size!r}: expected height and width in pixels, such as (64, 64)")
        self.world_model, self.image_size = world_model, (int(image_size[0]), int(image_size[1]))
        self.chunk_length: int = world_model.chunk_length
        self.num_effectors: int = world_model.num_effectors
        self.action_spec = world_model.action_spec
        self.num_inference_steps: int = world_model.num_inference_steps
        self.requires_camera: bool = world_model.requires_camera
        height, width = world_model.image_size
        info = world_model.checkpoint_info
        self.checkpoint_info: dict[str, Any] = {**info, "name": f"{info.get('name')} (works at {height}x{width})"}

    @property
    def device(self) -> Any:
        """Device of the model."""
        return getattr(self.world_model, "device", torch.device("cpu"))

    def begin(self, snapshots: Sequence[Snapshot], seeds: Sequence[int]) -> RolloutState:
        """Start one slot a snapshot, as the model does.

        Raises:
            ValueError: a snapshot has another size than ``image_size``, or does not fit the model.
        """
        for i, snapshot in enumerate(snapshots):
            if snapshot.image.shape[:2] != self.image_size:
                raise ValueError(
                    f"snapshot {i}: image of {snapshot.image.shape[0]}x{snapshot.image.shape[1]} pixels; this "
                    f"environment shows {self.image_size[0]}x{self.image_size[1]}: resize the image and its camera "
                    "(resized_snapshot), or make the environment with image_size=..."
                )
        return self.world_model.begin([resized_snapshot(s, self.world_model.image_size) for s in snapshots], seeds)

    def predict(
        self, state: RolloutState, actions: np.ndarray, num_inference_steps: int | None = None
    ) -> tuple[np.ndarray, RolloutState]:
        """Imagine one chunk, (B, C, H, W, 3) uint8 at ``image_size``; arguments and errors are the model's."""
        frames, after = self.world_model.predict(state, actions, num_inference_steps)
        shown = fit_frames(frames.reshape(-1, *frames.shape[2:]), self.image_size, "stretch")
        return shown.reshape(*frames.shape[:2], *shown.shape[1:]), after


def resized_snapshot(snapshot: Snapshot, image_size: tuple[int, int]) -> Snapshot:
    """Return the snapshot with image and camera stretched to (H, W) pixels."""
    if snapshot.image.shape[:2] == tuple(image_size):
        return snapshot
    camera = None if snapshot.camera is None else fit_camera(snapshot.camera, image_size, "stretch")
    return replace(snapshot, image=fit_frames(snapshot.image[None], image_size, "stretch")[0], camera=camera)
