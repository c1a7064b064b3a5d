"""The programs that build a cache side by side, and how the builder talks to them.

A worker is a separate program with a job on its standard input and one line of JSON for each
finished block on its standard output. In contrast to a process pool it ends by itself when the
builder is killed, and a script that calls the builder needs no `if __name__ == "__main__"`.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import numpy as np

from gpvae.data.files import reading, writing
from gpvae.errors import DataError

Work = Callable[[int, int], tuple[np.ndarray, list[tuple[int, str]]]]


def results(module: str, jobs: list[dict]) -> Iterator[dict]:
    """Start one worker per job and give their lines as they come; all have ended afterwards."""
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    workers = [start(module, job) for job in jobs]
    try:
        for worker in workers:
            threading.Thread(target=_relay, args=(worker, lines), daemon=True).start()
        running = len(workers)
        while running:
            text = lines.get()
            if text is None:
                running -= 1
                continue
            line = _parse(text)
            if line is None:
                sys.stderr.write(text)  # what a plugin prints when it is imported
                continue
            if "error" in line:
                raise DataError(line["error"])
            yield line
        for worker in workers:
            if worker.wait() != 0:
                raise DataError(f"a worker ended with code {worker.returncode}; run it again.")
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def start(module: str, job: dict) -> subprocess.Popen[str]:
    """A worker with its job on its way; it imports what this process would import."""
    paths = os.pathsep.join(filter(None, sys.path))
    single = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    worker = subprocess.Popen(
        [sys.executable, "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **single, "PYTHONPATH": paths},
    )
    with suppress(BrokenPipeError):  # it died at once: its return code will tell
        worker.stdin.write(json.dumps(job))
        worker.stdin.close()
    return worker


def _parse(text: str) -> dict | None:
    """A worker's report; None for other text."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None


def _relay(worker: subprocess.Popen[str], lines: queue.SimpleQueue[str | None]) -> None:
    for line in worker.stdout:
        lines.put(line)
    lines.put(None)


def serve(make: Callable[[dict], Work]) -> None:
    """A worker's program: read the job, make its blocks, write them and report each.

    Args:
        make: gives, for a job, the function that makes images [start, stop) as uint8 and lists
            (row, reason) for those that cannot be decoded.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the builder decides when to stop
    job = json.load(sys.stdin)
    try:
        with reading(Path(job["out"]), "the growing cache"):
            work = make(job)
            for number in job["blocks"]:
                _report(_make_block(job, work, number))
    except DataError as error:
        _report({"error": str(error)})
        sys.exit(1)


def _make_block(job: dict, work: Work, number: int) -> dict:
    start = number * job["block"]
    stop = min(start + job["block"], job["count"])
    pixels, bad = work(start, stop)
    data = pixels.tobytes()
    with writing(Path(job["out"]), "GPVAE_CACHE"), open(job["out"], "r+b") as out:
        out.seek(job["offset"] + start * pixels[0].nbytes)
        out.write(data)
    return {
        "block": number,
        "images": stop - start,
        "sha256": sha256(data).hexdigest(),
        "bad": bad,
    }


def _report(line: dict) -> None:
    try:
        print(json.dumps(line), flush=True)
    except BrokenPipeError:  # the builder is gone, and nobody will hear of it
        os._exit(1)
