"""Adapters: LoRA in the backbone, every new parameter in full, restored on a fresh base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_cosmos import OPTIONS, inputs, run, write_checkpoints

from prophet_gym.world_model import ProphetTransformer, from_cosmos
from prophet_gym.world_model.lora import add_lora, load_adapter, merge_adapter, new_parameters, save_adapter


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoints(tmp_path_factory.mktemp("cosmos"))


def trained(base: ProphetTransformer) -> ProphetTransformer:
    """A base with an adapter after optimiser steps, and with a bare parameter at the top and one in the memory."""
    bare(base)
    add_lora(base, rank=2, alpha=4)
    optimizer = torch.optim.AdamW([p for p in base.parameters() if p.requires_grad], lr=1e-2)
    data = inputs("pooled")
    for _ in range(3):
        condition = base.condition(data["actions"], data["drawn"], data["history"], data["text"])
        scale = 1 + base.gain.mean() + base.memory.gain.mean()
        loss = (scale * base(data["latents"], data["mask"], data["times"], condition)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return base


def bare(model: ProphetTransformer) -> ProphetTransformer:
    model.gain = torch.nn.Parameter(torch.zeros(3))
    model.memory.gain = torch.nn.Parameter(torch.zeros(3))
    return model


def test_adapter_round_trip_restores_every_trained_parameter(checkpoints: Path, tmp_path: Path) -> None:
    options = {**OPTIONS, "action_frames": "pooled", "memory_gate": 1.0}
    base = from_cosmos(checkpoints / "sharded", **options)
    untouched = {name: p.clone() for name, p in base.named_parameters()}
    model = trained(base)
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"gain", "memory.gain"} <= learns and set(new_parameters(model)) <= learns
    adapted = {name.partition(".lora_")[0] for name in learns if "lora_" in name}
    assert len(adapted) == 2 * (4 + 4 + 2) and all(name.startswith("transformer_blocks.") for name in adapted)
    for name, p in model.named_parameters():
        original = untouched.get(name.replace(".base_layer", ""))
        if name not in learns:
            assert torch.equal(p, original), f"{name} is frozen"
        elif original is not None:
            assert not torch.equal(p, original), f"{name} is trained in full"
    data = inputs("pooled")
    expected = run(model, data)
    assert (expected - run(from_cosmos(checkpoints / "sharded", **options), data)).abs().max() > 1e-3

    save_adapter(model, tmp_path / "adapter")
    restored = bare(from_cosmos(checkpoints / "sharded", seed=5, **options))
    load_adapter(restored, tmp_path / "adapter")
    torch.testing.assert_close(run(restored, data), expected, atol=1e-6, rtol=1e-6)
    loaded = dict(restored.named_parameters())
    for name, p in model.named_parameters():
        assert torch.equal(loaded[name], p) and loaded[name].requires_grad == p.requires_grad, name
    assert loaded["gain"].abs().sum() > 0 and loaded["memory.gain"].abs().sum() > 0
    files = {path.name: path.stat().st_size for path in (tmp_path / "adapter").iterdir()}
    assert set(files) == {"pytorch_lora_weights.safetensors", "new_parameters.safetensors"}
    with pytest.raises(ValueError, match="exists already"):
        save_adapter(model, tmp_path / "adapter")

    merge_adapter(restored)
    assert {name for name, _ in restored.named_parameters()} == {*untouched, "gain", "memory.gain"}
    torch.testing.assert_close(run(restored, data), expected, atol=1e-5, rtol=1e-5)


def test_adapters_that_do_not_fit_are_refused(checkpoints: Path, tmp_path: Path) -> None:
    def base(**options: object) -> ProphetTransformer:
        return from_cosmos(checkpoints / "single", **{**OPTIONS, "action_frames": "none", **options})

    model = base()
    with pytest.raises(ValueError, match="no adapter; expected"):
        save_adapter(model, tmp_path / "adapter")
    add_lora(model, rank=2)
    with pytest.raises(ValueError, match="adapter already"):
        add_lora(model)
    save_adapter(model, tmp_path / "adapter")
    lora, new = (tmp_path / "adapter" / f"{n}.safetensors" for n in ("pytorch_lora_weights", "new_parameters"))
    with pytest.raises(ValueError, match="expected a fresh base"):
        load_adapter(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"new_parameters.*action_frame_stream.*absent"):
        load_adapter(base(action_frames="pooled"), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"new_parameters.*scalar_actions.* expected \("):
        load_adapter(base(scalar_hidden_dim=8), tmp_path / "adapter")
    whole = lora.read_bytes()
    tensors = load_file(lora)
    with safe_open(lora, "pt") as opened:
        metadata = opened.metadata()
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, lora, metadata=metadata)
    with pytest.raises(ValueError, match=r"pytorch_lora_weights.*lora_A.weight absent"):
        load_adapter(base(), tmp_path / "adapter")
    lora.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="pytorch_lora_weights.safetensors: no whole"):
        load_adapter(base(), tmp_path / "adapter")
    lora.write_bytes(whole)
    new.unlink()
    with pytest.raises(ValueError, match=r"new_parameters.safetensors: no whole"):
        load_adapter(base(), tmp_path / "adapter")
