"""World models as Gymnasium environments: ``import prophet_gym``, then ``gym.make("Prophet-Tabletop-v0")``.

Importing registers the environment ids and nothing else; names below are loaded when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import MissingCheckpointError
from .lazy import load_when_used
from .registration import WORLDS, register_worlds

if TYPE_CHECKING:
    from .action_frames import Camera
    from .actions import ACTION_SPECS, ActionSpec
    from .checker import check_world_env
    from .checker_judge import check_judge
    from .data.episode import Episode
    from .data.folder import EpisodeFolder
    from .env import ProphetEnv
    from .judges.base import Judge, Verdict, as_judge
    from .snapshot import Snapshot, SnapshotSet
    from .vector_env import ProphetVectorEnv
    from .world_model.prophet import ProphetWorldModel
    from .world_model.state import WorldModel

__version__ = "0.1.0"

_HOMES = {
    "ACTION_SPECS": "actions",
    "ActionSpec": "actions",
    "Camera": "action_frames",
    "Episode": "data.episode",
    "EpisodeFolder": "data.folder",
    "Judge": "judges.base",
    "ProphetEnv": "env",
    "ProphetVectorEnv": "vector_env",
    "ProphetWorldModel": "world_model.prophet",
    "Snapshot": "snapshot",
    "SnapshotSet": "snapshot",
    "Verdict": "judges.base",
    "WorldModel": "world_model.state",
    "as_judge": "judges.base",
    "check_judge": "checker_judge",
    "check_world_env": "checker",
}

__all__ = [
    "ACTION_SPECS",
    "ActionSpec",
    "Camera",
    "Episode",
    "EpisodeFolder",
    "Judge",
    "MissingCheckpointError",
    "ProphetEnv",
    "ProphetVectorEnv",
    "ProphetWorldModel",
    "Snapshot",
    "SnapshotSet",
    "Verdict",
    "WORLDS",
    "WorldModel",
    "as_judge",
    "check_judge",
    "check_world_env",
]

__getattr__, __dir__ = load_when_used(__name__, _HOMES)

register_worlds()
