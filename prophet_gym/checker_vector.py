"""The rules of :func:`prophet_gym.check_world_env` that only a vector environment can break."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode

from .checker import draw_actions, require, same

__all__ = ["check_autoreset", "check_slots"]

_KEYS = ("instruction", "env_step", "is_success", "judge_valid", "verdict", "checkpoint")


def check_slots(env: Any, seed: int) -> None:
    """Checks shapes, masks and bad input, and that no slot depends on its place or on its neighbours."""
    count, length = env.num_envs, env.single_action_space.shape[0]
    actions = draw_actions(env.single_action_space, 2 * count, length, seed)
    seeds = [seed + i for i in range(count)]
    start, info = env.reset(seed=seeds)
    require(
        start in env.observation_space,
        "the observation of reset() is outside observation_space",
        "a dtype that differs from the declared one, or no batch axis",
    )
    _check_masks(info, np.ones(count, dtype=bool), "reset()")
    observation, reward, terminated, truncated, info = env.step(actions[:count])
    for name, value in (("reward", reward), ("terminated", terminated), ("truncated", truncated)):
        require(
            np.shape(value) == (count,), f"{name} has shape {np.shape(value)}", f"expected one per slot, ({count},)"
        )
    _check_masks(info, np.ones(count, dtype=bool), "step()", "frames")
    for other in (start, env.reset(seed=seeds)[0]):
        require(
            not any(np.shares_memory(observation[key], other[key]) for key in other),
            "observations of two calls share memory",
            "a buffer returned without .copy()",
        )
    order = np.roll(np.arange(count), 1)
    env.reset(seed=[seeds[i] for i in order])
    moved, *_ = env.step(actions[order])
    require(
        same(moved, _slots(observation, order), tolerance=1),
        "slots that traded places, seeds and actions gave other frames",
        "noise drawn for the batch as a whole; it must come from each slot's seed and env step",
    )
    if count > 1:
        env.reset(seed=seeds)
        changed, *_ = env.step(np.concatenate([actions[:1], actions[count + 1 : 2 * count]]))
        require(
            same(_slots(changed, [0]), _slots(observation, [0]), tolerance=1),
            "slot 0 changed with the actions of its neighbours",
            "a statistic over the batch axis, or slots that share a buffer",
        )
    env.reset(seed=seeds)
    try:
        env.step(np.full_like(actions[:count], np.nan))
    except ValueError:
        return
    require(False, "step() took NaN", "actions are not checked; raise ValueError")


def check_autoreset(env: Any, mode: AutoresetMode, seed: int) -> None:
    """Runs one slot to its end before the others and checks what ``mode`` promises for it."""
    count, length = env.num_envs, env.single_action_space.shape[0]
    horizon = getattr(env.unwrapped, "horizon", None)
    if horizon is None:
        horizon = env.get_attr("horizon")[0]  # Gymnasium's vector environments hold the simulators themselves
    steps = -(-horizon // length)
    actions = draw_actions(env.single_action_space, count, length, seed)
    env.reset(seed=seed)
    for _ in range(steps):
        observation, _, terminated, truncated, info = env.step(actions)
        ended = terminated | truncated
        if ended.any():
            break
    require(ended.any(), f"no slot ended within {horizon} commands", "the horizon is not applied")
    if mode is AutoresetMode.SAME_STEP:
        _check_same_step(observation, info, ended)
    elif mode is AutoresetMode.NEXT_STEP:
        _, reward, terminated, truncated, info = env.step(actions)
        require(
            not (reward[ended].any() or terminated[ended].any() or truncated[ended].any()),
            "the step after an end has reward, terminated or truncated set",
            "it must be the reset: its action is ignored",
        )
        require(not info["env_step"][ended].any(), "env_step goes on after an end", "the slot was not reset")
    else:
        _, info = env.reset(options={"reset_mask": ended})
        _check_masks(info, ended, "reset(options={'reset_mask': ...})")
        require(not info["env_step"][ended].any(), "env_step goes on after reset_mask", "the slot was not reset")
        *_, terminated, truncated, info = env.step(actions)
        require(
            (info["env_step"][ended] == 1).all(), "a slot reset through reset_mask did not step", "it is still held"
        )


def _check_same_step(observation: dict[str, np.ndarray], info: dict[str, Any], ended: np.ndarray) -> None:
    require(
        {"final_obs", "final_info", "_final_obs", "_final_info"} <= set(info),
        f"info has keys {sorted(info)} where slots ended",
        "SAME_STEP returns the reset observation, so the last one belongs into final_obs and final_info",
    )
    require(
        (info["_final_obs"] == ended).all() and (info["_final_info"] == ended).all(),
        f"final masks are {info['_final_obs']} and {info['_final_info']}, ended slots are {ended}",
        "masks set for the wrong slots",
    )
    final = info["final_info"]
    require("is_success" in final, "final_info lacks is_success", "episodes would be scored from the next one's info")
    require(not info["env_step"][ended].any(), "env_step is not 0 after the reset", "info describes the ended rollout")
    for i in np.flatnonzero(ended):
        require(
            same(info["final_obs"][i]["image"], final["frames"][i][-1])
            and not np.shares_memory(info["final_obs"][i]["image"], observation["image"]),
            f"final_obs of slot {i} is not its last frame",
            "it is read after the slot was reset",
        )


def _check_masks(info: dict[str, Any], expected: np.ndarray, where: str, *more: str) -> None:
    for key in (*_KEYS, *more):
        require(key in info and f"_{key}" in info, f"info after {where} lacks {key!r} or '_{key}'", "no vector info")
        require(
            len(info[key]) == len(expected) and (info[f"_{key}"] == expected).all(),
            f"info['_{key}'] after {where} is {info[f'_{key}']}, expected {expected}",
            "a mask tells which slots the entry is about",
        )


def _slots(observation: dict[str, np.ndarray], order: Any) -> dict[str, np.ndarray]:
    return {key: value[order] for key, value in observation.items()}
