"""The fast network equals the plain one, the settings that save time or memory change no result."""

import random

import pytest
import torch

from network import Config, Network
from tests.reference import Reference


def drawn(seed: int) -> tuple[Config, int, int, int]:
    """A random small network and batch, height and width in patches."""
    rng = random.Random(seed)
    heads = rng.choice([1, 2, 3])
    config = Config(
        num_classes=5, dims=rng.choice([3, 5, 16]), patch_size=rng.choice([2, 4, 8]), heads=heads,
        hidden=heads * rng.choice([8, 12]), depth=rng.choice([1, 2, 3]), field_depth=rng.choice([1, 2]),
        field_width=rng.choice([8, 12]), field_ratio=rng.choice([1, 2, 3]), conv_width=rng.choice([0, 8]),
    )  # fmt: skip
    return config, rng.choice([1, 2]), rng.randint(1, 5), rng.randint(2, 6)


def outcome(network: Network, size: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    """Velocity and all gradients, from inputs that depend on the size alone."""
    generator = torch.Generator().manual_seed(1)
    B, P, dims = size[0], network.config.patch_size, network.config.dims
    H, W = size[1] * P, size[2] * P
    image = torch.rand(B, 3, H, W, generator=generator) * 2 - 1
    x = torch.randn(B, dims, H, W, generator=generator, requires_grad=True)
    wanted = torch.randn(B, dims, H, W, generator=generator)
    velocity = network(x, torch.rand(B, generator=generator), network.encode(image))
    network.zero_grad()
    (velocity * wanted).mean().backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return {"velocity": velocity.detach(), "x": x.grad} | gradients


def trained(config: Config) -> Network:
    """A network whose every part matters: what starts at zero is drawn."""
    torch.manual_seed(0)
    network = Network(config)
    for name, p in network.named_parameters():
        torch.nn.init.normal_(p, mean=float("norm" in name), std=0.2)
    return network


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        scale = theirs[name].abs().max().clamp_min(1e-3)
        assert ((ours[name] - theirs[name]).abs().max() / scale).item() < 1e-5, name


@pytest.mark.parametrize("seed", range(8))
def test_velocity_and_gradients_are_the_plain_transcription_s(seed):
    config, *size = drawn(seed)
    network, reference = trained(config), Reference(config)
    reference.load_state_dict(network.state_dict())
    assert_equal(outcome(network, size), outcome(reference, size))
