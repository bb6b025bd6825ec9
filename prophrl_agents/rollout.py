"""``collect_groups``: a policy acts in any vectorised environment, and a :class:`RolloutBatch` comes back.

Data flow: starts -> ``env.reset`` (one slot per member) -> ``policy.sample`` on the running slots -> ``env.step`` ->
padded tensors and masks. World models and simulators take the same path; only their ``info`` says who judged.

A member's result depends on its start, its noise and the weights alone: not on the number of slots, nor on its
neighbours. Members of a group share the reset seed, and with it the world model's sampling noise: only the policy's
noise tells them apart, so differences in reward are the policy's doing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box, Dict
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import Tensor
from tqdm import tqdm

from prophet_gym.arguments import parse_autoreset_mode
from prophet_gym.sims.vector import HoldingSyncVectorEnv, without_frames
from prophet_gym.vector_env import ProphetVectorEnv
from prophrl_agents.batch import RolloutBatch, Start
from prophrl_agents.policies.base import FlowPolicy, FlowSample, SampleMode
from prophrl_agents.policies.small import SmallFlowPolicy

__all__ = [
    "check_compatible",
    "collect_groups",
    "info_entry",
    "last_info",
    "member_generator",
    "must_reset_ended",
]

_ROUNDING = 2  # grey levels by which two renderings of one state may differ
_STATE_TOLERANCE = 1e-4  # metres, radians, open ratio


def collect_groups(
    env: VectorEnv,
    policy: FlowPolicy,
    starts: Sequence[Start],
    group_size: int,
    *,
    noise_seed: int,
    mode: SampleMode = "sde",
    keep_frames: bool = False,
    progress: bool = False,
    max_env_steps: int = 1000,
) -> RolloutBatch:
    """Collects ``group_size`` rollouts from each start, members side by side.

    The environment is reset once per pass of ``num_envs`` rollouts; slots left over in the last pass repeat the last
    start and are thrown away. A rollout ends at its first ``terminated or truncated``. From then on the policy is not
    asked about it, and in a :class:`ProphetVectorEnv` or a simulator of ``make_sync_vector_env`` with
    ``autoreset_mode="Disabled"`` it costs nothing. Any other mode gives the same batch and wastes the steps that
    finished slots go on with; other environments in mode "Disabled" get their finished slots reset by
    ``options["reset_mask"]``, as Gymnasium asks.

    What is read from ``info`` where it is there: "instruction" (else ""), "is_success" (else: terminated with a
    positive reward), "judge_valid" (else True), "verdict", "frames" (else the observations, one per chunk) and
    "num_executed", the commands of the chunk that were executed (else all of them).

    Args:
        env: vector environment with actions ``Box(CH, D)`` and observations ``Dict(image, state)``.
        policy: its chunk may be shorter than the environment's, not longer.
        starts: one per group; snapshots go to ``env.reset(options={"snapshots": [...]})``, one per slot. An environment
            that ignores options in silence starts where the seed says.
        group_size: members of a group; learners need at least 2.
        noise_seed: of the policy's noise. Member m of a start draws from ``member_generator(noise_seed, seed, m)``.
        mode: "sde" for learning, "ode" for deployment.
        keep_frames: keep the video of every rollout. Without, our simulators render what the policy sees and no more:
            their ``info`` has no "frames".
        progress: show a bar with the remaining time.
        max_env_steps: policy calls after which a rollout that has not ended is an error.

    Returns:
        The batch; ``seconds`` has "policy", "env" (world, judge and resets) and "total".

    Raises:
        ValueError: no starts, ``group_size`` below 1, an environment without chunk actions or not fitting the policy,
            snapshots that it cannot start from, members of a group with different initial states, or an episode that
            never ends.
    """
    check_compatible(env, policy)
    if not starts:
        raise ValueError("starts is empty; expected at least one Start(seed, snapshot)")
    if group_size < 1 or max_env_steps < 1 or noise_seed < 0:
        raise ValueError(
            f"group_size is {group_size}, max_env_steps {max_env_steps}, noise_seed {noise_seed}; expected at least "
            "1, 1 and 0 (learning needs groups of at least 2)"
        )
    began = time.perf_counter()
    collection = _Collection(env, policy, tuple(starts), group_size, noise_seed, mode, keep_frames)
    total = len(starts) * group_size
    quiet = None if progress else True
    rendering = nullcontext() if keep_frames else without_frames(env)
    with rendering, tqdm(total=total, desc="rollouts", unit="rollout", disable=quiet) as bar:
        for first in range(0, total, env.num_envs):
            collection.run(range(first, min(first + env.num_envs, total)), max_env_steps, bar)
    return collection.to_batch(began)


def member_generator(noise_seed: int, start_seed: int, member: int) -> torch.Generator:
    """Returns the generator of one member's policy noise; it depends on these three numbers alone."""
    entropy = np.random.SeedSequence((noise_seed, start_seed, member))
    return torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0]))


def check_compatible(env: VectorEnv, policy: FlowPolicy) -> None:
    """Requires that ``policy`` can act in ``env``.

    Raises:
        ValueError: not a vector environment, actions that are no chunks, observations without image and state, or
            another number of dimensions, a longer chunk, or images or states of another size in the policy.
    """
    if not isinstance(env, VectorEnv):
        raise ValueError(f"env is a {type(env).__name__}, expected a gymnasium.vector.VectorEnv: use gym.make_vec(...)")
    space, observations = env.single_action_space, env.single_observation_space
    if not isinstance(space, Box) or len(space.shape) != 2:
        raise ValueError(
            f"the actions of the environment are {space}, expected chunks Box(CH, D). Make Prophet environments with "
            "interface='chunk'; wrap others so that action_space is a Box(CH, D) and step(chunk) executes its rows in "
            "turn, up to the end of the episode"
        )
    longest, dimensions = space.shape
    if policy.action_dim != dimensions:
        raise ValueError(
            f"the policy's commands have {policy.action_dim} numbers, the environment's {dimensions}; expected equal: "
            "use a policy trained for this robot"
        )
    if policy.chunk_length > longest:
        raise ValueError(
            f"the policy's chunks have {policy.chunk_length} commands, the environment takes at most {longest}; make "
            f"it with chunk_length={policy.chunk_length} if its model allows, or use a policy with shorter chunks"
        )
    parts: Any = dict(observations.spaces) if isinstance(observations, Dict) else {}
    image, state = parts.get("image"), parts.get("state")
    is_image = isinstance(image, Box) and image.dtype == np.uint8 and len(image.shape) == 3 and image.shape[2] == 3
    if not is_image or not isinstance(state, Box) or len(state.shape) != 1:
        raise ValueError(
            f"the observations of the environment are {observations}, expected Dict(image: uint8 (H, W, 3), "
            "state: (P,)); wrap it so that reset and step return these two"
        )
    if isinstance(policy, SmallFlowPolicy):  # others may resize what they see themselves
        (height, width), size, numbers = image.shape[:2], policy.config.image_size, policy.config.state_dim
        if (height, width, *state.shape) != (size, size, numbers):
            other_size = (height, width) != (size, size)
            fix = f"make it with image_size={size} (world models: ({size}, {size})), or " if other_size else ""
            raise ValueError(
                f"the policy sees images of {size}x{size} pixels and states of {numbers} numbers, the environment "
                f"shows {height}x{width} and {state.shape[0]}; expected equal: {fix}"
                "use a policy trained for this environment"
            )


@dataclass(frozen=True, eq=False)
class _Call:
    """One batched policy call: M running rollouts, all at policy call s."""

    rollouts: Tensor  # (M,) indices b
    s: int
    image: Tensor
    state: Tensor
    sample: FlowSample
    mask: Tensor  # (M, CH)


@dataclass(eq=False)
class _Collection:
    """What is known so far of B rollouts; :meth:`run` adds a pass over the environment's slots."""

    env: VectorEnv
    policy: FlowPolicy
    starts: tuple[Start, ...]
    group_size: int
    noise_seed: int
    mode: SampleMode
    keep_frames: bool
    calls: list[_Call] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: {"policy": 0.0, "env": 0.0})

    def __post_init__(self) -> None:
        size = len(self.starts) * self.group_size
        self.rewards = np.zeros(size, np.float64)
        self.success, self.valid = np.zeros(size, bool), np.ones(size, bool)
        self.scores, self.reasons = np.full(size, np.nan), [""] * size
        self.instructions = [""] * size
        self.frames: list[list[np.ndarray]] = [[] for _ in range(size)]
        self.initial: dict[int, tuple[np.ndarray, np.ndarray, str]] = {}
        space: Any = self.env.single_action_space
        self.idle = np.clip(np.zeros_like(space.low), space.low, space.high)[: self.policy.chunk_length]
        self.must_reset_ended = must_reset_ended(self.env)

    def run(self, rollouts: range, max_env_steps: int, bar: tqdm) -> None:
        """Plays the given rollouts, at most one per slot, to their ends."""
        starts = [self.starts[b // self.group_size] for b in rollouts]
        starts += starts[-1:] * (self.env.num_envs - len(starts))
        observation, info = self._reset(starts)
        for slot, b in enumerate(rollouts):
            self._begin(
                b, observation["image"][slot], observation["state"][slot], info_entry(info, "instruction", slot)
            )
        generators = [self._generator(b) for b in rollouts]
        running, index = np.arange(len(rollouts)), np.asarray(rollouts)
        for s in range(max_env_steps):
            members, image, state = index[running], observation["image"][running], observation["state"][running]
            sample = self._act(image, state, members, [generators[slot] for slot in running])
            actions = np.repeat(self.idle[None], self.env.num_envs, axis=0)
            actions[running] = sample.actions.numpy()
            with self._clock("env"):
                observation, reward, terminated, truncated, info = self.env.step(actions)
            mask = np.zeros((len(running), self.policy.chunk_length), bool)
            for row, (slot, b) in enumerate(zip(running.tolist(), members.tolist(), strict=True)):
                last = last_info(info, slot)
                executed = self._executed(last, slot)
                mask[row, :executed] = True
                self.rewards[b] += reward[slot]
                if self.keep_frames:
                    self.frames[b].append(_frames(last, observation, info, slot, executed))
                if terminated[slot] or truncated[slot]:
                    self._finish(b, last, slot, rewarded=bool(terminated[slot] and reward[slot] > 0))
            seen = torch.from_numpy(image), torch.from_numpy(state.astype(np.float32))
            self.calls.append(_Call(torch.from_numpy(members), s, *seen, sample, torch.from_numpy(mask)))
            ended = np.asarray(terminated) | np.asarray(truncated)
            bar.update(int(ended[running].sum()))
            running = running[~ended[running]]
            if not running.size:
                return
            if self.must_reset_ended and ended.any():
                self._reset(starts, mask=ended)
        raise ValueError(
            f"{running.size} of {len(rollouts)} rollouts have not ended after max_env_steps={max_env_steps} policy "
            "calls; expected terminated or truncated. Give the environment a horizon (gymnasium.wrappers.TimeLimit "
            "around each slot), or raise max_env_steps"
        )

    def to_batch(self, began: float) -> RolloutBatch:
        """Pads everything to the largest number of policy calls; ``began`` is when the clock was started."""
        size, length = len(self.rewards), 1 + max(call.s for call in self.calls)
        first = self.calls[0]

        def pad(like: Tensor) -> Tensor:
            return torch.zeros(size, length, *like.shape[1:], dtype=like.dtype)

        image, state, mask = pad(first.image), pad(first.state), pad(first.mask)
        actions, path, log_prob = pad(first.sample.actions), pad(first.sample.path), pad(first.sample.log_prob)
        for call in self.calls:
            where = call.rollouts, call.s
            image[where], state[where], mask[where] = call.image, call.state, call.mask
            actions[where], path[where], log_prob[where] = call.sample.actions, call.sample.path, call.sample.log_prob
        return RolloutBatch(
            image=image,
            state=state,
            instructions=tuple(self.instructions),
            actions=actions,
            path=path,
            log_prob=log_prob,
            std=first.sample.std.clone(),
            mask=mask,
            rewards=torch.from_numpy(self.rewards).float(),
            success=torch.from_numpy(self.success),
            valid=torch.from_numpy(self.valid),
            scores=torch.from_numpy(self.scores).float(),
            starts=self.starts,
            group_size=self.group_size,
            frames=tuple(np.concatenate(parts) for parts in self.frames) if self.keep_frames else (),
            reasons=tuple(self.reasons),
            seconds={**self.seconds, "total": time.perf_counter() - began},
        )

    def _reset(self, starts: Sequence[Start], mask: np.ndarray | None = None) -> tuple[Any, dict[str, Any]]:
        snapshots = [start.snapshot for start in starts]
        options: dict[str, Any] = {} if mask is None else {"reset_mask": mask}
        if any(snapshot is not None for snapshot in snapshots):
            options["snapshots"] = snapshots
        seeds: Any = [start.seed for start in starts]  # Gymnasium's base class is annotated with int alone
        with self._clock("env"):
            try:
                return self.env.reset(seed=seeds, options=options or None)
            except Exception as error:  # third parties raise anything for an option that they do not know
                if "snapshots" not in options:
                    raise
                raise ValueError(
                    f"the environment cannot start from the given snapshots ({type(error).__name__}: {error}); use "
                    "snapshots made for it, or starts without snapshots: Start(seed)"
                ) from error

    def _begin(self, b: int, image: np.ndarray, state: np.ndarray, instruction: Any) -> None:
        """Notes where rollout b starts, and requires that its group starts there too."""
        self.instructions[b] = "" if instruction is None else str(instruction)
        if self.keep_frames:
            self.frames[b].append(np.array(image[None]))
        here = np.array(image), np.array(state), self.instructions[b]
        group = b // self.group_size
        first = self.initial.setdefault(group, here)
        if b % self.group_size == self.group_size - 1:
            del self.initial[group]
        pixels = np.abs(here[0].astype(int) - first[0].astype(int)).max()
        distance = np.abs(here[1] - first[1]).max()
        if pixels > _ROUNDING or distance > _STATE_TOLERANCE or here[2] != first[2]:
            raise ValueError(
                f"member {b % self.group_size} of group {group} (seed {self.starts[group].seed}) starts elsewhere than "
                f"member 0: images differ by up to {pixels} grey levels, states by {distance:.3g}, instructions are "
                f"{here[2]!r} and {first[2]!r}. A group is one initial state: give its Start a snapshot, or use an "
                "environment whose reset(seed=...) always leads to the same state"
            )

    def _act(
        self, image: np.ndarray, state: np.ndarray, members: np.ndarray, generators: list[torch.Generator]
    ) -> FlowSample:
        obs = {"image": image, "state": state, "instruction": [self.instructions[b] for b in members]}
        with self._clock("policy"), torch.no_grad():
            sample = self.policy.sample(obs, generators, self.mode)
            return FlowSample(sample.actions.cpu(), sample.path.cpu(), sample.log_prob.cpu(), sample.std.cpu())

    def _executed(self, info: dict[str, Any], slot: int) -> int:
        given, length = info_entry(info, "num_executed", slot), self.policy.chunk_length
        if given is not None and not 1 <= given <= length:
            raise ValueError(f"info['num_executed'] is {given}, expected 1 to {length}, the commands of the chunk")
        return length if given is None else int(given)

    def _finish(self, b: int, info: dict[str, Any], slot: int, rewarded: bool) -> None:
        success, valid, verdict = (info_entry(info, key, slot) for key in ("is_success", "judge_valid", "verdict"))
        self.valid[b] = True if valid is None else bool(valid)
        self.success[b] = self.valid[b] and bool(rewarded if success is None else success)
        self.scores[b] = getattr(verdict, "score", np.nan)
        self.reasons[b] = "" if self.valid[b] else str(getattr(verdict, "reason", ""))

    def _generator(self, b: int) -> torch.Generator:
        return member_generator(self.noise_seed, self.starts[b // self.group_size].seed, b % self.group_size)

    @contextmanager
    def _clock(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - began


def must_reset_ended(env: VectorEnv) -> bool:
    """Whether ended slots have to be reset before the next step, as Gymnasium asks in mode "Disabled"; ours hold."""
    holds = isinstance(env.unwrapped, ProphetVectorEnv | HoldingSyncVectorEnv)
    mode = parse_autoreset_mode(env.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP))
    return mode is AutoresetMode.DISABLED and not holds


def info_entry(info: dict[str, Any], key: str, slot: int) -> Any:
    """Returns one slot's value of a vector info, None where it has none."""
    present = key in info and (f"_{key}" not in info or info[f"_{key}"][slot])
    return info[key][slot] if present else None


def last_info(info: dict[str, Any], slot: int) -> dict[str, Any]:
    """Returns the info that a slot's step led to: that before its reset, if it was reset within the step."""
    return info["final_info"] if "final_info" in info and info["_final_info"][slot] else info


def _frames(last: dict[str, Any], observation: Any, info: dict[str, Any], slot: int, executed: int) -> np.ndarray:
    """Returns a copy of the frames (T, H, W, 3) of the executed commands; without them the image after the chunk."""
    frames = info_entry(last, "frames", slot)
    if frames is not None:
        return np.array(frames[:executed])
    image = observation["image"][slot] if last is info else info["final_obs"][slot]["image"]
    return np.array(image[None])
