"""What the commands ``prophet`` and ``prophrl`` share: parse, run, and tell a user's mistake in one line."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

import tyro

from .sims.rendering import RenderingUnavailableError

__all__ = ["run_commands"]


def run_commands(commands: dict[str, Callable[..., Any]], *, prog: str, description: str, config: tuple) -> None:
    """Run the subcommand that ``sys.argv`` names.

    A bad input or a missing system library is one line on stderr and exit status 2.

    Args:
        commands: functions by name of the subcommand.
        prog: name of the program.
        description: what it is for, in one sentence.
        config: markers of ``tyro.conf``.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("OpenGL").setLevel(logging.WARNING)  # it reports every optional accelerator that is absent
    try:
        tyro.extras.subcommand_cli_from_dict(commands, prog=prog, description=description, config=config)
    except (ValueError, FloatingPointError, RenderingUnavailableError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        raise SystemExit(2) from error
