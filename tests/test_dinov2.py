"""The frozen teacher against golden data and a plain computation; alignment with it, in training, too."""

import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import train as training
from data import ShapesDataset
from flowseg_tools.dinov2 import (
    Alignment,
    DinoFlowSeg,
    DinoNetwork,
    DinoV2,
    dino_input,
    encoder_config,
    load_dinov2,
    load_encoder,
    teacher_input,
)
from flowseg_tools.estimate import cost, counted
from flowseg_tools.pretrained import import_pixnerd, start_from
from flowseg_tools.runs import RunError
from model import CheckpointError, FlowSeg, ModelConfig, weights_hash
from tests import test_runs
from tests.test_cli import QUICK, fails, flowseg
from train import TrainConfig, noise_generators, resolve

GOLDEN = Path(__file__).parent / "golden"
TINY = (
    "hidden_size=16",
    "depth=2",
    "num_heads=2",
    "nerf_width=8",
    "conv_width=8",
    "encoding_dims=11",
    "steps=2",
    "log_every=1",
)


def public(width=32, depth=2, patch=14, grid=4, registers=0, inner=None, seed=0):
    """Random weights by the public names, large enough that every part matters."""
    inner = inner or 4 * width
    shapes = {
        "cls_token": (1, 1, width), "pos_embed": (1, 1 + grid**2, width), "mask_token": (1, width),
        "patch_embed.proj.weight": (width, 3, patch, patch), "patch_embed.proj.bias": (width,),
        "norm.weight": (width,), "norm.bias": (width,),
    }  # fmt: skip
    if registers:
        shapes["register_tokens"] = (1, registers, width)
    for i in range(depth):
        layers = {"attn.qkv": (3 * width, width), "attn.proj": (width, width), "mlp.fc1": (inner, width),
                  "mlp.fc2": (width, inner), "norm1": (width,), "norm2": (width,)}  # fmt: skip
        for name, shape in layers.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
        shapes |= {f"blocks.{i}.ls{j}.gamma": (width,) for j in (1, 2)}
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}


def stored(folder, **sizes):
    """A public file with such weights."""
    path = folder / "teacher.pth"
    torch.save(public(**sizes), path)
    return path


# ---------------------------------------------------------------- the teacher


@pytest.mark.parametrize("case", ["0", "1"])
def test_tokens_equal_the_public_dinov2(case):
    io = load_file(GOLDEN / "dinov2_tiny_io.safetensors")
    tokens = load_dinov2(GOLDEN / "dinov2_tiny.pth")(io[f"{case}.x"])
    assert torch.allclose(tokens, io[f"{case}.x_norm_patchtokens"], atol=1e-5)


def cubic(size, trained):
    """(size, trained) weights of bicubic interpolation (a = -3/4) at the scale (size + 0.1) / trained."""
    weights = torch.zeros(size, trained, dtype=torch.float64)
    for i in range(size):
        source = (i + 0.5) * trained / (size + 0.1) - 0.5
        for j in range(math.floor(source) - 1, math.floor(source) + 3):
            d, a = abs(source - j), -0.75
            near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * (d**3 - 5 * d**2 + 8 * d - 4)
            weights[i, min(max(j, 0), trained - 1)] += near if d <= 1 else far
    return weights


def plain(state, images, heads):
    """DINOv2 step by step in float64: one head at a time, no fused function, LayerScale where it belongs."""
    w = {name: tensor.double() for name, tensor in state.items()}

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    kernel, D = w["patch_embed.proj.weight"], w["cls_token"].shape[-1]
    P, trained = kernel.shape[-1], math.isqrt(w["pos_embed"].shape[1] - 1)
    rows, columns = images.shape[2] // P, images.shape[3] // P
    cells = [images[:, :, i * P : i * P + P, j * P : j * P + P].double().flatten(1)
             for i in range(rows) for j in range(columns)]  # fmt: skip
    x = torch.stack(cells, dim=1) @ kernel.flatten(1).T + w["patch_embed.proj.bias"]
    position = w["pos_embed"][0, 1:].view(trained, trained, D)
    if (rows, columns) != (trained, trained):
        position = torch.einsum("ha,wb,abd->hwd", cubic(rows, trained), cubic(columns, trained), position)
    x = x + position.reshape(-1, D)
    first = w["cls_token"] + w["pos_embed"][:, :1]
    if "register_tokens" in w:
        first = torch.cat([first, w["register_tokens"]], dim=1)
    first = first.expand(len(x), -1, -1)
    x = torch.cat([first, x], dim=1)
    for i in range(len([name for name in w if name.endswith("ls1.gamma")])):
        block = f"blocks.{i}"
        qkv, seen = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv"), []
        for head in torch.arange(D).chunk(heads):
            q, k, v = (qkv[..., head + n * D] for n in range(3))
            seen.append((q @ k.mT / len(head) ** 0.5).softmax(-1) @ v)
        x = x + w[f"{block}.ls1.gamma"] * linear(torch.cat(seen, dim=-1), f"{block}.attn.proj")
        inner = linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")
        inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        x = x + w[f"{block}.ls2.gamma"] * linear(inner, f"{block}.mlp.fc2")
    return norm(x, "norm")[:, first.shape[1] :]


@pytest.mark.parametrize(("sizes", "heads", "grid"), [
    ({}, 2, (4, 4)),  # the trained grid
    ({}, 2, (2, 8)),  # as many patches, in another form
    ({"registers": 4}, 2, (3, 5)),
    ({"width": 48, "depth": 3, "patch": 8, "grid": 5}, 3, (7, 2)),
    ({"width": 36, "depth": 1, "patch": 4, "grid": 3, "registers": 1, "inner": 50}, 6, (9, 11)),
    ({"width": 384, "depth": 1, "grid": 7, "registers": 4}, 6, (5, 16)),  # the width of ViT-S
    ({"width": 32, "depth": 4, "grid": 1}, 1, (1, 3)),
])  # fmt: skip
def test_tokens_equal_a_plain_computation(tmp_path, sizes, heads, grid):
    path = stored(tmp_path, **sizes)
    known = sizes.get("width", 32) // heads == (64 if sizes.get("width") == 384 else 16)
    model = load_dinov2(path) if known else load_dinov2(path, heads)
    images = torch.randn(2, 3, *(side * model.patch_size for side in grid))
    tokens, expected = model(images), plain(public(**sizes), images, heads)
    assert tokens.shape == expected.shape == (2, math.prod(grid), sizes.get("width", 32))
    assert (tokens - expected).abs().max() < 1e-5


def test_the_teacher_is_frozen():
    model = load_dinov2(GOLDEN / "dinov2_tiny.pth")
    assert not any(p.requires_grad for p in model.parameters())
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert not model(torch.zeros(1, 3, 28, 28)).requires_grad
    with pytest.raises(ValueError, match=r"\(1, 3, 28, 30\).* 14"):
        model(torch.zeros(1, 3, 28, 30))


def test_the_published_sizes_are_those_of_vit_b():
    with torch.device("meta"):
        model = DinoV2(768, 12, 12, 3072, 14, 37, 0)
    assert sum(p.numel() for p in model.parameters()) == 86_580_480 - 768  # published, less the mask token


def nan(weights):
    weights["blocks.1.mlp.fc1.weight"][0, 0] = math.nan


FAULTS = {
    "blocks.1.attn.proj.bias is missing, expected (32,)": lambda w: w.pop("blocks.1.attn.proj.bias"),
    "or damaged ('pos_embed')": lambda w: w.pop("pos_embed"),
    "ls1.gamma is missing, expected (32,); head is (3,), expected nothing": lambda w: (
        w.pop("blocks.0.ls1.gamma"), w.update(head=torch.zeros(3)))[:0],
    "norm.weight is (31,), expected (32,)": lambda w: w.update({"norm.weight": torch.zeros(31)}),
    "cls_token is (1, 1, 8), expected (1, 1, 32)": lambda w: w.update(cls_token=torch.zeros(1, 1, 8)),
    "pos_embed is (1, 16, 32), expected (1, 17, 32)": lambda w: w.update(pos_embed=torch.zeros(1, 16, 32)),
    "register_tokens is (4, 32), expected (1, 4, 32)": lambda w: w.update(register_tokens=torch.zeros(4, 32)),
    "blocks.1.mlp.fc1.weight is not finite, expected (128, 32)": nan,
    "25 faults: head.0 is (1,), expected nothing": lambda w: w.update(
        {f"head.{i}": torch.zeros(1) for i in range(25)}),
    "blocks.0.attn.qkv.bias is missing": lambda w: [w.pop(k) for k in [*w] if k.startswith("blocks")][:0],
    "epoch is no tensor of floating-point numbers": lambda w: w.update(epoch=3),
    "cls_token has (1, 1, 32) numbers, more than are stored": lambda w: w.update(
        cls_token=torch.zeros(1).expand(1, 1, 32)),
    "101 blocks, expected at most 100": lambda w: w.update(
        {f"blocks.{i}.ls1.gamma": torch.zeros(32) for i in range(101)}),
    "Unsupported global: GLOBAL pathlib": lambda w: w.update(path=Path("x")),
}  # fmt: skip


@pytest.mark.parametrize("message", FAULTS)
def test_what_does_not_fit_is_named(tmp_path, message):
    weights = public()
    FAULTS[message](weights)
    torch.save(weights, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError) as caught:
        load_dinov2(tmp_path / "bad.pth")
    assert message in str(caught.value)
    assert str(tmp_path / "bad.pth") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_files_are_named(tmp_path):
    whole, path = (GOLDEN / "dinov2_tiny.pth").read_bytes(), tmp_path / "bad.pth"
    for content in (b"", whole[:-10], b"no zip file" * 99, whole[:1000] + bytes(400) + whole[1400:]):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"bad.pth is no DINOv2 .*damaged \(.+\); download"):
            load_dinov2(path)
    for content, reason in ((torch.zeros(3), "no attribute"), ({}, "no mode"), ([3], "no attribute")):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=reason):
            load_dinov2(path)
    for place in (tmp_path / "absent.pth", tmp_path, Path("/dev/zero")):
        with pytest.raises(CheckpointError, match="no regular file"):
            load_dinov2(place)
    with pytest.raises(CheckpointError, match="its width 32 is not a multiple of 3 heads: pass num_heads"):
        load_dinov2(GOLDEN / "dinov2_tiny.pth", 3)


@pytest.mark.parametrize(("patch", "size"), [(16, (224, 112)), (8, (448, 224)), (4, (896, 448))])
def test_the_teacher_sees_the_image_in_our_patches(patch, size):
    levels = torch.tensor([-1.0, 0.0, 1.0])
    seen = teacher_input(levels[None, :, None, None].expand(2, 3, 256, 128), patch)
    assert seen.shape == (2, 3, *size)
    expected = (torch.tensor([0, 0.5, 1]) - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor(
        [0.229, 0.224, 0.225]
    )
    assert torch.allclose(seen, expected[:, None, None].expand_as(seen), atol=1e-5)
    image = torch.rand(1, 3, 32, 48) * 2 - 1
    assert torch.equal(teacher_input(image, 14, 14), teacher_input(image, 7, 7))  # no resizing
    ramp = torch.linspace(-1, 1, 64).expand(1, 3, 64, 64)
    assert (teacher_input(ramp, patch).diff(dim=3)[..., 99:-99] > 0).all()


# ---------------------------------------------------------------- alignment


def aligned(path, **changes):
    """A small model with its alignment, images (2, 3, 32, 48) and labels."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "depth": 3, "num_heads": 2, "conv_width": 8, "nerf_width": 8}
    sizes |= {"encoding_dims": 6, "later_share": 1.0} | changes
    model = FlowSeg(ModelConfig(5, **sizes))
    torch.nn.init.normal_(model.network.head.weight)  # zero at first: nothing would reach the tokens
    alignment = Alignment(model.network, path, 2, 0.5)
    image = torch.rand(2, 3, 32, 48) * 2 - 1
    return model, alignment, image, torch.randint(0, 5, (2, 32, 48))


def named(model, alignment):
    """The parameters of both by name."""
    both = torch.nn.ModuleDict({"model": model, "alignment": alignment})
    return dict(both.named_parameters())


@pytest.mark.parametrize(("tokens_of", "passes"), [("image", [2]), ("state", [2, 2])])
def test_alignment_is_one_minus_the_cosine_of_the_tokens_of_a_block(tmp_path, tokens_of, passes):
    path = stored(tmp_path, width=24, grid=3)
    model, alignment, image, labels = aligned(path, tokens_of=tokens_of)
    seen = []
    model.network.blocks[1].register_forward_hook(lambda block, inputs, tokens: seen.append(tokens))
    model.loss(image, labels)
    assert [len(tokens) for tokens in seen] == passes  # t = 0, which is aligned, then the second state
    projected = seen[0]
    for layer in alignment.projector:
        projected = projected * projected.sigmoid() if isinstance(layer, torch.nn.SiLU) else layer(projected)
    target = plain(public(width=24, grid=3), teacher_input(image, 8), 1)
    cosine = (projected * target).sum(-1) / (projected.norm(dim=-1) * target.norm(dim=-1))
    assert projected.shape == target.shape == (2, 4 * 6, 24)
    assert alignment(image).item() == pytest.approx(1 - cosine.mean().item(), abs=1e-5)
    alignment(image).backward()
    reached = {name.rsplit(".", 1)[0] for name, p in named(model, alignment).items() if p.grad is not None}
    wanted = {"model.network.blocks.1.mlp.w1", "model.network.patch_embed", "alignment.projector.4"}
    assert wanted <= reached
    assert not any("blocks.2" in name or "nerf" in name for name in reached)
    assert len([layer for layer in alignment.projector if isinstance(layer, torch.nn.Linear)]) == 3


def test_the_teacher_is_in_no_state_and_a_deep_block_is_the_last(tmp_path):
    path = stored(tmp_path)
    model, alignment, image, labels = aligned(path, depth=1)
    assert not any("teacher" in name for name in (*model.state_dict(), *alignment.state_dict()))
    assert not any("alignment" in name or "projector" in name for name in model.state_dict())
    trained = {name.rpartition(".")[0] for name, _ in alignment.named_parameters()}
    assert trained == {f"projector.{i}" for i in (0, 2, 4)}
    model.loss(image, labels)
    assert 0 < alignment(image) < 2
    with torch.autocast("cpu", torch.bfloat16):
        model.loss(image, labels)
        assert alignment(image).dtype == torch.float32


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_tokens_that_are_aligned_are_those_of_all_images_at_the_start(tmp_path, share):
    """Not those of the second state, which a share of the images has."""
    model, alignment, image, labels = aligned(stored(tmp_path), later_share=share)
    values = []
    for seed in range(3):
        model.loss(image, labels, torch.Generator().manual_seed(seed))
        assert len(alignment.tokens) == 2
        values.append(alignment(image).item())
    assert max(values) == min(values)
    model.loss(image[:1], labels[:1])
    assert len(alignment.tokens) == 1


@pytest.mark.parametrize(("compiled", "checkpointing"), [
    (True, False), (False, True), pytest.param(True, True, marks=pytest.mark.slow),
])  # fmt: skip
def test_alignment_sees_the_tokens_of_a_compiled_or_recomputed_network(tmp_path, compiled, checkpointing):
    values = []
    for plain in (True, False):
        model, alignment, image, labels = aligned(stored(tmp_path))
        model.network.activation_checkpointing = checkpointing and not plain
        if compiled and not plain:  # the hook is in the graph
            model.network.compile(backend="eager", fullgraph=not checkpointing)
        loss, _ = model.loss(image, labels, torch.Generator().manual_seed(0))
        (loss + alignment(image)).backward()
        gradients = [p.grad.flatten() for p in named(model, alignment).values()]
        model.loss(image[:1], labels[:1])  # a backward pass later, the tokens are those of the next image
        values.append(torch.cat([loss[None].detach(), alignment(image[:1])[None].detach(), *gradients]))
    assert torch.allclose(*values, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- the encoder

SMALL = {"hidden_size": 16, "depth": 2, "num_heads": 2, "nerf_width": 8, "conv_width": 8}


def encoded(path, **changes):
    """A small model with the encoder of a file."""
    torch.manual_seed(0)
    model = DinoFlowSeg(ModelConfig(5, **SMALL | encoder_config(path) | changes))
    load_encoder(model.network, path)
    return model


def added(network, image):
    """What the encoder adds to the tokens (B, L, D)."""
    coarse = network.image_encoder(image)[-1]
    plain_network = super(DinoNetwork, network)
    return network.tokens_of_image(image, coarse) - plain_network.tokens_of_image(image, coarse)


@pytest.mark.parametrize("case", ["0", "1"])
def test_golden_features_reach_the_tokens(case):
    io = load_file(GOLDEN / "dinov2_tiny_io.safetensors")
    images, golden = io[f"{case}.x"], io[f"{case}.x_norm_patchtokens"]
    rows, columns = (side // 14 for side in images.shape[2:])
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    image = (images * std + mean) * 2 - 1
    model = encoded(GOLDEN / "dinov2_tiny.pth", hidden_size=32, patch_size=2, finetune_encoder=True)
    torch.nn.init.eye_(model.network.image_vit_to_token.weight)
    with torch.no_grad():
        seen = added(model.network, image)
    grid = golden.transpose(1, 2).unflatten(2, (rows, columns))
    expected = torch.nn.functional.interpolate(grid, size=(7 * rows, 7 * columns), mode="bilinear")
    assert (seen - expected.flatten(2).transpose(1, 2)).abs().max() < 1e-5


@pytest.mark.parametrize("size", [(32, 48), (8, 8), (104, 40)])
@pytest.mark.parametrize("registers", [0, 4])
def test_any_image_size_reaches_the_tokens_of_any_vit(tmp_path, size, registers):
    sizes = {"width": 48, "depth": 3, "grid": 5, "registers": registers}
    path = stored(tmp_path, **sizes)
    model = encoded(path, finetune_encoder=True)
    image = torch.rand(2, 3, *size) * 2 - 1
    with torch.no_grad():
        seen = added(model.network, image)
    grid = [max(1, round(side / 14)) for side in size]
    tokens = plain(public(**sizes), dino_input(image, [14 * cells for cells in grid]), 3).float()
    tokens = tokens.transpose(1, 2).unflatten(2, grid)
    tokens = torch.nn.functional.interpolate(tokens, size=[side // 8 for side in size], mode="bilinear")
    expected = model.network.image_vit_to_token(tokens.flatten(2).transpose(1, 2))
    assert (seen - expected).abs().max() < 1e-4
    assert model.segment(torch.rand(1, 3, 50, 71) * 2 - 1).shape == (1, 50, 71)


def test_no_gradient_and_no_optimizer_memory_is_spent_on_a_frozen_encoder(tmp_path):
    path = stored(tmp_path, registers=2)
    for finetune in (False, True):
        model = encoded(path, finetune_encoder=finetune)
        torch.nn.init.normal_(model.network.head.weight)
        objective = training.Objective(model, None)
        optimizers = training.make_optimizers(objective, TrainConfig())
        model.loss(torch.rand(2, 3, 32, 32), torch.zeros(2, 32, 32, dtype=torch.long))[0].backward()
        own = {p for name, p in model.named_parameters() if ".vit." in name}
        updated = {p: group for o in optimizers for group in o.param_groups for p in group["params"]}
        assert own.isdisjoint(updated) != finetune
        assert all((p.grad is not None) == finetune for p in own)
        assert {p for p in model.parameters() if p.requires_grad} == set(updated)
        assert model.network.image_vit_to_token.weight.grad.any()
        if finetune:
            assert {updated[p]["lr_scale"] for p in own} == {0.1}


def test_a_checkpoint_holds_the_encoder_in_half_the_bytes_and_gives_the_same_masks(tmp_path):
    path = stored(tmp_path, width=64, depth=4, registers=4)
    image = torch.rand(1, 3, 48, 40) * 2 - 1
    for finetune, dtype in ((False, torch.bfloat16), (True, torch.float32)):
        model = encoded(path, finetune_encoder=finetune).eval()
        torch.nn.init.normal_(model.network.head.weight)
        model.save(tmp_path / "x.safetensors", classes=[*"abcde"], ids=[*range(5)])
        found = load_file(tmp_path / "x.safetensors")
        assert {v.dtype for name, v in found.items() if ".vit." in name} == {dtype}
        assert {v.dtype for name, v in found.items() if ".vit." not in name} == {torch.float32}
        with pytest.raises(CheckpointError, match=r"x\.safetensors .*DinoFlowSeg\.load"):
            FlowSeg.load(tmp_path / "x.safetensors")
        again = DinoFlowSeg.load(tmp_path / "x.safetensors")
        assert weights_hash(again) == weights_hash(model)
        features = dino_input(image, [56, 42])
        assert torch.equal(again.network.vit(features), model.network.vit(features))
        assert torch.allclose(again.sample(image), model.sample(image), atol=1e-3)


def test_without_an_encoder_it_is_flowseg(tmp_path):
    torch.manual_seed(0)
    ours = FlowSeg(ModelConfig(5, **SMALL))
    torch.manual_seed(0)
    same = DinoFlowSeg(ModelConfig(5, **SMALL))
    assert weights_hash(ours) == weights_hash(same)
    ours.save(tmp_path / "x.safetensors")
    assert weights_hash(DinoFlowSeg.load(tmp_path / "x.safetensors")) == weights_hash(ours)
    with pytest.raises(CheckpointError, match="another form"):
        encoded(stored(tmp_path, inner=50))


def test_pixnerd_with_an_encoder_starts_as_pixnerd(tmp_path):
    sizes = {"hidden_size": 32, "patch_size": 4, "nerf_depth": 2, "nerf_mlp_ratio": 2, "nerf_width": 8}
    model = encoded(stored(tmp_path), tokens_of="state", **sizes)
    before = weights_hash(model.network.vit)
    source = import_pixnerd(GOLDEN / "pixnerd_tiny.ckpt")
    x = torch.randn(1, model.config.encoding_dims, 16, 16)
    t, image = torch.rand(1), torch.rand(1, 3, 16, 16)
    start_from(model, GOLDEN / "pixnerd_tiny.ckpt")
    with torch.no_grad():
        v, expected = model.velocity(x, t, image)[:, :3], source.velocity(x[:, :3], t, image)
    assert torch.allclose(v, expected, atol=1e-4)
    assert weights_hash(model.network.vit) == before

    model.save(tmp_path / "x.safetensors")  # and one of ours continues as it is
    other = encoded(stored(tmp_path, seed=1), tokens_of="state", **sizes)
    start_from(other, tmp_path / "x.safetensors")
    assert weights_hash(other) == weights_hash(model)


@pytest.mark.slow
def test_the_dry_run_counts_a_frozen_encoder_without_gradient_and_moments():
    rows = {}
    for name in ("vit-s", "vit-b"):
        for finetune in ("false", "true"):
            configs = resolve({"preset": name, "dataset": "ade20k"}, [f"finetune_encoder={finetune}"])
            facts = cost(*configs, 1)["memory of each GPU"]
            rows[name, finetune] = facts["GB of GPU memory"]
            parameters, *_ = counted(configs[1], 128)
            assert facts["parameters"] == parameters
    assert rows["vit-s", "false"] < rows["vit-b", "false"] < 24  # of a GPU with 24 GB, batches of 16 at 512
    assert rows["vit-s", "true"] - rows["vit-s", "false"] > 12e-9 * 22_000_000


@pytest.mark.slow
def test_an_encoder_is_compiled_in_one_graph(tmp_path):
    model = encoded(stored(tmp_path, registers=1), finetune_encoder=True)
    image = torch.rand(2, 3, 32, 48) * 2 - 1
    expected = model.network.encode_image(image)
    compiled = torch.compile(model.network.encode_image, backend="eager", fullgraph=True)(image)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(expected, compiled, strict=True))


def test_an_encoder_is_used_frozen_or_trained_and_said(tmp_path):
    path = stored(tmp_path, registers=2)
    for name, finetune in (("frozen", "false"), ("tuned", "true")):
        settings = (f"encoder={path}", f"finetune_encoder={finetune}", "save_every=2")
        run(tmp_path / name, *settings)
        model = DinoFlowSeg.load(tmp_path / name / "last.safetensors")
        assert model.info.environment["encoder"] == "teacher.pth"
        assert weights_hash(model) == model.info.protocol["weights"]
        start = encoded(path, finetune_encoder=finetune == "true").network.vit
        assert (weights_hash(model.network.vit) == weights_hash(start)) == (finetune == "false")
        state = load_file(tmp_path / name / "state.safetensors")
        assert any("optimizer" in key and ".vit." in key for key in state) == (finetune == "true")


def test_a_preset_for_an_encoder_needs_one(tmp_path):
    with pytest.raises(RunError, match="--encoder"):
        run(tmp_path / "run", preset="vit-s", crop_size=32)
    assert not (tmp_path / "run").exists()
    command = ("train", *QUICK, "--max-steps", 1, "--encoder", "absent.pth")
    fails(flowseg(*command, cwd=tmp_path), 5, "absent.pth", "flowseg download")


# ---------------------------------------------------------------- training


@pytest.fixture(autouse=True)
def _few_scenes(monkeypatch):
    monkeypatch.setattr(ShapesDataset, "__len__", lambda self: 3 if self.split != "training" else 1_000_000)


def run(folder, *settings, console=None, **given):
    given = {"batch_size": 2, "crop_size": 32, "max_steps": 4, "warmup_steps": 1} | given
    configs = resolve(given, [*TINY, *settings])
    return training.train(*configs, folder, "cpu", console or Console(quiet=True))


def test_alignment_is_learned_said_and_not_exported(tmp_path):
    console, path = Console(soft_wrap=True), stored(tmp_path, registers=2)
    with console.capture() as said:
        run(tmp_path / "with", f"teacher={path}", "warmup_steps=5", max_steps=40, console=console)
    assert str(path) in said.get()
    lines = [json.loads(line) for line in (tmp_path / "with" / "metrics.jsonl").read_text().splitlines()]
    values = [line["repa_loss"] for line in lines if "repa_loss" in line]
    assert len(values) == 40
    assert sum(values[-5:]) < 0.7 * sum(values[:5])
    first = lines[0]
    assert first["loss"] > 0.5 * first["repa_loss"] > 0.2  # a part of it

    exported = load_file(tmp_path / "with" / "last.safetensors")
    with console.capture() as said:
        run(tmp_path / "without", max_steps=1, console=console)
    assert "aligned" not in said.get()
    assert exported.keys() == load_file(tmp_path / "without" / "last.safetensors").keys()
    model = FlowSeg.load(tmp_path / "with" / "last.safetensors")
    assert weights_hash(model) == model.info.protocol["weights"]
    state = load_file(tmp_path / "with" / "state.safetensors")
    projector = {name for name in state if name.startswith("alignment.projector")}
    assert len(projector) == 6
    assert {name for name in state if "alignment" in name and not name.startswith("optimizer")} == projector
    assert "optimizer.alignment.projector.4.bias.exp_avg" in state


def test_weight_zero_trains_as_without_a_teacher(tmp_path):
    run(tmp_path / "zero", f"teacher={stored(tmp_path)}", "repa_weight=0", "grad_clip=1e9")
    run(tmp_path / "without", "grad_clip=1e9")
    zero, without = (load_file(tmp_path / name / "last.safetensors") for name in ("zero", "without"))
    assert all(torch.equal(zero[name], without[name]) for name in without)


@pytest.mark.parametrize("settings", [
    pytest.param(("teacher={}",), marks=pytest.mark.slow),
    ("teacher={}", "grad_accum_steps=2", "dtype=bfloat16"),
    pytest.param(("encoder={}", "finetune_encoder=true"), marks=pytest.mark.slow),
    ("encoder={0}", "teacher={0}"),
], ids=str)  # fmt: skip
def test_an_interrupted_run_continues_bit_for_bit(tmp_path, monkeypatch, settings):
    path = stored(tmp_path)
    settings = (*(setting.format(path) for setting in settings), "save_every=2")
    run(tmp_path / "whole", *settings)
    real, calls = training.backward, []

    def stop_at_third(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(training, "backward", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", *settings)
    run(tmp_path / "parts", *settings)
    assert len(calls) == 3 + 2  # from step 2
    for name in ("last", "state"):
        whole, parts = (load_file(tmp_path / part / f"{name}.safetensors") for part in ("whole", "parts"))
        assert whole.keys() == parts.keys()
        assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_micro_batches_add_up_to_the_batch(tmp_path):
    path, gradients = stored(tmp_path), []
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 5, (4, 32, 32), generator=generator, dtype=torch.uint8)
    labels[2:, 5:] = 255  # the parts hold unequal numbers of labelled pixels, but of tokens
    for parts in (1, 2):
        objective = training.Objective(*aligned(path)[:2])
        split = [(i, y, None) for i, y in zip(images.chunk(parts), labels.chunk(parts), strict=True)]
        own = noise_generators(TrainConfig(batch_size=4), 0)
        totals = training.backward(objective, split, own, False, torch.device("cpu"))
        assert not any(value.requires_grad for value in totals.values())
        gradients.append([totals["loss"], totals["repa_loss"], *(p.grad for p in objective.parameters())])
    assert gradients[0][1] > 0.1
    for whole, summed in zip(*gradients, strict=True):
        assert torch.allclose(whole, summed, rtol=1e-4, atol=1e-5 * float(whole.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("settings", [
    (), ("grad_accum_steps=2",), ("encoder={}",), ("encoder={}", "finetune_encoder=true"),
], ids=str)  # fmt: skip
def test_two_processes_with_a_teacher_are_one(tmp_path, settings):
    path = stored(tmp_path)
    settings = (*(setting.format(path) for setting in settings), f"teacher={path}")
    test_runs.run(tmp_path / "one", *settings)
    done = test_runs.torchrun(tmp_path / "two", *settings)
    assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / name / "state.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for key in one:
        assert torch.allclose(one[key], two[key], rtol=1e-3, atol=2e-5), key
    logs = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "two")]
    values = [[line["repa_loss"] for line in map(json.loads, log) if "repa_loss" in line] for log in logs]
    assert len(values[0]) == 4
    assert values[0] == pytest.approx(values[1], rel=1e-3)


def test_the_projector_is_the_same_whatever_the_weights_were_read_from(tmp_path):
    """Reading one format may draw random numbers, reading the other not."""
    public = GOLDEN / "pixnerd_tiny.ckpt"
    ours = tmp_path / "ours.safetensors"
    import_pixnerd(public).save(ours)
    sizes = "patch_size=4", "hidden_size=32", "nerf_depth=2", "nerf_mlp_ratio=2"
    for name, file in (("first", public), ("second", ours)):
        run(tmp_path / name, *sizes, f"teacher={stored(tmp_path)}", f"init={file}")
    first, second = (load_file(tmp_path / name / "state.safetensors") for name in ("first", "second"))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_mistakes_are_named_on_the_command_line(tmp_path):
    (tmp_path / "bad.pth").write_bytes((GOLDEN / "dinov2_tiny.pth").read_bytes()[:-10])
    command = "train", *QUICK, "--max-steps", 1, "--set", "teacher=bad.pth"
    fails(flowseg(*command, cwd=tmp_path), 5, "bad.pth is no DINOv2 ViT-S, B or L, or damaged")
    assert [file.name for file in tmp_path.iterdir()] == ["bad.pth"]  # and no run
    with pytest.raises(RunError, match="repa_depth is 0; expected"):
        resolve({}, ["repa_depth=0"])
