"""Image sets: validated tensors, fixed splits and the readers that fill them.

| idea                                 | module                                           |
|--------------------------------------|--------------------------------------------------|
| images, splits, binarisation         | `dataset`, `rows`                                |
| what exists, where, with which sums  | `sources`, `sums`, `places`, `locate`            |
| a set by name                        | `catalog`                                        |
| original formats                     | `idx`, `matlab`, `mat5`, `cifar`, `omniglot`, `frey` |
| CelebA and its resized cache         | `celeba`, `cache`, `workers`, `resize`           |
| a user's own images                  | `user`                                           |
| images larger than memory            | `stream`                                         |
| the `gpvae data` command             | `cli`, `fetch`, `verify`                         |
| damaged files, write errors, locks   | `files`                                          |

Names are imported when they are asked for, so that the command line starts without torch.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpvae.data.catalog import load_dataset, names
    from gpvae.data.dataset import Dataset, Images, Raw, binarise, digest, split, to_unit
    from gpvae.data.stream import Streamed
    from gpvae.data.user import from_images

_LAZY = {
    "Dataset": "dataset",
    "Images": "dataset",
    "Raw": "dataset",
    "Streamed": "stream",
    "binarise": "dataset",
    "digest": "dataset",
    "from_images": "user",
    "load_dataset": "catalog",
    "names": "catalog",
    "split": "dataset",
    "to_unit": "dataset",
}

__all__ = [
    "Dataset",
    "Images",
    "Raw",
    "Streamed",
    "binarise",
    "digest",
    "from_images",
    "load_dataset",
    "names",
    "split",
    "to_unit",
]


def __getattr__(name: str) -> object:
    """Import what needs torch only when it is asked for."""
    if name not in _LAZY:
        raise AttributeError(f"module 'gpvae.data' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"gpvae.data.{_LAZY[name]}"), name)
