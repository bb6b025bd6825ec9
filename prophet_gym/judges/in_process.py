"""Vision-language models in this process: vLLM, or transformers where vLLM does not run.

Both load a model of the hub or a folder. A server (:class:`prophet_gym.judges.ServerBackend`) is the better choice as
soon as the world model needs the same GPU, or several runs the same judge.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from prophet_gym.errors import MissingExtraError
from prophet_gym.judges.backends import TOP_LOGPROBS, Answer, Done, Question, Sampling
from prophet_gym.judges.prompting import success_probability

__all__ = ["TransformersBackend", "VLLMBackend", "chat_inputs", "load_model"]

_MODEL_FILES = (".safetensors", ".bin", ".json", ".jinja", ".txt")  # weights, settings, tokenizer, chat template


class VLLMBackend:
    """A vLLM engine in this process; needs the extra ``vllm`` and a GPU.

    Args:
        model: hub id or folder.
        engine: further arguments of ``vllm.LLM``, such as ``tensor_parallel_size=8``.

    Raises:
        MissingExtraError: vLLM is not installed.
    """

    takes_video = True

    def __init__(self, model: str, **engine: Any) -> None:
        try:
            import vllm
        except ImportError as error:
            raise MissingExtraError('A judge in a vLLM engine needs vllm: pip install "prophet-gym[vllm]"') from error
        limits = {"limit_mm_per_prompt": {"image": 50, "video": 1}, "media_io_kwargs": {"video": {"num_frames": -1}}}
        self.identity: dict[str, Any] = {
            "backend": "vllm",
            "model": model,
            **({"engine": {name: str(value) for name, value in engine.items()}} if engine else {}),
            **_weights_of(model),
        }
        self._parameters = vllm.SamplingParams
        self._engine = vllm.LLM(model=model, **{**limits, **engine})

    def ask(self, questions: Sequence[Question], sampling: Sampling, done: Done) -> list[list[Answer]]:
        """Answers all questions in one batch; if the engine refuses it, one by one, so that one costs no other."""
        try:
            given = self._chat(questions, sampling) if len(questions) > 1 else None
        except Exception:  # a question that does not fit the model ends the whole batch
            given = None
        if given is None:
            return _one_by_one(questions, lambda question: self._chat([question], sampling)[0], done)
        for index, answers in enumerate(given):
            done(index, answers)
        return given

    def _chat(self, questions: Sequence[Question], sampling: Sampling) -> list[list[Answer]]:
        pairs = [(question.messages(), seed) for question in questions for seed in question.seeds]
        parameters = [
            self._parameters(
                temperature=sampling.temperature,
                max_tokens=sampling.max_tokens,
                seed=seed,
                logprobs=TOP_LOGPROBS if sampling.logprobs else None,
            )
            for _, seed in pairs
        ]
        outputs = iter(self._engine.chat([messages for messages, _ in pairs], parameters, use_tqdm=False))
        return [[_read_output(next(outputs).outputs[0]) for _ in question.seeds] for question in questions]


class TransformersBackend:
    """A vision-language model of transformers in this process, one question at a time, its answers side by side.

    Args:
        model: an image-text-to-text model, on its device and in its precision.
        processor: of that model, with a chat template.
        name: of the model, for the key of cached answers.
        adapter: digest or name of what fine-tuned the model, for the same key; empty for none.
        decides: what else decides the answers, for the same key, such as ``dtype="bfloat16"``.
    """

    takes_video = False

    def __init__(self, model: Any, processor: Any, *, name: str, adapter: str = "", **decides: str) -> None:
        known = {"adapter": adapter} if adapter else {}
        self.identity = {"backend": "transformers", "model": name, **known, **decides}
        self._model, self._processor = model.eval(), processor

    @classmethod
    def from_pretrained(
        cls, model: str, *, device: str = "cpu", dtype: str = "auto", adapter: str | None = None
    ) -> TransformersBackend:
        """Loads a model.

        Args:
            model: hub id or folder.
            device: as in torch.
            dtype: "float32", "bfloat16", "float16", or "auto" for that of the weights.
            adapter: folder or hub id of an adapter of peft on that model, as `prophet judge train-vlm` writes it.

        Raises:
            MissingExtraError: the model's processor needs a package that is not installed, most often torchvision.
            ValueError: there is no such model, or no such adapter for it.
        """
        network, processor = load_model(model, dtype)
        decides = _weights_of(model) | ({} if dtype == "auto" else {"dtype": dtype})
        if adapter is None:
            return cls(network.to(device), processor, name=model, **decides)
        from peft import PeftModel

        try:
            network = PeftModel.from_pretrained(network, adapter)
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"{adapter!r} is no adapter for {model!r} ({str(error).splitlines()[0]}).") from error
        return cls(network.to(device), processor, name=model, adapter=_digest(adapter), **decides)

    def ask(self, questions: Sequence[Question], sampling: Sampling, done: Done) -> list[list[Answer]]:
        """Answers one question after the other."""
        return _one_by_one(questions, lambda question: self._generate(question, sampling), done)

    @torch.no_grad()
    def _generate(self, question: Question, sampling: Sampling) -> list[Answer]:
        inputs = chat_inputs(self._processor, question).to(self._model.device)
        device = self._model.device
        drawing: dict[str, Any] = {"do_sample": False}
        if sampling.temperature > 0:
            drawing = {"do_sample": True, "temperature": sampling.temperature}
        if sampling.logprobs:  # the model's own probabilities: Qwen's generation settings penalise repeated words
            drawing["repetition_penalty"] = 1.0
        recorder = _Recorder()
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(question.seeds[0])  # generate() draws all answers from one global generator
            sequences = self._model.generate(
                **inputs,
                **drawing,
                max_new_tokens=sampling.max_tokens,
                num_return_sequences=len(question.seeds),
                logits_processor=[recorder] if sampling.logprobs else [],
            )[:, inputs["input_ids"].shape[1] :]
        return [self._read(row, recorder, index) for index, row in enumerate(sequences.tolist())]

    def _read(self, row: list[int], recorder: _Recorder, index: int) -> Answer:
        stops = self._model.generation_config.eos_token_id
        ends = {stops} if isinstance(stops, int) else set(stops or ())
        length = next((place for place, token in enumerate(row) if token in ends), None)
        row = row[:length]
        tokenizer = self._processor.tokenizer
        tokens = []
        for token, steps in zip(row, recorder.steps, strict=False):
            likely = {tokenizer.decode([other]): value for other, value in steps[index].items()}
            tokens.append((tokenizer.decode([token]), likely))
        text = tokenizer.decode(row, skip_special_tokens=True)
        return Answer(text, finished=length is not None, probability=success_probability(tokens))


def _one_by_one(
    questions: Sequence[Question], answer: Callable[[Question], list[Answer]], done: Done
) -> list[list[Answer]]:
    """Answers each question alone; one that cannot be answered (too long, out of memory) gets no vote."""
    given = []
    for index, question in enumerate(questions):
        try:
            given.append(answer(question))
        except Exception as error:
            given.append([Answer(error=f"{type(error).__name__}: {error}")] * len(question.seeds))
        done(index, given[-1])
    return given


def load_model(model: str, dtype: str = "auto") -> tuple[Any, Any]:
    """Returns a vision-language model, on the CPU, and its processor.

    Args:
        model: hub id or folder.
        dtype: "float32", "bfloat16", "float16", or "auto" for that of the weights.

    Raises:
        MissingExtraError: the model's processor needs a package that is not installed, most often torchvision.
        ValueError: there is no such model.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(model)
        network = AutoModelForImageTextToText.from_pretrained(model, dtype=dtype)
    except ImportError as error:
        raise MissingExtraError(
            f"The processor of {model!r} needs a package that is missing: {' '.join(str(error).split())[:160]}. "
            "If it is torchvision: pip install torchvision, the build that fits the installed torch."
        ) from error
    except OSError as error:
        raise ValueError(f"No vision-language model {model!r} ({str(error).splitlines()[0]}).") from error
    return network, processor


def _weights_of(model: str) -> dict[str, str]:
    """What tells one model in a folder from the next one there; nothing for one of the hub.

    Names, sizes and times of its files: reading gigabytes of weights would take as long as loading them.
    """
    folder = Path(model)
    if not folder.is_dir():
        return {}
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in _MODEL_FILES and file.is_file():
            status = file.stat()
            digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return {"weights": digest.hexdigest()}


def _digest(adapter: str) -> str:
    """What tells one adapter from another trained into the same folder; the name of one on the hub."""
    weights = Path(adapter) / "adapter_model.safetensors"
    return hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else adapter


def chat_inputs(processor: Any, question: Question) -> Any:
    """A question as a model of transformers is asked it, up to where its answer begins.

    Args:
        processor: with a chat template.
        question: of single pictures.

    Returns:
        The processor's batch of one on the CPU: "input_ids" (1, L), "attention_mask" (1, L), and the pictures.
    """
    content: list[dict[str, Any]] = [{"type": "text", "text": question.text}]
    for label, image in zip(question.labels, question.images, strict=True):
        picture = Image.open(io.BytesIO(image)).convert("RGB")
        content += [{"type": "text", "text": label}, {"type": "image", "image": picture}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


class _Recorder:
    """Keeps the likeliest tokens of every step, as a logits processor of ``generate``."""

    def __init__(self) -> None:
        self.steps: list[list[dict[int, float]]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        values, tokens = scores.float().log_softmax(-1).topk(min(TOP_LOGPROBS, scores.shape[-1]), dim=-1)
        rows = zip(tokens.tolist(), values.tolist(), strict=True)
        self.steps.append([dict(zip(*row, strict=True)) for row in rows])
        return scores


def _read_output(output: Any) -> Answer:
    """One ``vllm.CompletionOutput``."""
    tokens = []
    for token, alternatives in zip(output.token_ids, output.logprobs or [], strict=False):
        texts = {entry.decoded_token or "": entry.logprob for entry in alternatives.values()}
        tokens.append((alternatives[token].decoded_token or "", texts))
    if output.finish_reason not in ("stop", "length"):
        return Answer(error=f"the engine ended with finish_reason {output.finish_reason!r}")
    return Answer(output.text, finished=output.finish_reason == "stop", probability=success_probability(tokens))
