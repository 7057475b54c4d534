"""Public weights: those of PixNerd (arXiv 2507.23268), to start from, and of the frozen teacher DINOv2
(arXiv 2304.07193) with what it is for, representation alignment (REPA, arXiv 2410.06940): a small MLP has to
read from our tokens what the teacher sees in their place in the clean image.

Nothing in a foreign file is run, and every key, shape and value in it is checked. The weights stay in the
file, uncopied, until they are used.
"""

import math
import re
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mode

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from network import Config, Network

PIXNERD = tomllib.loads((Path(__file__).parent / "flowseg_data/pixnerd.toml").read_text())


class CheckpointError(Exception):
    """A weights file that cannot be used; the message is one line and says what to do."""

    exit_code = 5


@contextmanager
def public_file(path: str | Path, kind: str) -> Iterator[dict]:
    """What a public `.pth` or `.ckpt` holds. An error while it is made use of becomes a CheckpointError."""
    try:
        yield torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # foreign bytes make torch.load raise anything at all
        text = str(error).partition("WeightsUnpickler error:")[2] or str(error) or repr(error)
        reason = text.strip().splitlines()[0].split(". ")[0]
        raise CheckpointError(f"{path} is no {kind}, or damaged ({reason}); download it again") from error


def faults(found: dict[str, Tensor], expected: dict[str, Tensor]) -> str:
    """How many tensors are missing, unknown, of another shape or not finite, and the first; or nothing."""
    shapes, given = {key: tuple(value.shape) for key, value in expected.items()}, {}
    for key, value in found.items():
        finite = torch.stack(value.aminmax()).isfinite().all()  # takes no memory, as isfinite alone would
        given[key] = tuple(value.shape) if finite else "not finite"
    wrong = [f"{key} is {given.get(key, 'missing')}, expected {shapes.get(key, 'nothing')}"
             for key in shapes | given if given.get(key) != shapes.get(key)]  # fmt: skip
    return f"{len(wrong)} faults: " + "; ".join(wrong[:3] + [".."] * (len(wrong) > 3)) if wrong else ""


def read_pixnerd(path: str | Path) -> Network:
    """The EMA network of a public checkpoint. Its image path is zero; of the class table it has the last row,
    "no class"."""
    with public_file(path, "PixNerd checkpoint") as file:
        skipped = "denoiser.", "diffusion_trainer."  # the weights that the EMA follows, and what trained them
        found = {key: value for key, value in file["state_dict"].items() if not key.startswith(skipped)}
        config = pixnerd_config({key: value.shape for key, value in found.items()})
        with torch.device("meta"):  # shapes without values
            network = Network(config)
        ours = network.state_dict()
        names = {name: pixnerd_name(name, config.depth) for name in ours if not name.startswith("image_to")}
        table, expected = names["no_class"], {key: ours[name] for name, key in names.items()}
        expected[table] = ours["no_class"].expand(len(found.get(table, "1")), -1)  # any number of classes
        if listed := faults(found, expected):
            raise ValueError(listed)
        weights = {name: found[key].float() for name, key in names.items()}
        weights |= {name: torch.zeros(value.shape) for name, value in ours.items() if name not in names}
        network.load_state_dict(weights | {"no_class": weights["no_class"][-1].clone()}, assign=True)
    return network


def pixnerd_name(name: str, depth: int) -> str:
    """What a public checkpoint with `depth` transformer blocks calls a parameter of ours."""
    name = re.sub(r"^field\.(\d+)", lambda match: f"blocks.{depth + int(match[1])}", name)
    return ".".join(["ema_denoiser", *(PIXNERD.get(part, part) for part in name.split("."))])


def pixnerd_config(shapes: dict[str, torch.Size]) -> Config:
    """The configuration that a public checkpoint's shapes tell. What most of them say counts, so that a
    single missing or wrong tensor is found to be just that."""

    def size(name: str, axis: int = 0) -> int:
        return mode([s[axis] for key, s in shapes.items() if re.search(name, key) and len(s) > axis] or [4])

    blocks = [*dict(re.findall(r"\bblocks\.(\d+)\.(attn|param_generator)", " ".join(shapes))).values()]
    hidden, width = size(r"(qkv|w1|w3)\.weight", 1), size(r"x_embedder|final_layer\.norm")
    return Config(
        num_classes=2, dims=3, conv_width=0, patch_size=math.isqrt(size(r"s_embedder\.proj\.weight", 1) // 3),
        hidden=hidden, depth=blocks.count("attn"), heads=hidden // size("[qk]_norm"), field_width=width,
        field_depth=blocks.count("param_generator"), field_ratio=size("param_generator") // (2 * width**2),
    )  # fmt: skip


def widened(source: Network, target: Network) -> dict[str, Tensor]:
    """The weights of `source`, which fit `target` even if that has more state channels or an image encoder.

    What is new gets weight zero, so the velocity stays the same; a source that sees the image is left as is.
    """
    weights, own = source.state_dict(), target.state_dict()
    if any(value.any() for name, value in weights.items() if name.startswith("image_to")):
        return weights
    dims, area = source.config.dims, target.config.patch_size**2
    more = max(0, target.config.dims - dims)
    state, positions = weights["pixel_embed.weight"].split([dims, 64], dim=1)
    weights["pixel_embed.weight"] = torch.cat([F.pad(state, (0, more)), positions], dim=1)
    weights["patch_embed.weight"] = F.pad(weights["patch_embed.weight"], (0, more * area))
    weights["head.weight"] = F.pad(weights["head.weight"], (0, 0, 0, more))
    weights["head.bias"] = F.pad(weights["head.bias"], (0, more))
    weights |= {name: torch.zeros_like(value) for name, value in own.items() if name.startswith("image_to")}
    return weights | {name: value for name, value in own.items() if name.startswith("encoder")}


class Block(nn.Module):
    """Transformer block, norms first; LayerScale (ls1, ls2) weighs the channels of what it adds."""

    def __init__(self, width: int, inner: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.ls1 = nn.ParameterDict({"gamma": torch.ones(width)})
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, inner), "fc2": nn.Linear(inner, width)})
        self.ls2 = nn.ParameterDict({"gamma": torch.ones(width)})

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attn.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.ls1.gamma * self.attn.proj(attended)
        return x + self.ls2.gamma * self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))


class DinoV2(nn.Module):
    """Images (B, 3, H, W) as `teacher_input` makes them -> tokens (B, L, D), one a patch; frozen."""

    def __init__(self, width: int, depth: int, heads: int, inner: int, patch: int, grid: int, registers: int):
        super().__init__()
        self.patch_size, self.grid = patch, grid
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid**2, width))
        self.blocks = nn.Sequential(*(Block(width, inner, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        if any(side % self.patch_size for side in images.shape[2:]):
            raise ValueError(f"images are {tuple(images.shape)}; expected multiples of {self.patch_size} px")
        x, grid = self.patch_embed.proj(images), self.grid  # (B, D, h, w)
        position = self.pos_embed[:, 1:].unflatten(1, (grid, grid)).movedim(-1, 1)  # (1, D, grid, grid)
        if x.shape[2:] != position.shape[2:]:  # at h + 0.1 cells, as the public weights were used
            scale = [(side + 0.1) / grid for side in x.shape[2:]]
            position = F.interpolate(position, scale_factor=scale, mode="bicubic")
        x = (x + position).flatten(2).transpose(1, 2)  # (B, L, D)
        first = torch.cat([self.cls_token + self.pos_embed[:, :1], self.register_tokens], dim=1)
        x = torch.cat([first.expand(len(x), -1, -1), x], dim=1)
        return self.norm(self.blocks(x))[:, first.shape[1] :]


def load_dinov2(path: str | Path, num_heads: int | None = None) -> DinoV2:
    """The frozen teacher from a public `.pth` (ViT-S, B or L, with registers or without); CheckpointError.

    All sizes follow from the weights but num_heads: 64 channels each as in S, B and L, 16 in smaller models.
    """
    with public_file(path, "DINOv2 ViT-S, B or L") as weights:
        weights.pop("mask_token", None)  # of pre-training
        width = mode(w.shape[-1] for w in weights.values() if torch.is_tensor(w) and w.ndim)
        depth = max(1, len({name.split(".")[1] for name in weights if name.startswith("blocks.")}))
        inner = mode([*(b.numel() for name, b in weights.items() if name.endswith("fc1.bias")), 4 * width])
        patch = math.isqrt(weights["patch_embed.proj.weight"].numel() // (3 * width))
        grid = math.isqrt(weights["pos_embed"].numel() // width)
        registers = weights["register_tokens"].numel() // width if "register_tokens" in weights else 0
        heads = num_heads or max(1, width // (64 if width >= 384 else 16))
        if width % heads:
            raise ValueError(f"its width {width} is not a multiple of {heads} heads: pass num_heads")
        with torch.device("meta"):
            model = DinoV2(width, depth, heads, inner, patch, grid, registers)
        if listed := faults(weights, {name: p for name, p in model.named_parameters() if p.numel()}):
            raise ValueError(listed)
        model.load_state_dict({"register_tokens": torch.zeros(1, 0, width)} | weights, assign=True)
    return model.float().requires_grad_(False).eval()


def teacher_input(image: Tensor, patch_size: int, teacher_patch: int = 14) -> Tensor:
    """Images in [-1, 1], normalised as ImageNet's and so large that the teacher's patches are ours."""
    mean, std = image.new_tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    size = [side * teacher_patch // patch_size for side in image.shape[2:]]
    return F.interpolate(((image + 1) / 2 - mean) / std, size=size, mode="bicubic")


class Alignment(nn.Module):
    """REPA: what an MLP reads from the tokens after a block of the network, against those of the teacher.

    The tokens are those of the latest pass, in FlowSeg.loss the one at a uniform t: the choice of REPA, with
    t = 0 as its limit. A hook takes them, so the network need not know.
    """

    def __init__(self, network: nn.Module, path: str, depth: int, weight: float):
        super().__init__()
        hidden, device = network.config.hidden, network.no_class.device
        teacher = load_dinov2(path).to(device)
        width = teacher.norm.weight.numel()
        self.teacher = (teacher,)  # a tuple hides it: it is neither trained nor saved
        self.patch_size, self.weight = network.config.patch_size, weight
        layers = [f for i in (hidden, width, width) for f in (nn.Linear(i, width), nn.SiLU())]
        self.projector = nn.Sequential(*layers[:-1]).to(device)
        network.blocks[min(depth, len(network.blocks)) - 1].register_forward_hook(self.note)

    def note(self, block: nn.Module, inputs: tuple, tokens: Tensor) -> None:
        self.tokens = tokens

    def forward(self, image: Tensor) -> Tensor:
        """Mean of 1 - cosine over the tokens of images (B, 3, H, W) in [-1, 1] that the network just saw."""
        (teacher,) = self.teacher
        seen = teacher(teacher_input(image, self.patch_size, teacher.patch_size)).float()
        return 1 - F.cosine_similarity(self.projector(self.tokens).float(), seen, dim=-1).mean()
