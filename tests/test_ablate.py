"""The evidence runner: rows train once, baselines learn, table and curves show what was measured."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from data import ShapesDataset
from experiments import ablate
from experiments.baselines import CrossEntropy, Golden, ImagePath, UNet, Unmasked
from model import IGNORE, FlowSeg, ModelConfig, least_spacing

TINY = ModelConfig(
    num_classes=5, patch_size=4, hidden_size=32, depth=1, num_heads=2, nerf_width=8, conv_width=8,
    encoding_dims=6,
)  # fmt: skip


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Two random images with random labels, some of which are ignored."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (2, 16, 16), generator=generator)
    labels[0, :3] = IGNORE
    return torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1, labels


@pytest.mark.parametrize("kind", [CrossEntropy, UNet, ImagePath])
def test_cross_entropy_trains_the_logits_that_one_step_ends_in(kind):
    torch.manual_seed(0)
    model = kind(TINY)
    image, labels = batch()
    logits = model.sample(image, steps=1)
    assert logits.shape == (2, 5, 16, 16)
    first = model.loss(image, labels)[0].item()
    assert first == pytest.approx(F.cross_entropy(logits, labels, ignore_index=IGNORE).item(), abs=1e-5)
    assert torch.equal(model.segment(image, 1), logits.argmax(1))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        model.loss(image, labels)[0].backward()
        optimizer.step()
    assert model.loss(image, labels)[0].item() < 0.7 * first


@pytest.mark.parametrize("kind", [CrossEntropy, UNet, ImagePath])
@pytest.mark.parametrize("num_classes", [2, 3, 171, 255])
def test_cross_entropy_has_a_logit_for_each_of_any_number_of_classes(kind, num_classes):
    torch.manual_seed(0)
    model = kind(replace(TINY, num_classes=num_classes, encoding_dims=11))
    image, _ = batch()
    labels = torch.full((2, 16, 16), num_classes - 1)
    loss, _ = model.loss(image, labels, count=torch.tensor(512))
    loss.backward()
    p = model.soft_assignment(model.sample(image))
    assert p.shape == (2, num_classes, 16, 16)
    assert torch.allclose(p.sum(1), torch.ones(2, 16, 16))
    assert loss.item() == pytest.approx(-p[:, -1].log().mean().item(), rel=1e-4)
    assert model.segment(image).max() < num_classes


def test_a_unet_aims_at_the_same_logits_after_any_number_of_steps():
    model = UNet(TINY)
    image, _ = batch()
    logits = model.network.encode_image(image)
    for steps in (1, 3):
        assert torch.allclose(model.sample(image, steps), logits, atol=1e-5)
    assert model.segment(image[..., :13, :9]).shape == (2, 13, 9)


def test_unmasked_trains_ignored_pixels_and_the_default_does_not():
    image, labels = batch()
    moved = labels.where(labels != IGNORE, 0)
    losses = {}
    for kind in (FlowSeg, Unmasked):
        torch.manual_seed(0)
        model = kind(TINY)
        losses[kind] = [model.loss(image, y, torch.Generator().manual_seed(1))[0] for y in (labels, moved)]
    assert torch.equal(*losses[Unmasked])
    assert not torch.equal(*losses[FlowSeg])


@pytest.mark.parametrize("kind", [FlowSeg, *ablate.BASELINES])
def test_every_baseline_trains_segments_and_comes_back_from_its_file(kind, tmp_path):
    torch.manual_seed(0)
    model = kind(TINY)
    image, labels = batch()
    loss, stats = model.loss(image, labels, torch.Generator().manual_seed(0))
    loss.backward()
    assert stats.keys() == {"fm_error", "phi", "grad_phi"}
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert sum(gradient.abs().sum() for gradient in gradients) > 0
    model.save(tmp_path / "weights.safetensors")
    loaded = kind.load(tmp_path / "weights.safetensors")
    assert torch.equal(loaded.centroids, model.centroids)
    assert loaded.eps == model.eps
    assert torch.equal(loaded.segment(image, 2), model.eval().segment(image, 2))
    p = model.soft_assignment(model.sample(image, 1))
    assert torch.allclose(p.sum(1), torch.ones(2, 16, 16))


def test_golden_centroids_are_their_own():
    centroids = Golden(TINY).centroids
    assert centroids.shape == FlowSeg(TINY).centroids.shape
    assert not torch.equal(centroids, FlowSeg(TINY).centroids)
    assert Golden(TINY).eps == pytest.approx(TINY.eps * least_spacing(centroids))


def test_a_table_is_made_once_and_again_without_training(tmp_path, monkeypatch, capsys):
    rows = ["conv_width=8", "kind=UNet conv_width=8", "objective=vanilla encoding_dims=11 conv_width=8"]
    settings = {
        "row": rows, "seeds": 2, "steps": [1, 2], "max_steps": 2, "crop_size": 16, "out": tmp_path,
        "split": "validation",
    }  # fmt: skip
    monkeypatch.setattr(ShapesDataset, "__len__", lambda self: 2)
    calls = []
    train = ablate.training.train

    def counted_train(*args):
        calls.append(args)
        return train(*args)

    monkeypatch.setattr(ablate.training, "train", counted_train)
    ablate.main(**settings)
    text = capsys.readouterr().out
    assert len(calls) == 6
    assert text.count("±") == 8
    assert [line.split("|")[1].strip() for line in text.splitlines()[2:]] == rows
    assert calls[4][1].encoding_dims == 11
    assert calls[4][1].objective == "vanilla"
    assert calls[2][5] is UNet
    assert calls[0][0].crop_size == 16
    facts = json.loads((tmp_path / "conv_width=8, seed 1" / "result.json").read_text())
    assert facts["seed"] == 1
    assert set(facts["scores"]) == {"1", "2"}
    assert facts["protocol"]["steps"] == 2
    assert facts["minutes"] > 0
    assert facts["cpu_minutes"] > 0
    assert (tmp_path / "curves.png").stat().st_size > 0

    (tmp_path / "table.md").unlink()
    ablate.main(**settings)
    assert capsys.readouterr().out == text
    assert (tmp_path / "table.md").read_text() == text
    assert len(calls) == 6


def test_the_table_gives_mean_and_standard_deviation_over_the_seeds():
    runs = []
    for score in (0.2, 0.3, 0.4):
        runs.append({"scores": {"1": {"mIoU": score, "aAcc": 0.5}}, "minutes": 2, "cpu_minutes": 7})
    table = ablate.table({"default": runs}, [1, 4])
    assert table.splitlines()[0].endswith("| minutes | CPU minutes |")
    assert table.splitlines()[2] == "| default | 3 | 30.0 ± 10.0 |  | 50.0 ± 0.0 | 2.0 | 7.0 |"


def test_every_row_of_the_default_table_is_a_valid_configuration():
    for row in ablate.ROWS:
        kind, settings = ablate.parse_row(row)
        kind(ablate.training.resolve({"dataset": "shapes"}, settings)[1])
    assert len(set(ablate.ROWS)) == len(ablate.ROWS)


def test_a_row_is_a_kind_and_the_fields_that_differ():
    assert ablate.parse_row("default") == (FlowSeg, [])
    assert ablate.parse_row("kind=UNet tau=1 eps=1e-3") == (UNet, ["tau=1", "eps=1e-3"])
