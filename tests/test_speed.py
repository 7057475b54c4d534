"""The fast network equals the plain one, the settings that save time or memory change no result."""

import json
import random
import sys

import pytest
import torch

from model import coded, potential_gradient, squared_distances
from network import Config, Network
from tests import bench
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


@pytest.mark.parametrize("chunk", [1, 3, 1000])
@pytest.mark.parametrize("recompute", [False, True])
def test_chunks_and_recomputing_change_nothing(chunk, recompute, monkeypatch):
    config, *size = drawn(3)
    network, reference = trained(config), Reference(config)
    reference.load_state_dict(network.state_dict())
    activations = config.patch_size**2 * config.field_ratio * config.field_width  # of a token
    monkeypatch.setattr("network.CHUNK", chunk * activations)
    network.recompute = recompute
    assert_equal(outcome(network, size), outcome(reference, size))


def test_the_network_compiles_as_one_graph():
    config, B, h, w = drawn(3)
    network = trained(config)
    x, t = torch.randn(B, config.dims, h * config.patch_size, w * config.patch_size), torch.rand(B)
    features = network.encode(x[:, :3])
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x, t, features), network(x, t, features), atol=1e-5)


def test_recomputing_keeps_much_less_for_the_backward_pass():
    config = Config(5, patch_size=16, hidden=64, depth=1, field_depth=2, field_width=64, field_ratio=2)
    whole, less = (
        bench.counted(config, 64, recompute=recompute)["GB kept for the backward pass, float32"]
        for recompute in (False, True)
    )
    assert less < 0.5 * whole


def test_the_loss_never_waits_for_the_device():
    """On the meta device there are no values, so reading one would raise."""
    assert bench.counted(Config(5), 32)["TFLOP, training step"] > 0


@pytest.mark.parametrize(("dims", "count"), [(3, 171), (19, 171)])
def test_distances_are_those_of_direct_differences(dims, count):
    mu = coded(count, dims)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(20, count, dims, generator=generator)
    x = (mu + noise * 10 ** torch.linspace(-6, 2, 20)[:, None, None]).flatten(0, 1)  # near and far
    exact = (x.double()[:, None] - mu.double()).square().sum(-1)
    with torch.autocast("cpu", torch.bfloat16):
        d, nearest = squared_distances(x, mu)
    assert ((d - exact).abs() / (exact + 1e-2)).max() < 2e-4
    own = d.gather(1, nearest), exact.gather(1, nearest)
    assert torch.allclose(own[0].double(), own[1], rtol=1e-5, atol=0)
    assert nearest[:, 0].equal(exact.argmin(1))


def test_phi_is_exact_where_the_probability_of_the_label_is_no_float():
    mu = coded(50, 10)
    y = torch.arange(50).roll(7)
    exact = potential_gradient(mu.double(), y, mu.double(), 1e-2, 0.01)
    phi, grad = potential_gradient(mu, y, mu, 1e-2, 0.01)
    assert phi.min() > 200
    assert torch.allclose(phi.double(), exact[0], rtol=1e-5)
    assert torch.allclose(grad.double(), exact[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("section", bench.SECTIONS)
def test_the_bench_runs(section, tmp_path, capsys):
    if section in ("network", "potential") and sys.platform != "linux":
        pytest.skip("peak memory is read from /proc")
    facts = bench.main([section, "--tiny", "--repeats", "1", "--json", str(tmp_path / "bench.json")])
    assert json.loads((tmp_path / "bench.json").read_text()) == facts
    assert facts[section]
    assert section in capsys.readouterr().out


def test_the_bench_names_its_sections(capsys):
    with pytest.raises(SystemExit):
        bench.main(["netwrok"])
    assert "no section netwrok; expected network, training, potential" in capsys.readouterr().err
