"""Train the rows of the ablation table, score them on held-out images and print the table as Markdown.

    python -m experiments.ablate --dataset camvid --row default --row "encoding_dims=19 objective=vanilla"

A row is `default`, or the fields that differ from it as FIELD=VALUE; `kind=NAME` is a baseline of
baselines.py. All rows of one seed see the same images in the same order and, if they have the same network,
start from the same weights. A run that is finished is not repeated, and one that was stopped continues. The
folder of a run holds its configuration, its seed, its curve and its scores.
"""

import json
import statistics
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import train as training
from data import open_dataset
from experiments import baselines
from experiments.baselines import CrossEntropy
from flowseg_tools import draw, runs
from model import FlowSeg

BASELINES = (
    baselines.CrossEntropy, baselines.UNet, baselines.ImagePath, baselines.Leaky, baselines.End,
    baselines.Annealed, baselines.Noise, baselines.Linear, baselines.Sqrt, baselines.Inverse,
    baselines.Golden, baselines.Unmasked,
)  # fmt: skip
KINDS = {f"kind={kind.__name__}": kind for kind in BASELINES}
PAPER = "encoding=kronecker eps=0.3 tau=1 phi_weight=1"
ROWS = [
    "default", "objective=vanilla", PAPER, f"{PAPER} objective=vanilla",
    "kind=CrossEntropy", "kind=UNet", "kind=Leaky",
    "later_share=0", "later_share=0.5", "later_share=1",
    "eps=0.3 tau=0.15", "eps=1 tau=0.07", "tau=0.015", "tau=0.06",
    "phi_weight=1", "phi_weight=4", "phi_weight=64", "encoding_dims=11", "tokens_of=state", "optimizer=adamw",
]  # fmt: skip


def parse_row(row: str) -> tuple[type[FlowSeg], list[str]]:
    """The model that a row trains, and the settings FIELD=VALUE in which it differs from the default."""
    kind = FlowSeg
    settings = []
    for word in row.split():
        if word in KINDS:
            kind = KINDS[word]
        elif word != "default":
            settings.append(word)
    return kind, settings


def run(row: str, given: dict, split: str, steps: list[int], folder: Path) -> dict:
    """Train one row with one seed, unless that is done, and score it on `split` after each number of steps.

    given: options by the names of their fields. The minutes are those of training in this call, including its
    validations: `minutes` by the clock, `cpu_minutes` of all threads of this process.
    """
    result = folder / "result.json"
    if result.exists():
        return json.loads(result.read_text(encoding="utf-8"))

    data = open_dataset(given["dataset"], split, given["root"])
    kind, settings = parse_row(row)
    config, model_config = training.resolve(given, settings)
    if issubclass(kind, CrossEntropy):
        steps = [1]  # there is no flow beyond its logits

    # Training.
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    began = time.perf_counter()
    cpu_began = time.process_time()
    code = training.train(config, model_config, folder, "auto", console, kind)
    if code:
        raise typer.Exit(code)
    facts = {
        "row": row,
        "seed": config.seed,
        "minutes": (time.perf_counter() - began) / 60,
        "cpu_minutes": (time.process_time() - cpu_began) / 60,
        "scores": {},
    }

    # Scores of the last weights, after each number of Euler steps.
    model = kind.load(folder / "last.safetensors", runs.pick_device())
    for count in steps:
        metrics, facts["protocol"] = training.evaluate(model, data, config.crop_size, count)
        facts["scores"][str(count)] = metrics.scores
    result.write_text(json.dumps(facts | runs.environment(), indent=2) + "\n", encoding="utf-8")
    return facts


def table(results: dict[str, list[dict]], steps: list[int]) -> str:
    """Markdown: the mean and the standard deviation over the seeds, per row and number of Euler steps."""
    heads = ["row", "seeds"]
    heads += [f"mIoU at {count}" for count in steps]
    heads += ["aAcc at 1", "minutes", "CPU minutes"]
    lines = [heads, ["---"] * len(heads)]
    for name, seeds in results.items():
        line = [name, str(len(seeds))]
        line += [cell(seeds, count, "mIoU") for count in steps]
        line.append(cell(seeds, 1, "aAcc"))
        line += [
            f"{statistics.mean(facts[key] for facts in seeds):.1f}" for key in ("minutes", "cpu_minutes")
        ]
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(seeds: list[dict], count: int, score: str) -> str:
    """A score after `count` steps in percent, as mean ± standard deviation; empty if it was not measured."""
    values = [100 * facts["scores"][str(count)][score] for facts in seeds if str(count) in facts["scores"]]
    if not values:
        return ""
    mean = f"{statistics.mean(values):.1f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values):.1f}"


def curve(folder: Path) -> list[tuple[float, float]]:
    """The validation mIoU of a run in percent, as points (step, mIoU) from the origin."""
    points = [(0.0, 0.0)]
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if entry.get("mIoU") is not None:
            points.append((entry["step"], 100 * entry["mIoU"]))
    return points


def main(
    dataset: Annotated[str, typer.Option(help="A data set's name, or a folder.")] = "shapes",
    root: Annotated[str, typer.Option(help="Folder of the named data sets.")] = "",
    split: Annotated[str, typer.Option(help="The split on which rows are scored.")] = "test",
    preset: Annotated[str, typer.Option(help="The preset that rows differ from.")] = "tiny",
    row: Annotated[list[str], typer.Option(help="Fields that differ, as FIELD=VALUE; or default.")] = ROWS,
    seeds: Annotated[int, typer.Option(help="Runs of every row, with the seeds 0, 1, ..")] = 1,
    max_steps: Annotated[int, typer.Option(help="Training steps.")] = 480,
    crop_size: Annotated[int, typer.Option(help="Side of the training crop in pixels.")] = 64,
    steps: Annotated[list[int], typer.Option(help="Numbers of Euler steps; begin with 1.")] = (1, 4, 10),
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the runs.")] = Path("runs/ablations"),
) -> None:
    """Train and score rows of the ablation table; the top of experiments/ablate.py says more."""
    steps = list(steps)
    period = max(1, max_steps // 6)
    given = {
        "dataset": dataset, "root": root, "preset": preset, "crop_size": crop_size, "max_steps": max_steps,
        "eval_every": period, "save_every": period,
    }  # fmt: skip
    results = {}
    lines = {}
    for name in row:
        folders = [out / f"{name.replace(' ', ', ')}, seed {seed}" for seed in range(seeds)]
        results[name] = []
        for seed, folder in enumerate(folders):
            results[name].append(run(name, given | {"seed": seed}, split, steps, folder))
        lines[name] = curve(folders[0])
    text = table(results, steps)
    (out / "table.md").write_text(text + "\n", encoding="utf-8")
    draw.save(out / "curves.png", draw.plots({"validation mIoU": lines}, "step", 540))
    print(text)


if __name__ == "__main__":
    typer.run(main)
