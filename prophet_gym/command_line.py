"""What the commands ``prophet`` and ``prophrl`` share: parse, run, and tell a user's mistake in one line."""

from __future__ import annotations

import io
import logging
import re
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from functools import partial, wraps
from typing import Any

import tyro

from .sims.rendering import RenderingUnavailableError

__all__ = ["run_commands"]


def run_commands(commands: dict[str, Callable[..., Any]], *, prog: str, description: str, config: tuple) -> None:
    """Run the subcommand that ``sys.argv`` names.

    A bad input, a path that does not do, or a missing system library is one line on stderr and exit status 2.

    Args:
        commands: functions by name of the subcommand.
        prog: name of the program.
        description: what it is for, in one sentence.
        config: markers of ``tyro.conf``.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("OpenGL").setLevel(logging.WARNING)  # it reports every optional accelerator that is absent
    deferred = {name: _deferred(function) for name, function in commands.items()}
    try:
        _parse(deferred, prog, description, config)()
    except (ValueError, FloatingPointError, RenderingUnavailableError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except OSError as error:
        if error.filename is None:  # not about a path
            raise
        print(f"{prog}: {error.filename}: {error.strerror}; give another path", file=sys.stderr)
        raise SystemExit(2) from error


def _deferred(function: Callable[..., Any]) -> Callable[..., Callable[[], Any]]:
    """The function with its arguments, to be called when parsing is over."""

    @wraps(function)
    def bind(*args: Any, **kwargs: Any) -> Callable[[], Any]:
        return partial(function, *args, **kwargs)

    return bind


def _parse(commands: dict[str, Callable[..., Any]], prog: str, description: str, config: tuple) -> Callable[[], Any]:
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            command: Callable[[], Any] = tyro.extras.subcommand_cli_from_dict(
                commands, prog=prog, description=description, config=config
            )
        return command
    finally:
        print(_without_inner_name(said.getvalue(), prog), end="", file=sys.stderr)


def _without_inner_name(text: str, prog: str) -> str:
    """What a config finds wrong with itself, in one line: tyro puts it in a box, under a name that nobody typed."""
    rows = [row.strip("│ ") for row in re.sub(r"\x1b\[[\d;]*m", "", text).splitlines()]
    found = re.search(r"Error parsing __tyro\S+: (.*?) (?:─|-){3}", " ".join(rows))  # up to the rule below it
    return text if found is None else f"{prog}: {found[1]}\n"
