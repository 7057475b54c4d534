"""PixNerd written down plainly: the fast network is checked against it and timed against it.

The arithmetic is in the order of the paper (arXiv 2507.23268; the image path is ours): patches by unfold,
explicit softmax attention, rotary embedding by complex numbers, weights normalised as written, and nothing
computed ahead. The parameters are those of `Network`, so a state can be copied from one to the other.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from model import Attention, Block, Features, NerfBlock, Network, RMSNorm, SwiGLU


def rms_norm(norm: RMSNorm, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * norm.weight


def unfold(x: Tensor, size: int) -> Tensor:
    """(B, C, H, W) -> (B, L, C P P), channel-major."""
    return F.unfold(x, size, stride=size).transpose(1, 2)


def pixels_of(cells: Tensor, channels: int) -> Tensor:
    """(B, L, C P P) -> (B L, P P, C)."""
    return cells.flatten(0, 1).unflatten(1, (channels, -1)).transpose(1, 2)


def rotation(height: int, width: int, head_dim: int) -> Tensor:
    """Complex (L, h / 2): for every frequency the rotation by x, then the rotation by y."""
    frequency = 1 / 10000 ** (torch.arange(0, head_dim, 4).float() / head_dim)
    y, x = torch.meshgrid(torch.linspace(0, 16, height), torch.linspace(0, 16, width), indexing="ij")
    angle_x = torch.outer(x.flatten(), frequency)  # (L, h / 4)
    angle_y = torch.outer(y.flatten(), frequency)
    angle = torch.stack([angle_x, angle_y], dim=-1)
    return torch.polar(torch.ones_like(angle), angle).flatten(1)


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """x (B, L, heads, h) times turn (L, h / 2), where pairs of x are read as complex numbers."""
    z = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(z * turn[:, None]).flatten(-2)


def attend(attention: Attention, x: Tensor, turn: Tensor) -> Tensor:
    """Softmax attention over the tokens x (B, L, D)."""
    B, L, D = x.shape
    qkv = attention.qkv(x).view(B, L, 3, attention.num_heads, -1)
    q, k, v = qkv.unbind(2)  # (B, L, heads, h) each
    q = rotate(rms_norm(attention.q_norm, q), turn).transpose(1, 2)  # (B, heads, L, h)
    k = rotate(rms_norm(attention.k_norm, k), turn).transpose(1, 2)
    v = v.transpose(1, 2)
    share = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1)  # (B, heads, L, L)
    return attention.proj((share @ v).transpose(1, 2).reshape(B, L, D))


def feed_forward(mlp: SwiGLU, x: Tensor) -> Tensor:
    return mlp.w2(F.silu(mlp.w1(x)) * mlp.w3(x))


def transform(block: Block, x: Tensor, c: Tensor, turn: Tensor) -> Tensor:
    """One transformer block: tokens x (B, L, D), condition c (B, D)."""
    shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(c).unsqueeze(1).chunk(6, dim=-1)
    x = x + gate1 * attend(block.attn, rms_norm(block.norm1, x) * (1 + scale1) + shift1, turn)
    return x + gate2 * feed_forward(block.mlp, rms_norm(block.norm2, x) * (1 + scale2) + shift2)


def render(block: NerfBlock, q: Tensor, s: Tensor) -> Tensor:
    """One block of the neural field: pixels q (n, P P, Dx) of the patches whose tokens are s (n, D)."""
    width = q.shape[-1]
    w1, w2 = block.param_generator(s).chunk(2, dim=-1)
    w1 = w1.reshape(len(q), width, -1)
    w2 = w2.reshape(len(q), -1, width)
    w1 = w1 / w1.norm(dim=1, keepdim=True).clamp_min(1e-12)
    w2 = w2 / w2.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return q + torch.bmm(F.silu(torch.bmm(rms_norm(block.norm, q), w1)), w2)


def cosines(size: int) -> Tensor:
    """(P P, 64): rows by y, then x; columns by the frequency in x, then in y."""
    position = torch.linspace(0, 1, size)
    f = torch.linspace(0, 8, 8)
    y, x, fx, fy = torch.meshgrid(position, position, f, f, indexing="ij")
    return (torch.cos(math.pi * fx * x) * torch.cos(math.pi * fy * y) / (1 + fx * fy)).view(-1, 64)


class Reference(Network):
    """The same function as `Network` with the same state; positions are not part of its features."""

    def embed(self, t: Tensor) -> Tensor:
        """Times (B,) with periods up to 10 -> (B, D)."""
        angle = t[:, None] * torch.exp(-math.log(10) * torch.arange(128) / 128)
        return self.time_mlp(torch.cat([angle.cos(), angle.sin()], dim=-1))

    def blocks_on(self, x: Tensor, t: Tensor, added: Tensor) -> Tensor:
        """The tokens (B, L, D) of pictures x (B, C, H, W), to whose embeddings something is added."""
        P = self.config.patch_size
        condition = F.silu(self.embed(t) + self.null_class)
        heads = self.config.hidden_size // self.config.num_heads
        turn = rotation(x.shape[2] // P, x.shape[3] // P, heads)
        tokens = self.patch_embed(unfold(x, P)) + added
        for block in self.blocks:
            tokens = transform(block, tokens, condition, turn)
        return tokens

    def spread(self, tokens: Tensor, height: int) -> Tensor:
        """The velocity of every token as a map (B, C, h, w)."""
        return self.token_to_velocity(tokens).transpose(1, 2).unflatten(2, (height, -1))

    def encode_image(self, image: Tensor) -> Features:
        P = self.config.patch_size
        levels = self.image_encoder(image)
        tokens = self.image_to_token(levels[-1].flatten(2).transpose(1, 2))  # (B, L, D)
        maps = []
        for head, level in zip(self.image_to_velocity, levels[:-1], strict=True):
            maps.append(torch.einsum("bfhw,cf->bchw", level, head.weight))
        if self.config.tokens_of == "image":
            tokens = self.blocks_on(image, torch.zeros(len(image)), tokens)
            maps.append(self.spread(tokens, image.shape[2] // P))
        velocity = maps.pop() if maps else 0
        while maps:
            velocity = F.interpolate(velocity, maps[-1].shape[2:], mode="bilinear") + maps.pop()
        fine = levels[0]
        pixels = pixels_of(unfold(fine, P), fine.shape[1]).unflatten(0, (len(image), -1))  # (B, L, P P, C)
        return Features(tokens, self.image_to_pixel(pixels), velocity)

    def forward(self, x: Tensor, t: Tensor, features: Features) -> Tensor:
        B, C, H, W = x.shape
        P = self.config.patch_size
        tokens = features.tokens
        coarse = 0
        if self.config.tokens_of == "state":
            tokens = self.blocks_on(x, t, tokens)
            coarse = F.interpolate(self.spread(tokens, H // P), scale_factor=P, mode="bilinear")

        # The neural field.
        time = self.embed(t)
        cells = unfold(x, P)  # (B, L, C P P)
        s = F.silu(time[:, None] + tokens).flatten(0, 1)  # (B L, D)
        pixels = pixels_of(cells, C)  # (B L, P P, C)
        position = cosines(P).expand(len(pixels), -1, -1)  # (B L, P P, 64)
        q = self.pixel_embed(torch.cat([pixels, position], dim=-1)) + features.queries.flatten(0, 1)
        for block in self.nerf_blocks:
            q = render(block, q, s)
        out = self.head(rms_norm(self.head_norm, q))  # (B L, P P, C)
        out = out.transpose(1, 2).reshape(B, -1, C * P * P).transpose(1, 2)  # (B, C P P, L)
        return F.fold(out, (H, W), P, stride=P) + features.velocity + coarse
