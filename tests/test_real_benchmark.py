"""The tables on real recordings run to their end at small size; arms differ in what they say, finished runs stay."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from benchmarks import real
from benchmarks.real import ARMS, SHIPPED, Config, Run, draw, held_out, main, play, table
from prophet_gym.data.record import record
from prophet_gym.registration import ASSETS

pytestmark = [pytest.mark.programs, pytest.mark.render]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Config]:
    """Recordings of Tabletop in the place of Bridge's, its packaged world and codec in the place of trained ones."""
    root = tmp_path_factory.mktemp("real")
    for name, episodes, seed, steps in (("bridge", 2, 6_100_000, 40), ("bridge-val", 1, 1_600_000, 26)):
        record(root / "runs" / "data" / name, episodes, seed, workers=0, steps=steps, progress=False)
    (root / "assets").mkdir()
    for name in ("bridge", "tabletop"):
        (root / "assets" / name).symlink_to(ASSETS / "tabletop")
    (root / "runs" / "vae").mkdir()
    (root / "runs" / "vae" / "vae").symlink_to(ASSETS / "tabletop" / "vae")
    yield Config(runs=root / "runs", out=root / "out", sets=("bridge",), steps=1, jobs=1)
    shutil.rmtree(root)  # 330 MB of optimiser states


@pytest.fixture(scope="module")
def results(config: Config) -> dict[Run, dict]:
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(real, "ASSETS", config.runs.parent / "assets")
        found = {run: play(config, run) for run in (Run("bridge", arm, 0) for arm in (SHIPPED, *ARMS))}
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(True)
    return found


def test_every_arm_is_in_table_and_curves(config: Config, results: dict) -> None:
    text = table(config, results, "bridge")
    for part in ("| last frame repeated |", "| packaged |", "| packaged, shuffled actions |", "| without history |"):
        assert part in text, part
    assert f"{len(held_out(config, 'bridge'))} windows" in text and len(held_out(config, "bridge")) == 3
    draw(results, ("bridge",), config.out / "real.png")
    assert 10_000 < (config.out / "real.png").stat().st_size < 300_000


def test_arms_differ_in_what_they_say(config: Config, results: dict) -> None:
    networks = {}
    for arm in ARMS:
        folder = config.out / f"bridge-{arm}-0" / "run" / "prophet"
        networks[arm] = json.loads((folder / "transformer" / "config.json").read_text())
        assert json.loads((folder / "prophet.json").read_text())["still_below"] == 12.0
    assert networks["no_history"]["memory_levels"] == [] and networks["full"]["memory_levels"]
    assert networks["no_action_frames"]["action_frames"] == "none" and networks["full"]["action_frames"] == "spatial"
    inits = {
        arm: json.loads((config.out / f"bridge-{arm}-0" / "run" / "config.json").read_text())["init"] for arm in ARMS
    }
    assert inits["no_pretraining"] is None and inits["full"] == inits["no_history"] is not None
    scores = {arm: results[Run("bridge", arm, 0)]["table"]["predictors"]["model"]["psnr"]["value"] for arm in ARMS}
    assert scores["full"] > scores["no_pretraining"] + 1, "one step from fresh weights is worse"


def test_finished_runs_are_kept_and_bad_requests_refused(config: Config, results: dict, tmp_path: Path) -> None:
    run = Run("bridge", "full", 0)
    assert play(config, run) == results[run]
    with pytest.raises(ValueError, match="is of 1 steps; delete bridge-full-0"):
        play(replace(config, steps=2), run)
    with pytest.raises(ValueError, match=r"\['kitchen'\]: expected some of \['bridge', 'droid'\]"):
        main(replace(config, sets=("kitchen",)))
    with pytest.raises(ValueError, match="make_real.sh"):
        main(replace(config, runs=tmp_path))
