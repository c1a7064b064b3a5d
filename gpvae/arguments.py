"""What the subcommands share: values as they are typed, and progress as it is printed."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterable
from typing import Any

from gpvae.errors import ConfigError

JSON_WORDS = {"true": True, "false": False, "null": None}


def positive(text: str) -> int:
    """Parse a positive whole number."""
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def assignment(text: str) -> tuple[str, Any]:
    """Parse `KEY=VALUE`, see `literal`; keys are names, dotted or not."""
    key, separator, value = text.partition("=")
    if not (separator and all(part.isidentifier() for part in key.split("."))):
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key, literal(value)


def literal(text: str) -> Any:
    """A value as Python or JSON write it (`true` and `True`); what is neither is text."""
    if text in JSON_WORDS:
        return JSON_WORDS[text]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def collected(assignments: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """The values by key.

    Raises:
        ConfigError: a key that is given two values.
    """
    values: dict[str, Any] = {}
    for key, value in assignments:
        if values.setdefault(key, value) != value:
            raise ConfigError(f"{key} is given as {values[key]!r} and as {value!r}; give one.")
    return values


def say(line: str) -> None:
    """Print a line at once, so that a pipe shows progress, too."""
    print(line, flush=True)
