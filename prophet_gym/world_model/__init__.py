"""Prophet: the history-aware, action-conditioned video world model (paper 3.2)."""

from .cosmos import from_cosmos, world_from_cosmos
from .prophet import ProphetConfig, ProphetWorldModel
from .state import RolloutState, WorldModel
from .transformer import ProphetTransformer
from .video_vae import FoldedVideoVAE

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
