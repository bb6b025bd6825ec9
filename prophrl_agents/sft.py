"""Supervised fine-tuning (``prophrl sft``): flow-matching imitation of recorded episodes, the start of reinforcement.

Data flow: episode folders -> ``demonstrations.py`` -> batches -> ``SmallFlowPolicy.imitation_loss`` -> RUN/policy, a
folder with the weights, the statistics and ``training.json``. On the way the policy is tried in the simulator on fixed
starts. Step i draws its batch, its augmentation and its noise from (seed, i), so a resumed run ends with the same bits
on the CPU.

Departures from the paper (4.1.3: AdamW, batch 64, learning rate 2.5e-5, weight decay 0.1, 200k steps; a VLA that was
pretrained): preset ``SFT_PAPER`` keeps these numbers, ``SFT_TABLETOP`` trains a small policy from nothing and takes a
larger rate. What is saved is the moving average of the weights.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from gymnasium.vector import VectorEnv
from torch import Tensor

from prophet_gym.atomic import atomic_folder, require_replaceable
from prophet_gym.data.folder import EpisodeFolder
from prophet_gym.strict_json import to_json
from prophet_gym.training.loop import load_checkpoint, prepare_run, settled, train_loop
from prophet_gym.words import encode_instruction, split_words
from prophrl_agents.augment import augment_images
from prophrl_agents.batch import Start
from prophrl_agents.config import WorldConfig
from prophrl_agents.demonstrations import Demonstrations, read_demonstrations
from prophrl_agents.environments import make_environment
from prophrl_agents.evaluate import SELECTION_SET, evaluate_policy, evaluate_starts
from prophrl_agents.policies.small import SmallFlowPolicy, SmallFlowPolicyConfig
from prophrl_agents.rollout import check_compatible
from prophrl_agents.sft_config import SFT_PAPER, SFT_SMOKE, SFT_TABLETOP, PolicySize, SFTConfig

__all__ = ["SFT_PAPER", "SFT_SMOKE", "SFT_TABLETOP", "PolicySize", "SFTConfig", "run_sft", "train_sft"]

RECORD_FILE = "training.json"
POLICY_FILES = ("config.json", "model.safetensors", RECORD_FILE)
_VALIDATION_FRAMES = 1024


def train_sft(config: SFTConfig) -> SmallFlowPolicy:
    """Trains a policy on recorded episodes and saves it, with a record of how, to RUN/policy.

    Args:
        config: the run.

    Returns:
        The saved policy, on the CPU.

    Raises:
        ValueError: no or unfit episodes (see ``read_demonstrations``), a folder that holds a run (without ``resume``)
            or something else, or a damaged checkpoint.
        FloatingPointError: the loss is not finite; the last checkpoint stays.
    """
    if not isinstance(config.data, tuple | list) or not config.data:
        raise ValueError(f"data={config.data!r}; expected a tuple with one or more folders of episodes")
    run = Path(config.run)
    require_replaceable(run / "policy", True, POLICY_FILES)
    config = replace(config, loop=settled(config.loop))
    prepare_run(run, {key: value for key, value in asdict(config).items() if key != "resume"}, config.resume)
    folders = [EpisodeFolder(folder, camera_name=config.camera_name) for folder in config.data]
    demonstrations = read_demonstrations(
        chain.from_iterable(folders),
        only_success=config.only_success,
        behaviours=config.behaviours,
        max_episodes=config.max_episodes,
        progress=True,
    )
    frames, held_out = demonstrations.split(config.held_out, config.loop.seed)
    calls = frames[demonstrations.steps[frames] % config.policy.chunk_length == 0]
    policy = _fresh_policy(config, demonstrations, frames)
    accelerator = Accelerator(mixed_precision=config.loop.mixed_precision, log_with="tensorboard", project_dir=run)
    accelerator.init_trackers("tensorboard")

    def loss_fn(wrapped: Any, step: int) -> tuple[Tensor, dict[str, float]]:
        generator = torch.Generator().manual_seed(config.loop.seed * 1_000_003 + step)
        seen, chunks, mask = demonstrations.batch(draw_frames(frames, calls, config, step), policy.chunk_length)
        images = seen["image"].to(accelerator.device)
        images = augment_images(images, generator, shift=config.shift, jitter=config.jitter)
        return wrapped.imitation_loss({**seen, "image": images}, chunks, generator, mask=mask), {}

    env = _simulators(config, policy.config.image_size) if config.eval_episodes else None
    starts = evaluate_starts(config.eval_episodes, SELECTION_SET) if config.eval_episodes else []

    def evaluate(model: Any, step: int) -> dict[str, float]:
        metrics: dict[str, float] = {}
        if len(held_out):
            metrics["validation_loss"] = validation_loss(model, demonstrations, held_out, config)
        if env is not None:
            result = evaluate_policy(model, env, starts)
            low, high = result.interval
            metrics.update(success_rate=result.success_rate, success_low=low, success_high=high)
        return metrics

    try:
        if env is not None:
            _check_simulators(env, policy, starts)
        policy = train_loop(
            policy, loss_fn, config.loop, run, accelerator=accelerator, resume=config.resume, evaluate=evaluate
        )
    finally:
        accelerator.end_training()
        if env is not None:
            env.close()
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])  # the evaluation at the end
    metrics = {name: value for name, value in last.items() if name != "step"}
    seconds = load_checkpoint(run / "checkpoints" / "last.pt").get("seconds", 0.0)
    record = _record(config, demonstrations, policy, metrics, seconds)
    with atomic_folder(run / "policy", overwrite=True, contents=POLICY_FILES) as folder:
        policy.save_pretrained(folder)
        (folder / RECORD_FILE).write_text(to_json(record))
    return SmallFlowPolicy.from_pretrained(run / "policy")


def draw_frames(frames: np.ndarray, calls: np.ndarray, config: SFTConfig, step: int) -> np.ndarray:
    """Returns the frame indices (B,) of one optimiser step, with replacement.

    Args:
        frames: (F,) indices to draw from.
        calls: those of them at which a policy is called.
        config: share of ``calls``, batch size and seed.
        step: which step; it and the seed decide the draw.
    """
    rng = np.random.default_rng([config.loop.seed, step])
    anywhere, called = (rng.choice(part, config.loop.batch_size) for part in (frames, calls))
    return np.where(rng.random(config.loop.batch_size) < config.at_calls, called, anywhere)


@torch.no_grad()
def validation_loss(
    policy: SmallFlowPolicy, demonstrations: Demonstrations, held_out: np.ndarray, config: SFTConfig
) -> float:
    """Returns the imitation loss on up to 1024 held-out frames, evenly spread, with the same noise at every call."""
    generator = torch.Generator().manual_seed(config.loop.seed)
    count = min(len(held_out), _VALIDATION_FRAMES)
    picked = held_out[np.linspace(0, len(held_out) - 1, count).round().astype(int)]
    total, weight = 0.0, 0
    for start in range(0, count, config.loop.batch_size):
        part = picked[start : start + config.loop.batch_size]
        seen, chunks, mask = demonstrations.batch(part, policy.chunk_length)
        commands = int(mask.sum())
        total += commands * policy.imitation_loss(seen, chunks, generator, mask=mask).item()
        weight += commands
    return total / weight


def run_sft(config: SFTConfig) -> str:
    """Trains, and returns what a person wants to know: where the policy is, and its last numbers."""
    train_sft(config)
    folder = Path(config.run) / "policy"
    record = json.loads((folder / RECORD_FILE).read_text())
    data, metrics = record["data"], record["metrics"]
    lines = [
        f"policy: {folder}",
        f"{record['parameters'] / 1e6:.2f}M parameters, {data['episodes'] - data['held_out']} episodes, "
        f"{record['config']['loop']['steps']} steps, {record['seconds']:.0f} s",
    ]
    if "validation_loss" in metrics:
        lines.append(f"validation loss {metrics['validation_loss']:.3f} on {data['held_out']} held-out episodes")
    if "success_rate" in metrics:
        values = [metrics[f"success_{key}"] for key in ("rate", "low", "high")]
        rate, low, high = (math.nan if value is None else 100 * value for value in values)  # null: the judge abstained
        lines.append(
            f"success in {config.env} {rate:.1f} % (95 % interval {low:.1f} to {high:.1f}, n = {config.eval_episodes})"
        )
    return "\n".join(lines)


def _fresh_policy(config: SFTConfig, demonstrations: Demonstrations, frames: np.ndarray) -> SmallFlowPolicy:
    """A policy that knows the words of the recordings and the statistics of the frames it is trained on."""
    height, width = demonstrations.images.shape[1:3]
    if height != width:
        raise ValueError(f"images are {width}x{height} pixels; expected squares: crop or resize the episodes")
    longest = max(len(split_words(instruction)) for instruction in demonstrations.instructions)
    policy_config = SmallFlowPolicyConfig(
        vocabulary=demonstrations.vocabulary,
        max_words=max(longest, SmallFlowPolicyConfig.max_words),
        image_size=height,
        state_dim=demonstrations.states.shape[1],
        action_dim=demonstrations.actions.shape[1],
        **asdict(config.policy),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.loop.seed)
        return SmallFlowPolicy(policy_config, demonstrations.statistics(frames))


def _simulators(config: SFTConfig, image_size: int) -> VectorEnv:
    world = WorldConfig(num_envs=min(config.num_envs, config.eval_episodes))
    return make_environment(config.env, world, chunk_length=config.policy.chunk_length, image_size=image_size)


def _check_simulators(env: Any, policy: SmallFlowPolicy, starts: Sequence[Start]) -> None:
    """Requires now, not after the first thousand steps, that the policy can be tried there."""
    check_compatible(env, policy)
    for first in range(0, len(starts), env.num_envs):
        seeds = [start.seed for start in starts[first : first + env.num_envs]]
        seeds += seeds[-1:] * (env.num_envs - len(seeds))
        for instruction in env.reset(seed=seeds)[1].get("instruction", [""]):
            words, problem = encode_instruction(instruction, policy.config.vocabulary, policy.config.max_words)
            if not words:
                raise ValueError(
                    f"the simulator asks for what no episode is about: {problem}; record more, or set eval_episodes=0"
                )


def _record(
    config: SFTConfig,
    demonstrations: Demonstrations,
    policy: SmallFlowPolicy,
    metrics: dict[str, float],
    seconds: float,
) -> dict[str, Any]:
    """What is worth knowing of a policy that was found without its run; folder names, not paths: the file travels."""
    names = {"data": [Path(folder).name for folder in config.data], "run": Path(config.run).name}
    return {
        "command": "prophrl sft",
        "config": {**asdict(config), **names},
        "seed": config.loop.seed,
        "data": {
            "episodes": demonstrations.num_episodes,
            "held_out": config.held_out,
            "frames": len(demonstrations),
            "behaviours": dict(Counter(demonstrations.behaviours)),
            "instructions": sorted(set(demonstrations.instructions)),
        },
        "parameters": sum(parameter.numel() for parameter in policy.parameters()),
        "metrics": metrics,
        "seconds": round(seconds, 1),
    }
