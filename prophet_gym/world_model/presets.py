"""The two sizes of the one architecture: keyword arguments of :class:`ProphetTransformer`."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # 6.3M parameters over the 32-channel latents of the folded VAE; 64x64 pixels are 16 tokens a latent frame.
    "tiny": {
        "latent_channels": 32,
        "num_attention_heads": 4,
        "attention_head_dim": 64,
        "num_layers": 6,
        "text_embed_dim": None,
        "adaln_lora_dim": 48,
        "max_size": (32, 64, 64),
        "rope_scale": (1.0, 1.0, 1.0),
        "concat_padding_mask": False,
        "timestep_scale": 1000.0,
        "num_effectors": 1,
        "scalar_hidden_dim": 256,
        "action_frames": "spatial",
        "memory_levels": ((0, 15, 15, 2, 2), (0, 15, 3, 4, 4), (0, 15, 1, 8, 8)),
        "memory_gate": 1.0,
    },
    # 2,057,668,608 parameters on Cosmos-Predict2-2B-Video2World and the Wan 2.1 VAE: the defaults of the class.
    "cosmos-2b": {},
}


def preset(name: str, **overrides: Any) -> dict[str, Any]:
    """Keyword arguments of a preset, with some replaced.

    Raises:
        ValueError: an unknown name.
    """
    if name not in PRESETS:
        raise ValueError(f"preset {name!r}: expected one of {sorted(PRESETS)}")
    return {**PRESETS[name], **overrides}
