"""What a training run would take, by counting: FLOPs, GPU memory, hours; needs neither data nor a GPU."""

from dataclasses import asdict, replace
from functools import cache

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from flowseg_tools.dinov2 import DinoFlowSeg, default_heads
from model import ModelConfig

H100_TFLOPS = 989  # in bfloat16, dense, by its data sheet
UTILISATION = 0.4  # share of it that training is taken to reach
USABLE_GB = 76  # of 80: the rest is for CUDA itself, the libraries, evaluation and fragments
SHARE_IN_BFLOAT16 = 0.8  # of the float32 bytes kept for the backward pass: on CUDA all norms stay float32


@cache
def counted(config: ModelConfig, size: int, activation_checkpointing: bool = False) -> tuple[int, int, int]:
    """Parameters, FLOPs of a training step of one image, and bytes that it keeps for the backward pass.

    Second states count by their share: between a step without them and one where every image has its own.
    """
    parameters, flops, kept = _count_step(replace(config, later_share=0.0), size, activation_checkpointing)
    _, all_flops, all_kept = _count_step(replace(config, later_share=1.0), size, activation_checkpointing)
    share = config.later_share
    return parameters, round(flops + share * (all_flops - flops)), round(kept + share * (all_kept - kept))


def _count_step(config: ModelConfig, size: int, activation_checkpointing: bool) -> tuple[int, int, int]:
    """What `counted` returns, where either no image has a second state or every one.

    FLOPs are those of products and convolutions in `FlowSeg.loss`, forward and backward. Bytes are of float32
    and leave out attention matrices, which the kernels of a GPU do not keep. Nothing is computed, since
    tensors on the meta device have shapes only.
    """
    with torch.device("meta"):
        model = DinoFlowSeg(config).to("meta")
        image = torch.zeros(1, 3, size, size)
        labels = torch.zeros(1, size, size, dtype=torch.int64)
    model.network.activation_checkpointing = activation_checkpointing
    tokens = (size // config.patch_size) ** 2
    others = round(size / config.vit_patch) ** 2 + 1 + config.vit_registers  # of the public transformer
    heads = default_heads(config.vit_width)
    attention = {(config.num_heads, tokens, tokens), (heads, others, others)}  # of one image
    kept: dict[int, Tensor] = {}
    matrices = set()

    def keep(tensor: Tensor) -> Tensor:
        number = tensor.untyped_storage()._cdata
        kept[number] = tensor  # what is kept in several places and shapes counts once
        if tensor.shape[1:] in attention:
            matrices.add(number)
        return tensor

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss, _ = model.loss(image, labels)
        loss.backward()
    for number in [parameter.untyped_storage()._cdata for parameter in model.parameters()] + [*matrices]:
        kept.pop(number, None)
    num_bytes = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    return num_parameters, counter.get_total_flops(), num_bytes


@cache
def count_frozen(config: ModelConfig) -> int:
    """How many parameters are not trained."""
    with torch.device("meta"):
        return sum(p.numel() for p in DinoFlowSeg(config).parameters() if not p.requires_grad)


def gigabytes(config, network: ModelConfig, world: int) -> tuple[float, float]:
    """What weights, gradients, moments and EMA take on each GPU, and what is kept for the backward pass.

    The first is 20 bytes a parameter in float32, with bfloat16 2 more for a copy of the weights; 12 less for
    a frozen one, which has neither gradient nor moments. The second grows with the images at a time.
    """
    parameters, _, kept = counted(network, config.crop_size, config.activation_checkpointing)
    images = config.batch_size // world // config.grad_accum_steps
    bytes_each = 20
    share = 1.0
    if config.dtype != "float32":
        bytes_each = 22
        share = SHARE_IN_BFLOAT16
    return (bytes_each * parameters - 12 * count_frozen(network)) / 1e9, images * share * kept / 1e9


def fit(config, network: ModelConfig, world: int) -> str:
    """Whether the run fits a GPU of 80 GB; if not, the option that makes it fit."""
    if sum(gigabytes(config, network, world)) <= USABLE_GB:
        return "fits 80 GB"
    images = config.batch_size // world
    tries = []
    for steps in range(config.grad_accum_steps + 1, images + 1):
        if images % steps == 0:
            tries.append({"grad_accum_steps": steps})
    tries.insert(1, {"activation_checkpointing": True})  # halving the images at a time costs less
    tries += [one | {"activation_checkpointing": True} for one in tries]
    for changes in tries:
        needed = sum(gigabytes(replace(config, **changes), network, world))
        if needed <= USABLE_GB:
            options = " ".join(f"--set {name}={str(value).lower()}" for name, value in changes.items())
            return f"does not fit 80 GB: {options} needs {needed:.1f} GB"
    return "does not fit 80 GB: lower --crop-size, or take a smaller --preset"


def cost(config, network: ModelConfig, world: int) -> dict[str, dict]:
    """Both configurations and what the run takes on `world` H100 GPUs, in groups; config is a TrainConfig."""
    parameters, flops, _ = counted(network, config.crop_size, config.activation_checkpointing)
    fixed, grows = gigabytes(config, network, world)
    tera = config.batch_size * flops / 1e12
    hours = config.max_steps * tera / (UTILISATION * H100_TFLOPS) / 3600
    return {
        "training": asdict(config),
        "network": asdict(network),
        "memory of each GPU": {
            "parameters": parameters,
            "images at a time on each GPU": config.batch_size // world // config.grad_accum_steps,
            "GB of weights, gradients, moments and EMA": round(fixed, 3),
            "GB kept for the backward pass": round(grows, 3),
            "GB of GPU memory": round(fixed + grows, 3),
            "one GPU of 80 GB": fit(config, network, world),
        },
        "work": {
            "TFLOP a step (products and convolutions, forward and backward)": round(tera, 3),
            f"hours on one H100 at {UTILISATION:.0%} of {H100_TFLOPS} TFLOP/s": round(hours, 3),
        },
    }
