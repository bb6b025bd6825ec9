"""From a path to a judge: how a command line or ``gym.make(..., judge=PATH)`` names one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from prophet_gym.errors import nearest
from prophet_gym.judges.backends import Backend, ServerBackend
from prophet_gym.judges.base import Judge
from prophet_gym.judges.classifier import CONFIG_FILE, WEIGHTS_FILE, ClassifierJudge
from prophet_gym.judges.prompting import AUTO, load_prompt
from prophet_gym.judges.vlm import VLMConfig, VLMJudge

__all__ = ["open_judge"]


def open_judge(path: str | Path) -> Judge:
    """Opens a judge.

    Args:
        path: the folder of a :class:`ClassifierJudge`, or a ``.json`` file that describes a :class:`VLMJudge`: the
            fields of :class:`VLMConfig`, and "backend", an object with "kind" ("server", "transformers" or "vllm") and
            the arguments of that backend; an "adapter" of kind "transformers" and a ``.txt`` prompt may lie beside the
            file. A key for the server stays out of it: set ``OPENAI_API_KEY``.

    Raises:
        ValueError: no such file or folder, not JSON, an unknown or missing field, or what the judge itself refuses.
    """
    path = Path(path)
    if path.suffix != ".json":
        if (path / CONFIG_FILE).is_file() and not (path / WEIGHTS_FILE).is_file():
            raise ValueError(
                f"{path} holds no {WEIGHTS_FILE}. If it is a vision-language judge, give its file: {path / CONFIG_FILE}"
            )
        return ClassifierJudge.from_pretrained(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not the JSON file of a judge ({error}).") from error
    backend = values.pop("backend", None) if isinstance(values, dict) else None
    if not isinstance(backend, dict):
        hint = f" A classifier is opened by its folder: {path.parent}" if (path.parent / WEIGHTS_FILE).is_file() else ""
        raise ValueError(f'{path}: expected an object with "backend": {{"kind": "server", "model": ...}}.{hint}')
    known = [field.name for field in fields(VLMConfig)]
    for name in values:
        if name not in known:
            raise ValueError(f"{path}: unknown field {name!r}; known are {['backend', *known]}.{nearest(name, known)}")
    prompt = path.parent / str(values.get("prompt", ""))
    if prompt.suffix == ".txt" and prompt.is_file():  # as an adapter: what lies beside the file travels with it
        values["prompt"] = str(prompt)
    config = VLMConfig(**values)
    if config.prompt != AUTO:
        load_prompt(config.prompt)  # before a model is loaded or a server asked
    return VLMJudge(_open_backend(path, **backend), config)


def _open_backend(path: Path, kind: str = "server", **arguments: Any) -> Backend:
    from prophet_gym.judges.in_process import TransformersBackend, VLLMBackend

    kinds: dict[str, Callable[..., Any]] = {
        "server": ServerBackend,
        "transformers": TransformersBackend.from_pretrained,
        "vllm": VLLMBackend,
    }
    if kind not in kinds:
        raise ValueError(f"{path}: backend kind {kind!r}; expected one of {sorted(kinds)}.{nearest(kind, kinds)}")
    if "api_key" in arguments:
        raise ValueError(f"{path}: a key does not belong in a file; set the environment variable OPENAI_API_KEY.")
    beside = path.parent / str(arguments.get("adapter", ""))
    if "adapter" in arguments and beside.is_dir():  # a judge and its adapter travel together
        arguments["adapter"] = str(beside)
    try:
        return kinds[kind](**arguments)
    except TypeError as error:
        raise ValueError(f"{path}: the backend {kind!r} does not take {arguments} ({error}).") from error
