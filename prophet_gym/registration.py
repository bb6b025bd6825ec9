"""The worlds by id: one table, and the two functions behind ``gym.make`` and ``gym.make_vec``.

Importing :mod:`prophet_gym` registers every row. To add a world, add a row; to use other weights, give ``checkpoint=``.
This module stays light: networks and simulators are imported when an environment is made.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np

from .errors import MissingCheckpointError, nearest
from .interfaces import INTERFACES, SINGLE_COMMAND, default_autoreset, present, require_interface
from .simulators import SIMULATORS, make_vector_simulator
from .weights import locate_weights

if TYPE_CHECKING:
    from gymnasium.envs.registration import EnvSpec
    from gymnasium.vector import AutoresetMode, VectorEnv

    from .snapshot import Snapshot
    from .world_model.state import WorldModel

__all__ = [
    "INTERFACES",
    "SIMULATOR_ID",
    "SINGLE_COMMAND",
    "WORLDS",
    "World",
    "find_environment",
    "find_world",
    "make_chunk_engine",
    "register_worlds",
    "resolve_checkpoint",
]

logger = logging.getLogger(__name__)

ASSETS = Path(__file__).parent / "assets"
SIMULATOR_ID = "Tabletop-v0"
"""The simulator that comes with the package; :data:`prophet_gym.simulators.SIMULATORS` has all."""


@dataclass(frozen=True)
class World:
    """One registered world.

    Attributes:
        id: the Gymnasium id.
        action_spec: name of its row in ``prophet_gym.actions.ACTION_SPECS``; a checkpoint must follow its conventions.
            None: those of the checkpoint, whatever they are.
        horizon: commands after which a rollout is truncated, by default.
        chunk_length: commands of one action chunk by default; None is the model's maximum.
        packaged: folder in ``assets/`` with the weights that come with the package; None if there are none.
        image_size: (H, W) of the frames shown by default with the packaged weights; None: the size they work at.
    """

    id: str
    action_spec: str | None
    horizon: int
    chunk_length: int | None = None
    packaged: str | None = None
    image_size: tuple[int, int] | None = None


WORLDS: dict[str, World] = {
    world.id: world
    for world in (
        World("Prophet-Tabletop-v0", "tabletop", horizon=40, chunk_length=8, packaged="tabletop"),
        World("Prophet-Bridge-v0", "bridge", horizon=60, packaged="bridge", image_size=(256, 256)),
        World("Prophet-LiberoSpatial-v0", "libero", horizon=280),
        World("Prophet-LiberoObject-v0", "libero", horizon=280),
        World("Prophet-LiberoGoal-v0", "libero", horizon=300),
        World("Prophet-Libero10-v0", "libero", horizon=520),
        World("Prophet-Droid-v0", "droid", horizon=300, packaged="droid", image_size=(192, 320)),
        World("Prophet-AgiBot-v0", "agibot", horizon=600),
        World("Prophet-Custom-v0", None, horizon=100),
    )
}
"""Every world by id."""


# Wrappers of Gymnasium >= 1.0 hide what they wrap: env.get_language_instruction() must survive gym.make. The worlds
# refuse a step before reset themselves.
_BARE: dict[str, Any] = {"order_enforce": False, "disable_env_checker": True}


def register_worlds() -> None:
    """Registers the worlds and the simulators with Gymnasium; called when :mod:`prophet_gym` is imported."""
    for env_id in WORLDS:
        gym.register(
            env_id,
            entry_point="prophet_gym.registration:make_world",
            vector_entry_point="prophet_gym.registration:make_vector_world",
            kwargs={"env_id": env_id},
            **_BARE,
        )
    for env_id in SIMULATORS:
        gym.register(
            env_id,
            entry_point="prophet_gym.simulators:make_simulator",
            vector_entry_point="prophet_gym.simulators:make_vector_simulator",
            kwargs={"env_id": env_id},
            **_BARE,
        )


def find_world(env_id: str) -> World:
    """Returns the row of ``env_id``.

    Raises:
        ValueError: no such world; the nearest id is suggested.
    """
    if env_id not in WORLDS:
        raise ValueError(f"Unknown world {env_id!r}; known are {sorted(WORLDS)}.{nearest(env_id, WORLDS)}")
    return WORLDS[env_id]


def find_environment(env_id: str) -> EnvSpec:
    """Returns Gymnasium's entry of any registered id; ``module:id`` imports the module first.

    Raises:
        ValueError: no such environment, or no such module.
    """
    try:
        return gym.spec(env_id)
    except (gym.error.Error, ModuleNotFoundError) as error:
        raise ValueError(f"no environment {env_id!r}: {error} Use 'module:id' for one of your own") from error


def make_world(
    env_id: str,
    *,
    checkpoint: str | Path | None = None,
    snapshots: str | Path | Sequence[Snapshot] | None = None,
    judge: Any = None,
    judge_every_chunk: bool | None = None,
    chunk_length: int | None = None,
    horizon: int | None = None,
    num_inference_steps: int | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    image_size: tuple[int, int] | None = None,
    interface: str = "chunk",
    action_buffer: str | None = None,
    render_mode: str | None = None,
) -> gym.Env:
    """Makes one imagined world; ``gym.make(env_id, ...)`` ends here.

    Args:
        env_id: a key of :data:`WORLDS`.
        checkpoint: a folder, a packaged name or a hub id ``owner/name``; default the packaged weights of the id.
        snapshots: where rollouts start, a :class:`prophet_gym.SnapshotSet`, a list or a folder of one; default
            ``snapshots/`` of the checkpoint, if it has some.
        judge: a judge, any callable ``(frames, instruction) -> Verdict | bool | float``, or a path that
            :func:`prophet_gym.judges.open_judge` takes; default ``judge/`` of the checkpoint, if it has one.
        judge_every_chunk: judge after every chunk instead of once at the horizon; default with the interfaces of
            single commands, whose loops look for success after every step.
        chunk_length: commands of one action chunk; default that of the world.
        horizon: commands after which a rollout is truncated; default that of the world.
        num_inference_steps: denoising steps; default the checkpoint's.
        device: of the networks, as in torch.
        dtype: "float32", "bfloat16", "float16", or "auto": bfloat16 where the device multiplies it in hardware.
        image_size: (H, W) of the frames shown, to which those of the model are stretched; default that of the world
            with the packaged weights, else the checkpoint's own.
        interface: "chunk" (:class:`prophet_gym.ProphetEnv`), "flat" (:mod:`prophet_gym.compat.flat`), or a key of
            :data:`SINGLE_COMMAND`: one command a step, as another project's environments take them.
        action_buffer: with an interface of single commands, "immediate" (default: the world runs for every command)
            or "chunk" (once per ``chunk_length`` commands); see :mod:`prophet_gym.compat.single_step`.
        render_mode: None or "rgb_array".

    Raises:
        MissingCheckpointError: no weights; the message holds the command that trains some.
        ValueError: unknown id, interface, device or dtype, snapshots that are none, a foreign checkpoint, or one with
            other action conventions.
    """
    from .compat.flat import FlatEnv
    from .env import ProphetEnv

    require_interface(interface, action_buffer)
    if interface in SINGLE_COMMAND:
        engine = make_vector_world(
            env_id,
            checkpoint=checkpoint,
            snapshots=snapshots,
            judge=judge,
            judge_every_chunk=judge_every_chunk is not False,
            chunk_length=chunk_length,
            horizon=horizon,
            num_inference_steps=num_inference_steps,
            device=device,
            dtype=dtype,
            image_size=image_size,
            render_mode=render_mode,
            autoreset_mode="Disabled",
        )
        return present(interface, engine, action_buffer)
    world = find_world(env_id)
    world_model, parts = _load(world, checkpoint, snapshots, judge, device, dtype, image_size)
    env = ProphetEnv(
        world_model,
        horizon=world.horizon if horizon is None else horizon,
        judge_every_chunk=bool(judge_every_chunk),
        chunk_length=world.chunk_length if chunk_length is None else chunk_length,
        num_inference_steps=num_inference_steps,
        render_mode=render_mode,
        **parts,
    )
    return FlatEnv(env) if interface == "flat" else env


def make_vector_world(
    env_id: str,
    num_envs: int = 1,
    *,
    checkpoint: str | Path | None = None,
    snapshots: str | Path | Sequence[Snapshot] | None = None,
    judge: Any = None,
    judge_every_chunk: bool | None = None,
    chunk_length: int | None = None,
    horizon: int | None = None,
    num_inference_steps: int | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    image_size: tuple[int, int] | None = None,
    interface: str = "chunk",
    action_buffer: str | None = None,
    render_mode: str | None = None,
    autoreset_mode: AutoresetMode | str | None = None,
) -> VectorEnv:
    """Makes a batch of imagined worlds with one model; ``gym.make_vec(env_id, num_envs, ...)`` ends here.

    Arguments and errors as :func:`make_world`; ``autoreset_mode`` as in :class:`prophet_gym.ProphetVectorEnv`, default
    "NextStep", and "SameStep" with ``interface="lerobot"``, the only batch of single commands.
    """
    from .compat.flat import FlatVectorEnv
    from .compat.lerobot import LeRobotVectorEnv
    from .vector_env import ProphetVectorEnv

    require_interface(interface, action_buffer, batch=True)
    world = find_world(env_id)
    world_model, parts = _load(world, checkpoint, snapshots, judge, device, dtype, image_size)
    env = ProphetVectorEnv(
        world_model,
        num_envs,
        horizon=world.horizon if horizon is None else horizon,
        judge_every_chunk=interface == "lerobot" if judge_every_chunk is None else judge_every_chunk,
        chunk_length=world.chunk_length if chunk_length is None else chunk_length,
        num_inference_steps=num_inference_steps,
        render_mode=render_mode,
        autoreset_mode=default_autoreset(interface, autoreset_mode),
        **parts,
    )
    if interface == "lerobot":
        return LeRobotVectorEnv(env, action_buffer=action_buffer or "immediate")
    return FlatVectorEnv(env) if interface == "flat" else env


def make_chunk_engine(
    env_id: str, num_envs: int = 1, *, autoreset_mode: AutoresetMode | str = "Disabled", **options: Any
) -> Any:
    """Makes what the interfaces of single commands stand on: a chunk vector environment.

    Args:
        env_id: a key of :data:`WORLDS` or :data:`prophet_gym.simulators.SIMULATORS`.
        num_envs: slots.
        autoreset_mode: "Disabled", or "SameStep" for loops that expect slots to restart.
        options: of :func:`make_world`, without ``interface``; success is judged after every chunk by default.
    """
    if env_id in SIMULATORS:
        return make_vector_simulator(env_id, num_envs, autoreset_mode=autoreset_mode, **options)
    options = {"judge_every_chunk": True, **options}
    return make_vector_world(env_id, num_envs, autoreset_mode=autoreset_mode, **options)


def resolve_checkpoint(world: World, checkpoint: str | Path | None) -> Path:
    """Returns the folder with the weights: ``checkpoint`` if given, else those packaged for the id.

    A name that is no folder and no packaged name, but looks like ``owner/name``, is fetched from the hub.

    Raises:
        MissingCheckpointError: nothing there; the message holds the command that trains some.
    """
    if checkpoint is None:
        packaged = ASSETS / world.packaged if world.packaged else None
        if packaged is not None and (packaged / "prophet.json").is_file():
            return packaged
        raise MissingCheckpointError(f"No weights come with {world.id}. {_remedy(world)}")
    try:
        return locate_weights(checkpoint, ASSETS, "prophet.json")
    except ValueError as error:
        raise MissingCheckpointError(f"No checkpoint {error} {_remedy(world)}") from error


def _load(
    world: World,
    checkpoint: str | Path | None,
    snapshots: Any,
    judge: Any,
    device: str,
    dtype: str,
    image_size: tuple[int, int] | None,
) -> tuple[WorldModel, dict[str, Any]]:
    """Returns the world model, and its snapshots and judge as keyword arguments."""
    import torch

    from .devices import fast_dtype, require_device
    from .judges.opening import open_judge
    from .snapshot import SnapshotSet
    from .world_model.prophet import ProphetWorldModel
    from .world_model.resized import ResizedWorldModel, resized_snapshot

    dtypes = ("float32", "bfloat16", "float16", "auto")
    if dtype not in dtypes:
        raise ValueError(f"dtype={dtype!r}: expected one of {list(dtypes)}.{nearest(dtype, dtypes)}")
    require_device(device)  # before anything is fetched
    dtype = fast_dtype(device) if dtype == "auto" else dtype
    folder = resolve_checkpoint(world, checkpoint)
    if snapshots is None and (folder / "snapshots").is_dir():
        snapshots = folder / "snapshots"
    if judge is None and (folder / "judge").is_dir():
        judge = folder / "judge"
    world_model: WorldModel = ProphetWorldModel.from_pretrained(folder, device=device, dtype=getattr(torch, dtype))
    _require_conventions(world, world_model)
    if image_size is None and checkpoint is None:
        image_size = world.image_size
    if image_size is not None and list(np.atleast_1d(image_size)) != list(world_model.image_size):
        world_model = ResizedWorldModel(world_model, image_size)
    logger.info("%s runs %s", world.id, world_model.checkpoint_info)
    if isinstance(snapshots, str | Path):
        snapshots = SnapshotSet(resized_snapshot(s, world_model.image_size) for s in SnapshotSet.load(snapshots))
    return world_model, {
        "snapshots": snapshots,
        "judge": open_judge(judge) if isinstance(judge, str | Path) else judge,
    }


def _require_conventions(world: World, world_model: WorldModel) -> None:
    """Bounds and rates may differ between checkpoints of a world; what a number means may not."""
    from .actions import ACTION_SPECS

    if world.action_spec is None:
        return
    expected, found = ACTION_SPECS[world.action_spec], world_model.action_spec
    names = ("num_effectors", "delta", "rotation", "gripper", "position_scale", "rotation_scale")
    differing = [f"{n}={getattr(found, n)!r} (expected {getattr(expected, n)!r})" for n in names
                 if getattr(found, n) != getattr(expected, n)]  # fmt: skip
    if differing:
        raise ValueError(
            f"{world.id} speaks {world.action_spec!r} actions, but this checkpoint was trained with "
            f"{', '.join(differing)}. Use the id of the checkpoint's own robot, or ProphetEnv(world_model, ...)."
        )


def _remedy(world: World) -> str:
    return (
        "Train some on a folder of episodes of that robot:\n"
        "  prophet train vae --data EPISODES --validation HELD_OUT\n"
        "  prophet train world-model --data EPISODES --vae runs/vae/vae\n"
        "or adapt those of another robot: prophet adapt EPISODES --base CHECKPOINT --out runs/world-model/prophet\n"
        f'then gym.make("{world.id}", checkpoint="runs/world-model/prophet").'
    )
