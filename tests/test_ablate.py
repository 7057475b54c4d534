"""The evidence runner: rows train once, comparisons learn, the table and the plot show what was measured."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data import Shapes
from model import IGNORE, FlowSeg
from network import Config
from tests import ablate
from tests.baselines import CrossEntropy, UNet, Unmasked

TINY = Config(num_classes=5, patch_size=4, hidden=32, depth=1, heads=2, field_width=8, conv_width=8, dims=5)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (2, 16, 16), generator=generator)
    labels[0, :3] = IGNORE
    return torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1, labels


@pytest.mark.parametrize("kind", [CrossEntropy, UNet])
def test_cross_entropy_trains_the_logits_that_one_step_ends_in(kind):
    torch.manual_seed(0)
    model, (image, labels) = kind(TINY), batch()
    logits = model.sample(image, steps=1)
    assert model.loss(image, labels)[0].item() == pytest.approx(
        F.cross_entropy(logits, labels, ignore_index=IGNORE).item(), abs=1e-5
    )
    assert torch.equal(model.segment(image, 1), logits.argmax(1))
    optimizer, first = torch.optim.Adam(model.parameters(), 1e-2), model.loss(image, labels)[0].item()
    for _ in range(30):
        optimizer.zero_grad()
        model.loss(image, labels)[0].backward()
        optimizer.step()
    assert model.loss(image, labels)[0].item() < 0.7 * first


def test_unmasked_teaches_ignored_pixels_and_the_default_does_not():
    image, labels = batch()
    moved = labels.where(labels != IGNORE, 0)
    losses = {}
    for kind in (FlowSeg, Unmasked):
        torch.manual_seed(0)
        model = kind(TINY)
        losses[kind] = [model.loss(image, y, torch.Generator().manual_seed(1))[0] for y in (labels, moved)]
    assert torch.equal(*losses[Unmasked]) and not torch.equal(*losses[FlowSeg])


def test_a_table_is_made_once_and_again_without_training(tmp_path, monkeypatch, capsys):
    settings = {"row": ["default", "kind=UNet", "objective=vanilla dims=3"], "seeds": 2, "steps": [1, 2]}
    settings |= {"max_steps": 2, "size": 16, "out": tmp_path, "split": "validation"}
    monkeypatch.setattr(Shapes, "__len__", lambda self: 2)
    calls = []
    train = ablate.training.train
    monkeypatch.setattr(ablate.training, "train", lambda *args: calls.append(args) or train(*args))
    ablate.main(**settings)
    text = capsys.readouterr().out
    assert len(calls) == 6 and text.count("±") == 8
    assert [line.split("|")[1].strip() for line in text.splitlines()[2:]] == settings["row"]
    assert calls[4][1].dims == 3 and calls[4][1].objective == "vanilla" and calls[2][5] is UNet
    facts = json.loads((tmp_path / "default, seed 1" / "result.json").read_text())
    assert facts["seed"] == 1 and set(facts["scores"]) == {"1", "2"} and facts["protocol"]["steps"] == 2
    assert (tmp_path / "curves.png").stat().st_size > 0

    ablate.main(**settings)
    assert capsys.readouterr().out == text and len(calls) == 6


def test_the_table_gives_mean_and_standard_deviation_over_the_seeds():
    runs = [{"scores": {"1": {"mIoU": m, "aAcc": 0.5}}, "minutes": 2} for m in (0.2, 0.3, 0.4)]
    row = ablate.table({"default": runs}, [1, 4]).splitlines()[2]
    assert row == "| default | 3 | 30.0 ± 10.0 |  | 50.0 ± 0.0 | 2.0 |"


def test_every_row_of_the_default_table_is_a_valid_configuration():
    for row in ablate.ROWS:
        settings = [setting for setting in row.split() if setting not in ("default", *ablate.KINDS)]
        ablate.training.resolve({"dataset": "shapes"}, settings)


def test_curves_rise_and_fall_in_their_own_colours():
    steps = np.linspace(0, 1000, 30)
    series = {"up": [(s, s / 10) for s in steps], "down": [(s, 100 - s / 10) for s in steps]}
    drawn = np.asarray(ablate.curves(series, "step", "mIoU"))
    for color, slope in zip(ablate.LINES[:2], (-1, 1), strict=True):
        y, x = np.nonzero((np.abs(drawn[80:] - color) <= 12).all(-1))
        assert len(x) > 200 and np.sign(np.corrcoef(x, y)[0, 1]) == slope
    assert ablate.curves({"flat": [(0, 0), (5, 0)]}, "step", "mIoU").size == (900, 540)
