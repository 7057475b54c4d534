"""DINOv2 (arXiv 2304.07193): the public vision transformer, as part of the image path and as a teacher.

As an encoder it sees the image once, and its features join the tokens at every step of the flow.
Representation alignment (REPA, arXiv 2410.06940): a small MLP has to predict from our tokens what the
teacher sees at the same place of the clean image. Shapes: B images, L = h w patches, tokens of width D.
"""

import math
from pathlib import Path
from statistics import mode

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from flowseg_tools.pretrained import public_file, stored_tensors
from model import CheckpointError, FlowSeg, ModelConfig, Network, tensor_faults

# Mean and standard deviation of ImageNet's RGB values in [0, 1], with which the public weights were trained.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MAX_DEPTH = 100  # blocks; the largest public model has 40
# Positions are resampled at the scale (cells + 0.1) / trained cells, as the public weights were trained.
POSITION_OFFSET = 0.1


class Block(nn.Module):
    """Transformer block with its norms first; LayerScale (ls1, ls2) weighs each channel that it adds."""

    def __init__(self, hidden_size: int, mlp_size: int, num_heads: int):
        super().__init__()
        D = hidden_size
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(D, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(D, 3 * D), "proj": nn.Linear(D, D)})
        self.ls1 = nn.ParameterDict({"gamma": torch.ones(D)})
        self.norm2 = nn.LayerNorm(D, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(D, mlp_size), "fc2": nn.Linear(mlp_size, D)})
        self.ls2 = nn.ParameterDict({"gamma": torch.ones(D)})

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.attn.qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, L, D / heads) each
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.ls1.gamma * self.attn.proj(attended)
        return x + self.ls2.gamma * self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))


class DinoV2(nn.Module):
    """The vision transformer; its parameters have the names of the public weights.

    grid_size: rows and columns of patches in training. num_registers: extra tokens that belong to no patch.
    """

    def __init__(
        self, hidden_size: int, depth: int, num_heads: int, mlp_size: int, patch_size: int,
        grid_size: int, num_registers: int,
    ):  # fmt: skip
        super().__init__()
        self.patch_size = patch_size
        self.grid_size = grid_size
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, hidden_size, patch_size, patch_size)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, hidden_size))
        self.register_tokens = nn.Parameter(torch.zeros(1, num_registers, hidden_size))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid_size**2, hidden_size))
        self.blocks = nn.Sequential(*(Block(hidden_size, mlp_size, num_heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(hidden_size, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W), normalised by `dino_input`, to one token a patch (B, L, D).

        Raises ValueError if H or W is not a multiple of the patch size.
        """
        if any(side % self.patch_size for side in images.shape[2:]):
            given = tuple(images.shape)
            raise ValueError(f"images are {given}; expected sides that are multiples of {self.patch_size}")
        x = self.patch_embed.proj(images)  # (B, D, h, w)
        x = (x + self.positions(*x.shape[2:])).flatten(2).transpose(1, 2)  # (B, L, D)

        # The class token and the registers go in front, take part in attention, and are dropped at the end.
        first = torch.cat([self.cls_token + self.pos_embed[:, :1], self.register_tokens], dim=1)
        x = torch.cat([first.expand(len(x), -1, -1), x], dim=1)
        return self.norm(self.blocks(x))[:, first.shape[1] :]

    def positions(self, height: int, width: int) -> Tensor:
        """Return the position embedding (1, D, height, width) of a grid of patches."""
        grid = self.grid_size
        trained = self.pos_embed[:, 1:].unflatten(1, (grid, grid)).movedim(-1, 1)  # (1, D, grid, grid)
        if (height, width) == (grid, grid):
            return trained
        scale = [(cells + POSITION_OFFSET) / grid for cells in (height, width)]
        return F.interpolate(trained, scale_factor=scale, mode="bicubic")


def load_dinov2(path: str | Path, num_heads: int | None = None) -> DinoV2:
    """Load the frozen transformer from a public `.pth`: ViT-S, B or L, with or without registers.

    All sizes follow from the weights except num_heads: by default each head has 64 channels, as in S, B and
    L, or 16 in smaller models. Raises CheckpointError if the file cannot be used.
    """
    with public_file(path, "DINOv2 ViT-S, B or L") as weights:
        stored_tensors(weights, path)
        weights.pop("mask_token", None)  # used in pre-training only
        with torch.device("meta"):
            model = DinoV2(**dinov2_sizes(weights, num_heads))
        expected = {name: value for name, value in model.named_parameters() if value.numel()}
        if faults := tensor_faults(weights, expected):
            raise ValueError(faults)
        # The weights stay mapped in the file. A model without registers has an empty tensor of them.
        no_registers = {"register_tokens": torch.zeros_like(model.register_tokens, device="cpu")}
        model.load_state_dict(no_registers | weights, assign=True)
    return model.float().requires_grad_(False).eval()


def default_heads(hidden_size: int) -> int:
    """Return the number of heads, which no file tells: of 64 channels in ViT-S, B and L, of 16 below."""
    return max(1, hidden_size // (64 if hidden_size >= 384 else 16))


def dinov2_sizes(weights: dict[str, Tensor], num_heads: int | None) -> dict[str, int]:
    """Return the arguments of DinoV2 that the weights imply; KeyError or ValueError if they imply none.

    A size is what most tensors tell, so that the comparison which follows names a single wrong one.
    """
    tensors = [value for value in weights.values() if torch.is_tensor(value) and value.ndim]
    hidden_size = mode(value.shape[-1] for value in tensors)
    block_numbers = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    mlp_biases = [value.numel() for name, value in weights.items() if name.endswith("fc1.bias")]

    num_heads = num_heads or default_heads(hidden_size)
    if hidden_size % num_heads:
        raise ValueError(f"its width {hidden_size} is not a multiple of {num_heads} heads: pass num_heads")
    if len(block_numbers) > MAX_DEPTH:
        raise ValueError(f"{len(block_numbers):,} blocks, expected at most {MAX_DEPTH}")
    registers = weights.get("register_tokens", torch.zeros(0))
    return {
        "hidden_size": hidden_size,
        "depth": max(1, len(block_numbers)),
        "num_heads": num_heads,
        "mlp_size": mode(mlp_biases or [4 * hidden_size]),
        "patch_size": math.isqrt(weights["patch_embed.proj.weight"].numel() // (3 * hidden_size)),
        "grid_size": math.isqrt(weights["pos_embed"].numel() // hidden_size),
        "num_registers": registers.numel() // hidden_size,
    }


def dino_input(image: Tensor, size: list[int]) -> Tensor:
    """Normalise images (B, 3, H, W) in [-1, 1] as DINOv2 was trained, at this height and width in pixels."""
    colors = zip(((image + 1) / 2).unbind(1), IMAGENET_MEAN, IMAGENET_STD, strict=True)
    normal = [(color - mean) / std for color, mean, std in colors]  # tensors of them would be sent to a GPU
    return F.interpolate(torch.stack(normal, 1), size=size, mode="bicubic")


def teacher_input(image: Tensor, patch_size: int, teacher_patch: int = 14) -> Tensor:
    """Return the input whose patches of `teacher_patch` pixels cover what ours of `patch_size` cover."""
    return dino_input(image, [side * teacher_patch // patch_size for side in image.shape[2:]])


class DinoNetwork(Network):
    """A network whose tokens also get what a vision transformer sees, if the configuration has one."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        if config.vit_width:
            heads = default_heads(config.vit_width)
            sizes = (config.vit_patch, config.vit_grid, config.vit_registers)
            self.vit = DinoV2(config.vit_width, config.vit_depth, heads, 4 * config.vit_width, *sizes)
            self.vit.requires_grad_(config.finetune_encoder)
            self.image_vit_to_token = nn.Linear(config.vit_width, config.hidden_size, bias=False)

    def tokens_of_image(self, image: Tensor, coarse: Tensor) -> Tensor:
        """Add the features to the tokens, resampled from its patches to ours."""
        tokens = super().tokens_of_image(image, coarse)
        if not self.config.vit_width:
            return tokens
        patch = self.config.vit_patch
        grid = [max(1, round(side / patch)) for side in image.shape[2:]]  # of its patches in about this size
        seen = self.vit(dino_input(image, [cells * patch for cells in grid]))
        seen = seen.transpose(1, 2).unflatten(2, grid)  # (B, D, *grid)

        size = [side // self.config.patch_size for side in image.shape[2:]]
        seen = F.interpolate(seen, size=size, mode="bilinear").flatten(2).transpose(1, 2)  # (B, L, D)
        return tokens + self.image_vit_to_token(seen)


class DinoFlowSeg(FlowSeg):
    """FlowSeg on a DinoNetwork; without a vision transformer it is FlowSeg."""

    def __init__(self, config: ModelConfig, network: nn.Module | None = None):
        super().__init__(config, network or DinoNetwork(config))

    def stored(self) -> dict[str, Tensor]:
        """What a checkpoint holds: a frozen vision transformer in bfloat16, to which it was rounded."""
        tensors = self.state_dict()
        for name in tensors:
            if name.startswith("network.vit.") and not self.config.finetune_encoder:
                tensors[name] = tensors[name].bfloat16()
        return tensors

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> "DinoFlowSeg":
        """Read what `save` wrote, or FlowSeg.save; see FlowSeg.load."""
        return super().load(path, device).float()


def encoder_config(path: str | Path) -> dict[str, int]:
    """Return the fields of ModelConfig that describe the vision transformer of a file."""
    vit = load_dinov2(path)
    return {
        "vit_width": vit.norm.weight.numel(),
        "vit_depth": len(vit.blocks),
        "vit_patch": vit.patch_size,
        "vit_grid": vit.grid_size,
        "vit_registers": vit.register_tokens.shape[1],
    }


def load_encoder(network: DinoNetwork, path: str | Path) -> None:
    """Copy public weights into a network. Raises CheckpointError if they are not of the usual form.

    Weights that stay frozen are rounded to bfloat16, as a checkpoint stores them, so that training sees the
    same features as whoever loads the checkpoint.
    """
    weights = load_dinov2(path).state_dict()
    if faults := tensor_faults(weights, network.vit.state_dict()):
        raise CheckpointError(f"{path} has another form than ViT-S, B and L ({faults}); use one of these")
    if not network.config.finetune_encoder:
        weights = {name: value.bfloat16().float() for name, value in weights.items()}
    network.vit.load_state_dict(weights)


class Alignment(nn.Module):
    """REPA: compare what an MLP predicts from the tokens after a block with the tokens of the teacher.

    The tokens are those of the first pass after an image was read: in FlowSeg.loss the one at t = 0, which
    all images take. Forward hooks note them, so the network does not know about the alignment.

    network: Network. path: public DINOv2 weights. depth: number of blocks before the tokens are taken; all
    of them in a shallower network. weight: factor of this loss in the total.
    """

    def __init__(self, network: nn.Module, path: str, depth: int, weight: float):
        super().__init__()
        device = network.null_class.device
        teacher = load_dinov2(path).to(device)
        width = teacher.norm.weight.numel()
        self.teacher = (teacher,)  # in a tuple nn.Module does not see it, so it is not trained or saved
        self.patch_size = network.config.patch_size
        self.weight = weight
        layers = [nn.Linear(network.config.hidden_size, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()]
        self.projector = nn.Sequential(*layers, nn.Linear(width, width)).to(device)
        last = min(depth, len(network.blocks)) - 1
        self.tokens: Tensor | None = None
        network.image_encoder.register_forward_hook(self.forget)
        network.blocks[last].register_forward_hook(self.note)
        # By default torch.compile may run a block with a hook by the code of an equal one without.
        torch._dynamo.config.skip_nnmodule_hook_guards = False

    def forget(self, encoder: nn.Module, inputs: tuple, outputs: tuple) -> None:
        """A new image was read: the next tokens are its first."""
        self.tokens = None

    def note(self, block: nn.Module, inputs: tuple, tokens: Tensor) -> None:
        """Keep the tokens (B, L, D) that the block has just returned, unless there are some of this image."""
        if self.tokens is None:
            self.tokens = tokens

    def forward(self, image: Tensor) -> Tensor:
        """Return the mean of 1 - cosine over the tokens of the image the network has just seen.

        image: (B, 3, H, W) in [-1, 1].
        """
        (teacher,) = self.teacher
        with torch.no_grad():
            target = teacher(teacher_input(image, self.patch_size, teacher.patch_size)).float()
        predicted = self.projector(self.tokens).float()
        return 1 - F.cosine_similarity(predicted, target, dim=-1).mean()
