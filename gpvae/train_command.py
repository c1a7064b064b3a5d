"""`gpvae train`: one run from the command line, stored like every other run."""

from __future__ import annotations

import argparse
from typing import Any

from gpvae.arguments import assignment, collected, say

STORE = "single"  # the profile name under which single runs are kept


def add_parser(subparsers: Any) -> None:
    """Add `gpvae train` to the command line."""
    parser = subparsers.add_parser(
        "train",
        help="train and evaluate one model",
        description=(
            "Train and evaluate one model and store one result row. An interrupted run continues "
            "from its checkpoint; an equal run that is done is reused."
        ),
        allow_abbrev=False,
    )
    parser.add_argument("--profile", default="digits", help="base configuration (%(default)s)")
    parser.add_argument("--encoder", help="model to train (default: that of the profile)")
    parser.add_argument("--dataset", help="data set (default: that of the profile)")
    parser.add_argument("--output", help="output distribution: bernoulli or gaussian")
    parser.add_argument("--seed", type=int, help="seed of weights, data order and noise")
    parser.add_argument("--force", action="store_true", help="train anew even if it was done")
    parser.add_argument(
        "--set",
        dest="values",
        nargs="+",
        action="extend",
        type=assignment,
        default=[],
        metavar="KEY=VALUE",
        help="set any configuration key, such as model.gp.features=200",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run `gpvae train` and return its exit code."""
    import time

    from gpvae import paths
    from gpvae.disk import check_writable
    from gpvae.experiment import run as run_config
    from gpvae.profiles import get_profile
    from gpvae.results import Results

    named = {
        "model.encoder": args.encoder,
        "data.name": args.dataset,
        "model.output": args.output,
        "seed": args.seed,
    }
    named = {key: value for key, value in named.items() if value is not None}
    values = collected([*named.items(), *args.values])
    config = get_profile(args.profile).base.override(values)
    print(f"{config.name} (configuration {config.hash()})", flush=True)
    check_writable(paths.results(STORE))
    row = run_config(config, STORE, time.time() if args.force else 0.0, log=say)
    print(
        f"best validation ELBO {row['valid_elbo']:.2f} nats at epoch {row['best_epoch']} "
        f"of {row['epochs']}, {row['seconds']['train']:.1f} s of training on {row['device']}"
    )
    for label, key in (
        ("ELBO", "elbo"),
        ("log p(x), own proposal", "log_likelihood"),
        ("log p(x), neutral proposal", "log_likelihood_neutral"),
    ):
        if key in row:
            e = row[key]
            value = f"{e['mean']:.2f} ± {e['stderr']:.2f} nats (S = {e['samples']})"
            print(f"{config.evaluation.part} {label}: {value}")
    print(f"row: {Results(STORE).path}")
    return 0
