"""Adaptation end to end on tiny bases: an environment that steps, resumes, stops, and says what it is."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKLWan
from small_cosmos import OPTIONS, write_checkpoints

from prophet_gym.action_frames import Camera
from prophet_gym.actions import ActionSpec, integrate_poses
from prophet_gym.cli import main
from prophet_gym.data.episode import Episode
from prophet_gym.data.folder import write_episode
from prophet_gym.snapshot import SnapshotSet
from prophet_gym.training import adapt as adapt_module
from prophet_gym.training.adapt import adapt, memory_gate
from prophet_gym.training.adapt_config import AdaptConfig
from prophet_gym.training.chunks import ChunkSampler
from prophet_gym.training.clips import ClipSource, encode_clips, load_clips
from prophet_gym.training.config import ObjectiveConfig
from prophet_gym.training.loop import LoopConfig
from prophet_gym.world_model import ProphetWorldModel, world_from_cosmos
from prophet_gym.world_model.codec import VideoCodec
from prophet_gym.world_model.lora import load_adapter, merge_adapter

SPEC = ActionSpec(delta="servo", rotation="axis_angle", gripper="closed_ratio", control_hz=7.0)
VIEW = np.array([[1.0, 0, 0, 0], [0, -1, 0, 0], [0, 0, -1, 0.8], [0, 0, 0, 1]])
CAMERA = Camera(np.array([[90.0, 0, 47.5], [0, 90, 31.5], [0, 0, 1]]), VIEW, 96, 64)
LOOP = LoopConfig(
    steps=4, batch_size=2, warmup_steps=1, ema_decay=0.5, learning_rate=3e-3, log_every=1, save_every=1, eval_every=2,
    mixed_precision="no",
)  # fmt: skip


def square(index: int, steps: int) -> Episode:
    """A square that follows the commands, in images wider than those of the base."""
    rng = np.random.default_rng(index)
    actions = np.zeros((steps, 7), np.float32)
    actions[:, :2] = rng.uniform(-0.03, 0.03, (steps, 2))
    start = np.eye(4)
    start[:3, 3] = 0, 0, 0.1
    path = np.concatenate([start[None, None], integrate_poses(start[None], SPEC.to_canonical(actions), SPEC)])
    pixels = CAMERA.K[:2, 2] + 90 * path[:, 0, :2, 3] * [1, -1] / 0.7
    frames = np.full((steps + 1, 64, 96, 3), 90, np.uint8)
    for t, (u, v) in enumerate(pixels.round().astype(int)):
        frames[t, v - 4 : v + 5, u - 4 : u + 5] = 250
    return Episode(
        frames, actions, SPEC, "move", 7.0, camera=CAMERA, eef_pose=path, gripper=np.ones((steps + 1, 1)),
        name=f"e{index}",
    )  # fmt: skip


def write(root: Path, change: Callable[[Episode], Episode] = lambda episode: episode, count: int = 4) -> Path:
    for i in range(count):
        write_episode(root / f"e{i}", change(square(i, 22 + 3 * i)))
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("squares"))


@pytest.fixture
def config(data: Path, tiny_checkpoint: Path, tmp_path: Path) -> AdaptConfig:
    return AdaptConfig(
        data=data, base=str(tiny_checkpoint), out=tmp_path / "mine", rank=2, loop=LOOP, evaluation_windows=2,
        evaluation_frames=4,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """accelerate keeps the first precision of a process."""
    yield
    AcceleratorState._reset_state(True)


def errors_of(values: dict[int, float]) -> Callable:
    """An evaluation whose EPE at each step is given."""
    real = adapt_module.validation_numbers
    steps = iter(values.values())

    def numbers(report: dict) -> dict[str, float]:
        return {**real(report), "validation_epe_mean": next(steps)}

    return numbers


def test_the_result_is_an_environment(
    config: AdaptConfig,
    tiny_checkpoint: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(adapt_module, "validation_numbers", errors_of({0: 3.0, 2: 2.0, 4: 1.0}))
    config = replace(config, evaluation_frames=40)  # longer than what is held out: its two halves
    result = adapt(replace(config, keep_adapter=True))
    assert "the codec hardly knows such images" in caplog.text and "--decoder-steps 400" in caplog.text
    out = config.out
    assert {path.name for path in out.iterdir()} == {
        *("transformer", "vae", "prophet.json", "snapshots", "evaluation", "adapter", "README.md")
    }
    env = gym.make("Prophet-Custom-v0", checkpoint=str(out), judge=lambda frames, instruction: False)
    observation, info = env.reset(seed=0)
    assert observation["image"].shape == (48, 48, 3) and info["instruction"] == "move"
    assert (
        info["checkpoint"]
        == f"mine, trained on nothing: random weights for tests; adapted to 3 episodes of {data.name}"
    )
    observation, *_, info = env.step(env.action_space.sample()[:8])
    assert info["frames"].shape == (8, 48, 48, 3)
    assert env.unwrapped.world_model.action_spec == SPEC and env.metadata["render_fps"] == 7.0
    (start,), last = SnapshotSet.load(out / "snapshots"), square(3, 31)
    assert start.name == "e3" and start.camera is not None and (start.camera.width, start.camera.height) == (48, 48)
    assert start.image[24, 24].mean() > 200 and np.array_equal(start.eef_pose, last.eef_pose[0])
    card = (out / "README.md").read_text()
    for part in (
        f"prophet adapt {data.name} --base {tiny_checkpoint.name} --out mine --rank 2", "--steps 4", "`tiny-test`",
        "last frame repeated", "shuffled actions", "its base, before", "the last 1 are held out", "seed 0", "48x48",
    ):  # fmt: skip
        assert part in card, part
    assert str(data) not in card and str(tiny_checkpoint) not in card
    measured = json.loads((out / "evaluation" / "metrics.json").read_text())
    assert measured["protocol"]["num_episodes"] == 2 and result["metrics"]["protocol"]["steps"] == 15
    lines = [json.loads(line) for line in (config.run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "validation_epe_mean" in line] == [2, 4]
    assert list(config.run_folder.rglob("events.out.tfevents*"))
    trained_on = np.load(next((config.run_folder / "clips").glob("*/actions.npy")))[..., :2]
    assert len(trained_on) == 1 + 2 + 2 and trained_on.shape[1] == 22  # of 22, 25 and 28 commands; 31 are held out
    assert not any(
        np.abs(clip[5, 0] - last.canonical_actions[:, 0, :2]).max(axis=1).min() < 1e-6 for clip in trained_on
    )
    with pytest.raises(ValueError, match="mine exists already"):
        adapt(config)


def test_merged_weights_are_base_and_adapter(
    config: AdaptConfig, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best evaluation decides, the codec stays, backbone and new parameters change, frozen ones are not stored."""
    monkeypatch.setattr(adapt_module, "validation_numbers", errors_of({0: 3.0, 2: 1.0, 4: 2.0}))
    assert adapt(replace(config, keep_adapter=True))["step"] == 2
    merged, base = (ProphetWorldModel.from_pretrained(folder) for folder in (config.out, tiny_checkpoint))
    for a, b in zip(merged.codec.vae.parameters(), base.codec.vae.parameters(), strict=True):
        assert torch.equal(a, b)
    before = {name: p.clone() for name, p in base.transformer.named_parameters()}
    load_adapter(base.transformer, config.out / "adapter")
    merge_adapter(base.transformer)
    changed = set()
    for (name, a), b in zip(merged.transformer.named_parameters(), base.transformer.parameters(), strict=True):
        torch.testing.assert_close(a, b)
        if not torch.equal(a, before[name]):
            changed.add(name)
    assert "transformer_blocks.0.attn1.to_q.weight" in changed and "action_frame_stream.proj.weight" in changed
    assert "proj_out.weight" not in changed and "memory.to_k.weight" in changed
    stored = torch.load(config.run_folder / "checkpoints" / "last.pt", weights_only=True)
    assert not any("base_layer" in name or name == "proj_out.weight" for name in stored["model"])
    assert len(stored["ema"]["shadow_params"]) == len(stored["model"])
    at_four = stored["ema"]["shadow_params"]
    assert not all(torch.equal(a, b) for a, b in zip(at_four, load_values(config.out / "adapter"), strict=False))


def load_values(folder: Path) -> list[torch.Tensor]:
    from safetensors.torch import load_file

    return [value for file in sorted(folder.iterdir()) for value in load_file(file).values()]


def test_a_run_without_progress_stops_and_keeps_the_base(
    config: AdaptConfig, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapt_module, "validation_numbers", errors_of({0: 1.0, 1: 2.0, 2: 3.0, 3: 0.0}))
    loop = replace(LOOP, steps=6, eval_every=1)
    assert adapt(replace(config, patience=2, loop=loop))["step"] == 0
    assert torch.load(config.run_folder / "checkpoints" / "last.pt", weights_only=True)["step"] == 2
    base, result = (ProphetWorldModel.from_pretrained(folder).transformer for folder in (tiny_checkpoint, config.out))
    for a, b in zip(base.parameters(), result.parameters(), strict=True):
        assert torch.equal(a, b)
    assert "did not get better than its base" in (config.out / "README.md").read_text()
    assert "3 episodes of squares0 did not improve it" in (config.out / "prophet.json").read_text()


def test_an_interrupted_run_resumes_to_the_same_bits(
    config: AdaptConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapt(config)
    halves = replace(config, out=tmp_path / "halves" / "mine")
    real = adapt_module.validation_numbers
    seen = []

    def fail_at_two(report: dict) -> dict[str, float]:
        seen.append(1)
        if len(seen) == 2:
            raise RuntimeError("power cut")
        return real(report)

    monkeypatch.setattr(adapt_module, "validation_numbers", fail_at_two)
    with pytest.raises(RuntimeError, match="power cut"):
        adapt(halves)
    assert not halves.out.exists()
    monkeypatch.setattr(adapt_module, "validation_numbers", real)
    with pytest.raises(ValueError, match="give --resume"):
        adapt(halves)
    before = (halves.run_folder / "before.json").stat()
    adapt(replace(halves, resume=True))
    assert (halves.run_folder / "before.json").stat().st_mtime_ns == before.st_mtime_ns  # a kill would leave half of it
    whole, resumed = (torch.load(c.run_folder / "checkpoints" / "last.pt", weights_only=True) for c in (config, halves))
    for name, value in whole["model"].items():
        assert torch.equal(value, resumed["model"][name]), name


def test_a_run_killed_in_an_evaluation_makes_it_up(
    config: AdaptConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a candidate for the best weights would be lost, and a run that was to stop would go on."""
    config = replace(config, patience=1, loop=replace(LOOP, steps=6))
    real, seen = adapt_module.validation_numbers, []

    def worse_and_worse(report: dict) -> dict[str, float]:
        seen.append(1)
        if len(seen) == 2:
            raise RuntimeError("power cut")
        return {**real(report), "validation_epe_mean": float(len(seen))}

    monkeypatch.setattr(adapt_module, "validation_numbers", worse_and_worse)
    with pytest.raises(RuntimeError, match="power cut"):
        adapt(config)
    adapt(replace(config, resume=True))
    lines = [json.loads(line) for line in (config.run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" not in line] == [2]
    assert max(line["step"] for line in lines) == 2
    shutil.rmtree(config.out)  # as if the run had been killed while it wrote the result
    adapt(replace(config, resume=True))
    assert len(seen) == 3
    lines = [json.loads(line) for line in (config.run_folder / "metrics.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in lines) == 2


def test_data_without_cameras_make_a_world_that_needs_none(config: AdaptConfig, tmp_path: Path) -> None:
    """And without poses: starts are at the origin, and the card says so."""
    bare = write(tmp_path / "bare", lambda e: replace(e, camera=None, eef_pose=None, gripper=None))
    adapt(replace(config, data=bare, loop=replace(LOOP, steps=2)))
    world = ProphetWorldModel.from_pretrained(config.out)
    assert not world.requires_camera and not any("action_frame" in n for n, _ in world.transformer.named_parameters())
    (start,) = SnapshotSet.load(config.out / "snapshots")
    assert start.camera is None and np.array_equal(start.eef_pose, np.eye(4)[None]) and start.gripper == 1.0
    env = gym.make("Prophet-Custom-v0", checkpoint=str(config.out), judge=lambda frames, instruction: True)
    calibrated = replace(start, camera=CAMERA.resized(48, 48))
    images = []
    for snapshot in (start, calibrated):
        env.reset(seed=0, options={"snapshot": snapshot})
        images.append(env.step(np.zeros((4, 7), np.float32))[0]["image"])
    assert np.array_equal(*images)
    card = (config.out / "README.md").read_text()
    assert "no measured poses" in card and "no camera needed" in card
    base = ProphetWorldModel.from_pretrained(config.base)
    with pytest.raises(ValueError, match="no camera, but this model draws action frames"):
        base.begin([start], [0])


def test_a_closed_memory_gate_opens(config: AdaptConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base on a Cosmos-Predict2 backbone with a Wan codec: its memory learns, and the result reports the gate."""
    checkpoints = write_checkpoints(tmp_path / "cosmos")
    base = world_from_cosmos(
        checkpoints / "sharded", SPEC, image_size=(32, 48), history_frames=8, num_inference_steps=2,
        action_frames="pooled", num_effectors=2, **OPTIONS,
    )  # fmt: skip
    base.save_pretrained(tmp_path / "base")
    monkeypatch.setattr(adapt_module, "validation_numbers", errors_of({0: 2.0, 2: 1.0, 4: 1.5}))
    with pytest.raises(ValueError, match="--decoder-steps 3: the codec of .* is a AutoencoderKLWan"):
        adapt(replace(config, base=str(tmp_path / "base"), decoder_steps=3, out=tmp_path / "other"))
    adapt(replace(config, base=str(tmp_path / "base"), gate_fraction=0.5))
    lines = [json.loads(line) for line in (config.run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["memory_gate"] for line in lines if "loss" in line] == [0.0, 0.5, 1.0, 1.0]
    assert ProphetWorldModel.from_pretrained(config.out).transformer.config.memory_gate == 1.0
    assert "Memory gate: 1.00" in (config.out / "README.md").read_text()
    trained = torch.load(config.run_folder / "checkpoints" / "last.pt", weights_only=True)["model"]
    for part in ("memory.to_v.weight", "scalar_actions.to_time.2.weight", "action_frame_stream.to_time.weight"):
        assert not torch.equal(trained[part], base.transformer.get_parameter(part)), part
    assert env_steps(config.out)
    assert memory_gate(0, config, 0.2) == 0.2 and memory_gate(4, config, 0.2) == 1.0
    assert memory_gate(0, replace(config, gate_fraction=0.0), 0.0) == 1.0


def env_steps(folder: Path) -> bool:
    env = gym.make("Prophet-Custom-v0", checkpoint=str(folder), judge=lambda frames, instruction: False, horizon=4)
    env.reset(seed=0)
    return bool(env.step(np.zeros((4, 7), np.float32))[3])


def test_a_causal_codec_is_trained_on_what_a_rollout_sees(config: AdaptConfig, tmp_path: Path) -> None:
    """Chunks are encoded from their start frame on; the history comes group by group."""
    vae = AutoencoderKLWan.from_pretrained(write_checkpoints(tmp_path / "cosmos") / "sharded" / "vae").eval()
    source = ClipSource(clip_length=22, image_size=(32, 48), episodes=(1, 3))
    clips = load_clips(config.data, tmp_path / "clips", source=source)
    assert len(clips) == 4
    latents = encode_clips(vae, clips, tmp_path / "latents")
    sampler = ChunkSampler(clips, latents, ObjectiveConfig(action_frames="none"), chunk_length=20, history=8, vae=vae)
    batch = sampler.gather(np.array([1, 2]), np.array([2, 2]), 18, np.array([0, 0]), np.array([0, 0]))
    codec = VideoCodec(vae)
    for row, episode in enumerate((1, 2)):
        frames = torch.from_numpy(clips.frames[episode][np.minimum(np.arange(2, 23), 20)])
        torch.testing.assert_close(batch.latents[row], codec.encode(frames[None])[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(batch.history[row, :, -1], batch.latents[row, :, 0], atol=0.03, rtol=0.03)
    anchored = codec.encode(torch.from_numpy(clips.frames[:1, 4:9].copy()))[0, :, 1]
    torch.testing.assert_close(torch.from_numpy(latents.group[0, 4].copy()).float(), anchored, atol=0.03, rtol=0.03)


def test_faults_stop_unless_they_are_ignored(config: AdaptConfig, tmp_path: Path) -> None:
    late = write(tmp_path / "late", lambda e: replace(e, images=e.frames[np.maximum(np.arange(len(e) + 1) - 5, 0)]))
    config = replace(config, data=late, loop=replace(LOOP, steps=1))
    with pytest.raises(ValueError, match="image delay.*--ignore-faults"):
        adapt(config)
    assert not config.out.exists()
    adapt(replace(config, ignore_faults=True))
    assert "fault, image delay" in (config.out / "README.md").read_text()


def test_data_that_do_not_do_are_refused(config: AdaptConfig, tmp_path: Path) -> None:
    def refused(message: str, **changes: object) -> None:
        with pytest.raises(ValueError, match=message):
            adapt(replace(config, **changes))
        assert not config.out.exists()

    refused("would be held out; expected at least one to train on", held_out=4)
    refused("clips of 40 commands from episodes of 22 to 28", clip_length=40)
    refused("clips of 8 commands .* at least 20, a chunk of the base", clip_length=8)
    refused("no judge/; leave --keep-judge out", keep_judge=True)
    refused("neither a folder nor a packaged name", base="tabeltop")
    mixed = write(tmp_path / "mixed", lambda e: replace(e, camera=None if e.name == "e1" else CAMERA))
    refused("camera and poses are known of 3 of 4 episodes.*--draw-actions never", data=mixed)
    for bad, message in (
        ({"rank": 0}, "rank=0"),
        ({"decoder_steps": -1}, "decoder_steps=-1"),
        ({"held_out": 0}, "held_out=0"),
        ({"gate_fraction": 2.0}, "share"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(config, **bad)
    with pytest.raises(ValueError, match="eval_every=0"):
        replace(config, loop=replace(LOOP, eval_every=0))


def test_the_judge_of_the_base_comes_along_when_asked(
    config: AdaptConfig, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_checkpoint, tmp_path / "judged")
    (base / "judge").mkdir()
    (base / "judge" / "judge.json").write_text("{}")
    config = replace(config, base=str(base), loop=replace(LOOP, steps=1))
    adapt(config)
    assert not (config.out / "judge").exists()
    adapt(replace(config, out=tmp_path / "with", keep_judge=True))
    assert (tmp_path / "with" / "judge" / "judge.json").is_file()


def test_command(config: AdaptConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(config.data), "--base", config.base, "--out", str(config.out), "--steps", "1", "--batch-size", "2"]
    monkeypatch.setattr(sys, "argv", ["prophet", "adapt", *words])
    main()
    shown = capsys.readouterr().out
    assert "last frame repeated" in shown and f'gym.make("Prophet-Custom-v0", checkpoint="{config.out}")' in shown
    with pytest.raises(SystemExit):
        main()
    assert "exists already" in capsys.readouterr().err


@pytest.mark.data
def test_real_recordings_without_camera_and_poses(
    config: AdaptConfig, recordings: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bridge = replace(config, data=recordings / "bridge", loop=replace(LOOP, steps=1), evaluation_frames=8)
    adapt(bridge)
    assert env_steps(bridge.out)
    assert ProphetWorldModel.from_pretrained(bridge.out).action_spec.delta == "difference"
    assert "the base knows 'servo' deltas, the data have 'difference' ones" in caplog.text
