"""Run directories: what they hold, how a run continues where it stopped, and the process it runs in.

    config.json             what was asked for, and the labels and files it is about
    metrics.jsonl           a line for every report
    last, best.safetensors  EMA weights, which other commands read
    state.safetensors       all that the next training step depends on; previous.safetensors: the state before
    preview.png, curves.png a few validation images; loss, mIoU and learning rate

state.py writes and reads the states.
"""

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist

from data import DataError, Dataset, data_root, open_dataset
from model import CheckpointInfo

CONFIG = "config.json"
STOPS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
SAVE = getattr(signal, "SIGUSR1", None)  # save now and go on; Windows has none
MAY_GROW = ("max_steps", "max_pixels")  # settings that a later call may raise
PLACES = ("dataset", "root")  # settings that may change if the files there are the same


class RunError(Exception):
    """A run that cannot start or continue as asked; the message is one line and says what to do."""

    exit_code = 2


def check(folder: Path, config: dict[str, dict], allow_changes: bool) -> list[str]:
    """What has changed since the run in `folder` began, in words; nothing for a new run.

    config: groups of settings, as they are stored in config.json. RunError: the folder holds something else,
    or a run with other settings, unless they are allowed. Files that were added or taken away, and a data set
    that has moved, need no permission.
    """
    path = folder / CONFIG
    try:
        if not path.exists():
            if folder.exists() and any(not file.name.startswith(".") for file in folder.iterdir()):
                raise RunError(f"{folder} exists and is not a run directory; choose another with --out")
            return []
        for file in folder.iterdir():
            if file.exists() and not file.is_file() and not file.is_dir():  # a pipe would keep us waiting
                raise RunError(f"{file} is no regular file; remove it, or choose another folder with --out")
        stored = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(stored, dict) or stored.keys() != config.keys():
            raise RunError(f"{folder} holds a run of another version of flowseg; choose another with --out")
        changes = []
        refused = False

        # Other files are only said; so is another place of the same files.
        said = [name for name in config["labels"] if name.endswith(" files")]
        if all(stored["labels"].get(name, value) == value for name, value in config["labels"].items()):
            said += PLACES
        for group, settings in config.items():
            for name, value in settings.items():
                before = stored[group].get(name)
                if before == value:
                    continue
                change = f"{name} was {before!r}, now {value!r}"
                if name == "max_steps":
                    change += f" (the learning rate falls until step {value})"
                changes.append(change)
                refused |= name not in said and not (name in MAY_GROW and value > before)
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        raise RunError(f"{path} cannot be used ({reason}); choose another folder with --out") from error
    if refused and not allow_changes:
        fix = "repeat its options, use --out, or --allow-changes"
        raise RunError(f"{folder} holds another run ({'; '.join(changes)}): {fix}")
    return changes


def claim(folder: Path, config: dict[str, dict]) -> None:
    """Write what the run in this folder was asked for."""
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)  # a link is removed, never followed
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Keep other processes from training in this folder; the system ends the lock with the process.

    Yields whether it is locked: some network shares, and Windows, have no locks. RunError names the process
    that is at work there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)  # a link is never followed
    with os.fdopen(os.open(folder / ".lock", flags, 0o666), "r+", encoding="utf-8") as file:
        is_locked = True
        try:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            owner = file.read().strip() or "unknown"
            fix = "wait for it, or choose another folder with --out"
            raise RunError(f"{folder} is in use by process {owner}; {fix}") from None
        except (ImportError, OSError):
            is_locked = False
        file.seek(0)
        file.truncate()
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield is_locked


def newest_checkpoint(where: Path | None = None, command: str = "flowseg train") -> Path:
    """A file as it is; or the best weights of a run directory, by default of the newest run under runs/.

    RunError: there are none; it names the command that makes them.
    """
    if where and where.suffix and not where.is_dir():
        return where
    found = []
    for name in ("last.safetensors", "best.safetensors"):
        found += where.glob(name) if where else Path("runs").glob(f"*/{name}")
    if not found:
        other = "pass another folder or a checkpoint" if where else "name a checkpoint with -c"
        raise RunError(f"no weights in {where or 'runs'}/: run `{command}`, or {other}")
    newest = max(found, key=lambda path: path.stat().st_mtime)
    best = newest.with_name("best.safetensors")
    return best if best.exists() else newest


def open_dataset_of(info: CheckpointInfo, dataset: str | None, split: str, root: Path | None) -> Dataset:
    """The data set that weights were trained on, in its place of then or below the data root of today.

    dataset: another one, by name or folder, or None. DataError: it is not there.
    """
    if dataset not in (None, info.dataset):
        return open_dataset(dataset, split, root)
    if not info.dataset:
        raise DataError("the weights name no data set; pass one with --dataset")
    place = Path(info.root, info.dataset)  # it is absolute, unless the data set is built in
    if place.is_absolute() and not root:
        root = Path(info.root) if place.is_dir() and info.root else None
        if not place.is_dir() and not (data_root() / info.dataset).is_dir():
            fix = "pass its place of today with --dataset DIR"
            raise DataError(f"{place}, the data set of these weights, is not there any more; {fix}")
    return open_dataset(info.dataset, split, root)


def environment() -> dict[str, str]:
    """Versions and commit that weights were made with."""
    repository = Path(__file__).parents[1] / ".git"  # not one around an installed wheel
    commit = ""
    with suppress(OSError, subprocess.TimeoutExpired):
        command = ["git", f"--git-dir={repository}", "rev-parse", "--short=12", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip()
    return {"python": sys.version.split()[0], "torch": str(torch.__version__), "commit": commit or "unknown"}


def from_torchrun(name: str, default: int) -> int:
    """The number that torchrun puts into a variable of the environment. RunError: it is none."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or int(text) < default:
        raise RunError(f"${name} is {text!r}; expected a number from torchrun: unset {name} without it")
    return int(text)


def pick_device(name: str = "auto") -> torch.device:
    """The device of that name; auto: CUDA, then MPS, then CPU. Under torchrun each process has its own GPU.

    RunError: it is not available, or one GPU was named for several processes.
    """
    available = [kind for kind in ("cuda", "mps") if getattr(torch, kind).is_available()] + ["cpu"]
    if name == "auto":
        name = available[0]
    kind, _, index = name.partition(":")
    if kind not in available or (index and (kind != "cuda" or not index.isdigit())):
        raise RunError(f"--device {name} is not available; expected auto, {', '.join(available)}")
    if kind != "cuda":
        return torch.device(kind)
    if index and from_torchrun("WORLD_SIZE", 1) > 1:
        raise RunError(f"--device {name} is one GPU for all processes of torchrun; pass --device cuda")
    number = int(index or from_torchrun("LOCAL_RANK", 0))
    if number >= torch.cuda.device_count():
        fix = f"expected 0 to {torch.cuda.device_count() - 1}, and of torchrun as many processes as GPUs"
        raise RunError(f"--device {name}: there is no GPU {number}; {fix}")
    return torch.device("cuda", number)


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Collect signals instead of dying; a second SIGINT interrupts at once (torchrun sends two itself)."""
    received: list[int] = []

    def note(number, frame):
        if number == signal.SIGINT and number in received and "RANK" not in os.environ:
            raise KeyboardInterrupt
        received.append(number)

    previous = {}
    for number in (*STOPS, SAVE):
        if number is None or signal.getsignal(number) == signal.SIG_IGN:  # as nohup sets SIGHUP
            continue
        previous[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def outlive_signals(worker: int) -> None:
    """In a loader process: leave signals of the process group to the process that trains, which still needs
    its loaders. SIGTERM ends it half a minute later, so that no stray is left."""
    for number in (*STOPS, SAVE):
        if number is not None:
            signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))


def process() -> tuple[int, int]:
    """Rank and number of the processes that train together: (0, 1) without torchrun."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def summed(values: torch.Tensor) -> torch.Tensor:
    """The sum over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Make the GPU the current one, and join the processes that torchrun has started, if it has.

    DDP must be gone before the group ends. Threads of gloo need Python's lock to let go of tensors: one that
    outlives the group may abort the process at its end, and DDP, if it goes last, waits for it with the lock.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)  # whose stream events note, and for which loaders pin memory
    if from_torchrun("WORLD_SIZE", 1) == 1 or "RANK" not in os.environ:
        yield
        return
    if not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise RunError("$WORLD_SIZE and $RANK are set without $MASTER_ADDR; use torchrun, or unset them")
    from_torchrun("RANK", 0)
    importlib.import_module("torch._dynamo")  # imported within a group, as by DDP, it would keep it
    if device.type == "cuda":
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    try:
        yield
    finally:
        gc.collect()  # DDP, whose parts refer to each other
        dist.destroy_process_group()


def agree(signals: list[int], wants_save: bool = False) -> tuple[int, bool]:
    """The signal to stop for, or 0, and whether to save, as one process wants or a signal asks for: the same
    answer in every process."""
    counts = [signals.count(number) for number in (*STOPS, SAVE)]
    counts[-1] += wants_save
    if dist.is_initialized():
        counts = summed(torch.tensor(counts)).tolist()
    *stops, save = counts
    stop = 0
    for number, count in zip(STOPS, stops, strict=True):
        if count and not stop:
            stop = int(number)
    return stop, save > 0


def peak_memory(device: torch.device) -> dict[str, float]:
    """The most memory in use so far: on the GPU, or by this process where the system says it."""
    if device.type == "cuda":
        return {"peak_memory_gb": torch.cuda.max_memory_allocated(device) / 1e9}
    if sys.platform != "linux":
        return {}
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return {"peak_memory_gb": int(line.split()[1]) * 1024 / 1e9}
    return {}
