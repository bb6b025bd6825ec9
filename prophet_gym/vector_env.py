"""``ProphetVectorEnv``: B imagined rollouts behind ``gymnasium.vector.VectorEnv``, one model call a step.

Data flow: actions (B, C, 7N) -> ``ActionSpec.to_canonical`` -> ``WorldModel.predict`` (all running slots at once) ->
frames -> ``judge.judge_batch`` (all finishing slots at once) -> observation, reward, terminated, truncated, info.
``terminated`` is judged success, ``truncated`` is the horizon; a judge that fails or abstains leaves reward 0 and
``judge_valid=False``. The chunk that reaches the horizon is executed to its end.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from .action_frames import Camera
from .arguments import (
    known_options,
    parse_autoreset_mode,
    per_slot,
    require_between,
    require_snapshot,
    require_snapshots,
)
from .judges.base import Judge, as_judge
from .judging import ask_judge
from .observations import make_observation, observation_space
from .slot import Slot, load_slots, save_slots
from .snapshot import Snapshot
from .world_model.state import RolloutState, WorldModel

__all__ = ["ProphetVectorEnv"]

logger = logging.getLogger(__name__)


class ProphetVectorEnv(VectorEnv):
    """A batch of independent worlds that share one world model.

    Observations, actions and infos are those of :class:`prophet_gym.ProphetEnv` with a leading axis B; an info key
    ``k`` comes with a mask ``_k`` (B,) that tells which slots have it, as Gymnasium does. Slot i behaves as a lone
    environment with its seed. After ``terminated or truncated`` a slot is handled as ``autoreset_mode`` says:

    - ``NEXT_STEP``: the next step ignores its action and returns its reset observation, reward 0.
    - ``SAME_STEP``: it is reset at once; ``info["final_obs"]`` and ``info["final_info"]`` hold how it ended.
    - ``DISABLED``: it is held and costs nothing: its observation and flags stay, its reward is 0, its action is not
      looked at, its info masks are False. ``reset(options={"reset_mask": mask})`` starts it again.

    Args:
        world_model: anything with ``begin`` and ``predict``; see :class:`prophet_gym.world_model.state.WorldModel`.
        num_envs: number of slots B.
        horizon: commands after which a rollout is truncated.
        snapshots: where rollouts start. Without them every reset needs ``options={"snapshots": [...]}`` and
            ``autoreset_mode`` must be ``DISABLED``: a slot that resets itself would have nowhere to start.
        judge: a :class:`prophet_gym.judges.Judge` or any callable ``(frames, instruction) -> Verdict | bool | float``.
            Without one every rollout ends with ``judge_valid=False``.
        judge_every_chunk: ask the judge after every chunk instead of once at the horizon.
        chunk_length: commands in ``action_space``; default the model's maximum. ``step`` takes any length from 1 to
            that maximum.
        num_inference_steps: denoising steps; default the model's.
        autoreset_mode: an ``AutoresetMode`` or its value.
        render_mode: None or "rgb_array" (``render`` returns the current frame of every slot).

    Raises:
        ValueError: an argument is out of range or unknown, snapshots are none, or autoreset is asked for without any.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "autoreset_mode": AutoresetMode.NEXT_STEP}
    single_action_space: Box

    def __init__(
        self,
        world_model: WorldModel,
        num_envs: int = 1,
        *,
        horizon: int,
        snapshots: Sequence[Snapshot] | None = None,
        judge: Any = None,
        judge_every_chunk: bool = False,
        chunk_length: int | None = None,
        num_inference_steps: int | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        render_mode: str | None = None,
    ) -> None:
        spec, longest = world_model.action_spec, world_model.chunk_length
        chunk_length = longest if chunk_length is None else chunk_length
        require_between("num_envs", num_envs, 1, None)
        require_between("horizon", horizon, 1, None)
        require_between("chunk_length", chunk_length, 1, longest)
        if num_inference_steps is not None:
            require_between("num_inference_steps", num_inference_steps, 1, None)
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode={render_mode!r}: expected None or 'rgb_array'.")
        require_snapshots(snapshots)
        mode = parse_autoreset_mode(autoreset_mode)
        if snapshots is None and mode is not AutoresetMode.DISABLED:
            raise ValueError(
                f"autoreset_mode={mode.value!r} without snapshots: a slot that ends would have nowhere to start from. "
                "Give snapshots=..., or autoreset_mode='Disabled' and options={'snapshots': [...]} at every reset."
            )
        self.world_model, self.num_envs, self.horizon = world_model, num_envs, int(horizon)
        self.snapshots, self.judge_every_chunk = snapshots, judge_every_chunk
        self.judge: Judge | None = None if judge is None else as_judge(judge)
        self._told: set[str] = set()  # failures of the judge that were logged
        self.chunk_length, self.num_inference_steps = chunk_length, num_inference_steps
        self.autoreset_mode, self.render_mode = mode, render_mode
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode, "render_fps": spec.control_hz}
        self.single_observation_space = observation_space(spec, world_model.image_size)
        self.single_action_space = spec.action_space(chunk_length)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.slots = [Slot(rng=seeding.np_random()[0]) for _ in range(num_envs)]
        self._rollout: RolloutState | None = None
        if judge is None:
            logger.warning("No judge: every rollout will end with reward 0 and judge_valid=False.")

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Starts rollouts.

        Args:
            seed: one per slot; an integer s stands for s, s + 1, ...; None goes on with the slot's generator.
            options: ``"snapshots"``, one :class:`Snapshot` (or None: drawn by the slot's generator) per slot, and
                ``"reset_mask"`` (B,) bool, the slots to reset; the others stay as they are.

        Returns:
            The observation of every slot, and an info about the slots that were reset.

        Raises:
            ValueError: an option is unknown or does not fit B, or a snapshot does not fit the model.
        """
        options = known_options(options, ("snapshots", "reset_mask"))
        chosen = self._chosen(options.get("reset_mask"))
        snapshots = per_slot("options['snapshots']", options.get("snapshots"), self.num_envs)
        self._begin(chosen, [snapshots[i] for i in chosen], self._seeds(seed))
        return self._observation(), self._info(self._mask(chosen))

    def step(
        self, actions: np.ndarray
    ) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Takes one chunk in every running slot.

        Args:
            actions: (B, C, 7N) native commands, C from 1 to ``world_model.chunk_length``.

        Returns:
            Observation, reward (B,) float64, terminated (B,), truncated (B,) and info; ``info["frames"]`` is
            (B, C, H, W, 3) uint8.

        Raises:
            ValueError: called before ``reset`` or after every slot ended, or the actions are of the wrong shape, not
                finite, out of bounds or too long.
        """
        ended = [i for i, slot in enumerate(self.slots) if slot.done]
        running = [i for i in range(self.num_envs) if i not in ended]
        actions = self._check_actions(actions, ended)
        chunk = self._advance(running, actions) if running else None
        reward = np.array([float(slot.terminated) if i in running else 0.0 for i, slot in enumerate(self.slots)])
        reported, with_frames = self._mask(running), self._mask(running)
        restarted: list[int] = []
        final: dict[str, Any] = {}
        if self.autoreset_mode is AutoresetMode.NEXT_STEP:
            restarted = ended
            self._begin(restarted)
        terminated = np.array([slot.terminated for slot in self.slots])
        truncated = np.array([slot.truncated for slot in self.slots])
        if self.autoreset_mode is AutoresetMode.SAME_STEP:
            restarted = [i for i in running if self.slots[i].done]
            if restarted:
                finished = self._mask(restarted)
                observation, info = self._observation(), self._info(finished, chunk, finished)
                last = np.full(self.num_envs, None, dtype=object)
                for i in restarted:
                    last[i] = {key: value[i].copy() for key, value in observation.items()}
                final = {"final_obs": last, "_final_obs": finished, "final_info": info, "_final_info": finished.copy()}
                self._begin(restarted)
        reported[restarted], with_frames[restarted] = True, False
        info = {**self._info(reported, chunk, with_frames), **final}
        return self._observation(), reward, terminated, truncated, info

    def render(self) -> tuple[np.ndarray, ...] | None:
        """Returns the current frame (H, W, 3) uint8 of every slot, or None without ``render_mode``."""
        return None if self.render_mode is None else tuple(self._observation()["image"])

    def get_state(self, mask: np.ndarray | None = None) -> dict[str, Any]:
        """Returns everything that the future of the slots in ``mask`` (B,) bool (default all) depends on.

        A plain dict of tensors, numbers and strings: ``torch.save`` it, ``torch.load(..., weights_only=True)`` it in
        another process, and :meth:`set_state` there with the same checkpoint.
        """
        chosen, rollout = self._chosen(mask), self._started()
        return save_slots(rollout.select(chosen), [self.slots[i] for i in chosen])

    def set_state(self, state: dict[str, Any], mask: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Puts the slots of ``state`` in place of those in ``mask`` (default all), and returns the observation.

        Stepping then gives the same bytes as it did after :meth:`get_state` (CPU, same batch size).

        Raises:
            ValueError: another version or number of slots, tensors that another checkpoint or dtype left (the message
                lists names, shapes and dtypes), or a malformed slot; nothing has changed then.
        """
        chosen = self._chosen(mask)
        like = self._blank_rollout() if self._rollout is None else self._rollout
        rollout, slots = load_slots(state, like, len(chosen), self.world_model)
        self._place(chosen, rollout)
        for i, slot in zip(chosen, slots, strict=True):
            self.slots[i] = slot
        return self._observation()

    def resume(self) -> None:
        """Lets rollouts that ended in success, short of the horizon, go on; the next verdict may take success back."""
        for slot in self.slots:
            slot.terminated = slot.terminated and slot.truncated

    def fork(
        self, n: int, *, seeds: Sequence[int] | None = None, autoreset_mode: AutoresetMode | str | None = None
    ) -> ProphetVectorEnv:
        """Returns a new environment with every slot n times over: slot i becomes slots i n ... i n + n - 1.

        The world model is shared, nothing else is. Members of a slot draw the same noise, so that equal actions give
        equal futures, unless ``seeds`` are given.

        Args:
            n: members per slot.
            seeds: B n seeds, one per member, for its noise from here on and its later resets.
            autoreset_mode: of the new environment; default this one's.

        Raises:
            ValueError: called before ``reset``, n below 1, another number of seeds, or autoreset without snapshots.
        """
        rollout = self._started()
        require_between("n", n, 1, None)
        slots = [slot.fork() for slot in self.slots for _ in range(n)]
        rollout = rollout.fork(n)
        if seeds is not None:
            given = per_slot("seeds", seeds, len(slots))
            for slot, seed in zip(slots, given, strict=True):
                slot.rng = seeding.np_random(seed)[0]
            rollout = dataclasses.replace(rollout, seeds=torch.tensor([_noise_seed(slot.rng) for slot in slots]))
        members = ProphetVectorEnv(
            self.world_model,
            len(slots),
            horizon=self.horizon,
            snapshots=self.snapshots,
            judge=self.judge,
            judge_every_chunk=self.judge_every_chunk,
            chunk_length=self.chunk_length,
            num_inference_steps=self.num_inference_steps,
            autoreset_mode=self.autoreset_mode if autoreset_mode is None else autoreset_mode,
            render_mode=self.render_mode,
        )
        members.slots, members._rollout = slots, rollout
        return members

    def _begin(
        self,
        chosen: list[int],
        snapshots: Sequence[Snapshot | None] | None = None,
        seeds: Sequence[int | None] | None = None,
    ) -> None:
        """Starts the chosen slots; ``snapshots`` has one entry per chosen slot, ``seeds`` one per slot."""
        if not chosen:
            return
        fresh, starts, noise = [], [], []
        for position, i in enumerate(chosen):
            seed = None if seeds is None else seeds[i]
            rng = copy.deepcopy(self.slots[i].rng) if seed is None else seeding.np_random(seed)[0]
            noise.append(_noise_seed(rng))  # drawn before the snapshot: giving a snapshot leaves the noise as it is
            given = None if snapshots is None else snapshots[position]
            snapshot = self._draw_snapshot(rng) if given is None else require_snapshot(given, i)
            starts.append(snapshot)
            fresh.append(Slot(rng=rng, instruction=snapshot.instruction, frames=[snapshot.image[None].copy()]))
        self._place(chosen, self.world_model.begin(starts, noise))
        for i, slot in zip(chosen, fresh, strict=True):
            self.slots[i] = slot

    def _blank_rollout(self) -> RolloutState:
        """Begins one black slot: the fields, shapes and dtypes of this world model's rollouts before the first."""
        n, (height, width) = self.world_model.action_spec.num_effectors, self.world_model.image_size
        camera = Camera(np.diag([width, width, 1.0]), np.eye(4), width, height)
        image = np.zeros((height, width, 3), dtype=np.uint8)
        return self.world_model.begin([Snapshot(image, "", np.tile(np.eye(4), (n, 1, 1)), np.ones(n), camera)], [0])

    def _draw_snapshot(self, rng: np.random.Generator) -> Snapshot:
        if self.snapshots is None:
            raise ValueError(
                "This environment has no snapshots to start from: make it with snapshots=..., or reset with "
                'options={"snapshot": Snapshot(...)} (vector: options={"snapshots": [...]}).'
            )
        return self.snapshots[int(rng.integers(len(self.snapshots)))]

    def _place(self, chosen: list[int], rollout: RolloutState) -> None:
        if len(chosen) == self.num_envs:
            self._rollout = rollout
        else:
            self._rollout = self._started().put(chosen, rollout)

    def _advance(self, running: list[int], actions: np.ndarray) -> np.ndarray:
        """Predicts and judges; returns frames (B, C, H, W, 3), zero where a slot did not run."""
        everyone, rollout = len(running) == self.num_envs, self._started()
        before = rollout if everyone else rollout.select(running)
        canonical = self.world_model.action_spec.to_canonical(actions[running])
        frames, after = self.world_model.predict(before, canonical, self.num_inference_steps)
        self._place(running, after)
        for position, i in enumerate(running):
            slot = self.slots[i]
            slot.frames.append(frames[position])
            slot.env_step += 1
            slot.num_commands += actions.shape[1]
            slot.truncated, slot.verdict = slot.num_commands >= self.horizon, None
        self._judge([self.slots[i] for i in running if self.judge_every_chunk or self.slots[i].truncated])
        chunk = np.zeros((self.num_envs, *frames.shape[1:]), dtype=np.uint8)
        chunk[running] = frames
        return chunk

    def _judge(self, slots: list[Slot]) -> None:
        if not slots:
            return
        rollouts, instructions = [slot.rollout() for slot in slots], [slot.instruction for slot in slots]
        for slot, verdict in zip(slots, ask_judge(self.judge, rollouts, instructions, self._told), strict=True):
            slot.verdict, slot.terminated = verdict, verdict.success is True

    def _observation(self) -> dict[str, np.ndarray]:
        rollout, n = self._started(), self.world_model.action_spec.num_effectors
        poses, gripper = rollout.poses.cpu().numpy(), rollout.gripper.cpu().numpy()
        return make_observation(np.stack([slot.frames[-1][-1] for slot in self.slots]), poses[:, :n], gripper[:, :n])

    def _info(
        self, reported: np.ndarray, chunk: np.ndarray | None = None, with_frames: np.ndarray | None = None
    ) -> dict[str, Any]:
        """Gymnasium's vector info: arrays (B, ...) and their masks."""
        facts = self.world_model.checkpoint_info
        label = f"{facts.get('name', 'unnamed')}, trained on {facts.get('trained_on', 'unknown data')}"
        verdicts = [slot.verdict for slot in self.slots]
        info: dict[str, Any] = {
            "instruction": np.array([slot.instruction for slot in self.slots], dtype=object),
            "env_step": np.array([slot.env_step for slot in self.slots]),
            "is_success": np.array([slot.terminated for slot in self.slots]),
            "judge_valid": np.array([verdict is None or verdict.valid for verdict in verdicts]),
            "verdict": np.array([*verdicts, None], dtype=object)[:-1],
            "checkpoint": np.array([label] * self.num_envs, dtype=object),
        }
        info.update({f"_{key}": reported.copy() for key in list(info)})
        if chunk is not None and with_frames is not None and with_frames.any():
            info["frames"] = np.where(with_frames[:, None, None, None, None], chunk, np.uint8(0))
            info["_frames"] = with_frames.copy()
        return info

    def _check_actions(self, actions: np.ndarray, held: list[int]) -> np.ndarray:
        self._started()
        if len(held) == self.num_envs and self.autoreset_mode is AutoresetMode.DISABLED:
            raise ValueError("step() after the rollout ended: call reset() first.")
        actions = np.array(actions)
        neutral = self.single_action_space.low[0]
        if actions.ndim == 3 and actions.shape[::2] == (self.num_envs, len(neutral)):
            actions[held] = neutral  # whatever a policy says in a slot that does not run is not an error
        return self.world_model.action_spec.check(actions, self.world_model.chunk_length, num_envs=self.num_envs)

    def _started(self) -> RolloutState:
        if self._rollout is None:
            raise ValueError("The environment has not started: call reset() on all slots first.")
        return self._rollout

    def _mask(self, chosen: list[int]) -> np.ndarray:
        mask = np.zeros(self.num_envs, dtype=bool)
        mask[chosen] = True
        return mask

    def _chosen(self, mask: np.ndarray | None) -> list[int]:
        if mask is None:
            return list(range(self.num_envs))
        mask = np.asarray(mask)
        if mask.shape != (self.num_envs,) or mask.dtype != bool or not mask.any():
            raise ValueError(
                f"A slot mask must be a bool array of shape ({self.num_envs},) with at least one True, got "
                f"{mask.dtype} of shape {mask.shape}: {mask}."
            )
        return np.flatnonzero(mask).tolist()

    def _seeds(self, seed: int | Sequence[int | None] | None) -> list[int | None]:
        if isinstance(seed, int | np.integer):
            return [int(seed) + i for i in range(self.num_envs)]
        return per_slot("seed", seed, self.num_envs)


def _noise_seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**31))
