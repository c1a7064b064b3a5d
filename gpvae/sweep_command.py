"""`gpvae sweep`: every run of one or several profiles, without notebooks."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gpvae.arguments import positive, say
from gpvae.errors import ConfigError, unknown

if TYPE_CHECKING:
    from gpvae.config import RunConfig
    from gpvae.jobs import Job
    from gpvae.profiles import Profile
    from gpvae.sweep import Outcome

ALL, NONE = "all", "none"


def add_parser(subparsers: Any) -> None:
    """Add `gpvae sweep` to the command line."""
    parser = subparsers.add_parser(
        "sweep",
        help="do every run of one or several profiles",
        description=(
            "Train, evaluate and store every run of the profiles that is not done. After an "
            "interruption the same command goes on. A run that fails is recorded and does not "
            "stop the others."
        ),
        allow_abbrev=False,
    )
    several = {"nargs": "+", "action": "extend"}
    parser.add_argument(
        "--profile",
        dest="profiles",
        **several,
        metavar="NAME",
        help="sets of runs (default: digits)",
    )
    parser.add_argument("--encoders", **several, metavar="NAME", help="only runs of these encoders")
    parser.add_argument(
        "--outputs", **several, metavar="NAME", help="only runs of these output distributions"
    )
    parser.add_argument(
        "--seeds", **several, type=int, metavar="N", help="only runs with these seeds"
    )
    parser.add_argument(
        "--variations",
        **several,
        metavar="NAME",
        help="which further runs to do beside the table's: names, all (default) or none",
    )
    parser.add_argument(
        "--workers",
        type=positive,
        metavar="N",
        help="processes that share the runs (default: one on each core, or one for a GPU)",
    )
    parser.add_argument(
        "--list", action="store_true", help="show each run's state and compute nothing"
    )
    parser.set_defaults(run=run)


def select(
    profiles: Iterable[Profile],
    encoders: Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    variations: Sequence[str] | None = None,
) -> dict[str, list[RunConfig]]:
    """The runs of each profile that the filters leave; None filters nothing.

    Args:
        profiles: whose runs.
        encoders, outputs, seeds: what a run may have.
        variations: which of the profiles' variations belong to the runs beside those of the
            table and of the size curve: names, or "all" or "none" alone.

    Raises:
        ConfigError: a name that no run of the profiles has, or no run left.
    """
    profiles = list({profile.name: profile for profile in profiles}.values())
    wanted = {"encoder": encoders, "output distribution": outputs, "seed": seeds}
    every = [_facts(job) for profile in profiles for job in profile.jobs()]
    for kind, values in wanted.items():
        _check_known(kind, values or (), [facts[kind] for facts in every])
    kept = _variations(profiles, variations)

    def fits(job: RunConfig) -> bool:
        facts = _facts(job)
        return all(values is None or facts[kind] in values for kind, values in wanted.items())

    left = {
        profile.name: [job for job in _with_variations(profile, kept).jobs() if fits(job)]
        for profile in profiles
    }
    if not any(left.values()):
        raise ConfigError(
            "no run has all of the encoders, outputs, seeds and variations that were asked for; "
            "see `gpvae sweep --list` without these filters for the runs that exist."
        )
    return left


def _facts(job: RunConfig) -> dict[str, object]:
    return {
        "encoder": job.model.encoder,
        "output distribution": job.model.output,
        "seed": job.seed,
    }


def _check_known(kind: str, values: Iterable[object], known: Iterable[object]) -> None:
    names = {str(each) for each in known}
    for value in values:
        if str(value) not in names:
            raise ConfigError(unknown(kind, str(value), names))


def _variations(profiles: list[Profile], names: Sequence[str] | None) -> set[str]:
    known = {name for profile in profiles for name in profile.variations}
    if names is None or list(names) == [ALL]:
        return known
    if list(names) == [NONE]:
        return set()
    if {ALL, NONE} & set(names):
        raise ConfigError(
            f"--variations is {' '.join(names)}; expected names, or {ALL} or {NONE} alone."
        )
    _check_known("variation", names, known or {"(these profiles have none)"})
    return set(names)


def _with_variations(profile: Profile, names: set[str]) -> Profile:
    return replace(profile, variations={k: v for k, v in profile.variations.items() if k in names})


def run(args: argparse.Namespace) -> int:
    """Run `gpvae sweep` and return its exit code."""
    from gpvae import paths
    from gpvae.disk import check_writable
    from gpvae.jobs import survey
    from gpvae.processes import make_executor
    from gpvae.profiles import get_profile
    from gpvae.sweep import sweep

    profiles = [get_profile(name) for name in args.profiles or ["digits"]]
    configs = select(profiles, args.encoders, args.outputs, args.seeds, args.variations)
    if args.list:
        show(survey(configs))
        return 0
    check_writable(*(paths.results(profile.name) for profile in profiles))
    workers = args.workers or _default_workers(profiles, configs)
    with make_executor(workers) as executor:
        outcome = sweep(configs, executor, log=say)
    return report(outcome)


def _default_workers(
    profiles: Iterable[Profile], configs: Mapping[str, Sequence[RunConfig]]
) -> int:
    from gpvae.experiment import default_workers

    usual = default_workers([config for each in configs.values() for config in each])
    return max(profile.workers or usual for profile in profiles)


def show(jobs: Sequence[Job]) -> None:
    """Print a line for each job, and how many are in each state."""
    from gpvae.jobs import STATES

    for profile in dict.fromkeys(job.profile for job in jobs):
        say(f"profile {profile}")
        for job in jobs:
            if job.profile == profile:
                reason = f" ({job.reason})" if job.reason else ""
                say(f"  {job.state:<7}  {job.key}  {job.config.name}{reason}")
    counts = Counter(job.state for job in jobs)
    numbers = ", ".join(f"{counts[state]} {state}" for state in STATES)
    say(f"{len(jobs)} jobs: {numbers}")


def report(outcome: Outcome) -> int:
    """Print how many jobs are done and how the others failed; returns the exit code."""
    from gpvae.jobs import failures_path

    failures = outcome.failures
    say(f"{len(outcome.rows)} of {len(outcome.rows) + len(failures)} jobs are done")
    for (profile, name), failure in failures.items():
        say(f"  {profile} {name}: {failure.brief}")
    for profile in dict.fromkeys(profile for profile, _ in failures):
        say(f"failures in full: {failures_path(profile)}")
    return int(bool(failures))
