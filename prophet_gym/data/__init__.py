"""Trajectories: the `Episode`, its layout on disk, and readers of recorded sets in other formats."""

from prophet_gym.data.cards import CARDS, DatasetCard
from prophet_gym.data.columns import StateLayout
from prophet_gym.data.episode import Episode
from prophet_gym.data.folder import EpisodeFolder, read_episode, write_episode
from prophet_gym.data.lerobot_writer import write_lerobot
from prophet_gym.data.opening import open_dataset

__all__ = [
    "CARDS",
    "DatasetCard",
    "Episode",
    "EpisodeFolder",
    "StateLayout",
    "open_dataset",
    "read_episode",
    "write_episode",
    "write_lerobot",
]
