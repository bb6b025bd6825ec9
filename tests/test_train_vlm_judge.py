"""Fine-tuning a vision-language judge, end to end on tiny random models."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from peft import PeftModel
from tiny_vlm import BOXES, END, qwen, write_llava

from prophet_gym.actions import ACTION_SPECS
from prophet_gym.cli import main
from prophet_gym.data.episode import Episode
from prophet_gym.data.folder import write_episode
from prophet_gym.judges import LabelledRollout, TransformersBackend, VLMConfig, VLMJudge, open_judge
from prophet_gym.judges.prompting import load_prompt
from prophet_gym.training import vlm_judge
from prophet_gym.training.adapter_checkpoint import trainable
from prophet_gym.training.vlm_examples import (
    BalancedOrder,
    answer_loss,
    answer_tokens,
    ask_with_answer,
    success_probabilities,
)
from prophet_gym.training.vlm_judge import (
    VLMTrainingConfig,
    add_lora,
    fit_vlm_judge,
    save_vlm_judge,
    train_vlm_judge,
)

# peft asks a model of transformers 5 for a property under its former name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps the precision of the first run of a process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def rollout(number: int, label: bool, source: str = "real") -> LabelledRollout:
    """Noise that is bright where it is a success."""
    noise = np.random.default_rng([number, source == "real"]).integers(0, 60, (4, 32, 32, 3))
    success = np.array([False] * 3 + [label])
    return LabelledRollout((noise + 190 * label).astype(np.uint8), "light it", success, f"e{number}", source=source)


TRAIN = [rollout(i, i % 2 == 0, source) for i in range(8) for source in ("real", "imagined")]
VAL = [rollout(100 + i, i % 2 == 0) for i in range(6)]


def quick(output: Path, **changes: Any) -> VLMTrainingConfig:
    defaults: dict[str, Any] = dict(
        data=("unused",),
        output=str(output),
        prompt="general",
        num_frames=2,
        image_size=28,
        rank=4,
        steps=8,
        batch_size=4,
        learning_rate=1e-2,
        precision="no",
        eval_every=4,
        save_every=4,
    )
    return VLMTrainingConfig(**{**defaults, **changes})


def probabilities(judge: VLMJudge, rollouts: list[LabelledRollout]) -> list[float]:
    verdicts = judge.judge_batch([r.frames for r in rollouts], [r.instruction for r in rollouts])
    assert all(verdict.valid for verdict in verdicts), verdicts
    return [verdict.score for verdict in verdicts]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, VLMConfig, dict, dict, Path]:
    """A tiny Qwen2.5-VL after training, what it was before, and the folder of its judge."""
    model, processor = qwen()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    out = tmp_path_factory.mktemp("fitted")
    adapted, decision, metrics = fit_vlm_judge(model, processor, TRAIN, VAL, quick(out))
    save_vlm_judge(adapted, decision, quick(out))
    return adapted, processor, decision, metrics, before, out


def test_the_answer_is_the_box_and_the_end_and_alone_carries_loss() -> None:
    model, processor = qwen()
    tokenizer = processor.tokenizer
    answers = answer_tokens(tokenizer)
    assert {tokenizer.decode(ids) for ids in answers.values()} == {box + END for box in BOXES}
    shown = VLMConfig(prompt="general", num_frames=2, image_size=28)
    success = TRAIN[0]
    inputs = ask_with_answer(processor, success, shown, answers[True])
    text = tokenizer.decode(inputs["input_ids"][0])
    assert text.endswith("<|im_start|>" + BOXES[0] + END) and 'A robot tries to do this: "light it"' in text
    assert inputs["attention_mask"].shape == inputs["input_ids"].shape and inputs["attention_mask"].all()
    labels = inputs["input_ids"].clone()
    labels[:, : -len(answers[True])] = -100
    with torch.no_grad():
        expected = model(**inputs, labels=labels).loss
        assert answer_loss(model, processor, success, shown) == pytest.approx(float(expected), abs=1e-5)


def test_labels_and_sources_are_drawn_equally_often() -> None:
    order = BalancedOrder([*TRAIN[:6], *[rollout(50 + i, False) for i in range(20)]], seed=1)
    drawn = [order.draw(number) for number in range(40)]
    kinds = [(each.source, each.label) for each in drawn]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        (s, y): 10 for s in ("real", "imagined") for y in (True, False)
    }
    assert [each.name for each in drawn] == [order.draw(number).name for number in range(40)]
    with pytest.raises(ValueError, match="successes and failures among real rollouts, got 3 successes and 0 failures"):
        BalancedOrder([rollout(i, True) for i in range(3)], 0)


def test_training_lowers_the_loss_and_moves_the_adapters_alone(fitted: tuple) -> None:
    adapted, _, decision, metrics, before, _ = fitted
    first, last = metrics["history"][0], metrics["history"][-1]
    assert last["loss"] < first["loss"] - 0.05 and last["val_loss"] < first["val_loss"]
    assert last["val_auc"] == 1.0 and metrics["validation"]["precision"]["value"] == 1.0
    assert decision.threshold == metrics["threshold"] and decision.method == "logprobs"
    moved, adapters = [], []
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name:
            adapters.append(name)
            assert parameter.requires_grad and "language_model" in name
            continue
        assert not parameter.requires_grad
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        moved += [] if torch.equal(parameter, before[plain]) else [name]
    assert not moved
    layers = {name.split(".")[-4] for name in adapters}
    assert layers == {f"{each}_proj" for each in ("q", "k", "v", "o", "gate", "up", "down")}
    grown = [adapted.get_parameter(name).abs().max() for name in adapters if ".lora_B" in name]
    assert min(grown) > 0, "an adapter that never learned"


def test_the_judge_finds_the_probabilities_that_training_selected_by(fitted: tuple) -> None:
    adapted, processor, decision, *_ = fitted
    judge = VLMJudge(TransformersBackend(adapted, processor, name="tiny"), decision)
    adapted.generation_config.repetition_penalty = 1.5  # Qwen2.5-VL comes with 1.05, and the prompt names both boxes
    expected = success_probabilities(adapted, processor, VAL, decision)
    assert probabilities(judge, VAL) == pytest.approx(expected.tolist(), abs=1e-4)
    assert [score > decision.threshold for score in expected] == [r.label for r in VAL]


def test_an_adapter_comes_back_with_the_same_probabilities(fitted: tuple) -> None:
    adapted, processor, decision, *_, out = fitted
    names = {path.name for path in (out / "adapter").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= names
    fresh, _ = qwen()
    loaded = PeftModel.from_pretrained(fresh, out / "adapter").eval()
    expected = success_probabilities(adapted, processor, VAL, decision)
    assert np.array_equal(success_probabilities(loaded, processor, VAL, decision), expected)
    assert not np.array_equal(success_probabilities(qwen()[0], processor, VAL, decision), expected)


def test_an_interrupted_run_ends_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, stopped = (
        quick(tmp_path / "whole", steps=4, eval_every=2, save_every=1),
        quick(tmp_path / "stopped", steps=4, eval_every=2, save_every=1),
    )
    expected, _, metrics = fit_vlm_judge(*qwen(), TRAIN, VAL, whole)
    calls = []

    def pull_the_plug(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 3 * stopped.batch_size:
            raise KeyboardInterrupt
        return answer_loss(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(vlm_judge, "answer_loss", pull_the_plug)
        fit_vlm_judge(*qwen(), TRAIN, VAL, stopped)
    resumed, _, again = fit_vlm_judge(*qwen(), TRAIN, VAL, replace(stopped, resume=True))
    assert again["history"] == metrics["history"]
    for name, parameter in trainable(expected).items():
        assert torch.equal(parameter, resumed.get_parameter(name)), name
    with pytest.raises(ValueError, match="belongs to another adapter"):
        fit_vlm_judge(*qwen(), TRAIN, VAL, replace(stopped, resume=True, rank=2))
    with pytest.raises(ValueError, match=r"a run with other \['seed'\]; resume with the same settings"):
        fit_vlm_judge(*qwen(), TRAIN, VAL, replace(stopped, resume=True, seed=5))
    assert [path.name for path in (tmp_path / "whole" / "checkpoints").iterdir()] == ["last.safetensors"]


def test_the_adapter_that_validated_best_is_kept_not_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, torch.Tensor]] = []

    def worse_each_time(adapted: Any, *_: Any) -> dict[str, float]:
        seen.append({name: parameter.detach().clone() for name, parameter in trainable(adapted).items()})
        return {"val_auc": 1.0 - 0.1 * len(seen), "val_loss": 0.5}

    monkeypatch.setattr(vlm_judge, "_validate", worse_each_time)
    adapted, *_ = fit_vlm_judge(*qwen(), TRAIN, VAL, quick(tmp_path, steps=2, eval_every=1))
    kept = trainable(adapted)
    assert all(torch.equal(kept[name], seen[0][name]) for name in kept)
    assert not all(torch.equal(kept[name], seen[1][name]) for name in kept)


def test_checkpointing_activations_changes_no_gradient(tmp_path: Path) -> None:
    gradients = []
    for checkpointing in (True, False):
        model, processor = qwen()
        adapted = add_lora(model, quick(tmp_path, gradient_checkpointing=checkpointing)).train()
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, k=kept: (k.append(t.numel()), t)[1], lambda t: t):
            loss = answer_loss(adapted, processor, TRAIN[0], quick(tmp_path).judge())
        loss.backward()
        gradients.append(({n: p.grad for n, p in trainable(adapted).items()}, sum(kept)))
    (some, few), (others, many) = gradients
    assert few < 0.7 * many, "nothing was saved"
    assert all(torch.allclose(some[name], others[name], atol=1e-6) for name in some)


def test_half_precision_trains_too(tmp_path: Path) -> None:
    model, processor = qwen()
    config = quick(tmp_path, steps=2, precision="bf16")
    adapted, _, metrics = fit_vlm_judge(model.to(torch.bfloat16), processor, TRAIN, VAL, config)
    assert {parameter.dtype for parameter in trainable(adapted).values()} == {torch.float32}
    assert np.isfinite(metrics["history"][-1]["loss"])


def test_a_gradient_that_is_not_finite_spoils_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def explode_later(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        loss = answer_loss(*arguments)
        if len(calls) > 2:  # the loss stays what it is, its gradient becomes infinite
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    monkeypatch.setattr(vlm_judge, "answer_loss", explode_later)
    config = quick(tmp_path, steps=3, batch_size=2, save_every=1)
    with pytest.raises(FloatingPointError, match="gradient of norm nan at step 1|gradient of norm inf at step 1"):
        fit_vlm_judge(*qwen(), TRAIN, VAL, config)
    monkeypatch.undo()
    _, _, metrics = fit_vlm_judge(*qwen(), TRAIN, VAL, replace(config, resume=True))
    assert np.isfinite(metrics["history"][-1]["loss"])


def test_what_cannot_be_learned_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Validation needs successes and failures, got 3 of 3"):
        fit_vlm_judge(*qwen(), TRAIN, [each for each in VAL if each.label], quick(tmp_path))
    with pytest.raises(ValueError, match="both training and validation, e.g. 'e0'"):
        fit_vlm_judge(*qwen(), TRAIN, [*VAL, TRAIN[0]], quick(tmp_path))
    with pytest.raises(ValueError, match="Linear has no layers of the form"):
        add_lora(torch.nn.Linear(2, 2), quick(tmp_path))
    for changes, message in (
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"precision": "fp16"}, 'expected "bf16" or "no"'),
        ({"num_frames": 1}, "num_frames=1"),
        ({"data": "folder"}, "tuple of folders"),
    ):
        with pytest.raises(ValueError, match=message):
            quick(tmp_path, **changes)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="adapter holds no adapter_config.json: it is something else"):
        train_vlm_judge(quick(tmp_path))
    assert (tmp_path / "adapter" / "notes.txt").read_text() == "mine"


# --- from folders, with a model that every loader takes ---


def test_the_command_trains_from_folders_and_writes_a_judge_that_opens_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_llava(tmp_path / "llava")
    (own := tmp_path / "own.txt").write_text(load_prompt("general"))
    for number in range(12):
        source = rollout(number, number % 2 == 0)
        write_episode(
            tmp_path / "data" / f"{number:03d}",
            Episode(
                images=source.frames,
                actions=np.zeros((3, 7), np.float32),
                action_spec=ACTION_SPECS["tabletop"],
                instruction=source.instruction,
                fps=10.0,
                labels={"success": source.success},
                name=f"{number:03d}",
            ),
        )
    out = tmp_path / "judge"
    words = ["prophet", "judge", "train-vlm", "--data", str(tmp_path / "data"), "--output", str(out), "--model",
             str(tmp_path / "llava"), "--checkpoint", "none", "--val-fraction", "0.4", "--prompt", str(own),
             "--num-frames", "2", "--image-size", "32", "--steps", "3", "--batch-size", "2", "--precision", "no",
             "--learning-rate", "1e-2", "--rank", "2"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", words)
    main()
    printed = json.loads(capsys.readouterr().out)
    assert json.loads((out / "judge_metrics.json").read_text()) == printed
    assert str(tmp_path) not in json.dumps(printed["config"] | {"model": ""}), "the metrics travel without paths"
    described = json.loads((out / "judge.json").read_text())
    assert described["backend"]["adapter"] == "adapter" and described["method"] == "logprobs"
    own.unlink()
    moved = tmp_path / "elsewhere"
    out.rename(moved)
    monkeypatch.chdir(tmp_path)
    judge = open_judge(moved / "judge.json")
    assert judge.config.threshold == printed["threshold"]
    assert len(judge.backend.identity["adapter"]) == 64, "cached answers must tell one training from another"
    base = VLMJudge(TransformersBackend.from_pretrained(str(tmp_path / "llava")), judge.config)
    trained, untrained = probabilities(judge, VAL), probabilities(base, VAL)
    assert max(abs(a - b) for a, b in zip(trained, untrained, strict=True)) > 1e-4
    monkeypatch.setattr(sys, "argv", [*words[:6], str(moved), *words[7:]])
    with pytest.raises(SystemExit):
        main()
    assert "already holds a judge or a run" in capsys.readouterr().err
    with pytest.raises(ValueError, match="nothing to resume"):
        train_vlm_judge(quick(tmp_path / "new", resume=True))
    (moved / "adapter" / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match="is no adapter for"):
        open_judge(moved / "judge.json")
