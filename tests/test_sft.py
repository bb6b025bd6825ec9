"""Imitation learns what was demonstrated, resumes to the same bits, leaves a policy with its record, and says no."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from squares import square_episode

import prophet_gym  # noqa: F401 - registers the environments
from prophet_gym.data.folder import EpisodeFolder, write_episode
from prophet_gym.training.loop import LoopConfig
from prophrl_agents import sft
from prophrl_agents.augment import augment_images
from prophrl_agents.demonstrations import read_demonstrations
from prophrl_agents.policies import SmallFlowPolicy
from prophrl_agents.sft import SFT_PAPER, SFT_SMOKE, SFT_TABLETOP, PolicySize, SFTConfig, run_sft, train_sft

TINY = PolicySize(chunk_length=4, num_flow_steps=3, trunk_width=8, feature_dim=32, head_width=32, head_blocks=1)
LOOP = LoopConfig(
    steps=6, batch_size=4, learning_rate=5e-3, warmup_steps=1, ema_decay=0.5, mixed_precision="no", log_every=2,
    save_every=2, eval_every=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for index in range(8):
        write_episode(root / f"episode_{index}", square_episode(index))
    return root


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """accelerate keeps the first precision of a process; runs of this file differ in it."""
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture
def config(data, tmp_path):
    return SFTConfig(
        data=(data,), run=tmp_path / "run", policy=TINY, held_out=2, eval_episodes=0, shift=1, loop=LOOP
    )  # fmt: skip


def log(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run):
    saved = torch.load(run / "checkpoints" / "last.pt", weights_only=True)
    return {**saved["model"], **{f"ema {i}": value for i, value in enumerate(saved["ema"]["shadow_params"])}}


def test_augmentation_is_seeded_and_moves_each_image_by_itself():
    images = torch.randint(0, 256, (16, 12, 12, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def draw(seed, **strength):
        return augment_images(images, torch.Generator().manual_seed(seed), **{"shift": 0, "jitter": 0.0, **strength})

    assert torch.equal(draw(0), images)
    assert torch.equal(draw(1, shift=2, jitter=0.2), draw(1, shift=2, jitter=0.2))
    assert not torch.equal(draw(1, shift=2, jitter=0.2), draw(2, shift=2, jitter=0.2))
    moved, moves = draw(0, shift=2), set()
    for before, after in zip(images, moved, strict=True):
        fits = [
            (dy, dx)
            for dy in range(-2, 3)
            for dx in range(-2, 3)
            if torch.equal(after[2:-2, 2:-2], before[2 + dy : 10 + dy, 2 + dx : 10 + dx])
        ]
        assert len(fits) == 1
        moves.add(fits[0])
        rows = (torch.arange(12) + fits[0][0]).clamp(0, 11)
        columns = (torch.arange(12) + fits[0][1]).clamp(0, 11)
        assert torch.equal(after, before[rows][:, columns]), "edges repeat"
    assert len(moves) > 4
    change = (draw(0, jitter=0.1).float() - images.float()).abs().mean(dim=(1, 2, 3))
    assert change.min() > 0 and change.max() < 25 and change.std() > 1


def test_frames_at_which_a_policy_is_called_can_be_drawn_more_often(config):
    frames, calls = np.arange(100, 140), np.arange(100, 140, 4)

    def draw(share, step=0):
        loop = dataclasses.replace(LOOP, batch_size=4000)
        return sft.draw_frames(frames, calls, dataclasses.replace(config, at_calls=share, loop=loop), step)

    for share, expected in ((0.0, 0.25), (0.6, 0.7), (1.0, 1.0)):
        drawn = draw(share)
        assert np.isin(drawn, calls).mean() == pytest.approx(expected, abs=0.03)
        assert set(drawn) == set(calls if share == 1 else frames)
    assert np.array_equal(draw(0.5), draw(0.5)) and not np.array_equal(draw(0.5), draw(0.5, step=1))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_it_learns_what_the_commands_were(config, precision):
    loop = dataclasses.replace(
        LOOP, steps=60, batch_size=16, warmup_steps=5, ema_decay=0.9, eval_every=4, mixed_precision=precision
    )  # fmt: skip
    config = dataclasses.replace(config, loop=loop)
    policy = train_sft(config)
    losses = [line["validation_loss"] for line in log(config.run) if "validation_loss" in line]
    assert losses[-1] < 0.6 * losses[0], losses
    held_out = read_demonstrations([square_episode(index) for index in (10, 11)])
    seen, chunks, mask = held_out.batch(np.array([0, 9]), 4)
    predicted = policy.predict_action_chunk(seen, torch.Generator().manual_seed(0))
    assert (predicted[..., 0].mean(dim=1).sign() == chunks[..., 0].mean(dim=1).sign()).all(), "left and right"


def test_resumed_run_has_the_same_bits(config, tmp_path, monkeypatch):
    train_sft(config)
    halves = dataclasses.replace(config, run=tmp_path / "halves", loop=dataclasses.replace(LOOP, eval_every=4))

    def crash(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sft, "validation_loss", crash)  # the evaluation of step 4, right after its checkpoint
        train_sft(halves)
    assert torch.load(halves.run / "checkpoints" / "last.pt", weights_only=True)["step"] == 4
    assert not (halves.run / "policy").exists()
    train_sft(dataclasses.replace(halves, resume=True))
    whole, resumed = weights(config.run), weights(halves.run)
    assert whole.keys() == resumed.keys()
    assert not [name for name in whole if not torch.equal(whole[name], resumed[name])]
    assert [line["loss"] for line in log(halves.run) if "loss" in line] == [
        line["loss"] for line in log(config.run) if "loss" in line
    ]
    other = dataclasses.replace(config, run=tmp_path / "other", loop=dataclasses.replace(LOOP, seed=1))
    train_sft(other)
    assert not torch.equal(weights(other.run)["head.inputs.weight"], whole["head.inputs.weight"])


def test_a_finished_run_that_resumes_keeps_its_record(config):
    train_sft(config)
    path, metrics = config.run / "policy" / "training.json", config.run / "metrics.jsonl"
    record, lines = json.loads(path.read_text()), metrics.read_text()
    assert record["seconds"] > 0 and "validation_loss" in record["metrics"]
    run_sft(dataclasses.replace(config, resume=True))
    again = json.loads(path.read_text())
    assert {**again, "config": {**again["config"], "resume": False}} == record and metrics.read_text() == lines


def test_saved_policy_is_the_averaged_one_and_acts_the_same(config):
    policy = train_sft(config)
    averaged = torch.load(config.run / "checkpoints" / "last.pt", weights_only=True)["ema"]["shadow_params"]
    for parameter, value in zip(policy.parameters(), averaged, strict=True):
        assert torch.equal(parameter, value)
    loaded = SmallFlowPolicy.from_pretrained(config.run / "policy")
    seen, _, _ = read_demonstrations([square_episode(0)]).batch(np.arange(5), 4)
    one, two = (p.predict_action_chunk(seen, torch.Generator().manual_seed(1)) for p in (policy, loaded))
    assert torch.equal(one, two) and one.shape == (5, 4, 7)
    assert loaded.config.vocabulary == ("left", "move", "right") and loaded.config.image_size == 16


def test_record_travels_with_the_policy(config):
    text = run_sft(dataclasses.replace(config, behaviours=("expert",)))
    record = json.loads((config.run / "policy" / "training.json").read_text())
    assert record["data"]["episodes"] == 5 and record["data"]["behaviours"] == {"expert": 5}
    assert (
        record["config"]["data"] == [config.data[0].name]
        and record["config"]["loop"]["steps"] == 6
        and record["seed"] == 0
    )
    assert record["metrics"] == {"validation_loss": pytest.approx(log(config.run)[-1]["validation_loss"])}
    assert str(config.run.parent) not in json.dumps(record), "no paths of this machine"
    assert str(config.run / "policy") in text and "3 episodes" in text and "validation loss" in text
    assert "success" not in text
    assert list(config.run.rglob("events.out.tfevents*"))


def test_nan_stops_and_keeps_the_checkpoint(config):
    loop = dataclasses.replace(LOOP, learning_rate=1e30, warmup_steps=1000, grad_clip=1e30, save_every=1)
    with pytest.raises(FloatingPointError, match=r"loss nan at step \d; the last checkpoint is .*last.pt"):
        train_sft(dataclasses.replace(config, loop=loop))
    saved = torch.load(config.run / "checkpoints" / "last.pt", weights_only=True)
    assert saved["step"] >= 1 and not (config.run / "policy").exists()


def test_runs_are_not_overwritten(config):
    train_sft(config)
    with pytest.raises(ValueError, match="--resume"):
        train_sft(config)
    with pytest.raises(ValueError, match="differs"):
        train_sft(dataclasses.replace(config, shift=0, resume=True))
    with pytest.raises(ValueError, match="nothing to resume"):
        train_sft(dataclasses.replace(config, run=config.run.parent / "new", resume=True))


def test_another_policy_folder_is_found_before_training_and_stays(config):
    (config.run / "policy").mkdir(parents=True)
    (config.run / "policy" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"policy holds no config.json: it is something else"):
        train_sft(config)
    assert [path.name for path in config.run.rglob("*")] == ["policy", "notes.txt"]


def test_folders_and_numbers_are_checked(config, tmp_path):
    (tmp_path / "empty").mkdir()
    cases = [
        ({"data": ()}, "expected a tuple with one or more folders"),
        ({"data": "episodes"}, "data='episodes'; expected a tuple"),
        ({"data": (tmp_path / "nowhere",)}, "is no folder"),
        ({"data": (tmp_path / "empty",)}, "holds no episodes"),
        ({"camera_name": "wrist"}, "no camera 'wrist'"),
        ({"held_out": 8}, "held_out=8 of 8 episodes"),
        ({"policy": dataclasses.replace(TINY, head_width=33)}, "head_width is 33"),
        ({"env": "Tabeltop-v0", "eval_episodes": 2}, "no environment 'Tabeltop-v0'.*Did you mean: `Tabletop`"),
    ]
    for index, (changes, message) in enumerate(cases):
        with pytest.raises(ValueError, match=message):
            train_sft(dataclasses.replace(config, run=tmp_path / f"refused-{index}", **changes))
    for changes, message in [
        ({"jitter": 1.0}, "jitter=1.0"), ({"held_out": -1}, "held_out=-1"), ({"num_envs": 0}, "num_envs=0"),
        ({"at_calls": 1.5}, "at_calls=1.5: expected a share from 0 to 1"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(config, **changes)
    with pytest.raises(ValueError, match="expected a tuple"):
        train_sft(SFT_TABLETOP)


def test_images_must_be_square(tmp_path, config):
    write_episode(tmp_path / "wide" / "0", square_episode(0, images=np.zeros((10, 16, 24, 3), np.uint8)))
    with pytest.raises(ValueError, match="images are 24x16 pixels; expected squares"):
        train_sft(dataclasses.replace(config, data=(tmp_path / "wide",), held_out=0))


def test_presets_keep_the_papers_optimiser_and_full_precision():
    assert (SFT_PAPER.loop.batch_size, SFT_PAPER.loop.learning_rate, SFT_PAPER.loop.weight_decay) == (64, 2.5e-5, 0.1)
    for preset in (SFT_TABLETOP, SFT_SMOKE, SFT_PAPER):
        assert preset.loop.mixed_precision == "no" and preset.run.parent == Path("runs")


# --- in the simulator ---


@pytest.fixture(scope="module")
def tabletop(tmp_path_factory):
    """Nine expert episodes of the real simulator, whose instructions hold every word that the trial starts ask for."""
    from prophet_gym.data.record import record

    root = tmp_path_factory.mktemp("tabletop") / "episodes"
    record(root, 9, seed=20, workers=0, steps=12, mix={"expert": 1.0}, progress=False)
    return root


@pytest.mark.render
def test_policy_is_tried_in_the_simulator_on_fixed_starts(tabletop, config):
    config = dataclasses.replace(
        config, data=(tabletop,), only_success=False, eval_episodes=3, num_envs=2,
        policy=dataclasses.replace(TINY, chunk_length=20), loop=dataclasses.replace(LOOP, steps=4, eval_every=2),
    )  # fmt: skip
    text = run_sft(config)
    tried = [line for line in log(config.run) if "success_rate" in line]
    assert [line["step"] for line in tried] == [2, 4]
    assert all(0 <= line["success_low"] <= line["success_rate"] <= line["success_high"] <= 1 for line in tried)
    assert "success in Tabletop-v0" in text and "n = 3" in text


@pytest.mark.render
def test_words_of_the_simulator_are_missed_before_training(tabletop, config):
    one = EpisodeFolder(tabletop)[0]
    write_episode(config.run.parent / "one" / "0", one)
    config = dataclasses.replace(
        config, data=(config.run.parent / "one",), only_success=False, held_out=0, eval_episodes=2
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"no episode is about: unknown words \['yellow'\].*record more"):
        train_sft(config)
    assert not (config.run / "metrics.jsonl").exists()
