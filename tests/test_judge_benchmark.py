"""The benchmark of the packaged judge: its baseline on pixels, its paired comparison, and one small run to the end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from benchmarks import judge as benchmark
from benchmarks.judge import Config, Point, blame, choose_points, compare, figures, main
from benchmarks.pixel_rule import PixelRule
from prophet_gym import check_judge
from prophet_gym.data.record import record_episode
from prophet_gym.sims.tabletop import TabletopSim

PUT, PUSH = "put the red block on the {} plate", "push the red block to the {} edge"
COLOURS = {"blue": (46, 84, 217), "white": (245, 245, 245), "red": (209, 33, 31)}


def film(block: list[tuple[float, float] | None], plate: str = "blue", length: int = 9) -> np.ndarray:
    """A grey table, a plate around (40, 40), and a block where it is said to be in the last frames."""
    places = [(16.0, 20.0)] * (length - len(block)) + block
    frames = np.full((length, 64, 64, 3), (168, 160, 148), np.uint8)
    for frame, place in zip(frames, places, strict=True):
        cv2.ellipse(frame, (40, 40), (7, 6), 0, 0, 360, COLOURS[plate], -1)
        if place is not None:
            corner = np.round(np.array(place) - 3).astype(int)
            cv2.rectangle(frame, corner, corner + 6, COLOURS["red"], -1)
    return frames


@pytest.mark.parametrize("plate", ["blue", "white"])
def test_the_rule_wants_the_block_within_the_rim_in_all_late_frames(plate: str) -> None:
    rule, words = PixelRule(), PUT.format(plate)
    there = (41.0, 39.0)
    assert rule(film([there] * 6, plate), words).success is True
    assert rule(film([there] * 6, plate), words).score > rule(film([(45.0, 40.0)] * 6, plate), words).score > 0.5
    for late in ([(49.0, 40.0)] * 6, [(30.0, 20.0), *[there] * 5], [*[there] * 5, (30.0, 20.0)], [*[there] * 5, None]):
        assert rule(film(late, plate), words).success is False, late
    assert PixelRule(0.3)(film([(48.0, 40.0)] * 6, plate), words).success is True
    assert rule(np.full((4, 64, 64, 3), 160, np.uint8), words).score == 0.0, "no plate, no success"


def test_the_rule_knows_the_outer_quarters_of_the_picture_and_its_own_tasks() -> None:
    rule = PixelRule()
    for at, left, right in (((10.0, 30.0), True, False), ((54.0, 30.0), False, True), ((25.0, 30.0), False, False)):
        frames = film([at] * 6)
        assert [rule(frames, PUSH.format(side)).success for side in ("left", "right")] == [left, right]
    assert not rule(film([(10.0, 30.0)]), "open the drawer").valid
    check_judge(rule)


def test_the_rule_agrees_with_the_simulator_about_experts_and_failures() -> None:
    sim, rule = TabletopSim(), PixelRule()
    for seed, behaviour in ((2_600_000, "expert"), (2_600_001, "expert"), (2_600_002, "never_close")):
        episode = record_episode(sim, seed, behaviour=behaviour)
        assert rule(np.asarray(episode.frames), episode.instruction).success == episode.success, (seed, behaviour)
    sim.close()


def row(label: bool, judge: float, rule: float, split: str = "test", real: float | None = None) -> dict:
    scores = {"judge_imagined": judge, "rule_imagined": rule, "judge_real": judge / 2 if real is None else real}
    return {"split": split, "source": "expert", "episode": "e", "label": label, "rule_real": rule, **scores}


ROWS = [row(True, 0.9, 0.8)] * 4 + [row(True, 0.9, 0.2)] * 5 + [row(False, 0.1, 0.7)] * 3 + [row(False, 0.8, 0.1)]
ROWS += [row(False, 0.1, 0.1)] * 4


def test_judges_are_compared_on_the_same_episodes() -> None:
    one, other, config = Point("one", "judge", 0.5), Point("other", "rule", 0.5), Config(bootstrap=400)
    report = compare(ROWS, "imagined", one, other, config)
    assert (report["first_only_right"], report["second_only_right"]) == (8, 1)
    assert report["mcnemar_p"] == pytest.approx(2 * (1 + 9) / 2**9)  # 0 or 1 of 9 fair coins, both sides
    assert report["accuracy"]["value"] == pytest.approx(7 / 17)
    assert 0 < report["accuracy"]["low"] < 7 / 17 < report["accuracy"]["high"] < 1
    swapped = compare(ROWS, "imagined", other, one, config)
    assert swapped["auc"]["value"] == pytest.approx(-report["auc"]["value"]) and report["auc"]["low"] >= 0
    assert figures(ROWS, "imagined", one, config)["f_beta"] - figures(ROWS, "imagined", other, config)[
        "f_beta"
    ] == pytest.approx(report["f_beta"]["value"])


def test_thresholds_come_from_imagined_rollouts_and_blame_goes_to_frames_or_judge() -> None:
    points = choose_points(ROWS, 0.61)
    chosen = {point.name: point.threshold for point in points}
    assert (chosen["trained, at 0.5"], chosen["trained, as packaged"]) == (0.5, 0.61)
    assert chosen["trained, best F-1.5"] == chosen["trained, precision 0.85"] == pytest.approx(0.85)
    dirty = [row(False, 0.95, 0.1), row(True, 0.9, 0.9)]
    assert "trained, precision 0.85" not in {point.name for point in choose_points(dirty, 0.5)}
    wrong = [row(False, 0.9, 0.9, real=0.1), row(False, 0.9, 0.1, real=0.9), row(True, 0.9, 0.9)]
    assert blame(wrong, Point("", "judge", 0.5)) == {
        "wrong": 2, "right_on_recorded_frames": 1, "pixel_rule_is_wrong_too": 1,
    }  # fmt: skip


def test_seeds_of_the_sets_are_held_out_and_disjoint() -> None:
    config = Config(episodes=5000, calibration=5000)
    seeds = [seed for _, _, first, count in benchmark._sets(config) for seed in (first, first + count - 1)]
    assert seeds == sorted(set(seeds)) and seeds[0] >= 2_000_064 and seeds[-1] < 3_000_000
    with pytest.raises(ValueError, match="5001 episodes of expert for test: expected 1 to 5000"):
        list(benchmark._sets(replace(config, episodes=5001)))


@pytest.mark.programs
def test_the_command_records_judges_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "SOURCES", ("expert", "failures", "tabletop-sft-in-world"))
    config = Config(out=tmp_path, episodes=2, calibration=2, workers=0, bootstrap=20)
    main(config)
    report = json.loads((tmp_path / "judge.json").read_text())
    assert report["n"] == 6 and report["real"]["sources"]["expert"]["judge"]["accuracy"]["value"] == 1.0
    assert "| real | pixel rule at 0.5 (0.50) |" in (tmp_path / "judge.md").read_text()
    for name in ("judge_operating.png", "judge_sources.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    (meta, *_) = tmp_path.glob("data-*/test/tabletop-sft-in-world/*/meta.json")
    assert json.loads(meta.read_text())["metadata"]["behaviour"] == "noisy_policy_in_world"
    before = (tmp_path / "judge.json").read_bytes()
    monkeypatch.setattr(benchmark, "score_all", lambda *_: pytest.fail("scored again"))
    main(config)
    assert (tmp_path / "judge.json").read_bytes() == before
    with pytest.raises(pytest.fail.Exception, match="scored again"):
        main(replace(config, seed=1))
