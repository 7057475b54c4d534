"""Do the features of a trained vision transformer arrive in the image path?

    python -m experiments.encoder DIR [--steps N] [--data NAME ...] [--root DIR] [--crop-size N]

A small vision transformer in the public format is trained on `shapes` (14 classes), as a segmenter of its own
with a linear head, and saved as .pth. Frozen, it is then the encoder of other data sets, beside the same
transformer untrained and none. It says nothing about the quality of DINOv2's own weights. Runs that are done
are not repeated: the same command continues.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from data import IGNORE, ShapesDataset
from flowseg_tools.dinov2 import DinoV2, dino_input
from train import Muon, TrainConfig, batches, learning_rate, update

NUM_CLASSES = 14  # of shapes
VIT = {"hidden_size": 96, "depth": 4, "num_heads": 6, "mlp_size": 384, "patch_size": 8, "grid_size": 8}


def write(vit: DinoV2, path: Path) -> None:
    """Write the transformer in the public format."""
    torch.save({name: value for name, value in vit.state_dict().items() if value.numel()}, path)


def train_transformer(vit: DinoV2, steps: int) -> float:
    """Train on `shapes` in place; returns the share of the last images' pixels that was right."""
    P = VIT["patch_size"]
    config = TrainConfig(max_steps=steps, batch_size=16, crop_size=P * VIT["grid_size"], lr=4e-3)
    head = nn.Linear(VIT["hidden_size"], P * P * NUM_CLASSES)  # logits of a patch's pixels

    # Muon for the matrices of the blocks, AdamW for everything else, as in train.py.
    vit.requires_grad_(True)
    matrices = [parameter for parameter in vit.blocks.parameters() if parameter.ndim == 2]
    hidden = {id(parameter) for parameter in matrices}
    parameters = [*vit.parameters(), *head.parameters()]
    others = [parameter for parameter in parameters if id(parameter) not in hidden]
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.99), fused=True)
    optimizers = [adamw, Muon(matrices, config.lr, config.weight_decay)]

    # A linear head on tokens has no other source of knowledge than the transformer.
    right = []
    loader = batches(ShapesDataset("training"), config, 0)
    for step in range(steps):
        images, labels, _ = next(loader)
        tokens = vit(dino_input(images / 127.5 - 1, list(images.shape[2:])))  # (B, L, D)
        grid = (images.shape[2] // P, images.shape[3] // P)
        logits = F.pixel_shuffle(head(tokens).transpose(1, 2).unflatten(2, grid), P)  # (B, classes, H, W)
        loss = F.cross_entropy(logits, labels.long(), ignore_index=IGNORE)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        update(parameters, optimizers, learning_rate(step, config), config.grad_clip)
        right.append(float((logits.argmax(1) == labels).float().mean()))
    return sum(right[-50:]) / len(right[-50:])


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
    parser.add_argument("--vit-steps", type=int, default=3000, help="of the transformer's own training")
    parser.add_argument("--steps", type=int, default=600, help="of every row")
    parser.add_argument("--data", nargs="*", default=["shapes-fine"])
    parser.add_argument("--root", default="")
    parser.add_argument("--crop-size", type=int, default=64, help="of every row; the transformer's own is 64")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    untrained, trained = given.folder / "untrained.pth", given.folder / "trained.pth"

    # The transformer before and after its training.
    if not trained.exists():
        torch.manual_seed(0)
        vit = DinoV2(**VIT, num_registers=0)
        torch.nn.init.normal_(vit.pos_embed, std=0.02)
        torch.nn.init.normal_(vit.cls_token, std=0.02)
        write(vit, untrained)
        score = train_transformer(vit, given.vit_steps)
        write(vit, trained)
        print(f"the transformer's own training on shapes: {score:.1%} of the pixels are right", flush=True)

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
                words += ["--set", "conv_width=8"]  # as narrow beside this transformer as 32 beside ViT-S
                words += ["--root", given.root] if given.root else []
                scores.append(train(given.folder / f"{data}-{name}-{seed}", *words))
            mean = sum(scores) / len(scores)
            print(f"{data} {name}: {mean:.1%} ({', '.join(f'{s:.1%}' for s in scores)})", flush=True)


if __name__ == "__main__":
    main()
