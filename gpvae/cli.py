"""The `gpvae` command: each module of `MODULES` adds its subcommands."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module, metadata

from gpvae.disk import DISK
from gpvae.errors import GPVAEError, TrainingError

# Each offers add_parser(subparsers) and sets `run(args) -> int`. None may import torch at its
# top level: `gpvae --help` answers at once.
MODULES = (
    "gpvae.reproduce",
    "gpvae.train_command",
    "gpvae.sweep_command",
    "gpvae.bench.command",
    "gpvae.data.cli",
)

FAILED, MISUSE, INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0 is success, 1 a failed run, 2 a mistake in what was asked for, 130 an interruption.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    if not hasattr(args, "run"):
        parser.print_help()
        return MISUSE
    try:
        code = args.run(args)
        sys.stdout.flush()  # a closed pipe shows here, not while the interpreter shuts down
        return code
    except GPVAEError as error:
        return _complain(error, exit_code(error))
    except KeyboardInterrupt:
        # The abandoned cell's task would be reported with its traceback at exit.
        logging.getLogger("asyncio").disabled = True
        print("gpvae: interrupted; finished results are kept and will be reused", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        _silence()
        return FAILED
    except OSError as error:
        if error.errno not in DISK:
            raise
        place = f" {error.filename}" if error.filename else ""
        return _complain(f"cannot write{place}: {error.strerror}", FAILED)


def build_parser() -> argparse.ArgumentParser:
    """The parser with every subcommand."""
    parser = argparse.ArgumentParser(
        prog="gpvae",
        description="Gaussian-process random encoders for variational autoencoders.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"gpvae {_version()}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name in MODULES:
        import_module(name).add_parser(subparsers)
    return parser


def exit_code(error: GPVAEError) -> int:
    """Misuse unless the error says that something which was well asked for has failed."""
    return getattr(error, "exit_code", FAILED if isinstance(error, TrainingError) else MISUSE)


def _complain(message: object, code: int) -> int:
    print(f"gpvae: error: {message}", file=sys.stderr)
    return code


def _silence() -> None:
    """Nobody reads standard output any more: let the interpreter flush it into nothing."""
    with suppress(OSError, ValueError):  # a replaced stdout may have no descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _version() -> str:
    try:
        return metadata.version("gpvae")
    except metadata.PackageNotFoundError:  # run from the sources without an installation
        return "(not installed)"
