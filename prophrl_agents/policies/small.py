"""SmallFlowPolicy: image, state and instruction in, a chunk of robot commands out; the embedded default.

The same contract as a VLA with a flow head (``policies/base.py``) at a size that trains on a CPU. Everything it needs
is in its folder: ``config.json`` (architecture, vocabulary, flow) and ``model.safetensors`` (weights and statistics).
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from prophet_gym.devices import require_device
from prophet_gym.weights import locate_weights
from prophet_gym.words import encode_instruction
from prophrl_agents.flow_sde import FlowSchedule, Generators, LastStep, schedule
from prophrl_agents.policies.base import FlowSample, Observation, SampleMode
from prophrl_agents.policies.flow_head import FlowHead
from prophrl_agents.policies.normalization import Normalizer, PolicyStatistics
from prophrl_agents.policies.trunk import ObservationTrunk
from prophrl_agents.shapes import check_shape

__all__ = ["SmallFlowPolicy", "SmallFlowPolicyConfig"]

ASSETS = Path(__file__).parents[1] / "assets"
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"


@dataclass(frozen=True)
class SmallFlowPolicyConfig:
    """Architecture and flow of a :class:`SmallFlowPolicy`.

    Raises:
        ValueError: a number out of range, or a vocabulary that is no list of words, is empty or has duplicates.
    """

    vocabulary: tuple[str, ...]
    """Known words, lower case (prophet_gym.words.build_vocabulary makes it)."""
    max_words: int = 12
    """Longest instruction, in words."""
    image_size: int = 64
    """Height and width of the image in pixels, a multiple of 8."""
    state_dim: int = 8
    """Numbers in the state, 8 per end-effector."""
    chunk_length: int = 8
    """Commands per policy call."""
    action_dim: int = 7
    """Numbers per command, 7 per end-effector."""
    num_flow_steps: int = 5
    """Flow steps K, in deployment and in learning."""
    noise_level: float = 0.5
    """Noise a of the flow SDE in learning."""
    last_step: LastStep = "sde"
    """Whether the last flow step is noisy in learning."""
    trunk_width: int = 64
    """Channels of the convolutions, a multiple of 8."""
    feature_dim: int = 256
    """Length of the feature vector."""
    head_width: int = 256
    """Hidden width of the flow head, even."""
    head_blocks: int = 4
    """Residual blocks of the flow head."""

    def __post_init__(self) -> None:
        """Checks every number."""
        words = self.vocabulary
        if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
            raise ValueError(f"vocabulary is {words!r}, expected a tuple or list of words")
        object.__setattr__(self, "vocabulary", tuple(words))
        if not self.vocabulary or len(set(self.vocabulary)) != len(self.vocabulary):
            raise ValueError(f"vocabulary {self.vocabulary} must hold at least one word and none twice")
        multiples = {"image_size": 8, "trunk_width": 8, "head_width": 2}
        for field in dataclasses.fields(self):
            value, multiple = getattr(self, field.name), multiples.get(field.name, 1)
            if field.type == "int" and not (isinstance(value, int) and value >= 1 and value % multiple == 0):
                raise ValueError(f"{field.name} is {value!r}, expected a positive multiple of {multiple}")
        if not isinstance(self.noise_level, int | float):
            raise ValueError(f"noise_level is {self.noise_level!r}, expected a number")
        schedule(self.num_flow_steps, self.noise_level, last_step=self.last_step)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SmallFlowPolicyConfig:
        """Builds a config from a dictionary; an unknown or missing key is a ValueError."""
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known keys: {known}"
                raise ValueError(f"unknown key {key!r} in the policy config; {hint}")
        if "vocabulary" not in values:
            raise ValueError("the policy config has no 'vocabulary'; it is the only key without a default")
        return cls(**values)


class SmallFlowPolicy(nn.Module):
    """Convolutional trunk and flow head, at most 5M parameters (2.7M by default).

    Freeze ``policy.trunk`` with ``requires_grad_(False)`` to reinforce the head alone.

    Args:
        config: architecture and flow. It may be replaced later by one that differs in ``num_flow_steps``,
            ``noise_level`` or ``last_step`` only (see :meth:`set_flow`).
        statistics: of the demonstrations, in native units.

    Raises:
        ValueError: statistics whose lengths differ from the config's action_dim and state_dim.
    """

    def __init__(self, config: SmallFlowPolicyConfig, statistics: PolicyStatistics) -> None:
        super().__init__()
        if (len(statistics.action_mean), len(statistics.state_mean)) != (config.action_dim, config.state_dim):
            raise ValueError(
                f"statistics for {len(statistics.action_mean)} action and {len(statistics.state_mean)} state numbers, "
                f"expected action_dim={config.action_dim} and state_dim={config.state_dim} as in the config"
            )
        self.config = config
        self.normalizer = Normalizer(statistics)
        self.trunk = ObservationTrunk(
            config.image_size,
            config.state_dim,
            len(config.vocabulary),
            config.max_words,
            config.trunk_width,
            config.feature_dim,
        )
        self.head = FlowHead(
            config.chunk_length, config.action_dim, config.feature_dim, config.head_width, config.head_blocks
        )
        self._queue: deque[Tensor] = deque()

    @property
    def chunk_length(self) -> int:
        """Commands per call, CH."""
        return self.config.chunk_length

    @property
    def action_dim(self) -> int:
        """Numbers per command, D."""
        return self.config.action_dim

    @property
    def num_flow_steps(self) -> int:
        """Flow steps, K."""
        return self.config.num_flow_steps

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head.outputs.weight.device

    def set_flow(
        self, *, num_flow_steps: int | None = None, noise_level: float | None = None, last_step: LastStep | None = None
    ) -> None:
        """Changes the flow of this policy; what is None stays. The weights do not depend on it."""
        self.config = dataclasses.replace(
            self.config,
            num_flow_steps=self.config.num_flow_steps if num_flow_steps is None else num_flow_steps,
            noise_level=self.config.noise_level if noise_level is None else noise_level,
            last_step=self.config.last_step if last_step is None else last_step,
        )

    def flow(self, mode: SampleMode = "sde") -> FlowSchedule:
        """Returns the schedule in float32 or better; mode "ode" is the same with noise level 0."""
        if mode not in ("sde", "ode"):
            raise ValueError(f"mode is {mode!r}, expected 'sde' (learning) or 'ode' (deployment)")
        c = self.config
        dtype = torch.promote_types(torch.float32, self.head.outputs.weight.dtype)
        level = c.noise_level if mode == "sde" else 0.0
        return schedule(c.num_flow_steps, level, last_step=c.last_step, device=self.device, dtype=dtype)

    def encode(self, obs: Observation) -> Tensor:
        """Returns the features (B, F) of a batch of observations.

        Args:
            obs: "image" uint8 (B, H, W, 3), "state" float (B, P), "instruction" sequence of B strings; numpy or torch.
                Where the learner has put an earlier result in "features", that is returned.

        Raises:
            ValueError: missing keys, wrong shapes or dtypes, NaN in the state, an instruction with unknown words.
        """
        if "features" in obs:
            return obs["features"]
        c = self.config
        missing = [key for key in ("image", "state", "instruction") if key not in obs]
        if missing:
            raise ValueError(
                f"observation has keys {sorted(obs)}, {missing} missing; a vector env gives 'instruction' in info"
            )
        image, state = torch.as_tensor(obs["image"]), torch.as_tensor(obs["state"])
        sizes = {"H": c.image_size, "W": c.image_size, "3": 3, "P": c.state_dim}
        check_shape("image", image, "B H W 3", sizes)
        check_shape("state", state, "B P", sizes)
        if image.dtype != torch.uint8:
            raise ValueError(f"image has dtype {image.dtype}, expected uint8 RGB in 0..255")
        if not state.isfinite().all():
            raise ValueError("state has NaN or infinite entries; leave padded slots out of the batch")
        dtype = self.head.outputs.weight.dtype
        pixels = image.to(self.device).permute(0, 3, 1, 2).to(dtype) / 127.5 - 1
        normalised = self.normalizer.normalize_state(state.to(self.device)).to(dtype)
        return self.trunk(pixels, normalised, self._word_ids(obs["instruction"], len(image)))

    def sample(self, obs: Observation, generator: Generators, mode: SampleMode = "sde") -> FlowSample:
        """Samples one chunk per observation, without gradient; see ``FlowSample`` for what comes back."""
        with torch.no_grad():
            flow = self.flow(mode)
            path, log_prob = self.head.sample(self.encode(obs), flow, generator)
            return FlowSample(self.normalizer.denormalize_actions(path[:, -1]), path, log_prob, flow.std)

    def step_mean(self, obs: Observation, path: Tensor) -> Tensor:
        """Returns the means (B, K, CH, D) of the SDE steps along a path (B, K+1, CH, D)."""
        return self.head.step_mean(self.encode(obs), path.to(self.device), self.flow())

    def log_prob(self, obs: Observation, path: Tensor) -> Tensor:
        """Returns log-probabilities (B, K, CH, D) of an SDE path (B, K+1, CH, D) under the current weights."""
        return self.head.log_prob(self.encode(obs), path.to(self.device), self.flow())

    def imitation_loss(
        self, obs: Observation, actions: Tensor, generator: Generators, *, mask: Tensor | None = None
    ) -> Tensor:
        """Returns the flow-matching loss of demonstrated chunks, a scalar.

        Args:
            obs: batch of observations.
            actions: (B, CH, D) native commands that followed.
            generator: of noise and flow times.
            mask: (B, CH) bool, False for commands after the end of the episode; None for all.
        """
        sizes = {"CH": self.chunk_length, "D": self.action_dim}
        check_shape("actions", actions, "B CH D", sizes)
        mask = torch.ones(actions.shape[:2], dtype=torch.bool) if mask is None else mask
        check_shape("mask", mask, "B CH", sizes)
        kept = mask.to(self.device)[..., None]
        chunk = torch.where(kept, self.normalizer.normalize_actions(actions.to(self.device)), 0.0)
        error = self.head.matching_error(self.encode(obs), chunk, generator)
        return torch.where(kept, error, 0.0).sum() / (kept.sum().clamp(min=1) * self.action_dim)

    def predict_action_chunk(self, obs: Observation, generator: Generators, mode: SampleMode = "ode") -> Tensor:
        """Returns commands (B, CH, D) float32 in native units, inside the action bounds."""
        return self.sample(obs, generator, mode).actions

    def select_action(self, obs: Observation, generator: Generators, mode: SampleMode = "ode") -> Tensor:
        """Returns the next command (B, D); the observation is read only when a new chunk is due.

        Raises:
            ValueError: the batch size changed in the middle of a chunk.
        """
        if not self._queue:
            self._queue.extend(self.predict_action_chunk(obs, generator, mode).unbind(dim=1))
        if len(self._queue[0]) != len(obs["image"]):
            raise ValueError(
                f"batch of {len(obs['image'])}, expected {len(self._queue[0])} until the chunk ends; call reset() first"
            )
        return self._queue.popleft()

    def reset(self) -> None:
        """Forgets the rest of the current chunk; call it when an episode begins."""
        self._queue.clear()

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Writes ``config.json`` and ``model.safetensors``; each file is replaced in one step.

        Args:
            folder: made if missing.
            dtype: of the stored weights (torch.float16 halves the file); None keeps them. Statistics stay float32.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for name, value in self.state_dict().items():
            kept = dtype is None or name.startswith("normalizer.")
            tensors[name] = value.detach().to("cpu", value.dtype if kept else dtype).contiguous()
        config = {"policy": type(self).__name__, **dataclasses.asdict(self.config)}
        _replace(folder / _WEIGHTS, safetensors.torch.save(tensors))
        _replace(folder / _CONFIG, (json.dumps(config, indent=2) + "\n").encode())

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> SmallFlowPolicy:
        """Loads a policy; weights are cast to ``dtype``, statistics stay float32.

        Args:
            folder: where save_pretrained wrote one, the name of a packaged policy ("tabletop-sft"), or a
                hub repository ``owner/name``.
            device: of the weights.
            dtype: of trunk and head.

        Raises:
            ValueError: no such policy or device, a missing or unreadable file, another kind of policy, unknown config
                keys, weights that do not fit.
        """
        device = require_device(device)
        try:
            folder = locate_weights(folder, ASSETS, _CONFIG)
        except ValueError as error:
            raise ValueError(f"no policy {error} Train one with `prophrl sft`") from error
        for name in (_CONFIG, _WEIGHTS):
            if not (folder / name).is_file():
                raise ValueError(f"no {name} in {folder}; expected a folder written by save_pretrained (or by prophrl)")
        try:
            values = json.loads((folder / _CONFIG).read_text())
            tensors = safetensors.torch.load_file(folder / _WEIGHTS)
        except (json.JSONDecodeError, UnicodeDecodeError, safetensors.SafetensorError) as error:
            raise ValueError(f"the policy in {folder} cannot be read ({error}); fetch or save it again") from error
        kind = values.pop("policy", None) if isinstance(values, dict) else None
        if kind != cls.__name__:
            raise ValueError(f"{folder} holds policy {kind!r}, expected {cls.__name__!r}; load it with its own class")
        config = SmallFlowPolicyConfig.from_dict(values)
        one, many = np.ones(config.action_dim), np.ones(config.state_dim)
        policy = cls(config, PolicyStatistics(one, one, -one, one, many, many))
        try:
            policy.load_state_dict({name: value.float() for name, value in tensors.items()})
        except RuntimeError as error:
            raise ValueError(f"the weights in {folder} do not fit its config: {error}") from error
        policy.normalizer.statistics()  # raises on statistics that no data can have
        policy.to(device)
        policy.trunk.to(dtype)
        policy.head.to(dtype)
        return policy

    def _word_ids(self, instructions: Any, batch: int) -> Tensor:
        if isinstance(instructions, str) or len(instructions) != batch:
            raise ValueError(f"instruction is {instructions!r}, expected a sequence of {batch} strings, one per image")
        rows: dict[str, list[int]] = {}
        for instruction in set(instructions):
            rows[instruction], problem = encode_instruction(instruction, self.config.vocabulary, self.config.max_words)
            if problem:
                raise ValueError(f"{problem}; rephrase it, or train a policy on data with these words")
        return torch.tensor([rows[instruction] for instruction in instructions], device=self.device)


def _replace(path: Path, content: bytes) -> None:
    """Writes next to the file, then renames: a reader sees the old file or the new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_bytes(content)
    partial.replace(path)
