"""PixNerd with an image path: the network behind FlowSeg's velocity (arXiv 2507.23268).

A transformer reads the state x_t in patches of P x P; each of its tokens then writes the weights of a small
neural field that paints the pixels of its own patch. What the image contributes does not depend on x_t or t,
so it is computed once (`encode`) and reused by all steps of the flow.

Shapes: B images, L = H/P W/P tokens of width D, P P pixels a token, width Dx inside the neural field.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Config:
    """Everything that determines the network and the flow; stored in every checkpoint."""

    num_classes: int
    # Network: the defaults are the preset `tiny`
    patch_size: int = 8  # P
    hidden: int = 128  # D, width of a token
    depth: int = 2  # transformer blocks
    heads: int = 4
    field_depth: int = 1  # neural-field blocks
    field_width: int = 32  # Dx, width of a pixel inside the neural field
    field_ratio: int = 1  # r, expansion inside a neural-field block
    conv_width: int = 32  # channels of the convolutional image encoder; 0: the image enters as raw pixels
    # Flow: the defaults are the method, the other values its ablations
    dims: int = 16  # channels of the state = dimension of the centroids
    encoding: str = "kronecker"  # | coded: see train.resolve
    objective: str = "reshaped"  # | vanilla: without the potential's gradient
    eps: float = 1e-2
    tau: float = 0.1
    steps: int = 4  # Euler steps when the caller gives none

    def __post_init__(self):
        most = 19 if self.encoding == "coded" else 255  # 2^(dims - 3) words are tried
        halves = self.patch_size > 1 and self.patch_size & (self.patch_size - 1) == 0  # down to one pixel
        rules = {
            "num_classes": (self.num_classes >= 2, "at least 2"),
            "patch_size": (self.patch_size > 0 and (halves or not self.conv_width), "a power of two"),
            "heads": (self.heads > 0, "at least 1"),
            "hidden": (self.hidden % (4 * self.heads or 1) == 0, f"a multiple of 4 x {self.heads} heads"),
            "field_width": (self.field_width > 0, "at least 1"),
            "conv_width": (self.conv_width >= 0 and self.conv_width % 8 == 0, "a multiple of 8, or 0"),
            "encoding": (self.encoding in ("kronecker", "coded"), "kronecker or coded"),
            "dims": (3 <= self.dims <= most, f"3-{most} with encoding {self.encoding}"),
            "objective": (self.objective in ("reshaped", "vanilla"), "reshaped or vanilla"),
            "eps": (self.eps > 0, "a positive number"),
            "tau": (self.tau > 0, "a positive number"),
        }
        for name, (holds, expected) in rules.items():
            if not holds:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected {expected}")


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight over the last dimension, in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


def rotary(height: int, width: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine (L, head_dim / 2) of the 2-D rotary embedding; positions span [0, 16] on any grid."""
    frequency = 10000 ** -(torch.arange(0, head_dim, 4, device=device) / head_dim)
    x = torch.linspace(0, 16, width, device=device).repeat(height)  # (L,)
    y = torch.linspace(0, 16, height, device=device).repeat_interleave(width)  # (L,)
    angle = torch.stack([x[:, None] * frequency, y[:, None] * frequency], dim=-1)  # (L, h/4, 2)
    return angle.flatten(1).cos(), angle.flatten(1).sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn interleaved pairs of the last dimension: x (B, heads, L, h), cos and sin (L, h / 2)."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, hidden: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.q_norm = RMSNorm(hidden // heads, eps=1e-6)
        self.k_norm = RMSNorm(hidden // heads, eps=1e-6)
        self.proj = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, L, h)
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    def __init__(self, hidden: int):
        super().__init__()
        inner = int(2 / 3 * 4 * hidden)
        self.w1 = nn.Linear(hidden, inner, bias=False)
        self.w2 = nn.Linear(inner, hidden, bias=False)
        self.w3 = nn.Linear(hidden, inner, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """Transformer block whose norms are shifted, scaled and gated by the condition c (adaLN)."""

    def __init__(self, hidden: int, heads: int):
        super().__init__()
        self.norm1 = RMSNorm(hidden, eps=1e-6)
        self.attn = Attention(hidden, heads)
        self.norm2 = RMSNorm(hidden, eps=1e-6)
        self.mlp = SwiGLU(hidden)
        self.modulation = nn.Linear(hidden, 6 * hidden)

    def forward(self, x: Tensor, c: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)[:, None].chunk(6, -1)  # (B, 1, D)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, cos, sin)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class FieldBlock(nn.Module):
    """Residual MLP over the pixels of a patch, whose two weight matrices the patch's token generates."""

    def __init__(self, hidden: int, width: int, ratio: int):
        super().__init__()
        self.norm = RMSNorm(width, eps=1e-6)
        self.generator = nn.Linear(hidden, 2 * width * ratio * width)

    def forward(self, q: Tensor, weights: Tensor) -> Tensor:
        w1, w2 = weights.chunk(2, dim=-1)  # (n, Dx r Dx), which the generator made of n tokens
        w1 = F.normalize(w1.unflatten(-1, (q.shape[-1], -1)), dim=-2)  # unit norm along the input
        w2 = F.normalize(w2.unflatten(-1, (-1, q.shape[-1])), dim=-2)
        return q + F.silu(self.norm(q) @ w1) @ w2  # (n, P P, Dx)


def conv_block(channels_in: int, channels: int, stride: int = 1) -> nn.Sequential:
    """Two 3 x 3 convolutions, each with group norm and SiLU."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False), nn.GroupNorm(8, channels), nn.SiLU(),
        nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.GroupNorm(8, channels), nn.SiLU(),
    )  # fmt: skip


CHUNK = 2**19  # activations of the tokens that paint at a time on a CPU: two megabytes stay in its cache
Features = tuple[Tensor, Tensor, Tensor]  # (B, L, D), (B L, P P, Dx), (B L, P P, dims): see Network.encode


class ImageEncoder(nn.Module):
    """Convolutional pyramid with a top-down path, run once per image and reused by every step of the flow.

    (B, 3, H, W) -> its finest level (B, widths[0], H/stride, W/stride) and its coarsest one.
    """

    def __init__(self, widths: Sequence[int], stride: int = 2):
        super().__init__()
        self.down = nn.ModuleList([conv_block(3, widths[0], stride)])
        self.down.extend(conv_block(i, o, stride=2) for i, o in pairwise(widths))
        self.up = nn.ModuleList(conv_block(i + o, i) for i, o in pairwise(widths))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        skips, x = [], image
        for block in self.down:
            skips.append(x := block(x))
        for block, skip in zip(reversed(self.up), reversed(skips[:-1]), strict=True):
            x = block(torch.cat([F.interpolate(x, size=skip.shape[-2:], mode="bilinear"), skip], dim=1))
        return x, skips[-1]


def patches(x: Tensor, size: int) -> Tensor:
    """(B, C, H, W) -> (B, L, C, P, P), patches in row-major order."""
    return x.unflatten(3, (-1, size)).unflatten(2, (-1, size)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def dct(size: int, device: torch.device, frequencies: int = 8) -> Tensor:
    """Cosine basis (P P, 64) of the pixel positions in a patch: cos(pi fx px) cos(pi fy py) / (1 + fx fy)."""
    p = torch.linspace(0, 1, size, device=device)
    f = torch.linspace(0, frequencies, frequencies, device=device)
    wave = (math.pi * p[:, None] * f).cos()  # (P, 8)
    basis = wave[None, :, :, None] * wave[:, None, None, :] / (1 + f[:, None] * f)  # (py, px, fx, fy)
    return basis.flatten(2).flatten(0, 1)


class Network(nn.Module):
    """PixNerd: a transformer over patches whose tokens each write a neural field for their own pixels.

    `encode` reads the image once; `forward` maps x_t and t to the velocity, given what `encode` returned.
    """

    def __init__(self, config: Config):
        super().__init__()
        c, p = config, config.patch_size
        self.config = c
        self.recompute = False  # blocks and neural field again in the backward pass: keeps far less
        self.patch_embed = nn.Linear(c.dims * p * p, c.hidden)
        self.time_mlp = nn.Sequential(nn.Linear(256, c.hidden), nn.SiLU(), nn.Linear(c.hidden, c.hidden))
        self.no_class = nn.Parameter(torch.zeros(c.hidden))
        self.blocks = nn.ModuleList(Block(c.hidden, c.heads) for _ in range(c.depth))
        self.pixel_embed = nn.Linear(c.dims + 64, c.field_width)  # [x_t(i, j), DCT(i, j)]
        field = c.hidden, c.field_width, c.field_ratio
        self.field = nn.ModuleList(FieldBlock(*field) for _ in range(c.field_depth))
        self.head_norm = RMSNorm(c.field_width, eps=1e-6)
        self.head = nn.Linear(c.field_width, c.dims)

        widths = [c.conv_width * min(2**i, 4) for i in range(int(math.log2(p)))]  # strides 2, 4, .., P
        self.encoder = ImageEncoder(widths) if c.conv_width else None
        pixel_channels, token_channels = (widths[0], widths[-1]) if c.conv_width else (0, 3 * p * p)
        self.image_to_token = nn.Linear(token_channels, c.hidden, bias=False)
        self.image_to_pixel = nn.Linear(3 + pixel_channels, c.field_width, bias=False)
        self.image_to_velocity = nn.Linear(3 + pixel_channels, c.dims, bias=False)  # past the head's norm
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for block in self.blocks:
            nn.init.zeros_(block.modulation.weight)
        nn.init.zeros_(self.head.weight)

    def encode(self, image: Tensor) -> Features:
        """What the image adds in every step: to tokens, to pixel queries and to the velocity itself."""
        p = self.config.patch_size
        pixels, coarse = image, patches(image, p).flatten(2)  # coarse: (B, L, channels)
        if self.encoder:
            fine, coarse = self.encoder(image)
            coarse = coarse.flatten(2).transpose(1, 2)
            pixels = torch.cat([image, F.interpolate(fine, scale_factor=2, mode="bilinear")], dim=1)
        query = patches(pixels, p).flatten(0, 1).flatten(2).transpose(1, 2)  # (B L, P P, 3 + C)
        position = dct(p, image.device) @ self.pixel_embed.weight[:, self.config.dims :].T
        tokens, velocity = self.image_to_token(coarse), self.image_to_velocity(query)
        return tokens, self.image_to_pixel(query) + position, velocity

    def time(self, t: Tensor) -> Tensor:
        """Embedding (B, D) of t (B,) in [0, 1], in float32 also under autocast."""
        frequency = torch.exp(-math.log(10) / 128 * torch.arange(128, device=t.device))
        angle = t.float()[:, None] * frequency
        with torch.autocast(t.device.type, enabled=False):
            return self.time_mlp(torch.cat([angle.cos(), angle.sin()], dim=-1))

    def forward(self, x: Tensor, t: Tensor, features: Features) -> Tensor:
        """x: (B, dims, H, W), t: (B,) in [0, 1] -> velocity, as x, float32."""
        B, C, H, W = x.shape
        p = self.config.patch_size
        h, w = H // p, W // p
        image_tokens, image_query, image_velocity = features
        cells = patches(x, p)  # (B, L, C, P, P)
        time = self.time(t)[:, None]  # (B, 1, D)
        run = partial(checkpoint, use_reentrant=False) if self.recompute else lambda part, *a: part(*a)

        tokens = self.patch_embed(cells.flatten(2)) + image_tokens  # (B, L, D)
        condition = F.silu(time[:, 0] + self.no_class)
        cos, sin = rotary(h, w, self.config.hidden // self.config.heads, x.device)
        for block in self.blocks:
            tokens = run(block, tokens, condition, cos, sin)

        s = F.silu(time + tokens).flatten(0, 1)  # (B L, D)
        pixels = cells.flatten(0, 1).flatten(2).transpose(1, 2)  # (B L, P P, C)
        weights = [block.generator(s) for block in self.field]  # (B L, 2 Dx r Dx) each
        chunk = max(1, CHUNK // (p * p * self.config.field_ratio * self.config.field_width))
        chunk = chunk if x.device.type == "cpu" and not torch.compiler.is_compiling() else len(s)
        parts = zip(*(a.split(chunk) for a in (pixels, image_query, image_velocity, *weights)), strict=True)
        out = torch.cat([run(self.paint, *part) for part in parts]).float()  # (B L, P P, C)
        return out.view(B, h, w, p, p, C).permute(0, 5, 1, 3, 2, 4).reshape(B, C, H, W)

    def paint(self, x: Tensor, query: Tensor, velocity: Tensor, *weights: Tensor) -> Tensor:
        """The neural fields of n tokens: pixels x (n, P P, C) and the image's part -> (n, P P, C)."""
        q = F.linear(x, self.pixel_embed.weight[:, : x.shape[-1]], self.pixel_embed.bias) + query
        for block, generated in zip(self.field, weights, strict=True):
            q = block(q, generated)
        return self.head(self.head_norm(q)) + velocity
