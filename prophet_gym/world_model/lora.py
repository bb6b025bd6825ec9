"""Low-rank adaptation of a Prophet denoiser: the backbone through LoRA, everything new in Prophet in full.

peft's ``modules_to_save`` copies whole modules and misses bare parameters. Here nothing is copied: new parameters are
those outside the backbone, by name, whatever holds them. An adapter is a folder of two safetensors files: the LoRA in
diffusers' own format, which its other tools read, and the new parameters.
"""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..atomic import atomic_folder
from .transformer import ProphetTransformer, is_backbone

__all__ = ["LORA_TARGETS", "add_lora", "load_adapter", "merge_adapter", "new_parameters", "save_adapter"]

LORA_TARGETS = r"transformer_blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2))"
"""Adapted layers: query, key, value, output and feed-forward of every block; a suffix would match the memory's, too."""
LORA_FILE = "pytorch_lora_weights.safetensors"
NEW_FILE = "new_parameters.safetensors"


def new_parameters(transformer: ProphetTransformer) -> dict[str, nn.Parameter]:
    """Parameters that Cosmos-Predict2 has not, by name; bare ones included."""
    return {name: p for name, p in transformer.named_parameters() if not is_backbone(name)}


def add_lora(transformer: ProphetTransformer, rank: int = 16, alpha: float = 16.0, seed: int = 0) -> None:
    """Freeze the backbone, put adapters that change nothing yet into its blocks, leave the new parameters trainable.

    Args:
        transformer: changed in place.
        rank: of the adapters.
        alpha: their scale, in units of ``rank``.
        seed: of the adapters' first factors; the second ones are zero.

    Raises:
        ValueError: it has an adapter already.
    """
    if getattr(transformer, "peft_config", None):
        raise ValueError("the denoiser has an adapter already; merge it (merge_adapter) before adding another")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=LORA_TARGETS))
    _freeze_backbone(transformer)


def save_adapter(transformer: ProphetTransformer, folder: str | Path, *, overwrite: bool = False) -> None:
    """Write the LoRA and the new parameters to a folder, whole or not at all; the backbone is not written.

    Raises:
        ValueError: the denoiser has no adapter, or the folder exists and ``overwrite`` is False.
    """
    if not getattr(transformer, "peft_config", None):
        raise ValueError("the denoiser has no adapter; expected one of add_lora or load_adapter")
    with atomic_folder(folder, overwrite=overwrite) as work:
        transformer.save_lora_adapter(work)
        save_file({name: p.detach().contiguous() for name, p in new_parameters(transformer).items()}, work / NEW_FILE)


def load_adapter(transformer: ProphetTransformer, folder: str | Path) -> None:
    """Put an adapter of :func:`save_adapter` onto its base, ready to imagine or to be trained further.

    Works in place; after an error the denoiser is of no use.

    Args:
        transformer: a fresh base, as of :func:`prophet_gym.world_model.from_cosmos`.
        folder: of the adapter.

    Raises:
        ValueError: a missing or damaged file, or tensors that do not fit this denoiser.
    """
    folder = Path(folder)
    if getattr(transformer, "peft_config", None):
        raise ValueError("the denoiser has an adapter already; expected a fresh base")
    tensors = {}
    for name in (LORA_FILE, NEW_FILE):
        try:
            tensors[name] = load_file(folder / name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{folder / name}: no whole safetensors file ({error}); save the adapter again") from error
    own = new_parameters(transformer)
    shapes = {name: tuple(p.shape) for name, p in own.items()}
    _check_shapes({name: tuple(t.shape) for name, t in tensors[NEW_FILE].items()}, shapes, folder / NEW_FILE)
    try:
        transformer.load_lora_adapter(
            folder, weight_name=LORA_FILE, prefix=None, use_safetensors=True, adapter_name="default"
        )
    except Exception as error:  # diffusers and peft raise many kinds
        raise ValueError(f"{folder / LORA_FILE}: does not fit this denoiser ({error})") from error
    # diffusers only logs adapters that are missing in the file, or in the model.
    held = {name: tuple(t.shape) for name, t in get_peft_model_state_dict(transformer).items()}
    _check_shapes({name: tuple(t.shape) for name, t in tensors[LORA_FILE].items()}, held, folder / LORA_FILE)
    with torch.no_grad():
        for name, value in tensors[NEW_FILE].items():
            own[name].copy_(value)
    _freeze_backbone(transformer)


def merge_adapter(transformer: ProphetTransformer) -> None:
    """Add the adapters to the weights that they adapt, and remove them: a plain denoiser again, saved as any other."""
    transformer.fuse_lora()
    transformer.unload_lora()


def _freeze_backbone(transformer: ProphetTransformer) -> None:
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_(not is_backbone(name) or ".lora_" in name)


def _check_shapes(found: dict[str, tuple], expected: dict[str, tuple], file: Path) -> None:
    wrong = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
    if wrong:
        listed = ", ".join(
            f"{name} {found.get(name, 'absent')}, expected {expected.get(name, 'none')}" for name in wrong[:5]
        )
        raise ValueError(
            f"{file}: {len(wrong)} tensors do not fit this denoiser: {listed}; build the base with the options of the "
            "training run"
        )
