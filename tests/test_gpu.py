"""Ready for GPUs, as far as a CPU can show it: processes, waiting, compiled parts, states.

What needs a GPU is marked `cuda` and skips without one.
"""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import train as training
from data import ShapesDataset
from flowseg_tools import runs, speed
from flowseg_tools.dinov2 import Alignment
from model import FlowSeg
from tests.test_dinov2 import public
from train import Objective, resolve

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
TINY = ("hidden_size=16", "depth=2", "num_heads=2", "nerf_width=8", "conv_width=8", "encoding_dims=11")


# ---------------------------------------------------------------- several processes are one

VARIANTS = {
    "plain": (),
    "accumulating": ("grad_accum_steps=2",),
    "recomputed": ("activation_checkpointing=true",),
    "aligned": ("teacher=teacher.pth",),
    "an image without labels": (),
    "adamw": ("optimizer=adamw",),
    "compiled": ("compile=true",),
}
QUICK = [name for name in VARIANTS if name != "compiled"]


def step_of(name: str, folder: Path) -> dict[str, torch.Tensor]:
    """Loss, gradients and the weights after one training step of this process's share of a batch."""
    given = {"batch_size": 8, "crop_size": 16, "warmup_steps": 0, "lr": 1e-4}
    config, network = resolve(given, [*TINY, *VARIANTS[name]])
    torch.manual_seed(0)
    model = FlowSeg(network)
    for parameter in model.parameters():  # what starts at zero would send no gradient back
        torch.nn.init.normal_(parameter, std=0.2)
    model.network.activation_checkpointing = config.activation_checkpointing
    alignment = None
    if config.teacher:
        alignment = Alignment(model.network, folder / config.teacher, 8, 0.5)
    objective = Objective(model, alignment)
    names = {parameter: name for name, parameter in objective.named_parameters()}
    optimizers = training.make_optimizers(objective, config)
    rank, world = runs.process()
    if config.compile == "true":
        speed.compile_parts(model)
    if world > 1:
        objective = speed.distribute(objective, CPU, config.grad_accum_steps > 1, config.gradient_dtype)

    loader = training.batches(ShapesDataset("training"), config, 0)
    parts = [next(loader) for _ in range(config.grad_accum_steps)]
    if name == "an image without labels" and rank == 0:
        parts[0][1][0] = 255
    values = training.backward(objective, parts, training.noise_generators(config, 0), False, CPU)
    found = {"loss": runs.summed(values["loss"])[None]}
    found |= {f"gradient {name}": parameter.grad.clone() for parameter, name in names.items()}
    training.update(list(names), optimizers, config.lr, config.grad_clip)
    return found | {f"weight {name}": parameter.detach().clone() for parameter, name in names.items()}


def take_steps(folder: str, variants: list[str]) -> None:
    """What each of the processes does; the first one keeps the results."""
    torch.set_num_threads(1)
    with runs.process_group(CPU):
        rank, world = runs.process()
        for name in variants:
            found = step_of(name, Path(folder))
            if rank == 0:
                save_file(found, f"{folder}/{world} {name}.safetensors")


def together(count: int, code: str) -> None:
    """Run Python code in processes that form a group, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(count):
        environment = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1",
            "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        command = [sys.executable, "-c", code]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        processes.append(process)
    for process in processes:
        _, errors = process.communicate(timeout=500)
        assert process.returncode == 0, errors


def assert_equal_steps(one: dict, several: dict, close: float) -> None:
    """Losses and weights to `close` of their norms, gradients to that of the norm of the whole gradient."""
    assert one.keys() == several.keys()
    gradients = [value.norm() for name, value in one.items() if name.startswith("gradient")]
    whole = torch.stack(gradients).norm()
    for name, value in one.items():
        size = whole if name.startswith("gradient") else value.norm()
        assert (value - several[name]).norm() <= close * size, name


def compare(folder: Path, count: int, variants: list[str], close: float = 1e-6) -> None:
    """The steps of several processes against those of one."""
    torch.save(public(), folder / "teacher.pth")
    together(count, f"from tests.test_gpu import take_steps; take_steps({str(folder)!r}, {variants})")
    take_steps(str(folder), variants)
    for name in variants:
        one, several = (load_file(folder / f"{world} {name}.safetensors") for world in (1, count))
        assert_equal_steps(one, several, close)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_take_the_step_of_one(tmp_path, count):
    compare(tmp_path, count, QUICK)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler here")
@pytest.mark.parametrize("count", [2, 4])
def test_several_compiled_processes_take_the_step_of_one(tmp_path, count):
    compare(tmp_path, count, ["compiled"], close=1e-5)
