"""Rerun the evidence: train every row of the ablation table, score it on the test split, print Markdown.

    python ablate.py --dataset camvid --seeds 3 --max-steps 1000 --size 64 [--only reshaped --only vanilla]

All rows of one seed see the same images in the same order and, where the network is the same, start from the
same weights. A finished row is not run again and a stopped one continues, so the command can be repeated
until it is done; every run directory holds its configuration, seed and scores.
"""

import json
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from torch import Tensor, nn

import train as training
from data import IGNORE, open_dataset
from model import FlowSeg
from network import Config, ConvBlock

STEPS = (1, 2, 5, 10, 20)


class CrossEntropy(FlowSeg):
    """The comparison: the same network, one channel a class, read as logits and trained by cross-entropy."""

    def loss(self, image: Tensor, labels: Tensor, generator=None) -> tuple[Tensor, dict[str, Tensor]]:
        x0 = self.source(image)
        logits = x0 + self.network(
            x0, torch.zeros(len(image), device=image.device), self.network.encode(image)
        )
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORE)
        return loss, dict.fromkeys(("fm", "phi", "grad"), loss.detach())

    def soft_assignment(self, x: Tensor) -> Tensor:
        return x.softmax(1)


class UNetwork(nn.Module):
    """A plain convolutional U-Net at full resolution that gives logits in one step of the flow."""

    def __init__(self, num_classes: int, widths: tuple[int, ...] = (24, 48, 96, 144)):
        super().__init__()
        self.stem = ConvBlock(3, widths[0])
        self.down = nn.ModuleList(ConvBlock(i, o, stride=2) for i, o in pairwise(widths))
        self.up = nn.ModuleList(ConvBlock(i + o, i) for i, o in pairwise(widths))
        self.head = nn.Conv2d(widths[0], num_classes, 1)

    def encode(self, image: Tensor) -> Tensor:
        skips = [self.stem(image)]
        for block in self.down:
            skips.append(block(skips[-1]))
        x = skips.pop()
        for block, skip in zip(reversed(self.up), reversed(skips), strict=True):
            x = block(torch.cat([F.interpolate(x, skip.shape[-2:], mode="bilinear"), skip], dim=1))
        return self.head(x)

    def forward(self, x: Tensor, t: Tensor, logits: Tensor) -> Tensor:
        return logits - x


class UNet(CrossEntropy):
    """The yardstick: a plain U-Net trained by cross-entropy."""

    def __init__(self, config: Config):
        super().__init__(config)
        self.network = UNetwork(config.num_classes)


LOGITS = {"dims": 0, "steps": 1, "states": "start"}  # dims: as many as classes
ROWS: dict[str, tuple[dict, type]] = {
    "reshaped": ({}, FlowSeg),
    "vanilla": ({"objective": "vanilla"}, FlowSeg),
    "leaky states": ({"states": "truth"}, FlowSeg),
    "leaky states, vanilla": ({"states": "truth", "objective": "vanilla"}, FlowSeg),
    "t = 0 only": ({"states": "start"}, FlowSeg),
    "annealed": ({"annealed": True}, FlowSeg),
    "x prediction": ({"prediction": "x"}, FlowSeg),
    "noise source": ({"source": "noise"}, FlowSeg),
    "T = -d": ({"transform": "linear"}, FlowSeg),
    "T = -sqrt d": ({"transform": "sqrt"}, FlowSeg),
    "T = 1 / (d + eps)": ({"transform": "inverse"}, FlowSeg),
    "golden encoding": ({"encoding": "golden"}, FlowSeg),
    "tau 1": ({"tau": 1.0}, FlowSeg),
    "3 dimensions": ({"dims": 3}, FlowSeg),
    "16 dimensions": ({"dims": 16}, FlowSeg),
    "3 dimensions, tau 1": ({"dims": 3, "tau": 1.0}, FlowSeg),
    "3 dimensions, tau 1, vanilla": ({"dims": 3, "objective": "vanilla"}, FlowSeg),
    "raw pixels, no image encoder": ({"conv_width": 0}, FlowSeg),
    "cross-entropy, same network": (LOGITS, CrossEntropy),
    "cross-entropy, U-Net": (LOGITS, UNet),
}


def run(name: str, seed: int, given: dict, folder: Path) -> dict:
    """Train one row with one seed unless that is done; returns its test scores by number of Euler steps."""
    changes, kind = ROWS[name]
    path = folder / f"{name.replace(' ', '-').replace('/', 'over')}-{seed}"
    result = path / "result.json"
    if result.exists():
        return json.loads(result.read_text())
    given = given | changes | {"seed": seed}
    classes = len(open_dataset(given["dataset"], "training", given.get("root")).labels.classes)
    config, model_config = training.resolve(
        given | ({"dims": classes} if changes.get("dims") == 0 else {}), []
    )
    began = time.perf_counter()
    code = training.train(config, model_config, path, training.pick_device(), Console(stderr=True), kind)
    if code:
        raise typer.Exit(code)
    minutes = (time.perf_counter() - began) / 60
    model = kind.load(path / "last.safetensors")
    data = open_dataset(config.dataset, "test", config.root)
    scores = {}
    for steps in STEPS if model_config.steps > 1 else (1,):
        metrics, protocol = training.evaluate(model, data, config.size, steps)
        scores[steps] = metrics.scores
    facts = {"row": name, "seed": seed, "minutes": minutes, "scores": scores, "protocol": protocol}
    result.write_text(json.dumps(facts | training.environment(), indent=2) + "\n")
    return json.loads(result.read_text())


def cell(values: list[float]) -> str:
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


def table(results: dict[str, list[dict]]) -> str:
    """Markdown: test mIoU (mean ± standard deviation over seeds) per row and number of Euler steps."""
    lines = ["| row | seeds | " + " | ".join(f"{s} steps" for s in STEPS) + " | aAcc, 1 step | min |"]
    lines.append("|---|---|" + "---|" * (len(STEPS) + 2))
    for name, runs in results.items():
        scores = [[run["scores"].get(str(s), {}).get("mIoU") for run in runs] for s in STEPS]
        cells = [cell(values) if None not in values else "" for values in scores]
        accuracy = cell([run["scores"]["1"]["aAcc"] for run in runs])
        minutes = f"{statistics.mean(run['minutes'] for run in runs):.1f}"
        lines.append(f"| {name} | {len(runs)} | " + " | ".join([*cells, accuracy, minutes]) + " |")
    return "\n".join(lines)


def main(
    dataset: str = "shapes",
    root: Annotated[str, typer.Option(help="Data root.")] = "",
    preset: str = "tiny",
    out: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/ablations"),
    seeds: int = 1,
    max_steps: int = 600,
    size: int = 64,
    batch: int = 8,
    only: Annotated[list[str] | None, typer.Option(help="Rows to run; all if not given.")] = None,
) -> None:
    given = {"dataset": dataset, "root": root, "preset": preset, "size": size, "batch": batch}
    given |= {"max_steps": max_steps, "eval_every": max_steps, "save_every": 100}
    results = {name: [run(name, seed, given, out) for seed in range(seeds)] for name in only or ROWS}
    text = table(results)
    (out / "table.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    typer.run(main)
