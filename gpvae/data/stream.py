"""Images that stay on disk: batches from a memory map, gathered ahead and copied to the device.

A thread gathers the next batches while the model works on the present one. For a GPU it gathers
into pinned memory and copies on a stream of its own, so that neither the processor nor the GPU
waits for the other.

    python -m gpvae.data.stream

trains a small network on the same images resident and streamed and prints the ratio of speeds.
"""

from __future__ import annotations

import argparse
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gpvae.data.dataset import Images, batch_order, to_unit
from gpvae.data.rows import Rows
from gpvae.data.user import check_pixels

DEPTH = 4  # batches that are ready or under way


@dataclass(frozen=True)
class Streamed:
    """Images on disk with the interface of `Images`, except for `pixels`.

    Args:
        rows: [N, C, H, W] uint8 or float32, usually of a memory map.
        levels: see `Images`.
        device: where batches go; see `to`.

    Raises:
        DataError: wrong dtype, number of dimensions or range (the file is read through only if
            its type allows values out of range).
    """

    rows: Rows
    levels: int = 256
    device: torch.device | str = "cpu"
    checked: bool = False

    def __post_init__(self) -> None:
        if not self.checked:
            check_pixels(self.rows.array, self.levels)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return tuple(self.rows.shape[1:])

    def __getitem__(self, index: Tensor | slice) -> Streamed:
        return replace(self, rows=self.rows.view(_on_host(index)), checked=True)

    def to(self, device: torch.device | str) -> Streamed:
        """The same images with batches on another device; nothing is copied now."""
        return replace(self, device=torch.device(device), checked=True)

    def unit(self, index: Tensor | slice = slice(None)) -> Tensor:
        """Pixels scaled to [0, 1] as float32, [B, C, H, W], on the device; read now."""
        pixels = torch.from_numpy(self.rows.view(_on_host(index)).read())
        return to_unit(pixels.to(self.device), self.levels)

    def batches(
        self, size: int, generator: torch.Generator | None = None, scaled: bool = True
    ) -> Iterator[Tensor]:
        """All images once, as `Images.batches` gives them and in the same order.

        Args:
            size: images in a batch.
            generator: draws the order; without one, the order is that of storage.
            scaled: give float32 in [0, 1]; otherwise pixels as they are stored.
        """
        parts = [part.numpy() for part in batch_order(len(self), generator).cpu().split(size)]
        for pixels in prefetch(self.rows, parts, torch.device(self.device)):
            yield to_unit(pixels, self.levels) if scaled else pixels


def _on_host(index: Tensor | slice) -> np.ndarray | slice:
    return index.cpu().numpy() if isinstance(index, Tensor) else index


def prefetch(
    rows: Rows, parts: list[np.ndarray], device: torch.device, depth: int = DEPTH
) -> Iterator[Tensor]:
    """Gather rows[part] for each part ahead of time and give them on the device, in order.

    An exception in the thread is raised here; leaving early stops the thread.
    """
    ready: queue.Queue[_Ready | BaseException] = queue.Queue(maxsize=max(1, depth - 2))
    stop = threading.Event()
    worker = threading.Thread(
        target=_gather_ahead, args=(rows, parts, device, depth, ready, stop), daemon=True
    )
    worker.start()
    try:
        for _ in parts:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item.take()
    finally:
        stop.set()
        while worker.is_alive():  # it may be waiting for a free place
            while not ready.empty():
                ready.get_nowait()
            worker.join(0.01)


class _Ready(NamedTuple):
    """A batch that is on the device, or on its way there."""

    pixels: Tensor
    copied: torch.cuda.Event | None

    def take(self) -> Tensor:
        """The batch, safe to use on the present stream."""
        if self.copied is not None:
            stream = torch.cuda.current_stream(self.pixels.device)
            stream.wait_event(self.copied)
            # the memory belongs to the copying stream: not to be reused before this one is done
            self.pixels.record_stream(stream)
        return self.pixels


def _gather_ahead(
    rows: Rows,
    parts: list[np.ndarray],
    device: torch.device,
    depth: int,
    ready: queue.Queue,
    stop: threading.Event,
) -> None:
    try:
        gather = _to_cuda(rows, parts, device, depth) if device.type == "cuda" else _on_cpu
        for part in parts:
            if stop.is_set():
                return
            ready.put(gather(rows.view(part), device))
    except BaseException as error:
        ready.put(error)


def _on_cpu(rows: Rows, device: torch.device) -> _Ready:
    return _Ready(torch.from_numpy(rows.read()).to(device), None)


def _to_cuda(
    rows: Rows, parts: list[np.ndarray], device: torch.device, depth: int
) -> Callable[[Rows, torch.device], _Ready]:
    """A gatherer through a ring of pinned buffers and a stream of its own."""
    largest = max(map(len, parts), default=0)
    dtype = torch.from_numpy(np.empty(0, rows.dtype)).dtype
    ring = [
        torch.empty((largest, *rows.shape[1:]), dtype=dtype, pin_memory=True) for _ in range(depth)
    ]
    events = [torch.cuda.Event() for _ in ring]
    stream = torch.cuda.Stream(device)
    turn = 0

    def gather(rows: Rows, device: torch.device) -> _Ready:
        nonlocal turn
        buffer, copied = ring[turn % depth][: len(rows)], torch.cuda.Event()
        events[turn % depth].synchronize()  # the buffer's last copy must have left it
        rows.read(out=buffer.numpy())
        with torch.cuda.stream(stream):
            pixels = buffer.to(device, non_blocking=True)
            copied.record(stream)
        events[turn % depth] = copied
        turn += 1
        return _Ready(pixels, copied)

    return gather


class Speed(NamedTuple):
    """Result of `benchmark`: images per second, and the ratio streamed / resident."""

    resident: float
    streamed: float
    ratio: float


def benchmark(
    count: int = 20_000,
    shape: tuple[int, int, int] = (3, 64, 64),
    batch: int = 128,
    repeats: int = 5,
    device: str = "auto",
    train: bool = True,
) -> Speed:
    """Speed of an epoch on random images, resident and streamed in turns; medians.

    Args:
        count, shape: size of the set; its file is made in the temporary folder.
        batch: images in a batch.
        repeats: epochs of each kind, after one of each that is not counted.
        device: "auto", "cpu" or "cuda".
        train: take a training step of a small convolutional autoencoder on each batch, as in
            use; otherwise only scale the batch, which shows the bare cost of loading.
    """
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images.npy"
        array = np.lib.format.open_memmap(path, "w+", np.uint8, (count, *shape))
        rng = np.random.default_rng(0)
        for start in range(0, count, 1000):
            block = array[start : start + 1000]
            block[:] = rng.integers(0, 256, block.shape, np.uint8)
        array.flush()
        rows = Rows.all(np.load(path, mmap_mode="r"))
        kinds = {
            "resident": Images(torch.from_numpy(rows.read())).to(name),
            "streamed": Streamed(rows).to(name),
        }
        step = _training_step(shape, name) if train else (lambda x: x.mean())
        seconds: dict[str, list[float]] = {key: [] for key in kinds}
        for repeat in range(repeats + 1):
            for key, images in kinds.items():
                elapsed = _epoch(images, batch, repeat, step, name)
                if repeat:
                    seconds[key].append(elapsed)
    resident, streamed = (np.array(seconds[key]) for key in ("resident", "streamed"))
    # the median over pairs of neighbouring epochs: a machine that others use changes its speed
    return Speed(
        count / float(np.median(resident)),
        count / float(np.median(streamed)),
        float(np.median(resident / streamed)),
    )


def _epoch(
    images: Images | Streamed, batch: int, seed: int, step: Callable[[Tensor], object], name: str
) -> float:
    generator = torch.Generator().manual_seed(seed)
    started = time.perf_counter()
    for x in images.batches(batch, generator):
        step(x)
    if name.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _training_step(shape: tuple[int, int, int], device: str) -> Callable[[Tensor], object]:
    """One Adam step of a convolutional autoencoder of the size used for 64 x 64 images."""
    channels = shape[0]
    network = torch.nn.Sequential(
        torch.nn.Conv2d(channels, 32, 4, 2, 1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(32, 64, 4, 2, 1),
        torch.nn.ReLU(),
        torch.nn.ConvTranspose2d(64, 32, 4, 2, 1),
        torch.nn.ReLU(),
        torch.nn.ConvTranspose2d(32, channels, 4, 2, 1),
    ).to(device)
    optimizer = torch.optim.Adam(network.parameters())

    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(network(x), x).backward()
        optimizer.step()

    return step


def main() -> None:
    """Print the two speeds and their ratio, with a training step and bare."""
    parser = argparse.ArgumentParser(description=benchmark.__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=20_000, help="images")
    parser.add_argument("--batch", type=int, default=128, help="images in a batch")
    parser.add_argument("--repeats", type=int, default=5, help="epochs of each kind")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_args()
    for train in (True, False):
        speed = benchmark(args.count, (3, 64, 64), args.batch, args.repeats, args.device, train)
        kind = "training" if train else "loading only"
        print(
            f"{kind}: resident {speed.resident:,.0f}, streamed {speed.streamed:,.0f} images/s, "
            f"ratio {speed.ratio:.2f}"
        )


if __name__ == "__main__":
    main()
