"""Prophet: the history-aware, action-conditioned video world model (paper 3.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import load_when_used

if TYPE_CHECKING:
    from .cosmos import from_cosmos, world_from_cosmos
    from .prophet import ProphetConfig, ProphetWorldModel
    from .state import RolloutState, WorldModel
    from .transformer import ProphetTransformer
    from .video_vae import FoldedVideoVAE

_HOMES = {  # loaded when first used: who steps a simulator needs the protocol and not the network's libraries
    "FoldedVideoVAE": "video_vae",
    "ProphetConfig": "prophet",
    "ProphetTransformer": "transformer",
    "ProphetWorldModel": "prophet",
    "RolloutState": "state",
    "WorldModel": "state",
    "from_cosmos": "cosmos",
    "world_from_cosmos": "cosmos",
}

__all__ = [
    "FoldedVideoVAE",
    "ProphetConfig",
    "ProphetTransformer",
    "ProphetWorldModel",
    "RolloutState",
    "WorldModel",
    "from_cosmos",
    "world_from_cosmos",
]

__getattr__, __dir__ = load_when_used(__name__, _HOMES)
