"""``--env.type=prophet``: a world among LeRobot's environments.

``lerobot-eval`` parses its command line into :class:`ProphetEnvConfig`, builds the policy for ``features`` and makes
the environments: with LeRobot 0.6 through ``create_envs``, one model call a step for all slots; LeRobot 0.4 calls
``gym.make`` for every slot. Both versions see the same observations (:mod:`prophet_gym.compat.lerobot`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.utils.constants import ACTION, OBS_IMAGE, OBS_STATE

from ..compat.lerobot import LeRobotVectorEnv, make_env
from ..registration import SIMULATOR_ID, find_world, resolve_checkpoint

__all__ = ["ProphetEnvConfig"]

_TABLETOP_SIZE = (64, 64)  # of the simulator, which has no checkpoint to look it up in


@EnvConfig.register_subclass("prophet")
@dataclass
class ProphetEnvConfig(EnvConfig):
    """A world, or the simulator behind Tabletop, as LeRobot configures its environments.

    Attributes:
        task: id of the world, in the words of LeRobot's other environments; see :data:`prophet_gym.WORLDS`.
        fps: frames a second of LeRobot's videos.
        checkpoint: a folder, a packaged name or a hub id; default the packaged weights of the world.
        judge: a path that :func:`prophet_gym.judges.open_judge` takes; default the checkpoint's judge.
        snapshots: folder of a snapshot set; default the checkpoint's.
        episode_length: time limit in commands; default the world's.
        chunk_length: commands per prediction with ``action_buffer="chunk"``; default the world's.
        action_buffer: "immediate": the world runs for every command; "chunk": once per ``chunk_length`` commands.
        device: of the world model.
        dtype: "float32", "bfloat16", "float16" or "auto" (bfloat16 where the device multiplies it in hardware).

    Raises:
        MissingCheckpointError: no weights for ``task``.
        ValueError: an unknown world, or a checkpoint or judge for the simulator, which has neither.
    """

    task: str | None = "Prophet-Tabletop-v0"
    fps: int = 10
    checkpoint: str | None = None
    judge: str | None = None
    snapshots: str | None = None
    episode_length: int | None = None
    chunk_length: int | None = None
    action_buffer: str = "immediate"
    device: str = "cpu"
    dtype: str = "float32"
    features: dict[str, PolicyFeature] = field(default_factory=dict)
    features_map: dict[str, str] = field(
        default_factory=lambda: {ACTION: ACTION, "agent_pos": OBS_STATE, "pixels": OBS_IMAGE}
    )

    def __post_init__(self) -> None:
        height, width = self._image_size()
        self.features = {
            ACTION: PolicyFeature(type=FeatureType.ACTION, shape=(7,)),
            "agent_pos": PolicyFeature(type=FeatureType.STATE, shape=(8,)),
            "pixels": PolicyFeature(type=FeatureType.VISUAL, shape=(height, width, 3)),
        }

    @property
    def package_name(self) -> str:
        """What LeRobot imports to find the ids."""
        return "prophet_gym"

    @property
    def gym_id(self) -> str:
        """The id of the world."""
        return str(self.task)

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        """Keywords of ``gym.make``; LeRobot 0.4 makes each slot with them."""
        return {"interface": "lerobot", "action_buffer": self.action_buffer, **self._options()}

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict[str, dict[int, LeRobotVectorEnv]]:
        """Makes the batch; ``use_async_envs`` is no matter: one model call steps all slots."""
        made = make_env(n_envs, env_id=self.gym_id, action_buffer=self.action_buffer, **self._options())
        return {self.type: made[self.gym_id]}

    def _options(self) -> dict[str, Any]:
        given = {
            "checkpoint": self.checkpoint,
            "judge": self.judge,
            "snapshots": self.snapshots,
            "horizon": self.episode_length,
            "chunk_length": self.chunk_length,
        }
        on = {} if self.task == SIMULATOR_ID else {"device": self.device, "dtype": self.dtype}
        return {**{key: value for key, value in given.items() if value is not None}, **on}

    def _image_size(self) -> tuple[int, int]:
        if self.task == SIMULATOR_ID:
            if self.checkpoint is not None or self.judge is not None:
                raise ValueError(
                    f"checkpoint={self.checkpoint!r}, judge={self.judge!r}: {SIMULATOR_ID} has neither; leave them "
                    "out, or give task='Prophet-Tabletop-v0'."
                )
            return _TABLETOP_SIZE
        world = find_world(self.gym_id)
        folder = resolve_checkpoint(world, self.checkpoint)
        if self.checkpoint is None and world.image_size is not None:
            return world.image_size  # what the world shows its packaged weights at
        own = json.loads((folder / "prophet.json").read_text())["image_size"]
        return int(own[0]), int(own[1])
