"""What a run starts from: its data, its weights, and the state of the run that it continues.

`run` is a train.Run, whose class cannot be imported here.
"""

from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from data import Dataset, open_dataset
from flowseg_tools import records, runs
from flowseg_tools.check import before_training, fingerprint
from flowseg_tools.dinov2 import Alignment, DinoFlowSeg, load_encoder
from flowseg_tools.pretrained import start_from
from flowseg_tools.runs import RunError
from flowseg_tools.settings import command_for
from flowseg_tools.state import STATE, Writer, load_state, share_state
from flowseg_tools.terminal import printable
from model import FlowSeg, ModelConfig


def open_splits(config, loud: Console) -> tuple[Dataset, Dataset]:
    """The training and the validation data of a TrainConfig; says what is wrong with them."""
    splits = []
    for split in ("training", "validation"):
        data = open_dataset(config.dataset, split, config.root)
        data.max_pixels = config.max_pixels
        splits.append(data)
    before_training(splits, loud.print)
    return splits[0], splits[1]


def make_model(run, network: ModelConfig, kind: type[FlowSeg]) -> tuple[FlowSeg, str | Path]:
    """The model of a run, new or to be continued, and what its weights are from."""
    config = run.config
    torch.manual_seed(config.seed)
    model = (DinoFlowSeg if network.vit_width else kind)(network)
    origin: str | Path = "random weights"
    if config.encoder:
        load_encoder(model.network, config.encoder)
    elif network.vit_width and (not config.init or config.init.endswith(".ckpt")):
        raise RunError(f"preset {config.preset} needs --encoder FILE; `flowseg download` lists DINOv2")
    if config.init and not (run.folder / STATE).exists():
        origin = runs.newest_checkpoint(Path(config.init), command_for(config.init))
        known = start_from(model, origin, run.data.labels.classes)
        run.console.print(printable(f"{origin}: {known}"))
    return model, origin


def make_alignment(config, model: FlowSeg) -> Alignment | None:
    """The alignment with the teacher, if there is one; a copy of the model must be made before."""
    if not config.teacher:
        return None
    torch.manual_seed(config.seed)  # whatever the weights were read from
    return Alignment(model.network, config.teacher, config.repa_depth, config.repa_weight)


def enter_folder(run, allow_changes: bool, stack: ExitStack) -> tuple[int, int, float]:
    """Take the run directory, in which one process at a time may train, and continue what is there.

    Returns step, step last validated and best mIoU. What is refused leaves no folder behind.
    """
    labels = fingerprint([run.data, run.held_out])
    settings = {"train": asdict(run.config), "model": asdict(run.model.config), "labels": labels}
    at = (0, 0, -1.0)
    if run.rank == 0:
        for change in runs.check(run.folder, settings, allow_changes):
            run.loud.print(f"warning: {run.folder}: {change}", style="yellow")
        if not stack.enter_context(runs.locked(run.folder)):
            hint = "start no second run there before this one ends"
            run.loud.print(f"warning: {run.folder} cannot be locked: {hint}", style="yellow")
        at = load_state(run.folder, run.modules, run.optimizers, run.console)
    at = share_state(run.modules, run.optimizers, at)
    if at[0] > run.config.max_steps:
        raise RunError(f"{run.folder} is at step {at[0]}; expected --max-steps {at[0]} or more")
    if run.rank == 0:
        runs.claim(run.folder, settings)
        run.log = records.Log(run.folder, run.config.tensorboard, run.console)
        run.log.rewind(*at[:2])
        run.writer = stack.enter_context(Writer())  # it ends before the lock does
    return at
