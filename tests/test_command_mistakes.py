"""What `prophet` and `prophrl` say to numbers and paths that do not do, and what they report of a recording."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from reach import make_reach, make_reach_policy
from squares import square_episode

from prophet_gym import cli
from prophet_gym.command_line import run_commands
from prophet_gym.data.folder import write_episode
from prophrl_agents import cli as agents_cli
from prophrl_agents.evaluate import evaluate_policy, evaluate_starts

Refused = Callable[..., str]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command that ends with status 2; gives the one line that it says."""

    def run(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        with pytest.raises(SystemExit) as stopped:
            (cli if words[0] == "prophet" else agents_cli).main()
        assert stopped.value.code == 2
        said = capsys.readouterr().err.strip()
        assert said.startswith(f"{words[0]}: ") and "\n" not in said
        return said

    return run


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "afile").write_text("mine")
    return tmp_path / "afile"


@pytest.mark.parametrize(
    "words", ["prophet train vae --data x --validation None --steps 0", "prophrl sft --data x --steps 0"]
)
def test_settings_are_refused_without_the_parser_s_own_names(refused: Refused, words: str) -> None:
    program, *rest = words.split()
    if program == "prophrl":
        rest.insert(1, "smoke")
    assert refused(program, *rest) == f"{program}: steps=0: expected at least 1"


def test_long_messages_are_whole(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parser breaks them to the width of the terminal."""
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("FORCE_COLOR", "1")
    said = refused("prophrl", "train", "smoke", "--rollouts-per-update", "100", "--group-size", "8")
    assert said.endswith("environments: whole groups, as many of each environment") and "__tyro" not in said


def test_other_mistakes_keep_their_box(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["prophet", "info", "--chekpoint", "x"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2 and "Unrecognized options" in capsys.readouterr().err


@pytest.mark.parametrize("episodes", [-1, 0, 1])
def test_too_few_episodes_to_evaluate(refused: Refused, tmp_path: Path, episodes: int) -> None:
    said = refused("prophet", "eval", tmp_path, "--episodes", episodes)
    assert f"--episodes {episodes}: expected at least 2" in said


@pytest.mark.parametrize("episodes", [-1, 0])
def test_no_episodes_to_audit(refused: Refused, tmp_path: Path, episodes: int) -> None:
    write_episode(tmp_path / "episode_0", square_episode(0))
    assert f"{episodes} episodes to audit; expected at least 1" in refused(
        "prophet", "audit", tmp_path, "--episodes", episodes
    )


def test_negative_noise_seeds_are_named() -> None:
    env = make_reach(1)
    with pytest.raises(ValueError, match="noise_seed is -1, expected at least 0"):
        evaluate_policy(make_reach_policy(), env, evaluate_starts(1, 0), noise_seed=-1)
    env.close()


@pytest.mark.render
def test_files_in_the_way_are_named(refused: Refused, file: Path) -> None:
    policy = Path(agents_cli.__file__).parent / "assets" / "tabletop-sft"
    write_episode(file.parent / "data" / "episode_0", square_episode(0))
    run = ["--data", file.parent / "data", "--validation", "None", "--run"]
    assert f"{file} is a file" in refused("prophet", "train", "vae-smoke", *run, file)
    assert "Not a directory; give another path" in refused("prophet", "train", "vae-smoke", *run, file / "run")
    assert f"{file}: File exists" in refused("prophrl", "eval", policy, "--n", 1, "--out", file)
    assert f"{file}: File exists" in refused("prophrl", "record", file, "--policy", policy, "--episodes", 1)
    assert f"{file}: File exists" in refused("prophet", "audit", file.parent / "data", "--out", file / "x.json")
    assert f"{file} is a file" in refused("prophet", "snapshots", file, "--count", 1, "--overwrite")
    assert file.read_text() == "mine"


def test_errors_that_name_no_path_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        """Fail."""
        raise ConnectionError("the server is down")

    monkeypatch.setattr(sys, "argv", ["prophet", "fail"])
    with pytest.raises(ConnectionError, match="the server is down"):
        run_commands({"fail": fail, "other": fail}, prog="prophet", description="Tests.", config=())


@pytest.mark.render
def test_snapshots_replace_a_set_and_nothing_else(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = tmp_path / "starts"
    words = ["prophet", "snapshots", str(starts), "--count", "1"]
    monkeypatch.setattr(sys, "argv", words)
    cli.main()
    assert "give another folder, or --overwrite to replace" in refused(*words)
    (starts / "thesis.txt").write_text("mine")
    assert f"{starts} also holds thesis.txt, which replacing it would delete" in refused(*words, "--overwrite")
    assert (starts / "thesis.txt").read_text() == "mine" and (starts / "0000.png").exists()
    (starts / "thesis.txt").unlink()
    monkeypatch.setattr(sys, "argv", [*words[:-1], "2", "--overwrite"])
    cli.main()
    assert (starts / "0001.png").exists()


@pytest.mark.render
def test_a_recording_is_counted_and_other_lengths_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(program: str, *words: object) -> str:
        monkeypatch.setattr(sys, "argv", [program, "record", str(tmp_path), "--workers", "0", *map(str, words)])
        (cli if program == "prophet" else agents_cli).main()
        return capsys.readouterr().out.strip()

    assert said("prophet", "--episodes", 2, "--steps", 3) == f"2 episodes recorded, 2 in {tmp_path}"
    assert said("prophet", "--episodes", 1, "--seed", 100, "--steps", 3) == f"1 episodes recorded, 3 in {tmp_path}"
    shown = said("prophet", "--episodes", 2, "--steps", 2)
    assert shown.startswith(f"0 episodes recorded, 3 in {tmp_path}\n3 of them are not 2 commands long")
    assert "give another folder" in shown
    policy = Path(agents_cli.__file__).parent / "assets" / "tabletop-sft"
    shown = said("prophrl", "--episodes", 1, "--steps", 3, "--policy", policy)
    assert shown == f"1 episodes recorded, 4 in {tmp_path}"


def test_info_promises_what_it_prints(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["prophet", "info", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "README.md has the measured" in " ".join(capsys.readouterr().out.replace("│", " ").split())
    monkeypatch.setattr(sys, "argv", ["prophet", "info"])
    cli.main()
    shown = capsys.readouterr().out
    assert all(f'"{name}"' in shown for name in ("denoiser parameters", "trained_on", "action_spec"))
