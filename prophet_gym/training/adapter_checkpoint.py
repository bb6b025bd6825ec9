"""Where an adapter's training stands, in one safetensors file: weights, the best so far, the optimizer, the history.

One file, so that it is whole or not there; no pickle, so that it can be opened without trust. What is no tensor stands
in the header as JSON.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

__all__ = ["load_checkpoint", "save_checkpoint", "trainable"]

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that are trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, best: dict[str, Tensor], facts: dict[str, Any]
) -> None:
    """Writes a checkpoint in one step.

    Args:
        path: of the file; its folder is made.
        model: whose trainable parameters are kept.
        optimizer: an AdamW over :func:`trainable`, in that order.
        best: the weights that are to be kept in the end, by name; empty before the first evaluation.
        facts: JSON values, such as the step.
    """
    tensors = {f"weights/{name}": parameter.detach() for name, parameter in trainable(model).items()}
    tensors |= {f"best/{name}": value for name, value in best.items()}
    for name, parameter in trainable(model).items():
        for moment, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{moment}/{name}"] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(
        {name: value.cpu().contiguous() for name, value in tensors.items()}, temporary, {"facts": json.dumps(facts)}
    )
    os.replace(temporary, path)


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Puts a checkpoint into model and optimizer.

    Returns:
        The best weights and the facts.

    Raises:
        ValueError: no whole checkpoint there, or one of another model.
    """
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["facts"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no whole checkpoint of an adapter ({error}).") from error
    parameters = trainable(model)
    kept = {name.removeprefix("weights/"): value for name, value in tensors.items() if name.startswith("weights/")}
    shapes = {name: tuple(value.shape) for name, value in parameters.items()}
    if {name: tuple(value.shape) for name, value in kept.items()} != shapes:
        raise ValueError(f"{path} belongs to another adapter: {len(kept)} tensors, expected {len(shapes)} as here.")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(kept[name])
    state = optimizer.state_dict()
    state["state"] = {
        index: {moment: tensors[f"{moment}/{name}"] for moment in MOMENTS}
        for index, name in enumerate(parameters)
        if f"{MOMENTS[0]}/{name}" in tensors
    }
    optimizer.load_state_dict(state)
    return {name.removeprefix("best/"): v for name, v in tensors.items() if name.startswith("best/")}, facts
