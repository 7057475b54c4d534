"""Metric, schedule, run directory and resume."""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

import flowseg
import train as training
from data import ShapesDataset
from experiments.baselines import UNet
from flowseg_tools import estimate, records
from flowseg_tools.dinov2 import DinoFlowSeg
from flowseg_tools.estimate import counted
from flowseg_tools.predict import segment_photo
from flowseg_tools.pretrained import start_from
from flowseg_tools.runs import RunError, newest_checkpoint, pick_device
from flowseg_tools.settings import PRESETS, RECIPES
from flowseg_tools.state import save_state
from model import CheckpointError, FlowSeg, ModelConfig, Network, RMSNorm
from train import (
    Metrics,
    Muon,
    Objective,
    TrainConfig,
    confusion_matrix,
    evaluate,
    learning_rate,
    orthogonal,
    resolve,
)

ROOT = Path(__file__).parent.parent
TINY = [
    "hidden_size=16",
    "depth=1",
    "num_heads=2",
    "nerf_depth=1",
    "nerf_width=8",
    "conv_width=8",
    "encoding_dims=11",
    "log_every=1",
    "steps=2",
]


@pytest.fixture(autouse=True)
def _few_scenes(monkeypatch):
    """Validation on three scenes: what is tested here is the loop, not the score."""
    monkeypatch.setattr(ShapesDataset, "__len__", lambda self: 3 if self.split != "training" else 1_000_000)


def run(folder, *settings, steps=4, **options):
    given = {"batch_size": 2, "crop_size": 32, "max_steps": steps, "warmup_steps": 1} | options
    config, model_config = resolve(given, [*TINY, *settings])
    return training.train(config, model_config, folder, "cpu", Console(quiet=True))


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- metric


def scores_by_sets(pairs, num_classes):
    """An independent computation of IoU: explicit sets of pixel positions, one class at a time."""
    iou = []
    for k in range(num_classes):
        truth = set()
        found = set()
        for i, (labels, prediction) in enumerate(pairs):
            for position, (y, p) in enumerate(
                zip(labels.ravel().tolist(), prediction.ravel().tolist(), strict=True)
            ):
                if y != 255:
                    truth |= {(i, position)} if y == k else set()
                    found |= {(i, position)} if p == k else set()
        iou.append(len(truth & found) / len(truth | found) if truth | found else None)
    present = [value for value in iou if value is not None]
    return iou, sum(present) / len(present)


def test_metric_equals_an_independent_computation():
    """Absent classes, an all-ignore image, the last class id, odd sizes."""
    rng = np.random.default_rng(0)
    pairs = [
        (rng.integers(0, 4, (7, 5)), rng.integers(0, 6, (7, 5))),
        (rng.integers(3, 7, (3, 9)), rng.integers(3, 7, (3, 9))),
    ]
    pairs[0][0][:3] = 255
    pairs.append((np.full((4, 4), 255), rng.integers(0, 6, (4, 4))))
    confusion = sum(confusion_matrix(labels.astype(np.uint8), p.astype(np.uint8), 8) for labels, p in pairs)
    metrics = Metrics(confusion)
    iou, mean = scores_by_sets(pairs, 8)
    assert iou[7] is None
    assert math.isnan(metrics.iou[7])
    assert metrics.iou[:7].tolist() == pytest.approx(iou[:7], abs=1e-12)
    assert metrics.scores["mIoU"] == pytest.approx(mean, abs=1e-12)
    y, p = (np.concatenate([pair[i].ravel() for pair in pairs]) for i in (0, 1))
    valid = y != 255
    assert metrics.scores["aAcc"] == pytest.approx((y == p)[valid].mean(), abs=1e-12)
    recall = [(p[y == k] == k).mean() for k in range(8) if (y == k).any()]
    assert metrics.scores["mAcc"] == pytest.approx(np.mean(recall), abs=1e-12)
    assert confusion.dtype == np.int64


def test_nothing_labelled_scores_nan():
    assert all(math.isnan(value) for value in Metrics(np.zeros((3, 3), np.int64)).scores.values())


def test_pixels_labelled_255_do_not_count():
    labels = np.array([[0, 1, 255, 255]], np.uint8)
    first = confusion_matrix(labels, np.array([[0, 1, 0, 1]], np.uint8), 2)
    second = confusion_matrix(labels, np.array([[0, 1, 1, 0]], np.uint8), 2)
    assert np.array_equal(first, second)
    assert first.sum() == 2


class Fixed:
    """A data set of two photos of different sizes whose labels a model can know."""

    name = "fixed"
    split = "test"

    def __init__(self, sizes, labels):
        self.sizes = sizes
        self.labels = labels

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, i):
        return Image.new("RGB", self.sizes[i]), np.full(self.sizes[i][::-1], i, np.uint8)


def test_evaluation_compares_at_the_original_size():
    torch.manual_seed(0)
    model = FlowSeg(resolve({}, TINY)[1]).eval()
    data = Fixed([(37, 20), (300, 31)], ShapesDataset("validation").labels)
    metrics, protocol = evaluate(model, data, 32, 1)
    assert metrics.confusion.sum(1)[:2].tolist() == [37 * 20, 300 * 31]
    assert (protocol["images"], protocol["steps"], protocol["short_side"]) == (2, 1, 32)


@pytest.fixture
def model():
    """Random weights, with 14 classes that all occur in the masks of `photo`."""
    torch.manual_seed(0)
    model = FlowSeg(resolve({}, [*TINY, "steps=1", "tau=1"])[1]).eval()
    for p in model.parameters():  # a new network is zero at its end: every pixel alike
        torch.nn.init.normal_(p, std=0.2)
    return model


def photo(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize(("limit", "chosen"), [(None, [0, 1, 2, 3, 4]), (9, [0, 1, 2, 3, 4]), (2, [0, 4]),
                                               (3, [0, 2, 4]), (1, [0])])  # fmt: skip
def test_limit_takes_evenly_spaced_images_and_says_so(model, limit, chosen):
    data = Fixed([(9, 8)] * 5, ShapesDataset("validation").labels)
    metrics, protocol = evaluate(model, data, 8, 1, limit=limit)
    assert metrics.confusion.sum(1).nonzero()[0].tolist() == chosen
    assert (protocol["images"], protocol["evenly_spaced_of"]) == (len(chosen), 5)


class Scored(Fixed):
    """Odd sizes, an image without any label, absent classes, the last class id."""

    def __getitem__(self, i):
        width, height = self.sizes[i]
        rng = np.random.default_rng(i)
        labels = rng.choice([0, 3, 13], (height, width)).astype(np.uint8)
        labels[rng.random((height, width)) < 0.2] = 255
        if i == 1:
            labels[:] = 255
        return photo(width, height), labels


@pytest.mark.parametrize("options", [{}, {"flip": True}, {"mode": "slide"}], ids=str)
def test_scores_of_an_evaluation_equal_an_independent_computation(model, options):
    data = Scored([(13, 7), (9, 9), (21, 33)], ShapesDataset("validation").labels)
    metrics, _ = evaluate(model, data, 8, 1, **options)
    pairs = []
    for i in range(3):
        image, labels = data[i]
        pairs.append((labels, segment_photo(model, image, 8, 1, **options)[0]))
    iou, mean = scores_by_sets(pairs, 14)
    assert None in iou and iou[13] is not None
    assert [None if math.isnan(value) else value for value in metrics.iou] == pytest.approx(iou, abs=1e-9)
    y, p = (np.concatenate([pair[i].ravel() for pair in pairs]) for i in (0, 1))
    recall = [(p[y == k] == k).mean() for k in (0, 3, 13)]
    expected = {"mIoU": mean, "aAcc": (y == p)[y != 255].mean(), "mAcc": np.mean(recall)}
    assert metrics.scores == pytest.approx(expected, abs=1e-9)


# ---------------------------------------------------------------- configuration


def test_precedence_is_setting_then_option_then_preset_then_default():
    given = {"preset": "small", "lr": 0.5, "crop_size": 48}
    settings = ["crop_size=64", "activation_checkpointing=true", "encoding_dims=18"]
    config, model_config = resolve(given, settings)
    assert config.lr == 0.5
    assert config.crop_size == 64
    assert config.seed == TrainConfig.seed
    assert config.activation_checkpointing is True
    assert model_config.hidden_size == PRESETS["small"]["hidden_size"]
    assert model_config.encoding_dims == 18
    assert model_config.num_classes == len(ShapesDataset("training").labels.classes)


def test_classes_are_coded_unless_asked_otherwise(tmp_path):
    for split in ("training", "validation", "test"):
        for kind in ("images", "annotations"):
            (tmp_path / kind / split).mkdir(parents=True)
            Image.new("L", (8, 8)).save(tmp_path / kind / split / "a.png")
    for count in (2, 33, 255):
        names = [f"class {i}" for i in range(count)]
        (tmp_path / "dataset.toml").write_text(f"classes = {names}")
        config = resolve({"dataset": str(tmp_path)}, [])[1]
        assert (config.num_classes, config.encoding, config.encoding_dims) == (count, "coded", 19)
    config = resolve({"dataset": "shapes-fine"}, ["encoding=kronecker"])[1]
    assert (config.encoding, config.encoding_dims) == ("kronecker", 3)
    with pytest.raises(RunError, match=r"encoding_dims is 9; expected 11 to 19 for 255 classes"):
        resolve({"dataset": str(tmp_path)}, ["encoding_dims=9"])


@pytest.mark.parametrize(("given", "settings", "message"), [
    ({"preset": "tinny"}, [], "--preset tinny: expected tiny, .*did you mean 'tiny'"),
    ({"objective": "reshape"}, [], "objective is 'reshape'; expected reshaped or vanilla"),
    ({"optimizer": "adam"}, [], "optimizer is 'adam'; expected adamw or muon"),
    ({}, ["encoding=code"], "encoding is 'code'; expected coded or kronecker"),
    ({}, ["epsilon=1"], r"--set epsilon=1: expected FIELD=VALUE.*did you mean 'eps'"),
    ({}, ["dtype=half"], "dtype is 'half'; expected auto or float32 or bfloat16"),
    ({}, ["eps=small"], "--set eps=small: expected a number"),
    ({}, ["eps"], "--set eps: expected a number"),
    ({}, ["eps=nan"], "eps is nan"),
    ({}, ["lr=inf"], "lr is inf"),
    ({}, ["compile=yes"], "compile is 'yes'; expected auto or true or false"),
    ({}, ["deterministic=yes"], "--set deterministic=yes: expected deterministic=true or deterministic=fal"),
    ({}, ["num_classes=3"], "--set num_classes=3"),
    ({"batch": 2}, [], "batch is no setting.*did you mean 'batch_size'"),
    ({"recipe": "ade20k"}, [], "--recipe ade20k: expected ade20k-256, .*did you mean 'ade20k-"),
    ({"crop_size": 50}, [], "crop_size is 50; expected a multiple of the patch size 8"),
    ({"batch_size": 5}, ["grad_accum_steps=2"], "batch_size is 5; expected a multiple of 2"),
])  # fmt: skip
def test_mistakes_in_the_configuration_are_named(given, settings, message):
    with pytest.raises(RunError, match=message):
        resolve(given, settings)


def test_every_number_of_the_configuration_has_a_range():
    limits = training.TRAIN_RANGES.items()
    ranges = {name: ends for name, ends in limits if not isinstance(ends[0], str)}
    assert ranges.keys() == {field.name for field in fields(TrainConfig) if field.type in (int, float)}
    for name, (low, high) in ranges.items():
        for value in (low - 1, high * 2):
            with pytest.raises(RunError, match=rf"^{name} is "):
                resolve({name: value})


def test_a_recipe_is_a_table_that_options_win_over():
    """The label tables are enough: no photo of ADE20K or COCO-Stuff is here."""
    known = {field.name for field in (*fields(TrainConfig), *fields(ModelConfig))}
    for name, classes in (("ade20k", 150), ("coco-stuff", 171)):
        first, network = resolve({"recipe": f"{name}-256"})
        assert (first.dataset, network.num_classes, network.hidden_size) == (name, classes, 1152)
        assert (first.crop_size, first.batch_size, first.lr, first.init) == (256, 64, 1e-4, "")
        second, _ = resolve({"recipe": f"{name}-512"})
        assert (second.crop_size, second.batch_size, second.lr) == (512, 16, 5e-5)
        assert (second.weight_decay, second.grad_clip, second.init) == (
            0.01,
            1.0,
            os.path.abspath(f"runs/{name}-256"),
        )
    assert all(recipe.keys() <= known for recipe in RECIPES.values())

    given = {"recipe": "ade20k-256", "preset": "tiny", "batch_size": 8}
    config, network = resolve(given, ["lr=0.5", "depth=3"])
    assert (config.batch_size, config.lr, config.crop_size) == (8, 0.5, 256)
    assert (network.hidden_size, network.depth) == (128, 3)


def test_learning_rate_warms_up_and_ends_at_zero():
    config = TrainConfig(lr=1.0, warmup_steps=10, max_steps=100)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9]
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] < 1e-3


def grouped(kind=FlowSeg, **options):
    """A model of the size of PixNerd's, and for each optimizer its groups as (weight decay, names)."""
    with torch.device("meta"):
        model = kind(ModelConfig(num_classes=150, hidden_size=1152, depth=26, num_heads=16, nerf_depth=4))
    optimizers = training.make_optimizers(Objective(model, None), TrainConfig(weight_decay=0.1, **options))
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            groups.append((group["weight_decay"], {names[parameter] for parameter in group["params"]}))
    assert sum(len(names) for _, names in groups) == len(names)
    return model, optimizers, groups


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_norms_biases_and_embeddings_do_not_decay(optimizer):
    model, optimizers, groups = grouped(optimizer=optimizer)
    assert optimizers[0].param_groups[0]["fused"]
    (decay, matrices), (none, free), *hidden = groups
    assert decay == 0.1
    assert none == 0
    assert [decay for decay, _ in hidden] == [0.1] * (optimizer == "muon")
    expected = {name for name, _ in model.named_parameters() if name.endswith(".bias")}
    expected.add("network.null_class")
    for name, module in model.named_modules():
        if isinstance(module, RMSNorm | torch.nn.GroupNorm):
            expected.add(f"{name}.weight")
    assert free == expected
    assert len(matrices) > 0


def test_muon_takes_all_matrices_but_those_of_the_first_and_last_layers():
    model, optimizers, groups = grouped()
    assert [type(optimizer) for optimizer in optimizers] == [torch.optim.AdamW, Muon]
    outer = {
        "patch_embed", "pixel_embed", "time_mlp.0", "image_encoder.down.0.0", "head", "image_to_velocity.0",
        "image_to_velocity.1", "image_to_velocity.2", "token_to_velocity",
    }  # fmt: skip
    assert groups[0][1] == {f"network.{name}.weight" for name in outer}
    shapes = dict(model.named_parameters())
    assert {shapes[name].ndim for name in groups[2][1]} == {2, 4}

    _, optimizers, _ = grouped(optimizer="adamw")
    assert [type(optimizer) for optimizer in optimizers] == [torch.optim.AdamW]
    _, _, groups = grouped(UNet)
    assert groups[0][1] == {"network.image_encoder.down.0.0.weight", "network.head.weight"}


# ---------------------------------------------------------------- Muon


def random_matrix(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def newton_schulz(matrix):
    """The steps as they are taken in bfloat16 on CUDA, here in float32."""
    X = matrix / matrix.norm()
    for _ in range(5):
        A = X @ X.T
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (6, 6), (16, 16), (8, 40), (40, 8), (24, 216), (128, 64)])
@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e4])
def test_orthogonal_keeps_the_directions_and_makes_all_singular_values_about_one(shape, scale):
    matrix = scale * random_matrix(*shape)
    found = orthogonal(matrix)
    assert found.shape == matrix.shape
    assert found.dtype == matrix.dtype
    U, _, V = torch.linalg.svd(matrix, full_matrices=False)
    turned = U.T @ found @ V.T
    values = turned.diag()
    assert values.min() >= 0.6
    assert values.max() <= 1.3
    assert (turned - values.diag()).abs().max() < 1e-3
    assert torch.allclose(found, newton_schulz(matrix), atol=1e-4)


def stepped(weight, gradients, lr=0.1, weight_decay=0.2):
    """The weight after one step of Muon for each gradient."""
    weight = torch.nn.Parameter(weight.clone())
    optimizer = Muon([weight], lr, weight_decay)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
def test_muon_is_its_equation_and_that_of_pytorch(shape):
    weight = random_matrix(*shape)
    gradients = [random_matrix(*shape, seed=seed) for seed in (1, 2, 3)]
    W = weight
    M = torch.zeros(shape)
    for G in gradients:
        M = M + 0.05 * (G - M)
        size = 0.1 * 0.2 * math.sqrt(10)
        W = (1 - 0.1 * 0.2) * W - size * newton_schulz(G + 0.95 * (M - G))
    found = stepped(weight, gradients)
    assert torch.allclose(found, W, atol=1e-5)

    theirs = torch.nn.Parameter(weight.clone())
    settings = {"lr": 0.1, "weight_decay": 0.2, "adjust_lr_fn": "match_rms_adamw"}
    optimizer = torch.optim.Muon([theirs], **settings)
    for gradient in gradients:
        theirs.grad = gradient.clone()
        optimizer.step()
    moved = (found - weight).norm()
    assert (found - theirs).norm() < 0.05 * moved  # there the steps are in bfloat16, also on a CPU


def test_a_convolution_is_updated_as_its_flattened_matrix():
    weight = random_matrix(8, 4, 3, 3)
    gradients = [random_matrix(8, 4, 3, 3, seed=seed) for seed in (1, 2)]
    flat = stepped(weight.flatten(1), [gradient.flatten(1) for gradient in gradients])
    assert torch.equal(stepped(weight, gradients), flat.view_as(weight))
    last = [gradient.contiguous(memory_format=torch.channels_last) for gradient in gradients]
    assert torch.allclose(stepped(weight, last), flat.view_as(weight), atol=1e-6)


def test_a_matrix_without_a_gradient_is_left_as_it_is():
    still = torch.nn.Parameter(random_matrix(3, 4))
    moved = torch.nn.Parameter(random_matrix(3, 4))
    moved.grad = random_matrix(3, 4, seed=1)
    Muon([still, moved], 0.1, 0.2).step()
    assert torch.equal(still, random_matrix(3, 4))
    assert not torch.equal(moved, random_matrix(3, 4))


SHARED = """
import sys
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tests.test_train import muon_steps

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
save_file(muon_steps(), f"{folder}/{rank}.safetensors")
dist.destroy_process_group()
"""


def muon_steps():
    """Five matrices and convolutions, and their momenta, after three steps of Muon."""
    shapes = [(6, 10), (10, 6), (4, 3, 3, 3), (5, 5), (2, 30)]
    weights = [torch.nn.Parameter(random_matrix(*shape)) for shape in shapes]
    optimizer = Muon(weights, 0.1, 0.2)
    for seed in (1, 2, 3):
        for weight in weights:
            weight.grad = random_matrix(*weight.shape, seed=seed)
        optimizer.step()
    tensors = {f"weight {i}": weight.detach() for i, weight in enumerate(weights)}
    return tensors | {f"momentum {i}": optimizer.state[w]["momentum"] for i, w in enumerate(weights)}


@pytest.mark.slow
def test_two_processes_that_share_the_matrices_of_muon_are_one(tmp_path):
    processes = []
    for rank in range(2):
        command = [sys.executable, "-c", SHARED, str(rank), str(tmp_path)]
        processes.append(subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True))
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    expected = muon_steps()
    for rank in range(2):
        found = load_file(tmp_path / f"{rank}.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.allclose(found[name], expected[name], rtol=0, atol=1e-6) for name in expected)


def test_each_process_orthogonalises_its_share_of_the_matrices(monkeypatch):
    """The work is shared: two processes take half of it each."""
    taken = []
    real = training.orthogonal
    monkeypatch.setattr(training, "orthogonal", lambda matrix: taken.append(matrix.shape) or real(matrix))
    monkeypatch.setattr(training.dist, "broadcast", lambda *args, **options: SimpleNamespace(wait=lambda: 0))
    counts = []
    for rank in range(2):
        monkeypatch.setattr(training, "process", lambda rank=rank: (rank, 2))
        taken.clear()
        muon_steps()
        counts.append(len(taken))
    assert counts == [9, 6]  # 3 and 2 of 5 matrices, in three steps


# ---------------------------------------------------------------- cost


COUNTED = ModelConfig(
    14, patch_size=16, hidden_size=64, nerf_depth=2, nerf_width=64, nerf_mlp_ratio=2, encoding_dims=11
)  # fmt: skip


def test_second_states_are_counted_by_their_share():
    none, quarter, every = (counted(replace(COUNTED, later_share=share), 32) for share in (0.0, 0.25, 1.0))
    assert none[0] == quarter[0] == every[0]
    for i in (1, 2):
        assert none[i] < quarter[i]
        assert quarter[i] == pytest.approx(0.75 * none[i] + 0.25 * every[i], rel=1e-6)


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_the_cost_that_is_counted_is_that_of_a_real_step(activation_checkpointing, share):
    """On tensors with values; bfloat16 keeps its share of the bytes, and a copy of the weights."""
    config = replace(COUNTED, later_share=share)
    parameters, flops, kept = counted(config, 64, activation_checkpointing)
    image = torch.rand(1, 3, 64, 64)
    labels = torch.randint(0, 14, (1, 64, 64))
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = FlowSeg(config)
        model.network.activation_checkpointing = activation_checkpointing
        tensors = {}

        def keep(tensor, tensors=tensors):
            if tensor.shape[1:] != (4, 16, 16):  # the attention matrices of 4 heads and 16 tokens
                tensors[tensor.untyped_storage()._cdata] = tensor
            return tensor

        with FlopCounterMode(display=False) as counter:
            half = torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16)
            with half, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss, _ = model.loss(image, labels)
            loss.backward()
        for parameter in model.parameters():
            tensors.pop(parameter.untyped_storage()._cdata, None)
        found[dtype] = sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())
        assert counter.get_total_flops() == pytest.approx(flops, rel=1e-3)  # attention is counted otherwise
    assert parameters == sum(p.numel() for p in model.parameters())
    assert kept == pytest.approx(found[torch.float32], rel=0.02)
    least = (found[torch.bfloat16] - 2 * parameters) / kept
    most = least
    if activation_checkpointing:  # some copies of the weights are made again instead of kept
        most = found[torch.bfloat16] / kept
    assert least < estimate.SHARE_IN_BFLOAT16 < most + 0.3  # CUDA keeps norms in float32, a CPU does not


VIT = {"vit_width": 64, "vit_depth": 3, "vit_patch": 4, "vit_grid": 16, "vit_registers": 2}


@pytest.mark.parametrize("changes", [{"patch_size": 4}, {**VIT, "finetune_encoder": True}], ids=str)
def test_no_attention_matrix_is_counted_of_many_tokens(changes):
    """A real step has fused attention; with 256 tokens, matrices would be most of what is counted."""
    config = ModelConfig(14, hidden_size=16, depth=3, conv_width=8, later_share=0.0, **changes)
    model = DinoFlowSeg(config)
    tensors = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: tensors.setdefault(tensor.untyped_storage()._cdata, tensor), lambda tensor: tensor
    ):
        model.loss(torch.rand(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.int64))
    for parameter in model.parameters():
        tensors.pop(parameter.untyped_storage()._cdata, None)
    found = sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())
    assert counted(config, 64)[2] == pytest.approx(found, rel=0.1)


def dry_run(*options, world=1):
    """What a dry run prints, by name."""
    out = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", str(world))
        patch.setattr(sys, "argv", ["flowseg", "train", "--dry-run", *map(str, options)])
        patch.setattr(flowseg.out, "print", lambda text, **style: out.append(text))
        with pytest.raises(SystemExit) as stop:
            flowseg.main()
    assert stop.value.code == 0
    return dict(line.lstrip().split(": ", 1) for line in out if not line.endswith(":"))


def number(facts, words):
    """The one number whose name contains the words."""
    values = [value for name, value in facts.items() if words in name]
    assert len(values) == 1, facts
    return float(values[0])


def test_a_dry_run_needs_no_data_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLOWSEG_DATA", str(tmp_path / "no-data"))
    facts = dry_run("--recipe", "ade20k-512", "--preset", "tiny", world=4)
    assert not list(tmp_path.iterdir())
    assert (facts["lr"], facts["crop_size"], facts["num_classes"]) == ("5e-05", "512", "150")
    assert facts["images at a time on each GPU"] == "4"
    _, network = resolve({"recipe": "ade20k-512", "preset": "tiny"})
    assert int(facts["parameters"]) == sum(p.numel() for p in Network(network).parameters())


def test_a_dry_run_follows_what_it_is_asked_for(capsys):
    """Twice the images are twice the work; memory grows with the images at a time, not with the batch."""
    one = dry_run("--batch-size", 800, "--max-steps", 1000)
    two = dry_run("--batch-size", 1600, "--max-steps", 1000)
    parts = dry_run("--batch-size", 1600, "--max-steps", 1000, "--set", "grad_accum_steps=2")
    spread = dry_run("--batch-size", 1600, "--max-steps", 3000, world=2)
    assert number(two, "TFLOP a step") == pytest.approx(2 * number(one, "TFLOP a step"), abs=2e-3)
    assert number(spread, "hours") == pytest.approx(3 * number(two, "hours"), abs=2e-3)
    assert number(two, "kept for") == pytest.approx(2 * number(one, "kept for"), abs=2e-3)
    assert number(parts, "kept for") == number(one, "kept for") == number(spread, "kept for")
    fixed = [number(facts, "GB of weights") for facts in (one, two, parts, spread)]
    assert min(fixed) == max(fixed)
    for facts in (one, two, parts, spread):
        whole = number(facts, "GB of weights") + number(facts, "kept for")
        assert number(facts, "GB of GPU memory") == pytest.approx(whole, abs=2e-3)


def test_a_dry_run_gives_the_known_orders_of_magnitude(capsys):
    """A weight has 22 bytes with its gradient, moments and average; a token needs 6 FLOPs of each, twice."""
    facts = dry_run("--preset", "base", "--set", "dtype=bfloat16")
    parameters = int(facts["parameters"])
    batch_tokens = 64 * (256 // 16) ** 2
    assert 1e8 < parameters < 3e8
    assert 20 < number(facts, "GB of weights") * 1e9 / parameters < 24
    assert 0.5 < number(facts, "TFLOP a step") * 1e12 / (2 * 6 * parameters * batch_tokens) < 3
    assert 1 < number(facts, "hours") < 100


def test_what_does_not_fit_names_the_cheapest_option_that_makes_it_fit(monkeypatch):
    config, network = resolve({"batch_size": 64})
    assert estimate.fit(config, network, 1) == "fits 80 GB"
    whole = sum(estimate.gigabytes(config, network, 1))
    for share in (0.9, 0.4, 0.1):
        monkeypatch.setattr(estimate, "USABLE_GB", share * whole)
        text = estimate.fit(config, network, 1)
        assert text.startswith("does not fit 80 GB: --set grad_accum_steps=2 needs") == (share == 0.9)
        options = text.partition(": ")[2].partition(" needs")[0].replace("--set ", "").split()
        changed, network = resolve({"batch_size": 64}, options)
        assert sum(estimate.gigabytes(changed, network, 1)) <= share * whole
    monkeypatch.setattr(estimate, "USABLE_GB", 1e-6)
    assert estimate.fit(config, network, 1).endswith("lower --crop-size, or take a smaller --preset")


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["base", "large", "xl"])
def test_the_presets_fit_a_gpu_of_80_gb_as_they_are(preset):
    config, network = resolve({"preset": preset, "dataset": "coco-stuff"})
    assert estimate.fit(config, network, 1) == "fits 80 GB"


def test_an_attention_matrix_alone_is_taken_for_one():
    """With as many tokens as channels, activations look like one."""
    config = replace(COUNTED, hidden_size=64, later_share=0.0)
    _, _, kept = counted(config, 128)  # 64 tokens of 64 channels
    _, _, others = counted(replace(config, hidden_size=48), 128)
    assert 1 < kept / others < 64 / 48


def test_unavailable_device_is_named():
    with pytest.raises(RunError, match=r"--device warp is not available; expected auto, .*cpu"):
        pick_device("warp")


# ---------------------------------------------------------------- runs


def test_a_run_writes_what_the_other_commands_need(tmp_path):
    assert run(tmp_path / "run", steps=2) == 0
    names = {path.name for path in (tmp_path / "run").iterdir()}
    weights = {f"{name}.safetensors" for name in ("last", "best", "state")}  # one state: saved once
    assert names == weights | {
        "config.json", "metrics.jsonl", "history.txt", "preview.png", "curves.png", ".lock",
    }  # fmt: skip
    info = FlowSeg.load(tmp_path / "run" / "last.safetensors").info
    labels = ShapesDataset("training").labels
    assert info.classes == tuple(labels.classes)
    assert info.ids == tuple(labels.ids)
    assert info.ignore == tuple(labels.ignore)
    assert (info.dataset, info.crop_size, info.step) == ("shapes", 32, 2)
    assert {"python", "torch", "commit"} == info.environment.keys()
    logged = lines(tmp_path / "run")
    assert [line["step"] for line in logged] == [1, 2, 2]
    keys = {"loss", "fm_error", "phi", "grad_phi", "lr", "grad_norm", "images_per_second"}
    assert keys <= logged[0].keys()
    assert logged[-1]["mIoU"] == info.mIoU
    assert {"mIoU", "aAcc", "mAcc", "crispness"} <= logged[-1].keys()


def test_crispness_is_the_distance_to_the_nearest_centroid_in_units_of_the_closest_pair():
    model = FlowSeg(ModelConfig(3, **{"encoding": "kronecker", "encoding_dims": 3}))
    a, b = model.centroids[0], model.centroids[1]
    model.centroids = torch.stack([a, b, b + 2 * (b - a)])  # a and b are the closest pair
    mask = model.encode_labels(torch.tensor([[[0, 1, 2, 2]]]))
    assert records.crispness(model, mask) == 0
    assert records.crispness(model, mask + (b - a)[:, None, None] / 4) == pytest.approx(0.25, abs=1e-5)
    half = torch.cat([mask, mask + (b - a)[:, None, None] / 2], dim=0)
    assert records.crispness(model, half) == pytest.approx(0.25, abs=1e-5)


def test_tensorboard_gets_what_the_log_gets_if_it_is_asked_for(tmp_path, monkeypatch):
    class Writer:
        def __init__(self, folder):
            self.folder = folder
            self.flush = lambda: None

        def add_scalar(self, name, value, step):
            written.append((self.folder, step, name, value))

    written = []
    stub = SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stub)
    run(tmp_path / "without", steps=1)
    assert written == []
    run(tmp_path / "run", steps=2, tensorboard=True)
    logged = []
    for line in lines(tmp_path / "run"):
        step = line.pop("step")
        logged += [(tmp_path / "run", step, name, value) for name, value in line.items()]
    assert written == logged


def test_tensorboard_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(RunError, match="--tensorboard"):
        run(tmp_path / "run", steps=1, tensorboard=True)


def test_stored_score_is_bit_for_bit_what_eval_gives(tmp_path):
    run(tmp_path / "run", steps=2)
    model = FlowSeg.load(tmp_path / "run" / "last.safetensors")
    metrics, protocol = evaluate(model, ShapesDataset("validation"), 32, model.config.steps)
    assert metrics.scores["mIoU"] == model.info.mIoU
    assert protocol == model.info.protocol


@pytest.mark.parametrize("settings", [
    (), ("grad_accum_steps=2",), ("optimizer=adamw",),
    ("num_workers=1", "encoding=kronecker", "encoding_dims=3", "later_share=1"),
], ids=str)  # fmt: skip
def test_an_interrupted_run_continues_bit_for_bit(tmp_path, monkeypatch, settings):
    run(tmp_path / "whole", *settings, "save_every=2")
    real = FlowSeg.loss
    calls = []

    def stop_at_third(self, *args):
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(FlowSeg, "loss", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", *settings, "save_every=1")
    monkeypatch.setattr(FlowSeg, "loss", real)
    config = json.loads((tmp_path / "parts" / "config.json").read_text())
    config["train"]["save_every"] = 2
    (tmp_path / "parts" / "config.json").write_text(json.dumps(config))
    run(tmp_path / "parts", *settings, "save_every=2")
    for name in ("last", "state"):
        whole = load_file(tmp_path / "whole" / f"{name}.safetensors")
        parts = load_file(tmp_path / "parts" / f"{name}.safetensors")
        for key in whole:
            assert torch.equal(whole[key], parts[key]), key
    kinds = {key.rpartition(".")[2] for key in whole if key.startswith("optimizer.")}
    muon = "optimizer=adamw" not in settings
    assert kinds == {"step", "exp_avg", "exp_avg_sq"} | ({"momentum"} if muon else set())
    steps = [line["step"] for line in lines(tmp_path / "parts")]
    assert steps == sorted(steps) == [line["step"] for line in lines(tmp_path / "whole")]


@pytest.mark.parametrize("optimizers", [("adamw", "muon"), ("muon", "adamw")])
def test_another_optimizer_cannot_continue_a_run(tmp_path, optimizers):
    first, second = optimizers
    run(tmp_path / "run", steps=1, optimizer=first)
    with pytest.raises(RunError, match=f"optimizer was '{first}', now '{second}'"):
        run(tmp_path / "run", steps=1, optimizer=second)
    configs = resolve({"crop_size": 32, "max_steps": 2, "optimizer": second, "batch_size": 2}, TINY)
    with pytest.raises(RunError, match="of another network, teacher or optimizer; use --out"):
        training.train(*configs, tmp_path / "run", "cpu", Console(quiet=True), allow_changes=True)


def test_validation_does_not_move_training(tmp_path):
    run(tmp_path / "often", "eval_every=1")
    run(tmp_path / "once")
    often = load_file(tmp_path / "often" / "last.safetensors")
    once = load_file(tmp_path / "once" / "last.safetensors")
    assert all(torch.equal(often[key], once[key]) for key in once)


def test_a_changed_command_or_a_foreign_folder_is_refused(tmp_path):
    run(tmp_path / "run", steps=1)
    with pytest.raises(RunError, match=r"holds another run \(lr was [0-9.]+, now 0.01\)"):
        run(tmp_path / "run", steps=1, lr=0.01)
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "config.json").write_text("[]")
    with pytest.raises(RunError, match=r"list.*--out"):
        run(tmp_path / "list", steps=1)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"")
    with pytest.raises(RunError, match=r"not a run directory; choose another with --out"):
        run(tmp_path / "photos", steps=1)
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.jpg"]


@pytest.mark.parametrize("content", [
    "", "{", "null", "7", "[" * 100_000, '{"train": 1, "model": 2, "labels": 3}',
    '{"train": {"max_steps": "many"}, "model": {}, "labels": {}}',
    '{"train": {"max_steps": null}, "model": {}, "labels": {}}',
])  # fmt: skip
def test_any_damage_of_the_configuration_is_one_line(tmp_path, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(content)
    with pytest.raises(RunError, match=r"run.*--out") as error:
        run(tmp_path / "run", steps=1)
    assert len(str(error.value).splitlines()) == 1
    assert (tmp_path / "run" / "config.json").read_text() == content


def test_a_run_of_an_older_version_is_refused(tmp_path):
    old = {"train": {"batch": 2, "size": 32}, "model": {"num_classes": 14, "hidden": 16}}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(old))
    with pytest.raises(RunError, match=r"version.*--out"):
        run(tmp_path / "run", steps=1)


def test_a_state_of_an_older_version_is_refused(tmp_path):
    run(tmp_path / "run", steps=1)
    state = tmp_path / "run" / "state.safetensors"
    save_file(load_file(state), state, {"at": "[1, 1, 0.5]"})
    with pytest.raises(CheckpointError, match=r"state.safetensors.*--out") as error:
        run(tmp_path / "run", steps=1)
    assert len(str(error.value).splitlines()) == 1


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def rewrite(path, metadata):
    """The same tensors under other JSON strings."""
    with safe_open(path, "pt") as file:
        strings = file.metadata()
    save_file(load_file(path), path, strings | metadata)


DAMAGE = {
    "cut": truncate,
    "empty": lambda path: path.write_bytes(b""),
    "no at": lambda path: save_file(load_file(path), path),
    "at is text": lambda path: rewrite(path, {"at": "step four"}),
    "at is short": lambda path: rewrite(path, {"at": "[4]"}),
    "at is null": lambda path: rewrite(path, {"at": "[null, null, null]"}),
    "at is negative": lambda path: rewrite(path, {"at": "[-4, -4, 0.5]"}),
    "at is a fraction": lambda path: rewrite(path, {"at": "[3.5, 3, 0.5]"}),
    "at is not finite": lambda path: rewrite(path, {"at": "[4, 4, NaN]"}),
    "at is deep": lambda path: rewrite(path, {"at": "[" * 100_000}),
}


def train_aloud(folder, *settings):
    """Train as `run` does; returns what was said."""
    console = Console(soft_wrap=True)
    given = {"batch_size": 2, "crop_size": 32, "max_steps": 4, "warmup_steps": 1}
    with console.capture() as said:
        assert training.train(*resolve(given, [*TINY, *settings]), folder, "cpu", console) == 0
    return said.get()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run with the state before the last."""
    folder = tmp_path_factory.mktemp("finished") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShapesDataset, "__len__", lambda self: 3 if self.split != "training" else 1_000_000)
        run(folder, "save_every=1")
    return folder


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_state_falls_back_to_the_one_before_it(tmp_path, whole, damage):
    shutil.copytree(whole, tmp_path / "parts")
    DAMAGE[damage](tmp_path / "parts" / "state.safetensors")
    said = train_aloud(tmp_path / "parts", "save_every=1")
    _, network = resolve({}, TINY)
    assert "14 classes" in said
    assert network.encoding in said
    assert f"{network.encoding_dims} dimensions" in said
    assert "state.safetensors is damaged" in said
    assert "at step 3" in said
    expected = load_file(whole / "state.safetensors")
    parts = load_file(tmp_path / "parts" / "state.safetensors")
    assert all(torch.equal(expected[key], parts[key]) for key in expected)
    load_file(tmp_path / "parts" / "previous.safetensors")  # still the good one


def test_two_damaged_states_are_named_and_kept(tmp_path):
    run(tmp_path / "run", "save_every=1", steps=2)
    states = [tmp_path / "run" / f"{name}.safetensors" for name in ("state", "previous")]
    for state in states:
        truncate(state)
    message = r"state.safetensors is damaged .*previous.safetensors is damaged"
    with pytest.raises(CheckpointError, match=message):
        run(tmp_path / "run", "save_every=1", steps=2)
    assert all(state.exists() for state in states)


def test_a_full_disk_leaves_the_old_state_and_says_so(tmp_path, monkeypatch):
    run(tmp_path / "run", steps=1)
    state = tmp_path / "run" / "state.safetensors"
    before = state.read_bytes()
    files = sorted(path.name for path in state.parent.iterdir())

    def full(number):
        raise OSError(28, "No space left on device")

    model = FlowSeg(resolve({"crop_size": 32}, TINY)[1])
    optimizers = training.make_optimizers(model, TrainConfig())
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(CheckpointError, match=r"No space left.*the file before it is kept"):
            save_state(state.parent, {"model": model}, optimizers, (2, 0, -1.0))
    assert state.read_bytes() == before
    assert sorted(path.name for path in state.parent.iterdir()) == files


def break_loss(monkeypatch, is_broken):
    """Make the loss nan in the calls whose number is chosen; the first call is 1."""
    real = FlowSeg.loss
    calls = []

    def loss(self, *args):
        calls.append(1)
        value, stats = real(self, *args)
        if is_broken(len(calls)):
            value = value * float("nan")
        return value, stats

    monkeypatch.setattr(FlowSeg, "loss", loss)


def test_a_step_without_a_finite_gradient_is_left_out(tmp_path, monkeypatch):
    break_loss(monkeypatch, lambda call: call == 2)
    assert run(tmp_path / "run") == 0
    state = load_file(tmp_path / "run" / "state.safetensors")
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert {float(value) for key, value in state.items() if key.endswith(".step")} == {3.0}  # of 4 steps


def test_a_number_that_json_does_not_know_is_logged_as_null(tmp_path, monkeypatch):
    break_loss(monkeypatch, lambda call: call == 2)
    run(tmp_path / "run", steps=2)
    log = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "NaN" not in log
    assert [line["grad_norm"] is None for line in lines(tmp_path / "run")[:2]] == [False, True]


def test_init_starts_from_the_weights_of_another_run(tmp_path):
    run(tmp_path / "first", steps=1)
    best = str(tmp_path / "first" / "best.safetensors")
    model = FlowSeg.load(best)
    other = FlowSeg(replace(model.config, num_classes=3))  # the weights fit any number of classes
    start_from(other, best)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    with pytest.raises(CheckpointError, match=r"has another network .*match --preset"):
        run(tmp_path / "second", "hidden_size=32", steps=1, init=best)
    assert not (tmp_path / "second").exists()


def test_the_second_stage_starts_from_the_best_weights_of_the_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(RECIPES, "ade20k-256", {})
    monkeypatch.setitem(RECIPES, "ade20k-512", {"init": "runs/ade20k-256"})
    given = {"batch_size": 2, "crop_size": 32, "max_steps": 1}
    second = resolve({"recipe": "ade20k-512"} | given, TINY)
    message = r"no weights in .*runs/ade20k-256/: run `flowseg train --recipe ade20k-256`"
    with pytest.raises(RunError, match=message):
        training.train(*second, Path("second"), "cpu", Console(quiet=True))
    assert not list(tmp_path.iterdir())

    said = []
    first = resolve({"recipe": "ade20k-256"} | given, TINY)
    for folder, configs in (("runs/ade20k-256", first), ("second", second)):
        console = Console(soft_wrap=True)
        with console.capture() as capture:
            training.train(*configs, Path(folder), "cpu", console)
        said.append(capture.get())
    assert "from random weights" in said[0]
    assert "runs/ade20k-256/best.safetensors" in said[1]
    shutil.rmtree("runs")  # to continue takes the run's own state alone
    assert training.train(*second, Path("second"), "cpu", Console(quiet=True)) == 0


def test_the_state_from_before_the_failures_is_kept(tmp_path, monkeypatch):
    break_loss(monkeypatch, lambda call: call > 2)
    with pytest.raises(RunError, match="no finite gradient in 10 steps"):
        run(tmp_path / "run", "save_every=1", steps=30)
    with safe_open(tmp_path / "run" / "state.safetensors", "pt") as state:
        assert json.loads(state.metadata()["at"])[0] == 2


def test_no_finite_gradient_any_more_stops_with_advice(tmp_path):
    message = (
        r"no finite gradient in 10 steps in a row, the last at step \d+, first in network\.\w+, "
        r"t 0\.\d\d to 0\.\d\d; lower .*lr.*1e\+30, or look at shapes/training/\d+, shapes"
    )
    with pytest.raises(RunError, match=message):
        run(tmp_path / "run", "grad_clip=1e30", steps=30, lr=1e30)


def test_without_any_run_the_error_says_what_to_type(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match=r"no weights in runs/: run `flowseg train`"):
        newest_checkpoint()
