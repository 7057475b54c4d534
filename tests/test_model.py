"""Encoding, potential, network, loss and sampler against closed forms and independent computations."""

import json
import math
import resource
import sys
from dataclasses import asdict, fields

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import data
import model as method
from experiments.baselines import (
    Annealed,
    End,
    Inverse,
    Leaky,
    Linear,
    Noise,
    Sqrt,
    golden_centroids,
)
from flowseg_tools.settings import PRESETS
from model import (
    CheckpointError,
    CheckpointInfo,
    FlowSeg,
    ModelConfig,
    Network,
    coded_centroids,
    image_of_patches,
    kronecker_centroids,
    least_spacing,
    pixels_of_patches,
    potential_gradient,
    squared_distances,
    tensor_faults,
    write_tensors,
)
from train import resolve

SMALL = {  # with the flow of the paper
    "hidden_size": 32,
    "depth": 1,
    "num_heads": 2,
    "nerf_depth": 1,
    "nerf_width": 8,
    "conv_width": 8,
    "patch_size": 4,
    "encoding": "kronecker",
    "encoding_dims": 3,
    "eps": 0.3,
    "tau": 1.0,
    "phi_weight": 1.0,
}
# The default's flow.
CODED = {"encoding": "coded", "encoding_dims": 8, "eps": 3.0, "tau": 0.03, "phi_weight": 16.0}


def small(num_classes=5, kind=FlowSeg, **changes):
    torch.manual_seed(0)
    return kind(ModelConfig(num_classes, **SMALL | changes))


def drawn(model):
    """The same model with a random end instead of one of zeros."""
    generator = torch.Generator().manual_seed(0)
    network = model.network
    for layer in (network.head, network.token_to_velocity, *network.image_to_velocity):
        torch.nn.init.normal_(layer.weight, std=0.3, generator=generator)
    return model


def end(model, x, t, image):
    """x1_hat, the end that the network aims at."""
    return x + (1 - t)[:, None, None, None] * model.velocity(x, t, image)


def blind(network):
    """Cut the network off from what the image path says."""
    layers = [network.image_to_token, network.image_to_pixel, *network.image_to_velocity]
    if network.config.tokens_of == "image":
        layers.append(network.patch_embed)
    for layer in layers:
        torch.nn.init.zeros_(layer.weight)


def batch(num_classes=5, size=16, count=2):
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(count, 3, size, size, generator=generator) * 2 - 1
    return image, torch.randint(0, num_classes, (count, size, size), generator=generator)


def train_steps(model, image, labels, steps, lr=3e-3):
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for step in range(steps):
        loss, _ = model.loss(image, labels, torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


# ---------------------------------------------------------------- encoding


@pytest.mark.parametrize(
    ("n", "spacing"), [(11, 0.855), (19, 0.590), (59, 0.288), (150, 0.154), (171, 0.153)]
)
def test_kronecker_spacing_is_the_published_table(n, spacing):
    assert torch.pdist(kronecker_centroids(n)).min().item() == pytest.approx(spacing, abs=6e-4)


@pytest.mark.parametrize(
    ("n", "spacing"), [(11, 0.692), (19, 0.641), (59, 0.416), (150, 0.226), (171, 0.224)]
)
def test_golden_spacing_is_the_published_table(n, spacing):
    assert torch.pdist(golden_centroids(n)).min().item() == pytest.approx(spacing, abs=6e-4)


@pytest.mark.parametrize(("dims", "spacing"), [(3, 0.154), (4, 0.299), (8, 0.938), (16, 1.546)])
def test_more_dimensions_give_more_room(dims, spacing):
    assert torch.pdist(kronecker_centroids(150, dims)).min().item() == pytest.approx(spacing, abs=6e-4)


@pytest.mark.parametrize(
    ("n", "dims", "hamming"),
    [(2, 0, 16), (11, 0, 8), (17, 0, 8), (32, 0, 8), (33, 0, 6), (128, 0, 6), (255, 0, 5), (16, 11, 4)],
)
def test_code_words_have_the_distances_of_the_known_codes(n, dims, hamming):
    model = FlowSeg(ModelConfig(n, **SMALL | {"encoding": "coded", "encoding_dims": dims}))
    words = model.centroids[:, 3:]
    assert words.shape == (n, 16 if dims == 0 else 8)
    assert set(words.unique().tolist()) == {-1.0, 1.0}
    assert torch.pdist(words, p=1).min().item() == 2 * hamming


@pytest.mark.parametrize("n", [11, 14, 16])
def test_up_to_16_classes_have_orthogonal_words_and_so_no_two_opposite_ones(n):
    words = coded_centroids(n, 19)[:, 3:]
    assert torch.equal(words @ words.T, 16 * torch.eye(n))


@pytest.mark.parametrize(
    ("n", "dims"),
    [(2, 4), (2, 19), (11, 7), (11, 19), (16, 10), (150, 11), (150, 19), (255, 11), (255, 19)],
)
def test_coded_centroids_begin_with_the_colours_and_lie_further_apart(n, dims):
    mu = coded_centroids(n, dims)
    assert mu.shape == (n, dims)
    assert torch.equal(mu[:, :3], kronecker_centroids(n))
    assert mu.abs().max() <= 1
    assert torch.pdist(mu).min() >= torch.pdist(kronecker_centroids(n, dims)).min()


def test_the_least_spacing_is_the_squared_distance_of_the_closest_pair():
    mu = kronecker_centroids(40, 5)
    pairs = (mu[:, None] - mu).square().sum(-1) + 100 * torch.eye(40)
    assert least_spacing(mu) == pytest.approx(pairs.min().item(), rel=1e-5)


def test_kronecker_formula_by_hand():
    raw = [[(k * math.sqrt(prime)) % 1 for prime in (2, 3, 5)] for k in range(1, 8)]
    for axis in range(3):
        column = [row[axis] for row in raw]
        expected = [2 * (value - min(column)) / (max(column) - min(column)) - 1 for value in column]
        assert kronecker_centroids(7)[:, axis].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("n", [2, 11, 150, 171, 255])
@pytest.mark.parametrize(("encoding", "dims"), [("kronecker", 3), ("kronecker", 16), ("coded", 11)])
def test_encoding_and_decoding_returns_the_labels(n, encoding, dims):
    model = small(n, encoding=encoding, encoding_dims=dims)
    labels = torch.arange(n).repeat(2)[: n + n % 2].view(1, 2, -1)
    x = model.centroids[labels].movedim(-1, 1)  # `encode_labels` reserves 255
    confidence, decoded = model.soft_assignment(x).max(1)
    assert decoded.equal(labels)
    assert (confidence > 1 / n).all()


@pytest.mark.parametrize("dims", [3, 16])
def test_every_centroid_of_many_is_nearest_to_itself(dims):
    mu = kronecker_centroids(1000, dims)
    d, nearest = squared_distances(mu, mu)
    assert nearest[0].equal(torch.arange(1000))
    assert d.diag().abs().max() == 0


# ---------------------------------------------------------------- potential


@pytest.mark.parametrize("tau", [1.0, 0.5])
@pytest.mark.parametrize("dims", [3, 8])
def test_potential_gradient_is_autograd_of_phi(tau, dims):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(50, dims, generator=generator, dtype=torch.float64, requires_grad=True)
    y = torch.randint(0, 20, (50,), generator=generator)
    mu = kronecker_centroids(20, dims).double()
    d = (x[:, None] - mu).square().sum(-1)
    expected = F.cross_entropy(-(d + 0.1).log() / tau, y, reduction="none")
    expected.sum().backward()
    phi, grad = potential_gradient(x.detach(), y, mu, 0.1, tau)
    assert torch.allclose(phi, expected, atol=1e-5)
    assert torch.allclose(grad, x.grad, atol=1e-5)


def test_potential_gradient_does_not_depend_on_chunks():
    x, y, mu = torch.randn(20_000, 3), torch.randint(0, 171, (20_000,)), kronecker_centroids(171)  # 27 chunks
    phi, grad = potential_gradient(x, y, mu, 1e-2)
    part = potential_gradient(x[15_000:], y[15_000:], mu, 1e-2)
    assert torch.allclose(phi[15_000:], part[0], rtol=1e-5, atol=1e-6)
    assert torch.allclose(grad[15_000:], part[1], rtol=1e-5, atol=1e-5)


def test_distances_do_not_cancel_near_a_centroid():
    mu = kronecker_centroids(150)
    x = mu + 1e-4
    phi, grad = potential_gradient(x, torch.arange(150), mu, 1e-6)
    exact = potential_gradient(x.double(), torch.arange(150), mu.double(), 1e-6)
    assert torch.allclose(grad.double(), exact[1], rtol=1e-2)  # the expanded square is off by more than 1
    assert torch.allclose(phi.double(), exact[0], rtol=1e-3, atol=1e-6)


@pytest.fixture(params=["none", "ieee", "tf32", "bf16"])
def precision(request):
    """What float32 products of a CPU may be computed in."""
    backend = torch.backends.mkldnn.matmul
    before = backend.fp32_precision
    backend.fp32_precision = request.param
    yield request.param
    backend.fp32_precision = before


def test_distances_and_potential_are_float32_whatever_products_may_be(precision, monkeypatch):
    """Also under autocast; the setting of PyTorch is left as it was."""
    backend = torch.backends.mkldnn.matmul
    seen = []
    real = method.without_autocast
    monkeypatch.setattr(
        method, "without_autocast", lambda device: seen.append(backend.fp32_precision) or real(device)
    )
    generator = torch.Generator().manual_seed(0)
    mu = coded_centroids(100, 11)
    y = torch.randint(0, 100, (500,), generator=generator)
    x = mu[y] + torch.randn(500, 11, generator=generator)
    exact = (x.double() - mu.double()[:, None]).square().sum(-1)
    phi, grad = potential_gradient(x.double(), y, mu.double(), 1.0, 0.5)
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        d, _ = squared_distances(x, mu)
        found = potential_gradient(x, y, mu, 1.0, 0.5)
    assert torch.allclose(d.double(), exact, rtol=1e-4)
    assert torch.allclose(found[0].double(), phi, rtol=1e-3, atol=1e-4)
    assert torch.allclose(found[1].double(), grad, rtol=1e-3, atol=1e-4)
    assert len(seen) > 1
    assert not set(seen) & {"tf32", "bf16"}
    assert backend.fp32_precision == precision
    with pytest.raises(KeyboardInterrupt), method.exact_float32(x.device):
        raise KeyboardInterrupt
    assert backend.fp32_precision == precision


# ---------------------------------------------------------------- network


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_build_and_large_ones_have_the_published_shape(preset):
    with torch.device("meta"):
        network = Network(resolve({"preset": preset}, [])[1])
    published = {"large": (1024, 16, 22, 2, 64, 16), "xl": (1152, 16, 26, 4, 64, 16)}
    c = network.config
    if preset in published:
        sizes = (c.hidden_size, c.num_heads, c.depth, c.nerf_depth, c.nerf_width, c.patch_size)
        assert sizes == published[preset]
    assert sum(p.numel() for p in network.parameters()) > 0


TOKENS_OF = pytest.mark.parametrize("tokens_of", ["image", "state"])


@TOKENS_OF
def test_image_reaches_the_network_and_zero_weights_cut_it_off(tokens_of):
    network = small(tokens_of=tokens_of).network
    torch.nn.init.normal_(network.head.weight)
    image, _ = batch()
    t = torch.zeros(2)
    x = torch.zeros(2, 3, 16, 16)

    def both():
        return network(x, t, network.encode_image(image)), network(x, t, network.encode_image(-image))

    assert not torch.allclose(*both())
    blind(network)
    assert torch.equal(*both())
    assert network.encode_image(image).velocity.abs().max() == 0


LEVELS = [
    "image_to_token", "image_to_pixel", "image_to_velocity.0", "image_to_velocity.1", "patch_embed",
]  # fmt: skip


@pytest.mark.parametrize("level", LEVELS)
def test_every_part_of_the_image_path_reaches_the_end(level):
    network = small().network
    for layer in (network.head, network.token_to_velocity):
        torch.nn.init.normal_(layer.weight)
    image, _ = batch()
    weight = network.get_submodule(level).weight
    blind(network)
    torch.nn.init.normal_(weight)
    u = [network(torch.zeros(2, 3, 16, 16), torch.zeros(2), network.encode_image(i)) for i in (image, -image)]
    assert not torch.allclose(*u)


@TOKENS_OF
def test_a_step_reads_the_state_in_the_tokens_or_in_the_pixels_alone(tokens_of):
    network = drawn(small(tokens_of=tokens_of)).network
    ran = []
    network.blocks[0].register_forward_hook(lambda *_: ran.append(True))
    image, _ = batch()
    features = network.encode_image(image)
    before = len(ran)
    states = [network(x, torch.full((2,), 0.5), features) for x in (image, -image)]
    assert not torch.allclose(*states)
    assert (before, len(ran)) == ((1, 1) if tokens_of == "image" else (0, 2))


def test_at_the_start_tokens_of_the_image_are_those_of_the_state():
    """There the state is the image, so both kinds of tokens give the same velocity."""
    theirs = drawn(small(tokens_of="state")).network
    ours = drawn(small(tokens_of="image")).network
    torch.nn.init.zeros_(theirs.token_to_velocity.weight)  # it is enlarged in one go, or level by level
    ours.load_state_dict(theirs.state_dict())
    image, _ = batch()
    velocities = [n(image, torch.zeros(2), n.encode_image(image)) for n in (ours, theirs)]
    assert torch.allclose(*velocities, atol=1e-5)
    assert velocities[0].abs().max() > 0.01


def test_the_velocity_of_the_image_is_a_pyramid_from_coarse_to_fine():
    network = drawn(small()).network
    image, _ = batch()
    levels = network.image_encoder(image)
    tokens = network.encode_image(image).tokens
    expected = torch.einsum("bld,cd->bcl", tokens, network.token_to_velocity.weight).view(2, 3, 4, 4)
    for stride, head in ((2, network.image_to_velocity[1]), (1, network.image_to_velocity[0])):
        level = levels[stride // 2]
        own = torch.einsum("bfhw,cf->bchw", level, head.weight)
        expected = F.interpolate(expected, (16 // stride, 16 // stride), mode="bilinear") + own
    assert torch.allclose(network.encode_image(image).velocity, expected, atol=1e-5)


def test_the_coarse_velocity_is_a_linear_map_of_the_last_tokens_bilinearly_enlarged():
    network = small(tokens_of="state").network
    blind(network)
    torch.nn.init.normal_(network.token_to_velocity.weight)  # the head is zero
    tokens = []
    network.blocks[-1].register_forward_hook(lambda block, inputs, output: tokens.append(output))
    image, _ = batch()
    u = network(image, torch.zeros(2), network.encode_image(image))
    coarse = torch.einsum("bld,cd->bcl", tokens[0], network.token_to_velocity.weight).view(2, 3, 4, 4)
    assert torch.allclose(u, F.interpolate(coarse, (16, 16), mode="bilinear"), atol=1e-5)


def test_the_image_encoder_has_a_level_for_every_stride_up_to_the_patch():
    for patch_size, last in ((1, 8), (2, 16), (4, 32), (8, 48), (16, 48)):
        encoder = small(patch_size=patch_size).network.image_encoder
        image = torch.rand(2, 3, 2 * patch_size, 3 * patch_size)
        levels = encoder(image)
        assert levels[0].shape == (2, 8, 2 * patch_size, 3 * patch_size)
        assert levels[-1].shape == (2, last, 2, 3)


# ---------------------------------------------------------------- layout in memory


@pytest.mark.parametrize(("size", "height", "width"), [(1, 3, 5), (2, 4, 6), (4, 8, 4), (8, 24, 16)])
def test_patches_are_those_of_unfold_and_come_back(size, height, width):
    x = torch.randn(2, 5, height, width)
    pixels = pixels_of_patches(x, size)
    expected = F.unfold(x, size, stride=size).view(2, 5, size * size, -1)  # (B, C, P P, L)
    assert torch.equal(pixels, expected.permute(0, 3, 2, 1))
    assert torch.equal(image_of_patches(pixels, height, width), x)
    assert torch.equal(pixels_of_patches(image_of_patches(pixels, height, width), size), pixels)


def test_the_layout_of_the_input_in_memory_changes_nothing():
    model = drawn(small(later_share=1.0))
    image, labels = batch(size=16)
    last = image.contiguous(memory_format=torch.channels_last)
    assert image.is_contiguous() and not last.is_contiguous()
    assert model.source(image).is_contiguous(memory_format=torch.channels_last)
    assert model.source(last).is_contiguous(memory_format=torch.channels_last)
    t = torch.tensor([0.0, 0.5])
    for x in (image, last):
        for i in (image, last):
            assert torch.allclose(model.velocity(x, t, i), model.velocity(image, t, image), atol=1e-5)
    assert torch.allclose(model.sample(last, 3), model.sample(image, 3), atol=1e-5)
    losses = [model.loss(i, labels, torch.Generator().manual_seed(0))[0].item() for i in (image, last)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_time_is_float32_under_autocast_and_tells_neighbours_apart():
    network = small().network
    with torch.autocast("cpu", torch.bfloat16):
        embedding = network.embed_time(torch.linspace(0, 1, 1001))
    assert embedding.dtype == torch.float32
    assert len(torch.unique(embedding, dim=0)) == 1001


@pytest.mark.parametrize("size", [(16, 24), (8, 4), (4, 4), (20, 36)])
def test_velocity_at_any_multiple_of_the_patch(size):
    model = small()
    image = torch.rand(2, 3, *size) * 2 - 1
    v = model.velocity(image, torch.tensor([0.0, 0.5]), image)
    assert v.shape == image.shape
    assert v.dtype == torch.float32


# ---------------------------------------------------------------- loss


@pytest.mark.parametrize("changes", [
    {}, {"objective": "vanilla"}, {"conv_width": 16}, {"encoding_dims": 8}, CODED,
    {"later_share": 0.0}, {"later_share": 1.0}, {"kind": Annealed}, {"kind": Linear}, {"kind": Sqrt},
    {"kind": Inverse}, {"kind": End}, {"kind": Noise}, {"kind": Leaky},
], ids=str)  # fmt: skip
def test_every_ablation_trains(changes):
    model = small(**changes)
    image, _ = batch()
    labels = (image[:, 0] > 0).long() + 2 * (image[:, 1] > 0).long()
    before = model.loss(image, labels, torch.Generator().manual_seed(0))[0].item()
    train_steps(model, image, labels, 40)
    after = model.loss(image, labels, torch.Generator().manual_seed(0))[0].item()
    assert after < 0.9 * before


def test_the_loss_changes_with_every_switch():
    image, labels = batch()
    losses = []
    for changes in (
        {},
        {"objective": "vanilla"},
        {"phi_weight": 2.0},
        {"eps": 0.5},
        {"tau": 0.5},
        {"later_share": 0.0},
        {"kind": Annealed},
        {"kind": Linear},
        {"kind": Sqrt},
        {"kind": Inverse},
        {"kind": End},
        {"kind": Noise},
        {"kind": Leaky},
        {"kind": Leaky, "objective": "vanilla"},
    ):
        model = drawn(small(**{"later_share": 1.0} | changes))
        losses.append(round(model.loss(image, labels, torch.Generator().manual_seed(0))[0].item(), 4))
    assert len(set(losses)) == len(losses)


def test_the_potential_stays_float32_under_autocast():
    """With a velocity of zero the network cannot differ, so the loss may not either."""
    model = small()
    image, labels = batch()
    exact = model.loss(image, labels, torch.Generator().manual_seed(0))[0]
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(image, labels, torch.Generator().manual_seed(0))[0]
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)


def test_reshaped_loss_at_the_start_is_the_paper_s():
    model = drawn(small(later_share=0.0))
    image, labels = batch()
    v = model.velocity(image, torch.zeros(2), image)
    v_gt = kronecker_centroids(5)[labels].movedim(-1, 1) - image
    x1_hat = (image + v).detach().movedim(1, -1).reshape(-1, 3).requires_grad_()
    logits = -((x1_hat[:, None] - kronecker_centroids(5)).square().sum(-1) + model.eps).log()
    F.cross_entropy(logits, labels.flatten(), reduction="sum").backward()
    target = v_gt - x1_hat.grad.view(2, 16, 16, 3).movedim(-1, 1)
    expected = (v - target).square().mean()
    assert model.loss(image, labels)[0].item() == pytest.approx(expected.item(), rel=1e-5)


FLOWS = [{}, CODED, {"phi_weight": 7.0, "eps": 0.02, "tau": 0.4}, {"objective": "vanilla"}]


def potential_by_autograd(model, x, labels):
    """Phi of the states x (B, dims, H, W), summed over the labelled pixels, as the paper writes it."""
    mu = model.centroids
    pairs = (mu[:, None] - mu).square().sum(-1)
    eps = model.config.eps * pairs[pairs > 0].min()  # in units of the closest pair
    d = (x.movedim(1, -1)[..., None, :] - mu).square().sum(-1)  # (B, H, W, N)
    logits = -(d + eps).log() / model.config.tau
    return F.cross_entropy(logits.movedim(-1, 1), labels, ignore_index=255, reduction="sum"), logits


@pytest.mark.parametrize("changes", FLOWS, ids=str)
def test_the_loss_has_the_gradient_of_the_squared_error_and_twice_the_weighted_potential(changes):
    """For every weight of the network: that of |x1_hat - mu[y]|^2 + 2 w Phi, by autograd."""
    model = drawn(small(later_share=0.0, **changes))
    image, labels = batch()
    labels[0, :5] = 255
    model.loss(image, labels)[0].backward()
    found = [p.grad.clone() for p in model.parameters()]

    model.zero_grad()
    x1_hat = end(model, model.source(image), torch.zeros(2), image)
    phi, _ = potential_by_autograd(model, x1_hat, labels)
    w = 0.0 if model.config.objective == "vanilla" else model.config.phi_weight
    mu_y = model.centroids[labels.where(labels != 255, 0)].movedim(-1, 1)
    squared = (x1_hat - mu_y).square().sum(1)[labels != 255].sum()
    whole = (squared + 2 * w * phi) / ((labels != 255).sum() * model.config.encoding_dims)
    whole.backward()
    for ours, p in zip(found, model.parameters(), strict=True):
        assert torch.allclose(ours, p.grad, rtol=1e-3, atol=1e-5 * float(p.grad.abs().max()) + 1e-7)


@pytest.mark.parametrize("changes", FLOWS, ids=str)
def test_diagnostics_are_those_of_the_first_state(changes):
    image, labels = batch()
    labels[0, :5] = 255
    model = drawn(small(later_share=1.0, **changes))
    _, stats = model.loss(image, labels)
    assert not any(value.requires_grad for value in stats.values())
    count = (labels != 255).sum().item()
    x1_hat = model.sample(image, 1).requires_grad_()
    phi, _ = potential_by_autograd(model, x1_hat, labels)
    phi.backward()
    mu_y = model.centroids[labels.where(labels != 255, 0)].movedim(-1, 1)
    error = (x1_hat - mu_y).square().mean(1)[labels != 255].mean()
    assert stats["phi"].item() == pytest.approx(phi.item() / count, rel=1e-4)
    assert stats["grad_phi"].item() == pytest.approx(x1_hat.grad.norm(dim=1).sum().item() / count, rel=1e-3)
    assert stats["fm_error"].item() == pytest.approx(error.item(), rel=1e-4)


def passes(model, image, labels, seed=0):
    """(x, t) of every pass of the network in one loss, and the loss."""
    seen = []
    hook = model.network.register_forward_pre_hook(lambda module, args: seen.append(args[:2]))
    loss, _ = model.loss(image, labels, torch.Generator().manual_seed(seed))
    hook.remove()
    return seen, loss.item()


def residual(model, x1_hat, labels):
    """R of each image (B,)."""
    _, grad = model.potential(x1_hat, labels)
    target = model.encode_labels(labels) - model.config.phi_weight * grad
    return (x1_hat - target).square().mean((1, 2, 3))


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_a_share_of_the_images_is_used_again_on_the_line_to_the_end(share):
    model = drawn(small(later_share=share, **CODED))
    image, labels = batch(count=8)
    x0 = model.source(image)
    (first, *later), loss = passes(model, image, labels)
    assert torch.equal(first[0], x0)
    assert first[1].tolist() == [0] * 8
    x1_hat = end(model, *first, image)
    total = residual(model, x1_hat, labels).sum().item()
    assert len(later) == (share > 0)
    for x_t, t in later:
        assert t.min() > 0 and t.max() < 1
        assert len(t.unique()) == len(t)
        line = x0[:, None] + t[:, None, None, None] * (x1_hat - x0)[:, None]  # (image, second state, ..)
        gaps = (line - x_t).abs().amax((2, 3, 4))
        own = gaps.argmin(0)  # the image of each second state
        assert gaps.amin(0).max() < 1e-5
        assert own.tolist() == sorted(set(own.tolist()))
        total += residual(model, end(model, x_t, t, image[own]), labels[own]).sum().item()
        assert len(t) == 8 if share == 1 else 0 < len(t) < 8
    assert loss == pytest.approx(total / 8, rel=1e-5)


def test_the_share_is_that_of_many_draws():
    image, labels = batch(count=1, size=4)
    model = small(later_share=0.25)
    count = sum(len(passes(model, image, labels, seed)[0]) - 1 for seed in range(200))
    assert 30 < count < 70


@pytest.mark.parametrize("share", [0.0, 0.25, 0.6, 1.0])
def test_the_parts_of_a_batch_add_up_to_the_whole(share):
    """Loss, diagnostics and gradient, where the parts hold unequal numbers of labelled pixels."""
    image, labels = batch(count=4)
    labels[0, :9] = 255
    labels[3] = 255
    count = (labels != 255).sum()
    outcomes = []
    for parts in (1, 2, 4):
        model = drawn(small(later_share=share, **CODED))
        generators = [torch.Generator().manual_seed(i) for i in range(4)]
        total = []
        for own in torch.arange(4).chunk(parts):
            loss, stats = model.loss(image[own], labels[own], [generators[i] for i in own], count)
            loss.backward()
            total.append(torch.stack([loss.detach(), *stats.values()]))
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        outcomes.append((sum(total), gradient))
    for values, gradient in outcomes[1:]:
        assert torch.allclose(values, outcomes[0][0], rtol=1e-4)
        assert torch.allclose(gradient, outcomes[0][1], rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize("changes", [{}, {"kind": End}, {"kind": Noise}], ids=str)
def test_no_state_contains_the_label(changes):
    """The leak: whatever the labels are, the network must see the same states (Leaky does not)."""

    def states(labels, **changes):
        seen, _ = passes(drawn(small(later_share=1.0, **changes)), image, labels)
        return torch.cat([tensor.flatten() for state in seen for tensor in state])

    image, labels = batch()
    assert torch.equal(states(labels, **changes), states(4 - labels, **changes))
    assert not torch.equal(states(labels, kind=Leaky), states(4 - labels, kind=Leaky))


@pytest.mark.parametrize(("kind", "share"), [(FlowSeg, 0.0), (FlowSeg, 1.0), (Leaky, 0.0)])
def test_an_all_ignore_batch_has_loss_zero_and_finite_gradients(kind, share):
    model = small(kind=kind, later_share=share)
    image, labels = batch()
    loss, stats = model.loss(image, torch.full_like(labels, 255))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert all(value.isfinite() for value in stats.values())


def test_ignored_pixels_change_nothing():
    """Loss and gradient are those of the labelled pixels alone."""
    model = small(depth=0, later_share=0.0)
    blind(model.network)  # convolutions and the coarse velocity look beyond the patch
    image, labels = batch()
    labels[:, :, 8:] = 255
    torch.nn.init.normal_(model.network.head.weight, generator=torch.Generator().manual_seed(0))
    whole = model.loss(image, labels)[0]
    left = model.loss(image[..., :8].contiguous(), labels[..., :8].contiguous())[0]
    assert whole.item() == pytest.approx(left.item(), rel=1e-5)
    outputs = []
    model.network.register_forward_hook(lambda module, args, output: outputs.append(output))
    model.network.register_forward_hook(lambda module, args, output: output.retain_grad())
    model.loss(image, labels)[0].backward()
    assert outputs[0].grad[..., 8:].abs().max() == 0
    assert outputs[0].grad[..., :8].abs().max() > 0


@pytest.mark.parametrize("changes", [{}, CODED], ids=str)
def test_overfits_one_batch_through_the_real_loss(changes):
    model = small(num_classes=4, conv_width=16, **changes)
    image, _ = batch(size=24, count=2)
    labels = torch.zeros(2, 24, 24, dtype=torch.long)
    labels[0, 4:16, 6:20] = 1
    labels[1, 10:, :9] = 2
    labels[1, :5, 12:] = 3
    train_steps(model, image, labels, 200)
    model.eval()
    for steps in (1, 4):
        assert (model.segment(image, steps) == labels).float().mean() > 0.95


# ---------------------------------------------------------------- sampler and decoding


@pytest.mark.parametrize("steps", [1, 3, 10])
@pytest.mark.parametrize("dims", [3, 8])
def test_an_exact_velocity_is_integrated_to_the_mask(steps, dims):
    """Pins the direction of time: x1 - x0 from t = 0, and the general (x1 - x) / (1 - t), both end at x1."""
    model = small(encoding_dims=dims)
    image, labels = batch()
    x1 = model.encode_labels(labels)
    x0 = model.source(image)
    times = []
    straight = model.sample(image, steps, lambda x, t: times.append(t[0].item()) or x1 - x0)
    homing = model.sample(image, steps, lambda x, t: (x1 - x) / (1 - t)[:, None, None, None])
    assert torch.allclose(straight, x1, atol=1e-5)
    assert torch.allclose(homing, x1, atol=1e-5)
    assert model.soft_assignment(straight).argmax(1).equal(labels)
    assert times == pytest.approx([i / steps for i in range(steps)])


@pytest.mark.parametrize("steps", [1, 2, 7, 1000])
def test_the_last_euler_step_ends_where_the_network_aims_at(steps):
    model = drawn(small(depth=0, **CODED)).eval()
    image, _ = batch(size=8)
    *_, before, x1 = model.trajectory(image, steps)
    t = torch.full((2,), (steps - 1) / steps)
    assert torch.allclose(x1, end(model, before, t, image), atol=1e-5)
    assert torch.allclose(model.source(image), before) == (steps == 1)


def test_the_source_is_the_image_followed_by_zeros():
    image, _ = batch()
    x0 = small(encoding_dims=8).source(image)
    assert torch.equal(x0[:, :3], image)
    assert x0.shape[1] == 8
    assert x0[:, 3:].abs().max() == 0


@pytest.mark.parametrize("size", [(16, 16), (17, 30), (1, 1), (3, 50)])
@pytest.mark.parametrize("kind", [FlowSeg, Noise])
def test_any_size_gives_a_mask_of_that_size_and_always_the_same(size, kind):
    model = small(kind=kind).eval()
    image = torch.rand(1, 3, *size) * 2 - 1
    mask = model.segment(image, 2)
    assert mask.shape == (1, *size)
    assert mask.dtype == torch.int64
    assert torch.equal(mask, model.segment(image, 2))


@pytest.mark.parametrize("changes", FLOWS, ids=str)
def test_soft_assignment_is_the_softmax_of_the_potential(changes):
    model = small(**changes)
    x = torch.randn(2, model.config.encoding_dims, 4, 6)
    p = model.soft_assignment(x)
    _, logits = potential_by_autograd(model, x, torch.zeros(2, 4, 6, dtype=torch.long))
    assert torch.allclose(p, logits.softmax(-1).movedim(-1, 1), atol=1e-5)
    assert torch.allclose(p.sum(1), torch.ones(2, 4, 6), atol=1e-6)


def test_a_class_that_training_never_saw_is_not_answered_even_at_its_centroid():
    model = small(**CODED)
    x = torch.randn(2, model.config.encoding_dims, 4, 6)
    x[0] = model.centroids[1][:, None, None]
    before = model.soft_assignment(x)
    model.info = CheckpointInfo([*"abcde"], [*range(5)], unseen=["b", "e"])
    p = model.soft_assignment(x)
    assert not p[:, [1, 4]].any()
    kept = before[:, [0, 2, 3]]
    others = before[1:, [0, 2, 3]] / kept[1:].sum(1, keepdim=True)
    assert torch.allclose(p[1:, [0, 2, 3]], others, atol=1e-6)
    assert not set(model.segment(torch.rand(1, 3, 16, 16)).unique().tolist()) & {1, 4}


# ---------------------------------------------------------------- errors and files


def test_shape_and_value_errors_name_both_sides():
    model = small()
    image, labels = batch()
    with pytest.raises(ValueError, match=r"image is \(2, 16, 16\).*expected \(B, 3, H, W\)"):
        model.loss(image[:, 0], labels)
    with pytest.raises(ValueError, match=r"labels are \(2, 8, 16\).*expected \(2, 16, 16\)"):
        model.loss(image, labels[:, :8])
    with pytest.raises(ValueError, match=r"torch\.int32.*expected .*torch\.int64"):
        model.loss(image, labels.int())
    with pytest.raises(ValueError, match=r"labels run to 5; expected 0..4 or 255"):
        model.loss(image, labels + 1)
    with pytest.raises(ValueError, match=r"image is 15 x 16; expected multiples of the patch size 4"):
        model.velocity(image[:, :, :15], torch.zeros(2), image[:, :, :15])
    with pytest.raises(ValueError, match=r"t \(16,\); expected"):
        model.velocity(image, torch.zeros(16), image)
    with pytest.raises(ValueError, match="steps is 0; expected at least 1"):
        model.sample(image, 0)


@pytest.mark.parametrize(("changes", "message"), [
    ({"objective": "reshape"}, "objective is 'reshape'; expected reshaped or vanilla"),
    ({"encoding_dims": 2}, "encoding_dims is 2; expected"),
    ({"encoding_dims": 20}, "encoding_dims is 20; expected .*to 19"),
    ({"encoding_dims": 3}, "encoding_dims is 3; expected 6 to 19"),
    ({"encoding_dims": 8, "num_classes": 33}, "encoding_dims is 8; expected 9 to 19"),
    ({"encoding": "simplex"}, "encoding is 'simplex'; expected coded or kronecker"),
    ({"phi_weight": -1.0}, "phi_weight is -1.0"),
    ({"later_share": 1.5}, "later_share is 1.5"),
    ({"num_classes": 1}, "num_classes is 1"),
    ({"num_heads": 3}, "heads"),
    ({"patch_size": 6}, "patch_size is 6; expected a power of two"),
    ({"conv_width": 4}, "conv_width is 4; expected a whole number from 8"),
    ({"conv_width": 12}, "conv_width is 12; expected a multiple of 8"),
    ({"eps": 0.0}, "eps is 0.0"),
    ({"eps": float("nan")}, "eps is nan"),
    ({"tau": float("inf")}, "tau is inf"),
    ({"depth": 2.0}, "depth is 2.0; expected a whole number"),
    ({"depth": True}, "depth is True; expected a whole number"),
    ({"steps": "4"}, "steps is '4'; expected a whole number"),
])  # fmt: skip
def test_config_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{"num_classes": 5} | changes)


def test_every_number_of_the_config_has_a_range():
    numbers = {field.name for field in fields(ModelConfig) if field.type in (int, float)}
    assert numbers == {
        name for name, allowed in method.MODEL_RANGES.items() if not isinstance(allowed[0], str)
    }
    for name in numbers:
        low, high = method.MODEL_RANGES[name]
        for value in (low - 1, high * 2):
            with pytest.raises(ValueError, match=rf"^{name} is "):
                ModelConfig(**{"num_classes": 5} | {name: value})


def test_the_label_to_ignore_is_the_same_for_data_and_model():
    assert data.IGNORE == method.IGNORE


def test_short_names_for_scripts():
    assert method.kronecker is kronecker_centroids
    assert method.Config is ModelConfig


def test_save_and_load_return_the_same_model(tmp_path):
    model = small(2, **CODED)
    model.save(tmp_path / "m.safetensors", classes=["a", "b"], ids=[0, 7], unseen=["b"], mIoU=0.5)
    loaded = FlowSeg.load(tmp_path / "m.safetensors")
    assert loaded.config == model.config
    assert loaded.info == CheckpointInfo(classes=("a", "b"), ids=(0, 7), unseen=("b",), mIoU=0.5)
    assert torch.equal(loaded.centroids, model.centroids)
    assert loaded.eps == model.eps
    image, _ = batch()
    model.info = loaded.info
    assert torch.equal(loaded.segment(image), model.eval().segment(image))
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize(("facts", "name"), [
    ({"classes": "ab", "ids": (0, 1)}, "classes"),
    ({"classes": ("a", 1), "ids": (0, 1)}, "classes"),
    ({"classes": ("a", "b"), "ids": (0,)}, "classes"),
    ({"classes": ("a", "a"), "ids": (0, 1)}, "classes"),
    ({"classes": ("a", "b"), "ids": (0, 1)}, "2 classes"),
    ({"ignore": ("255",)}, "ignore"),
    ({"unseen": ("a",)}, "unseen"),
    ({"classes": ("a", "b"), "ids": (0, 1), "unseen": ("a", "c")}, "unseen"),
    ({"classes": ("a", "b"), "ids": (0, 1), "unseen": ("a", "b")}, "unseen"),
    ({"dataset": 3}, "dataset"),
    ({"protocol": []}, "protocol"),
    ({"crop_size": -1}, "crop_size"),
    ({"step": 0.5}, "step"),
    ({"mIoU": 1.5}, "mIoU"),
    ({"mIoU": float("nan")}, "mIoU"),
])  # fmt: skip
def test_what_a_checkpoint_says_of_itself_is_checked(facts, name, tmp_path):
    with pytest.raises(ValueError, match=name):
        small().save(tmp_path / "m.safetensors", **facts)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- files


def rewritten(path, to, tensors=None, **metadata):
    """Write the file again with other tensors or other JSON strings in its metadata, or without some."""
    with method.safe_open(path, "pt") as file:
        strings = file.metadata() | metadata
    strings = {name: text for name, text in strings.items() if text is not None}
    save_file(load_file(path) | (tensors or {}), to, strings)


def refused(path, *words):
    """Loading the file is an error of one line that names it."""
    with pytest.raises(CheckpointError) as error:
        FlowSeg.load(path)
    message = str(error.value)
    assert len(message.splitlines()) == 1
    for word in (str(path), *words):
        assert word in message


def test_damaged_and_foreign_files_are_refused(tmp_path):
    good = tmp_path / "good.safetensors"
    bad = tmp_path / "bad.safetensors"
    small().save(good)
    refused(bad)
    refused(tmp_path)
    for content in (b"", b"hello, world", good.read_bytes()[:-100]):
        bad.write_bytes(content)
        refused(bad, "damaged")
    save_file({"weight": torch.zeros(3)}, bad)
    refused(bad, "no FlowSeg checkpoint")
    config = json.dumps(asdict(ModelConfig(5)))
    save_file({"weight": torch.zeros(3)}, bad, {"format": json.dumps(method.FORMAT), "config": config})
    refused(bad, "damaged")


@pytest.mark.parametrize("changes", [
    {"format": "[" * 100_000},
    {"config": None},
    {"config": "[]"},
    {"ids": None},
    {"classes": '["a", "b"]', "ids": "[0, 1]"},
    {"config": "null"},
    {"config": "[" * 100_000},
    {"config": '{"num_classes": 5, "hidden": 32}'},
    {"config": '{"num_classes": 1e400}'},
    {"classes": '"road"'},
    {"mIoU": "NaN"},
    {"step": "-1"},
    {"colour": '"green"'},
], ids=str)  # fmt: skip
def test_metadata_that_cannot_be_is_refused(changes, tmp_path):
    small().save(tmp_path / "good.safetensors", classes=list("abcde"), ids=[0, 1, 2, 3, 4])
    rewritten(tmp_path / "good.safetensors", tmp_path / "bad.safetensors", **changes)
    refused(tmp_path / "bad.safetensors", "damaged")


def test_a_checkpoint_of_an_older_version_is_refused(tmp_path):
    small().save(tmp_path / "new.safetensors")
    old = json.dumps({"num_classes": 5, "hidden": 32, "heads": 2, "dims": 3})
    rewritten(tmp_path / "new.safetensors", tmp_path / "old.safetensors", format='"flowseg-1"', config=old)
    refused(tmp_path / "old.safetensors", "older", method.FORMAT)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(value, tmp_path):
    small().save(tmp_path / "good.safetensors")
    bias = load_file(tmp_path / "good.safetensors")["network.head.bias"]
    bias[-1] = value
    rewritten(tmp_path / "good.safetensors", tmp_path / "bad.safetensors", {"network.head.bias": bias})
    refused(tmp_path / "bad.safetensors", "network.head.bias", "not finite")


def test_faults_name_what_is_missing_unknown_or_of_another_shape():
    a = {"same": torch.zeros(2), "shape": torch.zeros(2, 3), "missing": torch.zeros(1)}
    b = {"same": torch.ones(2), "shape": torch.zeros(3, 2), "unknown": torch.zeros(())}
    faults = tensor_faults(b, a)
    assert tensor_faults(a, a) == ""
    assert all(word in faults for word in ("3", "missing", "unknown", "shape is (3, 2), expected (2, 3)"))
    assert "same" not in faults
    many = {f"weight {i}": torch.zeros(1) for i in range(100)}
    assert len(tensor_faults({}, many)) < 200


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of memory is the one of Linux")
@pytest.mark.parametrize("changes", [
    {"hidden_size": 16_384, "depth": 200, "num_heads": 1024},
    {"nerf_width": 4096, "nerf_mlp_ratio": 64, "nerf_depth": 100},
    {"conv_width": 4096},
], ids=str)  # fmt: skip
def test_a_configuration_that_promises_more_than_the_file_holds_takes_no_memory(changes, tmp_path):
    """A network of terabytes is described in bytes; it is compared with the file before it is allocated."""
    small().save(tmp_path / "good.safetensors")
    config = asdict(ModelConfig(5, **SMALL | changes))
    rewritten(tmp_path / "good.safetensors", tmp_path / "bad.safetensors", config=json.dumps(config))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(tmp_path / "bad.safetensors", "damaged")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes


def test_saving_to_a_missing_folder_is_one_clear_error(tmp_path):
    with pytest.raises(CheckpointError, match="cannot write"):
        small().save(tmp_path / "missing" / "m.safetensors")


@pytest.mark.parametrize("kind", ["link to a file", "link to a folder", "dangling link", "file", "folder"])
def test_what_lies_at_the_name_of_the_unfinished_file_is_replaced_never_followed(kind, tmp_path):
    """Else whoever may write to a shared folder has us write over what only we may write to."""
    victim = tmp_path / "precious"
    folder = tmp_path / "weights"
    folder.mkdir()
    part = folder / ".m.safetensors.part"
    if kind == "link to a folder":
        victim.mkdir()
        (victim / "photo.jpg").write_bytes(b"precious")
    elif kind == "link to a file":
        victim.write_bytes(b"precious")
    if "link" in kind:
        part.symlink_to(victim)
    elif kind == "file":
        part.write_bytes(b"left by a kill")
    else:
        part.mkdir()
        (part / "left").write_bytes(b"by a kill")

    small().save(folder / "m.safetensors")
    FlowSeg.load(folder / "m.safetensors")
    assert [path.name for path in folder.iterdir()] == ["m.safetensors"]
    if kind == "link to a file":
        assert victim.read_bytes() == b"precious"
    if kind == "link to a folder":
        assert [path.name for path in victim.iterdir()] == ["photo.jpg"]
    if kind == "dangling link":
        assert not victim.exists()


def test_a_file_has_the_rights_that_the_umask_allows(tmp_path):
    small().save(tmp_path / "m.safetensors")
    (tmp_path / "other").touch()
    assert (tmp_path / "m.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_number_that_json_does_not_know_is_never_written(tmp_path):
    with pytest.raises(ValueError):
        write_tensors({}, tmp_path / "m.safetensors", {"at": float("nan")})
    assert not list(tmp_path.iterdir())
