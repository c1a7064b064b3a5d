"""Sweeps: what is done is skipped, failures and deaths stop nothing, filters and states."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from concurrent.futures import BrokenExecutor, Executor, Future

import light
import pytest
import torch

from gpvae import cli, events, experiment, jobs, jsonl, profiles, results, sweep_command
from gpvae.errors import ConfigError, StorageError, TrainingError
from gpvae.evaluate import Estimate
from gpvae.processes import Processes
from gpvae.results import Results
from gpvae.sweep import Pace, duration, sweep

DIVERGES = {"training.learning_rate": 1e30, "training.epochs": 5}


@pytest.fixture
def base(tiny_config, project_root):
    sizes = {"data.train_size": 64, "data.valid_size": 20, "data.test_size": 12}
    return tiny_config.override(**sizes, **{"training.epochs": 2, "evaluation.gaps": False})


@pytest.fixture
def tiny(base, monkeypatch):
    """A profile of that name, with two encoders, two outputs, two seeds and a variation."""
    profile = profiles.Profile(
        "tiny",
        base,
        seeds=(0, 1),
        variations={"flows": ({"model.encoder": "iaf", "model.flow.steps": 1},)},
        workers=1,
    )
    monkeypatch.setitem(profiles.PROFILES, "tiny", profile)
    return profile


def fake_row(job_config):
    return {"log_likelihood": {"mean": -1.0}, "seconds": {"train": 2.0, "evaluate": 1.0}}


class Fake(Executor):
    """Calls at once, in this process; keeps what it was given."""

    workers = 4

    def __init__(self):
        self.calls = []

    def submit(self, function, /, *args, **kwargs):
        self.calls.append(args[0].name)
        future = Future()
        try:
            future.set_result(self.answer(function, *args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future

    def answer(self, function, *args, **kwargs):
        return function(*args, **kwargs)


class Stand(Fake):
    """Gives rows without computing, after as many deaths of each job as the test says."""

    def __init__(self, deaths=()):
        super().__init__()
        self.deaths = dict(deaths)

    def answer(self, function, job_config, *_):
        if self.deaths.get(job_config.seed, 0) > 0:
            self.deaths[job_config.seed] -= 1
            raise BrokenExecutor("a worker died")
        return fake_row(job_config)


def seeds_of(base, count):
    return [base.override(seed=seed) for seed in range(count)]


def test_done_jobs_are_skipped(base, lines, monkeypatch):
    configs = seeds_of(base, 2)
    first = sweep({"a": configs[:1]}, log=lines.append)
    assert list(first.rows) == [("a", configs[0].name)] and not first.failures
    assert "1/1" in lines[-1] and f"{configs[0].name}: log p(x) >= " in lines[-1]
    second = sweep({"a": configs, "b": configs[:1]}, log=lines.append)
    assert second.rows["a", configs[0].name] == first.rows["a", configs[0].name]
    assert [line.split("] ")[1].split(":")[0] for line in lines[1:]] == [
        "1 of 3 jobs are done already",
        f"2/3 a {configs[1].name}",
        f"3/3 b {configs[0].name}",
    ]
    monkeypatch.setattr(experiment, "run", None)  # would fail if called
    third = sweep({"a": configs, "b": configs[:1]}, log=lines.append)
    assert third.rows == second.rows
    assert [event.status for event in events.read("a")[0]] == [
        *("made", "reused", "made", "reused", "reused")
    ]


def test_a_row_that_is_not_finite_is_a_failure(base, lines, monkeypatch):
    (row,) = sweep({"a": [base]}, log=lines.append).rows.values()
    bad = row | {"elbo": row["elbo"] | {"mean": float("nan")}}
    jsonl.append(Results("a").path, bad)
    (job,) = jobs.survey({"a": [base]})
    assert (job.state, job.reason) == ("failed", "not a finite number: elbo")
    nan = torch.full((12,), float("nan"))
    with monkeypatch.context() as patch:
        broken = {"elbo": Estimate(nan, nan, 10), "log_likelihood": Estimate(nan + 1, nan, 10)}
        patch.setattr(experiment, "evaluate", lambda *_: (broken, {}))
        outcome = sweep({"a": [base]}, log=lines.append)
    assert not outcome.rows and "not a finite number: elbo, log_l" in lines[-1]
    (job,) = jobs.survey({"a": [base]})
    assert job.state == "failed" and "elbo" in job.reason
    assert sweep({"a": [base]}, log=lines.append).rows  # made again, with a number this time


def test_failing_job_is_recorded_and_the_others_are_done(base, lines):
    bad = base.override(**DIVERGES, seed=7)
    outcome = sweep({"a": [bad, base]}, log=lines.append)
    assert list(outcome.rows) == [("a", base.name)]
    (line,) = jobs.failures_path("a").read_text().splitlines()
    failure = json.loads(line)
    assert failure["name"] == bad.name and failure["error"] == "TrainingError"
    assert failure["key"] == results.run_key(bad, experiment.load_data(bad).hash)
    assert failure["config_hash"] == bad.hash() and abs(failure["time"] - time.time()) < 60
    assert "training.learning_rate" in failure["message"] and failure["traceback"] == ""
    assert f"1/2 {bad.name}: FAILED, TrainingError: " in lines[0]


def test_defect_keeps_its_traceback_and_a_full_disk_ends_the_sweep(base, lines, monkeypatch):
    def run(error):
        def stand_in(*_):
            raise error

        monkeypatch.setattr(experiment, "run", stand_in)
        return sweep({"a": seeds_of(base, 2)}, log=lines.append)

    assert len(run(ZeroDivisionError("a defect")).failures) == 2
    assert "stand_in" in jobs.read_failures("a")[base.name].traceback
    with pytest.raises(OSError, match="full"):
        run(OSError(28, "full"))
    with pytest.raises(StorageError, match="cannot write"):
        run(StorageError("cannot write checkpoint.pt"))


def test_later_success_makes_a_failure_obsolete(base, lines, monkeypatch):
    original = experiment.run

    def fail(*_):
        raise TrainingError("for now\nsecond line")

    monkeypatch.setattr(experiment, "run", fail)
    sweep({"a": [base]}, log=lines.append)
    (job,) = jobs.survey({"a": [base]})
    assert (job.state, job.reason) == ("failed", "TrainingError: for now")
    changed = base.override(**{"training.epochs": 3})
    assert jobs.survey({"a": [changed]})[0].state == "missing"  # the failure was another job's

    monkeypatch.setattr(experiment, "run", original)
    outcome = sweep({"a": [base]}, log=lines.append)
    assert not outcome.failures
    assert jobs.survey({"a": [base]})[0].state == "done"
    row = outcome.rows["a", base.name]
    Results("a").arrays_path(row).unlink()
    (job,) = jobs.survey({"a": [base]})
    assert (job.state, job.reason) == ("stale", "its per-image arrays are missing or damaged")
    assert jobs.read_failures("a")[base.name].message == "for now\nsecond line"


def test_damaged_failures_are_passed_over(base):
    path = jobs.failures_path("a")
    jsonl.append(path, {"name": base.name, "of another": "version"})
    with open(path, "a") as file:
        file.write('{"name": "cut')
    assert jobs.read_failures("a") == {}


def test_another_executor_can_be_plugged_in(base, lines):
    configs, executor = seeds_of(base, 3), Fake()
    outcome = sweep({"a": configs}, executor, lines.append)
    assert executor.calls == [each.name for each in configs]
    assert [outcome.rows["a", each.name]["seed"] for each in configs] == [0, 1, 2]
    assert len(lines) == 3  # the jobs' own lines are not printed


def test_job_whose_process_dies_is_tried_twice(base, lines):
    configs, executor = seeds_of(base, 3), Stand({0: 1, 1: 2})
    outcome = sweep({"a": configs}, executor, lines.append)
    assert {name for _, name in outcome.rows} == {configs[0].name, configs[2].name}
    assert sorted(executor.calls) == sorted(each.name for each in configs[:2] + configs)
    assert "died twice" in outcome.failures["a", configs[1].name].message
    assert sum("its process died; trying once more" in line for line in lines) == 2


def test_executor_that_is_broken_for_good_ends(base, lines):
    class Broken(Executor):
        def submit(self, *_):
            raise BrokenExecutor

    assert len(sweep({"a": seeds_of(base, 2)}, Broken(), lines.append).failures) == 2


def test_interruption_cancels_what_waits(base, lines):
    future, queued = Future(), []

    class Interrupted(Fake):
        def submit(self, function, job_config, *_):
            queued.append(Future() if queued else future)
            return queued[-1]

    future.set_exception(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        sweep({"a": seeds_of(base, 3)}, Interrupted(), lines.append)
    assert [each.cancelled() for each in queued] == [False, True, True]


class Deadly(Processes):
    """Real processes that give rows without computing; one of them is killed once."""

    def __init__(self, workers, mark):
        super().__init__(workers)
        self.mark = str(mark)

    def submit(self, function, job_config, *_):
        if job_config.seed == 1:
            return super().submit(light.die_once, self.mark, fake_row(job_config))
        return super().submit(dict, fake_row(job_config))


def test_pool_survives_the_death_of_a_worker(base, lines, tmp_path):
    with Deadly(2, tmp_path / "mark") as executor:
        outcome = sweep({"a": seeds_of(base, 5)}, executor, lines.append)
    assert len(outcome.rows) == 5 and not outcome.failures
    assert sum("trying once more" in line for line in lines) == 1


def test_remaining_time():
    pace = Pace()
    assert pace.remaining([("p", "vae")]) is None
    pace.add("p", "vae", 10.0)
    pace.add("p", "vae", 20.0)
    pace.add("q", "vae", 90.0)
    pace.add("q", "iaf", 300.0)
    assert pace.remaining([]) == 0
    assert pace.remaining([("p", "vae")]) == 15  # the same profile and encoder
    assert pace.remaining([("r", "vae")]) == 40  # the same encoder
    assert pace.remaining([("r", "rme")]) == 105  # all
    waiting = [("p", "vae"), ("p", "vae"), ("p", "iaf")]
    assert pace.remaining(waiting) == 330
    assert pace.remaining(waiting, workers=2) == 165
    assert pace.remaining(waiting, workers=8) == 110  # only three can run at once


def test_lines_tell_the_remaining_time(base, lines):
    sweep({"a": seeds_of(base, 9)}, Stand(), lines.append)
    assert lines[0].endswith("nats; about 6 s left")  # 8 jobs of 3 s by 4 workers
    assert lines[-1].endswith("nats")
    assert [duration(s) for s in (119, 120, 7199, 7200)] == ["119 s", "2 min", "120 min", "2.0 h"]


@pytest.mark.parametrize(
    ("filters", "count"),
    [
        ({}, 10),
        ({"encoders": ["vae"]}, 4),
        ({"encoders": ["iaf"]}, 2),
        ({"outputs": ["bernoulli"], "seeds": [1]}, 2),
        ({"variations": ["none"]}, 8),
        ({"variations": ["all"]}, 10),
        ({"variations": ["flows"], "seeds": [0]}, 5),
    ],
)
def test_filters(tiny, filters, count):
    chosen = sweep_command.select([tiny, tiny], **filters)
    assert list(chosen) == ["tiny"] and len(chosen["tiny"]) == count


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"encoders": ["gpvea"]}, r"unknown encoder 'gpvea'. Did you mean 'gpvae'\?"),
        ({"encoders": ["svi"]}, r"Known: gpvae, iaf, vae\."),
        ({"outputs": ["logistic"]}, r"Known: bernoulli, gaussian\."),
        ({"seeds": [0, 5]}, r"unknown seed '5'. Known: 0, 1\."),
        ({"variations": ["flow"]}, "Did you mean 'flows'"),
        ({"variations": ["all", "none"]}, "'?all'? or '?none'? alone"),
        ({"encoders": ["iaf"], "variations": ["none"]}, "no run has all"),
    ],
)
def test_misused_filters(tiny, filters, message):
    with pytest.raises(ConfigError, match=message):
        sweep_command.select([tiny], **filters)


def test_list_shows_states_and_computes_nothing(tiny, base, capsys):
    vae, other = base, base.override(seed=1)
    sweep({"tiny": [vae, other.override(**{"training.epochs": 1})]}, log=lambda line: None)
    bad = tiny.variation("flows")[0]
    key = results.run_key(bad, experiment.load_data(bad).hash)
    failure = jobs.Failure(bad.name, key, bad.hash(), "MemoryError", "too much", time.time())
    jsonl.append(jobs.failures_path("tiny"), vars(failure))
    rows = Results("tiny").path.read_text()
    assert cli.main(["sweep", "--profile", "tiny", "--outputs", "gaussian", "--list"]) == 0
    out = capsys.readouterr().out
    done = results.run_key(vae, experiment.load_data(vae).hash)
    assert f"  done     {done}  {vae.name}\n" in out
    assert f"{other.name} (training.epochs: 1 -> 2)\n" in out
    assert f"  failed   {key}  {bad.name} (MemoryError: too much)\n" in out
    assert out.endswith("6 jobs: 1 done, 1 stale, 1 failed, 3 missing\n")
    assert Results("tiny").path.read_text() == rows


def test_command_lists_failures_and_exits_with_1(tiny, base, capsys, monkeypatch):
    original = experiment.run

    def run(job_config, *rest):
        if job_config.seed == 1 and job_config.model.encoder == "gpvae":
            raise TrainingError("not this one")
        return original(job_config, *rest)

    monkeypatch.setattr(experiment, "run", run)
    command = ["sweep", "--profile", "tiny", "--outputs", "gaussian", "--variations", "none"]
    assert cli.main(command) == 1
    out = capsys.readouterr().out
    assert "3 of 4 jobs are done\n  tiny digits-" in out
    assert "-s1: TrainingError: not this one\nfailures in full: " in out
    monkeypatch.setattr(experiment, "run", original)
    assert cli.main([*command, "--workers", "1"]) == 0
    assert capsys.readouterr().out.endswith("4 of 4 jobs are done\n")


@pytest.mark.parametrize("arguments", [["--workers", "0"], ["--workers", "x"], ["--seeds", "x"]])
def test_misuse(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["sweep", *arguments])
    assert caught.value.code == 2


def test_sweep_needs_neither_jupyter_nor_papermill_nor_plots(tiny):
    code = (
        "import sys\n"
        "for name in ('papermill', 'nbformat', 'IPython', 'ipykernel', 'matplotlib', 'seaborn'):\n"
        "    sys.modules[name] = None\n"
        "from gpvae import cli\n"
        "sys.exit(cli.main(['sweep', '--profile', 'smoke', '--list']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("16 jobs: 0 done, 0 stale, 0 failed, 16 missing\n")


@pytest.mark.parametrize("arguments", [["sweep", "--profile", "smoke"], ["train"]])
def test_a_folder_that_cannot_be_is_said_before_anything_is_trained(
    arguments, project_root, monkeypatch, capsys
):
    (project_root / "results").write_text("a file")
    monkeypatch.setattr(experiment, "run", None)  # would fail if called
    assert cli.main(arguments) == 1
    assert "cannot write to" in (said := capsys.readouterr().err) and "GPVAE_ROOT" in said
