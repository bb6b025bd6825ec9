"""Instructions for the denoiser's cross-attention: T5 embeddings, computed once and kept on disk.

Between a snapshot's instruction and :meth:`ProphetTransformer.condition`. The embedding of a text is the one that
diffusers' ``Cosmos2VideoToWorldPipeline`` computes for a prompt, except that

- the empty text is all zeros, which NVIDIA's action-conditioned model is fed for want of text. Keys and values have no
  bias, so that cross-attention adds exactly nothing: a world without text skips it. The pipeline embeds the end token;
- a text that does not fit is an error, where the pipeline cuts it.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..weights import locate_parts

__all__ = ["MAX_BYTES", "MAX_TOKENS", "TextEmbedder", "pack_instructions", "unpack_instructions"]

MAX_TOKENS = 512
"""L, rows of every embedding. Those after the text are zero but count in the softmax, so the base needs all of them."""
MAX_BYTES = 2048
"""Bytes of an instruction in a rollout state."""


class TextEmbedder:
    """A frozen T5 encoder behind a cache: one safetensors file per encoder and text.

    The cache is read first, and the encoder (with its tokenizer) is loaded when a text is not in it, then kept: where
    it is large, embed all instructions once and let other processes read. The encoder is known by ``source`` as it
    is written, ``revision`` and ``dtype``; empty the cache after putting other weights in the same place.

    Args:
        source: a folder with ``text_encoder/`` and ``tokenizer/`` inside, in the layout of diffusers, or a hub id
            ``owner/name``. Needs not exist while the cache has every text.
        cache: folder of the embeddings; made when the first is written.
        revision: branch, tag or commit on the hub.
        dtype: of the encoder and the embeddings.
        device: of the encoder; embeddings are on the CPU.
    """

    def __init__(
        self,
        source: str | Path,
        cache: str | Path,
        *,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.source, self.cache, self.revision = str(source), Path(cache), revision
        self.dtype, self.device = dtype, device
        self._parts: tuple[Any, Any] | None = None
        self._known: dict[str, Tensor] = {}

    def embed(self, texts: Sequence[str], dim: int) -> Tensor:
        """Return the embeddings (B, L, D) of B texts, zero after the last token of each.

        A text's embedding does not depend on the others.

        Args:
            texts: B instructions; an empty one gives zeros.
            dim: D, the width that the denoiser takes (its ``text_embed_dim``).

        Raises:
            ValueError: the encoder has another width, a text is too long, a cached file is damaged, or the encoder is
                needed and cannot be loaded or does not give finite numbers.
        """
        embedded = torch.zeros(len(texts), MAX_TOKENS, dim, dtype=self.dtype)
        for row, text in zip(embedded, texts, strict=True):
            if not text:
                continue
            if text not in self._known:
                self._known[text] = self._cached(text)
            tokens = self._known[text]
            if tokens.shape[1] != dim:
                raise ValueError(
                    f"{self.source}: embeddings of width {tokens.shape[1]}, the denoiser takes {dim}; expected the "
                    "text encoder of the denoiser's own base"
                )
            row[: len(tokens)] = tokens
        return embedded

    def _cached(self, text: str) -> Tensor:
        """The rows (number of tokens, D) of a text, from its file, which is written where it is missing."""
        about = {"source": self.source, "revision": self.revision or "", "dtype": str(self.dtype), "text": text}
        file = self.cache / f"{hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()}.safetensors"
        if not file.exists():
            tokens = self._computed(text)
            self.cache.mkdir(parents=True, exist_ok=True)
            temporary = file.with_name(f".{file.stem[:12]}.{uuid.uuid4().hex}")
            save_file({"embedding": tokens}, temporary, about)
            os.replace(temporary, file)
        try:
            with safe_open(file, framework="pt") as stored:
                found, tokens = stored.metadata(), stored.get_tensor("embedding").clone()
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: not a whole embedding ({error}); delete it to have it computed again") from error
        if found != about:
            raise ValueError(f"{file}: an embedding of {found}; expected {about}: delete it to have it computed again")
        return tokens

    @torch.no_grad()
    def _computed(self, text: str) -> Tensor:
        tokenizer, encoder = self._loaded()
        inputs = tokenizer([text], padding="max_length", max_length=MAX_TOKENS, return_tensors="pt")
        if inputs.input_ids.shape[1] > MAX_TOKENS:
            raise ValueError(
                f"instruction {text[:40]!r}... of {inputs.input_ids.shape[1]} tokens; expected at most {MAX_TOKENS}: "
                "shorten it"
            )
        mask = inputs.attention_mask.bool()
        hidden = encoder(inputs.input_ids.to(self.device), attention_mask=mask.to(self.device)).last_hidden_state
        tokens = hidden[0, : int(mask.sum())].to("cpu", self.dtype).contiguous()
        if not tokens.isfinite().all():
            raise ValueError(
                f"{self.source}: its embedding of {text!r} in {self.dtype} is not finite; use float32 or sound weights"
            )
        return tokens

    def _loaded(self) -> tuple[Any, Any]:
        """Tokenizer and encoder."""
        if self._parts is None:
            from transformers import T5EncoderModel, T5TokenizerFast

            try:
                folder = locate_parts(self.source, self.revision, ("text_encoder", "tokenizer"))
            except ValueError as error:
                raise ValueError(f"text encoder, needed since {self.cache} lacks a text: {error}") from error
            for name in ("text_encoder/config.json", "tokenizer/tokenizer.json"):
                if not (folder / name).is_file():  # without its file the tokenizer would be an empty one, in silence
                    raise ValueError(f"{folder}: no {name}; expected a T5 encoder in the layout of diffusers")
            try:
                tokenizer = T5TokenizerFast.from_pretrained(folder / "tokenizer")
                encoder, report = T5EncoderModel.from_pretrained(
                    folder / "text_encoder", dtype=self.dtype, use_safetensors=True, output_loading_info=True
                )
            except Exception as error:  # transformers raises many kinds
                raise ValueError(
                    f"{folder}: cannot be loaded as a T5 encoder and its tokenizer ({type(error).__name__}: {error})"
                ) from error
            bad = {kind: names for kind, names in report.items() if names}
            if bad:
                raise ValueError(f"{folder / 'text_encoder'}: keys do not fit T5EncoderModel: {bad}")
            self._parts = tokenizer, encoder.eval().to(self.device)
        return self._parts


def pack_instructions(instructions: Sequence[str]) -> Tensor:
    """Return B instructions as UTF-8 bytes with zeros after each, (B, 2048) uint8, for a rollout state.

    Raises:
        ValueError: one has more than ``MAX_BYTES`` bytes.
    """
    packed = torch.zeros(len(instructions), MAX_BYTES, dtype=torch.uint8)
    for row, instruction in zip(packed, instructions, strict=True):
        data = instruction.encode()
        if len(data) > MAX_BYTES:
            raise ValueError(
                f"instruction {instruction[:40]!r}... of {len(data)} bytes; expected at most {MAX_BYTES}: shorten it"
            )
        row[: len(data)] = torch.tensor(list(data), dtype=torch.uint8)
    return packed


def unpack_instructions(packed: Tensor) -> list[str]:
    """Inverse of :func:`pack_instructions`."""
    return [bytes(row.tolist()).rstrip(b"\0").decode() for row in packed]
