"""Fine-tunes a vision-language model as a judge, with LoRA on its language half (paper 3.4.1).

Labelled rollouts, real and imagined with identical actions, are asked about as :class:`VLMJudge` asks, and the model
learns to answer with the right box; the encoder of the pictures stays as it is. The adapter with the best AUC of
P(Success) on held-out episodes is kept, and its threshold chosen there. What is written is an adapter (safetensors) and
the JSON file of a judge that :func:`prophet_gym.judges.open_judge` takes.

Departures from the paper, which gives no recipe: low-rank adapters; the box without reasoning before it, so that one
short greedy answer and its log-probability replace five votes; no estimated completion step; labels and sources are
drawn equally often.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from prophet_gym.atomic import atomic_folder, atomic_text, require_replaceable
from prophet_gym.judges.base import Verdict
from prophet_gym.judges.calibration import auc, evaluate_verdicts
from prophet_gym.judges.operating_point import pick_threshold
from prophet_gym.judges.prompting import load_prompt
from prophet_gym.judges.rollouts import LabelledRollout
from prophet_gym.judges.vlm import VLMConfig
from prophet_gym.strict_json import to_json
from prophet_gym.training.adapter_checkpoint import load_checkpoint, save_checkpoint, trainable
from prophet_gym.training.judge import METRICS_FILE, check_disjoint, read_rollouts
from prophet_gym.training.vlm_examples import BalancedOrder, answer_loss, success_probabilities

if TYPE_CHECKING:
    from prophet_gym.world_model.state import WorldModel

__all__ = ["VLMTrainingConfig", "add_lora", "fit_vlm_judge", "save_vlm_judge", "train_vlm_judge"]

LORA_TARGETS = r".*language_model\..*\.(q|k|v|o|gate|up|down)_proj"
"""Attention and MLP projections of the language model; the encoder of pictures has projections of the same names."""
JUDGE_FILE, PROMPT_FILE, ADAPTER = "judge.json", "prompt.txt", "adapter"
ADAPTER_FILES = ("adapter_config.json", "adapter_model*", "README.md")
LONGEST_ANSWER = 16
"""Tokens of a box, with room to spare."""


@dataclass(frozen=True)
class VLMTrainingConfig:
    """How a vision-language model is fine-tuned as a judge.

    Attributes:
        data: folders of training episodes with success labels.
        output: folder for the adapter, the judge's JSON file, checkpoints and metrics.
        model: the vision-language model, a hub id or a folder.
        val: folder of validation episodes; empty: `val_fraction` of the training episodes is held out.
        val_fraction: share of episodes held out when `val` is empty.
        max_episodes: training episodes read at most (0: all).
        chunk_length: commands per prediction when imagining (0: the world model's maximum).
        prompt: name of a prompt or a .txt file; "auto" takes the one made for the instruction.
        num_frames: frames shown of each rollout; the paper shows 50 of LIBERO's.
        image_size: side of the pictures in pixels.
        rank: of the adapters.
        alpha: their scale, in units of `rank`.
        steps: optimisation steps.
        batch_size: rollouts per step, one after the other.
        learning_rate: peak, reached after 5 % of the steps, then cosine to zero.
        weight_decay: of AdamW.
        precision: "bf16": weights and arithmetic; "no": float32.
        gradient_checkpointing: compute activations twice instead of keeping them.
        beta: weight of recall against precision when choosing the threshold (F-beta).
        eval_every: steps between validations.
        save_every: steps between checkpoints.
        seed: of adapters, order and imagination.
        resume: continue an interrupted run, to the same end.
        overwrite: replace a judge that is already in `output`.
    """

    data: tuple[str, ...]
    output: str
    model: str = "Qwen/Qwen2.5-VL-7B-Instruct"
    val: str = ""
    val_fraction: float = 0.15
    max_episodes: int = 0
    chunk_length: int = 0
    prompt: str = "auto"
    num_frames: int = 20
    image_size: int = 224
    rank: int = 16
    alpha: float = 32.0
    steps: int = 500
    batch_size: int = 16
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    precision: Literal["bf16", "no"] = "bf16"
    gradient_checkpointing: bool = True
    beta: float = 1.5
    eval_every: int = 100
    save_every: int = 25
    seed: int = 0
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name in ("rank", "steps", "batch_size", "eval_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 0.0 <= self.val_fraction < 1.0:
            raise ValueError(f"val_fraction must be in [0, 1), got {self.val_fraction}.")
        if self.precision not in ("bf16", "no"):
            raise ValueError(f'precision={self.precision!r}: expected "bf16" or "no".')
        if isinstance(self.data, str) or not self.data:
            raise ValueError(f"data must be a non-empty tuple of folders, got {self.data!r}.")
        self.judge()  # checks the fields that say how a rollout is shown

    def judge(self, threshold: float = 0.5) -> VLMConfig:
        """How the trained judge shows, asks and decides."""
        return VLMConfig(
            prompt=self.prompt,
            num_frames=self.num_frames,
            image_size=self.image_size,
            method="logprobs",
            max_tokens=LONGEST_ANSWER,
            threshold=threshold,
        )

    def learning_rate_at(self, step: int) -> float:
        """Linear over the first 5 % of the steps, then half a cosine to zero."""
        warm = max(1, round(0.05 * self.steps))
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))


def train_vlm_judge(config: VLMTrainingConfig, world_model: WorldModel | None = None) -> dict[str, Any]:
    """Reads episodes, imagines them, fine-tunes, and writes the judge to ``config.output``.

    Args:
        config: data, model, output and hyper-parameters.
        world_model: imagines the second half of the data; without one the judge knows real frames only.

    Returns:
        The metrics, also in ``judge_metrics.json``.

    Raises:
        ValueError: ``output`` holds a judge or a run already, there is nothing to resume, no such model, or the
            episodes cannot be learned from.
        MissingExtraError: the model's processor needs a package that is not installed.
    """
    output = Path(config.output)
    checkpoint = _checkpoint(output)
    if not config.overwrite and not config.resume and ((output / JUDGE_FILE).exists() or checkpoint.exists()):
        raise ValueError(f"{output} already holds a judge or a run. Choose another output, or set resume or overwrite.")
    if config.resume and not checkpoint.exists():
        raise ValueError(f"{output}: nothing to resume; leave resume out.")
    require_replaceable(output / ADAPTER, True, ADAPTER_FILES)
    from prophet_gym.judges.in_process import load_model

    network, processor = load_model(config.model, "bfloat16" if config.precision == "bf16" else "float32")
    train, val = read_rollouts(config, world_model)
    adapted, decision, metrics = fit_vlm_judge(network, processor, train, val, config)
    save_vlm_judge(adapted, decision, config)
    atomic_text(output / METRICS_FILE, to_json(metrics))
    return metrics


def fit_vlm_judge(
    model: Any,
    processor: Any,
    train: Sequence[LabelledRollout],
    val: Sequence[LabelledRollout],
    config: VLMTrainingConfig,
) -> tuple[Any, VLMConfig, dict[str, Any]]:
    """Fine-tunes a model on rollouts in memory; only checkpoints are written, to ``config.output``.

    Args:
        model: an image-text-to-text model of transformers, changed in place: it gets the adapters.
        processor: of that model.
        train: rollouts to learn from, real and imagined.
        val: rollouts of other episodes: selection and threshold.
        config: hyper-parameters.

    Returns:
        The adapted model (peft) with the best weights, how to judge with it, and metrics: config, history, threshold,
        validation at the threshold, seconds.

    Raises:
        ValueError: a set lacks successes or failures, episodes are in both, the model has no language half to adapt,
            more than one process, or a checkpoint of other settings.
        FloatingPointError: loss or gradient are not finite; the last checkpoint stays usable.
    """
    from accelerate import Accelerator

    started = time.perf_counter()
    check_disjoint(train, val)
    order = BalancedOrder(train, config.seed)
    labels = np.array([rollout.label for rollout in val])
    if labels.all() or not labels.any():
        raise ValueError(f"Validation needs successes and failures, got {labels.sum()} of {len(labels)} successful.")
    accelerator = Accelerator(mixed_precision=config.precision)
    if accelerator.num_processes > 1:
        raise ValueError(f"{accelerator.num_processes} processes; this loop trains on one device, start it alone.")
    adapted = add_lora(model, config).to(accelerator.device)
    history = _optimise(adapted, processor, order, val, labels, config, accelerator)
    with accelerator.autocast():
        scores = success_probabilities(adapted, processor, val, config.judge())
    # A threshold at the end of the scale would leave one of the two words no room.
    decision = config.judge(float(np.clip(pick_threshold(scores, labels, beta=config.beta), 1e-3, 1 - 1e-3)))
    verdicts = [Verdict(score >= decision.threshold, score) for score in scores.tolist()]
    metrics = {
        # Folder names, not paths: the file travels with the judge.
        "config": {
            **{k: Path(v).name if k == "checkpoint" else v for k, v in dataclasses.asdict(config).items()},
            "data": [Path(folder).name for folder in config.data],
            "prompt": Path(config.prompt).name,
            "val": Path(config.val).name,
            "output": Path(config.output).name,
        },
        "trained": sum(parameter.numel() for parameter in trainable(adapted).values()),
        "history": history,
        "threshold": decision.threshold,
        "validation": evaluate_verdicts(verdicts, val, seed=config.seed),
        "seconds": round(time.perf_counter() - started, 1),
    }
    return adapted, decision, metrics


def add_lora(model: Any, config: VLMTrainingConfig) -> Any:
    """Freezes a model and puts adapters that change nothing yet into its language half; returns it as a peft model.

    Raises:
        ValueError: it has no such layers.
    """
    from peft import LoraConfig, get_peft_model

    if not any(re.fullmatch(LORA_TARGETS, name) for name, _ in model.named_modules()):
        raise ValueError(
            f"{type(model).__name__} has no layers of the form {LORA_TARGETS}; expected a vision-language model whose "
            "language half is called language_model, such as Qwen2.5-VL."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        adapted = get_peft_model(model, LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=LORA_TARGETS))
    if config.gradient_checkpointing:
        newer = hasattr(model, "activation_checkpointing_enable")  # transformers renamed it in version 5
        enable = model.activation_checkpointing_enable if newer else model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return adapted


def save_vlm_judge(adapted: Any, decision: VLMConfig, config: VLMTrainingConfig) -> Path:
    """Writes the adapter and, when it is whole, the JSON file that :func:`prophet_gym.judges.open_judge` takes.

    Returns:
        The JSON file.
    """
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    with atomic_folder(output / ADAPTER, overwrite=True, contents=ADAPTER_FILES) as folder:
        adapted.save_pretrained(folder, save_embedding_layers=False)
    backend = {
        "kind": "transformers",
        "model": config.model,
        "adapter": ADAPTER,
        "device": next(adapted.parameters()).device.type,
        "dtype": "bfloat16" if config.precision == "bf16" else "float32",
    }
    plain = VLMConfig()
    chosen = {name: value for name, value in vars(decision).items() if value != getattr(plain, name)}
    if decision.prompt.endswith(".txt"):  # travels with the judge
        atomic_text(output / PROMPT_FILE, load_prompt(decision.prompt))
        chosen["prompt"] = PROMPT_FILE
    atomic_text(output / JUDGE_FILE, to_json({"backend": backend, **chosen}))
    return output / JUDGE_FILE


def _optimise(
    adapted: Any,
    processor: Any,
    order: BalancedOrder,
    val: Sequence[LabelledRollout],
    labels: np.ndarray,
    config: VLMTrainingConfig,
    accelerator: Any,
) -> list[dict[str, float]]:
    """Trains the adapters in place to their best validated state; returns the history."""
    parameters, shown = trainable(adapted), config.judge()
    optimizer = torch.optim.AdamW(
        list(parameters.values()), config.learning_rate, betas=(0.9, 0.98), weight_decay=config.weight_decay
    )
    path, settings = _checkpoint(Path(config.output)), _settings(config)
    best: dict[str, torch.Tensor] = {}
    facts: dict[str, Any] = {"step": 0, "history": [], "losses": [], "rank": [-1.0, 0.0], "settings": settings}
    if config.resume:
        best, facts = load_checkpoint(path, adapted, optimizer)
        if facts["settings"] != settings:
            differing = sorted(name for name in settings if facts["settings"].get(name) != settings[name])
            raise ValueError(f"{path} is of a run with other {differing}; resume with the same settings.")
    bar = tqdm(
        range(facts["step"], config.steps), initial=facts["step"], total=config.steps, desc="judge", disable=None
    )
    for step in bar:
        adapted.train()
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate_at(step)
        total = 0.0
        for place in range(config.batch_size):
            with accelerator.autocast():
                loss = answer_loss(adapted, processor, order.draw(step * config.batch_size + place), shown)
            accelerator.backward(loss / config.batch_size)
            total += loss.item() / config.batch_size
        if not math.isfinite(total):
            raise FloatingPointError(f"loss {total} at step {step}; the last checkpoint is {path}")
        norm = float(accelerator.clip_grad_norm_(parameters.values(), 1.0))
        if not math.isfinite(norm):  # a step would spoil the weights, and the next checkpoint with them
            raise FloatingPointError(f"gradient of norm {norm} at step {step}; the last checkpoint is {path}")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        facts["losses"].append(total)
        facts["step"] = done = step + 1
        bar.set_postfix(loss=f"{total:.3f}")
        last = done == config.steps
        if done % config.eval_every == 0 or last:
            row = _validate(adapted, processor, val, labels, shown, accelerator)
            facts["history"].append({"step": done, "loss": float(np.mean(facts["losses"])), **row})
            facts["losses"] = []
            rank = [row["val_auc"], -row["val_loss"]]  # a saturated AUC leaves the choice to the log-loss
            if rank > facts["rank"]:
                facts["rank"], best = rank, {name: p.detach().cpu().clone() for name, p in parameters.items()}
        if done % config.save_every == 0 or last:
            save_checkpoint(path, adapted, optimizer, best, facts)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(best[name])
    adapted.eval()
    return facts["history"]


def _validate(
    adapted: Any, processor: Any, val: Sequence[LabelledRollout], labels: np.ndarray, shown: VLMConfig, accelerator: Any
) -> dict[str, float]:
    adapted.eval()
    with accelerator.autocast():
        scores = success_probabilities(adapted, processor, val, shown)
    log_loss = float(-np.log(np.clip(np.where(labels, scores, 1 - scores), 1e-6, 1)).mean())
    return {"val_loss": log_loss, "val_auc": auc(scores, labels)}


def _settings(config: VLMTrainingConfig) -> dict[str, Any]:
    """What has to be the same for a run to be continued, as it comes back from JSON."""
    values = {name: value for name, value in vars(config).items() if name not in ("output", "resume", "overwrite")}
    return json.loads(to_json(values))


def _checkpoint(output: Path) -> Path:
    return output / "checkpoints" / "last.safetensors"
