"""The simulators by id: one table, and the two functions behind ``gym.make`` and ``gym.make_vec``.

Each is the ground truth of a family of worlds, behind the same interface. Only Tabletop comes with the package; the
others import their project when they are made, and say how to get it where it is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import nearest
from .interfaces import SINGLE_COMMAND, default_autoreset, present, require_interface

if TYPE_CHECKING:
    import gymnasium as gym
    from gymnasium.vector import AutoresetMode, VectorEnv

__all__ = ["SIMULATORS", "SimulatorSpec", "make_simulator", "make_vector_simulator"]


@dataclass(frozen=True)
class SimulatorSpec:
    """One registered simulator.

    Attributes:
        id: the Gymnasium id.
        make: ``module:function`` in :mod:`prophet_gym.sims` that makes the environment.
        options: its arguments by default.
        has_tasks: whether it takes ``task`` and ``image_size``.
    """

    id: str
    make: str
    options: Mapping[str, Any] = field(default_factory=dict)
    has_tasks: bool = True


def _libero(env_id: str, suite: str, horizon: int) -> SimulatorSpec:
    return SimulatorSpec(env_id, "libero:make_libero", {"suite": suite, "horizon": horizon, "chunk_length": 20})


SIMULATORS: dict[str, SimulatorSpec] = {
    simulator.id: simulator
    for simulator in (
        SimulatorSpec("Tabletop-v0", "tabletop_env:TabletopEnv", {"chunk_length": 8, "horizon": 40}, has_tasks=False),
        SimulatorSpec("Robosuite-v0", "robosuite_tasks:make_robosuite", {"chunk_length": 20, "horizon": 200}),
        _libero("LiberoSpatial-v0", "libero_spatial", 280),
        _libero("LiberoObject-v0", "libero_object", 280),
        _libero("LiberoGoal-v0", "libero_goal", 300),
        _libero("Libero10-v0", "libero_10", 520),
        _libero("Libero90-v0", "libero_90", 400),
        SimulatorSpec("SimplerBridge-v0", "simpler:make_bridge", {"backend": "simpler", "chunk_length": 20}),
        SimulatorSpec("ManiSkillBridge-v0", "simpler:make_bridge", {"backend": "maniskill", "chunk_length": 20}),
    )
}
"""Every simulator by id."""


def make_simulator(
    env_id: str, *, interface: str = "chunk", action_buffer: str | None = None, **options: Any
) -> gym.Env:
    """Makes one simulator; ``gym.make("Tabletop-v0", ...)`` ends here.

    Args:
        env_id: a key of :data:`SIMULATORS`.
        interface: as in :func:`prophet_gym.registration.make_world`.
        action_buffer: as in :func:`prophet_gym.registration.make_world`.
        options: of the function that the table names, such as ``task``, ``image_size``, ``chunk_length``, ``horizon``,
            ``snapshots`` (as in :func:`prophet_gym.registration.make_world`), ``render_mode``.

    Raises:
        MissingExtraError: the simulator's project is not installed, or lacks assets.
        ValueError: an unknown id, or options that it refuses.
    """
    from .compat.flat import FlatEnv

    require_interface(interface, action_buffer)
    if interface in SINGLE_COMMAND:
        engine = make_vector_simulator(env_id, autoreset_mode="Disabled", **options)
        return present(interface, engine, action_buffer)
    spec = _find(env_id)
    foreign = [] if spec.has_tasks else sorted({"task", "image_size"} & set(options))
    if foreign:
        raise ValueError(f"{env_id} has no {' and '.join(foreign)}, as simulators with several tasks do; leave it out.")
    options = _with_snapshots(options)
    module, name = spec.make.split(":")
    env = getattr(import_module(f".sims.{module}", __package__), name)(**{**spec.options, **options})
    return FlatEnv(env) if interface == "flat" else env


def make_vector_simulator(
    env_id: str,
    num_envs: int = 1,
    *,
    interface: str = "chunk",
    action_buffer: str | None = None,
    autoreset_mode: AutoresetMode | str | None = None,
    **options: Any,
) -> VectorEnv:
    """Makes a batch of simulators that are stepped in turn; ``gym.make_vec("Tabletop-v0", num_envs, ...)`` ends here.

    Arguments and errors as :func:`make_simulator`; ``autoreset_mode`` as in :class:`prophet_gym.ProphetVectorEnv`.
    """
    from .arguments import parse_autoreset_mode, require_between
    from .compat.flat import FlatVectorEnv
    from .compat.lerobot import LeRobotVectorEnv
    from .sims.vector import make_sync_vector_env

    require_interface(interface, action_buffer, batch=True)
    require_between("num_envs", num_envs, 1, None)
    mode = parse_autoreset_mode(default_autoreset(interface, autoreset_mode))
    options = _with_snapshots(options)  # once for all slots
    env = make_sync_vector_env(lambda: make_simulator(env_id, **options), num_envs, mode)
    if interface == "lerobot":
        return LeRobotVectorEnv(env, action_buffer=action_buffer or "immediate")
    return FlatVectorEnv(env) if interface == "flat" else env


def _with_snapshots(options: dict[str, Any]) -> dict[str, Any]:
    """Returns the options with the set of snapshots in place of its folder."""
    from .snapshot import SnapshotSet

    folder = options.get("snapshots")
    return {**options, "snapshots": SnapshotSet.load(folder)} if isinstance(folder, str | Path) else options


def _find(env_id: str) -> SimulatorSpec:
    if env_id not in SIMULATORS:
        raise ValueError(f"Unknown simulator {env_id!r}; known are {sorted(SIMULATORS)}.{nearest(env_id, SIMULATORS)}")
    return SIMULATORS[env_id]
