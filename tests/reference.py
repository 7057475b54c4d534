"""PixNerd written down plainly: what the fast network is checked against and timed against.

The arithmetic in the order it is described in (arXiv 2507.23268; the image path is ours): patches by unfold,
explicit softmax attention, rotary embedding by complex numbers, weights normalised as written, nothing
computed ahead. Only the parameters are `Network`'s, so a state can be copied from one to the other.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from network import Attention, Block, Features, FieldBlock, Network, RMSNorm, SwiGLU


def normed(norm: RMSNorm, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * norm.weight


def unfolded(x: Tensor, size: int) -> Tensor:
    """(B, C, H, W) -> (B, L, C P P), channel-major."""
    return F.unfold(x, size, stride=size).transpose(1, 2)


def of_pixels(cells: Tensor, channels: int) -> Tensor:
    """(B, L, C P P) -> (B L, P P, C)."""
    return cells.flatten(0, 1).unflatten(1, (channels, -1)).transpose(1, 2)


def rotation(height: int, width: int, head_dim: int) -> Tensor:
    """Complex (L, h / 2): per frequency the turn by x, then the turn by y."""
    frequency = 1 / 10000 ** (torch.arange(0, head_dim, 4).float() / head_dim)
    y, x = torch.meshgrid(torch.linspace(0, 16, height), torch.linspace(0, 16, width), indexing="ij")
    angle = torch.stack([torch.outer(x.flatten(), frequency), torch.outer(y.flatten(), frequency)], dim=-1)
    return torch.polar(torch.ones_like(angle), angle).flatten(1)


def turned(x: Tensor, turn: Tensor) -> Tensor:
    """x (B, L, heads, h) times turn (L, h / 2), pairs of x read as complex numbers."""
    z = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(z * turn[:, None]).flatten(-2)


def attended(attention: Attention, x: Tensor, turn: Tensor) -> Tensor:
    B, L, D = x.shape
    q, k, v = attention.qkv(x).view(B, L, 3, attention.heads, -1).unbind(2)  # (B, L, heads, h)
    q, k = turned(normed(attention.q_norm, q), turn), turned(normed(attention.k_norm, k), turn)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, L, h)
    share = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1)  # (B, heads, L, L)
    return attention.proj((share @ v).transpose(1, 2).reshape(B, L, D))


def fed(mlp: SwiGLU, x: Tensor) -> Tensor:
    return mlp.w2(F.silu(mlp.w1(x)) * mlp.w3(x))


def transformed(block: Block, x: Tensor, c: Tensor, turn: Tensor) -> Tensor:
    shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(c).unsqueeze(1).chunk(6, dim=-1)
    x = x + gate1 * attended(block.attn, normed(block.norm1, x) * (1 + scale1) + shift1, turn)
    return x + gate2 * fed(block.mlp, normed(block.norm2, x) * (1 + scale2) + shift2)


def painted(block: FieldBlock, q: Tensor, s: Tensor) -> Tensor:
    width = q.shape[-1]
    w1, w2 = block.generator(s).chunk(2, dim=-1)
    w1, w2 = w1.reshape(len(q), width, -1), w2.reshape(len(q), -1, width)
    w1 = w1 / w1.norm(dim=1, keepdim=True).clamp_min(1e-12)
    w2 = w2 / w2.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return q + torch.bmm(F.silu(torch.bmm(normed(block.norm, q), w1)), w2)


def cosines(size: int) -> Tensor:
    """(P P, 64), rows by y then x, columns by the frequency in x then in y."""
    f = torch.linspace(0, 8, 8)
    y, x, fx, fy = torch.meshgrid(torch.linspace(0, 1, size), torch.linspace(0, 1, size), f, f, indexing="ij")
    return (torch.cos(math.pi * fx * x) * torch.cos(math.pi * fy * y) / (1 + fx * fy)).view(-1, 64)


class Reference(Network):
    """The same function as `Network` of the same state."""

    def encode(self, image: Tensor) -> Features:
        P, D = self.config.patch_size, image.shape[1]
        pixels, coarse = image, unfolded(image, P)
        if self.encoder:
            fine, coarse = self.encoder(image)
            coarse = coarse.flatten(2).transpose(1, 2)
            pixels = torch.cat([image, F.interpolate(fine, scale_factor=2, mode="bilinear")], dim=1)
            D = pixels.shape[1]
        query = of_pixels(unfolded(pixels, P), D)
        return self.image_to_token(coarse), self.image_to_pixel(query), self.image_to_velocity(query)

    def forward(self, x: Tensor, t: Tensor, features: Features) -> Tensor:
        B, C, H, W = x.shape
        P = self.config.patch_size
        image_tokens, image_query, image_velocity = features
        angle = t[:, None] * torch.exp(-math.log(10) * torch.arange(128) / 128)
        time = self.time_mlp(torch.cat([angle.cos(), angle.sin()], dim=-1))
        condition = F.silu(time + self.no_class)
        turn = rotation(H // P, W // P, self.config.hidden // self.config.heads)

        cells = unfolded(x, P)
        tokens = self.patch_embed(cells) + image_tokens
        for block in self.blocks:
            tokens = transformed(block, tokens, condition, turn)

        s = F.silu(time[:, None] + tokens).flatten(0, 1)  # (B L, D)
        pixels = of_pixels(cells, C)
        q = (
            self.pixel_embed(torch.cat([pixels, cosines(P).expand(len(pixels), -1, -1)], dim=-1))
            + image_query
        )
        for block in self.field:
            q = painted(block, q, s)
        out = self.head(normed(self.head_norm, q)) + image_velocity  # (B L, P P, C)
        out = out.transpose(1, 2).reshape(B, -1, C * P * P).transpose(1, 2)  # (B, C P P, L)
        return F.fold(out, (H, W), P, stride=P)
