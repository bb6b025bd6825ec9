"""The benchmark of adaptation runs to its end at small size, keeps what is finished, and compares like with like."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from benchmarks import adaptation
from benchmarks.adaptation import UNADAPTED, Config, Run, draw, figure, play, results_of, summary, table
from prophet_gym.data.folder import EpisodeFolder
from prophet_gym.data.record import record
from prophet_gym.world_model.prophet import ProphetWorldModel

ARMS = ("adapt", "scratch", "full")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Config]:
    """Everything that the benchmark does, with a step per arm on two episodes; one process, so that patches hold."""
    config = Config(out=tmp_path_factory.mktemp("bench"), arms=ARMS, episodes=(2,), steps=1, held_out=2, frames=4)
    record(config.out / "held_out", 2, adaptation.HELD_OUT_SEED, workers=0, look="second", progress=False)
    record(config.out / "train-2", 2, adaptation.TRAINING_SEED, workers=0, look="second", progress=False)
    yield config
    AcceleratorState._reset_state(True)
    shutil.rmtree(config.out)  # 270 MB of optimiser states


@pytest.fixture(scope="module")
def results(config: Config) -> dict:
    threads = torch.get_num_threads()
    found = {run: play(config, run) for run in (UNADAPTED, *(Run(arm, 2, 0) for arm in ARMS))}
    torch.set_num_threads(threads)
    return found


@pytest.mark.render
@pytest.mark.programs
def test_every_arm_ends_in_a_table_and_a_curve(config: Config, results: dict) -> None:
    found = summary(config, results)
    assert [(row["arm"], row["episodes"]) for row in found["rows"]] == [("base", 0), *((arm, 2) for arm in ARMS)]
    assert all(row["epe_mean"]["low"] <= row["epe_mean"]["value"] <= row["epe_mean"]["high"] for row in found["rows"])
    text = table(found)
    for part in ("| packaged, as it is | 0 |", "| from scratch | 2 |", "last frame repeated", "codec alone", "1 steps"):
        assert part in text, part
    draw(found, config.out / "curve.png")
    assert (config.out / "curve.png").stat().st_size < 100_000
    assert {episode.metadata["look"] for episode in EpisodeFolder(config.out / "held_out")} == {"second"}


@pytest.mark.render
@pytest.mark.programs
def test_arms_differ_in_their_start_and_in_nothing_else(config: Config, results: dict) -> None:
    folders = {arm: config.out / f"{arm}-2-0" for arm in ARMS}
    base = ProphetWorldModel.from_pretrained(adaptation.BASE)
    runs = {arm: folders[arm] / ("world-run" if arm == "adapt" else "run") for arm in ARMS}
    loops = {arm: json.loads((runs[arm] / "config.json").read_text())["loop"] for arm in ARMS}
    for key in ("steps", "batch_size", "seed", "warmup_steps", "eval_every"):
        assert len({loops[arm][key] for arm in ARMS}) == 1, key
    (kept,) = (runs["adapt"] / "clips").glob("*/actions.npy")
    clips = np.load(kept)
    assert len(clips) == 1  # the other episode is held out
    for arm in ("scratch", "full"):
        (cached,) = (config.out / "cache-2").glob("train-*/*/actions.npy")
        assert np.array_equal(np.load(cached), clips)
        world = ProphetWorldModel.from_pretrained(folders[arm] / "best")
        for ours, theirs in zip(world.codec.vae.parameters(), base.codec.vae.parameters(), strict=True):
            assert torch.equal(ours, theirs)
        assert world.transformer.config.num_layers == base.transformer.config.num_layers
    start = base.transformer.proj_out.weight
    distance = {}
    for arm in ("scratch", "full"):
        end = ProphetWorldModel.from_pretrained(folders[arm] / "best").transformer.proj_out.weight
        distance[arm] = float((end - start).detach().abs().mean())
    assert distance["full"] < 0.1 * distance["scratch"]


@pytest.mark.render
@pytest.mark.programs
def test_finished_runs_are_kept_and_foreign_ones_refused(
    config: Config, results: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adaptation, "adapt", lambda settings: pytest.fail("trained anew"))
    assert play(config, Run("adapt", 2, 0)) == results[Run("adapt", 2, 0)]
    (known,) = results_of(replace(config, arms=()), [])  # what earlier calls left
    assert known == results
    with pytest.raises(ValueError, match="'steps': 1.*delete adapt-2-0"):
        play(replace(config, steps=2), Run("adapt", 2, 0))
    with pytest.raises(ValueError, match=r"arms \['adopt'\]"):
        adaptation.main(replace(config, arms=("adopt",)))


def test_a_figure_averages_seeds_before_it_resamples_episodes() -> None:
    rng = np.random.default_rng(0)
    level = rng.normal(size=200)
    seeds = [{"scores": {"psnr": list(level + shift)}} for shift in (-10.0, 10.0)]
    found = figure(seeds, "psnr")
    assert found["value"] == pytest.approx(level.mean())
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * level.std() / 200**0.5, rel=0.15)
    assert figure([{"scores": {"psnr": [1.0, None, 3.0]}}], "psnr")["n"] == 2
