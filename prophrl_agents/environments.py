"""From an environment id to the vector environment that rollouts need: world model, simulator, or anybody's."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
from gymnasium.vector import AutoresetMode, VectorEnv

import prophet_gym
from prophet_gym.registration import WORLDS, find_environment
from prophet_gym.sims.vector import make_sync_vector_env
from prophet_gym.simulators import SIMULATORS
from prophrl_agents.config import WorldConfig

gym.register_envs(prophet_gym)

__all__ = ["make_environment"]


def make_environment(
    env_id: str, world: WorldConfig, *, chunk_length: int, image_size: int | None = None, device: str = "cpu"
) -> VectorEnv:
    """Makes ``world.num_envs`` slots that hold still when their episodes end.

    World models get every setting of theirs, simulators ``horizon``, ``chunk_length``, ``task`` and ``image_size``, of
    which those without tasks refuse the last two; what is None is left to the registration. Environments of other
    projects get what is set of ``horizon`` and ``chunk_length``, and run one slot after the other (give the trainer an
    environment of your own for more).

    Args:
        env_id: registered with Gymnasium, ``module:id`` imports the module first.
        world: settings.
        chunk_length: commands of one step, unless ``world`` says otherwise.
        image_size: side of the images of simulators with tasks, pixels, unless ``world`` says otherwise.
        device: of a world model.

    Raises:
        ValueError: unknown id, settings that the environment does not take, or what it refuses.
    """
    spec = find_environment(env_id)
    ours = spec.id in WORLDS or spec.id in SIMULATORS
    options: dict[str, Any] = {"horizon": world.horizon, "chunk_length": world.chunk_length}
    if ours:
        options["chunk_length"] = options["chunk_length"] or chunk_length
    if spec.id in WORLDS:
        names = ("num_inference_steps", "dtype", "checkpoint", "judge")
        options |= {name: getattr(world, name) for name in names} | {"device": device}
    elif ours:
        seen = image_size if world.image_size is None and SIMULATORS[spec.id].has_tasks else world.image_size
        options |= {"task": world.task, "image_size": seen}
    options = {name: value for name, value in options.items() if value is not None}
    try:
        if not ours and spec.entry_point is not None:
            return make_sync_vector_env(lambda: gym.make(spec, **options), world.num_envs, AutoresetMode.DISABLED)
        if ours:
            options["autoreset_mode"] = "Disabled"
        return gym.make_vec(spec, world.num_envs, vectorization_mode="vector_entry_point", **options)
    except TypeError as error:
        raise ValueError(f"{env_id!r} does not take the settings {options} ({error}); leave them out") from error
    except ValueError as error:
        if world.chunk_length is None and str(error).startswith(f"chunk_length={chunk_length}:"):
            raise ValueError(
                f"the policy's chunks have {chunk_length} commands, too many for {env_id!r} ({error}) Use a policy "
                "with shorter chunks, or a world model with longer ones"
            ) from error
        raise
