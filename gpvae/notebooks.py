"""Which notebooks there are, which of them are wanted, and which parameters they take."""

from __future__ import annotations

import ast
import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpvae.errors import NotebookError, unknown

ALWAYS_PASSED = {"profile": "--profile", "fresh_since": "--force"}


@dataclass(frozen=True)
class Notebook:
    """One numbered notebook: `parameters` and `cell` are those of its parameters cell."""

    path: Path
    cells: int
    cell: int
    parameters: frozenset[str]

    @property
    def name(self) -> str:
        """File name without its extension, such as `02_training`."""
        return self.path.stem


def find_notebooks(folder: Path) -> list[Notebook]:
    """The notebooks `NN_name.ipynb` of a folder, in order."""
    files = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not files:
        raise NotebookError(
            f"no notebooks in {folder}. An installation from a wheel does not carry them: clone "
            "the repository, run `pip install -e .` in it, and try again."
        )
    return [_read(path) for path in files]


def _read(path: Path) -> Notebook:
    """Parse one notebook and check its parameters cell."""
    import nbformat

    try:
        with quiet():
            cells = nbformat.read(path, as_version=4).cells
    except Exception as error:  # nbformat raises whatever the damage leads to
        raise NotebookError(f"{path} is not a notebook: {error}") from error
    tagged = [i for i, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1:
        raise NotebookError(
            f"{path} has {len(tagged)} cells tagged `parameters`; it needs exactly one."
        )
    names = _assigned(cells[tagged[0]].source, path)
    missing = [name for name in ALWAYS_PASSED if name not in names]
    if missing:
        raise NotebookError(f"the parameters cell of {path} lacks {' and '.join(missing)}.")
    return Notebook(path, len(cells), tagged[0], names)


def _assigned(source: str, path: Path) -> frozenset[str]:
    """Names that a parameters cell assigns."""
    try:
        statements = ast.parse(source).body
    except SyntaxError as error:
        raise NotebookError(f"the parameters cell of {path} is not Python: {error}") from error
    targets: list[ast.expr] = []
    for statement in statements:
        if isinstance(statement, ast.Assign):
            targets += statement.targets
        elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
            targets.append(statement.target)
    return frozenset(target.id for target in targets if isinstance(target, ast.Name))


def select(notebooks: list[Notebook], only: str | Sequence[str] | None) -> list[Notebook]:
    """The notebooks that `only` names by number or by the beginning of their name."""
    if only is None:
        return notebooks
    given = [only] if isinstance(only, str) else only
    wanted = [token.strip() for item in given for token in item.split(",") if token.strip()]
    if not wanted:
        raise NotebookError("the selection names no notebook.")
    for token in wanted:
        if not any(_matches(notebook.name, token) for notebook in notebooks):
            known = [notebook.name for notebook in notebooks]
            raise NotebookError(unknown("notebook", token, known))
    return [each for each in notebooks if any(_matches(each.name, token) for token in wanted)]


def _matches(name: str, token: str) -> bool:
    """Whether "2", "02", "02_tr" or "train" means `02_training`."""
    number, _, subject = name.partition("_")
    if token.isdecimal():
        return int(token) == int(number)
    return name.startswith(token) or subject.startswith(token)


def check_parameters(notebooks: list[Notebook], given: Iterable[str]) -> None:
    """Refuse a parameter that some of the notebooks do not have."""
    known = frozenset().union(*(notebook.parameters for notebook in notebooks))
    for name in given:
        if name in ALWAYS_PASSED:
            raise NotebookError(f"set {name} with {ALWAYS_PASSED[name]}, not as a parameter.")
        if name not in known:
            raise NotebookError(unknown("parameter", name, known))
        lacking = [each.name for each in notebooks if name not in each.parameters]
        if lacking:
            having = " ".join(each.name[:2] for each in notebooks if name in each.parameters)
            raise NotebookError(
                f"parameter {name!r} does not exist in {', '.join(lacking)}. "
                f"To run only the notebooks that have it: --only {having}"
            )


def plain(value: Any) -> Any:
    """The value, made of what papermill can write as a literal; it would turn others to text."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: plain(item) for key, item in value.items()}
    raise NotebookError(
        f"{value!r} cannot be passed to a notebook: use numbers, text, True, False, None, and "
        "lists or dictionaries of them."
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the log lines and warnings of papermill and nbclient out of the user's sight."""
    logger, handler = logging.getLogger("papermill"), logging.NullHandler()
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
