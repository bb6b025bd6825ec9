"""LIBERO's own tasks: ``LiberoSpatial-v0`` and its sisters, the ground truth of the ``Prophet-Libero*`` worlds.

LIBERO's protocol, behind our chunk interface: an episode begins in one of the 50 states that come with its task,
after ten commands of doing nothing (objects fall into place); it ends at the command that brings success, or at the
suite's horizon. All physics, poses and images are those of :mod:`prophet_gym.sims.robosuite`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from prophet_gym.errors import MissingExtraError, nearest
from prophet_gym.sims.robosuite import ENV_OPTIONS, RobosuiteSim, RobosuiteTask, import_robosuite
from prophet_gym.sims.simulator_env import SimulatorEnv

__all__ = ["IDS", "libero_tasks", "make_libero"]

IDS = {
    "libero_spatial": "LiberoSpatial-v0",
    "libero_object": "LiberoObject-v0",
    "libero_goal": "LiberoGoal-v0",
    "libero_10": "Libero10-v0",
    "libero_90": "Libero90-v0",
}
"""Environment of each suite."""
SETTLE = 10
"""Commands of doing nothing before an episode, as published evaluations wait."""
_ASSETS = "hf download lerobot/libero-assets --repo-type dataset --local-dir ~/.cache/libero/assets"


def make_libero(
    *, suite: str, task: int | str | None = None, image_size: int = 256, camera: str = "agentview", **options: Any
) -> SimulatorEnv:
    """Makes a suite, or one task of it: ``gym.make("LiberoSpatial-v0", task=3)`` ends here.

    Args:
        suite: a key of :data:`IDS`.
        task: number in LIBERO's order, name, or instruction of one task; None draws a task at every reset. Changing
            the task rebuilds the model, which takes seconds.
        image_size: side of the image, pixels.
        camera: "agentview" or "robot0_eye_in_hand".
        options: of :class:`prophet_gym.sims.simulator_env.SimulatorEnv`.

    Raises:
        MissingExtraError: LIBERO, its settings or its assets are not there; the message holds the command.
        ValueError: an unknown suite or task, or a bad option.
    """
    tasks = libero_tasks(suite)
    drawn = None if task is None else [tasks.index(_find(tasks, task, suite))]
    return SimulatorEnv(
        lambda: RobosuiteSim(tasks, name=IDS[suite], drawn=drawn, camera=camera, size=image_size), **options
    )


def libero_tasks(suite: str) -> list[RobosuiteTask]:
    """Returns the tasks of a suite in LIBERO's order; no model is built yet.

    Raises:
        MissingExtraError: LIBERO or its settings are not there.
        ValueError: an unknown suite.
    """
    if suite not in IDS:
        raise ValueError(f"suite={suite!r}: expected one of {sorted(IDS)}.{nearest(suite, IDS)}")
    _require_libero()
    paths, benchmark = (importlib.import_module(f"libero.libero{name}") for name in ("", ".benchmark"))
    found = []
    for task in benchmark.get_benchmark(suite)().tasks:
        folders = [Path(paths.get_libero_path(key)) / task.problem_folder for key in ("bddl_files", "init_states")]
        bddl, states = folders[0] / task.bddl_file, folders[1] / task.init_states_file
        make, load = partial(_make, bddl), partial(_load_states, states)
        found.append(RobosuiteTask(task.name, task.language, make, load, SETTLE))
    return found


def _find(tasks: list[RobosuiteTask], wanted: int | str, suite: str) -> RobosuiteTask:
    if isinstance(wanted, str) and wanted.isdecimal():
        wanted = int(wanted)
    if isinstance(wanted, int) and 0 <= wanted < len(tasks):
        return tasks[wanted]
    named = {word: task for task in tasks for word in (task.name, task.instruction)}
    if wanted in named:
        return named[str(wanted)]
    names = [task.name for task in tasks]
    raise ValueError(
        f"{suite} has no task {wanted!r}; expected 0 to {len(tasks) - 1} or one of {names}.{nearest(wanted, named)}"
    )


def _make(bddl_file: Path) -> Any:
    """Builds the model of one task; LIBERO downloads its assets here if it does not find them."""
    assets = Path(importlib.import_module("libero.libero").get_assets_path())
    if not (assets / "scenes").is_dir():
        raise MissingExtraError(f"LIBERO finds no assets in {assets}. Get them (once): {_ASSETS}")
    envs = importlib.import_module("libero.libero.envs")
    return envs.OffScreenRenderEnv(bddl_file_name=str(bddl_file), **ENV_OPTIONS).env


def _load_states(path: Path) -> np.ndarray:
    """Returns the states (n, 1 + nq + nv) of a file of LIBERO's: torch's format around one NumPy array."""
    import torch

    numbers = importlib.import_module("numpy._core.multiarray")
    allowed: list[Any] = [
        (numbers._reconstruct, "numpy.core.multiarray._reconstruct"), numbers._reconstruct, np.ndarray, np.dtype,
        type(np.dtype(np.float64)),
    ]  # fmt: skip
    with torch.serialization.safe_globals(allowed):  # an array and nothing that runs
        states = np.asarray(torch.load(path, weights_only=True), np.float64)
    if states.ndim != 2 or not len(states) or not np.isfinite(states).all():
        raise ValueError(f"{path} holds an array of shape {states.shape}; expected (n, 1 + nq + nv) finite numbers")
    return states


def _require_libero() -> None:
    """Imports LIBERO, which asks questions on the terminal where it has no settings yet."""
    find: Callable[[str], Any] = importlib.util.find_spec
    if find("libero") is None:
        raise MissingExtraError(
            "This simulator needs LIBERO. Install it in an environment with cmake and a C compiler: "
            f"pip install 'prophet-gym[libero]'. Then, once: {_ASSETS}"
        )
    settings = Path(os.environ.get("LIBERO_CONFIG_PATH", Path.home() / ".libero")) / "config.yaml"
    if not settings.is_file():
        raise MissingExtraError(
            f"LIBERO has no settings in {settings} and would ask for them. Write its defaults (once): "
            f"echo n | python -c 'import libero.libero'. Its assets come with: {_ASSETS}"
        )
    import_robosuite()
    importlib.import_module("libero.libero.benchmark")
