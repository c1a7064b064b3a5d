"""`gpvae bench` on the command line."""

from __future__ import annotations

import argparse
from typing import Any

from gpvae.arguments import positive

# What each section measures is in the module named here.
SECTIONS = {
    "floor": "gpvae.bench.floor",
    "training": "gpvae.bench.models",
    "inference": "gpvae.bench.models",
    "capture": "gpvae.bench.models",
    "seeds": "gpvae.bench.models",
    "likelihood": "gpvae.bench.floor",
    "precision": "gpvae.bench.choices",
    "variants": "gpvae.bench.choices",
    "pythae": "gpvae.bench.peers",
    "memory": "gpvae.bench.memory",
}


def add_parser(subparsers: Any) -> None:
    """Add `gpvae bench` to the command line."""
    parser = subparsers.add_parser(
        "bench",
        help="measure speed and memory",
        description=(
            "Measure training, inference, likelihood and memory. What is compared is run in "
            "turns, and ratios are those of the same turn, so that a busy machine meets all "
            "alike. Sections: " + ", ".join(SECTIONS) + "."
        ),
        allow_abbrev=False,
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto (%(default)s)")
    parser.add_argument(
        "--threads", type=positive, default=1, metavar="N", help="CPU threads (%(default)s)"
    )
    parser.add_argument(
        "--repeats", type=positive, metavar="N", help="turns of each comparison (default: 15)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny networks and 2 turns: numbers mean nothing"
    )
    parser.add_argument(
        "--only", nargs="+", action="extend", choices=SECTIONS, metavar="SECTION", help="sections"
    )
    parser.add_argument(
        "--compile", action="store_true", help="also torch.compile, which needs a C++ compiler"
    )
    parser.add_argument(
        "--save", action="store_true", help="write figures/bench/: rows, table and figure"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run `gpvae bench` and return its exit code."""
    from importlib import import_module

    from gpvae.bench import report
    from gpvae.bench.measure import Bench, facts
    from gpvae.errors import ConfigError
    from gpvae.experiment import cpu_threads
    from gpvae.training import pick_device

    if args.quick and args.save:
        raise ConfigError("--quick measures nothing that is worth keeping: leave out --save.")
    repeats = args.repeats or (2 if args.quick else 15)
    device = pick_device(args.device)
    bench = Bench(device, args.threads, repeats, quick=args.quick, compile=args.compile)
    rows, header = [], facts(bench)
    print(report.format_facts(header), flush=True)
    try:
        with cpu_threads(bench.threads):
            for name in args.only or SECTIONS:
                print(f"\n{name}", flush=True)
                section = []
                for row in getattr(import_module(SECTIONS[name]), name)(bench):
                    print(report.format_row(row), flush=True)
                    section.append(row)
                rows += section
    finally:  # a section that fails or is stopped does not take the earlier ones with it
        if args.save and rows:
            print(f"\nsaved in {report.save(rows, header)}")
    return 0
