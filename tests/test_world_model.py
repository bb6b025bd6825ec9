"""`ProphetWorldModel`: rollouts, slots, history, checkpoints, errors."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan

from prophet_gym.action_frames import Camera
from prophet_gym.actions import ACTION_SPECS
from prophet_gym.snapshot import Snapshot, SnapshotSet
from prophet_gym.world_model.prophet import ProphetConfig, ProphetWorldModel
from prophet_gym.world_model.sampler import flow_schedule, integrate, karras_schedule, slot_noise
from prophet_gym.world_model.state import RolloutState, WorldModel
from prophet_gym.world_model.transformer import ProphetTransformer


@pytest.fixture(scope="module")
def world(tiny_checkpoint: Path) -> ProphetWorldModel:
    return ProphetWorldModel.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="module")
def starts(tiny_checkpoint: Path) -> list:
    return list(SnapshotSet.load(tiny_checkpoint / "snapshots"))


def commands(batch: int, length: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    actions = rng.uniform(-0.03, 0.03, (batch, length, 1, 7)).astype(np.float32)
    actions[..., 6] = rng.uniform(0, 1, (batch, length, 1))
    return actions


def equal(a: RolloutState, b: RolloutState) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return all(torch.equal(first[k].nan_to_num(), second[k].nan_to_num()) for k in first)


def test_follows_the_protocol(world) -> None:
    assert isinstance(world, WorldModel)


@pytest.mark.parametrize("length", range(1, 21))
def test_every_chunk_length(world, starts, length: int) -> None:
    state = world.begin(starts[:2], [1, 2])
    frames, after = world.predict(state, commands(2, length))
    assert frames.shape == (2, length, 48, 48, 3) and frames.dtype == np.uint8
    assert torch.equal(after.frames, torch.from_numpy(frames[:, -1]))
    assert after.tail_count.tolist() == [length % 4] * 2


def test_slot_equals_lone_rollout(world, starts) -> None:
    actions = commands(3, 13)
    together, _ = world.predict(world.begin(starts[:3], [5, 6, 7]), actions)
    for i in range(3):
        alone, _ = world.predict(world.begin([starts[i]], [5 + i]), actions[i : i + 1])
        assert np.abs(alone[0].astype(int) - together[i]).max() <= 1


def test_noise_depends_on_seed_and_env_step_alone() -> None:
    steps = torch.tensor([0, 0, 1])
    noise = slot_noise(torch.tensor([3, 4, 3]), steps, (2, 5))
    assert torch.equal(noise[:1], slot_noise(torch.tensor([3]), steps[:1], (2, 5)))
    assert not torch.equal(noise[0], noise[1]) and not torch.equal(noise[0], noise[2])


def test_predict_leaves_its_state_alone_and_restores_to_the_byte(world, starts) -> None:
    state = world.begin(starts[:2], [1, 2])
    _, state = world.predict(state, commands(2, 6))
    saved = RolloutState.from_state_dict(state.state_dict())
    first, after = world.predict(state, commands(2, 9, seed=1))
    assert equal(state, saved)
    again, after_again = world.predict(saved, commands(2, 9, seed=1))
    assert np.array_equal(first, again) and equal(after, after_again)


def test_select_fork_put(world, starts) -> None:
    state = world.begin(starts[:3], [1, 2, 3])
    assert state.fork(2).seeds.tolist() == [1, 1, 2, 2, 3, 3]
    assert state.select([2, 0]).seeds.tolist() == [3, 1]
    assert state.select(np.array([True, False, True])).seeds.tolist() == [1, 3]
    other = world.begin(starts[3:], [9])
    assert state.put([1], other).seeds.tolist() == [1, 9, 3] and state.seeds.tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="expected equal numbers"):
        state.put([0, 1], other)
    with pytest.raises(ValueError, match="at least 1"):
        state.fork(0)
    with pytest.raises(ValueError, match="missing"):
        RolloutState.from_state_dict({"frames": state.frames})


def test_history_holds_complete_groups_of_returned_frames(world, starts) -> None:
    """Chunks of 6 and 7 commands leave 13 frames: three groups of four in the history, one frame waiting."""
    state = world.begin(starts[:1], [1])
    first, state = world.predict(state, commands(1, 6))
    second, state = world.predict(state, commands(1, 7, seed=1))
    video = torch.from_numpy(np.concatenate([starts[0].image[None], first[0], second[0]]))[None]
    groups = world.codec.encode(video[:, :13])[:, :, 2:]  # frames 5 to 8 and 9 to 12, re-encoded where misaligned
    torch.testing.assert_close(state.history[:, :, -2:], groups, atol=1e-5, rtol=1e-5)
    assert state.tail_count.tolist() == [1]
    assert torch.equal(state.tail[0, 0], video[0, 12]) and torch.equal(state.tail[0, 1], video[0, 13])


def test_history_of_slots_with_different_waiting_frames(world, starts) -> None:
    together = world.begin(starts[:2], [1, 2])
    _, one = world.predict(together.select([0]), commands(1, 3))
    mixed = together.put([0], one)
    _, after = world.predict(mixed, commands(2, 6))
    assert after.tail_count.tolist() == [1, 2]
    for slot in range(2):
        _, lone = world.predict(mixed.select([slot]), commands(2, 6)[slot : slot + 1])
        torch.testing.assert_close(after.history[slot], lone.history[0], atol=5e-3, rtol=1e-3)  # one grey level
        assert (after.tail[slot].int() - lone.tail[0].int()).abs().max() <= 1


def test_history_length_is_constant(world, starts) -> None:
    state = world.begin(starts[:1], [1])
    shapes = set()
    for i in range(4):
        _, state = world.predict(state, commands(1, 20, seed=i))
        shapes.add(tuple(state.history.shape))
    assert len(shapes) == 1


def test_pose_integration_matches_the_action_spec(world, starts) -> None:
    state = world.begin(starts[:1], [1])
    actions = np.zeros((1, 2, 1, 7), np.float32)
    actions[0, :, 0, 0] = 0.01
    actions[..., 6] = 0.25
    _, after = world.predict(state, actions)
    moved = after.poses[0, 0, :3, 3] - state.poses[0, 0, :3, 3]
    np.testing.assert_allclose(moved, [0.02, 0, 0], atol=1e-6)
    assert after.gripper.tolist() == [[0.25]]


@pytest.mark.parametrize("steps", [1, 3])
def test_steps_cost_exactly_their_number_of_evaluations(world, starts, steps: int) -> None:
    calls = []
    handle = world.transformer.register_forward_hook(lambda *_: calls.append(1))
    world.predict(world.begin(starts[:1], [0]), commands(1, 4), num_inference_steps=steps)
    handle.remove()
    assert len(calls) == steps


def test_schedules_and_solvers() -> None:
    assert flow_schedule(4) == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])
    shifted = flow_schedule(4, shift=3.0)
    assert shifted[0] == 1.0 and shifted[-1] == 0.0 and shifted[2] == pytest.approx(0.75)
    sigma = karras_schedule(35)
    assert len(sigma) == 36 and sigma[0] == pytest.approx(80 / 81) and sigma[-2] == pytest.approx(0.002, rel=1e-2)
    # dz/dt = z has z(0) = z(1) / e; the second-order solver is closer with as many evaluations.
    start = torch.ones(1, dtype=torch.float64)
    exact = start * np.exp(-1.0)
    times = flow_schedule(16)
    euler = (integrate(lambda z, t: z, start, times) - exact).abs()
    second = (integrate(lambda z, t: z, start, times, "ab2") - exact).abs()
    assert second < euler / 5
    with pytest.raises(ValueError, match="at least 1"):
        flow_schedule(0)
    with pytest.raises(ValueError, match="ab2"):
        integrate(lambda z, t: z, start, times, "rk4")


def test_save_and_load_give_the_same_frames(world, starts, tmp_path: Path) -> None:
    world.save_pretrained(tmp_path / "copy")
    loaded = ProphetWorldModel.from_pretrained(tmp_path / "copy")
    actions = commands(1, 8)
    a, _ = world.predict(world.begin(starts[:1], [0]), actions)
    b, _ = loaded.predict(loaded.begin(starts[:1], [0]), actions)
    assert np.array_equal(a, b)
    assert loaded.config == world.config


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_close_to_single(world, starts, tiny_checkpoint: Path, dtype: torch.dtype) -> None:
    low = ProphetWorldModel.from_pretrained(tiny_checkpoint, dtype=dtype)
    actions = commands(1, 8)
    exact, _ = world.predict(world.begin(starts[:1], [0]), actions)
    frames, _ = low.predict(low.begin(starts[:1], [0]), actions)
    assert np.abs(frames.astype(float) - exact).mean() < 0.5


def test_bad_actions(world, starts) -> None:
    state = world.begin(starts[:1], [0])
    with pytest.raises(ValueError, match=r"expected \(B=1, C, N=1, 7\)"):
        world.predict(state, np.zeros((1, 4, 6), np.float32))
    with pytest.raises(ValueError, match="1 to 20"):
        world.predict(state, commands(1, 21))
    with pytest.raises(ValueError, match="at least 1"):
        world.predict(state, commands(1, 4), num_inference_steps=0)
    with pytest.raises(ValueError, match="to_canonical"):
        world.predict(state, -np.ones((1, 2, 1, 7), np.float32))
    with pytest.raises(ValueError, match="NaN"):
        world.predict(state, np.full((1, 2, 1, 7), np.nan, np.float32))


def test_bad_snapshots(world, starts) -> None:
    with pytest.raises(ValueError, match="as many"):
        world.begin(starts[:2], [0])
    for seed in (-1, 2**63):
        with pytest.raises(ValueError, match=rf"begin: seed {seed}; expected integers from 0"):
            world.begin(starts[:2], [0, seed])
    with pytest.raises(ValueError, match="no camera"):
        world.begin([replace(starts[0], camera=None)], [0])
    large = replace(starts[0], image=np.zeros((64, 64, 3), np.uint8), camera=starts[0].camera.resized(64, 64))
    with pytest.raises(ValueError, match="48x48"):
        world.begin([large], [0])
    two = replace(starts[0], eef_pose=np.tile(np.eye(4), (2, 1, 1)), gripper=np.ones(2))
    with pytest.raises(ValueError, match="2 end-effectors"):
        world.begin([two], [0])


@pytest.mark.parametrize("damage", ["missing", "truncated", "foreign", "unknown key", "missing key", "no json"])
def test_damaged_checkpoints(tiny_checkpoint: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(tiny_checkpoint, folder)
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    if damage == "missing":
        weights.unlink()
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "foreign":
        shutil.copy(folder / "vae" / "diffusion_pytorch_model.safetensors", weights)
    elif damage == "unknown key":
        values = json.loads((folder / "prophet.json").read_text())
        (folder / "prophet.json").write_text(json.dumps({**values, "colour": "red"}))
    elif damage == "missing key":
        values = json.loads((folder / "prophet.json").read_text())
        values.pop("action_spec")
        (folder / "prophet.json").write_text(json.dumps(values))
    else:
        (folder / "prophet.json").unlink()
    with pytest.raises(ValueError, match="broken"):
        ProphetWorldModel.from_pretrained(folder)


def test_config_validation() -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        ProphetConfig(history_frames=58)
    with pytest.raises(ValueError, match="karras"):
        ProphetConfig(schedule="cosine")
    with pytest.raises(ValueError, match="16"):
        ProphetConfig(image_size=(60, 64))
    with pytest.raises(ValueError, match="ab2"):
        ProphetConfig(solver="heun")


def test_wan_codec_runs_the_same_rollout(tmp_path: Path) -> None:
    """The large preset's codec at tiny size: predict, a misaligned chunk, save and load."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.1] * 4, latents_std=[2.0] * 4
    )
    transformer = ProphetTransformer(
        latent_channels=4,
        num_attention_heads=2,
        attention_head_dim=24,
        num_layers=1,
        text_embed_dim=None,
        adaln_lora_dim=4,
        max_size=(8, 16, 16),
        scalar_hidden_dim=8,
        action_frames="pooled",
        memory_levels=((0, 1, 1, 2, 2), (1, 2, 1, 4, 4)),
    )
    config = ProphetConfig(
        image_size=(32, 48), history_frames=8, schedule="karras", solver="ab2", action_spec=ACTION_SPECS["tabletop"]
    )
    world = ProphetWorldModel(transformer.eval(), vae.eval(), config)
    view = np.eye(4)
    view[2, 3] = 0.6  # the camera looks along +z from 0.6 m
    camera = Camera(np.array([[40.0, 0, 23.5], [0, 40, 15.5], [0, 0, 1]]), view, 48, 32)
    start = Snapshot(np.full((32, 48, 3), 90, np.uint8), "push", np.eye(4)[None], np.ones(1), camera)
    state = world.begin([start], [0])
    first, state = world.predict(state, commands(1, 5))
    second, after = world.predict(state, commands(1, 6, seed=1))
    assert first.shape == (1, 5, 32, 48, 3) and second.shape == (1, 6, 32, 48, 3)
    assert after.tail_count.tolist() == [3]
    world.save_pretrained(tmp_path / "wan")
    again, _ = ProphetWorldModel.from_pretrained(tmp_path / "wan").predict(state, commands(1, 6, seed=1))
    assert np.array_equal(second, again)
