"""Command-line options that experiments share."""

from __future__ import annotations

import argparse
from pathlib import Path

from driftlens.editing.methods import METHODS


def positive(text: str) -> int:
    """A number of cases or facts.

    Raises:
        ArgumentTypeError: If it is not a positive integer.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Which model, and where it runs."""
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", help="e.g. cuda; by default the CPU")


def arguments(
    description: str, cases: int, out: Path, counted: str = "cases"
) -> argparse.ArgumentParser:
    """What the experiments on the paper's cases have in common.

    Args:
        cases: How many cases by default.
        out: Where results go by default.
        counted: What the option for their number is called.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    add_model(parser)
    parser.add_argument("--data", type=Path, required=True, help="the paper's merged file")
    parser.add_argument(f"--{counted}", type=positive, default=cases)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--out", type=Path, default=out)
    return parser
