"""Selective refinement: spend a budget of SVI steps on the images that a score ranks hardest.

A model that knows where its posterior is poor could refine just there. `study` refines every image
once, records the bound on the way, and reads off what each policy would have reached at each
budget: no refinement, the same steps for all (uniform), some steps for a random subset, for the
images with the largest score, with the largest -ELBO, or with the largest gain (the oracle).

Selection and report use independent noise. Ranking by a noisy bound and reporting the same one
would count luck as gain, most of all for -ELBO and the oracle.

Costs count steps, each of which is 2 D (from 16 to 50) passes of one image through the decoder and
back. Measuring the bound, to keep the best state so far and to rank by -ELBO, is not counted.

Dimensions: N images, D latent, R recorded step counts. Bounds are in nats per image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from gpvae.errors import ConfigError, DataError, unknown
from gpvae.posteriors import DiagonalGaussian
from gpvae.search import (
    BestSoFar,
    SearchOptions,
    SearchState,
    advance,
    decoded_at_once,
    in_blocks,
)
from gpvae.svi import gaussians, measured
from gpvae.vae import VAE, Generative

REPORT, SELECT = 1, 2  # of the noise that reports and of that which ranks: added to the seed


@dataclass(frozen=True)
class Curve:
    """Mean bound against mean cost.

    Args:
        cost: SVI steps per image, averaged over all images, [K].
        bound: mean ELBO, nats per image, [K].
        stderr: of the mean gain over no refinement, over images, [K].
    """

    cost: Tensor
    bound: Tensor
    stderr: Tensor

    def area(self) -> float:
        """Mean gain over the curve's budgets, in nats: 0 for no refinement."""
        gain = self.bound - self.bound[0]
        return float(torch.trapezoid(gain, self.cost) / (self.cost[-1] - self.cost[0]))


@dataclass(frozen=True)
class Study:
    """What refinement does to each of N images, and who should get it.

    Args:
        steps: recorded numbers of steps, rising from 0, [R].
        bounds: ELBO of each image after so many steps, [R, N]: what is reported.
        ranking_bounds: the same on other noise, [R, N]: what -ELBO and the oracle rank by.
        scores: rankings to try, [N]; larger means refined first.
    """

    steps: Tensor
    bounds: Tensor
    ranking_bounds: Tensor
    scores: dict[str, Tensor]

    @property
    def policies(self) -> list[str]:
        """Names that `curve` knows."""
        return ["none", "uniform", "random", *self.scores, "-ELBO", "oracle"]

    def ranking(self, policy: str, each: int = -1) -> Tensor:
        """The score by which a selecting policy ranks images, [N]."""
        if policy == "-ELBO":
            return -self.ranking_bounds[0]
        if policy == "oracle":
            return self.ranking_bounds[each] - self.ranking_bounds[0]
        return self.scores[policy]

    def curve(self, policy: str, each: int = -1) -> Curve:
        """Mean bound against mean cost of one policy.

        Args:
            policy: one of `policies`. "random" is the exact expectation over subsets.
            each: index into `steps`: what a selected image gets; the last by default. As the
                first steps gain most, a small number is the better use of most budgets.

        Raises:
            ConfigError: unknown policy, or an index of no steps or of none that were recorded.
        """
        if policy not in self.policies:
            raise ConfigError(unknown("policy", policy, self.policies))
        if not -len(self.steps) < each < len(self.steps) or not self.steps[each]:
            raise ConfigError(
                f"each={each}; expected an index into the recorded steps, "
                f"{self.steps.long().tolist()}, of other than 0."
            )
        gains = (self.bounds - self.bounds[0])[: len(self.steps[:each]) + 1]
        n, start = gains.shape[1], self.bounds[0].mean()
        if policy in ("none", "uniform"):
            gains = gains if policy == "uniform" else torch.zeros_like(gains)
            cost = self.steps[: len(gains)]
            return Curve(cost, start + gains.mean(1), gains.std(1) / math.sqrt(n))
        share = torch.linspace(0, 1, n + 1, dtype=gains.dtype, device=gains.device)
        if policy == "random":
            total, square = share * gains[-1].mean(), share * gains[-1].square().mean()
        else:
            order = self.ranking(policy, each).argsort(descending=True, stable=True)
            ranked = torch.cat([gains.new_zeros(1), gains[-1][order]])
            total, square = ranked.cumsum(0) / n, ranked.square().cumsum(0) / n
        stderr = ((square - total**2).clamp_min(0) / max(1, n - 1)).sqrt()
        return Curve(share * self.steps[each], start + total, stderr)


def study(
    model: VAE,
    x: Tensor,
    scores: Mapping[str, Tensor],
    steps: int = 10,
    every: int = 1,
    options: SearchOptions | None = None,
    elbo_samples: int = 200,
) -> Study:
    """Refine all images from the encoder's Gaussian and record what each policy would gain.

    Args:
        model: any model; its Gaussian stand-in is where refinement starts and what "none" reports.
        x: images [N, C, H, W].
        scores: by name, [N]; larger means refined first.
        steps: the most SVI steps that an image gets.
        every: steps between two records.
        options: of the steps; their seed is that of all noise.
        elbo_samples: samples of each recorded bound.

    Raises:
        DataError: images that the model has no density of (`VAE.check_images`), or a score that is
            not one finite number for each.
        ConfigError: impossible numbers of steps.
    """
    model.check_images(x)
    for name, score in scores.items():
        _check_score(name, score, len(x))
    if not 1 <= every <= steps:
        raise ConfigError(f"steps={steps}, every={every}; expected 1 <= every <= steps.")
    options = options or SearchOptions()
    counts = sorted({*range(0, steps, every), steps})
    path = trajectory(model.generative, x, gaussians(model, x), counts, options)

    reported, ranking = (
        torch.stack([measured(model.generative, x, q, elbo_samples, seed).value for q in path])
        for seed in (options.seed + REPORT, options.seed + SELECT)
    )
    ranked_by = {name: score.to(reported) for name, score in scores.items()}
    return Study(torch.tensor(counts).to(reported), reported, ranking, ranked_by)


def selective_refinement(
    model: VAE,
    x: Tensor,
    score: Tensor,
    budget: int,
    steps: int = 4,
    options: SearchOptions | None = None,
) -> tuple[DiagonalGaussian, Tensor]:
    """Posteriors of all images after spending `budget` SVI steps on those with the largest score.

    The best state so far is kept after each step, as in `study`.

    Args:
        model: any model; its Gaussian stand-in is where refinement starts.
        x: images [N, C, H, W].
        score: [N], larger means harder.
        budget: steps to spend in total; `budget // steps` images are refined.
        steps: steps of each refined image.
        options: of the steps.

    Returns:
        Gaussians of all images, and the indices of the refined ones.

    Raises:
        DataError: images that the model has no density of (`VAE.check_images`), or a score that is
            not one finite number for each.
        ConfigError: no steps, or a negative budget.
    """
    model.check_images(x)
    _check_score("score", score, len(x))
    if steps < 1 or budget < 0:
        raise ConfigError(
            f"steps={steps}, budget={budget}; expected at least one step for a refined image, and "
            "a budget of 0 or more."
        )
    q = gaussians(model, x)
    order = score.argsort(descending=True, stable=True)
    chosen = order[: min(budget // steps, len(x))]
    if not len(chosen):
        return q, chosen
    path = trajectory(
        model.generative, x[chosen], q[chosen], range(steps + 1), options or SearchOptions()
    )
    mean, std = q.mean.clone(), q.std.clone()
    mean[chosen], std[chosen] = path[-1].mean, path[-1].std
    return DiagonalGaussian(mean, std), chosen


def trajectory(
    generative: Generative,
    x: Tensor,
    q: DiagonalGaussian,
    counts: Sequence[int],
    options: SearchOptions,
) -> list[DiagonalGaussian]:
    """The best Gaussians of all images so far, after each of the given numbers of steps.

    Without a stopping rule: every image takes all steps. `counts` rises from 0.
    """
    samples = decoded_at_once(options, generative.latent_dim)
    blocks = in_blocks(
        generative, x, samples, lambda i: _trajectory_block(generative, x[i], q[i], counts, options)
    )
    return [
        DiagonalGaussian(torch.cat([q.mean for q in part]), torch.cat([q.std for q in part]))
        for part in zip(*blocks, strict=True)
    ]


def _trajectory_block(
    generative: Generative,
    x: Tensor,
    q: DiagonalGaussian,
    counts: Sequence[int],
    options: SearchOptions,
) -> list[DiagonalGaussian]:
    best, state = BestSoFar(generative, x, q, options.seed), SearchState.at(q)
    generator = torch.Generator().manual_seed(options.seed)
    everyone = torch.arange(len(x), device=x.device)
    path = [q]
    for before, after in pairwise(counts):
        state, average, _ = advance(generative, x, state, options, after - before, generator)
        best.update(everyone, average)
        path.append(DiagonalGaussian(best.mean.clone(), best.std.clone()))
    return path


def _check_score(name: str, score: Tensor, count: int) -> None:
    if tuple(score.shape) != (count,):
        raise DataError(
            f"the score {name!r} has shape {tuple(score.shape)}; expected one number for each of "
            f"{count} images, ({count},)."
        )
    if bad := int((~torch.isfinite(score)).sum()):
        raise DataError(
            f"the score {name!r} is NaN or infinite for {bad} of {count} images, which cannot be "
            "ranked by it; leave them out, or give them a finite score."
        )
