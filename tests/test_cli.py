"""The command line: exit codes, and messages without tracebacks."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from gpvae import arguments, cli, disk, reproduce
from gpvae.errors import CheckpointError, ConfigError, DataError, NotebookError, TrainingError


def process(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess:
    """Run `python -m gpvae` or the given code in a process of its own."""
    program = ["-m", "gpvae"] if code is None else ["-c", code]
    command = [sys.executable, *program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture
def outcome(monkeypatch):
    """Make `gpvae reproduce` raise or return what the test says, and note its arguments."""
    calls = []

    def arrange(result):
        def stand_in(profile, **options):
            calls.append({"profile": profile, **options})
            if isinstance(result, BaseException):
                raise result
            return SimpleNamespace(exit_code=result)

        monkeypatch.setattr(reproduce, "reproduce", stand_in)
        return calls

    return arrange


def test_no_command_prints_help(capsys):
    assert cli.main([]) == 2
    assert "reproduce" in capsys.readouterr().out


def test_version():
    done = process("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("gpvae ")


def test_unknown_profile_is_misuse_without_a_traceback():
    done = process("reproduce", "--profile", "smok")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("gpvae: error: unknown profile 'smok'. Did you mean 'smoke'?")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["reproduse"],
        ["reproduce", "--prof", "smoke"],
        ["reproduce", "-p", "seeds"],
        ["reproduce", "-p", "a b=3"],
        ["reproduce", "-p", "a=1", "a=2"],
        ["data", "fetch", "digits", "--rep"],
        ["bench", "--threads", "0"],
        ["train", "--set", "training.device=cpu:x"],
        ["reproduce", "--cell-timeout", "soon"],
        ["reproduce", "--cell-timeout", "-5"],
        ["reproduce", "--only"],
    ],
)
def test_misuse(arguments, capsys):
    try:
        code = cli.main(arguments)
    except SystemExit as exit:  # argparse leaves this way
        code = exit.code
    assert code == 2
    assert "error: " in capsys.readouterr().err


def test_arguments_reach_the_runner(outcome):
    calls = outcome(0)
    line = "--profile smoke --only 01,2 03 --only 4 --force -p a=3 b=[1,'x'] -p c=text"
    assert cli.main(["reproduce", *line.split(), "--cell-timeout", "5"]) == 0
    assert calls == [
        {
            "profile": "smoke",
            "only": ["01,2", "03", "4"],
            "force": True,
            "parameters": {"a": 3, "b": [1, "x"], "c": "text"},
            "cell_timeout": 5.0,
        }
    ]


def test_defaults(outcome):
    calls = outcome(0)
    cli.main(["reproduce"])
    assert calls[0] == {
        "profile": "digits",
        "only": None,
        "force": False,
        "parameters": {},
        "cell_timeout": reproduce.CELL_TIMEOUT,
    }


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("a=1", 1), ("a=None", None), ("a=1e-3", 1e-3), ("a=x=y", "x=y"), ("a=", "")),
        *(("a='1'", "1"), ("a=true", True), ("a=False", False), ("a=null", None), ("a=tru", "tru")),
    ],
)
def test_parameter_values(text, value):
    assert arguments.assignment(text) == ("a", value)


@pytest.mark.parametrize(
    ("result", "code"),
    [
        (0, 0),
        (1, 1),
        (ConfigError("why"), 2),
        (DataError("why"), 2),
        (CheckpointError("why"), 2),
        (NotebookError("why"), 2),
        (disk.RunError("why"), 1),
        (TrainingError("why"), 1),
        (OSError(errno.ENOSPC, "why", "/some/file"), 1),
        (PermissionError(errno.EACCES, "why", "/some/file"), 1),
    ],
)
def test_exit_codes(outcome, capsys, result, code):
    outcome(result)
    assert cli.main(["reproduce"]) == code
    errors = capsys.readouterr().err
    assert errors.count("\n") == (1 if isinstance(result, Exception) else 0)
    assert not errors or (errors.startswith("gpvae: error: ") and "why" in errors)


def test_interruption(outcome, capsys):
    outcome(KeyboardInterrupt())
    assert cli.main(["reproduce"]) == 130
    assert "finished results are kept" in capsys.readouterr().err


@pytest.mark.parametrize("defect", [ValueError("a defect"), OSError(errno.ENOENT, "a defect")])
def test_a_defect_keeps_its_traceback(outcome, defect):
    outcome(defect)
    with pytest.raises(type(defect), match="a defect"):
        cli.main(["reproduce"])


def test_closed_pipe_is_no_traceback():
    code = (
        "import sys\n"
        "from gpvae import cli, reproduce\n"
        "reproduce.run = lambda args: print('x') or 0\n"
        "sys.exit(cli.main(['reproduce']))"
    )
    # Buffered, as in a shell's pipe: the line leaves at the end only.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-c", code],
        stdout=writing,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
        timeout=60,
    )
    os.close(writing)
    assert done.stderr == ""
    assert done.returncode == 1


def test_parser_loads_nothing_heavy():
    heavy = {"torch", "numpy", "matplotlib", "papermill", "nbformat", "jupyter_client", "IPython"}
    code = (
        f"import sys; from gpvae import cli; cli.build_parser(); print({heavy} & set(sys.modules))"
    )
    assert process(code=code).stdout == "set()\n"
