"""Run the numbered notebooks headlessly: `gpvae reproduce`.

Each notebook runs in a kernel process of its own, in order, with parameters injected by
papermill. A notebook that fails does not stop the others. Jupyter and papermill are imported
inside functions only, so that this module (and the command's help) loads at once without them.
"""

from __future__ import annotations

import argparse
import ast
import errno
import logging
import math
import os
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

from gpvae import events, paths
from gpvae.errors import ConfigError, NotebookError, unknown
from gpvae.events import Failure, NotebookRun, Summary

CELL_TIMEOUT = 4 * 3600  # seconds that one cell may take
START_TIMEOUT = 120  # seconds that a kernel may take to start on a busy machine
SHUTDOWN_TIME = 2.0  # seconds that a kernel is given to leave before it is killed
OUTPUT_TIMEOUT = 600  # seconds that a finished cell's output may take to arrive
TAIL = 12  # lines of a traceback or of a dead kernel's last words that are shown
# Troubles of the disk or of permissions, which a user can mend; any other OSError is a defect.
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EISDIR}
ALWAYS_PASSED = ("profile", "force")


class RunError(NotebookError):
    """A run that cannot go on although it was well asked for, such as on a full disk."""

    exit_code = 1


@dataclass(frozen=True)
class Notebook:
    """One numbered notebook: `parameters` and `cell` are those of its parameters cell."""

    path: Path
    cells: int
    cell: int
    parameters: frozenset[str]

    @property
    def name(self) -> str:
        """File name without its extension, such as `02_training`."""
        return self.path.stem


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
    from gpvae.config import get_profile

    get_profile(profile)
    timeout = _limit(CELL_TIMEOUT if cell_timeout is None else cell_timeout)
    _check_installed()
    chosen = select(find_notebooks(notebooks or paths.notebooks()), only)
    check_parameters(chosen, parameters or {})
    values = {"profile": profile, "force": bool(force), **_plain(dict(parameters or {}))}
    _prepare(profile)
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


# Which notebooks, with which parameters


def find_notebooks(folder: Path) -> list[Notebook]:
    """The notebooks `NN_name.ipynb` of a folder, in order."""
    files = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not files:
        raise NotebookError(
            f"no notebooks in {folder}. An installation from a wheel does not carry them: clone "
            "the repository, run `pip install -e .` in it, and try again."
        )
    return [_read(path) for path in files]


def _read(path: Path) -> Notebook:
    """Parse one notebook and check its parameters cell."""
    import nbformat

    try:
        with _quiet():
            cells = nbformat.read(path, as_version=4).cells
    except Exception as error:  # nbformat raises whatever the damage leads to
        raise NotebookError(f"{path} is not a notebook: {error}") from error
    tagged = [i for i, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1:
        raise NotebookError(
            f"{path} has {len(tagged)} cells tagged `parameters`; it needs exactly one."
        )
    names = _assigned(cells[tagged[0]].source, path)
    missing = [name for name in ALWAYS_PASSED if name not in names]
    if missing:
        raise NotebookError(f"the parameters cell of {path} lacks {' and '.join(missing)}.")
    return Notebook(path, len(cells), tagged[0], names)


def _assigned(source: str, path: Path) -> frozenset[str]:
    """Names that a parameters cell assigns."""
    try:
        statements = ast.parse(source).body
    except SyntaxError as error:
        raise NotebookError(f"the parameters cell of {path} is not Python: {error}") from error
    targets: list[ast.expr] = []
    for statement in statements:
        if isinstance(statement, ast.Assign):
            targets += statement.targets
        elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
            targets.append(statement.target)
    return frozenset(target.id for target in targets if isinstance(target, ast.Name))


def select(notebooks: list[Notebook], only: str | Sequence[str] | None) -> list[Notebook]:
    """The notebooks that `only` names by number or by the beginning of their name."""
    if only is None:
        return notebooks
    given = [only] if isinstance(only, str) else only
    wanted = [token.strip() for item in given for token in item.split(",") if token.strip()]
    if not wanted:
        raise NotebookError("the selection names no notebook.")
    for token in wanted:
        if not any(_matches(notebook.name, token) for notebook in notebooks):
            known = [notebook.name for notebook in notebooks]
            raise NotebookError(unknown("notebook", token, known))
    return [each for each in notebooks if any(_matches(each.name, token) for token in wanted)]


def _matches(name: str, token: str) -> bool:
    """Whether "2", "02", "02_tr" or "train" means `02_training`."""
    number, _, subject = name.partition("_")
    if token.isdecimal():
        return int(token) == int(number)
    return name.startswith(token) or subject.startswith(token)


def check_parameters(notebooks: list[Notebook], given: Iterable[str]) -> None:
    """Refuse a parameter that some of the notebooks do not have."""
    known = frozenset().union(*(notebook.parameters for notebook in notebooks))
    for name in given:
        if name in ALWAYS_PASSED:
            raise NotebookError(f"set {name} with --{name}, not as a parameter.")
        if name not in known:
            raise NotebookError(unknown("parameter", name, known))
        lacking = [each.name for each in notebooks if name not in each.parameters]
        if lacking:
            having = " ".join(each.name[:2] for each in notebooks if name in each.parameters)
            raise NotebookError(
                f"parameter {name!r} does not exist in {', '.join(lacking)}. "
                f"To run only the notebooks that have it: --only {having}"
            )


def _plain(value: Any) -> Any:
    """The value, made of what papermill can write as a literal; it would turn others to text."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(item) for key, item in value.items()}
    raise NotebookError(
        f"{value!r} cannot be passed to a notebook: use numbers, text, True, False, None, and "
        "lists or dictionaries of them."
    )


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


# Folders and disks


def _executed_folder(profile: str) -> Path:
    return paths.results(profile).absolute() / "notebooks"


def _prepare(profile: str) -> None:
    """Make the folders and try to write to them before hours of work depend on it."""
    for folder in (_executed_folder(profile), paths.figures(profile).absolute()):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"x")
        except OSError as error:
            raise _disk_error(error, folder) from error


def _disk_error(error: OSError, folder: Path) -> RunError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunError(
            f"the disk of {folder} is full ({error.strerror}). Free some space and run the same "
            "command again: finished results are kept and reused."
        )
    return RunError(
        f"cannot write to {folder}: {error.strerror or error}. Mend the folder, or name another "
        "place in the environment variable GPVAE_ROOT."
    )


def _stop_on_full_disk(run: NotebookRun) -> None:
    """The next notebooks would compute for hours what they cannot store either."""
    full = os.strerror(errno.ENOSPC)
    if run.failure and full in run.failure.message:
        raise _disk_error(OSError(errno.ENOSPC, full), run.executed.parent)


# One notebook in one kernel


@dataclass
class Position:
    """The cell that is running, for the failures that papermill reports without one."""

    notebook: Notebook
    index: int = 0
    source: str = ""

    @property
    def number(self) -> int:
        """Its number in the source notebook, which lacks the injected cell."""
        return self.index + 1 if self.index <= self.notebook.cell else self.index


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
        with tempfile.TemporaryDirectory(prefix="gpvae-") as scratch, _quiet():
            failure = _execute(notebook, values, timeout, on_cell, target, Path(scratch))
        finished = True
    finally:
        seconds, happened = time.monotonic() - began, tuple(events.read(profile, offset)[0])
        runs.append(NotebookRun(notebook.name, seconds, target, failure, happened, finished))


def _execute(
    notebook: Notebook,
    values: Mapping[str, Any],
    timeout: int,
    on_cell: Callable[[int], None],
    target: Path,
    scratch: Path,
) -> Failure | None:
    """Run papermill and turn whatever goes wrong into a failure of this notebook."""
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    position = Position(notebook)

    def on_cell_start(cell: Any, cell_index: int) -> None:
        position.index, position.source = cell_index, cell.source
        on_cell(cell_index)

    kernels: list[Any] = []
    options = {
        "execution_timeout": timeout,
        "on_cell_start": on_cell_start,
        "kernel_manager_class": _kernel_class(target.parent, scratch, kernels),
    }
    try:
        _papermill(notebook, target, values, options)
    except PapermillExecutionError as error:
        position.index = error.cell_index
        return _cell_failure(position, error)
    except CellTimeoutError:
        message = f"the cell ran longer than {timeout} s (--cell-timeout), its kernel was killed"
        return _broken(position, "timeout", message)
    except DeadKernelError:
        return _broken(position, "the kernel died", _last_words(kernels), _tail(scratch))
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK:
            raise _disk_error(error, target.parent) from error
        words = _tail(scratch) or traceback.format_exc().splitlines()[-TAIL:]
        return Failure(type(error).__name__, str(error), traceback=tuple(words))
    finally:
        _kill(kernels)
    return None


def _papermill(
    notebook: Notebook, target: Path, values: Mapping[str, Any], options: dict[str, Any]
) -> None:
    """Call papermill, which formats its paths and would take braces in them for fields."""
    import papermill

    source, copy = (
        str(p.absolute()).replace("{", "{{").replace("}", "}}") for p in (notebook.path, target)
    )
    papermill.execute_notebook(
        source,
        copy,
        parameters=dict(values),
        kernel_name="python3",
        language="python",
        progress_bar=False,
        start_timeout=START_TIMEOUT,
        iopub_timeout=OUTPUT_TIMEOUT,
        **options,
    )


def _kernel_class(folder: Path, scratch: Path, kernels: list[Any]) -> type:
    """A kernel manager that starts this very interpreter, with this very package.

    A `python3` kernel that the user or the system has registered is ignored, and so are the
    user's IPython settings: they could change results. The kernel works in `folder`, so that
    a stray file of a notebook lands beside the executed copies.
    """
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpecManager

    class ThisInterpreter(AsyncKernelManager):
        def __init__(self, **options: Any) -> None:
            super().__init__(
                # With no folder to search, ipykernel's own specification remains: sys.executable.
                kernel_spec_manager=KernelSpecManager(kernel_dirs=[]),
                connection_file=str(scratch / "connection.json"),
                shutdown_wait_time=SHUTDOWN_TIME,
                **options,
            )
            kernels.append(self)

        async def start_kernel(self, **options: Any) -> None:
            with (scratch / "kernel.log").open("wb") as log:
                options |= {"stdout": log, "stderr": log, "cwd": str(folder)}
                await super().start_kernel(env=_environment(scratch), **options)

    return ThisInterpreter


def _environment(scratch: Path) -> dict[str, str]:
    """Environment of a kernel: results go where this process says, figures into the copy."""
    searched = [str(paths.CHECKOUT), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "GPVAE_ROOT": str(paths.root().absolute()),
        "IPYTHONDIR": str(scratch / "ipython"),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "PYTHONPATH": os.pathsep.join(filter(None, searched)),
    }


def _kill(kernels: Iterable[Any]) -> None:
    """Kill what nbclient has left: it does not clean up after Ctrl-C while a kernel starts."""
    for kernel in kernels:
        process = getattr(kernel.provisioner, "process", None)
        if process is not None and process.poll() is None:
            process.kill()
            process.wait()


def _last_words(kernels: Iterable[Any]) -> str:
    """How the kernel process ended."""
    codes = [getattr(getattr(k.provisioner, "process", None), "returncode", None) for k in kernels]
    code = codes[-1] if codes else None
    if code is None:
        return "its process has ended without a trace"
    if code >= 0:
        return f"its process ended with exit code {code}"
    name = signal.Signals(-code).name
    return f"its process was killed by {name}" + (
        ", often a sign that the memory was exhausted" * (name == "SIGKILL")
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the log lines and warnings of papermill and nbclient out of the user's sight."""
    logger, handler = logging.getLogger("papermill"), logging.NullHandler()
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


# What went wrong


def _cell_failure(position: Position, error: Any) -> Failure:
    """The failure of a cell that raised."""
    frames = [_plain_text(frame) for frame in error.traceback]
    here = re.findall(rf"Cell In\[{error.exec_count}\], line (\d+)", "\n".join(frames))
    frames = frames[:-1]  # the last entry repeats the error
    shown_already = not frames or "Cell In[" in frames[-1]
    tail = [] if shown_already else "\n".join(frames).rstrip().splitlines()[-TAIL:]
    return Failure(
        error.ename,
        _plain_text(error.evalue),
        position.number,
        error.exec_count,
        _excerpt(error.source, int(here[-1]) if here else None),
        tuple(tail),
    )


def _broken(position: Position, kind: str, message: str, tail: Sequence[str] = ()) -> Failure:
    """The failure of a cell that did not come to an end."""
    excerpt = _excerpt(position.source, None)
    return Failure(kind, message, position.number, excerpt=excerpt, traceback=tuple(tail))


def _excerpt(source: str, line: int | None) -> tuple[str, ...]:
    """Five numbered source lines, around the failing one if it is known."""
    lines = source.splitlines()
    first = max(0, (line or 1) - 3)
    return tuple(
        f"{'-->' if number == line else '   '} {number:3d}  {text}"
        for number, text in enumerate(lines[first : first + 5], first + 1)
    )


def _plain_text(text: str) -> str:
    """The text without terminal colours."""
    return re.sub(r"\x1b\[[0-?]*[ -/]*[@-~]", "", text)


def _tail(scratch: Path) -> list[str]:
    """The last lines that the kernel process wrote to its own standard error."""
    log = scratch / "kernel.log"
    text = _plain_text(log.read_text(errors="replace")) if log.is_file() else ""
    # ipykernel's warnings about itself explain nothing.
    lines = [line for line in text.splitlines() if line and not line.startswith("[IPKernelApp]")]
    return lines[-TAIL:]


# Progress


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


# The command


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


def assignment(text: str) -> tuple[str, Any]:
    """Parse `NAME=VALUE`; a value that is no Python literal is text."""
    name, separator, value = text.partition("=")
    if not (separator and name.isidentifier()):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return name, value


def run(args: argparse.Namespace) -> int:
    """Run `gpvae reproduce` and return its exit code."""
    summary = reproduce(
        args.profile,
        only=args.only,
        force=args.force,
        parameters=dict(args.parameters or []),
        cell_timeout=args.cell_timeout,
    )
    return summary.exit_code
