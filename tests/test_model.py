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
    FirstStep,
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
    kronecker_centroids,
    lexicode,
    potential_gradient,
    squared_distances,
    tensor_faults,
    write_tensors,
)
from train import resolve

SMALL = {
    "hidden_size": 32,
    "depth": 1,
    "num_heads": 2,
    "nerf_depth": 1,
    "nerf_width": 8,
    "conv_width": 8,
    "encoding_dims": 3,
    "tau": 1.0,
    "patch_size": 4,
}


def small(num_classes=5, kind=FlowSeg, **changes):
    torch.manual_seed(0)
    return kind(ModelConfig(num_classes, **SMALL | changes))


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
    ("words", "length", "hamming"),
    [(2, 5, 5), (16, 7, 3), (16, 8, 4), (32, 16, 8), (128, 16, 6), (171, 13, 4)],
)
def test_lexicodes_have_the_distances_of_the_known_codes(words, length, hamming):
    code = lexicode(words, length)
    assert code.shape == (words, length)
    assert set(code.unique().tolist()) <= {-1.0, 1.0}
    assert torch.pdist(code, p=1).min().item() == 2 * hamming


@pytest.mark.parametrize("dims", [3, 8, 16, 19])
@pytest.mark.parametrize("n", [2, 11, 150, 255])
def test_coded_centroids_begin_with_the_colours_and_lie_further_apart(n, dims):
    mu = coded_centroids(n, dims)
    assert mu.shape == (n, dims)
    assert torch.equal(mu[:, :3], kronecker_centroids(n))
    assert mu.abs().max() <= 1
    assert torch.pdist(mu).min() >= torch.pdist(kronecker_centroids(n, dims)).min()


def test_kronecker_formula_by_hand():
    raw = [[(k * math.sqrt(prime)) % 1 for prime in (2, 3, 5)] for k in range(1, 8)]
    for axis in range(3):
        column = [row[axis] for row in raw]
        expected = [2 * (value - min(column)) / (max(column) - min(column)) - 1 for value in column]
        assert kronecker_centroids(7)[:, axis].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("n", [2, 11, 150, 171, 255])
@pytest.mark.parametrize("dims", [3, 16])
def test_encoding_and_decoding_returns_the_labels(n, dims):
    model = small(n, encoding_dims=dims)
    labels = torch.arange(n).repeat(2)[: n + n % 2].view(1, 2, -1)
    x = model.centroids[labels].movedim(-1, 1)  # `encode_labels` reserves 255
    confidence, decoded = model.soft_assignment(x).max(1)
    assert decoded.equal(labels)
    assert (confidence > 1 / n).all()


@pytest.mark.parametrize("dims", [3, 16])
def test_every_centroid_of_many_is_nearest_to_itself(dims):
    mu = kronecker_centroids(1000, dims)
    d, nearest = squared_distances(mu, mu)
    assert nearest[:, 0].equal(torch.arange(1000))
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


def test_image_reaches_the_velocity_and_zero_weights_cut_it_off():
    model = small()
    torch.nn.init.normal_(model.network.head.weight)
    image, _ = batch()
    t = torch.zeros(2)
    x = torch.zeros(2, 3, 16, 16)
    assert not torch.allclose(model.velocity(x, t, image), model.velocity(x, t, -image))
    network = model.network
    for layer in (network.image_to_token, network.image_to_pixel, network.image_to_velocity):
        torch.nn.init.zeros_(layer.weight)
    assert torch.equal(model.velocity(x, t, image), model.velocity(x, t, -image))


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
    {}, {"objective": "vanilla"}, {"conv_width": 0},
    {"encoding_dims": 8}, {"encoding": "coded", "encoding_dims": 8},
    {"kind": Annealed}, {"kind": Linear}, {"kind": Sqrt}, {"kind": Inverse}, {"kind": End}, {"kind": Noise},
    {"kind": Leaky}, {"kind": FirstStep},
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
        {"kind": Annealed},
        {"kind": Linear},
        {"kind": Sqrt},
        {"kind": Inverse},
        {"kind": End},
        {"kind": Noise},
        {"kind": Leaky},
        {"kind": Leaky, "objective": "vanilla"},
        {"kind": FirstStep},
    ):
        model = small(**changes)
        torch.nn.init.normal_(model.network.head.weight, generator=torch.Generator().manual_seed(0))
        losses.append(round(model.loss(image, labels, torch.Generator().manual_seed(0))[0].item(), 4))
    assert len(set(losses)) == len(losses)


def test_the_potential_stays_float32_under_autocast():
    """With a velocity of zero the network cannot differ, so the loss may not either."""
    model = small()
    image, labels = batch()
    torch.nn.init.zeros_(model.network.image_to_velocity.weight)
    exact = model.loss(image, labels, torch.Generator().manual_seed(0))[0]
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(image, labels, torch.Generator().manual_seed(0))[0]
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)


def test_reshaped_loss_at_the_start_is_the_paper_s():
    model = small(kind=FirstStep)
    image, labels = batch()
    torch.nn.init.normal_(model.network.head.weight, std=0.1)
    v = model.velocity(image, torch.zeros(2), image)
    v_gt = kronecker_centroids(5)[labels].movedim(-1, 1) - image
    x1_hat = (image + v).detach().movedim(1, -1).reshape(-1, 3).requires_grad_()
    logits = -((x1_hat[:, None] - kronecker_centroids(5)).square().sum(-1) + model.config.eps).log()
    F.cross_entropy(logits, labels.flatten(), reduction="sum").backward()
    target = v_gt - x1_hat.grad.view(2, 16, 16, 3).movedim(-1, 1)
    expected = (v - target).square().mean()
    assert model.loss(image, labels)[0].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("changes", [{}, {"kind": End}, {"kind": Noise}], ids=str)
def test_no_state_contains_the_label(changes):
    """The leak: whatever the labels are, the network must see the same states (Leaky does not)."""

    def states(labels, **changes):
        model = small(**changes)
        torch.nn.init.normal_(model.network.head.weight, generator=torch.Generator().manual_seed(0))
        seen = []
        model.network.register_forward_pre_hook(lambda module, args: seen.extend(a.clone() for a in args[:2]))
        model.loss(image, labels, torch.Generator().manual_seed(0))
        return torch.cat([tensor.flatten() for tensor in seen])

    image, labels = batch()
    assert torch.equal(states(labels, **changes), states(4 - labels, **changes))
    assert not torch.equal(states(labels, kind=Leaky), states(4 - labels, kind=Leaky))


@pytest.mark.parametrize("kind", [FlowSeg, Leaky, FirstStep])
def test_an_all_ignore_batch_has_loss_zero_and_finite_gradients(kind):
    model = small(kind=kind)
    image, labels = batch()
    loss, stats = model.loss(image, torch.full_like(labels, 255))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert all(value.isfinite() for value in stats.values())


def test_ignored_pixels_change_nothing():
    """Loss and gradient are those of the labelled pixels alone."""
    model = small(conv_width=0, depth=0, kind=FirstStep)
    image, labels = batch()
    labels[:, :, 8:] = 255
    torch.nn.init.normal_(model.network.head.weight, generator=torch.Generator().manual_seed(0))
    whole = model.loss(image, labels)[0]
    left = model.loss(image[..., :8].contiguous(), labels[..., :8].contiguous())[0]
    assert whole.item() == pytest.approx(left.item(), rel=1e-5)
    v = model.velocity(image, torch.zeros(2), image)
    v.retain_grad()
    model._velocity = lambda *args: v
    model.loss(image, labels)[0].backward()
    assert v.grad[..., 8:].abs().max() == 0
    assert v.grad[..., :8].abs().max() > 0


def test_overfits_one_batch_through_the_real_loss():
    model = small(num_classes=4, conv_width=16)
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


def test_soft_assignment_is_the_softmax_of_the_potential():
    model = small(tau=0.5)
    x = torch.randn(2, 3, 4, 6)
    p = model.soft_assignment(x)
    d = (x.movedim(1, -1)[..., None, :] - model.centroids).square().sum(-1)
    expected = (-(d + model.config.eps).log() / 0.5).softmax(-1).movedim(-1, 1)
    assert torch.allclose(p, expected, atol=1e-6)
    assert torch.allclose(p.sum(1), torch.ones(2, 4, 6), atol=1e-6)


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
    ({"encoding_dims": 20, "encoding": "coded"}, "encoding_dims is 20; expected 3 to 19"),
    ({"num_classes": 1}, "num_classes is 1"),
    ({"num_heads": 3}, "heads"),
    ({"patch_size": 6}, "patch_size is 6; expected a power of two"),
    ({"conv_width": 4}, "conv_width is 4; expected a multiple of 8"),
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
    model = small(encoding_dims=8, encoding="coded")
    model.save(tmp_path / "m.safetensors", classes=["a", "b"], ids=[0, 7], mIoU=0.5)
    loaded = FlowSeg.load(tmp_path / "m.safetensors")
    assert loaded.config == model.config
    assert loaded.info == CheckpointInfo(classes=("a", "b"), ids=(0, 7), mIoU=0.5)
    assert torch.equal(loaded.centroids, model.centroids)
    image, _ = batch()
    assert torch.equal(loaded.segment(image), model.eval().segment(image))
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize(("facts", "name"), [
    ({"classes": "ab", "ids": (0, 1)}, "classes"),
    ({"classes": ("a", 1), "ids": (0, 1)}, "classes"),
    ({"classes": ("a", "b"), "ids": (0,)}, "classes"),
    ({"classes": ("a", "a"), "ids": (0, 1)}, "classes"),
    ({"ignore": ("255",)}, "ignore"),
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
    """Write the file again with other tensors or other JSON strings in its metadata."""
    with method.safe_open(path, "pt") as file:
        strings = file.metadata()
    save_file(load_file(path) | (tensors or {}), to, strings | metadata)


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
    {"config": "[]"},
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
    small().save(tmp_path / "good.safetensors")
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
