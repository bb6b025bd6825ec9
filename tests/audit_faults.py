"""Faults as logs have them: the commands or the images are wrong, the measured poses are right."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from prophet_gym.actions import integrate_poses
from prophet_gym.data import Episode


def flipped_gripper(episode: Episode) -> Episode:
    actions = episode.actions.copy()
    actions[:, 6] = 1 - actions[:, 6]
    return replace(episode, actions=actions)


def swapped_axes(episode: Episode) -> Episode:
    return replace(episode, actions=episode.actions[:, [1, 0, 2, 3, 4, 5, 6]])


def mirrored_axis(episode: Episode) -> Episode:
    return replace(episode, actions=episode.actions * np.float32([1, -1, 1, 1, 1, 1, 1]))


def degrees(episode: Episode) -> Episode:
    return replace(episode, actions=episode.actions * np.float32([1, 1, 1, *[180 / np.pi] * 3, 1]))


def millimetres(episode: Episode) -> Episode:
    return replace(episode, actions=episode.actions * np.float32([1000, 1000, 1000, 1, 1, 1, 1]))


def late_video(episode: Episode) -> Episode:
    """The video lags by 0.6 s: 6 frames at 10 Hz, 3 at 5 Hz."""
    lag = round(0.6 * episode.fps)
    return replace(episode, images=episode.frames[np.maximum(np.arange(len(episode) + 1) - lag, 0)])


def early_video(episode: Episode) -> Episode:
    return replace(episode, images=episode.frames[np.minimum(np.arange(len(episode) + 1) + 3, len(episode))])


def upside_down(episode: Episode) -> Episode:
    return replace(episode, images=episode.frames[:, ::-1])


def frozen_video(episode: Episode) -> Episode:
    """Every second frame repeats the one before."""
    return replace(episode, images=episode.frames[np.arange(len(episode) + 1) // 2 * 2])


def turning(episode: Episode) -> Episode:
    """Large turns about changing axes, commanded as rotation vectors and followed exactly."""
    rng = np.random.default_rng(len(episode.name) + int(episode.actions[0, 0] * 1e6) % 97)
    spec = replace(episode.action_spec, low=(-1.0,) * 6 + (0.0,), high=(1.0,) * 7, workspace=None)
    actions = episode.actions.copy()
    actions[:, 3:6] = rng.uniform(-0.4, 0.4, (len(actions), 3))
    assert episode.eef_pose is not None
    path = integrate_poses(episode.eef_pose[:1].astype(np.float64), spec.to_canonical(actions)[None], spec)[0]
    poses = np.concatenate([episode.eef_pose[:1], path])
    return replace(episode, actions=actions, eef_pose=poses, action_spec=spec, camera=None)


def as_euler(episode: Episode) -> Episode:
    """The spec calls rotation vectors Euler angles."""
    episode = turning(episode)
    return replace(episode, action_spec=replace(episode.action_spec, rotation="euler_xyz"))


def as_local(episode: Episode) -> Episode:
    """The spec calls deltas in the base frame local."""
    episode = turning(episode)
    return replace(episode, action_spec=replace(episode.action_spec, delta="local"))


def missing_frame(episode: Episode) -> Episode:
    frames = episode.frames
    return replace(episode, images=lambda: frames[:-1])


def blind(episode: Episode) -> Episode:
    return replace(episode, eef_pose=None, gripper=None, camera=None)
