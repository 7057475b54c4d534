"""What a training run would take, by counting: FLOPs, GPU memory, hours; needs neither data nor a GPU."""

from dataclasses import asdict, replace

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from flowseg_tools.dinov2 import DinoFlowSeg
from model import ModelConfig

H100_TFLOPS = 989  # in bfloat16, dense, by its data sheet
UTILISATION = 0.4  # share of it that training is taken to reach
SHARE_IN_BFLOAT16 = 0.6  # of the float32 bytes kept for the backward pass: some stay float32; measured


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
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.shape[-2:] != (tokens, tokens):
            kept[tensor.untyped_storage()._cdata] = tensor  # what is kept in several places counts once
        return tensor

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss, _ = model.loss(image, labels)
        loss.backward()
    for parameter in model.parameters():
        kept.pop(parameter.untyped_storage()._cdata, None)
    num_bytes = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    return num_parameters, counter.get_total_flops(), num_bytes


def cost(config, network: ModelConfig, world: int) -> dict:
    """Both configurations and what the run takes on `world` H100 GPUs; config is a TrainConfig.

    Memory is 20 bytes a parameter (weights, gradients, two moments and EMA in float32), with bfloat16 2 more
    for a copy of the weights; 12 less for a frozen one, which has neither gradient nor moments; and what is
    kept for the backward pass of every image at a time.
    """
    parameters, flops, kept = counted(network, config.crop_size, config.activation_checkpointing)
    images = config.batch_size // world // config.grad_accum_steps
    bytes_each = 20
    share = 1.0
    if config.dtype != "float32":
        bytes_each = 22
        share = SHARE_IN_BFLOAT16
    with torch.device("meta"):
        frozen = sum(p.numel() for p in DinoFlowSeg(network).parameters() if not p.requires_grad)
    fixed = (bytes_each * parameters - 12 * frozen) / 1e9
    grows = images * share * kept / 1e9
    tera = config.batch_size * flops / 1e12
    hours = config.max_steps * tera / (UTILISATION * H100_TFLOPS) / 3600
    facts = {
        "parameters": parameters,
        "TFLOP a step (products and convolutions, forward and backward)": round(tera, 3),
        "images at a time on each GPU": images,
        "GB of weights, gradients, moments and EMA": round(fixed, 3),
        "GB kept for the backward pass": round(grows, 3),
        "GB of GPU memory": round(fixed + grows, 3),
        f"hours on one H100 at {UTILISATION:.0%} of {H100_TFLOPS} TFLOP/s": round(hours, 3),
    }
    return asdict(config) | asdict(network) | facts
