"""Training end to end on a made-up data set: learns, resumes to the same bits, survives SIGKILL, refuses bad runs."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from killed import kill_at_checkpoint

from prophet_gym.action_frames import Camera
from prophet_gym.actions import ACTION_SPECS, integrate_poses
from prophet_gym.data.episode import Episode
from prophet_gym.data.folder import write_episode
from prophet_gym.training.chunks import ChunkSampler
from prophet_gym.training.clips import encode_clips, load_clips
from prophet_gym.training.config import WorldModelConfig
from prophet_gym.training.loop import LoopConfig
from prophet_gym.training.objective import velocity_loss
from prophet_gym.training.self_rollout import SelfRollout
from prophet_gym.training.vae import VAEConfig, train_vae
from prophet_gym.training.world_model import start_from, train_world_model
from prophet_gym.world_model.presets import preset
from prophet_gym.world_model.prophet import ProphetConfig, ProphetWorldModel
from prophet_gym.world_model.sampler import slot_noise
from prophet_gym.world_model.transformer import ProphetTransformer
from prophet_gym.world_model.video_vae import FoldedVideoVAE

SPEC = ACTION_SPECS["tabletop"]
TINY_LOOP = LoopConfig(
    steps=6, batch_size=2, warmup_steps=1, ema_decay=0.5, log_every=2, save_every=2, eval_every=0, mixed_precision="no"
)


def square_episode(index: int, steps: int = 24) -> Episode:
    """A white square that follows the commands, seen from above."""
    rng = np.random.default_rng(index)
    view = np.array([[1.0, 0, 0, 0], [0, -1, 0, 0], [0, 0, -1, 0.8], [0, 0, 0, 1]])
    camera = Camera(np.array([[90.0, 0, 31.5], [0, 90, 31.5], [0, 0, 1]]), view, 64, 64)
    actions = np.zeros((steps, 7), np.float32)
    actions[:, :2] = rng.uniform(-0.03, 0.03, (steps, 2))
    actions[:, 6] = 1.0
    start = np.eye(4)
    start[:3, 3] = 0, 0, 0.1
    path = np.concatenate([start[None, None], integrate_poses(start[None], SPEC.to_canonical(actions), SPEC)])
    pixels = 31.5 + 90 * path[:, 0, :2, 3] * [1, -1] / 0.7
    frames = np.full((steps + 1, 64, 64, 3), 90, np.uint8)
    for t, (u, v) in enumerate(pixels.round().astype(int)):
        frames[t, v - 4 : v + 5, u - 4 : u + 5] = 250
    return Episode(
        images=frames,
        actions=actions,
        action_spec=SPEC,
        instruction="move",
        fps=10.0,
        camera=camera,
        eef_pose=path,
        gripper=np.ones((steps + 1, 1)),
        labels={"block_px": pixels},
        name=f"episode_{index}",
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for i in range(3):
        write_episode(root / f"episode_{i}", square_episode(i))
    return root


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("codec") / "run" / "vae"
    torch.manual_seed(0)
    FoldedVideoVAE(latent_channels=8, channels=16, encoder_blocks=(1, 1), decoder_blocks=(1, 1)).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """accelerate keeps the first precision of a process; runs of this file differ in it."""
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture
def config(data: Path, vae_folder: Path, tmp_path: Path) -> WorldModelConfig:
    return WorldModelConfig(
        data=data,
        vae=vae_folder,
        run=tmp_path / "run",
        cache=tmp_path / "cache",
        num_attention_heads=1,
        num_layers=1,
        adaln_lora_dim=4,
        loop=TINY_LOOP,
    )


def weights(run: Path) -> dict[str, torch.Tensor]:
    saved = torch.load(run / "checkpoints" / "last.pt", weights_only=True)
    return {**saved["model"], **{f"ema {i}": p for i, p in enumerate(saved["ema"]["shadow_params"])}}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def test_codec_learns_and_is_saved_with_its_statistics(data: Path, tmp_path: Path) -> None:
    loop = replace(TINY_LOOP, steps=40, batch_size=3, learning_rate=5e-3, decay_fraction=0.2)
    run = tmp_path / "vae"
    metrics = train_vae(
        VAEConfig(data=data, validation=data, run=run, cache=tmp_path / "c", latent_channels=4, channels=16, loop=loop)
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.5 * losses[0]
    assert metrics["validation_psnr"] > 10
    codec = FoldedVideoVAE.from_pretrained(run / "vae")
    assert len(codec.config.latents_mean) == len(codec.config.latents_std) == 4
    assert list((run / "pictures").glob("*.png"))


def test_decoder_alone_can_be_trained_on(data: Path, vae_folder: Path, tmp_path: Path) -> None:
    """The encoder and its statistics stay, so that denoisers trained on its latents remain valid."""
    config = VAEConfig(
        data=data, validation=data, run=tmp_path / "run", cache=tmp_path / "c", init=vae_folder, decoder_only=True,
        difference_weight=1.0, loop=TINY_LOOP,
    )  # fmt: skip
    train_vae(config)
    before, after = (FoldedVideoVAE.from_pretrained(folder) for folder in (vae_folder, tmp_path / "run" / "vae"))
    assert after.config.latents_mean == before.config.latents_mean
    assert str(vae_folder) not in (tmp_path / "run" / "vae" / "config.json").read_text()  # no path of this machine
    for name, weight in before.half().float().state_dict().items():
        same = torch.equal(weight, after.float().state_dict()[name])
        assert same == name.startswith("encoder"), name
    with pytest.raises(ValueError, match="without init"):
        replace(config, init=None)


def test_clips_too_short_for_the_codecs_groups_are_refused(data: Path, tmp_path: Path) -> None:
    config = VAEConfig(data=data, validation=None, run=tmp_path / "run", cache=tmp_path / "c", groups=100)
    with pytest.raises(ValueError, match="expected at least 400 for groups=100"):
        train_vae(config)
    with pytest.raises(ValueError, match="groups=0"):
        replace(config, groups=0)


def test_a_start_of_the_other_parametrisation_is_said(
    config: WorldModelConfig, caplog: pytest.LogCaptureFixture
) -> None:
    once = replace(config, loop=replace(TINY_LOOP, steps=1), residual=True)
    train_world_model(once)
    onward = replace(once, run=config.run.parent / "onward", init=config.run / "prophet")
    train_world_model(onward)
    assert "residual" not in caplog.text
    train_world_model(replace(onward, run=config.run.parent / "other", residual=False))
    assert "residual=True, this run residual=False" in caplog.text


def test_world_model_run_leaves_a_loadable_checkpoint(config: WorldModelConfig) -> None:
    seen = []
    train_world_model(config, evaluate=lambda world, step: seen.append(step) or {"score": 1.0})
    world = ProphetWorldModel.from_pretrained(config.run / "prophet")
    episode = square_episode(0)
    frames, _ = world.predict(world.begin([episode.snapshot(0)], [0]), episode.canonical_actions[None, :8])
    assert frames.shape == (1, 8, 64, 64, 3)
    assert seen == [6]
    onward = replace(config, run=config.run.parent / "onward", init=config.run / "prophet")
    train_world_model(replace(onward, loop=replace(TINY_LOOP, steps=1, learning_rate=0.0)))
    first, second = (torch.load(r / "checkpoints" / "last.pt", weights_only=True) for r in (config.run, onward.run))
    start = [p.half() for p in first["ema"]["shadow_params"]]
    assert all(torch.equal(a, b.half()) for a, b in zip(start, second["model"].values(), strict=True))
    with pytest.raises(ValueError, match="another architecture"):
        train_world_model(replace(onward, run=config.run.parent / "other", num_layers=2))
    assert json.loads((config.run / "config.json").read_text())["loop"]["steps"] == 6


@pytest.mark.parametrize(("muon", "precision", "objective"), [(0.0, "no", "velocity"), (1e-3, "bf16", "energy")])
def test_resumed_run_has_the_same_bits(config: WorldModelConfig, tmp_path: Path, muon, precision, objective) -> None:
    loop = replace(TINY_LOOP, muon_learning_rate=muon, mixed_precision=precision)
    config = replace(config, loop=loop, objective=objective, num_inference_steps=1)
    train_world_model(config)
    halves = replace(config, run=tmp_path / "halves")

    class Stop(Exception):
        pass

    def stop(world: ProphetWorldModel, step: int) -> dict[str, float]:
        raise Stop

    # An evaluation that fails at step 4 stands for any crash: the checkpoint of step 4 is there.
    interrupted = replace(halves, loop=replace(loop, eval_every=4))
    with pytest.raises(Stop):
        train_world_model(interrupted, evaluate=stop)
    assert torch.load(halves.run / "checkpoints" / "last.pt", weights_only=True)["step"] == 4
    train_world_model(replace(interrupted, resume=True))
    assert_same(weights(halves.run), weights(config.run))


@pytest.mark.programs
def test_killed_run_resumes(config: WorldModelConfig, tmp_path: Path) -> None:
    """SIGKILL in mid-run, then --resume, through the command line."""
    run = tmp_path / "killed"
    command = [
        *(sys.executable, "-m", "prophet_gym.cli", "train", "world-model-smoke"),
        *("--data", str(config.data), "--vae", str(config.vae), "--run", str(run), "--cache", str(tmp_path / "c")),
        *("--num-attention-heads", "1", "--num-layers", "1", "--batch-size", "2", "--save-every", "2"),
    ]
    checkpoint = run / "checkpoints" / "last.pt"
    kill_at_checkpoint([*command, "--steps", "4000"], checkpoint)
    assert checkpoint.exists()
    step = torch.load(checkpoint, weights_only=True)["step"]
    stored = json.loads((run / "config.json").read_text())
    stored["loop"]["steps"] = step + 2  # a shorter run, so that the test ends: the stored settings must agree
    (run / "config.json").write_text(json.dumps(stored))
    done = subprocess.run([*command, "--steps", str(step + 2), "--resume"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.load(checkpoint, weights_only=True)["step"] == step + 2
    ProphetWorldModel.from_pretrained(run / "prophet")


def test_runs_are_not_overwritten(config: WorldModelConfig) -> None:
    train_world_model(config)
    with pytest.raises(ValueError, match="--resume"):
        train_world_model(config)
    with pytest.raises(ValueError, match="differs"):
        train_world_model(replace(config, motion_weight=2.0, resume=True))
    with pytest.raises(ValueError, match="nothing to resume"):
        train_world_model(replace(config, run=config.run.parent / "new", resume=True))


def test_non_finite_loss_stops_and_keeps_the_checkpoint(
    config: WorldModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prophet_gym.training import world_model

    def poisoned(model, transformer, batch, cfg, step):
        loss, numbers = velocity_loss(model, transformer, batch, cfg, step)
        return (loss * float("nan") if step == 3 else loss), numbers

    monkeypatch.setattr(world_model, "velocity_loss", poisoned)
    with pytest.raises(FloatingPointError, match="step 3"):
        train_world_model(config)
    assert torch.load(config.run / "checkpoints" / "last.pt", weights_only=True)["step"] == 2


def test_batches_depend_on_the_step_alone_and_history_is_as_in_rollout(sampler: ChunkSampler) -> None:
    clips, vae = sampler.clips, sampler.vae
    first, again = sampler(7, 4), sampler(7, 4)
    assert torch.equal(first.latents, again.latents) and torch.equal(first.actions, again.actions)

    batch = sampler.gather(np.array([1]), np.array([8]), 10, np.array([2]), np.array([1]))
    frames = torch.from_numpy(clips.frames[1].copy())
    assert batch.latents.shape[2] == 1 + 3
    clip = torch.cat([frames[8:19], frames[18:19].repeat(2, 1, 1, 1)])[None]
    video = (clip.float() / 127.5 - 1).permute(0, 4, 1, 2, 3)
    with torch.no_grad():
        torch.testing.assert_close(batch.latents, vae.encode(video), atol=0.05, rtol=0.01)  # bf16 encoding, fp16 store
        # A rollout that began at frame 2: one complete group, frames 3 to 6, and frames 7 and 8 waiting.
        past = torch.cat([frames[2:3].repeat(56, 1, 1, 1), frames[3:7]])[None]
        history = vae.encode((past.float() / 127.5 - 1).permute(0, 4, 1, 2, 3)[:, :, [0, *range(60)]])[:, :, 1:]
        torch.testing.assert_close(batch.history, history, atol=0.05, rtol=0.01)
    world = ProphetWorldModel(
        ProphetTransformer(**preset("tiny", latent_channels=8, num_layers=1)), vae, ProphetConfig(action_spec=SPEC)
    )
    episode = square_episode(1)
    state = world.begin([episode.snapshot(8)], [0])
    poses = integrate_poses(episode.eef_pose[8], episode.canonical_actions[8:18], SPEC)[None]
    padded, drawn = world.chunk_inputs(
        torch.zeros(1), episode.canonical_actions[None, 8:18], poses, replace(state, poses=state.poses)
    )
    assert torch.equal(padded, batch.actions)
    small = F.avg_pool2d(drawn[0].transpose(0, 1), 2).transpose(0, 1)[None]
    torch.testing.assert_close(batch.action_frames, small, atol=1.5 / 127.5, rtol=0)
    padded = batch.actions[0, 10:, 0]
    assert (padded[:, :6] == 0).all() and (padded[:, 6] == -1).all()


def test_deeper_checkpoint_starts_a_shallower_run(tmp_path: Path) -> None:
    deep, shallow = (ProphetTransformer(**preset("tiny", num_attention_heads=1, num_layers=n)) for n in (4, 3))
    deep.save_pretrained(tmp_path / "transformer")
    start_from(shallow, tmp_path)
    for block, source in zip(shallow.transformer_blocks, (0, 2, 3), strict=True):  # 1.5 rounds to even
        assert_same(block.state_dict(), deep.transformer_blocks[source].state_dict())
    assert torch.equal(shallow.proj_out.weight, deep.proj_out.weight)


@pytest.fixture
def sampler(config: WorldModelConfig, tmp_path: Path) -> ChunkSampler:
    clips = load_clips(config.data, tmp_path / "clips", drawn_size=(32, 32))
    vae = FoldedVideoVAE.from_pretrained(config.vae)
    latents = encode_clips(vae, clips, tmp_path / "latents")
    return ChunkSampler(clips, latents, config, chunk_length=20, history=60, vae=vae)


def test_coverage_lies_around_the_hand_and_where_the_object_starts(sampler: ChunkSampler) -> None:
    where = np.array([2]), np.array([4]), 6, np.array([0]), np.array([1])
    hand, away = sampler.clips.effector_px[2, :, 0], np.full_like(sampler.clips.object_px, 3.5)
    np.testing.assert_allclose(hand, sampler.clips.object_px[2, :, 0], atol=1e-3)  # the square follows the hand
    grid = torch.arange(8) * 8 + 3.5  # centres of the latent positions in pixels
    sampler.clips = replace(sampler.clips, object_px=np.full_like(away, np.nan))
    alone = sampler.gather(*where).coverage
    assert alone.shape == (1, 2, 8, 8) and alone.max() <= 1
    for group, frames in enumerate(([5, 6, 7, 8], [9, 10, 10, 10])):  # after the clip the hand holds still
        share = alone[0, group] / alone[0, group].sum()
        found = float((share.sum(dim=0) * grid).sum()), float((share.sum(dim=1) * grid).sum())
        assert found == pytest.approx(tuple(hand[frames].mean(axis=0)), abs=1.0)
    sampler.clips = replace(sampler.clips, object_px=away)
    both = sampler.gather(*where).coverage
    assert (both[:, :, 0, 0] == 1).all() and (alone[:, :, 0, 0] == 0).all()
    assert torch.equal(both[:, :, 2:, 2:], alone[:, :, 2:, 2:])


def test_presence_lies_where_the_objects_truly_are(sampler: ChunkSampler) -> None:
    where = np.array([2]), np.array([4]), 6, np.array([0]), np.array([1])
    path = np.full_like(sampler.clips.object_px, np.nan)
    path[:, :7, 0], path[:, 7:, 0] = 3.5, (59.5, 35.5)  # jumps within the first group, frames 5 to 8
    sampler.clips = replace(sampler.clips, object_px=path)
    batch = sampler.gather(*where)
    assert batch.presence.shape == (1, 2, 8, 8) and batch.presence.max() <= 1
    assert batch.presence[0, 0, 0, 0] == batch.presence[0, 0, 4, 7] == 0.5  # two of four frames in each place
    assert batch.presence[0, 1, 0, 0] == 0 and batch.presence[0, 1, 4, 7] == 1


def test_draws_and_weights_do_not_know_the_outcome_by_default(sampler: ChunkSampler, config: WorldModelConfig) -> None:
    """Else a model that cannot tell what will happen imagines what was favoured."""
    clips = sampler.clips
    start, length = 2, 12
    other = clips.object_px.copy()
    other[:, start + 1 :] = 500.0  # flung out of the picture
    where = np.arange(3), np.full(3, start), length, np.zeros(3, int), np.zeros(3, int)
    changed = ChunkSampler(
        replace(clips, object_px=other), sampler.latents, config, chunk_length=20, history=60, vae=sampler.vae
    )
    assert torch.equal(changed.gather(*where).coverage, sampler.gather(*where).coverage)
    assert [row for row in changed.eventful.tolist() if row[1] == start] == [[0, start], [1, start], [2, start]]
    far = ChunkSampler(
        replace(clips, object_px=other + 200), sampler.latents, config, chunk_length=20, history=60, vae=sampler.vae
    )
    assert len(far.eventful) == 0
    assert far(0, 4).latents.shape[0] == 4  # drawn from everywhere then


def test_training_rollout_is_the_rollout_of_the_world_model(sampler: ChunkSampler, config: WorldModelConfig) -> None:
    """The start latent and the history it hands on are those that ``predict`` leaves in the rollout state."""
    torch.manual_seed(1)
    shape = preset("tiny", latent_channels=8, num_attention_heads=1, num_layers=1)
    transformer = ProphetTransformer(**shape)
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.3)
    config = replace(config, num_inference_steps=1)
    rollout = SelfRollout(sampler, transformer, sampler.vae, config)
    batch = sampler.gather(np.array([1]), np.array([0]), 12, np.array([0]), np.array([0]))
    world = ProphetWorldModel(transformer, sampler.vae, ProphetConfig(action_spec=SPEC, num_inference_steps=1))
    episode = square_episode(1)
    state = world.begin([episode.snapshot(0)], [0])
    noise = slot_noise(state.seeds, state.env_step, (8, 3, 8, 8))
    batch = replace(batch, latents=torch.cat([world.codec.encode(state.frames[:, None]), batch.latents[:, :, 1:]], 2))
    batch = replace(batch, history=state.history)
    with torch.no_grad():
        start, history = rollout.advance(batch, noise)
        _, after = world.predict(state, episode.canonical_actions[None, :12])
    # Drawn action frames are stored as averaged bytes, so latents differ by a little; a grey level is about 0.02.
    torch.testing.assert_close(start, world.codec.encode(after.frames[:, None]), atol=0.05, rtol=0.05)
    torch.testing.assert_close(history, after.history, atol=0.05, rtol=0.05)


def test_training_rollout_keeps_the_recorded_target(sampler: ChunkSampler, config: WorldModelConfig) -> None:
    transformer = ProphetTransformer(**preset("tiny", latent_channels=8, num_attention_heads=1, num_layers=1))
    rollout = SelfRollout(sampler, transformer, sampler.vae, replace(config, self_rollout=1.0, num_inference_steps=1))
    due = [rollout.due(step) for step in range(config.loop.steps)]
    assert not due[0] and all(due[2:])  # grows over the first fifth of six steps
    for step in range(6):
        batch, again = rollout(step, 2), rollout(step, 2)
        assert torch.equal(batch.latents, again.latents) and torch.equal(batch.history, again.history)
        assert batch.latents.shape[2] == 1 + batch.coverage.shape[1]
        stored = torch.from_numpy(np.array(sampler.latents.group)).float().flatten(0, 1)
        target = batch.latents[0, :, 1]
        if batch.actions[0, 3, 0, 6] >= 0:  # at least one complete group
            assert (stored - target).abs().amax(dim=(1, 2, 3)).min() == 0
        start = batch.latents[0, :, 0]
        singles = torch.from_numpy(np.array(sampler.latents.single)).float().flatten(0, 1)
        assert (singles - start).abs().amax(dim=(1, 2, 3)).min() > 0.05  # imagined, not recorded
