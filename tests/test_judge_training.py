import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from prophet_gym.actions import ACTION_SPECS
from prophet_gym.data.episode import Episode
from prophet_gym.data.folder import write_episode
from prophet_gym.data.variants import VARIANT_OF
from prophet_gym.judges import ClassifierJudge, LabelledRollout, auc, evaluate_judge, labelled_rollouts
from prophet_gym.training.augment import augment
from prophet_gym.training.judge import (
    JudgeTrainingConfig,
    _BalancedSampler,
    fit_judge,
    imagine,
    read_rollouts,
    train_judge,
)
from prophet_gym.world_model.prophet import ProphetConfig, ProphetWorldModel
from prophet_gym.world_model.transformer import ProphetTransformer
from prophet_gym.world_model.video_vae import FoldedVideoVAE

SIZE, LENGTH = 32, 8
COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60)}


def two_squares(seed, source="real"):
    """A red and a green square slide over a grey table; the named one has to end in the left half."""
    rng = np.random.default_rng(seed)
    named = str(rng.choice(list(COLOURS)))
    frames = np.full((LENGTH, SIZE, SIZE, 3), 120, np.uint8)
    frames += rng.integers(0, 8, frames.shape, dtype=np.uint8)
    success = np.zeros(LENGTH, bool)
    for colour, rows in zip(COLOURS, rng.permutation([4, 20]), strict=True):
        columns = np.linspace(rng.integers(0, SIZE - 7), rng.choice([3, SIZE - 9]), LENGTH).round().astype(int)
        for frame, column in zip(frames, columns, strict=True):
            frame[rows : rows + 6, column : column + 6] = COLOURS[colour]
        if colour == named:
            success = columns + 3 < SIZE // 2
    return LabelledRollout(frames, f"push the {named} square left", success, f"{seed:05d}", "slide", source)


def quick(**changes):
    defaults = dict(
        data=("unused",),
        output="unused",
        width=8,
        late_frames=(0, 2),
        steps=120,
        batch_size=32,
        eval_every=40,
        seed=1,
        learning_rate=5e-3,
    )
    return JudgeTrainingConfig(**{**defaults, **changes})


@pytest.fixture(scope="module")
def rollouts():
    """Training, validation and test rollouts; every training episode also once as if imagined."""
    train = [two_squares(seed) for seed in range(120)]
    train += [dataclasses.replace(rollout, source="imagined") for rollout in train[:60]]
    return train, [two_squares(seed) for seed in range(200, 260)], [two_squares(seed) for seed in range(300, 420)]


def scores(judge, test):
    verdicts = judge.judge_batch([r.frames for r in test], [r.instruction for r in test])
    return np.array([verdict.score for verdict in verdicts])


def test_learns_what_the_instruction_names(rollouts):
    train, val, test = rollouts
    judge, metrics = fit_judge(train, val, quick())
    report = evaluate_judge(judge, test, bootstrap=100)
    assert report["auc"]["value"] > 0.97
    assert report["precision"]["value"] > 0.9 and report["recall"]["value"] > 0.9
    assert metrics["threshold"] == judge.config.threshold
    assert judge.config.trained_on["rollouts"] == {"imagined": 60, "real": 120}
    assert metrics["history"][-1]["loss"] < metrics["history"][0]["loss"]


def test_shuffled_labels_stay_at_chance(rollouts):
    train, val, test = rollouts
    order = np.random.default_rng(0).permutation(len(train))
    shuffled = [dataclasses.replace(r, success=train[i].success) for r, i in zip(train, order, strict=True)]
    judge, _ = fit_judge(shuffled, val, quick(steps=60))
    labels = np.array([rollout.label for rollout in test])
    assert 0.3 < auc(scores(judge, test), labels) < 0.7


def test_same_seed_same_judge(rollouts):
    train, val, test = rollouts
    first, second, other = (fit_judge(train, val, quick(steps=4, seed=seed))[0] for seed in (5, 5, 6))
    assert np.array_equal(scores(first, test), scores(second, test))
    assert not np.array_equal(scores(first, test), scores(other, test))


def test_early_stop(rollouts):
    train, val, _ = rollouts
    _, metrics = fit_judge(train, val, quick(steps=40, eval_every=2, patience=1, learning_rate=1e-9))
    assert metrics["history"][-1]["step"] < 40


def test_unlearnable_data_is_refused(rollouts):
    train, val, _ = rollouts
    failures = [rollout for rollout in train if not rollout.label]
    with pytest.raises(ValueError, match="Training needs successes and failures among"):
        fit_judge(failures, val, quick())
    with pytest.raises(ValueError, match="Validation needs successes and failures"):
        fit_judge(train, [rollout for rollout in val if rollout.label], quick())
    with pytest.raises(ValueError, match="both training and validation, e.g. '00000'"):
        fit_judge(train, [*val, train[0]], quick())
    small = dataclasses.replace(val[0], frames=val[0].frames[:, ::2, ::2])
    with pytest.raises(ValueError, match=r"one size, got .*\(16, 16\), \(32, 32\)"):
        fit_judge(train, [*val, small], quick())


def test_long_instructions_are_judged_and_wordless_ones_refused(rollouts):
    def longer(rollout):
        return dataclasses.replace(rollout, instruction=f"{rollout.instruction}, please {'very ' * 20}slowly")

    train, val, test = ([longer(rollout) for rollout in part[:40]] for part in rollouts)
    judge, _ = fit_judge(train, val, quick(steps=2))
    assert judge.config.max_words == 5 + 22 and np.isfinite(scores(judge, test)).all()
    assert fit_judge(rollouts[0], rollouts[1], quick(steps=2))[0].config.max_words == 16
    with pytest.raises(ValueError, match="Instruction '推' has no words"):
        fit_judge([dataclasses.replace(train[0], instruction="推"), *train[1:]], val, quick())


def test_labels_and_sources_balance_over_the_run_whatever_the_batch_size(rollouts):
    train, val, _ = rollouts
    judge, _ = fit_judge(train, val, quick(steps=1))
    sampler, drawn = _BalancedSampler(train, quick(batch_size=3)), []
    draw = sampler._draw
    sampler._draw = lambda rng, source, label: drawn.append((source, label)) or draw(rng, source, label)
    for _ in range(4):
        sampler.batch(np.random.default_rng(0), judge)
    assert drawn[:4] == [("imagined", False), ("imagined", True), ("real", False), ("real", True)]
    assert drawn == drawn[:4] * 3


def test_configuration_is_checked():
    for changes, message in [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"val_fraction": 1.0}, r"val_fraction must be in \[0, 1\)"),
        ({"data": "folder"}, "tuple of folders, got 'folder'"),
    ]:
        with pytest.raises(ValueError, match=message):
            quick(**changes)


def test_augmentation_is_seeded_and_gentle():
    frames = two_squares(0).frames
    once, again = (augment(frames, np.random.default_rng(7)) for _ in range(2))
    assert once.shape == frames.shape and once.dtype == np.uint8
    assert np.array_equal(once, again)
    assert not np.array_equal(once, augment(frames, np.random.default_rng(8)))
    rng = np.random.default_rng(0)
    differences = [np.abs(augment(frames, rng).astype(int) - frames).mean() for _ in range(20)]
    assert 0 < np.mean(differences) < 40


# --- episodes, imagination, files ---


def episode(seed, length=LENGTH - 1):
    """The squares as an episode; the commands are there to be imagined, not to explain the frames."""
    rollout = two_squares(seed)
    rng = np.random.default_rng(seed)
    poses = np.tile(np.eye(4), (length + 1, 1, 1, 1))
    poses[..., 2, 3] = 0.1
    return Episode(
        images=rollout.frames[: length + 1],
        actions=rng.uniform(0, 0.03, (length, 7)).astype(np.float32),
        action_spec=ACTION_SPECS["tabletop"],
        instruction=rollout.instruction,
        fps=10.0,
        eef_pose=poses,
        gripper=np.ones((length + 1, 1)),
        labels={"success": rollout.success[: length + 1]},
        name=rollout.name,
        metadata={"behaviour": "slide"},
    )


@pytest.fixture(scope="module")
def world_model():
    torch.manual_seed(0)
    vae = FoldedVideoVAE(latent_channels=4, channels=16, encoder_blocks=(1, 1), decoder_blocks=(1, 1))
    transformer = ProphetTransformer(
        latent_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=1, text_embed_dim=None,
        adaln_lora_dim=8, max_size=(16, 8, 8), patch_size=(1, 1, 1), chunk_length=4, num_effectors=1,
        scalar_hidden_dim=16, action_frames="none", memory_levels=((0, 2, 1, 2, 2),), memory_gate=1.0,
    )  # fmt: skip
    spec = ACTION_SPECS["tabletop"]
    config = ProphetConfig(image_size=(SIZE, SIZE), history_frames=8, num_inference_steps=2, action_spec=spec)
    return ProphetWorldModel(transformer.eval(), vae.eval(), config)


def test_imagination_does_not_depend_on_its_batch(world_model):
    episodes = [episode(seed, length) for seed, length in enumerate((7, 3, 4, 7, 6))]
    together = imagine(world_model, episodes, batch_size=5, seed=3)
    apart = imagine(world_model, episodes, batch_size=2, seed=3)
    for one, other, source in zip(together, apart, episodes, strict=True):
        assert one.shape == source.frames.shape and one.dtype == np.uint8
        assert np.array_equal(one[0], source.frames[0])
        assert np.abs(one.astype(int) - other).max() <= 1
    shorter = imagine(world_model, episodes, chunk_length=3, seed=3)
    assert [frames.shape for frames in shorter] == [frames.shape for frames in together]
    assert imagine(world_model, []) == []
    with pytest.raises(ValueError, match="1 to 4 .*got 5"):
        imagine(world_model, episodes, chunk_length=5)


def test_labelled_rollouts_keep_truth_and_swap_frames():
    episodes = [episode(seed) for seed in range(3)]
    real, imagined = labelled_rollouts(episodes), labelled_rollouts(episodes, [e.frames // 2 for e in episodes])
    for a, b in zip(real, imagined, strict=True):
        assert (a.source, b.source, a.behaviour) == ("real", "imagined", "slide")
        assert a.name == b.name and np.array_equal(a.success, b.success) and np.array_equal(a.frames // 2, b.frames)
    with pytest.raises(ValueError, match=r"no labels\['success'\].*prophet record"):
        labelled_rollouts([dataclasses.replace(episodes[0], labels={})])


def test_training_from_folders_writes_a_judge(world_model, tmp_path):
    for seed in range(16):
        write_episode(tmp_path / "data" / f"{seed:03d}", episode(seed))
    out = tmp_path / "judge"
    config = quick(data=(str(tmp_path / "data"),), output=str(out), val_fraction=0.25, steps=4, eval_every=2)
    judge, metrics = train_judge(config, world_model)
    assert judge.config.trained_on["rollouts"] == {"imagined": 12, "real": 12}
    assert metrics["validation"]["sources"]["real"]["n"] == metrics["validation"]["sources"]["imagined"]["n"] == 4
    assert json.loads((out / "judge_metrics.json").read_text())["threshold"] == judge.config.threshold
    assert sorted(path.name for path in out.iterdir()) == ["judge.json", "judge.safetensors", "judge_metrics.json"]
    test = labelled_rollouts([episode(seed) for seed in range(50, 60)])
    assert np.array_equal(scores(ClassifierJudge.from_pretrained(out), test), scores(judge, test))
    with pytest.raises(ValueError, match="already holds a judge"):
        train_judge(config)
    with_val = dataclasses.replace(config, val=config.data[0], overwrite=True)
    with pytest.raises(ValueError, match="both training and validation"):
        train_judge(with_val)
    few = dataclasses.replace(config, overwrite=True, max_episodes=12)
    assert train_judge(few)[0].config.trained_on["rollouts"] == {"real": 9}


def test_variants_of_a_recording_stay_together(tmp_path):
    for seed in range(8):
        for k in range(3):
            copy = episode(seed)
            origin = {VARIANT_OF: f"{seed:03d}"} if k else {}
            copy = dataclasses.replace(copy, metadata={**copy.metadata, **origin})
            write_episode(tmp_path / "data" / (f"{seed:03d}_v{k:02d}" if k else f"{seed:03d}"), copy)
    config = quick(data=(str(tmp_path / "data"),), val_fraction=0.25)
    train, val = read_rollouts(config, None)
    recordings = [{Path(rollout.name).name[:3] for rollout in part} for part in (train, val)]
    assert len(train) == 18 and len(val) == 6 and not recordings[0] & recordings[1]
    (tmp_path / "val").mkdir()
    (tmp_path / "data" / "000_v01").rename(tmp_path / "val" / "000_v01")
    read_rollouts(dataclasses.replace(config, val=str(tmp_path / "val")), None)  # other folders have other recordings
    with pytest.raises(ValueError, match="8 episodes are in both.*variants of one recording"):
        read_rollouts(dataclasses.replace(config, val=f"{tmp_path}/val/../data/"), None)


def test_episodes_without_variants_are_split_as_ever(tmp_path):
    """The packaged judge was trained on such a split."""
    for seed in range(10):
        write_episode(tmp_path / f"{seed:03d}", episode(seed))
    train, val = read_rollouts(quick(data=(str(tmp_path),), val_fraction=0.3, seed=4), None)
    order = np.random.default_rng(4).permutation(10)
    assert [Path(r.name).name for r in val] == [f"{i:03d}" for i in sorted(order[:3])]
    assert [Path(r.name).name for r in train] == [f"{i:03d}" for i in sorted(order[3:])]
