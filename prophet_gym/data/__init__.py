"""Trajectories: the `Episode`, its layout on disk, and readers of recorded sets."""

from prophet_gym.data.episode import Episode
from prophet_gym.data.folder import EpisodeFolder, read_episode, write_episode

__all__ = ["Episode", "EpisodeFolder", "read_episode", "write_episode"]
