"""``prophet check``: the conformance suite that fits the interface, on an environment made by its id."""

from __future__ import annotations

import warnings
from typing import Any

import gymnasium as gym

from ..checker import check_world_env
from ..errors import nearest
from ..registration import ASSETS, SIMULATOR_ID, WORLDS, find_environment
from ..simulators import SIMULATORS
from ..snapshot import SnapshotSet
from .conformance import PROBES, conformance, format_conformance
from .libero import HORIZON as LIBERO_HORIZON
from .sweep import motion_sweep

__all__ = ["check_environment"]

HORIZON, SWEEP_STARTS = 16, 2


def check_environment(
    env_id: str, interface: str = "chunk", *, motion: bool = False, seed: int = 0, **options: Any
) -> tuple[str, bool]:
    """Makes an environment and runs the checks of its interface.

    "chunk": Gymnasium's ``check_env`` and :func:`prophet_gym.check_world_env`; "flat": Gymnasium's and, if it is
    installed, SB3's; the interfaces of other projects: the table of :mod:`prophet_gym.compat.conformance`.

    Args:
        env_id: a registered world or simulator.
        interface: a key of ``prophet_gym.registration.INTERFACES``.
        motion: also sweep single motions (:mod:`prophet_gym.compat.sweep`) from two snapshots.
        seed: of the starts.
        options: of ``gym.make(env_id, ...)``.

    Returns:
        The report as Markdown, and whether nothing is broken.

    Raises:
        ValueError: an unknown or foreign id, an unknown interface, or no snapshots with a camera for the sweep.
    """
    env_id, ours = find_environment(env_id).id, [*WORLDS, *SIMULATORS]
    if env_id not in ours:
        raise ValueError(
            f"{env_id!r} is none of our worlds and simulators {sorted(ours)}.{nearest(env_id, ours)} Check an "
            "environment of your own with prophet_gym.check_world_env(env)."
        )
    if env_id == SIMULATOR_ID:
        options = {"snapshots": SnapshotSet.load(ASSETS / "tabletop" / "snapshots"), **options}
    if interface in PROBES:
        given: dict[str, Any] = {"horizon": LIBERO_HORIZON if interface == "libero" else HORIZON}
        if env_id not in SIMULATORS:  # which are their own judges
            # What follows a success is to be seen, where it does not end the episode.
            given["judge"] = lambda frames, instruction: interface != "lerobot"
        if interface == "lerobot":
            env: Any = gym.make_vec(env_id, num_envs=1, interface=interface, **given, **options)
        else:
            env = gym.make(env_id, interface=interface, **given, **options)
        table = conformance(env, interface, horizon=None if interface == "libero" else HORIZON, seed=seed)
        env.close()
        report, holds = format_conformance(table), all(rule.holds is not False for rule in table)
    else:
        report, holds = _own_contract(env_id, interface, seed, options)
    if motion:
        sweep, follows = _sweep(env_id, seed, options)
        report, holds = f"{report}\n\n{sweep}", holds and follows
    return report, holds


def _own_contract(env_id: str, interface: str, seed: int, options: dict[str, Any]) -> tuple[str, bool]:
    from gymnasium.utils.env_checker import check_env

    suites: dict[str, Any] = {"Gymnasium's check_env": lambda env: check_env(env.unwrapped, skip_render_check=True)}
    if interface == "chunk":
        suites["prophet_gym.check_world_env"] = lambda env: check_world_env(env, seed=seed)
    else:
        try:
            from stable_baselines3.common.env_checker import check_env as check_sb3_env

            suites["SB3's check_env"] = check_sb3_env
        except ImportError:
            suites["SB3's check_env"] = None
    lines, holds = ["| suite | result |", "|---|---|"], True
    for name, suite in suites.items():
        if suite is None:
            lines.append(f"| {name} | not installed |")
            continue
        env = gym.make(env_id, interface=interface, **options)
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                suite(env)
            notes = "; ".join(sorted({str(one.message).splitlines()[0] for one in said}))
            lines.append(f"| {name} | passed{f', warns: {notes}' if notes else ''} |")
        except Exception as error:
            holds = False
            lines.append(f"| {name} | FAILED: {error} |")
        finally:
            env.close()
    return "\n".join(lines), holds


def _sweep(env_id: str, seed: int, options: dict[str, Any]) -> tuple[str, bool]:
    env: Any = gym.make(env_id, **options)
    motions = motion_sweep(env, (env.unwrapped.snapshots or ())[:SWEEP_STARTS], seed=seed)
    env.close()
    lines = ["| motion | agreement of the picture | at least | holds |", "|---|---|---|---|"]
    lines += [f"| {m.name} | {m.score:+.2f} | {m.limit:g} | {'yes' if m.passed else 'NO'} |" for m in motions]
    return "\n".join(lines), all(m.passed for m in motions)
