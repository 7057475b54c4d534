"""The state of a run: all that its next step depends on, written while training goes on, and read again."""

import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from flowseg_tools.runs import RunError
from model import CheckpointError, write_tensors

STATE = "state.safetensors"
PREVIOUS = "previous.safetensors"
STATE_FORMAT = "flowseg-state-2"

Modules = dict[str, nn.Module]
Optimizers = list[torch.optim.Optimizer]
Progress = tuple[int, int, float]  # step, step last validated, best mIoU so far


class Writer:
    """Writes files of tensors in a thread, one after the other, so that training does not wait for the disk.

    As a context it ends when all is written. An error of the thread is raised by the next `write` of the same
    file, or at the end.
    """

    def __init__(self):
        self.pool = ThreadPoolExecutor(1)
        self.pending: dict[Path, Future] = {}
        self.copies: dict[Path, dict[str, Tensor]] = {}  # in memory of the host, used again for the next file

    def write(self, tensors: dict[str, Tensor], path: Path, metadata: dict, keep: str = "") -> None:
        """Take a copy of the tensors as they are now; the thread does what model.write_tensors does."""
        if path in self.pending:
            self.pending.pop(path).result()  # its copies are free when it is written
        before = self.copies.get(path, {})
        copies = {}
        on_gpu = False
        for name, tensor in tensors.items():
            copy = before.get(name)
            if copy is None:
                copy = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda, requires_grad=False)
            copies[name] = copy.copy_(tensor.detach(), non_blocking=True)
            on_gpu = on_gpu or tensor.is_cuda
        self.copies[path] = copies

        # A GPU copies while the host goes on; the thread waits for it.
        copied = None
        if on_gpu:
            copied = torch.cuda.Event()
            copied.record()
        self.pending[path] = self.pool.submit(self._work, copied, copies, path, metadata, keep)

    def _work(self, copied: torch.cuda.Event | None, *rest) -> None:
        if copied:
            copied.synchronize()
        write_tensors(*rest)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind, *rest) -> None:
        self.pool.shutdown()
        for future in self.pending.values():
            error = future.exception()
            if error and not kind:  # the first error counts
                raise error


def save_state(
    folder: Path, modules: Modules, optimizers: Optimizers, at: Progress, write: Callable = write_tensors
) -> None:
    """Write all that the next step depends on, and keep the state before it.

    modules: whose weights belong to the state; the optimizers are of their parameters.
    """
    whole = nn.ModuleDict(modules)
    names = {parameter: name for name, parameter in whole.named_parameters()}
    tensors = whole.state_dict()
    for optimizer in optimizers:
        for parameter, moments in optimizer.state.items():
            for kind, value in moments.items():
                tensors[f"optimizer.{names[parameter]}.{kind}"] = value
    write(tensors, folder / STATE, {"format": STATE_FORMAT, "at": at}, keep=PREVIOUS)


def read_state(path: Path) -> tuple[dict[str, Tensor], Progress]:
    """The tensors of a state and how far it is. CheckpointError: it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if json.loads(metadata["format"]) != STATE_FORMAT:
                raise ValueError("written by another version of flowseg")
            step, validated, best = json.loads(metadata["at"])
            if type(step) is not int or type(validated) is not int or not 0 <= validated <= step:
                raise ValueError(f"step {step!r}, validated {validated!r}")
            if type(best) not in (int, float) or not -1 <= best <= 1:
                raise ValueError(f"best mIoU {best!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error})") from error
    return tensors, (step, validated, best)


def load_state(folder: Path, modules: Modules, optimizers: Optimizers, console: Console) -> Progress:
    """Continue from the newest state that can be read; a damaged one is set aside."""
    damage = []
    tensors: dict[str, Tensor] = {}
    at = (0, 0, -1.0)
    paths = [path for path in (folder / STATE, folder / PREVIOUS) if path.exists()]
    for path in paths:
        try:
            tensors, at = read_state(path)
            break
        except CheckpointError as error:
            damage.append(str(error))
    if paths and len(damage) == len(paths):
        raise CheckpointError(f"{'; '.join(damage)}; choose another folder with --out")
    if damage:  # set aside, so that the next save does not take it for the state to keep
        rest = f"going on from the state saved before it, at step {at[0]}"
        console.print(f"warning: {damage[0]}: {rest}", style="yellow")
        (folder / STATE).replace(folder / "damaged.safetensors")
    if not tensors:
        return at

    whole = nn.ModuleDict(modules)
    parameters = dict(whole.named_parameters())
    owners = _owners(optimizers)
    weights = {}
    try:
        for key, value in tensors.items():
            if not key.startswith("optimizer."):
                weights[key] = value
                continue
            name, kind = key.removeprefix("optimizer.").rsplit(".", 1)
            parameter = parameters[name]
            if value.ndim and value.shape != parameter.shape:
                raise RuntimeError(f"{key} is {tuple(value.shape)}, expected {tuple(parameter.shape)}")
            if (kind == "momentum") != ("momentum" in owners[parameter].defaults):
                raise RuntimeError(f"{key} is of another optimizer")
            owners[parameter].state[parameter][kind] = value.to(parameter.device)
        if "seen" in modules:  # a state of before this was noted excludes no class
            weights.setdefault("seen.labels", torch.ones_like(modules["seen"].labels))
        whole.load_state_dict(weights)
    except (KeyError, RuntimeError) as error:  # settings that --allow-changes let through
        raise RunError(f"{folder}: state of another network, teacher or optimizer; use --out") from error
    return at


def share_state(modules: Modules, optimizers: Optimizers, at: Progress) -> Progress:
    """Give every process what the first one has: weights, moments and progress.

    So the others read no file, need not see the folder of the run, and cannot go on from another step.
    """
    if not dist.is_initialized():
        return at
    whole = nn.ModuleDict(modules)
    parameters = dict(whole.named_parameters())
    names = {parameter: name for name, parameter in parameters.items()}
    owners = _owners(optimizers)

    # What the optimizers of the first process remember, by name and shape.
    entries = []
    for parameter, owner in owners.items():
        for kind, value in owner.state.get(parameter, {}).items():
            entries.append((names[parameter], kind, tuple(value.shape)))
    message: list = [at, entries]
    dist.broadcast_object_list(message, src=0)
    at, entries = message

    for tensor in whole.state_dict().values():
        dist.broadcast(tensor, 0)
    for name, kind, shape in entries:
        parameter = parameters[name]
        moments = owners[parameter].state[parameter]
        if kind not in moments:
            moments[kind] = parameter.new_zeros(shape)
        dist.broadcast(moments[kind], 0)
    return at


def _owners(optimizers: Optimizers) -> dict[nn.Parameter, torch.optim.Optimizer]:
    """The optimizer of every parameter."""
    owners = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            owners.update(dict.fromkeys(group["params"], optimizer))
    return owners
