"""Pretraining on a mixture: one data set a micro-batch, the same run on one process and on two, killed and resumed."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKLWan
from mixture_parallel import mixture_config
from small_cosmos import write_checkpoints
from test_training import square_episode

import prophet_gym.training.pretrain as pretrain_module
from prophet_gym.data.folder import write_episode
from prophet_gym.training.chunks import ChunkSampler
from prophet_gym.training.clips import encode_clips, load_clips
from prophet_gym.training.loop import LoopConfig, prepare_run, train_loop
from prophet_gym.training.mixture import Mixture, MixtureDataset, draw_dataset, open_mixture, read_mixture
from prophet_gym.training.plan import state_bytes
from prophet_gym.training.pretrain import MixtureSampler, learn_what_is_used, pretrain, starting_point
from prophet_gym.world_model.presets import preset
from prophet_gym.world_model.prophet import ProphetWorldModel
from prophet_gym.world_model.transformer import ProphetTransformer
from prophet_gym.world_model.video_vae import FoldedVideoVAE

MIXTURE = """
temperature = 2.0

[[dataset]]
path = "posed"
clip_length = 20

[[dataset]]
path = "blind"
clip_length = 20
image_size = [64, 80]
weight = 0.5
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small data sets, of which one has neither cameras nor poses, a codec, and the file that names them."""
    root = tmp_path_factory.mktemp("pretrain")
    for i in range(3):
        write_episode(root / "posed" / f"episode_{i}", square_episode(i))
    for i in range(2):
        bare = replace(square_episode(5 + i, steps=30), eef_pose=None, gripper=None, camera=None, labels={})
        write_episode(root / "blind" / f"episode_{i}", bare)
    torch.manual_seed(0)
    codec = FoldedVideoVAE(latent_channels=8, channels=16, encoder_blocks=(1, 1), decoder_blocks=(1, 1))
    codec.save_pretrained(root / "codec" / "vae")
    (root / "mixture.toml").write_text(MIXTURE)
    return root


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """accelerate keeps the first precision of a process."""
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    """The run of one process."""
    pretrain(mixture_config(folder, 1))
    return folder / "run"


def lines_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def torchrun(folder: Path, *words: str) -> subprocess.CompletedProcess:
    tests = Path(__file__).parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)])}
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         str(tests / "mixture_parallel.py"), str(folder), *words],
        env=environment, timeout=280, capture_output=True, text=True,
    )  # fmt: skip


def test_large_sets_are_drawn_more_often_by_the_temperature() -> None:
    sets = tuple(
        MixtureDataset(path=Path(name), name=name, weight=w) for name, w in (("a", 1.0), ("b", 1.0), ("c", 3.0))
    )
    clips = [100, 400, 100]
    np.testing.assert_allclose(Mixture(sets).shares(clips), np.array([1, 4, 3]) / 8)
    np.testing.assert_allclose(Mixture(sets, temperature=2.0).shares(clips), np.array([1, 2, 3]) / 6)
    shares = Mixture(sets, temperature=2.0).shares(clips)
    drawn = [draw_dataset(shares, 0, i) for i in range(3000)]
    assert drawn == [draw_dataset(shares, 0, i) for i in range(3000)]
    assert drawn != [draw_dataset(shares, 1, i) for i in range(3000)]
    counts = Counter(drawn)
    np.testing.assert_allclose([counts[i] / 3000 for i in range(3)], shares, atol=0.03)


def test_the_file_is_read_strictly(tmp_path: Path) -> None:
    file = tmp_path / "mixture.toml"
    file.write_text('[[dataset]]\npath = "data/bridge"\ncard = "rt_1"\n')
    (only,) = read_mixture(file).datasets
    assert only.path == tmp_path / "data" / "bridge" and only.name == "bridge"
    assert only.source.image_size == (240, 320) and only.source.fit == "pad_or_crop"  # what the card says (4.1.1)
    for text, said in (
        ("[[dataset]]\npath = 3", "path=3; expected str"),
        ('[[dataset]]\nname = "x"', "no path"),
        ('[[dataset]]\npath = "x"\nwheight = 2', "'wheight'.*Did you mean 'weight'|'wheight'.*weight"),
        ('[[dataset]]\npath = "x"\nimage_size = [64, 60]', "multiples of 16"),
        ('[[dataset]]\npath = "x"\nweight = true', "weight=True; expected int or float"),
        ('[[dataset]]\npath = "x"\nfit = "squeeze"', "'squeeze'"),
        ('[[dataset]]\npath = "a/x"\n[[dataset]]\npath = "b/x"', "different names"),
        ("temperature = 0\n[[dataset]]\npath = 'x'", "temperature=0"),
        ("temperature = 1", "at least one"),
        ("[[dataset", "cannot be read as TOML"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=said) as error:
            read_mixture(file)
        assert str(file) in str(error.value)


def test_a_micro_batch_has_one_resolution_and_one_conditioning(folder: Path, tmp_path: Path) -> None:
    config = mixture_config(folder, 1)
    opened = open_mixture(read_mixture(config.mixture), chunk_length=20, num_effectors=1, action_frames="spatial")
    assert [(d.dataset.name, d.clips, d.draws, d.image_size) for d in opened] == [
        ("posed", 6, True, (64, 64)),
        ("blind", 4, False, (64, 80)),
    ]
    vae = FoldedVideoVAE.from_pretrained(folder / "codec" / "vae")
    samplers = []
    for i, dataset in enumerate(opened):
        objective = config.objective("spatial" if dataset.draws else "none", 10)
        size = (32, 32) if dataset.draws else None
        clips = load_clips(dataset.dataset.path, tmp_path / str(i), source=dataset.dataset.source, drawn_size=size)
        latents = encode_clips(vae, clips, tmp_path / f"latents {i}")
        samplers.append(ChunkSampler(clips, latents, objective, chunk_length=20, history=60, vae=vae))
    sampler = MixtureSampler(samplers, np.array([0.5, 0.5]), torch.device("cpu"))
    seen = set()
    for micro_batch in range(8):
        index, batch, noise = sampler(micro_batch, 0, 4)
        seen.add(index)
        assert batch.latents.shape[-2:] == ((8, 8), (8, 10))[index]
        assert (batch.action_frames is None) == (index == 1)
        halves = [sampler(micro_batch, first, 2) for first in (0, 2)]  # as two processes share it
        assert [half[0] for half in halves] == [index, index]
        assert torch.equal(torch.cat([half[1].latents for half in halves]), batch.latents)
        assert torch.equal(torch.cat([half[1].history for half in halves]), batch.history)
        assert torch.equal(torch.cat([half[2].target for half in halves]), noise.target)
        assert len({row.sum().item() for row in noise.target}) == 4  # every sample has noise of its own
    assert seen == {0, 1}


def test_bad_mixtures_are_refused_before_training(folder: Path, tmp_path: Path) -> None:
    known = {"chunk_length": 20, "num_effectors": 1, "action_frames": "spatial"}
    mixture = read_mixture(folder / "mixture.toml")
    posed, blind = mixture.datasets
    with pytest.raises(ValueError, match="'blind': camera and poses are known of 0 of 2 episodes"):
        open_mixture(Mixture((posed, replace(blind, draw_actions=True))), **known)
    with pytest.raises(ValueError, match="clips of 19 commands; expected at least 20"):
        open_mixture(Mixture((replace(posed, clip_length=19),)), **known)
    with pytest.raises(ValueError, match="expected one of them"):
        replace(mixture_config(folder, 1), base="tabletop")
    with pytest.raises(ValueError, match="codec"):
        pretrain(replace(mixture_config(folder, 1), vae=tmp_path, run=tmp_path / "run"))


def test_a_run_learns_from_all_sets_and_leaves_a_checkpoint(alone: Path) -> None:
    lines = lines_of(alone)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]  # 4 epochs of 10 clips, 8 chunks a step
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert {"loss_posed", "loss_blind"} <= {name for line in lines for name in line}
    assert "6 clips" in ProphetWorldModel.from_pretrained(alone / "prophet").config.trained_on
    with pytest.raises(ValueError, match="--resume"):
        pretrain(mixture_config(alone.parent, 1))


def test_a_run_killed_while_it_writes_the_result_leaves_an_open_memory(
    folder: Path, alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = lambda name, **kwargs: preset(name, **{**kwargs, "memory_gate": 0.0})  # noqa: E731  as of from-cosmos
    monkeypatch.setattr(pretrain_module, "preset", closed)
    shutil.rmtree(alone / "prophet")
    pretrain(replace(mixture_config(folder, 1), run=alone, resume=True))
    assert ProphetWorldModel.from_pretrained(alone / "prophet").transformer.config.memory_gate == 1.0


def test_another_number_of_processes_is_another_run(folder: Path, alone: Path) -> None:
    stored = json.loads((alone / "config.json").read_text())
    (alone / "config.json").write_text(json.dumps({**stored, "processes": 2}))
    with pytest.raises(ValueError, match="same settings"):
        pretrain(replace(mixture_config(folder, 1), run=alone, resume=True))
    (alone / "config.json").write_text(json.dumps(stored))


def assert_trained_as_one(run: Path, alone: Path, kind: str) -> None:
    """Two processes, parameters of one kind, and the losses and weights of the run of one process."""
    network = ProphetWorldModel.from_pretrained(alone / "prophet").transformer
    planned = state_bytes(network, 0, 2, run.name, False)["weights"]
    layouts = [json.loads(run.with_suffix(f".{rank}.json").read_text()) for rank in (0, 1)]
    assert [layout["processes"] for layout in layouts] == [2, 2]
    assert [layout["kinds"] for layout in layouts] == [[kind], [kind]]
    assert layouts[0]["bytes"] == planned  # rank 0 has the larger half where rows cannot be halved
    assert 0.9 * planned < layouts[1]["bytes"] <= planned
    lines, wanted = lines_of(run), lines_of(alone)
    assert [line["step"] for line in lines] == [line["step"] for line in wanted]
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose([line[name] for line in lines], [line[name] for line in wanted], rtol=1e-4)
    saved, last = (torch.load(r / "checkpoints" / "last.pt", weights_only=True) for r in (run, alone))
    assert saved["model"].keys() == last["model"].keys()
    for name, weight in last["model"].items():
        torch.testing.assert_close(saved["model"][name], weight, rtol=0, atol=2e-4)
    for own, other in zip(saved["ema"]["shadow_params"], last["ema"]["shadow_params"], strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=2e-4)
    ProphetWorldModel.from_pretrained(run / "prophet")


@pytest.mark.programs
def test_two_replicas_train_as_one_process(folder: Path, alone: Path) -> None:
    """torchrun on gloo, the same global batch."""
    done = torchrun(folder, "ddp", "whole")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_trained_as_one(folder / "ddp", alone, "Tensor")


@pytest.mark.programs
def test_two_shards_train_as_one_process_though_killed_on_the_way(folder: Path, alone: Path) -> None:
    run = folder / "fsdp2"
    assert torchrun(folder, "fsdp2", "killed").returncode != 0
    assert torch.load(run / "checkpoints" / "last.pt", weights_only=True)["step"] == 2
    assert not (run / "prophet").exists()
    done = torchrun(folder, "fsdp2", "resumed")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_trained_as_one(run, alone, "DTensor")


def test_accumulated_micro_batches_are_one_batch(tmp_path: Path) -> None:
    data = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(0))
    weights, logged = [], []
    for accumulation in (1, 2):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1)
        size = 6 // accumulation

        def loss_fn(net, micro, accumulation=accumulation, size=size):
            step, part = divmod(micro, accumulation)
            return net(data[step, part * size : (part + 1) * size]).square().mean(), {}

        run = tmp_path / str(accumulation)
        loop = LoopConfig(steps=4, batch_size=size, warmup_steps=1, mixed_precision="no", eval_every=0)
        prepare_run(run, {}, False)
        train_loop(model, loss_fn, loop, run, accelerator=Accelerator(cpu=True), accumulation=accumulation)
        weights.append(torch.load(run / "checkpoints" / "last.pt", weights_only=True)["model"]["weight"])
        logged.append([lines_of(run)[-1][name] for name in ("loss", "grad_norm")])
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-5, atol=1e-6)
    assert logged[0] == pytest.approx(logged[1], rel=1e-4)  # AdamW alone would not notice gradients twice as large


def test_a_gradient_that_is_not_finite_ends_the_run_before_the_step(tmp_path: Path) -> None:
    """The loss may be finite where its gradient is not: a step would spoil the weights, and then the checkpoint."""

    def loss_fn(net, step):
        return (net(torch.ones(1, 2)).sum() * (step != 1)).abs().sqrt(), {}  # at 0 the root has no slope

    prepare_run(tmp_path, {}, False)
    loop = LoopConfig(steps=3, batch_size=1, save_every=1, mixed_precision="no", eval_every=0)
    model = torch.nn.Linear(2, 1)
    with pytest.raises(FloatingPointError, match="gradient of norm (nan|inf) at step 1; the last checkpoint is"):
        train_loop(model, loss_fn, loop, tmp_path, accelerator=Accelerator(cpu=True))
    saved = torch.load(tmp_path / "checkpoints" / "last.pt", weights_only=True)
    assert saved["step"] == 1 and all(torch.isfinite(p).all() for p in model.parameters())


def test_a_run_starts_beside_a_wan_codec_and_refuses_other_networks(folder: Path, tmp_path: Path) -> None:
    wan = write_checkpoints(tmp_path) / "sharded" / "vae"
    config = replace(mixture_config(folder, 1), vae=wan)
    transformer, vae, _ = starting_point(config, 1)
    assert isinstance(vae, AutoencoderKLWan) and transformer.config.latent_channels == vae.config.z_dim == 4
    with pytest.raises(ValueError, match="a network of class 'CosmosTransformer3DModel'; expected a codec, Folded"):
        starting_point(replace(config, vae=wan.parent / "transformer"), 1)


def test_what_no_batch_uses_is_not_learned() -> None:
    with torch.device("meta"):
        model = ProphetTransformer(**preset("cosmos-2b", num_layers=1))
    learn_what_is_used(model, draws=False)
    idle = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert {name.split(".")[0] for name in idle} == {"transformer_blocks", "action_frame_stream"}
    assert {name.split(".")[2] for name in idle if name.startswith("transformer")} == {"attn2", "norm2"}
    learn_what_is_used(model, draws=True)
    assert all(parameter.requires_grad for parameter in model.action_frame_stream.parameters())
