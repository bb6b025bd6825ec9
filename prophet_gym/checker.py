"""``check_world_env``: does an environment keep the contract of a world? Each finding names its likely cause.

For authors of world models and simulators behind our interface, and for our own tests. It goes beyond
``gymnasium.utils.env_checker.check_env`` (run that too): chunks, judged reward, saved states, forks, slots of a batch.
"""

from __future__ import annotations

import copy
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv

__all__ = ["check_world_env"]

_INFO_TYPES = {"instruction": str, "env_step": int, "is_success": bool, "judge_valid": bool, "checkpoint": str}


def check_world_env(env: gym.Env | VectorEnv, *, max_chunk_length: int | None = None, seed: int = 0) -> None:
    """Checks a world with the chunk interface; resets and steps it many times and leaves it in no particular state.

    For a single environment: spaces and dtypes, info keys, determinism from ``reset(seed=...)``, fresh arrays, all
    chunk lengths, bad input, ``get_state`` / ``set_state`` / ``fork``, and how rollouts end. For a vector environment:
    shapes and masks, independent slots, bad input, and what its autoreset mode promises.

    Args:
        env: the environment; wrappers are allowed as long as they keep spaces and infos.
        max_chunk_length: longest chunk it must take (and one more it must refuse); default that of its world model,
            else the length in its action space.
        seed: of everything that is drawn.

    Raises:
        AssertionError: a rule is broken; the message says what was seen and what usually causes it.
    """
    if isinstance(env, VectorEnv):
        _check_vector(env, seed)
        return
    _check_spaces(env.observation_space, env.action_space)
    longest = max_chunk_length or _longest_chunk(env)
    _check_reset_and_step(env, seed)
    _check_determinism(env, seed)
    _check_fresh_arrays(env, seed)
    _check_chunk_lengths(env, longest, seed)
    _check_bad_input(env, longest, seed)
    _check_states(env, seed)
    _check_fork(env, seed)
    _check_end(env, seed)


def require(holds: Any, finding: str, cause: str) -> None:
    """Raises ``AssertionError`` with finding and cause unless ``holds``."""
    if not holds:
        raise AssertionError(f"{finding}. Likely cause: {cause}.")


def same(left: Any, right: Any, tolerance: int = 0) -> bool:
    """Returns whether observations or frames agree: images to ``tolerance`` grey levels, states to the bit."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k], tolerance) for k in left)
    if left.dtype == np.uint8 and left.shape == right.shape:
        return bool(np.abs(left.astype(int) - right.astype(int)).max(initial=0) <= tolerance)
    return bool(np.array_equal(left, right))


def _longest_chunk(env: Any) -> int:
    world_model = getattr(env.unwrapped, "world_model", None)
    return env.action_space.shape[0] if world_model is None else world_model.chunk_length


def draw_actions(space: Any, count: int, length: int, seed: int) -> np.ndarray:
    """Returns (count, length, 7N) commands inside the bounds."""
    draw = np.random.default_rng(seed).uniform(space.low[0], space.high[0], (count, length, space.shape[-1]))
    return np.clip(draw.astype(np.float32), space.low[0], space.high[0])


def _check_spaces(observation_space: Any, action_space: Any) -> None:
    keys = list(observation_space.spaces) if isinstance(observation_space, gym.spaces.Dict) else None
    require(
        keys == ["image", "state"],
        f"observation_space is {observation_space}, expected Dict with keys 'image' and 'state'",
        "another interface (make the environment with interface='chunk')",
    )
    image, state = observation_space["image"], observation_space["state"]
    require(
        image.dtype == np.uint8 and len(image.shape) == 3 and image.shape[-1] == 3,
        f"observation_space['image'] is {image.dtype} {image.shape}, expected uint8 (H, W, 3)",
        "channels first, a batch axis, or images scaled to floats",
    )
    require(
        isinstance(action_space, gym.spaces.Box) and len(action_space.shape) == 2 and action_space.shape[1] % 7 == 0,
        f"action_space is {action_space}, expected Box(C, 7N)",
        "flattened chunks, or single commands without a chunk axis",
    )
    effectors = action_space.shape[1] // 7
    require(
        state.shape == (8 * effectors,) and state.dtype == np.float32,
        f"observation_space['state'] is {state.dtype} {state.shape}, expected float32 ({8 * effectors},)",
        "a state without its pad entry: 8 numbers per end-effector, 7 per command",
    )


def _check_info(info: dict[str, Any], where: str) -> None:
    for key, kind in _INFO_TYPES.items():
        require(
            isinstance(info.get(key), kind),
            f"info[{key!r}] after {where} is {info.get(key)!r}, expected {kind.__name__}",
            "a missing key, or a numpy scalar that should be converted with .item()",
        )
    require("verdict" in info, f"info after {where} lacks 'verdict'", "it must be there, None where no judge was asked")
    require(
        info["judge_valid"] or not info["is_success"],
        f"after {where} is_success is True although judge_valid is False",
        "an abstention counted as success",
    )


def _check_reset_and_step(env: Any, seed: int) -> None:
    observation, info = env.reset(seed=seed)
    require(
        observation in env.observation_space,
        "the observation of reset() is outside observation_space",
        "a dtype or shape that differs from the declared one, or a gripper outside [0, 1]",
    )
    _check_info(info, "reset()")
    require(info["env_step"] == 0, f"env_step after reset() is {info['env_step']}, expected 0", "a counter not reset")
    length = env.action_space.shape[0]
    observation, reward, terminated, truncated, info = env.step(draw_actions(env.action_space, 1, length, seed)[0])
    require(
        observation in env.observation_space,
        "the observation of step() is outside observation_space",
        "a dtype or shape that differs from the declared one, or a state that float rounding pushed over its bound",
    )
    _check_info(info, "step()")
    require(
        info["env_step"] == 1, f"env_step after one step is {info['env_step']}", "it counts chunks (1), not commands"
    )
    frames = info.get("frames")
    expected = (length, *env.observation_space["image"].shape)
    require(
        isinstance(frames, np.ndarray) and frames.dtype == np.uint8 and frames.shape == expected,
        f"info['frames'] is {getattr(frames, 'dtype', type(frames))} {getattr(frames, 'shape', '')}, "
        f"expected uint8 {expected}",
        "one frame per command is due: padding returned, or the start frame included",
    )
    require(
        same(frames[-1], observation["image"]),
        "the image observed is not the last frame of info['frames']",
        "frames and observation rendered at different times",
    )
    _check_outcome(reward, terminated, truncated, info)


def _check_outcome(reward: Any, terminated: Any, truncated: Any, info: dict[str, Any]) -> None:
    require(
        isinstance(reward, float) and type(terminated) is bool and type(truncated) is bool,
        f"reward, terminated, truncated are {type(reward).__name__}, {type(terminated).__name__}, "
        f"{type(truncated).__name__}, expected float, bool, bool",
        "numpy scalars passed on",
    )
    require(
        terminated == info["is_success"],
        f"terminated is {terminated} but is_success is {info['is_success']}",
        "terminated means judged success; the horizon is truncated",
    )
    require(
        info["judge_valid"] or (reward == 0.0 and not terminated),
        f"judge_valid is False but reward is {reward} and terminated is {terminated}",
        "an abstention scored as a label",
    )


def _check_fresh_arrays(env: Any, seed: int) -> None:
    actions = draw_actions(env.action_space, 2, env.action_space.shape[0], seed)
    env.reset(seed=seed)
    clean = [env.step(action) for action in actions]
    arrays = [[*step[0].values(), step[4]["frames"]] for step in clean]
    require(
        not any(np.shares_memory(a, b) for a, b in zip(*arrays, strict=True)),
        "arrays of two consecutive steps share memory",
        "a buffer returned without .copy()",
    )
    observation, _ = env.reset(seed=seed)
    for action, step in zip(actions, clean, strict=True):
        for array in observation.values():
            array.fill(0)  # a caller may write into what it was given
        observation, *_, info = env.step(action)
        require(
            same(observation, step[0]),
            "writing into a returned observation changed what came next",
            "the environment keeps the array it returned; return a copy",
        )
        info["frames"].fill(0)


def _check_determinism(env: Any, seed: int) -> None:
    actions = draw_actions(env.action_space, 2, env.action_space.shape[0], seed)
    runs = []
    for _ in range(2):
        start, _ = env.reset(seed=seed)
        runs.append([copy.deepcopy(start), *[copy.deepcopy(env.step(action)[0]) for action in actions]])
        env.reset(seed=seed + 1)
    for step, (left, right) in enumerate(zip(*runs, strict=True)):
        require(
            same(left, right),
            f"the same seed and actions gave other observations after {step} steps",
            "global random numbers, or noise that does not start from the reset seed",
        )


def _check_chunk_lengths(env: Any, longest: int, seed: int) -> None:
    for length in range(1, longest + 1):
        env.reset(seed=seed)
        _, _, _, _, info = env.step(draw_actions(env.action_space, 1, length, seed)[0])
        require(
            len(info["frames"]) == length,
            f"a chunk of {length} commands gave {len(info['frames'])} frames",
            "frames of padded commands not dropped",
        )


def _check_bad_input(env: Any, longest: int, seed: int) -> None:
    good = draw_actions(env.action_space, 1, env.action_space.shape[0], seed)[0]
    nan, outside = good.copy(), good.copy()
    nan[0, 0], outside[-1, 0] = np.nan, 2.0 * np.abs(env.action_space.high).max() + 1.0
    cases = {
        "one command without a chunk axis": good[0],
        "a command with a number too many": np.concatenate([good, good[:, :1]], axis=1),
        "an empty chunk": good[:0],
        "NaN": nan,
        "a number out of bounds": outside,
        f"a chunk of {longest + 1} commands": draw_actions(env.action_space, 1, longest + 1, seed)[0],
    }
    env.reset(seed=seed)
    expected, *_ = env.step(good)
    env.reset(seed=seed)
    for name, action in cases.items():
        try:
            env.step(action)
        except ValueError as error:
            require(len(str(error)) > 20, f"{name}: the message is {str(error)!r}", "it must say what was expected")
        else:
            require(False, f"step() took {name}", "actions are clipped, cast or padded in silence; raise ValueError")
    require(
        same(env.step(good)[0], expected),
        "a refused action changed the rollout",
        "the state is written before the action is checked",
    )


def _check_states(env: Any, seed: int) -> None:
    world = env.unwrapped
    require(
        all(hasattr(world, name) for name in ("get_state", "set_state", "fork")),
        f"{type(world).__name__} lacks get_state, set_state or fork",
        "they belong on env.unwrapped; learners that group rollouts need them",
    )
    actions = draw_actions(env.action_space, 3, env.action_space.shape[0], seed)
    env.reset(seed=seed)
    env.step(actions[0])
    state = world.get_state()
    kept = copy.deepcopy(state)
    first = env.step(actions[1])
    for name, restored in (("get_state", state), ("a copy of get_state", kept)):
        env.reset(seed=seed + 1)
        world.set_state(restored)
        again = env.step(actions[1])
        require(
            same(again[0], first[0]) and same(again[4]["frames"], first[4]["frames"]),
            f"stepping after set_state({name}()) gave other bytes than before",
            "the state lacks something (noise counter, history, pose), or later steps wrote into it",
        )
        require(
            again[4]["env_step"] == first[4]["env_step"],
            f"env_step is {again[4]['env_step']} after set_state, expected {first[4]['env_step']}",
            "counters are not part of the state",
        )


def _check_fork(env: Any, seed: int) -> None:
    actions = draw_actions(env.action_space, 3, env.action_space.shape[0], seed)
    env.reset(seed=seed)
    env.step(actions[0])
    members = env.unwrapped.fork(2)
    observation, *_ = members.step(actions[1:])
    alone, *_ = env.step(actions[1])
    require(
        same({key: value[0] for key, value in observation.items()}, alone, tolerance=1),
        "a fork and its origin, given the same actions, differ by more than one grey level",
        "members draw other noise than the origin, or do not copy its history",
    )
    members.close()


def _check_end(env: Any, seed: int) -> None:
    horizon: Any = getattr(env.unwrapped, "horizon", None)
    require(
        isinstance(horizon, int), f"horizon is {horizon!r}, expected an integer", "env.unwrapped.horizon is missing"
    )
    length = env.action_space.shape[0]
    limit = -(-horizon // length)
    actions = draw_actions(env.action_space, limit, length, seed)
    env.reset(seed=seed)
    for step, action in enumerate(actions, 1):
        _, reward, terminated, truncated, info = env.step(action)
        _check_outcome(reward, terminated, truncated, info)
        require(
            truncated == (step == limit),
            f"truncated is {truncated} after {step * length} commands with a horizon of {horizon}",
            "the horizon counts commands, not chunks",
        )
        if terminated:
            break


def _check_vector(env: Any, seed: int) -> None:
    from .checker_vector import check_autoreset, check_slots

    _check_spaces(env.single_observation_space, env.single_action_space)
    mode = env.metadata.get("autoreset_mode")
    require(
        isinstance(mode, AutoresetMode),
        f"metadata['autoreset_mode'] is {mode!r}",
        "it must be a gymnasium.vector.AutoresetMode",
    )
    check_slots(env, seed)
    check_autoreset(env, mode, seed)
