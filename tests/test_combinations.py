"""Every encoder with every output distribution and network: it trains, and it can be measured."""

from __future__ import annotations

import pytest
import torch

import gpvae
from gpvae import training
from gpvae.config import NETWORKS, OUTPUTS

SHAPE = (2, 6, 5)
COUNTS = {
    "savae": ("model.savae.steps", (1, 8)),
    "iaf": ("model.flow.steps", (1, 8)),
    "hf": ("model.flow.steps", (1, 8)),
    "me": ("model.mixture.components", (2, 5)),
    "rme": ("model.mixture.components", (2, 5)),
    "vlae": ("model.vlae.steps", (1, 8)),
}


def configuration(encoder, **options):
    return gpvae.RunConfig().override(
        **{
            "model.encoder": encoder,
            "model.latent_dim": 3,
            "model.hidden": (7,),
            "model.activation": "tanh",  # so few rectified units may all be dead
            "model.channels": (3,),
            "model.gp.features": 4,
            "model.flow.hidden": 6,
            "model.flow.context": 4,
            "model.levels": 17,
            **options,
        }
    )


def pixels(output):
    x = torch.randint(0, 17, (4, *SHAPE), generator=torch.Generator().manual_seed(0)) / 16
    return x.round() if output == "bernoulli" else x


def check(config):
    model = gpvae.build_model(config, SHAPE).train()
    generator = torch.Generator().manual_seed(0)
    x = pixels(config.model.output)
    with torch.no_grad():  # away from the symmetric start, at which some gradients vanish
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    for epoch in range(40):  # through all phases, to the one in which everything is trained
        model.start_epoch(epoch, 40, model.state_dict())
    sum(model.loss_terms(x, 100, generator).values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all() and parameter.grad.any(), name
    model.eval()
    assert torch.isfinite(gpvae.log_likelihood(model, x, 3).value).all()


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("encoder", sorted(training.MODELS))
def test_every_parameter_gets_a_gradient_and_every_image_a_number(encoder, output, network):
    check(configuration(encoder, **{"model.output": output, "model.network": network}))


@pytest.mark.parametrize(
    ("encoder", "key", "count"),
    [(encoder, key, count) for encoder, (key, counts) in COUNTS.items() for count in counts],
)
def test_few_and_many_steps_flows_and_components(encoder, key, count):
    check(configuration(encoder, **{key: count, "model.output": "bernoulli"}))
