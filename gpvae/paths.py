"""Every folder that the project reads or writes; nothing else builds a path.

The root is the checkout that holds this package. Without one (an installation from a wheel) it
is the current folder. `GPVAE_ROOT` overrides both, so that a test or a second experiment can
write elsewhere.
"""

from __future__ import annotations

import os
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]


def root() -> Path:
    """Folder under which results and figures are written."""
    if given := os.environ.get("GPVAE_ROOT"):
        return Path(given).expanduser()
    return CHECKOUT if notebooks().is_dir() else Path.cwd()


def notebooks() -> Path:
    """Folder of the numbered notebook sources."""
    return CHECKOUT / "notebooks"


def figures(profile: str) -> Path:
    """Folder of one profile's figures and tables (committed)."""
    return root() / "figures" / profile


def results(profile: str) -> Path:
    """Folder of one profile's rows, checkpoints and executed notebooks (ignored by git)."""
    return root() / "results" / profile
