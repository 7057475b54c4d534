"""What makes training and evaluation fast on GPUs and changes nothing but rounding: compiled parts, image
loaders, gradients that are exchanged while others are still computed."""

import os

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from flowseg_tools.runs import outlive_signals
from model import FlowSeg, potential_of_chunk

MOST_WORKERS = 8  # loader processes of one GPU
LOADER_TIMEOUT = 300  # seconds that a batch may take
WORTH_COMPILING = 200  # photos; compiling takes a minute or two


def compile_parts(model: FlowSeg, backend: str = "inductor") -> None:
    """Compile the parts that repeat, in place: weights keep their names, equal blocks share one graph.

    That is much faster than to compile the whole network, and gradients can be exchanged after every block.
    No part is compiled again for another number or size of images. A model that is to be copied must be
    copied before: the copy of a compiled part would use the weights of the original.
    """
    network = model.network
    torch._dynamo.config.recompile_limit = 64  # with and without gradient, at batch 1, under autocast, ..
    parts = [network.image_encoder, *getattr(network, "blocks", [])]
    if hasattr(network, "vit"):
        parts.extend(network.vit.blocks)
    for part in parts:
        part.compile(dynamic=True, backend=backend)
    if hasattr(network, "render_patches"):
        network.render_patches = torch.compile(network.render_patches, dynamic=True, backend=backend)
    model.compiled_potential = torch.compile(potential_of_chunk, dynamic=True, backend=backend)


def speed_up(run) -> nn.Module:
    """Compile the parts of a train.Run as its settings say; returns its objective, spread over processes."""
    config = run.config
    run.model.network.activation_checkpointing = config.activation_checkpointing
    if config.compile == "true" or (config.compile == "auto" and run.device.type == "cuda"):
        compile_parts(run.model)
        compile_parts(run.ema)
    if run.world == 1:
        return run.objective
    return distribute(run.objective, run.device, config.grad_accum_steps > 1, config.gradient_dtype)


def compile_for(model: FlowSeg, num_photos: int) -> None:
    """Compile a model on a GPU that is to see so many photos that it pays."""
    if model.centroids.is_cuda and num_photos >= WORTH_COMPILING:
        compile_parts(model)


def loader_options(num_workers: int, device: torch.device) -> dict:
    """Options of a DataLoader that keeps the device fed; -1 workers: as many as fit, or none for a CPU.

    A GPU gets its batches from pinned memory, so that copies to it overlap with its work. The loader of a run
    goes through its samples once, so its workers live as long as the run.
    """
    on_gpu = device.type == "cuda"
    if num_workers < 0:
        num_workers = 0
        if on_gpu:
            num_workers = min(MOST_WORKERS, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    options: dict = {"num_workers": num_workers, "pin_memory": on_gpu}
    if num_workers:
        options |= {
            "worker_init_fn": outlive_signals,
            "timeout": LOADER_TIMEOUT,
            "persistent_workers": True,
            "prefetch_factor": 4,  # batches that each worker has ready
        }
    return options


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def distribute(
    objective: nn.Module, device: torch.device, accumulates: bool, gradient_dtype: str
) -> nn.Module:
    """The objective under torch's DistributedDataParallel.

    accumulates: gradients of several parts are added up before they are exchanged; then PyTorch cannot take
    the graph for the same in every iteration. gradient_dtype: bfloat16 halves what travels.
    """
    spread = DistributedDataParallel(
        objective,
        device_ids=[device.index] if device.type == "cuda" else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
        static_graph=not accumulates,
    )
    if gradient_dtype == "bfloat16":
        # By its own name PyTorch refuses this hook for gloo, which can do it.
        spread.register_comm_hook(None, lambda group, bucket: bf16_compress_hook(group, bucket))
    return spread
