"""The headless runner, with real kernels over tiny notebooks."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest

from gpvae import disk, events, kernel, paths, reproduce
from gpvae.errors import ConfigError, NotebookError
from gpvae.events import Event, Failure, NotebookRun, Summary

PARAMETERS = 'profile = "digits"\nfresh_since = 0.0\nseeds = 1\n'
DRIVER = """
import signal, sys
from pathlib import Path
from gpvae import paths
from gpvae.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent may have ignored it
paths.notebooks = lambda: Path(sys.argv[1])
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty notebooks folder; results go to a root whose name is awkward."""
    monkeypatch.setenv("GPVAE_ROOT", str(tmp_path / "out {put}"))
    place = tmp_path / "notebooks"
    place.mkdir()
    return place


def write(folder: Path, name: str, *cells: str, parameters: str | None = PARAMETERS) -> Path:
    """Write a notebook: prose, the parameters cell, then the given code cells from number 3 on."""
    new = nbformat.v4
    book = new.new_notebook(cells=[new.new_markdown_cell("A question.")])
    if parameters is not None:
        tagged = new.new_code_cell(parameters, metadata={"tags": ["parameters"]})
        book.cells.append(tagged)
    book.cells += [new.new_code_cell(cell) for cell in cells]
    nbformat.write(book, folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


def launch(folder: Path, **options) -> tuple[Summary, str]:
    """Run the notebooks and return the summary and what was printed."""
    stream = io.StringIO()
    summary = reproduce.reproduce("smoke", notebooks=folder, stream=stream, **options)
    return summary, stream.getvalue()


def executed(name: str) -> nbformat.NotebookNode:
    """The executed copy."""
    path = paths.results("smoke") / "notebooks" / f"{name}.ipynb"
    return nbformat.read(path, as_version=4)


def printed(name: str) -> str:
    """Everything that the executed copy's cells printed."""
    outputs = [out for cell in executed(name).cells for out in cell.get("outputs", [])]
    return "".join(out.get("text", "") for out in outputs)


def gone(pid: int, patience: float = 5.0) -> bool:
    """Whether the process ends within some seconds."""
    until = time.monotonic() + patience
    while time.monotonic() < until:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


# Runs that succeed


def test_success(folder, monkeypatch, capfd):
    monkeypatch.setenv("MPLBACKEND", "Agg")  # would leave the executed copies without images
    first = write(
        folder,
        "01_first",
        "import json; print(json.dumps([profile, fresh_since > 0, seeds, names]))",
        "from gpvae.events import record\n"
        "record(profile, 'figure', 'prior', 'made', seconds=0.25)\n"
        "record(profile, 'row', 'a', 'recomputed', 'the data changed', 2.0)\n"
        "record(profile, 'row', 'b', 'reused')",
        "import matplotlib.pyplot as plt; plt.plot([1, 2]); plt.show()",
        parameters=PARAMETERS + "names: list = []\n",
    )
    before = first.read_bytes()
    text = 'a "b" \\ ü'
    summary, output = launch(folder, force=True, parameters={"seeds": 3, "names": (text, None)})

    assert summary.exit_code == 0
    assert json.loads(printed("01_first")) == ["smoke", True, 3, [text, None]]
    assert summary.runs[0].events == (
        Event("figure", "prior", "made", seconds=0.25),
        Event("row", "a", "recomputed", "the data changed", 2.0),
        Event("row", "b", "reused"),
    )
    images = [out for cell in executed("01_first").cells for out in cell.get("outputs", [])]
    assert any("image/png" in out.get("data", {}) for out in images)
    assert re.search(r"^\[ +\d+\.\d s\] 01_first: started$", output, re.M)
    assert re.search(r"^\[ +\d+\.\d s\] 01_first: ok after \d+\.\d s$", output, re.M)
    assert "figures made: prior (0.2 s)\n" in output
    assert "rows: 1 reused, 1 recomputed in 2.0 s\n" in output
    assert "rows recomputed because: the data changed\n" in output
    assert f"figures: {paths.figures('smoke')}\n" in output
    assert first.read_bytes() == before and list(folder.iterdir()) == [first]
    assert capfd.readouterr() == ("", "")  # nothing from papermill, nbclient or the kernel


def test_an_event_after_a_torn_line_is_not_lost(project_root):
    events.record("t", "row", "a", "made")
    with events.log("t").open("ab") as file:
        file.write(b'{"kind": "row", "na')
    for name in "bc":
        events.record("t", "row", name, "made")
    assert [event.name for event in events.read("t")[0]] == ["a", "b", "c"]


def test_events_of_earlier_notebooks_and_runs_are_not_repeated(folder):
    write(
        folder, "01_first", "from gpvae.events import record; record(profile, 'row', 'a', 'made')"
    )
    write(
        folder, "02_second", "from gpvae.events import record; record(profile, 'row', 'b', 'made')"
    )
    events.record("smoke", "row", "old", "made")
    summary, _ = launch(folder)
    assert [[event.name for event in run.events] for run in summary.runs] == [["a"], ["b"]]


def test_kernel_is_this_interpreter_and_this_package(folder, tmp_path, monkeypatch):
    rogue = tmp_path / "rogue" / "kernels" / "python3"
    rogue.mkdir(parents=True)
    spec = {"argv": ["/bin/false"], "display_name": "rogue", "language": "python"}
    (rogue / "kernel.json").write_text(json.dumps(spec))
    startup = tmp_path / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "00.py").write_text("rogue = 1")
    for name in ("JUPYTER_DATA_DIR", "JUPYTER_PATH"):
        monkeypatch.setenv(name, str(tmp_path / "rogue"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setattr(kernel, "START_TIMEOUT", 10)
    write(
        folder,
        "01_first",
        "import json, os, sys, gpvae\n"
        "there = ['rogue' in globals(), sys.executable, gpvae.__path__[0], os.getcwd()]\n"
        "print(json.dumps(there))",
    )
    launch(folder)
    copies = paths.results("smoke") / "notebooks"
    package = str(paths.CHECKOUT / "gpvae")
    assert json.loads(printed("01_first")) == [False, sys.executable, package, str(copies)]


def test_kernel_writes_and_imports_where_this_process_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPVAE_ROOT", "here")
    monkeypatch.setenv("PYTHONPATH", "other")
    environment = kernel._environment(tmp_path)
    assert environment["GPVAE_ROOT"] == str(tmp_path / "here")
    assert environment["PYTHONPATH"].split(os.pathsep) == [str(paths.CHECKOUT), "other"]


# Notebooks that fail


def test_failing_cell_is_shown_and_the_others_run(folder):
    write(folder, "01_first", "print('kept')\nseeds = 2\n\n1 / 0\n\nseeds = 4", "print('never')")
    write(folder, "02_second", "print('fine')")
    summary, output = launch(folder)

    assert summary.exit_code == 1
    assert [run.failure is None for run in summary.runs] == [False, True]
    failure = summary.runs[0].failure
    assert (failure.cell, failure.execution_count) == (3, 3)
    assert (failure.error, failure.message) == ("ZeroDivisionError", "division by zero")
    assert "01_first failed in cell 3 (In [3] of " in output
    assert "    -->   4  1 / 0\n" in output
    assert "ZeroDivisionError: division by zero\n" in output
    assert "\x1b" not in output
    assert re.search(r"01_first +\d+\.\d s  FAILED in cell 3: ZeroDivisionError", output)
    assert printed("01_first") == "kept\n"
    assert printed("02_second") == "fine\n"


def test_traceback_of_a_library_is_shown(folder):
    write(folder, "01_first", "import json\njson.loads('{')")
    summary, output = launch(folder)
    assert "    -->   2  json.loads('{')\n" in output
    assert "last lines of the traceback:\n" in output
    assert "raw_decode" in output and "\x1b" not in output
    assert len(summary.runs[0].failure.traceback) <= kernel.TAIL


def test_cell_beyond_the_limit_is_stopped(folder, tmp_path, caplog):
    note = tmp_path / "pid"
    write(
        folder,
        "01_first",
        "import os, time",
        f"open({str(note)!r}, 'w').write(str(os.getpid()))\ntime.sleep(100)",
    )
    write(folder, "02_second", "print('fine')")
    summary, output = launch(folder, cell_timeout=1)

    assert summary.exit_code == 1
    assert summary.runs[0].failure.cell == 4
    assert summary.runs[0].seconds < 30
    assert "timeout: the cell ran longer than 1 s" in output
    assert "time.sleep(100)" in output
    assert gone(int(note.read_text()))
    assert printed("02_second") == "fine\n"
    assert not [each for each in caplog.records if each.name == "papermill"]  # nbclient's complaint


def test_dying_kernel_is_a_failure_and_does_not_hang(folder):
    write(folder, "01_first", "print('kept')", "import os; os._exit(3)")
    write(folder, "02_second", "print('fine')")
    summary, output = launch(folder)

    assert summary.exit_code == 1
    assert summary.runs[0].failure.cell == 4
    assert "the kernel died: its process ended with exit code 3\n" in output
    assert printed("01_first") == "kept\n"
    assert printed("02_second") == "fine\n"


def test_kernel_that_does_not_start_is_a_failure(folder, monkeypatch):
    monkeypatch.setattr(kernel, "_environment", lambda _: {"PYTHONHOME": "/nowhere"})
    write(folder, "01_first", "print('never')")
    summary, output = launch(folder)
    assert summary.exit_code == 1
    assert summary.runs[0].failure.cell is None
    assert "encodings" in output  # the interpreter's own last words


def test_ctrl_c_stops_the_run_and_its_kernel(folder, tmp_path):
    note = tmp_path / "pid"
    write(
        folder, "01_first", "from gpvae.events import record; record(profile, 'row', 'a', 'made')"
    )
    write(
        folder,
        "02_second",
        "from gpvae.events import record; record(profile, 'figure', 'early', 'made')",
        "print('kept')",
        f"import os, time\nopen({str(note)!r}, 'w').write(str(os.getpid()))\ntime.sleep(100)",
    )
    write(folder, "03_third", "print('never')")
    command = [sys.executable, "-c", DRIVER, str(folder), "reproduce", "--profile", "smoke"]
    runner = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while not (note.is_file() and note.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    runner.send_signal(signal.SIGINT)
    output, errors = runner.communicate(timeout=20)

    assert runner.returncode == 130
    assert gone(int(note.read_text()))
    assert "Traceback" not in errors
    assert "finished results are kept" in errors
    assert "rows: 1 made\n" in output
    assert re.search(r"02_second .* stopped\n +figures made: early\n", output)
    assert re.search(r"03_third .* not started\n", output)
    assert printed("02_second") == "kept\n"


def test_left_over_kernel_is_killed():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    provisioners = (None, SimpleNamespace(process=process))  # None: it never started
    kernels = [SimpleNamespace(provisioner=each) for each in provisioners]
    kernel._kill(kernels)
    assert process.returncode == -signal.SIGKILL
    assert "SIGKILL, often a sign that the memory" in kernel._last_words(kernels)


# Disks


@pytest.mark.parametrize("blocked", ["results", "figures"])
def test_unwritable_folder(folder, blocked):
    write(folder, "01_first", "print('never')")
    paths.root().mkdir()
    (paths.root() / blocked).write_text("a file where a folder should be")
    with pytest.raises(disk.RunError, match=f"cannot write to .*{blocked}.*GPVAE_ROOT"):
        launch(folder)


def test_full_disk_while_a_copy_is_saved(folder, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("papermill.iorw.LocalHandler.write", fail)
    write(folder, "01_first", "print('never')")
    with pytest.raises(disk.RunError, match=r"disk of .* is full"):
        launch(folder)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_inside_a_notebook_ends_the_run(folder):
    write(folder, "01_first", "with open('/dev/full', 'w') as file:\n    file.write('x')")
    write(folder, "02_second", "print('never')")
    stream = io.StringIO()
    with pytest.raises(disk.RunError, match=r"disk of .* is full"):
        reproduce.reproduce("smoke", notebooks=folder, stream=stream)
    assert re.search(r"02_second .* not started\n", stream.getvalue())


# Mistakes, found before anything runs


def refused(folder: Path, message: str, kind: type[Exception] = NotebookError, **options) -> None:
    """The run is refused with that message, and nothing has been written."""
    with pytest.raises(kind, match=message) as caught:
        launch(folder, **options)
    assert not isinstance(caught.value, disk.RunError)
    assert not paths.root().exists()


def test_unknown_parameter(folder):
    write(folder, "01_first")
    refused(folder, "unknown parameter 'seed'. Did you mean 'seeds'", parameters={"seed": 3})


def test_parameter_that_some_notebooks_lack(folder):
    write(folder, "01_first")
    write(folder, "02_second", parameters=PARAMETERS + "size: int = 3")
    refused(folder, "'size' does not exist in 01_first.*--only 02", parameters={"size": 3})


def test_profile_and_force_are_no_free_parameters(folder):
    write(folder, "01_first")
    refused(folder, "set profile with --profile", parameters={"profile": "paper"})
    refused(folder, "set fresh_since with --force", parameters={"fresh_since": 1.0})


def test_value_that_cannot_be_written_as_a_literal(folder):
    write(folder, "01_first")
    refused(folder, "cannot be passed to a notebook", parameters={"seeds": [{1, 2}]})


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (None, "0 cells tagged"),
        ("profile = 'x'", "lacks fresh_since"),
        ("seeds = ", "is not Python"),
    ],
)
def test_parameters_cell_that_cannot_be_used(folder, parameters, message):
    write(folder, "01_first", parameters=parameters)
    refused(folder, message)


def test_two_parameters_cells(folder):
    path = write(folder, "01_first", "seeds = 3")
    book = nbformat.read(path, as_version=4)
    book.cells[-1].metadata["tags"] = ["parameters"]
    nbformat.write(book, path)
    refused(folder, "2 cells tagged")


def test_damaged_notebook(folder):
    (folder / "01_first.ipynb").write_text("{")
    refused(folder, "01_first.ipynb is not a notebook")


def test_no_notebooks(folder):
    refused(folder, r"no notebooks in .*pip install -e \.")


@pytest.mark.parametrize("limit", [0, -1, float("nan"), float("inf")])
def test_impossible_limit(folder, limit):
    write(folder, "01_first")
    refused(folder, "positive number of seconds", ConfigError, cell_timeout=limit)


def test_unknown_profile(folder):
    with pytest.raises(ConfigError, match="Did you mean 'smoke'"):
        reproduce.reproduce("smok", notebooks=folder)


def test_missing_papermill(folder, monkeypatch):
    write(folder, "01_first")
    monkeypatch.setitem(sys.modules, "papermill", None)
    refused(folder, "pip install papermill")


@pytest.mark.parametrize(
    ("only", "numbers"),
    [
        (None, "01 02 03 11"),
        ("02", "02"),
        ("2", "02"),
        (["3", "01"], "01 03"),
        ("11,2", "02 11"),
        (["02_tr"], "02"),
        (["training"], "02"),
        (["t"], "02 03"),
    ],
)
def test_selection(folder, only, numbers):
    for name in ("01_derivation", "02_training", "03_tables", "11_extra"):
        write(folder, name)
    write(folder, "notes")
    chosen = reproduce.select(reproduce.find_notebooks(folder), only)
    assert " ".join(each.name[:2] for each in chosen) == numbers


@pytest.mark.parametrize("only", ["04", "0", "02_trainings", "raining"])
def test_unknown_selection(folder, only):
    write(folder, "02_training")
    refused(folder, f"unknown notebook '{only}'.*Known: 02_training", only=only)


def test_empty_selection(folder):
    write(folder, "02_training")
    refused(folder, "names no notebook", only=" , ")


# What is shown


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


def test_terminal_shows_one_bar(folder, monkeypatch):
    def execute(notebook, values, timeout, on_cell, target, scratch):
        for index in range(notebook.cells + 1):
            on_cell(index)
        return Failure("ValueError", "boom", cell=1) if notebook.name == "02_second" else None

    monkeypatch.setattr(reproduce, "execute", execute)
    for name in ("01_first", "02_second"):
        write(folder, name, "pass", "pass")
    stream = Terminal()
    summary = reproduce.reproduce("smoke", notebooks=folder, stream=stream)
    frames = stream.getvalue()
    assert "01_first:" in frames and "02_second:" in frames
    assert "/10 [" in frames  # cells of both notebooks, with the injected ones
    assert "started" not in frames
    assert "02_second failed in cell 1" in frames
    assert frames.endswith(events.format_summary(summary) + "\n")


def test_summary_is_a_pure_function_of_the_facts():
    made = (Event("figure", "prior", "made", seconds=1.0), Event("figure", "toy", "reused"))
    runs = (
        NotebookRun("01_first", 2.0, Path("a"), None, made),
        NotebookRun("02_second", 3.0, Path("b"), Failure("ValueError", "boom\nmore", 4)),
        NotebookRun("03_third", 1.0, Path("c"), finished=False),
    )
    summary = Summary("smoke", runs, ("04_fourth",), 6.0, Path("figures"), Path("copies"))
    assert summary.exit_code == 1
    assert events.format_summary(summary).strip() == (
        "profile smoke\n"
        "  01_first        2.0 s  ok\n"
        "      figures made: prior (1.0 s)\n"
        "      figures reused: toy\n"
        "  02_second       3.0 s  FAILED in cell 4: ValueError: boom\n"
        "  03_third        1.0 s  stopped\n"
        "  04_fourth         -    not started\n"
        "1 of 4 notebooks ok in 6.0 s\n"
        "figures: figures\n"
        "executed notebooks: copies"
    )


# The log of events


def test_events_are_read_from_an_offset(folder):
    assert events.read("smoke") == ([], 0)
    events.record("smoke", "row", "a", "made", seconds=1.0)
    first, offset = events.read("smoke")
    events.record("smoke", "row", "b", "failed", "a\nreason")
    assert first == [Event("row", "a", "made", seconds=1.0)]
    assert events.read("smoke", offset)[0] == [Event("row", "b", "failed", "a\nreason")]


def test_half_written_and_damaged_lines_are_no_events(folder):
    events.record("smoke", "row", "a", "made")
    log = events.log("smoke")
    whole = log.read_bytes()
    log.write_bytes(b'{"kind": "row"}\nnot json\n[1]\n' + whole[:-5])
    found, offset = events.read("smoke")
    assert found == []
    with log.open("ab") as file:
        file.write(whole[-5:])
    assert events.read("smoke", offset)[0] == [Event("row", "a", "made")]


def test_emptied_log_is_read_from_its_start(folder):
    events.record("smoke", "row", "a long name", "made")
    offset = events.read("smoke")[1]
    events.log("smoke").unlink()
    events.record("smoke", "row", "b", "made")
    assert [event.name for event in events.read("smoke", offset)[0]] == ["b"]


def test_unknown_status_is_refused(folder):
    with pytest.raises(ValueError, match="'done'"):
        events.record("smoke", "row", "a", "done")
    assert not events.log("smoke").exists()


def test_description_keeps_the_last_word_on_each_name():
    told = [Event("table", "t", "reused"), Event("table", "t", "recomputed", "stale")]
    assert events.describe(told) == ["tables recomputed: t (stale)"]
