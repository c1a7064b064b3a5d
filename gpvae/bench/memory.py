"""Peak memory of training and evaluation."""

from __future__ import annotations

import gc
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from gpvae.bench.measure import Bench, Case, Row, missing, row, train_case
from gpvae.bench.models import methods
from gpvae.evaluate import log_likelihood
from gpvae.training import build_model

MIB = 2**20


def memory(bench: Bench) -> Iterator[Row]:
    """On a GPU what torch allocates at most, for every encoder. On the CPU how much a process
    grows, each case in a fresh one.
    """
    if not bench.on_gpu and peak_rss() is None:
        yield missing("memory", "all", "the system does not tell a process's peak")
        return
    measure, note = (allocated, "allocated") if bench.on_gpu else (in_process, "growth of the peak")
    for name in methods(bench) if bench.on_gpu else ("vae",):
        yield peak(f"{name}, training", measure(bench, name, 0), note)
        for samples in (50, 200):  # four times as many should not take more
            size = measure(bench, name, samples)
            yield peak(f"{name}, evaluation, S = {samples}", size, note)


def peak(case: str, size: float, meaning: str) -> Row:
    """The row of one case, from bytes."""
    return row("memory", case, value=size / MIB, unit="MiB", note=meaning)


def work(bench: Bench, name: str, samples: int) -> Case:
    """What is measured: log p(x) of 200 images with S samples, or training steps if S is 0."""
    config = methods(bench)[name]
    if not samples:
        return train_case(bench, config)
    model = build_model(config, bench.shape).to(bench.device).eval()
    x = bench.binary(20 if bench.quick else 200)
    return lambda: log_likelihood(model, x, samples)


def allocated(bench: Bench, name: str, samples: int) -> int:
    """Largest number of bytes that torch allocated on the GPU, weights and images included."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work(bench, name, samples)()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def in_process(bench: Bench, name: str, samples: int) -> int:
    """Bytes by which the peak of a fresh process rises while it works."""
    given = json.dumps([name, samples, bench.quick, bench.threads])
    command = [sys.executable, "-c", "from gpvae.bench.memory import child; child()", given]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])  # a plugin may print before


def child() -> None:
    """Do the work named on the command line and print by how much the peak rose."""
    name, samples, quick, threads = json.loads(sys.argv[1])
    torch.set_num_threads(threads)
    case = work(Bench(torch.device("cpu"), quick=quick), name, samples)
    before = peak_rss()
    case()
    print(peak_rss() - before)


def peak_rss() -> int | None:
    """Largest resident set of this process so far, in bytes; None where the system is silent."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would start from the peak of the process that made this one
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text("utf-8"))
        return 1024 * int(found[1]) if found else None
    try:
        import resource
    except ImportError:
        return None
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else 1024 * size
