"""``Tabletop-v0``: the MuJoCo simulator behind the chunk interface of ``Prophet-Tabletop-v0``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

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
        look: Camera and colours: ``"first"``, or ``"second"`` (``prophet_gym.sims.looks``).

    Raises:
        ValueError: An argument is out of range, the look is unknown, or a snapshot has no simulator state or was taken
            in another look.
    """

    sim: TabletopSim

    def __init__(
        self,
        *,
        chunk_length: int = 20,
        horizon: int = 40,
        snapshots: Sequence[Snapshot] | None = None,
        render_mode: str | None = None,
        look: str = "first",
    ) -> None:
        super().__init__(
            partial(TabletopSim, _IMAGE_SIZE, look),
            chunk_length=chunk_length,
            horizon=horizon,
            snapshots=snapshots,
            render_mode=render_mode,
        )

    def state_of(self, snapshot: Snapshot, index: int) -> np.ndarray:
        """Returns the simulator's state of a snapshot.

        Raises:
            ValueError: It has none, or was seen by the camera of another look.
        """
        state, camera = super().state_of(snapshot, index), snapshot.camera
        if camera is not None and not np.allclose(camera.E, self.sim.camera.E, atol=0.1):  # fitted ones too
            raise ValueError(
                f"Snapshot {index} ({snapshot.name!r}) was seen by another camera than that of "
                f"look={self.sim.look.name!r}; make the environment with the look of the snapshot."
            )
        return state

    def _another(self) -> TabletopEnv:
        return TabletopEnv(
            chunk_length=self.chunk_length,
            horizon=self.horizon,
            snapshots=self.snapshots,
            render_mode=self.render_mode,
            look=self.sim.look.name,
        )
