"""Cosmos-Predict2 as a start: its denoiser becomes the backbone of Prophet, its Wan VAE the codec.

Reads diffusers' layout (``transformer/``, ``vae/``) from a folder or the hub. Every backbone tensor must be there with
its shape, nothing else may be, and all that is new in Prophet is initialised here: the output layers of the new streams
are zero and the memory's gate is closed, so that the network equals its base until it is trained. Weights go tensor by
tensor from the files into memory of the target dtype; there is never a second copy.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, CosmosTransformer3DModel
from torch import nn

from ..actions import ActionSpec
from ..errors import nearest
from ..weights import locate_parts
from .prophet import ProphetConfig, ProphetWorldModel, load_network
from .tensor_files import check_tensors, list_tensors, read_tensor
from .transformer import ProphetTransformer, is_backbone

__all__ = ["from_cosmos", "world_from_cosmos"]

PROPHET_OPTIONS = (
    "chunk_length",
    "num_effectors",
    "scalar_hidden_dim",
    "action_frames",
    "action_frame_cells",
    "memory_levels",
    "memory_gate",
)
"""Arguments of :class:`ProphetTransformer` that the checkpoint does not decide."""

_SAME = (
    "num_attention_heads",
    "attention_head_dim",
    "num_layers",
    "mlp_ratio",
    "text_embed_dim",
    "adaln_lora_dim",
    "max_size",
    "patch_size",
    "rope_scale",
    "concat_padding_mask",
)
# What other Cosmos models have and Cosmos-Predict2 has not: position embeddings (Predict1), a text projection
# (Predict2.5), image context and control branches (Transfer2.5). Their remaining arguments mean nothing without these.
_FOREIGN = ("extra_pos_embed_type", "use_crossattn_projection", "img_context_dim_in", "controlnet_block_every_n")
_IDLE = (
    "crossattn_proj_in_channels",
    "encoder_hidden_states_channels",
    "img_context_num_tokens",
    "img_context_dim_out",
)


def from_cosmos(
    source: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    **options: Any,
) -> ProphetTransformer:
    """Build a Prophet denoiser on a Cosmos-Predict2 Video2World backbone.

    With the closed gate (``memory_gate=0``, the default) its output is that of the base model, whatever the actions,
    action frames and history.

    Args:
        source: a folder with ``transformer/`` inside, that folder itself, or a hub id ``owner/name``.
        revision: branch, tag or commit on the hub.
        dtype: of all parameters.
        device: of all parameters; tensors go there one at a time.
        seed: of the new parameters that are not zero.
        **options: what :class:`ProphetTransformer` has beside the backbone: ``chunk_length``, ``num_effectors``,
            ``scalar_hidden_dim``, ``action_frames``, ``action_frame_cells``, ``memory_levels``, ``memory_gate``.

    Returns:
        The denoiser in evaluation mode.

    Raises:
        ValueError: not found; another class or architecture; missing, unexpected or wrongly shaped tensors; damaged or
            pickled weights; an unknown option. The message names the file.
    """
    for name in options:
        if name not in PROPHET_OPTIONS:
            raise ValueError(
                f"option {name!r}: expected some of {', '.join(PROPHET_OPTIONS)}; the backbone's own come from its "
                f"config.json.{nearest(name, PROPHET_OPTIONS)}"
            )
    folder = _network_folder(locate_parts(source, revision, ("transformer",)))
    backbone = _backbone_arguments(folder / "config.json")
    with torch.device("meta"):
        transformer = ProphetTransformer(**backbone, **options)
    expected = {name: tuple(p.shape) for name, p in transformer.named_parameters() if is_backbone(name)}
    stored = list_tensors(folder)
    check_tensors(stored, expected, folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer.add_conditioning()
    names = [name for name, _ in transformer.named_parameters()]
    for name in sorted(names, key=is_backbone):  # the new ones first: they exist in float32 until they are cast
        owner, _, leaf = name.rpartition(".")
        if is_backbone(name):
            weight = read_tensor(name, stored[name], dtype, device)
        else:
            weight = transformer.get_parameter(name).detach().to(device, dtype)
        setattr(transformer.get_submodule(owner), leaf, nn.Parameter(weight))
    return transformer.eval()


def world_from_cosmos(
    source: str | Path,
    action_spec: ActionSpec,
    *,
    image_size: tuple[int, int] = (256, 256),
    history_frames: int = 60,
    num_inference_steps: int = 35,
    name: str = "cosmos-untrained",
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    **options: Any,
) -> ProphetWorldModel:
    """Assemble a whole world model from a Cosmos-Predict2 checkpoint: where training on robot data starts.

    It imagines what the base model would, without text: actions have no effect before it is trained, and
    ``info["checkpoint"]`` says so. Sampling is the base model's: Karras noise levels, two-step Adams-Bashforth.

    Args:
        source: a folder with ``transformer/`` and ``vae/`` inside, or a hub id ``owner/name``.
        action_spec: conventions of the commands.
        image_size: (H, W) in pixels, multiples of 16.
        history_frames: T_h, frames of the history; a multiple of 4.
        num_inference_steps: default number of denoising steps.
        name: of the checkpoint, for logs and ``info["checkpoint"]``.
        revision: branch, tag or commit on the hub.
        dtype: of both networks.
        device: of both networks.
        seed: of the new parameters that are not zero.
        **options: as in :func:`from_cosmos`.

    Raises:
        ValueError: as in :func:`from_cosmos`; or a codec that is not a Wan VAE with strides 4 and 8, or does not fit.
    """
    config = ProphetConfig(
        name=name,
        trained_on=f"the data of its base {Path(source).resolve().name} alone; actions have no effect before training",
        image_size=tuple(image_size),
        history_frames=history_frames,
        num_inference_steps=num_inference_steps,
        schedule="karras",
        solver="ab2",
        action_spec=action_spec,
    )
    folder = locate_parts(source, revision, ("transformer", "vae"))
    vae = _load_wan_vae(folder / "vae", dtype).to(device)
    transformer = from_cosmos(folder, dtype=dtype, device=device, seed=seed, **options)
    return ProphetWorldModel(transformer, vae, config)


def _network_folder(folder: Path) -> Path:
    for candidate in (folder / "transformer", folder):
        if (candidate / "config.json").is_file():
            return candidate
    raise ValueError(
        f"{folder}: neither transformer/config.json nor config.json; expected a checkpoint in the layout of diffusers"
    )


def _read_config(file: Path, class_name: str) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text())
        found = values.pop("_class_name")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{file}: not a configuration of diffusers ({type(error).__name__}: {error})") from error
    if found != class_name:
        raise ValueError(f"{file}: a {found}; expected a {class_name}, as in Cosmos-Predict2")
    return {key: value for key, value in values.items() if not key.startswith("_")}


def _backbone_arguments(file: Path) -> dict[str, Any]:
    """Arguments of :class:`ProphetTransformer` that a ``CosmosTransformer3DModel`` configuration decides."""
    found = _read_config(file, "CosmosTransformer3DModel")
    defaults = inspect.signature(CosmosTransformer3DModel.__init__).parameters
    known = (*_SAME, *_FOREIGN, *_IDLE, "in_channels", "out_channels")
    values = {key: defaults[key].default for key in known if key in defaults} | found
    foreign = {key: values[key] for key in values if key in _FOREIGN or key not in known}
    foreign = {key: value for key, value in foreign.items() if value not in (None, False)}
    if foreign:
        raise ValueError(
            f"{file}: {foreign}, which Cosmos-Predict2 has not; expected Cosmos-Predict2-2B-Video2World or another "
            "size of it"
        )
    channels = values["in_channels"], values["out_channels"]
    if channels[0] != channels[1] + 1:
        raise ValueError(
            f"{file}: {channels[0]} input and {channels[1]} output channels; expected one more input, the mask of the "
            "start frame: use a Video2World checkpoint, not Text2Image"
        )
    patch = tuple(values["patch_size"])
    if patch[0] != 1 or patch[1] != patch[2]:
        raise ValueError(f"{file}: patch_size={patch}; expected (1, p, p)")
    arguments = {key: tuple(values[key]) if isinstance(values[key], list) else values[key] for key in _SAME}
    return {"latent_channels": channels[1], **arguments}


def _load_wan_vae(folder: Path, dtype: torch.dtype) -> AutoencoderKLWan:
    _read_config(folder / "config.json", "AutoencoderKLWan")
    list_tensors(folder)  # files that are missing, pickled or damaged are named here
    try:
        return load_network(AutoencoderKLWan, folder, dtype).eval()
    except Exception as error:  # diffusers raises many kinds
        raise ValueError(f"{folder}: cannot be loaded as an AutoencoderKLWan ({error})") from error
