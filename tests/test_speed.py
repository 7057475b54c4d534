"""The fast network equals the plain one, and the settings that save time or memory change no result."""

import json
import random
import sys

import pytest
import torch

from experiments import bench
from experiments.reference import Reference
from model import (
    ModelConfig,
    Network,
    coded_centroids,
    kronecker_centroids,
    potential_gradient,
    squared_distances,
)


def drawn(seed: int) -> tuple[ModelConfig, int, int, int]:
    """A random small network, a batch size, and the height and width of its images in patches."""
    rng = random.Random(seed)
    num_heads = rng.choice([1, 2, 3])
    config = ModelConfig(
        num_classes=5,
        num_heads=num_heads,
        encoding_dims=rng.choice([6, 8, 16]),
        patch_size=rng.choice([2, 4, 8]),
        hidden_size=num_heads * rng.choice([8, 12]),
        depth=rng.choice([1, 2, 3]),
        nerf_depth=rng.choice([1, 2]),
        nerf_width=rng.choice([8, 12]),
        nerf_mlp_ratio=rng.choice([1, 2, 3]),
        conv_width=rng.choice([8, 16]),
    )
    return config, rng.choice([1, 2]), rng.randint(1, 5), rng.randint(2, 6)


def outcome(network: Network, size: list[int]) -> dict[str, torch.Tensor]:
    """The velocity and all gradients, from inputs that depend on the size alone."""
    generator = torch.Generator().manual_seed(1)
    B, height, width = size
    P = network.config.patch_size
    dims = network.config.encoding_dims
    H = height * P
    W = width * P
    image = torch.rand(B, 3, H, W, generator=generator) * 2 - 1
    x = torch.randn(B, dims, H, W, generator=generator, requires_grad=True)
    wanted = torch.randn(B, dims, H, W, generator=generator)
    velocity = network(x, torch.rand(B, generator=generator), network.encode_image(image))
    network.zero_grad()
    (velocity * wanted).mean().backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return {"velocity": velocity.detach(), "x": x.grad} | gradients


def trained(config: ModelConfig) -> Network:
    """A network whose every part matters: what starts at zero is drawn at random."""
    torch.manual_seed(0)
    network = Network(config)
    for name, parameter in network.named_parameters():
        mean = 1.0 if "norm" in name else 0.0
        torch.nn.init.normal_(parameter, mean=mean, std=0.2)
    return network


def plain(network: Network) -> Reference:
    """The plain transcription with the same weights."""
    reference = Reference(network.config)
    reference.load_state_dict(network.state_dict())
    return reference


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        scale = theirs[name].abs().max().clamp_min(1e-3)
        assert ((ours[name] - theirs[name]).abs().max() / scale).item() < 1e-5, name


@pytest.mark.parametrize("seed", range(8))
def test_velocity_and_gradients_are_the_plain_transcription_s(seed):
    config, *size = drawn(seed)
    network = trained(config)
    assert_equal(outcome(network, size), outcome(plain(network), size))


def test_activation_checkpointing_changes_nothing():
    config, *size = drawn(3)
    network = trained(config)
    reference = plain(network)
    network.activation_checkpointing = True
    assert_equal(outcome(network, size), outcome(reference, size))


@pytest.mark.slow
def test_the_network_compiles_as_one_graph():
    config, B, h, w = drawn(3)
    network = trained(config)
    x = torch.randn(B, config.encoding_dims, h * config.patch_size, w * config.patch_size)
    t = torch.rand(B)
    features = network.encode_image(x[:, :3])
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x, t, features), network(x, t, features), atol=1e-5)


def test_activation_checkpointing_keeps_much_less_for_the_backward_pass():
    config = ModelConfig(
        5, patch_size=16, hidden_size=64, depth=1, nerf_depth=2, nerf_width=64, nerf_mlp_ratio=2
    )
    kept = "GB kept for the backward pass, float32"
    whole = bench.counted(config, 64)[kept]
    less = bench.counted(config, 64, checkpointing=True)[kept]
    assert less < 0.5 * whole


def test_the_loss_never_waits_for_the_device():
    """On the meta device there are no values, so reading one would raise."""
    assert bench.counted(ModelConfig(5), 32)["TFLOP, training step"] > 0


@pytest.mark.parametrize(("encode", "dims"), [(kronecker_centroids, 3), (coded_centroids, 11)])
def test_distances_are_those_of_direct_differences(encode, dims, count=171):
    mu = encode(count, dims)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(20, count, dims, generator=generator)
    x = (mu + noise * 10 ** torch.linspace(-6, 2, 20)[:, None, None]).flatten(0, 1)  # near and far
    exact = (x.double() - mu.double()[:, None]).square().sum(-1)  # (N, M)
    with torch.autocast("cpu", torch.bfloat16):
        d, nearest = squared_distances(x, mu)
    assert ((d - exact).abs() / (exact + 1e-2)).max() < 2e-4
    own = d.gather(0, nearest).double()
    assert torch.allclose(own, exact.gather(0, nearest), rtol=1e-5, atol=0)
    assert nearest[0].equal(exact.argmin(0))


def test_phi_is_exact_where_the_probability_of_the_label_is_no_float():
    mu = coded_centroids(50, 10)
    y = torch.arange(50).roll(7)
    exact_phi, exact_grad = potential_gradient(mu.double(), y, mu.double(), 1e-2, 0.01)
    phi, grad = potential_gradient(mu, y, mu, 1e-2, 0.01)
    assert phi.min() > 200
    assert torch.allclose(phi.double(), exact_phi, rtol=1e-5)
    assert torch.allclose(grad.double(), exact_grad, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("section", bench.SECTIONS)
def test_the_bench_runs(section, tmp_path, capsys):
    if section in ("network", "potential") and sys.platform != "linux":
        pytest.skip("peak memory is read from /proc")
    report = tmp_path / "bench.json"
    facts = bench.main([section, "--tiny", "--repeats", "1", "--report", str(report)])
    assert json.loads(report.read_text()) == facts
    assert facts[section]
    assert section in capsys.readouterr().out


def test_the_bench_names_its_sections(capsys):
    with pytest.raises(SystemExit):
        bench.main(["netwrok"])
    message = capsys.readouterr().err
    assert "netwrok" in message
    assert all(section in message for section in bench.SECTIONS)


def test_the_sections_are_all_functions_of_the_bench():
    names = {name.removeprefix("bench_") for name in vars(bench) if name.startswith("bench_")}
    assert names == set(bench.SECTIONS)
