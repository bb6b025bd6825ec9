"""The denoiser: the stock Cosmos network at initialisation, gradients everywhere, memory computed once."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.transformers import transformer_cosmos

from prophet_gym.training.world_model import start_from
from prophet_gym.world_model.conditioning import SpatialActionFrames
from prophet_gym.world_model.memory import HistoryMemory
from prophet_gym.world_model.presets import PRESETS, preset
from prophet_gym.world_model.transformer import ProphetTransformer

SMALL = {
    "latent_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "num_layers": 2,
    "text_embed_dim": 12,
    "adaln_lora_dim": 8,
    "max_size": (8, 16, 16),
    "scalar_hidden_dim": 16,
    "memory_levels": ((0, 1, 1, 2, 2), (0, 15, 5, 4, 4)),
    "memory_gate": 1.0,
}


def inputs(action_frames: str, batch: int = 2, frames: int = 6, size: int = 4, effectors: int = 2) -> dict:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    drawn = {
        "none": None,
        "pooled": randn(batch, 4, frames, size, size),
        "spatial": randn(batch, 3, 1 + 4 * (frames - 1), 8 * size, 8 * size),
    }[action_frames]
    mask = torch.zeros(batch, 1, frames, size, size)
    mask[:, :, 0] = 1
    times = torch.rand(batch, frames, generator=generator)
    times[:, 0] = 1e-4
    return {
        "latents": randn(batch, 4, frames, size, size),
        "mask": mask,
        "times": times,
        "actions": 0.1 * randn(batch, 20, effectors, 7),
        "drawn": drawn,
        "history": randn(batch, 4, 15, size, size),
        "text": randn(batch, 3, 12),
    }


def run(model: ProphetTransformer, data: dict, text: bool = True) -> torch.Tensor:
    condition = model.condition(data["actions"], data["drawn"], data["history"], data["text"] if text else None)
    return model(data["latents"], data["mask"], data["times"], condition)


@pytest.fixture
def stock(monkeypatch: pytest.MonkeyPatch) -> transformer_cosmos.CosmosTransformer3DModel:
    """diffusers' own network, with a padding mask that does not need torchvision."""
    functional = SimpleNamespace(resize=lambda x, size, interpolation: F.interpolate(x, size))
    fake = SimpleNamespace(functional=functional, InterpolationMode=SimpleNamespace(NEAREST="nearest"))
    monkeypatch.setattr(transformer_cosmos, "transforms", fake, raising=False)
    torch.manual_seed(3)
    return transformer_cosmos.CosmosTransformer3DModel(
        in_channels=5,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=24,
        num_layers=2,
        text_embed_dim=12,
        adaln_lora_dim=8,
        max_size=(8, 16, 16),
        rope_scale=(1.0, 3.0, 3.0),
        extra_pos_embed_type=None,
    ).eval()


@pytest.mark.parametrize("action_frames", ["none", "pooled", "spatial"])
def test_initialisation_is_the_stock_backbone(stock, action_frames: str) -> None:
    closed = {k: v for k, v in SMALL.items() if k != "memory_gate"}  # the default
    ours = ProphetTransformer(**closed, action_frames=action_frames).eval()
    missing, unexpected = ours.load_state_dict(stock.state_dict(), strict=False)
    assert not unexpected
    assert all(k.startswith(("scalar_actions", "action_frame_stream", "memory")) for k in missing)
    data = inputs(action_frames)
    theirs = stock(
        data["latents"],
        data["times"][:, None, :, None, None],
        data["text"],
        condition_mask=data["mask"],
        padding_mask=torch.zeros(1, 1, 32, 32),
        return_dict=False,
    )[0]
    torch.testing.assert_close(run(ours, data), theirs, atol=1e-5, rtol=1e-5)
    difference = []
    for gate in (0.5, 1.0):
        ours.register_to_config(memory_gate=gate)
        difference.append((run(ours, data) - theirs).abs().max())
    assert difference[1] > difference[0] > 1e-3, "the open gate lets the memory in"


def test_zero_text_equals_no_text() -> None:
    model = ProphetTransformer(**SMALL).eval()
    data = inputs("pooled")
    data["text"] = torch.zeros_like(data["text"])
    torch.testing.assert_close(run(model, data), run(model, data, text=False))


def test_cosmos_preset_has_the_papers_size() -> None:
    with torch.device("meta"):
        model = ProphetTransformer(**preset("cosmos-2b"))
    new = sum(p.numel() for n, p in model.named_parameters() if n.startswith(("scalar", "action_frame", "memory")))
    total = sum(p.numel() for p in model.parameters())
    assert (total, total - new) == (2_057_668_608, 1_956_413_440)


def test_unknown_preset_and_conditioning() -> None:
    with pytest.raises(ValueError, match="expected one of"):
        preset("huge")
    with pytest.raises(ValueError, match="pooled"):
        ProphetTransformer(**{**SMALL, "action_frames": "sideways"})


@pytest.mark.parametrize("action_frames", ["none", "pooled", "spatial"])
def test_every_parameter_gets_a_gradient_after_one_step(action_frames: str) -> None:
    torch.manual_seed(0)
    model = ProphetTransformer(**SMALL, action_frames=action_frames)
    data = inputs(action_frames)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):  # layers behind a zero-initialised one see their first gradient in the second step
        optimizer.zero_grad()
        run(model, data).square().mean().backward()
        optimizer.step()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without


def test_history_actions_and_drawings_all_matter() -> None:
    torch.manual_seed(0)
    model = ProphetTransformer(**SMALL, action_frames="spatial").eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
        data = inputs("spatial")
        before = run(model, data)
        for key in ("actions", "drawn", "history", "latents"):
            changed = {**data, key: data[key] + 0.5}
            assert (run(model, changed) - before).abs().max() > 1e-4, key


def test_condition_computed_once_equals_recomputed() -> None:
    model = ProphetTransformer(**SMALL).eval()
    data = inputs("pooled")
    once = model.condition(data["actions"], data["drawn"], data["history"], data["text"])
    with torch.no_grad():
        for t in (0.9, 0.3):
            times = torch.full_like(data["times"], t)
            cached = model(data["latents"], data["mask"], times, once)
            torch.testing.assert_close(cached, run(model, {**data, "times": times}), rtol=0, atol=0)


def test_gradient_checkpointing_changes_nothing() -> None:
    model = ProphetTransformer(**SMALL)
    data = inputs("pooled")
    run(model, data).square().mean().backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model.enable_gradient_checkpointing()
    run(model, data).square().mean().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, plain[name])


def test_spatial_action_frames_touch_their_own_token_alone() -> None:
    stream = SpatialActionFrames(cells=2, temporal_stride=4, patch_size=(1, 2, 2), dim=6)
    torch.nn.init.normal_(stream.proj.weight)
    frames = torch.zeros(1, 3, 9, 32, 48)
    dark = stream(frames, (4, 6))
    frames[0, :, 6, 17, 33] = 1.0  # frame 6 is in the second group of four, pixel (17, 33) in token row 1, column 2
    lit = (stream(frames, (4, 6)) != dark).any(-1)
    assert lit.nonzero().tolist() == [[0, 2, 1, 2]]
    with pytest.raises(ValueError, match="multiple"):
        stream(frames[..., :30], (4, 6))


def test_memory_has_the_planned_tokens_and_drops_nothing() -> None:
    levels = ((0, 1, 1, 2, 2), (1, 2, 1, 4, 4), (2, 15, 1, 8, 8))
    memory = HistoryMemory(4, levels, dim=12, num_heads=2)
    assert memory.tokens(torch.zeros(1, 4, 15, 32, 32)).shape == (1, 528, 12)
    history = torch.zeros(1, 4, 15, 30, 40)  # 240 x 320 pixels
    before = memory.tokens(history)
    history[0, :, 2, 29, 39] = 1.0
    assert (memory.tokens(history) != before).any(), "the last row and column count"
    memory.check(15, (8, 8))
    with pytest.raises(ValueError, match="15 latent frames"):
        memory.check(14, (8, 8))
    with pytest.raises(ValueError, match="pool 8x8 latent positions, a frame has 6x32"):
        memory.check(15, (6, 32))


def test_without_levels_nothing_is_remembered() -> None:
    torch.manual_seed(0)
    model = ProphetTransformer(**preset("tiny", num_layers=1, memory_levels=(), action_frames="none"))
    model.memory.check(15, (8, 8))
    actions, pasts = torch.randn(2, 20, 1, 7), [torch.randn(2, 32, 15, 8, 8) for _ in range(2)]
    latents, mask, times = torch.randn(2, 32, 3, 8, 8), torch.zeros(2, 1, 3, 8, 8), torch.full((2, 3), 0.5)
    out = [model(latents, mask, times, model.condition(actions, None, past)) for past in pasts]
    assert torch.isfinite(out[0]).all() and torch.equal(*out)
    out[0].square().mean().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


def test_tiny_preset_is_small() -> None:
    with torch.device("meta"):
        model = ProphetTransformer(**PRESETS["tiny"])
    assert sum(p.numel() for p in model.parameters()) < 7_000_000


def test_residual_denoises_differences_from_the_start_frame() -> None:
    torch.manual_seed(0)
    plain, residual = (ProphetTransformer(**preset("tiny", num_layers=2, residual=flag)) for flag in (False, True))
    residual.load_state_dict(plain.state_dict())
    start, chunk, noise = torch.randn(2, 32, 1, 8, 8), torch.randn(2, 32, 3, 8, 8), torch.randn(2, 32, 3, 8, 8)
    t = torch.tensor([0.3, 0.8])
    times = torch.cat([torch.zeros(2, 1), t[:, None].expand(-1, 3)], dim=1)
    mask = torch.zeros(2, 1, 4, 8, 8)
    mask[:, :, 0] = 1.0

    def noisy(clean: torch.Tensor) -> torch.Tensor:
        level = t.view(2, 1, 1, 1, 1)
        return torch.cat([start, (1 - level) * clean + level * noise], dim=2)

    actions, history = torch.randn(2, 20, 1, 7), torch.randn(2, 32, 15, 8, 8)
    of_differences = plain(noisy(chunk - start), mask, times, plain.condition(actions, None, history))
    of_latents = residual(noisy(chunk), mask, times, residual.condition(actions, None, history))
    torch.testing.assert_close(of_latents[:, :, 1:], (of_differences - start)[:, :, 1:], atol=1e-4, rtol=1e-4)
    assert (of_latents - plain(noisy(chunk), mask, times, plain.condition(actions, None, history))).abs().max() > 0.1


def test_a_checkpoint_that_draws_actions_starts_a_run_that_does_not(tmp_path: Path) -> None:
    drawing, plain = (
        ProphetTransformer(**preset("tiny", num_attention_heads=1, num_layers=1, action_frames=how))
        for how in ("spatial", "none")
    )
    drawing.save_pretrained(tmp_path / "transformer")
    start_from(plain, tmp_path)
    kept = {name: tensor for name, tensor in drawing.state_dict().items() if name in plain.state_dict()}
    assert len(kept) < len(drawing.state_dict())
    torch.testing.assert_close(plain.state_dict(), kept, rtol=0, atol=0)
    plain.save_pretrained(tmp_path / "plain" / "transformer")
    with pytest.raises(ValueError, match="another architecture"):
        start_from(drawing, tmp_path / "plain")
