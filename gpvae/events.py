"""What was made, reused, recomputed or failed: an append-only log per profile, and the report.

Code that saves a figure, a table or a result row calls `record`. Notebooks run in processes of
their own, so that the log is how `gpvae reproduce` learns what they did. Its `Summary` holds the
facts and `format_summary` is a pure function of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from gpvae import jsonl, paths

STATUSES = ("made", "reused", "recomputed", "failed", "missing")


@dataclass(frozen=True)
class Event:
    """One thing that happened: to what, how it ended, why, and how long it took."""

    kind: str
    name: str
    status: str
    reason: str = ""
    seconds: float | None = None


def log(profile: str) -> Path:
    """File of one profile's events."""
    return paths.results(profile) / "events.jsonl"


def record(
    profile: str,
    kind: str,
    name: str,
    status: str,
    reason: str = "",
    seconds: float | None = None,
) -> None:
    """Append one event.

    Args:
        profile: whose log.
        kind: "figure", "table", "row" or another noun in the singular.
        name: what was made, such as a figure's file name without its extension.
        status: one of `STATUSES`.
        reason: why it was recomputed or failed.
        seconds: how long it took.
    """
    if status not in STATUSES:
        raise ValueError(f"status {status!r} is none of {', '.join(STATUSES)}")
    jsonl.append(log(profile), asdict(Event(kind, name, status, reason, seconds)))


def read(profile: str, offset: int = 0) -> tuple[list[Event], int]:
    """Events recorded after `offset` bytes, and the offset from which to read the next ones."""
    path = log(profile)
    if not path.is_file():
        return [], 0
    with path.open("rb") as file:
        file.seek(offset if offset <= path.stat().st_size else 0)  # 0: somebody emptied the log
        offset = file.tell()
        data = file.read()
    whole = data[: data.rfind(b"\n") + 1]  # a line that is still being written waits
    events = [event for line in whole.splitlines() if (event := _parse(line))]
    return events, offset + len(whole)


def _parse(line: bytes) -> Event | None:
    """The event of one line; None for a damaged line (a full disk cuts lines)."""
    try:
        event = Event(**json.loads(line))
    except (ValueError, TypeError):
        return None
    return event if event.status in STATUSES else None


def describe(events: Iterable[Event]) -> list[str]:
    """Lines that say what happened: rows are counted, everything else is named.

    Example:
        >>> describe([Event("figure", "prior", "made", seconds=0.5), Event("row", "a", "reused")])
        ['figures made: prior (0.5 s)', 'rows: 1 reused']
    """
    latest = {(event.kind, event.name): event for event in events}  # the last one counts
    lines = []
    for kind in dict.fromkeys(kind for kind, _ in latest):
        chosen = [event for event in latest.values() if event.kind == kind]
        lines += _count(chosen) if kind == "row" else _names(chosen)
    return lines


def _names(events: list[Event]) -> list[str]:
    """One line per status with all names."""
    lines = []
    for status in STATUSES:
        names = [_name(event) for event in events if event.status == status]
        if names:
            lines.append(f"{events[0].kind}s {status}: {', '.join(names)}")
    return lines


def _name(event: Event) -> str:
    """Name with the time and the reason where they are known."""
    facts = [f"{event.seconds:.1f} s"] if event.seconds is not None else []
    facts += [event.reason] if event.reason else []
    return f"{event.name} ({', '.join(facts)})" if facts else event.name


def _count(events: list[Event]) -> list[str]:
    """One line with the count of each status, and one per status whose reasons are known."""
    counts, reasons = [], []
    for status in STATUSES:
        chosen = [event for event in events if event.status == status]
        if chosen:
            seconds = [event.seconds for event in chosen if event.seconds is not None]
            counts.append(f"{len(chosen)} {status}" + (f" in {sum(seconds):.1f} s" * bool(seconds)))
        why = dict.fromkeys(event.reason for event in chosen if event.reason)
        if why:
            reasons.append(f"{events[0].kind}s {status} because: {'; '.join(why)}")
    return [f"{events[0].kind}s: {', '.join(counts)}", *reasons]


@dataclass(frozen=True)
class Failure:
    """Why a notebook failed. `cell` counts from 1 in the source notebook, prose included."""

    error: str
    message: str
    cell: int | None = None
    execution_count: int | None = None
    excerpt: tuple[str, ...] = ()
    traceback: tuple[str, ...] = ()

    @property
    def brief(self) -> str:
        """One line: the cell, the error and the first line of its message."""
        place = f"cell {self.cell}: " if self.cell else ""
        return f"{place}{self.error}: {(self.message.splitlines() or [''])[0]}"


@dataclass(frozen=True)
class NotebookRun:
    """How one notebook went. It is not `finished` if the whole run was stopped in its middle."""

    name: str
    seconds: float
    executed: Path
    failure: Failure | None = None
    events: tuple[Event, ...] = ()
    finished: bool = True

    @property
    def ok(self) -> bool:
        """Whether it ran to its end without an error."""
        return self.finished and self.failure is None

    @property
    def outcome(self) -> str:
        """The end in words."""
        if self.failure:
            return f"FAILED in {self.failure.brief}"
        return "ok" if self.finished else "stopped"


@dataclass(frozen=True)
class Summary:
    """How everything went. `not_started` names the notebooks that the run did not reach."""

    profile: str
    runs: tuple[NotebookRun, ...]
    not_started: tuple[str, ...]
    seconds: float
    figures: Path
    executed: Path

    @property
    def exit_code(self) -> int:
        """0 if every notebook ran without an error, 1 otherwise."""
        return int(bool(self.not_started) or not all(run.ok for run in self.runs))


def format_failure(run: NotebookRun) -> str:
    """The failing cell, its error and the end of the traceback, without colours."""
    failure = run.failure
    assert failure is not None
    count = f"In [{failure.execution_count}] of " if failure.execution_count else ""
    where = f" in cell {failure.cell}" if failure.cell else ""
    lines = [f"{run.name} failed{where} ({count}{run.executed})", *failure.excerpt]
    lines += f"{failure.error}: {failure.message}".splitlines()
    if failure.traceback:
        what = "of the traceback" if failure.execution_count else "that its process wrote"
        lines += [f"last lines {what}:", *(f"  {line}" for line in failure.traceback)]
    return "\n    ".join(line.rstrip() for line in lines)


def format_summary(summary: Summary) -> str:
    """One line per notebook, what each made or reused, the total time and the folders."""
    names = [*(run.name for run in summary.runs), *summary.not_started]
    width = max(map(len, names), default=0)
    lines = ["", f"profile {summary.profile}"]
    for run in summary.runs:
        lines.append(f"  {run.name:<{width}}  {run.seconds:8.1f} s  {run.outcome}")
        lines += [f"      {line}" for line in describe(run.events)]
    lines += [f"  {name:<{width}}  {'-':>8}    not started" for name in summary.not_started]
    ok = sum(run.ok for run in summary.runs)
    lines.append(f"{ok} of {len(names)} notebooks ok in {summary.seconds:.1f} s")
    lines.append(f"figures: {summary.figures}")
    lines.append(f"executed notebooks: {summary.executed}")
    return "\n".join(lines)
