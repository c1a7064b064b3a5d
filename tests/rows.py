"""Rows of runs that never ran, for tests of tables, figures and stored evidence."""

from __future__ import annotations

import numpy as np

import gpvae
from gpvae.results import Results

# What each estimate adds to a row's `log_likelihood`, in nats.
OFFSETS = {
    "log_likelihood": 0.0,
    "log_likelihood_neutral": 0.0,
    "log_px": 0.1,
    "elbo_optimised": -0.2,
    "elbo": -0.5,
}


def fake_row(encoder, seed, values, output="gaussian", seconds=1.0, epochs=70, row=None, **changes):
    """A row whose log p(x) has these values [N]; `changes` go to its configuration.

    Args:
        encoder: of the run.
        seed: of the run.
        values: log p(x), own proposal; the other estimates follow by `OFFSETS`.
        output: distribution of the pixels.
        seconds: of training.
        epochs: of training.
        row: entries to replace.
        changes: configuration keys.
    """
    config = gpvae.RunConfig().override(
        **{"model.encoder": encoder, "model.output": output, "seed": seed, **changes}
    )
    values = np.asarray(values, float)
    estimates = {
        name: {"mean": float(values.mean() + offset), "stderr": 0.1, "samples": 5, "n": len(values)}
        for name, offset in OFFSETS.items()
    }
    return {
        "name": config.name,
        "key": "k",
        "config": config.to_dict(),
        "config_hash": config.hash(),
        "code_hash": "c",
        "data_hash": "d",
        "split": {"train": 100, "test": len(values)},
        "seed": seed,
        "parameters": 10,
        "epochs": epochs,
        "history": [{"epoch": 10, "valid_elbo": -2.0}, {"epoch": 20, "valid_elbo": -1.0}],
        "seconds": {"train": seconds, "evaluate": 1.0},
        "device": "cpu",
        "versions": {"torch": "2.13.0"},
        "finished": 1.0,
        **estimates,
        **(row or {}),
        "values": values.tolist(),
    }


def store_rows(profile, rows, **arrays):
    """Store rows with their arrays: every estimate, `converged` and what else is given."""
    store = Results(profile)
    for row in rows:
        values = np.array(row["values"])
        own = {name: values + offset for name, offset in OFFSETS.items() if name in row}
        own |= {"converged": np.arange(len(values)) > 0, "valid_index": np.arange(4)}
        store.append(row, own | arrays)
    return store
