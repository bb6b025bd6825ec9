"""Random crops and colours of whole episodes, mirror images, reversal: more scenes out of few recordings."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy.spatial.transform import Rotation

from prophet_gym.action_frames import Camera
from prophet_gym.data.episode import Episode

__all__ = ["VARIANT_OF", "augmented", "mirrored", "reversed_in_time"]

VARIANT_OF = "variant_of"
"""Key of the metadata of a variant: the name of the episode that it was made of."""

_SMALLEST = 0.75  # share of height and width that a crop keeps at least
_GAIN, _OFFSET = 0.15, 12.0  # largest change of a channel's contrast (relative) and brightness (grey levels)


def augmented(episode: Episode, rng: np.random.Generator) -> Episode:
    """Return the episode seen through one random crop and with one random colour of light.

    All frames change alike, and calibration and labels in pixels with them; commands, poses and everything else stay:
    what a command does is the same. The frames are smaller; stretch them afterwards.

    Args:
        episode: any episode; its frames are decoded.
        rng: draws the crop, 75 to 100 % of height and width, and per channel a gain within 15 % and an offset within 12
            grey levels.
    """
    height, width = episode.frames.shape[1:3]
    scale = rng.uniform(_SMALLEST, 1.0)
    h, w = max(1, round(scale * height)), max(1, round(scale * width))
    top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
    gain, offset = rng.uniform(1 - _GAIN, 1 + _GAIN, 3), rng.uniform(-_OFFSET, _OFFSET, 3)
    frames = episode.frames[:, top : top + h, left : left + w] * gain + offset
    camera = episode.camera
    if camera is not None:
        K = camera.K.copy()
        K[:2, 2] -= left, top
        camera = Camera(K, camera.E, w, h)
    moved = {key: value - (left, top) if key.endswith("_px") else value for key, value in episode.labels.items()}
    return replace(episode, images=frames.round().clip(0, 255).astype(np.uint8), camera=camera, labels=moved)


def mirrored(episode: Episode) -> Episode:
    """Return the episode of the mirrored world, y and -y exchanged, seen through the mirrored image.

    Images, camera, poses, commands and labels in pixels agree as before. There is no instruction: left is right now.

    Raises:
        ValueError: several end-effectors, which would have to exchange their roles.
    """
    if episode.action_spec.num_effectors != 1:
        raise ValueError(
            f"episode {episode.name!r} has {episode.action_spec.num_effectors} end-effectors; expected 1: in a mirror "
            "the left arm is the right one"
        )
    width, world = episode.frames.shape[2], np.diag([1.0, -1.0, 1.0, 1.0])
    camera = episode.camera
    if camera is not None:
        K = camera.K.copy()
        K[0, 1], K[0, 2] = -K[0, 1], width - 1 - K[0, 2]
        camera = Camera(K, np.diag([-1.0, 1.0, 1.0, 1.0]) @ camera.E @ world, camera.width, camera.height)
    labels = dict(episode.labels)
    for key in [key for key in labels if key.endswith("_px")]:
        labels[key] = np.stack([width - 1 - labels[key][..., 0], labels[key][..., 1]], axis=-1)
    return replace(
        episode,
        images=np.ascontiguousarray(episode.frames[:, :, ::-1]),
        actions=episode.actions * np.array([1, -1, 1, -1, 1, -1, 1], np.float32),  # rotations are pseudo-vectors
        camera=camera,
        eef_pose=None if episode.eef_pose is None else world @ episode.eef_pose @ world,
        labels=labels,
        instruction="",
        success=None,
        simulator_state=None,
    )


def reversed_in_time(episode: Episode) -> Episode:
    """Return the episode played backwards, with the commands that lead from each image to the one before it.

    For recordings whose images follow the commands at once. What falls would rise, and the instruction is not what is
    done: there is none.

    Raises:
        ValueError: no gripper recorded, or commands in the end-effector's own frame.
    """
    spec = episode.action_spec
    if episode.gripper is None or spec.delta == "local":
        raise ValueError(
            f"episode {episode.name!r}: gripper {'missing' if episode.gripper is None else 'known'}, "
            f"delta={spec.delta!r}; expected a recorded gripper and commands in the base frame"
        )
    commands = episode.canonical_actions[::-1].astype(np.float64)
    back = -commands
    if spec.delta == "servo":
        turns = Rotation.from_euler("xyz", commands[..., 3:6].reshape(-1, 3)).inv()
        back[..., 3:6] = turns.as_euler("xyz").reshape(back[..., 3:6].shape)
    back[..., 6] = episode.gripper[:-1][::-1]
    return replace(
        episode,
        images=np.ascontiguousarray(episode.frames[::-1]),
        actions=spec.from_canonical(back.astype(np.float32)),
        eef_pose=None if episode.eef_pose is None else episode.eef_pose[::-1],
        gripper=episode.gripper[::-1],
        labels={key: value[::-1] for key, value in episode.labels.items()},
        instruction="",
        success=None,
        simulator_state=None,
    )
