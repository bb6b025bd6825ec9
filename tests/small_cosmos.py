"""Small random Cosmos-Predict2 checkpoints in the layout of diffusers, written by diffusers, and what runs on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan, CosmosTransformer3DModel

from prophet_gym.action_frames import Camera
from prophet_gym.snapshot import Snapshot
from prophet_gym.world_model import ProphetTransformer

SMALL = {
    "in_channels": 5,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "num_layers": 2,
    "text_embed_dim": 12,
    "adaln_lora_dim": 8,
    "max_size": (8, 16, 16),
    "rope_scale": (1.0, 3.0, 3.0),
    "extra_pos_embed_type": None,
}
OPTIONS = {"scalar_hidden_dim": 16, "memory_levels": ((0, 1, 1, 2, 2), (0, 2, 1, 4, 4))}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def small_transformer() -> CosmosTransformer3DModel:
    """diffusers' own network."""
    torch.manual_seed(3)
    return CosmosTransformer3DModel(**SMALL).eval()


def write_checkpoints(root: Path) -> Path:
    """``sharded`` is a pipeline's folder with transformer and VAE, ``single`` the same transformer in one file."""
    stock = small_transformer()
    stock.save_pretrained(root / "sharded" / "transformer", max_shard_size="150KB")
    stock.save_pretrained(root / "single")
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.1] * 4, latents_std=[2.0] * 4
    )
    vae.save_pretrained(root / "sharded" / "vae")
    (root / "sharded" / "model_index.json").write_text('{"_class_name": "Cosmos2VideoToWorldPipeline"}')
    return root


def inputs(action_frames: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    drawn = {"none": None, "pooled": randn(2, 4, 6, 4, 4), "spatial": randn(2, 3, 21, 32, 32)}[action_frames]
    mask = torch.zeros(2, 1, 6, 4, 4, dtype=dtype)
    mask[:, :, 0] = 1
    times = torch.rand(2, 6, generator=generator)
    times[:, 0] = 1e-4
    return {
        "latents": randn(2, 4, 6, 4, 4),
        "mask": mask,
        "times": times,
        "actions": 0.1 * randn(2, 20, 2, 7),
        "drawn": drawn,
        "history": randn(2, 4, 15, 4, 4),
        "text": randn(2, 3, 12),
    }


@torch.no_grad()
def run(model: ProphetTransformer, data: dict) -> torch.Tensor:
    condition = model.condition(data["actions"], data["drawn"], data["history"], data["text"])
    return model(data["latents"], data["mask"], data["times"], condition)


def first_image(height: int = 32, width: int = 48) -> Snapshot:
    view = np.eye(4)
    view[2, 3] = 0.6  # the camera looks along +z from 0.6 m
    camera = Camera(np.array([[40.0, 0, width / 2], [0, 40, height / 2], [0, 0, 1]]), view, width, height)
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Snapshot(image, "push", np.eye(4)[None], np.ones(1), camera)
