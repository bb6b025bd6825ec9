"""The ways an environment can look: our chunks, one flat vector, or another project's single commands."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import nearest

if TYPE_CHECKING:
    from gymnasium.vector import AutoresetMode, VectorEnv

__all__ = ["INTERFACES", "SINGLE_COMMAND", "default_autoreset", "present", "require_interface"]

SINGLE_COMMAND = {
    "simpler": "simpler:SimplerEnv",
    "maniskill": "maniskill:ManiSkillEnv",
    "libero": "libero:LiberoEnv",
    "lerobot": "lerobot:LeRobotEnv",
}
"""Interfaces of other projects, one command a step: where each lives in :mod:`prophet_gym.compat`."""
INTERFACES = ("chunk", "flat", *SINGLE_COMMAND)


def require_interface(interface: str, action_buffer: str | None, batch: bool = False) -> None:
    """Requires a known interface that exists for one environment, or for a batch.

    Raises:
        ValueError: it does not, or ``action_buffer`` is given to one that takes whole chunks.
    """
    if interface not in INTERFACES:
        raise ValueError(f"interface={interface!r}: expected one of {INTERFACES}.{nearest(interface, INTERFACES)}")
    if interface not in SINGLE_COMMAND and action_buffer is not None:
        raise ValueError(f"action_buffer={action_buffer!r}: interface={interface!r} takes whole chunks; leave it out.")
    if batch and interface in SINGLE_COMMAND and interface != "lerobot":
        batched = [name for name in INTERFACES if name not in SINGLE_COMMAND or name == "lerobot"]
        own = ", or prophet_gym.compat.maniskill.make(..., num_envs=...)" if interface == "maniskill" else ""
        raise ValueError(
            f"interface={interface!r} has no batches: gym.make_vec takes {batched}. Make single environments with "
            f"gym.make(..., interface={interface!r}){own}."
        )


def default_autoreset(interface: str, autoreset_mode: AutoresetMode | str | None) -> AutoresetMode | str:
    """Returns the mode asked for, else the one that the interface's loops expect."""
    if autoreset_mode is not None:
        return autoreset_mode
    return "SameStep" if interface == "lerobot" else "NextStep"


def present(interface: str, engine: VectorEnv, action_buffer: str | None) -> Any:
    """Puts the interface of another project on a chunk engine."""
    module, name = SINGLE_COMMAND[interface].split(":")
    make = getattr(import_module(f".compat.{module}", __package__), name)
    return make(engine, action_buffer=action_buffer or "immediate")
