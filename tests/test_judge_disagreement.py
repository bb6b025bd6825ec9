"""Two judges on the same rollouts: how far they agree, and who is right where they do not."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from prophet_gym.actions import ACTION_SPECS
from prophet_gym.cli import main
from prophet_gym.data.episode import Episode
from prophet_gym.data.folder import write_episode
from prophet_gym.judges import (
    ClassifierConfig,
    ClassifierJudge,
    Verdict,
    cohen_kappa,
    compare_verdicts,
    format_disagreement,
)


def test_kappa_is_that_of_the_textbook() -> None:
    first = np.array([True] * 25 + [False] * 25)
    second = np.array([True] * 20 + [False] * 5 + [True] * 10 + [False] * 15)
    assert cohen_kappa(first, second) == pytest.approx(0.4)
    assert cohen_kappa(first, first) == 1.0 and cohen_kappa(first, ~first) == pytest.approx(-1.0)
    assert np.isnan(cohen_kappa(first[:5], second[:5])), "both always say the same one thing"


def test_disagreement_counts_who_is_right_and_leaves_abstentions_out() -> None:
    def verdicts(said: list) -> list[Verdict]:
        return [Verdict.abstain("no idea") if each is None else Verdict(each, float(each)) for each in said]

    first = [True, True, True, False, False, False, None, True]
    second = [True, True, False, True, True, False, True, None]
    truth = np.array([1, 0, 1, 1, 1, 0, 1, 1], bool)
    report = compare_verdicts(verdicts(first), verdicts(second), truth, bootstrap=200, seed=3)
    assert (report["n"], report["decided"], report["abstained"]) == (8, 6, [1, 1])
    assert report["table"] == {"both_success": 2, "first_only": 1, "second_only": 2, "both_failure": 1}
    assert report["right_together"]["value"] == pytest.approx(2 / 3)
    assert report["first_right"]["value"] == pytest.approx(1 / 3)
    assert report["second_right"]["value"] == pytest.approx(2 / 3)
    assert report["kappa"]["low"] <= report["kappa"]["value"] <= report["kappa"]["high"]
    assert report == compare_verdicts(verdicts(first), verdicts(second), truth, bootstrap=200, seed=3)
    assert json.loads(json.dumps(report)) == report
    text = format_disagreement(report, "small", "large")
    assert "where they disagree (3), right is small: 0.333" in text and "large: success" in text
    with pytest.raises(ValueError, match="same rollouts are compared, got 8, 7 and 8"):
        compare_verdicts(verdicts(first), verdicts(second)[:7], truth)


def test_a_second_judge_is_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(8):
        frames = np.random.default_rng(number).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
        write_episode(
            tmp_path / "data" / f"{number}",
            Episode(
                images=frames,
                actions=np.zeros((2, 7), np.float32),
                action_spec=ACTION_SPECS["tabletop"],
                instruction="lift it",
                fps=10.0,
                labels={"success": np.array([False, False, number % 2 == 0])},
                name=f"{number}",
            ),
        )
    for seed in (1, 2):
        config = ClassifierConfig(("lift", "it"), (16, 16), width=8)
        ClassifierJudge(config, seed=seed).save_pretrained(tmp_path / f"judge{seed}")
    out = tmp_path / "new" / "figures.json"
    words = ["prophet", "judge", "eval", str(tmp_path / "data"), "--checkpoint", "none"]
    named = ["--judge", str(tmp_path / "judge1"), "--second", str(tmp_path / "judge2"), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [*words, *named])
    main()
    assert "judge1 beside judge2, real frames" in capsys.readouterr().out
    report = json.loads(out.read_text())["real"]
    assert report["disagreement"]["decided"] == report["second"]["n"] == 8
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit):
        main()
    assert "name one with --judge" in capsys.readouterr().err
