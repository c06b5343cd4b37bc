"""The ``foretoken`` command: each subcommand is a module with ``add_command(commands)``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import foretoken
from foretoken import demo, info, plot

_COMMANDS = (info, demo, plot)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="foretoken", description=foretoken.__doc__)
    parser.add_argument("--version", action="version", version=f"foretoken {foretoken.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for module in _COMMANDS:
        module.add_command(commands)
    parsed = parser.parse_args(arguments)
    status: int = parsed.run(parsed)
    return status
