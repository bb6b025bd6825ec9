"""``Tabletop-v0``: the MuJoCo simulator behind the chunk interface of ``Prophet-Tabletop-v0``."""

from __future__ import annotations

from collections.abc import Sequence

from prophet_gym.sims.simulator_env import SimulatorEnv
from prophet_gym.sims.tabletop import TabletopSim
from prophet_gym.snapshot import Snapshot

_IMAGE_SIZE = 64


class TabletopEnv(SimulatorEnv):
    """The simulated table: images of 64x64, the state from the commanded poses, success asked for after every chunk.

    Args:
        chunk_length: as in :class:`SimulatorEnv`.
        horizon: as in :class:`SimulatorEnv`.
        snapshots: as in :class:`SimulatorEnv`.
        render_mode: as in :class:`SimulatorEnv`.
    """

    sim: TabletopSim

    def __init__(
        self,
        *,
        chunk_length: int = 20,
        horizon: int = 40,
        snapshots: Sequence[Snapshot] | None = None,
        render_mode: str | None = None,
    ) -> None:
        super().__init__(
            lambda: TabletopSim(_IMAGE_SIZE),
            chunk_length=chunk_length,
            horizon=horizon,
            snapshots=snapshots,
            render_mode=render_mode,
        )
