"""Methods and profiles of your own, without a change of this package.

A module that calls `register` and `register_profile`, named in the environment variable
`GPVAE_PLUGINS` (several are separated by commas), is imported with `gpvae`: by the command line, by
its worker processes and by the notebooks. Rows of a method from outside say by which source they
were made, and are stale once it changes (that module alone, not what it imports); all other rows
stay.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING

from gpvae.errors import ConfigError
from gpvae.profiles import PROFILES, Profile

if TYPE_CHECKING:
    from gpvae.vae import VAE

METHOD_HASHES: dict[str, str] = {}  # digests of the source of registered methods, by name


def register(name: str, model: type[VAE], label: str = "", colour: object = "0.4") -> None:
    """Make a method known as `model.encoder=NAME`, labelled and coloured in tables and figures.

    Args:
        name: letters, digits and underscores.
        model: a subclass of `gpvae.VAE` that is built as `model(shape, config.model)`. It sets
            `encoder_type`, a network whose `forward(x, generative)` returns a `gpvae.Posterior`.
        label: such as `Planar`; the name by default.
        colour: of matplotlib.

    Raises:
        ConfigError: the name is no identifier or that of another method, or the class has no
            source that can be read.
    """
    from gpvae.plots import COLOURS, MARKERS
    from gpvae.tables import LABELS
    from gpvae.training import MODELS

    if not name.isidentifier():
        raise ConfigError(f"a method is called {name!r}; expected letters, digits and underscores.")
    if name in MODELS and name not in METHOD_HASHES:
        raise ConfigError(f"the method {name!r} is one of gpvae's own; choose another name.")
    MODELS[name], LABELS[name], COLOURS[name] = model, label or name, colour
    MARKERS[name] = "*"
    METHOD_HASHES[name] = hashlib.sha256(_source(model).encode()).hexdigest()[:16]


def register_profile(profile: Profile) -> None:
    """Make a profile known by its name to `gpvae.get_profile`, the command line and the notebooks.

    Raises:
        ConfigError: the name has a '/', or belongs to another profile.
    """
    if "/" in profile.name or PROFILES.get(profile.name, profile) != profile:
        raise ConfigError(
            f"the profile {profile.name!r} cannot be added: expected a name without '/' that no "
            "other profile has."
        )
    PROFILES[profile.name] = profile


def load() -> None:
    """Import what `GPVAE_PLUGINS` names.

    Raises:
        ConfigError: a module that cannot be imported.
    """
    for name in filter(None, os.environ.get("GPVAE_PLUGINS", "").split(",")):
        try:
            import_module(name.strip())
        except Exception as error:  # whatever a module of somebody else does
            raise ConfigError(
                f"GPVAE_PLUGINS names {name.strip()!r}, which cannot be imported "
                f"({type(error).__name__}: {error}). Expected modules, separated by commas, in "
                "folders that PYTHONPATH names in full (notebooks run in another folder)."
            ) from error


def _source(model: type) -> str:
    """Source of the module in which a class was defined; of the class alone in a notebook.

    Raises:
        ConfigError: there is none, so that a change of it could not be seen.
    """
    for where in (sys.modules.get(model.__module__), model):
        try:
            return inspect.getsource(where)
        except (OSError, TypeError):
            continue
    raise ConfigError(
        f"the source of the method's class {model.__qualname__} cannot be read, so that its rows "
        "could not be told from those of a later version. Put the class into a module."
    )
