"""The benchmark's arithmetic; no clock is tested."""

from __future__ import annotations

from gpvae import timing


def test_calls_alternate_and_warmup_is_not_counted():
    calls = []
    seconds = timing.alternate(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3, warmup=1
    )
    assert calls == list("abababab")
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}


def test_ratios_are_paired_by_turn():
    """The machine gets ten times slower half way: paired ratios do not notice."""
    seconds = {"base": [1.0, 1.0, 10.0, 10.0, 10.0], "other": [2.0, 2.0, 20.0, 20.0, 20.0]}
    assert timing.relative(seconds, "base") == {"base": 1.0, "other": 2.0}
