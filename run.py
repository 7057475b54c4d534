"""Runs: their directories, how they go on where they stopped, their processes and signals, what they take.

In a run directory, config.json says what was asked for and metrics.jsonl has a line per report;
last.safetensors and best.safetensors are EMA weights, which other commands read; state.safetensors (weights,
EMA, optimizer, step) is what resuming reads, previous.safetensors the state saved before it, and preview.png
shows four validation photos. Weights and states are written whole or not at all.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from rich.console import Console
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from model import CheckpointError, FlowSeg, write_tensors
from network import Config

STATE, PREVIOUS = "state.safetensors", "previous.safetensors"
STOPS = (signal.SIGINT, signal.SIGTERM)
SAVE = getattr(signal, "SIGUSR1", None)  # save now and go on; Windows has none


class RunError(Exception):
    """A run that cannot start or continue as asked; the message is one line and says what to do."""

    exit_code = 2


def check(folder: Path, config: dict, allow_changes: bool) -> None:
    """RunError if the folder holds another run or foreign content."""
    path = folder / "config.json"
    try:
        if not path.exists() and folder.exists() and any(file.name[0] != "." for file in folder.iterdir()):
            raise RunError(f"{folder} exists and is not a run directory; choose another with --out")
        stored = json.loads(path.read_text()) if path.exists() else config
        old, new = ({**whole.get("train", {}), **whole.get("model", {})} for whole in (stored, config))
        changed = [f"{k} was {old.get(k)!r}, now {new[k]!r}" for k in new if old.get(k) != new[k]]
        if changed and not allow_changes:
            fix = "repeat its options, use --out, or --allow-changes"
            raise RunError(f"{folder} holds another run ({'; '.join(changed)}): {fix}")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise RunError(f"cannot use {folder} ({error}); choose another with --out") from error


def claim(folder: Path, config: dict) -> None:
    """Make the folder this run's own."""
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


def replace_text(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    os.replace(part, path)


def log(folder: Path, **values: float) -> None:
    """Add a line to metrics.jsonl, and its values to TensorBoard's file where TensorBoard is installed."""
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(values) + "\n")
    if writer := tensorboard(folder):
        for name, value in values.items():
            writer.add_scalar(name, value, values["step"])
        writer.flush()


@cache
def tensorboard(folder: Path):
    """The writer of a run, or None; importing it takes too long to be done by every command."""
    with suppress(ImportError):
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(folder)


def save_state(folder: Path, model: FlowSeg, ema: FlowSeg, optimizer: torch.optim.AdamW, at: tuple) -> None:
    """Write all that the next step depends on, at = (step, validated, best), and keep the file before it."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors = nn.ModuleDict({"model": model, "ema": ema}).state_dict()
    for parameter, moments in optimizer.state.items():
        tensors |= {f"optimizer.{names[parameter]}.{k}": v for k, v in moments.items()}
    write_tensors(tensors, folder / STATE, {"at": at}, keep=PREVIOUS)


def load_state(
    folder: Path, model: FlowSeg, ema: FlowSeg, optimizer: torch.optim.AdamW, console: Console
) -> tuple[int, int, float]:
    """Continue from the newest state that can be read: step, step last validated and best mIoU so far."""
    damage = []
    for path in filter(Path.exists, (folder / STATE, folder / PREVIOUS)):
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                step, validated, best = json.loads(file.metadata()["at"])
            break
        except (SafetensorError, OSError, KeyError, TypeError) as error:
            damage.append(f"{path} is damaged ({error})")
    else:
        if damage:
            raise CheckpointError(f"{'; '.join(damage)}; choose another folder with --out")
        tensors, (step, validated, best) = {}, (0, 0, -1.0)
    first = process()[0] == 0
    if damage and first:  # set aside, so that the next save does not take it for the state to keep
        rest = f"going on from the state saved before it, at step {step}"
        console.print(f"warning: {damage[0]}: {rest}", style="yellow")
        (folder / STATE).replace(folder / "damaged.safetensors")

    parameters = dict(model.named_parameters())
    try:
        for key in [key for key in tensors if key.startswith("optimizer.")]:
            name, moment = key.removeprefix("optimizer.").rsplit(".", 1)
            optimizer.state[parameters[name]][moment] = tensors.pop(key).to(parameters[name].device)
        if tensors:
            nn.ModuleDict({"model": model, "ema": ema}).load_state_dict(tensors)
    except (KeyError, RuntimeError) as error:  # let through by --allow-changes
        raise RunError(f"{folder}: the state is of another network or teacher; use --out") from error
    metrics = folder / "metrics.jsonl"
    if first and metrics.exists():  # what was logged after this state will be logged again
        lines = [json.loads(line) for line in metrics.read_text().splitlines() if line.endswith("}")]
        kept = [line for line in lines if line["step"] <= (validated if "mIoU" in line else step)]
        replace_text(metrics, "".join(json.dumps(line) + "\n" for line in kept))
    return step, validated, best


def newest_checkpoint(where: Path | None = None, command: str = "flowseg train") -> Path:
    """A file as it is, or the best weights of a run directory, by default of the run under runs/ that was
    written to last. RunError: there are none; it says which command makes them."""
    if where and where.suffix and not where.is_dir():
        return where
    found = list(where.glob("last.safetensors") if where else Path("runs").glob("*/last.safetensors"))
    if not found:
        raise RunError(f"no weights in {where or 'runs'}/: run `{command}`, or pass a checkpoint")
    newest = max(found, key=lambda path: path.stat().st_mtime)
    best = newest.with_name("best.safetensors")
    return best if best.exists() else newest


def environment() -> dict[str, str]:
    """Versions and commit that weights were made with."""
    repository, commit = Path(__file__).with_name(".git"), ""  # not one around an installed wheel
    with suppress(OSError, subprocess.TimeoutExpired):
        command = ["git", f"--git-dir={repository}", "rev-parse", "--short=12", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip()
    versions = {"python": sys.version.split()[0], "torch": str(torch.__version__)}
    return versions | {"commit": commit or "unknown"}


@mock.patch("torch.autocast", mock.MagicMock())  # it does not know the meta device
def counted(network: Config, size: int, recompute: bool = False) -> tuple[int, int, int]:
    """Parameters, FLOPs of a training step of one image, and bytes it keeps for the backward pass in float32.

    FLOPs are those of products and convolutions, forward and backward, at both states of `FlowSeg.loss`;
    bytes leave out the attention matrices, which a GPU's kernels do not keep. Nothing is computed: the meta
    device has shapes only.
    """
    with torch.device("meta"):
        model = FlowSeg(replace(network, encoding="kronecker"))  # a lexicode would have to be computed
        image, labels = torch.zeros(1, 3, size, size), torch.zeros(1, size, size, dtype=torch.int64)
    model.network.recompute = recompute
    tokens, kept = (size // network.patch_size) ** 2, {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.shape[-2:] != (tokens, tokens):
            kept[tensor.untyped_storage()._cdata] = tensor  # what is kept in several places is one
        return tensor

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model.loss(image, labels)[0]
        loss.backward()
    for parameter in model.parameters():
        kept.pop(parameter.untyped_storage()._cdata, None)
    num_bytes = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops(), num_bytes


def process() -> tuple[int, int]:
    """Rank and number of the processes that train together: (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def summed(values: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Collect signals instead of dying; a second SIGINT interrupts at once (torchrun sends two itself)."""
    received: list[int] = []

    def note(number, frame):
        if number == signal.SIGINT and number in received and "RANK" not in os.environ:
            raise KeyboardInterrupt
        received.append(number)

    previous = {number: signal.signal(number, note) for number in (*STOPS, SAVE) if number}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def outlive_signals(worker: int) -> None:
    """Leave what a whole process group receives to the process that trains: it still needs its loaders."""
    for number in filter(None, (signal.SIGINT, SAVE)):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))  # seconds; not never: it ends strays, too


def agree(signals: list[int]) -> tuple[int, bool]:
    """The signal to stop for, or 0, and whether one asks to save: the same answer in every process."""
    counts = summed(torch.tensor([signals.count(number) for number in (*STOPS, SAVE)])).tolist()
    return next((number for number, count in zip(STOPS, counts, strict=False) if count), 0), counts[-1] > 0


def peak_memory(device: torch.device) -> dict[str, float]:
    """The most memory in use so far: on the GPU, or by this process where the system says it."""
    if device.type == "cuda":
        return {"peak_memory_gb": torch.cuda.max_memory_allocated(device) / 1e9}
    if sys.platform != "linux":
        return {}
    peak = Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]
    return {"peak_memory_gb": int(peak) * 1024 / 1e9}
