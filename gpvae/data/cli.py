"""`gpvae data list | fetch | verify | cache`. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import argparse
import json

from gpvae.data.sources import SOURCES, Source
from gpvae.errors import DataError, unknown


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `data` and its actions to the command line; each sets `run(args) -> int`."""
    data = subparsers.add_parser(
        "data",
        help="list, fetch and verify the data sets",
        description="Data sets are looked for under GPVAE_DATA, else in a per-user folder.",
        allow_abbrev=False,
    )
    actions = data.add_subparsers(title="actions", metavar="ACTION", required=True)

    action = actions.add_parser(
        "list", allow_abbrev=False, help="what exists, where it is looked for, what is present"
    )
    action.add_argument("--files", action="store_true", help="also files, sums, addresses, notes")
    action.add_argument("--json", action="store_true", help="print one JSON object per set")
    action.set_defaults(run=run_list)

    action = actions.add_parser("fetch", allow_abbrev=False, help="download data sets")
    action.add_argument("names", nargs="+", metavar="NAME")
    action.add_argument("--replace", action="store_true", help="replace files with a wrong sum")
    action.set_defaults(run=run_fetch)

    action = actions.add_parser(
        "verify", allow_abbrev=False, help="check sums, read everything, count"
    )
    action.add_argument("names", nargs="*", metavar="NAME", help="default: all that are present")
    action.set_defaults(run=run_verify)

    action = actions.add_parser(
        "cache", allow_abbrev=False, help="build the resized images of a large set"
    )
    action.add_argument("name", nargs="?", default="celeba", metavar="NAME")
    action.add_argument("--skip-corrupt", action="store_true", help="leave out damaged images")
    action.set_defaults(run=run_cache)


def find(names: list[str]) -> list[Source]:
    """Records by name.

    Raises:
        DataError: unknown name.
    """
    for name in names:
        if name not in SOURCES:
            raise DataError(unknown("data set", name, SOURCES))
    return [SOURCES[name] for name in names]


def run_list(args: argparse.Namespace) -> int:
    """Print a line for each data set."""
    from gpvae.data.locate import state
    from gpvae.data.places import describe_root

    rows = []
    for source in SOURCES.values():
        there = state(source)
        rows.append((source, there))
        if args.json:
            print(json.dumps(_as_json(source, there.present, there.text)))
    if args.json:
        return 0
    print(f"data root: {describe_root()}")
    width = max(map(len, SOURCES))
    print(f"{'name':<{width}}  {'C x H x W':<11}  {'train':>7}  {'test':>6}  state")
    for source, there in rows:
        shape = " x ".join(map(str, source.shape))
        test = f"{source.test:,}" if source.test else "-"
        print(f"{source.name:<{width}}  {shape:<11}  {source.train:>7,}  {test:>6}  {there.text}")
        if args.files:
            _print_files(source)
    return 0


def _as_json(source: Source, present: bool, text: str) -> dict[str, object]:
    counts = {part: getattr(source, part) for part in ("train", "valid", "test")}
    return {"name": source.name, "shape": source.shape, **counts, "present": present, "state": text}


def _print_files(source: Source) -> None:
    from gpvae.data.locate import describe_sums, place

    print(f"    {source.title}. {source.citation}. Licence: {source.licence}.")
    if source.note:
        print(f"    Note: {source.note}.")
    for layout in source.layouts:
        for file in layout:
            print(f"    {place(source, file)}: {describe_sums(file)}")
            for url in file.urls:
                print(f"        {url}")
    if source.sums_from:
        print(f"    Sums: {source.sums_from}.")


def run_fetch(args: argparse.Namespace) -> int:
    """Download the named data sets."""
    from gpvae.data.fetch import fetch

    for source in find(args.names):
        fetch(source, replace=args.replace)
    return 0


def run_verify(args: argparse.Namespace) -> int:
    """Check and read the named data sets; 1 if any of them fails."""
    from gpvae.data.locate import state
    from gpvae.data.verify import verify

    sources = find(args.names) or [s for s in SOURCES.values() if state(s).present]
    failed = 0
    for source in sources:
        try:
            print(f"{source.name}: {verify(source)}")
        except DataError as error:
            failed += 1
            print(f"{source.name}: FAILED. {error}")
    return 1 if failed else 0


def run_cache(args: argparse.Namespace) -> int:
    """Build the cache of a large data set."""
    from gpvae.data.catalog import read

    (source,) = find([args.name])
    if not source.cached:
        raise DataError(f"{source.name} needs no cache: it is read from its original files.")
    raw = read(source, {"skip_corrupt": True} if args.skip_corrupt else {})
    left_out = sum(raw.skipped.values())
    print(f"{source.name}: cache ready, {left_out} damaged images left out")
    return 0
