"""Worker processes: none outlives its parent, and none is started for one worker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gpvae.processes import make_executor

PARENT = """
import signal
# A shell that starts the tests in the background has them ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
from gpvae.processes import Processes
from light import report_and_sleep
with Processes(2) as executor:
    for future in [executor.submit(report_and_sleep, {folder!r}) for _ in range(5)]:
        future.result()
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_its_parent(tmp_path, how):
    code = PARENT.format(folder=str(tmp_path))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])
    }
    parent = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True
    )
    until(lambda: len(list(tmp_path.iterdir())) == 2)
    parent.send_signal(how)
    errors = parent.communicate(timeout=120)[1]
    workers = [int(path.name) for path in tmp_path.iterdir()]
    assert len(workers) == 2  # the calls that waited never started
    until(lambda: not any(alive(pid) for pid in workers))
    assert ("KeyboardInterrupt" in errors) == (how == signal.SIGINT)


def until(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def alive(pid):
    """Whether the process runs; one that nobody has waited for yet does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_one_worker_is_this_process():
    with make_executor(1) as executor:
        assert executor is None
    with make_executor(3) as executor:
        assert executor.workers == 3
