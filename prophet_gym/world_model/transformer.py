"""``ProphetTransformer``: the Cosmos-Predict2 denoiser with actions and history.

Backbone modules and key names are those of diffusers' ``CosmosTransformer3DModel``, so that its checkpoints load
strictly. What is new lives in ``scalar_actions``, ``action_frame_stream`` and ``memory``. Departures from the stock
forward: AdaLN is evaluated once a latent frame, not once a token; without text the cross-attention, which zero
embeddings turn into zero, is skipped; no torchvision is needed for the padding mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import FeedForward
from diffusers.models.embeddings import Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers.transformer_cosmos import (
    CosmosAdaLayerNorm,
    CosmosAdaLayerNormZero,
    CosmosEmbedding,
    CosmosPatchEmbed,
    CosmosRotaryPosEmbed,
)
from torch import Tensor, nn

from .conditioning import PooledActionFrames, ScalarActionStream, SpatialActionFrames
from .memory import HistoryMemory

BACKBONE = ("patch_embed", "time_embed", "transformer_blocks", "norm_out", "proj_out")
"""Children of :class:`ProphetTransformer` that Cosmos-Predict2 has; all its other parameters are new in Prophet."""


def is_backbone(name: str) -> bool:
    """Whether a child or a parameter of :class:`ProphetTransformer` belongs to the Cosmos-Predict2 backbone."""
    return name.partition(".")[0] in BACKBONE


@dataclass(frozen=True)
class ChunkCondition:
    """Everything the denoiser knows that does not change between denoising steps; computed once a chunk.

    Attributes:
        time: addition to the timestep embedding, (B, T or 1, D).
        modulation: addition to the AdaLN-LoRA vector, (B, T or 1, 3D).
        tokens: addition to the patch embedding, (B, T, h / p, w / p, D), or None.
        memory: K_mem and V_mem, each (B, heads, L, D / heads).
        text: keys and values of the text for every block, each (B, heads, L, D / heads), or None.
    """

    time: Tensor
    modulation: Tensor
    tokens: Tensor | None
    memory: tuple[Tensor, Tensor]
    text: tuple[tuple[Tensor, Tensor], ...] | None = None


class ProphetAttention(nn.Module):
    """Multi-head attention with RMS-normalised queries and keys; self-attention may read the memory as well."""

    def __init__(self, dim: int, context_dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, heads * head_dim, bias=False)
        self.to_k = nn.Linear(context_dim, heads * head_dim, bias=False)
        self.to_v = nn.Linear(context_dim, heads * head_dim, bias=False)
        self.norm_q = nn.RMSNorm(head_dim, eps=1e-6)
        self.norm_k = nn.RMSNorm(head_dim, eps=1e-6)
        self.to_out = nn.ModuleList([nn.Linear(heads * head_dim, dim, bias=False)])

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised keys, and values, of (B, L, context_dim): each (B, heads, L, head_dim)."""
        k = self.to_k(context).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        v = self.to_v(context).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return normalise(k, self.norm_k), v

    def forward(
        self,
        x: Tensor,
        keys_values: tuple[Tensor, Tensor] | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        memory: tuple[Tensor, Tensor] | None = None,
        memory_gate: float = 0.0,
    ) -> Tensor:
        """Attend from tokens (B, L, D) to ``keys_values`` (default: their own) and to the memory.

        With gate g the result is lerp(Attn(K), Attn([K_mem; K]), g); g = 0 and g = 1 cost one pass.
        """
        q = normalise(self.to_q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2), self.norm_q)
        k, v = self.keys_values(x) if keys_values is None else keys_values
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if memory is None or memory_gate == 0.0:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            k_mem, v_mem = (m.to(v.dtype) for m in memory)
            out = F.scaled_dot_product_attention(q, torch.cat([k_mem, k], dim=2), torch.cat([v_mem, v], dim=2))
            if memory_gate != 1.0:
                out = torch.lerp(F.scaled_dot_product_attention(q, k, v), out, memory_gate)
        return self.to_out[0](out.transpose(1, 2).flatten(2))


def normalise(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """RMS norm in the dtype of the input: under autocast the stock call mixes dtypes and leaves the fused kernel."""
    return F.rms_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of (B, heads, L, d) with tables (L, d); halves of the channels are paired, as in Cosmos."""
    a, b = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat([-b, a], dim=-1) * sin.to(x.dtype)


class ProphetBlock(nn.Module):
    """Self-attention with memory, cross-attention to text (optional), feed-forward; each modulated by AdaLN-LoRA."""

    def __init__(self, heads: int, head_dim: int, text_dim: int | None, mlp_ratio: float, adaln_dim: int) -> None:
        super().__init__()
        dim = heads * head_dim
        self.norm1 = CosmosAdaLayerNormZero(dim, adaln_dim)
        self.attn1 = ProphetAttention(dim, dim, heads, head_dim)
        if text_dim is not None:
            self.norm2 = CosmosAdaLayerNormZero(dim, adaln_dim)
            self.attn2 = ProphetAttention(dim, text_dim, heads, head_dim)
        self.norm3 = CosmosAdaLayerNormZero(dim, adaln_dim)
        self.ff = FeedForward(dim, mult=mlp_ratio, activation_fn="gelu", bias=False)

    def forward(
        self,
        x: Tensor,
        embedded_time: Tensor,
        modulation: Tensor,
        rotary: tuple[Tensor, Tensor],
        memory: tuple[Tensor, Tensor] | None,
        memory_gate: float,
        text: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """Map tokens (B, T, h * w, D) to the same shape; time embeddings are (B, T, 1, D) and (B, T, 1, 3D)."""
        grid = x.shape[1:3]
        normed, gate = self.norm1(x, embedded_time, modulation)
        attended = self.attn1(normed.flatten(1, 2), rotary=rotary, memory=memory, memory_gate=memory_gate)
        x = x + gate * attended.unflatten(1, grid)
        if text is not None:
            normed, gate = self.norm2(x, embedded_time, modulation)
            x = x + gate * self.attn2(normed.flatten(1, 2), text).unflatten(1, grid)
        normed, gate = self.norm3(x, embedded_time, modulation)
        return x + gate * self.ff(normed)


class ProphetTransformer(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Velocity network v(z_t, t | start frame, actions, history) over latent chunks.

    Args:
        latent_channels: channels z of the codec; the input has one more (the condition mask), plus the padding mask.
        num_attention_heads: heads of every attention.
        attention_head_dim: channels of a head; their product is D.
        num_layers: transformer blocks.
        mlp_ratio: hidden width of the feed-forward, in units of D.
        text_embed_dim: width of text embeddings, or None for a model without cross-attention.
        adaln_lora_dim: rank of the AdaLN-LoRA.
        max_size: largest latent grid (T, h, w).
        patch_size: (1, p, p).
        rope_scale: rotary extrapolation factors (t, h, w).
        concat_padding_mask: whether the input carries the all-zero padding mask of Cosmos.
        timestep_scale: factor on t in [0, 1] before its sinusoidal embedding (Cosmos-Predict2 uses 1).
        chunk_length: commands of a full chunk.
        num_effectors: end-effectors N of an action.
        scalar_hidden_dim: hidden width of the scalar stream.
        action_frames: "none", "pooled" (Eqs 10 and 11) or "spatial".
        action_frame_cells: cells a side of a latent position for "spatial".
        temporal_stride: frames of a latent frame.
        memory_levels: (newest, oldest, t, h, w): ages in latent frames and pooling strides of the history memory.
        memory_gate: weight g of the memory in self-attention. 0 keeps a pretrained backbone exact (attention to the
            memory dilutes the softmax even where the memory is zero), 1 is the paper's formula and costs one pass.
        residual: what is denoised inside is the difference from the start frame: a still scene is zero, not a picture
            to be drawn again. Latents and velocity outside are the same; there is one clean frame, the first.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ProphetBlock"]
    default_cells = 4

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        num_attention_heads: int = 16,
        attention_head_dim: int = 128,
        num_layers: int = 28,
        mlp_ratio: float = 4.0,
        text_embed_dim: int | None = 1024,
        adaln_lora_dim: int = 256,
        max_size: tuple[int, int, int] = (128, 240, 240),
        patch_size: tuple[int, int, int] = (1, 2, 2),
        rope_scale: tuple[float, float, float] = (1.0, 3.0, 3.0),
        concat_padding_mask: bool = True,
        timestep_scale: float = 1.0,
        chunk_length: int = 20,
        num_effectors: int = 2,
        scalar_hidden_dim: int = 8192,
        action_frames: str = "pooled",
        action_frame_cells: int = default_cells,
        temporal_stride: int = 4,
        memory_levels: tuple[tuple[int, ...], ...] = ((0, 1, 1, 2, 2), (1, 2, 1, 4, 4), (2, 15, 1, 8, 8)),
        memory_gate: float = 0.0,
        residual: bool = False,
    ) -> None:
        super().__init__()
        if action_frames not in ("none", "pooled", "spatial"):
            raise ValueError(f'action_frames={action_frames!r}: expected "none", "pooled" or "spatial"')
        dim = num_attention_heads * attention_head_dim
        patch_size = tuple(patch_size)
        self.patch_embed = CosmosPatchEmbed(latent_channels + 1 + int(concat_padding_mask), dim, patch_size, bias=False)
        self.rope = CosmosRotaryPosEmbed(attention_head_dim, max_size, patch_size, rope_scale=rope_scale)
        self.time_embed = CosmosEmbedding(dim, dim)
        self.time_embed.time_proj = Timesteps(dim, True, 0.0, scale=timestep_scale)
        self.transformer_blocks = nn.ModuleList(
            ProphetBlock(num_attention_heads, attention_head_dim, text_embed_dim, mlp_ratio, adaln_lora_dim)
            for _ in range(num_layers)
        )
        self.norm_out = CosmosAdaLayerNorm(dim, adaln_lora_dim)
        self.proj_out = nn.Linear(dim, patch_size[1] * patch_size[2] * latent_channels, bias=False)
        self.add_conditioning()
        self.gradient_checkpointing = False
        self._rotary: tuple[tuple[int, ...], tuple[Tensor, Tensor]] | None = None

    @classmethod
    def from_cosmos(cls, source: str | Path, **kwargs: Any) -> ProphetTransformer:
        """:func:`prophet_gym.world_model.cosmos.from_cosmos`: a Cosmos-Predict2 backbone and fresh conditioning."""
        from .cosmos import from_cosmos

        return from_cosmos(source, **kwargs)

    def add_conditioning(self) -> None:
        """Make what Prophet adds to the backbone, freshly initialised, in place of what is there."""
        config = self.config
        dim = config.num_attention_heads * config.attention_head_dim
        self.scalar_actions = ScalarActionStream(
            config.chunk_length, config.num_effectors, config.scalar_hidden_dim, dim
        )
        self.action_frame_stream: nn.Module | None = None
        if config.action_frames == "pooled":
            self.action_frame_stream = PooledActionFrames(config.latent_channels, dim)
        elif config.action_frames == "spatial":
            self.action_frame_stream = SpatialActionFrames(
                config.action_frame_cells, config.temporal_stride, config.patch_size, dim
            )
        self.memory = HistoryMemory(config.latent_channels, config.memory_levels, dim, config.num_attention_heads)

    def condition(
        self, actions: Tensor, action_frames: Tensor | None, history: Tensor, text: Tensor | None = None
    ) -> ChunkCondition:
        """Compute what does not change between denoising steps.

        Args:
            actions: canonical commands (B, C, N, 7), padded to ``chunk_length`` (open ratio -1 marks padding).
            action_frames: for "pooled" the codec's latents (B, z, T, h, w) of the drawn actions, for "spatial" the
                drawn actions (B, 3, 1 + 4 (T - 1), H, W) in [-1, 1]; None runs on the scalar stream alone.
            history: past latents (B, z, T_hist, h, w), oldest first.
            text: text embeddings (B, L, text_embed_dim), or None: cross-attention is skipped, as zeros would have it.
        """
        time, modulation = self.scalar_actions(actions)
        tokens = None
        if action_frames is not None and self.config.action_frames == "pooled":
            frame_time, frame_modulation = self.action_frame_stream(action_frames)
            time, modulation = time + frame_time, modulation + frame_modulation
        elif action_frames is not None and self.config.action_frames == "spatial":
            tokens = self.action_frame_stream(action_frames, tuple(history.shape[-2:]))
        keys_values = None
        if text is not None:
            keys_values = tuple(block.attn2.keys_values(text) for block in self.transformer_blocks)
        return ChunkCondition(time, modulation, tokens, self.memory(history), keys_values)

    def _rotary_tables(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (L, head_dim) for a latent grid; the last grid's are kept."""
        key = (*x.shape[2:], str(x.device))
        if self._rotary is None or self._rotary[0] != key:
            self._rotary = (key, self.rope(x))
        return self._rotary[1]

    def forward(self, latents: Tensor, condition_mask: Tensor, timestep: Tensor, condition: ChunkCondition) -> Tensor:
        """Predict the velocity eps - z_0, (B, z, T, h, w).

        Args:
            latents: z_t = (1 - t) z_0 + t eps, (B, z, T, h, w); clean where the condition mask is 1.
            condition_mask: 1 for clean latent frames, (B, 1, T, h, w).
            timestep: t in [0, 1] of every latent frame, (B, T).
            condition: from :meth:`condition`.
        """
        b, _, t, h, w = latents.shape
        still = latents[:, :, :1] * (1.0 - condition_mask).to(latents) if self.config.residual else None
        if still is not None:  # z_t - (1 - t) z_start = (1 - t) (z_0 - z_start) + t eps, whose velocity is v + z_start
            latents = latents - (1.0 - timestep).to(latents)[:, None, :, None, None] * still
        x = torch.cat([latents, condition_mask.to(latents)], dim=1)
        if self.config.concat_padding_mask:
            x = torch.cat([x, x.new_zeros(b, 1, t, h, w)], dim=1)
        rotary = self._rotary_tables(x)
        x = self.patch_embed(x)
        if condition.tokens is not None:
            x = x + condition.tokens
        grid = x.shape[1:4]
        x = x.flatten(2, 3)

        sinusoid = self.time_embed.time_proj(timestep.flatten()).to(x.dtype).unflatten(0, (b, t))
        embedded = self.time_embed.norm(sinusoid + condition.time)[:, :, None]
        modulation = (self.time_embed.t_embedder(sinusoid) + condition.modulation)[:, :, None]
        gate = float(self.config.memory_gate)
        for i, block in enumerate(self.transformer_blocks):
            text = None if condition.text is None else condition.text[i]
            inputs = (x, embedded, modulation, rotary, condition.memory, gate, text)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, *inputs)
            else:
                x = block(*inputs)
        x = self.proj_out(self.norm_out(x, embedded, modulation))
        p = self.config.patch_size[1]
        x = x.unflatten(2, grid[1:]).unflatten(-1, (p, p, -1))
        velocity = x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)
        return velocity if still is None else velocity - still
