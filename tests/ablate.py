"""Rerun the evidence: train rows of the ablation table, score them on held-out photos, print Markdown.

    python -m tests.ablate --dataset camvid-240 --seeds 3 --row default --row "dims=3 objective=vanilla"

A row is `default` or the fields that differ from it; `kind` names a baseline of baselines.py. All rows
of a seed see the same images in the same order and, given the same network, start from the same weights. A
finished run is not repeated and a stopped one continues. Each run directory holds its configuration, seed,
curve and scores.
"""

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console

import picture
import train as training
from data import open_dataset
from model import FlowSeg
from picture import INK, PAPER
from run import environment
from tests import baselines
from tests.baselines import CrossEntropy

NAMES = ("Leaky", "FirstStep", "Annealed", "End", "Noise", "Linear", "Sqrt", "Inverse", "Golden", "Unmasked",
         "CrossEntropy", "UNet")  # fmt: skip
KINDS = {f"kind={name}": getattr(baselines, name) for name in NAMES}
GRID = (226, 227, 229)
LINES = ((31, 105, 183), (219, 96, 32), (30, 140, 95), (158, 68, 148), (190, 140, 0), (95, 100, 108))
ROWS = [
    "default", "objective=vanilla", "kind=Leaky objective=vanilla",
    "eps=1e-4", "eps=1e-3", "eps=1e-1", "tau=0.3", "tau=1", "encoding=kronecker",
    "encoding=coded", "encoding=coded objective=vanilla", "dims=8", "dims=4", "dims=3",
    "dims=3 objective=vanilla", "dims=3 tau=1", "conv_width=0", *KINDS,
]  # fmt: skip


def run(row: str, given: dict, split: str, steps: list[int], folder: Path) -> dict:
    """Train one row with one seed, unless that is done, and score it on `split` after each of `steps`."""
    result = folder / "result.json"
    if result.exists():
        return json.loads(result.read_text())
    data = open_dataset(given["dataset"], split, given["root"])
    kind = next((KINDS[setting] for setting in row.split() if setting in KINDS), FlowSeg)
    settings = [setting for setting in row.split() if setting not in ("default", *KINDS)]
    if issubclass(kind, CrossEntropy):
        logits = f"dims={len(data.labels.classes)}", "encoding=kronecker", "steps=1"
        settings, steps = [*settings, *logits], [1]
    config, model_config = training.resolve(given, settings)
    began, console = time.perf_counter(), Console(stderr=True, soft_wrap=True, highlight=False)
    if code := training.train(config, model_config, folder, "auto", console, kind):
        raise typer.Exit(code)
    facts = {"row": row, "seed": config.seed, "minutes": (time.perf_counter() - began) / 60, "scores": {}}
    model = kind.load(folder / "last.safetensors", training.pick_device())
    for count in steps:
        metrics, facts["protocol"] = training.evaluate(model, data, config.size, count)
        facts["scores"][str(count)] = metrics.scores
    result.write_text(json.dumps(facts | environment(), indent=2) + "\n")
    return facts


def table(results: dict[str, list[dict]], steps: list[int]) -> str:
    """Markdown: mean and standard deviation over the seeds, per row and number of Euler steps."""

    def cell(runs: list[dict], count: int, score: str) -> str:
        values = [100 * run["scores"][str(count)][score] for run in runs if str(count) in run["scores"]]
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.1f}{spread}" if values else ""

    heads = ["row", "seeds", *(f"mIoU at {count}" for count in steps), "aAcc at 1", "minutes"]
    lines = [heads, ["---"] * len(heads)]
    for name, runs in results.items():
        scores = [cell(runs, count, "mIoU") for count in steps] + [cell(runs, 1, "aAcc")]
        minutes = statistics.mean(run["minutes"] for run in runs)
        lines.append([name, str(len(runs)), *scores, f"{minutes:.1f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def curves(series: dict[str, Sequence[tuple[float, float]]], xlabel: str, ylabel: str) -> Image.Image:
    """A plot of named lines of (x, y) from the origin; drawn three times as large, so that it is smooth."""
    width, height, em = 2700, 1620, 66
    font = ImageFont.load_default(em)
    highest = 5 * np.ceil(np.concatenate([*series.values()]).max(0) / 5).clip(1)
    origin, end = np.array([3 * em, height - 4 * em]), np.array([width - 3 * em, 4 * em])
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for share in np.linspace(0, 1, 6):
        x, y = origin + share * (end - origin)
        draw.line((x, origin[1], x, end[1]), GRID, 3)
        draw.line((origin[0], y, end[0], y), GRID, 3)
        draw.text((x, origin[1] + em / 2), f"{share * highest[0]:.4g}", INK, font, anchor="mt")
        draw.text((origin[0] - em / 2, y), f"{share * highest[1]:.3g}", INK, font, anchor="rm")
    draw.text((origin[0], end[1] - em), ylabel, INK, font, anchor="lb")
    draw.text((end[0], height - em), xlabel, INK, font, anchor="rb")
    for i, (name, line) in enumerate(series.items()):
        points, color = origin + np.array(line) / highest * (end - origin), LINES[i % len(LINES)]
        draw.line([*map(tuple, points)], color, em // 6, joint="curve")
        draw.text((origin[0] + i * (end - origin)[0] / len(series), em), name, color, font, anchor="lt")
    return sheet.resize((width // 3, height // 3), Image.Resampling.LANCZOS)


def main(
    dataset: str = "shapes",
    root: Annotated[str, typer.Option(help="Data root.")] = "",
    split: Annotated[str, typer.Option(help="Where rows are scored.")] = "test",
    preset: str = "tiny",
    row: Annotated[list[str], typer.Option(help="Fields that differ, as FIELD=VALUE; or default.")] = ROWS,
    seeds: int = 1,
    max_steps: int = 480,
    size: int = 64,
    steps: Annotated[list[int], typer.Option(help="Euler steps; begin with 1.")] = (1, 4, 10),
    out: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/ablations"),
) -> None:
    """Train and score rows of the ablation table; see the top of tests/ablate.py."""
    given = {"dataset": dataset, "root": root, "preset": preset, "size": size, "max_steps": max_steps}
    given |= dict.fromkeys(("eval_every", "save_every"), max(1, max_steps // 6))
    results, lines = {}, {}
    for name in row:
        paths = [out / f"{name.replace(' ', ', ')}, seed {seed}" for seed in range(seeds)]
        results[name] = [run(name, given | {"seed": i}, split, list(steps), at) for i, at in enumerate(paths)]
        log = map(json.loads, (paths[0] / "metrics.jsonl").read_text().splitlines())
        lines[name] = [(0, 0)] + [(entry["step"], 100 * entry["mIoU"]) for entry in log if "mIoU" in entry]
    text = table(results, list(steps))
    (out / "table.md").write_text(text + "\n")
    picture.save(out / "curves.png", curves(lines, "step", "validation mIoU"))
    print(text)


if __name__ == "__main__":
    typer.run(main)
