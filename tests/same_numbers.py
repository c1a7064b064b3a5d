"""Do two versions of the code compute the same numbers? A digest for each of many tiny runs.

In each checkout, with the same Python on the same machine, with a folder that is still empty:

    GPVAE_ROOT=$(mktemp -d) PYTHONPATH=. python tests/same_numbers.py > numbers

Equal outputs mean bit for bit equal bounds, estimates, arrays of every image and learning curves,
for every method. Only then may `gpvae.results.CONTINUED` say that one version's rows stand beside
the other's.
"""

from __future__ import annotations

import hashlib
import json

from gpvae import get_profile
from gpvae.config import METHODS, OUTPUTS
from gpvae.experiment import run
from gpvae.results import Results

BASE = get_profile("smoke").base.override({"model.levels": 17})
GP = {"model.encoder": "gpvae"}
OPTIONS = (
    *({**GP, "model.gp.covariance": form} for form in ("low-rank", "full")),
    {**GP, "model.gp.residual": True, "model.gp.bound": "marginal"},
    {**GP, "model.gp.temperature": 0.0},
    {"model.importance_samples": 3},
    {"model.network": "conv", "model.channels": (4,)},
    {"model.precision": "bfloat16"},
    {"training.average": 0.9, "training.kl_warmup": 3, "training.schedule": "cosine"},
    {"evaluation.part": "valid"},
    {"evaluation.gaps": False},
    {"evaluation.outliers": "digits"},
)


def digest(number: int, changes: dict) -> str:
    """Of a run's row, but for its time and hashes, and of its arrays."""
    profile = f"numbers/{number}"  # options that names do not tell need a folder each
    row = run(BASE.override(changes), profile, log=lambda line: None)
    kept = {k: v for k, v in row.items() if k == "history" or (isinstance(v, dict) and "mean" in v)}
    sha = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    for name, array in sorted(Results(profile).arrays(row).items()):
        sha.update(f"{name}{array.dtype}{array.shape}".encode() + array.tobytes())
    return sha.hexdigest()[:16]


def main() -> None:
    """Print a line for each run."""
    pairs = [{"model.encoder": e, "model.output": o} for e in METHODS for o in OUTPUTS]
    for number, changes in enumerate((*pairs, *OPTIONS)):
        print(digest(number, changes), json.dumps(changes), flush=True)


if __name__ == "__main__":
    main()
