"""Rules of the repository itself: versions, packaged files, public names, documentation, file length, private paths."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PUBLIC_API = json.loads((ROOT / "tests" / "public_api.json").read_text())
ASSETS = ROOT / "prophet_gym" / "assets", ROOT / "prophrl_agents" / "assets"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
HEAVY = ("mujoco", "transformers", "vllm", "ray", "lerobot", "stable_baselines3", "matplotlib", "pyarrow", "h5py")
HEAVY += ("openai", "diffusers", "peft", "accelerate")


def tracked_files() -> list[Path]:
    """Files that git tracks or would track; outside a checkout (an sdist) the test that asks is skipped."""
    command = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in result.stdout.split("\0") if name and (ROOT / name).is_file()]


def code_blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}[^\n]*\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def test_versions_agree() -> None:
    import prophet_gym

    version = PYPROJECT["project"]["version"]
    assert prophet_gym.__version__ == version
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert newest is not None and newest[1] == version


def test_constraints_pin_every_core_and_tool_dependency() -> None:
    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[<>=\[; ]", line)[0] for line in requirements}

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9.]+", pin) for pin in pins), pins
    extras = PYPROJECT["project"]["optional-dependencies"]
    pinned = ("dev", "docs", "viz", "ray", "data", "vlm")
    needed = names(PYPROJECT["project"]["dependencies"] + [line for extra in pinned for line in extras[extra]])
    assert needed == names(pins)


def test_wheel_contains_code_and_assets() -> None:
    from hatchling.builders.wheel import WheelBuilder

    packaged = {file.distribution_path for file in WheelBuilder(str(ROOT)).recurse_included_files()}
    folders = [*ASSETS, ROOT / "prophet_gym" / "judges" / "prompts"]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assets = {str(path.relative_to(ROOT)) for path in files}
    assert assets and assets <= packaged, sorted(assets - packaged)
    assert {"prophet_gym/__init__.py", "prophet_gym/cli.py", "prophrl_agents/__init__.py"} <= packaged
    assert any(name.endswith(".safetensors") for name in packaged)
    assert not [name for name in packaged if not name.startswith(("prophet_gym/", "prophrl_agents/"))]


def test_shipped_checkpoints_stay_small() -> None:
    def megabytes(folder: Path) -> float:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6

    worlds, policies = ASSETS
    folders = [path for assets in ASSETS for path in assets.iterdir() if path.is_dir()]
    for folder in folders:
        assert (folder / "README.md").is_file(), f"{folder.name} has no model card"
    for folder in (*(path for path in folders if path.parent == worlds), policies):
        assert megabytes(folder) <= 15, f"{folder.name} takes {megabytes(folder):.1f} MB; at most 15 MB are shipped"


@pytest.mark.parametrize("module_name", sorted(PUBLIC_API))
def test_public_names_are_frozen_and_importable(module_name: str) -> None:
    module = importlib.import_module(module_name)
    added = set(module.__all__) - set(PUBLIC_API[module_name])
    removed = set(PUBLIC_API[module_name]) - set(module.__all__)
    assert not added and not removed, (
        f"{module_name}.__all__ gained {sorted(added)} and lost {sorted(removed)}. "
        "If that is meant, change tests/public_api.json and CHANGELOG.md in the same commit."
    )
    assert not [name for name in module.__all__ if not hasattr(module, name)]


def test_every_package_with_public_names_is_frozen() -> None:
    packages = [
        path.parent for name in ("prophet_gym", "prophrl_agents") for path in (ROOT / name).rglob("__init__.py")
    ]
    public = {".".join(p.relative_to(ROOT).parts) for p in packages if "__all__" in (p / "__init__.py").read_text()}
    assert public == set(PUBLIC_API)


def test_base_import_is_light() -> None:
    modules = ["prophet_gym", "prophet_gym.vector_env", "prophrl_agents", "prophrl_agents.ray_workers"]
    code = f"""
import importlib, sys
for module in {modules}:
    importlib.import_module(module)
    print(module, [name for name in {HEAVY!r} if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [f"{module} []" for module in modules], "imported what it does not need"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_compile(page: Path) -> None:
    for number, block in enumerate(code_blocks(page, "python")):
        compile(block, f"{page.name}, python block {number}", "exec")


def test_readme_script_runs(tmp_path: Path) -> None:
    (script,) = code_blocks(ROOT / "README.md", "python")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "judged success" in result.stdout


def help_of(program: str, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> str | None:
    """What ``program words --help`` prints; None if there is no such command."""
    main = importlib.import_module({"prophet": "prophet_gym.cli", "prophrl": "prophrl_agents.cli"}[program]).main
    monkeypatch.setattr(sys, "argv", [program, *words, "--help"])
    with pytest.raises(SystemExit) as stopped:
        main()
    shown = capsys.readouterr().out
    return None if stopped.value.code else shown


def documented_commands(program: str) -> list[list[str]]:
    """Words of every call of a program in shell blocks and inline code, continuation lines joined."""
    text = "\n".join(page.read_text() for page in PAGES).replace("\\\n", " ")
    return [line.split() for line in re.findall(rf"(?:^|`|\.venv/bin/){program}((?: +[^`\s#|]+)+)", text, re.MULTILINE)]


@pytest.mark.parametrize("program", ["prophet", "prophrl"])
def test_documented_commands_and_flags_exist(
    program: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags: dict[tuple[str, ...], set[str]] = {}
    for call in documented_commands(program):
        words = itertools.takewhile(lambda word: re.fullmatch(r"[a-z][a-z-]*", word), call)
        used = {word.split("=")[0] for word in call if word.startswith("--")}
        flags.setdefault(tuple(words)[:2], set()).update(used)
    for words, used in sorted(flags.items()):
        shown = help_of(program, words, monkeypatch, capsys)
        assert shown is not None, f"documented, but unknown: {program} {' '.join(words)}"
        unknown = {flag for flag in used if not re.search(rf"{flag}\b(?!-)", shown)}
        assert not unknown, f"documented, but unknown: {program} {' '.join(words)} {sorted(unknown)}"


def test_flags_named_alone_exist(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A flag in inline code, such as `--resume`, belongs to a command that its page speaks of."""
    for page in PAGES:
        text = page.read_text()
        flags = set(re.findall(r"`(--[a-z][a-z-]*)", text))
        named = r"\b(prophet|prophrl) ((?:train |judge |sft )?[a-z][a-z-]*)"
        calls = set(re.findall(named, text)) if flags else set()
        shown = "".join(help_of(name, tuple(call.split()), monkeypatch, capsys) or "" for name, call in sorted(calls))
        unknown = {flag for flag in flags if not re.search(rf"{flag}\b(?!-)", shown)}
        assert not unknown, f"{page.name}: documented, but unknown: {sorted(unknown)}"


def test_documented_examples_exist() -> None:
    named = {name for page in PAGES for name in re.findall(r"(?:examples|benchmarks)/\w+\.py", page.read_text())}
    assert named and not [name for name in named if not (ROOT / name).is_file()]


def test_documentation_pages_are_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    pages = [str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")]
    assert not [page for page in pages if page not in navigation]


def test_no_file_outgrows_its_idea() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in tracked_files() if path.suffix == ".py"}
    assert not {str(path.relative_to(ROOT)): n for path, n in lengths.items() if n > 400}


def test_no_private_paths_or_registries() -> None:
    folders = "|".join(["work", "farm", "tmp", "root", "home"])
    private = re.compile(rf"(^|[^A-Za-z.])/({folders})/|index" + r"-url|find" + r"-links|python" + "hosted")
    found = []
    for path in tracked_files():
        if path.suffix in {".png", ".mp4", ".npz", ".safetensors", ".zip"}:
            continue
        lines = path.read_text(encoding="utf-8").splitlines()
        found += [f"{path.relative_to(ROOT)}:{i}: {line}" for i, line in enumerate(lines, 1) if private.search(line)]
    assert not found
