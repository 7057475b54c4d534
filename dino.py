"""The frozen DINOv2 teacher (arXiv 2304.07193) and representation alignment with it (REPA, arXiv 2410.06940).

A vision transformer trained without labels sees the clean image, and a small MLP has to read from our tokens
what it sees in their place. Its modules carry the names of the public files, which are read as they are.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mode

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from network import CheckpointError, faults


@contextmanager
def public_file(path: str | Path, kind: str) -> Iterator[dict]:
    """What a public `.pth` or `.ckpt` holds, mapped; nothing in it is run. An error while it is made use of
    becomes a CheckpointError."""
    try:
        yield torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # foreign bytes make torch.load raise anything at all
        text = str(error).partition("WeightsUnpickler error:")[2] or str(error) or repr(error)
        reason = text.strip().splitlines()[0].split(". ")[0]
        raise CheckpointError(f"{path} is no {kind}, or damaged ({reason}); download it again") from error


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
    """Images (B, 3, H, W) as `teacher_input` makes them -> tokens (B, L, D), one a patch; always frozen."""

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

    def train(self, training: bool = True) -> "DinoV2":
        return super().train(False)


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
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.numel()}
        if listed := faults(weights, shapes):
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
