"""Run the numbered notebooks headlessly: `gpvae reproduce`.

Each notebook runs in a kernel process of its own, in order, with parameters injected by
papermill. A notebook that fails does not stop the others. Jupyter and papermill are imported
inside functions only, so that this module (and the command's help) loads at once without them.
"""

from __future__ import annotations

import argparse
import errno
import math
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

from gpvae import events, paths
from gpvae.arguments import assignment, collected
from gpvae.disk import check_writable, disk_error
from gpvae.errors import ConfigError, NotebookError
from gpvae.events import NotebookRun, Summary
from gpvae.kernel import execute
from gpvae.notebooks import Notebook, check_parameters, find_notebooks, plain, quiet, select

CELL_TIMEOUT = 4 * 3600  # seconds that one cell may take


def reproduce(
    profile: str,
    only: str | Sequence[str] | None = None,
    force: bool = False,
    parameters: Mapping[str, Any] | None = None,
    cell_timeout: float | None = None,
    stream: TextIO | None = None,
    notebooks: Path | None = None,
) -> Summary:
    """Run the notebooks of one profile and print what was made.

    Args:
        profile: name of the profile, passed to every notebook.
        only: numbers ("02", "2") or name prefixes of the notebooks to run; all by default.
        force: recompute results that could be reused.
        parameters: further parameters; every selected notebook must have them.
        cell_timeout: seconds after which a cell counts as failed (default: `CELL_TIMEOUT`).
        stream: where progress goes (default: standard output).
        notebooks: folder of the notebooks (default: that of the checkout).

    Raises:
        ConfigError: an unknown profile or an impossible limit.
        NotebookError: an unknown notebook or parameter, or a notebook that cannot be run.
        RunError: a disk that is full or cannot be written to.
    """
    from gpvae.profiles import get_profile

    get_profile(profile)
    timeout = _limit(CELL_TIMEOUT if cell_timeout is None else cell_timeout)
    _check_installed()
    chosen = select(find_notebooks(notebooks or paths.notebooks()), only)
    check_parameters(chosen, parameters or {})
    values = {
        "profile": profile,
        "fresh_since": time.time() if force else 0.0,
        **plain(dict(parameters or {})),
    }
    check_writable(_executed_folder(profile), paths.figures(profile).absolute())
    return _run_all(chosen, values, timeout, stream or sys.stdout)


def _run_all(
    chosen: list[Notebook], values: Mapping[str, Any], timeout: int, stream: TextIO
) -> Summary:
    """Run the notebooks in order; whatever ends the run, say what was completed."""
    profile, began = values["profile"], time.monotonic()
    runs: list[NotebookRun] = []
    try:
        with Progress(stream, chosen) as progress:
            for notebook in chosen:
                progress.start(notebook)
                _run_one(notebook, values, timeout, progress.cell, runs)
                progress.finish(notebook, runs[-1])
                _stop_on_full_disk(runs[-1])
    finally:
        summary = Summary(
            profile=profile,
            runs=tuple(runs),
            not_started=tuple(each.name for each in chosen[len(runs) :]),
            seconds=time.monotonic() - began,
            figures=paths.figures(profile).absolute(),
            executed=_executed_folder(profile),
        )
        print(events.format_summary(summary), file=stream, flush=True)
    return summary


def _run_one(
    notebook: Notebook,
    values: Mapping[str, Any],
    timeout: int,
    on_cell: Callable[[int], None],
    runs: list[NotebookRun],
) -> None:
    """Run one notebook to its end or first failure and append how it went, even if stopped."""
    profile, began = values["profile"], time.monotonic()
    target = _executed_folder(profile) / notebook.path.name
    offset = events.read(profile)[1]
    failure, finished = None, False
    try:
        with tempfile.TemporaryDirectory(prefix="gpvae-") as scratch, quiet():
            failure = execute(notebook, values, timeout, on_cell, target, Path(scratch))
        finished = True
    finally:
        seconds, happened = time.monotonic() - began, tuple(events.read(profile, offset)[0])
        runs.append(NotebookRun(notebook.name, seconds, target, failure, happened, finished))


def _limit(seconds: float) -> int:
    """Whole seconds of a positive limit."""
    if not (0 < seconds < math.inf):
        raise ConfigError(f"the cell limit must be a positive number of seconds, not {seconds}.")
    return math.ceil(seconds)


def _check_installed() -> None:
    missing = [name for name in ("papermill", "nbformat", "ipykernel") if not find_spec(name)]
    if missing:
        raise NotebookError(
            f"running notebooks needs {' and '.join(missing)}: pip install {' '.join(missing)}"
        )


def _executed_folder(profile: str) -> Path:
    return paths.results(profile).absolute() / "notebooks"


def _stop_on_full_disk(run: NotebookRun) -> None:
    """The next notebooks would compute for hours what they cannot store either."""
    full = os.strerror(errno.ENOSPC)
    if run.failure and full in run.failure.message:
        raise disk_error(OSError(errno.ENOSPC, full), run.executed.parent)


class Progress:
    """One bar over all cells in a terminal; plain timed lines elsewhere."""

    def __init__(self, stream: TextIO, notebooks: Sequence[Notebook]) -> None:
        self.stream, self.began, self.done = stream, time.monotonic(), 0
        self.bar: Any = None
        self.stopped = threading.Event()
        if stream.isatty():
            from tqdm import tqdm

            total = sum(_size(notebook) for notebook in notebooks)
            self.bar = tqdm(total=total, unit="cell", file=stream, leave=False)
            threading.Thread(target=self._tick, daemon=True).start()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        if self.bar is not None:
            self.bar.close()

    def start(self, notebook: Notebook) -> None:
        """A notebook starts."""
        if self.bar is None:
            self._line(f"{notebook.name}: started")
        else:
            self.bar.set_description(notebook.name)

    def cell(self, index: int) -> None:
        """The cell of that index in the current notebook starts."""
        if self.bar is not None:
            self.bar.update(self.done + index - self.bar.n)

    def finish(self, notebook: Notebook, run: NotebookRun) -> None:
        """A notebook has ended, well or not."""
        self.done += _size(notebook)
        self.cell(0)
        if self.bar is None:
            self._line(f"{run.name}: {'failed' if run.failure else 'ok'} after {run.seconds:.1f} s")
        if run.failure:
            self._write(events.format_failure(run))

    def _line(self, text: str) -> None:
        self._write(f"[{time.monotonic() - self.began:7.1f} s] {text}")

    def _write(self, text: str) -> None:
        if self.bar is None:
            print(text, file=self.stream, flush=True)
        else:
            self.bar.write(text, file=self.stream)

    def _tick(self) -> None:
        """Move the bar's clock while a long cell runs."""
        while not self.stopped.wait(1.0):
            self.bar.refresh()


def _size(notebook: Notebook) -> int:
    return notebook.cells + 1  # papermill adds the injected parameters


def add_parser(subparsers: Any) -> None:
    """Add `gpvae reproduce` to the command line."""
    parser = subparsers.add_parser(
        "reproduce",
        help="run the notebooks and regenerate every figure and table",
        description="Run the numbered notebooks in order and regenerate every figure and table.",
        allow_abbrev=False,
    )
    parser.add_argument("--profile", default="digits", help="set of runs (default: %(default)s)")
    parser.add_argument(
        "--only",
        nargs="+",
        action="extend",
        metavar="NN",
        help="run only these notebooks, by number or beginning of the name",
    )
    parser.add_argument("--force", action="store_true", help="recompute what could be reused")
    parser.add_argument(
        "-p",
        "--parameter",
        dest="parameters",
        nargs="+",
        action="extend",
        type=assignment,
        metavar="NAME=VALUE",
        help="set a parameter of the selected notebooks",
    )
    parser.add_argument(
        "--cell-timeout",
        type=float,
        default=CELL_TIMEOUT,
        metavar="SECONDS",
        help="a cell that runs longer counts as failed (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run `gpvae reproduce` and return its exit code."""
    summary = reproduce(
        args.profile,
        only=args.only,
        force=args.force,
        parameters=collected(args.parameters or []),
        cell_timeout=args.cell_timeout,
    )
    return summary.exit_code
