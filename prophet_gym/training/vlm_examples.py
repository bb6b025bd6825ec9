"""A labelled rollout as a vision-language model learns it: the judge's own question, and the box as the answer.

Question, pictures and chat template are those of :class:`prophet_gym.judges.VLMJudge`, so that the model is asked in
training what it will be asked in use. The answer is the box and the end of the turn, without reasoning before it:
nobody has written reasons for these labels. One rollout at a time, so that nothing is padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from prophet_gym.judges.in_process import chat_inputs
from prophet_gym.judges.prompting import OPEN_BOX, WORDS
from prophet_gym.judges.rollouts import LabelledRollout
from prophet_gym.judges.vlm import VLMConfig, build_question

__all__ = ["BalancedOrder", "answer_loss", "answer_tokens", "ask_with_answer", "success_probabilities"]


def answer_tokens(tokenizer: Any) -> dict[bool, list[int]]:
    """Token ids of the two answers, each with the end of the turn, by success."""
    return {
        success: [*tokenizer(f"{OPEN_BOX}{word}}}", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        for word, success in WORDS.items()
    }


def ask_with_answer(
    processor: Any, rollout: LabelledRollout, config: VLMConfig, answer: Sequence[int]
) -> dict[str, Tensor]:
    """The model's inputs: the question about a rollout, followed by the tokens of an answer.

    Returns:
        The processor's batch of one, its rows per token longer by the answer.
    """
    inputs = dict(chat_inputs(processor, build_question(rollout.frames, rollout.instruction, config)))
    length = inputs["input_ids"].shape[1]
    said = torch.tensor([list(answer)], dtype=inputs["input_ids"].dtype)
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.shape[:2] == (1, length):
            # Besides the ids there are masks: attended to (1), and "is this a picture" (0).
            fill = torch.ones_like(said) if name == "attention_mask" else torch.zeros_like(said)
            inputs[name] = torch.cat([value, (said if name == "input_ids" else fill).to(value.dtype)], dim=1)
    return inputs


def answer_loss(model: Any, processor: Any, rollout: LabelledRollout, config: VLMConfig) -> Tensor:
    """Cross-entropy of the right answer's tokens, averaged over them; the question's tokens carry no loss."""
    answer = answer_tokens(processor.tokenizer)[rollout.label]
    inputs = ask_with_answer(processor, rollout, config, answer)
    logits = _last_logits(model, inputs, len(answer) + 1)[:-1]
    return F.cross_entropy(logits.float(), torch.tensor(answer, device=logits.device))


@torch.no_grad()
def success_probabilities(
    model: Any, processor: Any, rollouts: Sequence[LabelledRollout], config: VLMConfig
) -> np.ndarray:
    """P(Success) / (P(Success) + P(Failure)) where the two answers part, for each rollout: (n,) float in [0, 1].

    A model that has learned to answer with a box gives :class:`prophet_gym.judges.VLMJudge` the same number with
    ``method="logprobs"``; here it is found also before it has.
    """
    answers = answer_tokens(processor.tokenizer)
    parting = next(i for i, (a, b) in enumerate(zip(answers[True], answers[False], strict=False)) if a != b)
    pair = [answers[True][parting], answers[False][parting]]
    probabilities = []
    for rollout in rollouts:
        inputs = ask_with_answer(processor, rollout, config, answers[True][:parting])
        logits = _last_logits(model, inputs, 1)[0, pair]
        probabilities.append(logits.double().softmax(-1)[0].item())
    return np.array(probabilities)


class BalancedOrder:
    """Which rollout comes when: labels and sources equally often, each draw from its own seed.

    Args:
        rollouts: to draw from.
        seed: of the draws.

    Raises:
        ValueError: a source without successes or without failures.
    """

    def __init__(self, rollouts: Sequence[LabelledRollout], seed: int) -> None:
        self.rollouts, self.seed = rollouts, seed
        self.cells: list[list[int]] = []
        for source in sorted({rollout.source for rollout in rollouts}):
            for label in (True, False):
                self.cells.append([i for i, r in enumerate(rollouts) if (r.source, r.label) == (source, label)])
            if not self.cells[-1] or not self.cells[-2]:
                raise ValueError(
                    f"Training needs successes and failures among {source} rollouts, got {len(self.cells[-2])} "
                    f"successes and {len(self.cells[-1])} failures."
                )

    def draw(self, number: int) -> LabelledRollout:
        """Returns the rollout that is drawn as this number, counted from 0 over the whole run."""
        cell = self.cells[number % len(self.cells)]
        return self.rollouts[int(np.random.default_rng([self.seed, number]).choice(cell))]


def _last_logits(model: Any, inputs: dict[str, Tensor], count: int) -> Tensor:
    """Logits (count, vocabulary) of the last places; those of thousands of picture tokens are never made."""
    device = next(model.parameters()).device
    placed = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    return model(**placed, use_cache=False, logits_to_keep=count).logits[0, -count:]
