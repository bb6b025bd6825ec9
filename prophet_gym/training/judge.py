"""Trains the classifier judge on simulator labels, over real and imagined frames of the same actions (paper 3.4.1).

Every frame of an episode carries the simulator's success at that moment, so a batch mixes whole rollouts with
prefixes of them, half successes and half failures, half real and half imagined. Among failing prefixes many end within
a few frames of the success that follows: a block held over the plate is not yet a block on the plate. The judge is
selected by AUC on whole rollouts of episodes that were not trained on, and its threshold is chosen there, after
rounding the weights to the half precision they are stored in.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from prophet_gym.atomic import atomic_text
from prophet_gym.data.folder import EpisodeFolder
from prophet_gym.data.variants import VARIANT_OF
from prophet_gym.judges.calibration import auc, evaluate_judge
from prophet_gym.judges.classifier import CONFIG_FILE, ClassifierConfig, ClassifierJudge, to_network
from prophet_gym.judges.network import frame_indices
from prophet_gym.judges.operating_point import pick_threshold
from prophet_gym.judges.rollouts import LabelledRollout, labelled_rollouts
from prophet_gym.strict_json import to_json
from prophet_gym.training.augment import augment
from prophet_gym.training.imagine import imagine
from prophet_gym.words import build_vocabulary, encode_instruction, split_words

if TYPE_CHECKING:
    from prophet_gym.data.episode import Episode
    from prophet_gym.world_model.state import WorldModel

__all__ = ["JudgeTrainingConfig", "fit_judge", "imagine", "read_rollouts", "train_judge"]

METRICS_FILE = "judge_metrics.json"
NEAR_SUCCESS_FRAMES = 6


@dataclass(frozen=True)
class JudgeTrainingConfig:
    """How a judge is trained.

    Attributes:
        data: folders of training episodes with success labels.
        output: folder for the judge and its metrics.
        val: folder of validation episodes; empty: ``val_fraction`` of the training episodes is held out.
        val_fraction: share of episodes held out when ``val`` is empty.
        max_episodes: training episodes read at most; each takes about 1 MB of memory (0: all).
        steps: optimisation steps.
        batch_size: rollouts per step.
        learning_rate: peak, reached after 5 % of the steps, then cosine to zero.
        weight_decay: of AdamW.
        ema_decay: of the weight average that is evaluated and kept.
        width: channels of the network.
        late_frames: frames the judge sees beside the first, counted back from the last.
        prefix_fraction: share of samples that are prefixes of rollouts, labelled at their last frame.
        beta: weight of recall against precision when choosing the threshold (F-beta).
        chunk_length: commands per prediction when imagining (0: the world model's maximum).
        eval_every: steps between validations.
        patience: validations without improvement before stopping early.
        seed: of weights, sampling, augmentation and imagination.
        device: where the network trains.
        overwrite: replace a judge that is already in ``output``.
    """

    data: tuple[str, ...]
    output: str
    val: str = ""
    val_fraction: float = 0.15
    max_episodes: int = 0
    steps: int = 1500
    batch_size: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2
    ema_decay: float = 0.99
    width: int = 32
    late_frames: tuple[int, ...] = (0, 2, 5)
    prefix_fraction: float = 0.5
    beta: float = 1.5
    chunk_length: int = 0
    eval_every: int = 150
    patience: int = 5
    seed: int = 0
    device: str = "cpu"
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "eval_every", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("val_fraction", "prefix_fraction", "ema_decay"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}.")
        if isinstance(self.data, str) or not self.data:
            raise ValueError(f"data must be a non-empty tuple of folders, got {self.data!r}.")


def train_judge(
    config: JudgeTrainingConfig, world_model: WorldModel | None = None
) -> tuple[ClassifierJudge, dict[str, Any]]:
    """Reads episodes, imagines them, trains, and writes the judge and ``judge_metrics.json`` to ``config.output``.

    Args:
        config: data, output and hyper-parameters.
        world_model: imagines the second half of the data; without one the judge knows real frames only.

    Returns:
        The judge and its metrics.

    Raises:
        ValueError: if ``output`` holds a judge already, or the episodes cannot be learned from.
    """
    output = Path(config.output)
    if (output / CONFIG_FILE).exists() and not config.overwrite:
        raise ValueError(f"{output} already holds a judge. Choose another output, or set overwrite.")
    train, val = read_rollouts(config, world_model)
    judge, metrics = fit_judge(train, val, config)
    judge.save_pretrained(output)
    atomic_text(output / METRICS_FILE, to_json(metrics))
    return judge, metrics


class RolloutSource(Protocol):
    """What :func:`read_rollouts` asks of a configuration; see :class:`JudgeTrainingConfig`."""

    @property
    def data(self) -> tuple[str, ...]: ...
    @property
    def val(self) -> str: ...
    @property
    def val_fraction(self) -> float: ...
    @property
    def max_episodes(self) -> int: ...
    @property
    def chunk_length(self) -> int: ...
    @property
    def seed(self) -> int: ...


def read_rollouts(
    config: RolloutSource, world_model: WorldModel | None
) -> tuple[list[LabelledRollout], list[LabelledRollout]]:
    """Reads episodes, splits them, and imagines each with its own actions where there is a world model (paper 3.4.1).

    Variants of one recording (`prophet convert --variants`) stay together, as they show the same.

    Returns:
        Rollouts to learn from and rollouts of other episodes to select by.

    Raises:
        ValueError: episodes or variants of one recording in both sets, or no success labels.
    """
    episodes = [episode for folder in config.data for episode in _named_episodes(folder)]
    if config.max_episodes:
        order = np.random.default_rng(config.seed).permutation(len(episodes))[: config.max_episodes]
        episodes = [episodes[index] for index in sorted(order)]
    if config.val:
        held_out = _named_episodes(config.val)
    else:
        recordings = list(dict.fromkeys(_recording(episode) for episode in episodes))
        order = np.random.default_rng(config.seed).permutation(len(recordings))
        chosen = {recordings[index] for index in order[: round(config.val_fraction * len(recordings))]}
        held_out = [episode for episode in episodes if _recording(episode) in chosen]
        episodes = [episode for episode in episodes if _recording(episode) not in chosen]
    check_disjoint(episodes, held_out)
    train, val = labelled_rollouts(episodes), labelled_rollouts(held_out)
    if world_model is not None:
        for rollouts, subset, offset in ((train, episodes, 0), (val, held_out, 1_000_000)):
            frames = imagine(
                world_model,
                subset,
                chunk_length=config.chunk_length or None,
                seed=config.seed + offset,
                progress=True,
            )
            rollouts += labelled_rollouts(subset, frames)
    return train, val


def fit_judge(
    train: Sequence[LabelledRollout], val: Sequence[LabelledRollout], config: JudgeTrainingConfig
) -> tuple[ClassifierJudge, dict[str, Any]]:
    """Trains a judge on rollouts in memory.

    Args:
        train: rollouts to learn from, real and imagined.
        val: rollouts of other episodes: selection, early stop and threshold.
        config: hyper-parameters; folders are not touched.

    Returns:
        The judge with its threshold, and metrics: config, history, validation calibration, seconds.

    Raises:
        ValueError: if either set lacks successes or failures, if episodes are in both, or if frames differ in size.
    """
    check_disjoint(train, val)
    sizes = {rollout.frames.shape[1:3] for rollout in (*train, *val)}
    if len(sizes) != 1:
        raise ValueError(f"All rollouts must have frames of one size, got (H, W) in {sorted(sizes)}.")
    started = time.perf_counter()
    sampler = _BalancedSampler(train, config)
    labels = np.array([rollout.label for rollout in val])
    if labels.all() or not labels.any():
        raise ValueError(f"Validation needs successes and failures, got {labels.sum()} of {len(labels)} successful.")
    instructions = [rollout.instruction for rollout in (*train, *val)]
    lengths = [len(split_words(instruction)) for instruction in instructions]
    if not min(lengths):
        raise ValueError(
            f"Instruction {instructions[lengths.index(0)]!r} has no words. This judge reads words of letters a to z "
            "and digits; write instructions with them."
        )
    max_words = max(ClassifierConfig.max_words, *lengths)
    judge = ClassifierJudge(
        ClassifierConfig(
            build_vocabulary(instructions), sizes.pop(), config.late_frames, max_words=max_words, width=config.width
        ),
        device=config.device,
        seed=config.seed,
    )
    history = _optimise(judge, sampler, val, labels, config)
    judge.network.load_state_dict({name: v.half().float() for name, v in judge.network.state_dict().items()})
    threshold = pick_threshold(_scores(judge, val), labels, beta=config.beta)
    summary = {
        "episodes": len({rollout.name for rollout in train}),
        "rollouts": {source: sum(r.source == source for r in train) for source in sorted({r.source for r in train})},
        "val_rollouts": len(val),
        "val_auc": auc(_scores(judge, val), labels),
        "seed": config.seed,
        "steps": history[-1]["step"],
    }
    judge.config = dataclasses.replace(judge.config, threshold=threshold, trained_on=summary)
    metrics = {
        # Folder names, not paths: the file travels with the judge.
        "config": {
            **{k: Path(v).name if k == "checkpoint" else v for k, v in dataclasses.asdict(config).items()},
            "data": [Path(folder).name for folder in config.data],
            "val": Path(config.val).name,
            "output": Path(config.output).name,
        },
        "history": history,
        "threshold": threshold,
        "validation": evaluate_judge(judge, val, seed=config.seed),
        "seconds": round(time.perf_counter() - started, 1),
    }
    return judge, metrics


def _named_episodes(folder: str) -> list[Episode]:
    """Episodes of a folder under names that no other folder has, so that the split by recording can be checked."""
    place = Path(folder).resolve()
    named = []
    for episode in EpisodeFolder(folder):
        origin = {key: f"{place}/{of}" for key, of in episode.metadata.items() if key == VARIANT_OF}
        metadata = {**episode.metadata, **origin}
        named.append(dataclasses.replace(episode, name=f"{place}/{episode.name}", metadata=metadata))
    return named


def _recording(each: Episode | LabelledRollout) -> str:
    """Name of what was recorded: an episode's own, or that of the episode it is a variant of."""
    return each.name if isinstance(each, LabelledRollout) else str(each.metadata.get(VARIANT_OF, each.name))


def check_disjoint(train: Sequence[Episode | LabelledRollout], val: Sequence[Episode | LabelledRollout]) -> None:
    """Raises ValueError if an episode, or a variant of the same recording, is in both sets."""
    shared = {_recording(each) for each in train} & {_recording(each) for each in val}
    if shared:
        raise ValueError(
            f"{len(shared)} episodes are in both training and validation, e.g. {min(shared)!r}: the same, or variants "
            "of one recording. Give other episodes for validation."
        )


def _optimise(
    judge: ClassifierJudge,
    sampler: _BalancedSampler,
    val: Sequence[LabelledRollout],
    labels: np.ndarray,
    config: JudgeTrainingConfig,
) -> list[dict[str, float]]:
    """Trains ``judge.network`` in place to its best validated weight average; returns the history."""
    ema = judge.network
    network = copy.deepcopy(ema).train()
    optimizer = torch.optim.AdamW(network.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=config.steps, pct_start=0.05, cycle_momentum=False
    )
    rng = np.random.default_rng(config.seed)
    best, best_state, waited = (-1.0, 0.0), None, 0
    history: list[dict[str, float]] = []
    losses: list[float] = []
    for step in tqdm(range(1, config.steps + 1), desc="judge", disable=None):
        stacks, words, targets = sampler.batch(rng, judge)
        logits = network(to_network(stacks, judge.device), words)
        loss = F.binary_cross_entropy_with_logits(logits, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        decay = min(config.ema_decay, step / (step + 10))
        with torch.no_grad():
            for average, value in zip(ema.parameters(), network.parameters(), strict=True):
                average.lerp_(value, 1 - decay)
        if step % config.eval_every and step != config.steps:
            continue
        scores = _scores(judge, val)
        log_loss = float(-np.log(np.clip(np.where(labels, scores, 1 - scores), 1e-6, 1)).mean())
        row = {"step": step, "loss": float(np.mean(losses)), "val_loss": log_loss, "val_auc": auc(scores, labels)}
        history.append(row)
        losses.clear()
        waited += 1
        if (row["val_auc"], -log_loss) > best:  # a saturated AUC leaves the choice to the log-loss
            best, best_state, waited = (row["val_auc"], -log_loss), copy.deepcopy(ema.state_dict()), 0
        if waited >= config.patience:
            break
    ema.load_state_dict(best_state)
    return history


def _scores(judge: ClassifierJudge, rollouts: Sequence[LabelledRollout]) -> np.ndarray:
    verdicts = judge.judge_batch([r.frames for r in rollouts], [r.instruction for r in rollouts])
    return np.array([verdict.score for verdict in verdicts])


class _BalancedSampler:
    """Draws (rollout, last frame) so that labels and sources are equally frequent over the run."""

    def __init__(self, rollouts: Sequence[LabelledRollout], config: JudgeTrainingConfig) -> None:
        self.rollouts, self.config, self.drawn = rollouts, config, 0
        self.sources = sorted({rollout.source for rollout in rollouts})
        self.whole: dict[tuple[str, bool], list[int]] = {}
        self.prefixes: dict[tuple[str, bool], list[int]] = {}
        for source in self.sources:
            members = [index for index, rollout in enumerate(rollouts) if rollout.source == source]
            for label in (False, True):
                self.whole[source, label] = [i for i in members if rollouts[i].label == label]
                self.prefixes[source, label] = [i for i in members if (rollouts[i].success[1:] == label).any()]
            if not self.whole[source, False] or not self.whole[source, True]:
                raise ValueError(
                    f"Training needs successes and failures among {source} rollouts, got "
                    f"{len(self.whole[source, True])} successes and {len(self.whole[source, False])} failures."
                )

    def batch(self, rng: np.random.Generator, judge: ClassifierJudge) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
        """Returns stacks (B, F, H, W, 3) uint8, augmented, word ids (B, max_words) and targets (B,) float."""
        stacks, words, targets = [], [], []
        first, self.drawn = self.drawn, self.drawn + self.config.batch_size
        for index in range(first, self.drawn):  # over the run: a batch may be no multiple of labels times sources
            label = bool(index % 2)
            rollout, last = self._draw(rng, self.sources[index // 2 % len(self.sources)], label)
            picked = rollout.frames[frame_indices(last + 1, judge.config.late_frames)]
            stacks.append(augment(picked, rng))
            words.append(encode_instruction(rollout.instruction, judge.config.vocabulary, judge.config.max_words)[0])
            targets.append(float(label))
        device = judge.device
        return np.stack(stacks), torch.tensor(words, device=device), torch.tensor(targets, device=device)

    def _draw(self, rng: np.random.Generator, source: str, label: bool) -> tuple[LabelledRollout, int]:
        if rng.random() >= self.config.prefix_fraction:
            rollout = self.rollouts[rng.choice(self.whole[source, label])]
            return rollout, len(rollout.frames) - 1
        rollout = self.rollouts[rng.choice(self.prefixes[source, label])]
        candidates = 1 + np.flatnonzero(rollout.success[1:] == label)
        if not label and rollout.success.any() and rng.random() < 0.5:
            first = int(np.argmax(rollout.success))
            near = candidates[(candidates >= first - NEAR_SUCCESS_FRAMES) & (candidates < first)]
            candidates = near if len(near) else candidates
        return rollout, int(rng.choice(candidates))
