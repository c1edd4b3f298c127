"""The ``hdrops`` command as it is installed: the commands of :mod:`hdrops.cli` and those that need the systems."""

import argparse
import sys
from collections.abc import Sequence

from hdrops import cli
from hdrops.models import _predict_command


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    return cli.build_parser(add_commands)


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds predict."""
    purpose = "make an HDR image of photographs by one of the published systems"
    _predict_command.add_options(cli.add_command(commands, "predict", _predict_command.run, purpose))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line ``argv``; returns the exit code."""
    return cli.main(argv, build_parser)


if __name__ == "__main__":
    sys.exit(main())
