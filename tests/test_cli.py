"""``prophet`` and its subcommands explain themselves."""

from __future__ import annotations

import re
import sys

import pytest

from prophet_gym.cli import COMMANDS, main

NESTED = {
    "train": ["vae", "vae-smoke", "world-model", "world-model-smoke", "pretrain"],
    "judge": ["train", "train-vlm", "eval", "calibrate", "label"],
}
PATHS = [[], *([name] for name in COMMANDS), *([name, second] for name in NESTED for second in NESTED[name])]


def help_of(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr(sys, "argv", ["prophet", *words, "--help"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("words", PATHS, ids=lambda words: " ".join(words) or "prophet")
def test_help(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    shown = help_of(words, monkeypatch, capsys)
    assert f"usage: prophet {' '.join(words)}".strip() in shown
    listed = re.findall(r"•\s+([a-z][a-z-]*)", shown)
    assert set(listed) == (set(COMMANDS) if not words else set(NESTED.get(words[0], []) if len(words) == 1 else []))


def test_a_users_mistake_is_told_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["prophet", "demo", "--episodes", "1"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "expected at least 2" in capsys.readouterr().err
