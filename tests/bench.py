"""Measure speed and memory: `python -m tests.bench [SECTION ..] [--json FILE] [--repeats N] [--compile]`.

Sections: network, training, potential, sampling, shares, startup, limits, scaling; all if none is named.
What is compared runs in turn in one process and the median counts, so a machine that slows down slows both
sides. --compile adds torch.compile, which takes a minute or more. --tiny shrinks everything to seconds.

Peak memory is taken on Linux in a fresh process per setting: one warm-up step, free memory given back, the
high-water mark of the resident memory reset, one step; the mark minus what was resident before is what
the step needed (gradients included, parameters not). The allocator's leftovers count, as they do in life.
"""

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import model as method
from data import Stream, open_dataset
from model import FlowSeg
from network import Config, Network
from run import counted as counted_step
from tests.reference import Reference
from train import H100, KEPT, UTILISATION, TrainConfig, make_optimizer, resolve

ROOT = Path(__file__).parent.parent


def medium(tiny: bool, **changes) -> Config:
    """D 384, 12 + 2 blocks; the image as raw pixels, so that nothing is timed but what PixNerd has."""
    if tiny:
        return Config(**{"num_classes": 5, "hidden": 32, "heads": 2, "conv_width": 0} | changes)
    size = {"patch_size": 16, "hidden": 384, "depth": 12, "heads": 6, "conv_width": 0}
    field = {"field_depth": 2, "field_width": 64, "field_ratio": 2}
    return Config(**{"num_classes": 171} | size | field | changes)


def interleaved(runs: dict[str, Callable], repeats: int) -> dict[str, float]:
    """Median seconds of every run, after one that does not count; one of each in turn."""
    seconds = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def compiled(network: nn.Module) -> nn.Module:
    """The network with its parts compiled: one transformer block serves all, one painter all tokens."""
    for block in network.blocks:
        block.compile()
    network.paint = torch.compile(network.paint)
    return network


# ---------------------------------------------------------------- memory


def peak_megabytes(run: Callable) -> float:
    """What one call needs at its peak beyond what is resident before it (Linux)."""
    run()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")

    def kilobytes(name: str) -> int:
        return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0])

    before = kilobytes("VmRSS")
    run()
    return (kilobytes("VmHWM") - before) / 1024


def peak_of(job: str, tiny: bool) -> float:
    """`peak_megabytes` of a job, measured in a process of its own."""
    command = [sys.executable, "-m", "tests.bench", "--peak", job, *(["--tiny"] if tiny else [])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def job(name: str, tiny: bool) -> Callable:
    if name == "potential":
        return potential_call(tiny)
    return network_step(*network_of(name, tiny), tiny)


# ---------------------------------------------------------------- sections


def network_of(setting: str, tiny: bool) -> tuple[nn.Module, nn.Module]:
    """(network, the one whose `encode` it uses) of a setting such as `compiled recompute`."""
    torch.manual_seed(0)
    network = (Reference if setting == "reference" else Network)(medium(tiny))
    nn.init.normal_(network.head.weight, std=0.1)  # zero would send no gradient back
    network.recompute = "recompute" in setting
    return (compiled(network) if "compiled" in setting else network), network


def network_step(network: nn.Module, encoder: nn.Module, tiny: bool) -> Callable:
    """Forward and backward of 4 images of 256 x 256, given what the image adds."""
    generator = torch.Generator().manual_seed(0)
    B, side, dims = (1, 32, 16) if tiny else (4, 256, 16)
    image = torch.rand(B, 3, side, side, generator=generator) * 2 - 1
    x, t = torch.randn(B, dims, side, side, generator=generator), torch.rand(B, generator=generator)
    with torch.no_grad():
        features = encoder.encode(image)

    def step() -> None:
        network.zero_grad()
        leaves = [f.detach().requires_grad_(f.is_floating_point()) for f in features]
        network(x, t, leaves).square().mean().backward()

    return step


def bench_network(tiny: bool, repeats: int, compiling: bool) -> dict:
    """Forward and backward against the plain transcription: ratios of time and of peak memory."""
    settings = ["reference", "eager", "eager recompute"]
    settings += ["compiled", "compiled recompute"] if compiling else []
    seconds = interleaved({s: network_step(*network_of(s, tiny), tiny) for s in settings}, repeats)
    memory = {s: peak_of(s, tiny) for s in settings}
    return {
        s: {
            "seconds": seconds[s], "speed-up": seconds["reference"] / seconds[s],
            "peak MB": memory[s], "memory ratio": memory[s] / memory["reference"],
        }
        for s in settings
    }  # fmt: skip


def potential_call(tiny: bool) -> Callable:
    """One call of `potential_gradient` for one image of 512 x 512 and 171 classes."""
    M, N, dims = (1000, 5, 4) if tiny else (512 * 512, 171, 19)
    generator = torch.Generator().manual_seed(0)
    mu = method.coded(N, dims)
    y = torch.randint(0, N, (M,), generator=generator)
    x = mu[torch.randint(0, N, (M,), generator=generator)] + torch.randn(M, dims, generator=generator) / 4
    return lambda: method.potential_gradient(x, y, mu, Config.eps, Config.tau)


@contextmanager
def without_potential():
    """Phi and its gradient cost nothing and are zero."""
    whole = method.potential_gradient
    method.potential_gradient = lambda x, *args: (x.new_zeros(len(x)), torch.zeros_like(x))
    yield
    method.potential_gradient = whole


def training_step(
    config: Config, batch: int, side: int, recompute: bool = True, bfloat16: bool = False
) -> tuple[FlowSeg, Callable]:
    """(model, one whole optimizer step on random images), as `train` takes it, without the data."""
    torch.manual_seed(0)
    model = FlowSeg(config)
    model.network.recompute = recompute
    parameters = list(model.parameters())
    ema = [p.detach().clone() for p in parameters]
    optimizer = make_optimizer(model, TrainConfig())
    image = torch.rand(batch, 3, side, side) * 2 - 1
    labels = torch.randint(0, config.num_classes, (batch, side, side))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = model.loss(image, labels, torch.Generator().manual_seed(0))[0]
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(ema, parameters, 0.005)

    return model, step


def bench_training(tiny: bool, repeats: int, compiling: bool) -> dict:
    """Seconds of a training step of 8 images, without the data, at the size of the preset."""
    facts = {}
    for preset in ("tiny",) if tiny else ("tiny", "small"):
        setup, config = resolve({"preset": preset}, [])
        batch, side = (1, 32) if tiny else (setup.batch, setup.size)
        runs = {}
        for name in ("eager", "eager recompute", "eager bfloat16") + (
            "compiled",
            "compiled bfloat16",
        ) * compiling:
            model, runs[name] = training_step(config, batch, side, "recompute" in name, "bfloat16" in name)
            if "compiled" in name:  # as `flowseg train --compile` does it
                model.network.compile()
                model.network.encode = torch.compile(model.network.encode)
        facts[f"{preset}, {batch} images of {side} px"] = interleaved(runs, repeats)
    return facts


def bench_potential(tiny: bool, repeats: int, compiling: bool) -> dict:
    """A D 384 step at 512 x 512 with 171 classes: reshaped, vanilla, vanilla without diagnostics."""
    width = {} if tiny else {"conv_width": Config.conv_width}
    config = medium(tiny, encoding="coded", dims=4 if tiny else 19, **width)
    side = 32 if tiny else 512
    reshaped = training_step(config, 1, side)[1]
    vanilla = training_step(replace(config, objective="vanilla"), 1, side)[1]

    def bare() -> None:
        with without_potential():
            vanilla()

    call = potential_call(tiny)
    runs = {"reshaped": reshaped, "vanilla": vanilla, "vanilla, not even diagnosed": bare, "potential": call}
    seconds = interleaved(runs, repeats)
    share = 2 * seconds["potential"] / seconds["reshaped"]  # two states a step
    facts = {f"{name}, seconds": value for name, value in seconds.items()}
    facts["reshaped / vanilla, not even diagnosed"] = seconds["reshaped"] / seconds[[*runs][2]]
    return facts | {"share of a step": share, "extra memory MB": peak_of("potential", tiny)}


def bench_sampling(tiny: bool, repeats: int, compiling: bool) -> dict:
    """Images per second of `segment` and cost of S steps of `sample` over that of one."""
    facts = {}
    steps = (1, 2, 5, 10)
    for preset in ("tiny",) if tiny else ("tiny", "small"):
        setup, config = resolve({"preset": preset}, [])
        side = 32 if tiny else setup.size
        image = torch.rand(1, 3, side, side) * 2 - 1
        for style in ("eager", "compiled") if compiling else ("eager",):
            model = FlowSeg(config).eval()
            if style == "compiled":
                compiled(model.network)
            for dtype in (torch.float32, torch.bfloat16):
                half = torch.autocast("cpu", dtype) if dtype == torch.bfloat16 else nullcontext()

                def run(function: Callable, s: int, half=half) -> None:
                    with half:
                        function(image, s)  # noqa: B023

                runs = {f"sample {s}": lambda s=s: run(model.sample, s) for s in steps}  # noqa: B023
                runs |= {f"segment {s}": lambda s=s: run(model.segment, s) for s in (1, Config.steps)}  # noqa: B023
                seconds = interleaved(runs, 5 * repeats)
                facts[f"{preset} {side} px, {style}, {str(dtype)[6:]}"] = {
                    **{f"images/s, {s} steps": 1 / seconds[f"segment {s}"] for s in (1, Config.steps)},
                    **{f"{s} steps / 1": seconds[f"sample {s}"] / seconds["sample 1"] for s in steps[1:]},
                }
    return facts


class Shift(nn.Module):
    """Next to nothing in the place of the neural field, through which the tokens still get a gradient."""

    def __init__(self, config: Config):
        super().__init__()
        self.generator = nn.Linear(config.hidden, config.field_width)

    def forward(self, q: Tensor, weights: Tensor) -> Tensor:
        return q + weights[:, None]


def bench_shares(tiny: bool, repeats: int, compiling: bool) -> dict:
    """Share of a training step by leaving a part out; `data` by drawing the batch."""
    facts = {}
    sizes = {}
    for preset in ("tiny", "small"):
        setup, config = resolve({"preset": preset}, [])
        sizes[preset] = config, setup.batch, setup.size
    sizes["D 384"] = medium(False, conv_width=Config.conv_width, encoding="coded", dims=19), 1, 256
    for name, (config, batch, side) in {"tiny": sizes["tiny"]}.items() if tiny else sizes.items():
        batch, side = (1, 32) if tiny else (batch, side)
        model, whole = training_step(config, batch, side)
        network, optimizer_only = model.network, training_step(config, 1, config.patch_size)[1]
        blocks, field, shift = network.blocks, network.field, nn.ModuleList([Shift(config)])

        def part_missing(
            part: str, whole=whole, network=network, blocks=blocks, field=field, shift=shift
        ) -> None:
            network.blocks = nn.ModuleList() if part == "backbone" else blocks
            network.field = shift if part == "neural field" else field
            with without_potential() if part == "potential" else nullcontext():
                whole()

        parts = ("nothing", "backbone", "neural field", "potential")
        runs = {part: lambda part=part: part_missing(part) for part in parts}
        stream = Stream(open_dataset("shapes", "training", ""), side, 0)
        runs["data"] = lambda batch=batch, stream=stream: [stream[i] for i in range(batch)]
        runs["a step on one patch: mostly optimizer, clipping, EMA"] = optimizer_only
        seconds = interleaved(runs, repeats)
        network.blocks, network.field = blocks, field
        step = seconds["nothing"] + seconds["data"]
        shares = {part: (seconds["nothing"] - seconds[part]) / step for part in parts[1:]}
        shares |= {part: seconds[part] / step for part in [*runs][len(parts) :]}
        facts[f"{name}, batch {batch}, {side} px"] = {"seconds": step, **shares}
    return facts


def bench_startup(tiny: bool, repeats: int, compiling: bool) -> dict:
    """Seconds of whole processes."""
    with tempfile.TemporaryDirectory() as folder:
        weights, photo = Path(folder, "weights.safetensors"), Path(folder, "photo.png")
        FlowSeg(Config(14)).save(weights, size=96, classes=[str(i) for i in range(14)])
        Image.new("RGB", (128, 96), (90, 120, 60)).save(photo)
        segment = ["segment", str(photo), "-o", str(Path(folder, "mask.png")), "--checkpoint", str(weights)]
        commands = {
            "python -c pass": ["-c", "pass"],
            "python -c 'import torch'": ["-c", "import torch"],
            "flowseg --help": ["-m", "flowseg", "--help"],
            "flowseg segment, one small photo": ["-m", "flowseg", *segment, "--force"],
        }
        start = partial(subprocess.run, cwd=ROOT, check=True, capture_output=True)
        return interleaved({k: lambda c=c: start([sys.executable, *c]) for k, c in commands.items()}, repeats)


def rate(run: Callable[[], Tensor], work: float, repeats: int) -> float:
    return work / 1e9 / interleaved({"": run}, 5 * repeats)[""]


def bench_limits(tiny: bool, repeats: int, compiling: bool) -> dict:
    """What this machine can do: matrix products at the network's shapes, copies; and what a step reaches."""
    n = 64 if tiny else 2048
    a, b, out = torch.randn(n, n), torch.randn(n, n), torch.empty(n, n)
    s, w = torch.randn(n // 2, 384), torch.randn(8 * n, 384)
    q, w1 = torch.randn(16, 256, 64), torch.randn(16, 64, 128)
    big, copy = torch.randn(n * n * 8), torch.empty(n * n * 8)
    small, same = big[: 2**17], copy[: 2**17]
    facts = {
        f"GFLOP/s, matrix product of {n}": rate(lambda: torch.mm(a, b, out=out), 2 * n**3, repeats),
        "GFLOP/s, generator (tokens x 384 x 16384)": rate(lambda: s @ w.T, 2 * len(s) * w.numel(), repeats),
        "GFLOP/s, pixels x W1, 16 tokens": rate(lambda: q @ w1, 2 * 16 * 256 * 64 * 128, 10 * repeats),
        "GB/s, copy from and to memory": rate(lambda: copy.copy_(big), 8 * big.numel(), repeats),
        "GB/s, copy of 0.5 MB in the cache": rate(lambda: same.copy_(small), 8 * len(same), 20 * repeats),
    }
    for setting in ("reference", "eager", "eager recompute"):
        step = network_step(*network_of(setting, tiny), tiny)
        with FlopCounterMode(display=False) as counter:
            step()
        work = counter.get_total_flops()
        facts[f"GFLOP, forward and backward, {setting}"] = work / 1e9
        facts[f"GFLOP/s, forward and backward, {setting}"] = work / 1e9 / interleaved({"": step}, repeats)[""]
    return facts


# ---------------------------------------------------------------- scaling on paper


@mock.patch("torch.autocast", mock.MagicMock())  # it does not know the meta device
def counted(config: Config, side: int, recompute: bool = False) -> dict:
    """What `flowseg train --dry-run` counts for an image, and the FLOPs of sampling; nothing is computed."""
    parameters, flops, kept = counted_step(config, side, recompute)
    with torch.device("meta"):
        model = FlowSeg(replace(config, encoding="kronecker"))  # a lexicode would have to be computed
        image, x, t = torch.zeros(1, 3, side, side), torch.zeros(1, config.dims, side, side), torch.zeros(1)
    with torch.no_grad(), FlopCounterMode(display=False) as encoding:
        features = model.network.encode(image)
    with torch.no_grad(), FlopCounterMode(display=False) as evaluation:
        model.network(x, t, features)
    return {
        "M parameters": parameters / 1e6,
        "TFLOP, training step": flops / 1e12,
        "TFLOP, encoding the image": encoding.get_total_flops() / 1e12,
        "TFLOP, one Euler step": evaluation.get_total_flops() / 1e12,
        "GB kept for the backward pass, float32": kept / 1e9,
    }


def bench_scaling(tiny: bool, repeats: int, compiling: bool) -> dict:
    """Cost of presets by counting, and GPU hours of xl: 160,000 steps of 16 images of 512 x 512."""
    facts = {}
    classes = {"num_classes": 171, "dims": 19}
    for preset in ("tiny",) if tiny else ("base", "large", "xl"):
        for side in (32,) if tiny else (256, 512, 1024):
            config = replace(resolve({"preset": preset}, [])[1], **classes)
            facts[f"{preset}, {side} px, an image"] = counted(config, side)
    for recompute in (False, True):
        name = "xl, 512 px, 16 images" + (", recompute" if recompute else "")
        config = replace(resolve({"preset": "tiny" if tiny else "xl"}, [])[1], **classes)
        one = counted(config, 32 if tiny else 512, recompute)
        work = 16 * one["TFLOP, training step"]
        hours = 160_000 * work / (H100 * UTILISATION) / 3600
        facts[name] = {
            "TFLOP, training step": work, "H100 seconds a step": work / (H100 * UTILISATION),
            "H100 hours, 1 GPU": hours, "hours on 8 GPUs": hours / 8,
            "GB of weights, gradients, moments, EMA": one["M parameters"] * 20 / 1e3,
            "GB kept in bfloat16": 16 * one["GB kept for the backward pass, float32"] * KEPT,
        }  # fmt: skip
    return facts


SECTIONS = {
    name.removeprefix("bench_"): value for name, value in [*globals().items()] if name.startswith("bench_")
}


def show(facts: dict, indent: str = "  ") -> None:
    for name, value in facts.items():
        if isinstance(value, dict):
            print(f"{indent}{name}")
            show(value, indent + "  ")
        else:
            print(f"{indent}{name}: {value:.4g}")


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}; expected {', '.join(SECTIONS)}")
    if options.peak:
        print(peak_megabytes(job(options.peak, options.tiny)))
        return {}
    facts = {"threads": torch.get_num_threads(), "torch": str(torch.__version__)}
    for name in options.sections or SECTIONS:
        print(f"{name}: {SECTIONS[name].__doc__.splitlines()[0]}", flush=True)
        facts[name] = SECTIONS[name](options.tiny, options.repeats, options.compile)
        show(facts[name])
        if options.json:
            options.json.write_text(json.dumps(facts, indent=2) + "\n")
    return facts


if __name__ == "__main__":
    main()
