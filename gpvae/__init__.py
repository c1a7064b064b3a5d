"""gpvae: Gaussian-process random encoders for variational autoencoders.

Where each idea of the paper lives:

| idea                                         | code                        | notebook |
|----------------------------------------------|-----------------------------|----------|
| VAE and its bound                            | `VAE`, `DiagonalGaussian`   | 01, 02   |
| random mean and standard deviation functions | `GPVAE`, `gpvae.gp`         | 01, 02   |
| posterior over functions, expected KL        | `RandomFunctionPosterior`   | 01       |
| E log h^2 in closed form                     | `expected_log_square`       | 01       |
| training objective                           | `train`, `VAE.loss_terms`   | 02       |
| log p(x) by importance weighting             | `log_likelihood`            | 03, 04   |
| uncertainty scores and measured gaps         | `Posterior.scores`, `svi`   | 03       |
| benchmark rows and tables                    | `experiment`, `results`     | 04       |
| rivals: refinement, Laplace                  | `SAVAE`, `SVI`, `VLAE`      | 05       |
| rivals: flows                                | `IAFVAE`, `HouseholderVAE`  | 05       |
| rivals: mixtures                             | `MixtureVAE`, `RecursiveMixtureVAE` | 05 |
| gaps, AIS, selective refinement              | `gaps`, `ais`, `refine`     | 03       |
| scores against measured gaps                 | `difficulty`, `selective`   | 03       |
| one step, eager or captured; seeds at once   | `step`, `ensemble`          | -        |
| methods and profiles of your own             | `plugins`                   | -        |
| runs, sets of runs, verdicts                 | `experiment`, `sweep`, `findings` | 04, 06 |
| where random functions help                  | `regimes`                   | 06       |

Lower-case names are modules, imported when asked for: `gpvae.ais`, `gpvae.refine`.
"""

from gpvae import plugins
from gpvae.config import (
    DataConfig,
    EvaluationConfig,
    GPConfig,
    ModelConfig,
    RunConfig,
    TrainingConfig,
)
from gpvae.errors import GPVAEError
from gpvae.profiles import Profile, get_profile

_LAZY = {
    "DiagonalGaussian": "posteriors",
    "Estimate": "evaluate",
    "GPVAE": "gp",
    "HouseholderVAE": "householder",
    "IAFVAE": "iaf",
    "Images": "data",
    "MixtureVAE": "mixtures",
    "Posterior": "posteriors",
    "RandomFunctionPosterior": "posteriors",
    "RecursiveMixtureVAE": "mixtures",
    "SAVAE": "savae",
    "SVI": "svi",
    "VAE": "vae",
    "VLAE": "vlae",
    "binarise": "data",
    "build_model": "training",
    "dawsn": "special",
    "decompose": "gaps",
    "elbo": "evaluate",
    "expected_log_square": "special",
    "from_images": "data",
    "load_dataset": "data",
    "load_model": "training",
    "log_likelihood": "evaluate",
    "optimise_posterior": "svi",
    "train": "training",
}

__all__ = [
    "DataConfig",
    "EvaluationConfig",
    "GPConfig",
    "GPVAEError",
    "ModelConfig",
    "Profile",
    "RunConfig",
    "TrainingConfig",
    "get_profile",
    *_LAZY,
]


def __getattr__(name: str) -> object:
    """Import what needs torch only when it is asked for, so that the command line starts fast."""
    from importlib import import_module

    if name in _LAZY:
        return getattr(import_module(f"gpvae.{_LAZY[name]}"), name)
    if name in _modules():
        return import_module(f"gpvae.{name}")
    from gpvae.errors import unknown

    raise AttributeError(unknown("attribute of gpvae", name, __dir__()))


def __dir__() -> list[str]:
    return sorted({*__all__, *_modules()})


def _modules() -> set[str]:
    from pkgutil import iter_modules

    return {module.name for module in iter_modules(__path__) if not module.name.startswith("_")}


plugins.load()
