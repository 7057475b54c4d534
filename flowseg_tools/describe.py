"""What `flowseg info` says of this machine, of a run and of a checkpoint; check.py has data sets."""

import json
import os
import platform
import shlex
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from data import data_root
from flowseg_tools import records, runs
from flowseg_tools.dinov2 import DinoFlowSeg
from flowseg_tools.runs import RunError
from flowseg_tools.state import STATE


def machine(root: Path | None = None) -> dict:
    """Versions, threads, memory, devices, the data root with what is in it, the newest run."""
    root = data_root(root)
    facts: dict = {"flowseg": version("flowseg"), **runs.environment(), "system": platform.platform()}
    facts["threads"] = torch.get_num_threads()
    facts["cores"] = os.cpu_count()
    with suppress(AttributeError, ValueError, OSError):  # Windows does not say it in this way
        facts["memory_gb"] = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    facts["gpus"] = [f"{gpu.name} ({gpu.total_memory / 1e9:.0f} GB)" for gpu in gpus]
    facts["device"] = str(runs.pick_device())
    facts["data root"] = str(root)
    facts["data sets"] = sorted(path.name for path in root.glob("[!.]*/") if path.name != "weights")
    facts["weights"] = sorted(path.name for path in root.glob("weights/[!.]*"))
    found = [path.parent for path in Path("runs").glob("*/config.json")]
    newest = max(found, key=lambda folder: folder.stat().st_mtime, default="")
    facts["newest run"] = str(newest)
    return facts


def checkpoint(path: Path) -> dict:
    """What weights say of themselves, after all of them were read and found whole."""
    model = DinoFlowSeg.load(path)
    return {
        "checkpoint": str(path),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **asdict(model.info),
        "config": asdict(model.config),
    }


def run(folder: Path) -> dict:
    """How far a run is, its best score, how it ended, and the command that continues it.

    RunError: its config.json cannot be read.
    """
    try:
        config = json.loads((folder / runs.CONFIG).read_text(encoding="utf-8"))["train"]
        max_steps = int(config["max_steps"])
        facts = {"run": str(folder), "dataset": config["dataset"], "preset": config["preset"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunError(f"{folder / runs.CONFIG} cannot be read ({error!r}); name another run") from error

    # Of a run that is at work the log knows more than the state that it saved last.
    saved = saved_step(folder)
    log = records.read_log(folder)
    logged = max((line["step"] for line in log), default=0)
    running = is_running(folder)
    facts |= {"step": max(saved, logged) if running else saved, "max_steps": max_steps, "saved_step": saved}
    scored = [(line["mIoU"], line["step"]) for line in log if line.get("mIoU") is not None]
    facts["best_mIoU"], facts["best_step"] = max(scored, default=(None, None))

    command = ["flowseg", "train", "--config", str(folder / runs.CONFIG), "-o", str(folder)]
    if running:
        facts["state"] = "running"
    elif saved == max_steps:
        facts["state"] = "finished"
        command += ["--max-steps", str(2 * max_steps)]
    else:
        facts["state"] = records.last_event(folder) or "killed, or its machine went down"
    return facts | {"continue": shlex.join(command)}


def saved_step(folder: Path) -> int:
    """The training step of the state that a run saved last; 0 if there is none that can be read."""
    try:
        with safe_open(folder / STATE, "pt") as file:
            return int(json.loads(file.metadata()["at"])[0])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError):
        return 0


def is_running(folder: Path) -> bool:
    """Whether a process holds the lock of a run."""
    with suppress(ImportError, OSError):  # no file, or a share without locks
        import fcntl

        with open(folder / ".lock", encoding="utf-8") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                return True
    return False
