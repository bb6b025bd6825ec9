"""Robosuite's own tasks with a goal, behind our chunk interface: ``Robosuite-v0``."""

from __future__ import annotations

from typing import Any

from prophet_gym.errors import nearest
from prophet_gym.sims.robosuite import ENV_OPTIONS, RobosuiteSim, RobosuiteTask, import_robosuite
from prophet_gym.sims.simulator_env import SimulatorEnv

__all__ = ["TASKS", "make_robosuite", "robosuite_task"]

TASKS = {
    "Lift": "lift the red cube",
    "Stack": "stack the red cube on the green cube",
    "Door": "open the door",
    "PickPlaceCan": "put the can into its bin",
    "NutAssemblySquare": "put the square nut on its peg",
}
"""Robosuite's own tasks that have a goal, and the goal in our words: robosuite has none."""


def robosuite_task(name: str = "Lift") -> RobosuiteTask:
    """Returns one of robosuite's own tasks, with a Panda arm that always begins in the same place.

    Raises:
        ValueError: an unknown task.
    """
    if name not in TASKS:
        raise ValueError(f"task={name!r}: expected one of {sorted(TASKS)}.{nearest(name, TASKS)}")

    def make() -> Any:
        suite = import_robosuite()
        return suite.make(
            name,
            robots="Panda",
            controller_configs=suite.load_controller_config(default_controller="OSC_POSE"),
            initialization_noise=None,
            **ENV_OPTIONS,
        )

    return RobosuiteTask(name, TASKS[name], make)


def make_robosuite(
    *, task: str = "Lift", image_size: int = 256, camera: str = "agentview", **options: Any
) -> SimulatorEnv:
    """Makes one of robosuite's own tasks: ``gym.make("Robosuite-v0", task="Lift")`` ends here.

    Args:
        task: a key of :data:`TASKS`.
        image_size: side of the image, pixels.
        camera: name of the camera.
        options: of :class:`prophet_gym.sims.simulator_env.SimulatorEnv`.

    Raises:
        MissingExtraError: robosuite is not installed.
        ValueError: an unknown task, or a bad option.
    """
    import_robosuite()
    drawn = [list(TASKS).index(robosuite_task(task).name)]
    tasks = [robosuite_task(name) for name in TASKS]
    return SimulatorEnv(
        lambda: RobosuiteSim(tasks, name="Robosuite-v0", drawn=drawn, camera=camera, size=image_size), **options
    )
