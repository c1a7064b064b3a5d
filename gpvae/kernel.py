"""One notebook in one kernel process, and what went wrong if it failed."""

from __future__ import annotations

import os
import re
import signal
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpvae import paths
from gpvae.disk import DISK, disk_error
from gpvae.events import Failure
from gpvae.notebooks import Notebook

START_TIMEOUT = 120  # seconds that a kernel may take to start on a busy machine
SHUTDOWN_TIME = 2.0  # seconds that a kernel is given to leave before it is killed
OUTPUT_TIMEOUT = 600  # seconds that a finished cell's output may take to arrive
TAIL = 12  # lines of a traceback or of a dead kernel's last words that are shown


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


def execute(
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
            raise disk_error(error, target.parent) from error
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
