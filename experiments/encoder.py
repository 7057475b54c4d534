"""Do the features of a trained vision transformer arrive in the image path?

    python -m experiments.encoder DIR [--steps N] [--data NAME ...] [--root DIR] [--crop-size N]

A small vision transformer in the public format is trained by `flowseg train --finetune-encoder` on `shapes`
(14 classes) and saved as .pth. Frozen, it is then the encoder of other data sets, beside the same transformer
untrained and none. It says nothing about the quality of DINOv2's own weights. Runs that are done are not
repeated: the same command continues.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from flowseg_tools.dinov2 import DinoV2

PREFIX = "network.vit."
VIT = {"hidden_size": 96, "depth": 4, "num_heads": 6, "mlp_size": 384, "patch_size": 8, "grid_size": 8}


def write_untrained(path: Path) -> None:
    """Write random weights in the public format."""
    torch.manual_seed(0)
    vit = DinoV2(**VIT, num_registers=0)
    torch.nn.init.normal_(vit.pos_embed, std=0.02)
    torch.nn.init.normal_(vit.cls_token, std=0.02)
    torch.save({name: value for name, value in vit.state_dict().items() if value.numel()}, path)


def write_trained(path: Path, checkpoint: Path) -> None:
    """Write the transformer of a checkpoint in the public format."""
    state = {}
    for name, value in load_file(checkpoint).items():
        if name.startswith(PREFIX) and value.numel():
            state[name.removeprefix(PREFIX)] = value.float()
    torch.save(state, path)


def train(folder: Path, *words: str) -> float:
    """Train a run to its end, or take it as it is; its last validation mIoU."""
    command = [sys.executable, "-m", "flowseg", "train", "--quiet", "-o", str(folder), *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["mIoU"] for line in lines if "mIoU" in line][-1]


def main() -> None:
    """Train the transformer, then each row; print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--vit-steps", type=int, default=600, help="of the transformer's own training")
    parser.add_argument("--steps", type=int, default=200, help="of every row")
    parser.add_argument("--data", nargs="*", default=["shapes-fine"])
    parser.add_argument("--root", default="")
    parser.add_argument("--crop-size", type=int, default=64, help="of every row; the transformer's own is 64")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    untrained, trained = given.folder / "untrained.pth", given.folder / "trained.pth"

    # With a narrow convolutional path most of what is learned has to be learned by the transformer.
    if not untrained.exists():
        write_untrained(untrained)
    own = ["--encoder", str(untrained), "--finetune-encoder", "--set", "conv_width=8", "--crop-size", "64"]
    score = train(given.folder / "shapes", *own, "--max-steps", str(given.vit_steps))
    write_trained(trained, given.folder / "shapes/best.safetensors")
    print(f"the transformer's own training on shapes: {score:.1%}", flush=True)

    encoders = {
        "trained": ["--encoder", str(trained)],
        "untrained": ["--encoder", str(untrained)],
        "none": [],
    }
    for data in given.data:
        for name, encoder in encoders.items():
            scores = []
            for seed in range(given.seeds):
                words = ["--dataset", data, "--seed", str(seed), "--crop-size", str(given.crop_size)]
                words += ["--max-steps", str(given.steps), "--eval-every", str(given.steps), *encoder]
                words += ["--root", given.root] if given.root else []
                scores.append(train(given.folder / f"{data}-{name}-{seed}", *words))
            mean = sum(scores) / len(scores)
            print(f"{data} {name}: {mean:.1%} ({', '.join(f'{s:.1%}' for s in scores)})", flush=True)


if __name__ == "__main__":
    main()
