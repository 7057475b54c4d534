"""Metric, schedule, run directory and resume."""

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

import flowseg
import train as training
from data import Shapes
from model import CheckpointError, FlowSeg, segment_photo, start_from, to_input
from network import Config, RMSNorm
from run import RunError, counted, newest_checkpoint, save_state
from train import PRESETS, RECIPES, Metrics, TrainConfig, confusion_matrix, evaluate, learning_rate, resolve

TINY = [
    "hidden=16",
    "depth=1",
    "heads=2",
    "field_depth=1",
    "field_width=8",
    "conv_width=8",
    "log_every=1",
    "steps=2",
]


@pytest.fixture(autouse=True)
def _few_scenes(monkeypatch):
    """Validation on three scenes: what is tested here is the loop, not the score."""
    monkeypatch.setattr(Shapes, "__len__", lambda self: 3 if self.split != "training" else 1_000_000)


def run(folder, *settings, steps=4, **options):
    given = {"batch": 2, "size": 32, "max_steps": steps, "warmup": 1} | options
    config, model_config = resolve(given, [*TINY, *settings])
    return training.train(config, model_config, folder, "cpu", Console(quiet=True))


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- metric


def scores_by_sets(pairs, num_classes):
    """An independent computation of IoU: explicit sets of pixel positions, one class at a time."""
    iou = []
    for k in range(num_classes):
        truth, found = set(), set()
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

    name, split = "fixed", "test"

    def __init__(self, sizes, labels):
        self.sizes, self.labels = sizes, labels

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, i):
        return Image.new("RGB", self.sizes[i]), np.full(self.sizes[i][::-1], i, np.uint8)


def test_evaluation_compares_at_the_original_size():
    torch.manual_seed(0)
    model = FlowSeg(resolve({}, TINY)[1]).eval()
    data = Fixed([(37, 20), (300, 31)], Shapes("validation").labels)
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


@pytest.mark.parametrize(("size", "mode"), [((64, 32), "whole"), ((45, 33), "whole"), ((33, 120), "whole"),
                                            ((45, 33), "slide"), ((33, 120), "slide")])  # fmt: skip
def test_with_flip_the_mirror_image_gives_the_mirrored_mask(model, size, mode):
    """Widths that the patch does not divide, too; windows only where they lie symmetrically themselves."""
    image, side = photo(*size), min(size)
    labels, confidence = segment_photo(model, image, side, 1, flip=True, mode=mode)
    mirrored = segment_photo(model, ImageOps.mirror(image), side, 1, flip=True, mode=mode)
    assert len(np.unique(labels)) > 3
    assert (mirrored[0][:, ::-1] == labels).mean() > 0.999  # but for ties
    assert np.abs(mirrored[1][:, ::-1] - confidence).max() < 1e-5
    plain = segment_photo(model, image, side, 1, mode=mode)
    assert (segment_photo(model, ImageOps.mirror(image), side, 1, mode=mode)[0][:, ::-1] != plain[0]).any()


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the high-water mark of /proc")
def test_a_large_photo_of_many_classes_takes_little_memory():
    """171 probabilities of each of 6 million pixels would be 4 GB; a fresh process says what it took."""
    code = """if True:
        import numpy as np, torch
        from PIL import Image
        from model import FlowSeg, segment_photo
        from network import Config
        from train import confusion_matrix

        def status(key):
            lines = open("/proc/self/status")
            return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024

        photo, model = Image.new("RGB", (3000, 2000)), FlowSeg(Config(num_classes=171, dims=19)).eval()
        segment_photo(model, Image.new("RGB", (40, 30)), 32, 1)
        before = status("VmRSS")
        labels = segment_photo(model, photo, 128, 1, flip=True, mode="slide")[0]
        confusion_matrix(labels, labels, 171)
        print(status("VmHWM") - before)
    """
    root = Path(training.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert float(done.stdout) < 500, done.stderr  # MiB


def test_slide_is_whole_when_the_photo_fits_the_window(model):
    for size in ((40, 40), (80, 80), (7, 7)):
        whole, slide = (segment_photo(model, photo(*size), 40, 1, mode=mode) for mode in ("whole", "slide"))
        assert all(np.array_equal(a, b) for a, b in zip(whole, slide, strict=True))


def test_slide_averages_windows_that_cover_the_photo_and_overlap_by_a_third(model, monkeypatch):
    image, seen = photo(75, 30), []
    real, whole = model.soft_assignment, to_input(image, 30)

    def note(x, total):
        seen.append(real(x))
        return real(x, total)

    monkeypatch.setattr(model, "soft_assignment", note)
    confidence = segment_photo(model, image, 30, 1, mode="slide")[1]
    assert [p.shape[2:] for p in seen] == [(30, 30)] * 4
    total, count = torch.zeros(14, 30, 75), torch.zeros(75)
    for left, p in zip((0, 20, 40, 45), seen, strict=True):
        own = real(model.sample(whole[..., left : left + 30], 1))
        assert torch.allclose(p, own, atol=1e-6)
        total[..., left : left + 30] += own[0]
        count[left : left + 30] += 1
    assert np.allclose(confidence, (total / count).max(0).values.numpy(), atol=1e-5)


@pytest.mark.parametrize(("limit", "chosen"), [(None, [0, 1, 2, 3, 4]), (9, [0, 1, 2, 3, 4]), (2, [0, 4]),
                                               (3, [0, 2, 4]), (1, [0])])  # fmt: skip
def test_limit_takes_evenly_spaced_images_and_says_so(model, limit, chosen):
    data = Fixed([(9, 8)] * 5, Shapes("validation").labels)
    metrics, protocol = evaluate(model, data, 8, 1, limit=limit)
    assert metrics.confusion.sum(1).nonzero()[0].tolist() == chosen
    assert (protocol["images"], protocol["evenly_spaced_of"]) == (len(chosen), 5)


class Scored(Fixed):
    """Odd sizes, an image without any label, absent classes, the last class id."""

    def __getitem__(self, i):
        rng, (width, height) = np.random.default_rng(i), self.sizes[i]
        labels = np.where(rng.random((height, width)) < 0.2, 255, rng.choice([0, 3, 13], (height, width)))
        return photo(width, height), np.full_like(labels, 255, np.uint8) if i == 1 else labels.astype(
            np.uint8
        )


@pytest.mark.parametrize("options", [{}, {"flip": True}, {"mode": "slide"}], ids=str)
def test_scores_of_an_evaluation_equal_an_independent_computation(model, options):
    data = Scored([(13, 7), (9, 9), (21, 33)], Shapes("validation").labels)
    metrics, _ = evaluate(model, data, 8, 1, **options)
    pairs = [
        (y, segment_photo(model, image, 8, 1, **options)[0]) for image, y in map(data.__getitem__, range(3))
    ]
    iou, mean = scores_by_sets(pairs, 14)
    assert None in iou and iou[13] is not None
    assert [None if math.isnan(value) else value for value in metrics.iou] == pytest.approx(iou, abs=1e-9)
    y, p = (np.concatenate([pair[i].ravel() for pair in pairs]) for i in (0, 1))
    recall = [(p[y == k] == k).mean() for k in (0, 3, 13)]
    expected = {"mIoU": mean, "aAcc": (y == p)[y != 255].mean(), "mAcc": np.mean(recall)}
    assert metrics.scores == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("given", "expected"), [((640, 480), (128, 96)), ((10, 20), (96, 192)), ((2000, 10), (384, 2))]
)
def test_input_keeps_the_ratio_and_the_range(given, expected):
    image = to_input(Image.new("RGB", given, (0, 128, 255)), 96)
    assert image.shape == (1, 3, *expected[::-1])
    assert image[0, :, 0, 0].tolist() == pytest.approx([-1, 128 / 127.5 - 1, 1], abs=1e-6)


# ---------------------------------------------------------------- configuration


def test_precedence_is_setting_then_option_then_preset_then_default():
    config, model_config = resolve({"preset": "small", "lr": 0.5}, ["size=64", "recompute=true", "dims=4"])
    assert (config.lr, config.size, config.seed, config.recompute) == (0.5, 64, TrainConfig.seed, True)
    assert (model_config.hidden, model_config.dims) == (PRESETS["small"]["hidden"], 4)
    assert model_config.num_classes == len(Shapes("training").labels.classes)


def test_many_classes_are_coded_unless_asked_otherwise(tmp_path):
    for split in ("training", "validation", "test"):
        for kind in ("images", "annotations"):
            (tmp_path / kind / split).mkdir(parents=True)
            Image.new("L", (8, 8)).save(tmp_path / kind / split / "a.png")
    for count, encoding in ((32, ("kronecker", 16)), (33, ("coded", 19))):
        names = [f"class {i}" for i in range(count)]
        (tmp_path / "dataset.toml").write_text(f"classes = {names}")
        config = resolve({"dataset": str(tmp_path)}, [])[1]
        assert (config.encoding, config.dims) == encoding
    assert resolve({"dataset": "shapes-fine"}, [])[1].encoding == "coded"
    config = resolve({"dataset": "shapes-fine"}, ["encoding=kronecker", "dims=3"])[1]
    assert (config.encoding, config.dims) == ("kronecker", 3)


@pytest.mark.parametrize(("given", "settings", "message"), [
    ({"preset": "tinny"}, [], "--preset tinny: expected tiny, .*did you mean 'tiny'"),
    ({"objective": "reshape"}, [], "objective is 'reshape'; expected reshaped or vanilla"),
    ({}, ["epsilon=1"], r"--set epsilon=1: expected FIELD=VALUE.*did you mean 'eps'"),
    ({}, ["dtype=half"], "dtype is 'half'; expected auto, float32 or bfloat16"),
    ({}, ["eps=small"], "--set eps=small: expected a float"), ({}, ["eps"], "--set eps: expected a float"),
    ({"recipe": "ade2k"}, [], "--recipe ade2k: expected ade20k, coco-stuff; did you mean 'ade20k'"),
    ({"recipe": "ade20k", "stage": 3}, [], "--stage 3: expected 1, 2"), ({"stage": 2}, [], "--recipe"),
    ({"size": 50}, [], "size is 50; expected a multiple of the patch size 8"),
    ({"batch": 5}, ["accumulate=2"], "batch is 5; expected a multiple of 2"),
])  # fmt: skip
def test_mistakes_in_the_configuration_are_named(given, settings, message):
    with pytest.raises(RunError, match=message):
        resolve(given, settings)


def test_a_recipe_is_a_table_that_options_win_over():
    """The label tables are enough: no photo of ADE20K or COCO-Stuff is here."""
    fields = {**TrainConfig.__dataclass_fields__, **Config.__dataclass_fields__}
    for name, classes in (("ade20k", 150), ("coco-stuff", 171)):
        first, network = resolve({"recipe": name}, [])
        assert (first.dataset, network.num_classes, network.hidden) == (name, classes, 1152)
        assert (first.size, first.batch, first.lr, first.init) == (256, 64, 1e-4, "")
        second, _ = resolve({"recipe": name, "stage": 2}, [])
        assert (second.size, second.batch, second.lr) == (512, 16, 5e-5)
        assert (second.weight_decay, second.clip, second.init) == (0.01, 1.0, f"runs/{name}-stage-1")
        assert all(stage.keys() <= fields.keys() for stage in RECIPES[name].values())
    config, network = resolve({"recipe": "ade20k", "preset": "tiny", "batch": 8}, ["lr=0.5", "depth=3"])
    assert (config.batch, config.lr, config.size, network.hidden, network.depth) == (8, 0.5, 256, 128, 3)


def test_learning_rate_warms_up_and_ends_at_zero():
    config = TrainConfig(lr=1.0, warmup=10, max_steps=100)
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9]
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] < 1e-3


def test_norms_biases_and_embeddings_do_not_decay():
    with torch.device("meta"):
        model = FlowSeg(Config(num_classes=150, hidden=1152, depth=26, heads=16, field_depth=4))
    decaying, free = training.make_optimizer(model, TrainConfig(weight_decay=0.1)).param_groups
    assert (decaying["weight_decay"], free["weight_decay"]) == (0.1, 0) and free["fused"]
    names = {parameter: name for name, parameter in model.named_parameters()}
    free = {names[parameter] for parameter in free["params"]}
    expected = {name for name in names.values() if name.endswith(".bias") or name == "network.no_class"}
    for name, module in model.named_modules():
        if isinstance(module, RMSNorm | torch.nn.GroupNorm):
            expected.add(f"{name}.weight")
    assert free == expected
    assert len(free) + len(decaying["params"]) == len(names)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_cost_that_is_counted_is_that_of_a_real_step(recompute):
    """On tensors with values; bfloat16 keeps about KEPT of the bytes, and a copy of the weights."""
    config = Config(14, patch_size=16, hidden=64, field_depth=2, field_width=64, field_ratio=2)
    parameters, flops, kept = counted(config, 64, recompute)
    image, labels = torch.rand(1, 3, 64, 64), torch.randint(0, 14, (1, 64, 64))
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model, tensors = FlowSeg(config), {}
        model.network.recompute = recompute

        def keep(tensor, tensors=tensors):
            if tensor.shape[-2:] != (16, 16):  # the attention matrices of 16 tokens
                tensors[tensor.untyped_storage()._cdata] = tensor
            return tensor

        with FlopCounterMode(display=False) as counter:
            half = torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16)
            with half, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = model.loss(image, labels)[0]
            loss.backward()
        weights = {p.untyped_storage()._cdata for p in model.parameters()}
        found[dtype] = sum(
            tensor.untyped_storage().nbytes() for key, tensor in tensors.items() if key not in weights
        )
        assert counter.get_total_flops() == pytest.approx(flops, rel=1e-3)  # attention is counted otherwise
    assert parameters == sum(p.numel() for p in model.parameters())
    assert kept == pytest.approx(found[torch.float32], rel=0.02)
    assert (found[torch.bfloat16] - 2 * parameters) / kept == pytest.approx(training.KEPT, abs=0.15)


def test_a_dry_run_needs_no_data_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLOWSEG_DATA", str(tmp_path / "no-data"))
    monkeypatch.setenv("WORLD_SIZE", "4")
    command = ["flowseg", "train", "--recipe", "ade20k", "--stage", "2", "--preset", "tiny", "--dry-run"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stop:
        flowseg.main()
    facts = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert stop.value.code == 0 and not list(tmp_path.iterdir())
    assert (facts["lr"], facts["size"], facts["num_classes"]) == ("5e-05", "512", "150")
    network = resolve({"recipe": "ade20k", "preset": "tiny"}, [])[1]
    parameters, flops, kept = counted(network, 512)
    assert facts["parameters"] == str(parameters) and facts["images at a time on each GPU"] == "4"
    tera, memory = 16 * flops / 1e12, (22 * parameters + 4 * training.KEPT * kept) / 1e9
    assert [float(value) for name, value in facts.items() if name.startswith("TFLOP")] == [round(tera, 3)]
    assert float(facts["GB of GPU memory"]) == round(memory, 3)
    hours = [float(value) for name, value in facts.items() if name.startswith("hours on one H100")]
    assert hours == [round(160_000 * tera / (0.4 * 989) / 3600, 3)]


def test_unavailable_device_is_named():
    with pytest.raises(RunError, match=r"--device warp is not available; expected auto, .*cpu"):
        training.pick_device("warp")


# ---------------------------------------------------------------- runs


def test_a_run_writes_what_the_other_commands_need(tmp_path):
    assert run(tmp_path / "run", steps=2) == 0
    names = {path.name for path in (tmp_path / "run").iterdir() if "tfevents" not in path.name}
    weights = {f"{name}.safetensors" for name in ("last", "best", "state")}  # one state: saved once
    assert names == weights | {"config.json", "metrics.jsonl", "preview.png"}
    metadata = FlowSeg.load(tmp_path / "run" / "last.safetensors").metadata
    labels = Shapes("training").labels
    assert metadata["classes"] == list(labels.classes)
    assert metadata["ids"] == list(labels.ids)
    assert (metadata["dataset"], metadata["size"], metadata["step"]) == ("shapes", 32, 2)
    assert {"mIoU", "aAcc", "protocol", "torch", "commit"} <= metadata.keys()
    logged = lines(tmp_path / "run")
    assert [line["step"] for line in logged] == [1, 2, 2]
    assert {"loss", "fm", "phi", "grad", "lr", "grad_norm", "images_per_second"} <= logged[0].keys()
    assert logged[-1]["mIoU"] == metadata["mIoU"]


def test_tensorboard_gets_what_the_log_gets_where_it_is_installed(tmp_path, monkeypatch):
    class Writer:
        def __init__(self, folder):
            self.folder, self.flush = folder, lambda: None

        def add_scalar(self, name, value, step):
            written.append((self.folder, step, name, value))

    written = []
    stub = SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stub)
    run(tmp_path / "run", steps=2)
    logged = [(line["step"], name, value) for line in lines(tmp_path / "run") for name, value in line.items()]
    assert written == [(tmp_path / "run", *entry) for entry in logged]


def test_stored_score_is_bit_for_bit_what_eval_gives(tmp_path):
    run(tmp_path / "run", steps=2)
    model = FlowSeg.load(tmp_path / "run" / "last.safetensors")
    metrics, protocol = evaluate(model, Shapes("validation"), 32, model.config.steps)
    assert metrics.scores["mIoU"] == model.metadata["mIoU"]
    assert protocol == model.metadata["protocol"]


@pytest.mark.parametrize("settings", [(), ("accumulate=2",), ("workers=1", "dims=3")], ids=str)
def test_an_interrupted_run_continues_bit_for_bit(tmp_path, monkeypatch, settings):
    run(tmp_path / "whole", *settings, "save_every=2")
    real, calls = FlowSeg.loss, []

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
        whole, parts = (
            safe_open(tmp_path / part / f"{name}.safetensors", "pt") for part in ("whole", "parts")
        )
        for key in whole.keys():  # noqa: SIM118
            assert torch.equal(whole.get_tensor(key), parts.get_tensor(key)), key
    steps = [line["step"] for line in lines(tmp_path / "parts")]
    assert steps == sorted(steps) == [line["step"] for line in lines(tmp_path / "whole")]


def test_validation_does_not_move_training(tmp_path):
    run(tmp_path / "often", "eval_every=1")
    run(tmp_path / "once")
    often, once = (
        FlowSeg.load(tmp_path / name / "last.safetensors").state_dict() for name in ("often", "once")
    )
    assert all(torch.equal(often[key], once[key]) for key in once)


def test_a_changed_command_or_a_foreign_folder_is_refused(tmp_path):
    run(tmp_path / "run", steps=1)
    with pytest.raises(RunError, match=r"holds another run \(lr was 0.004, now 0.01\)"):
        run(tmp_path / "run", steps=1, lr=0.01)
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "config.json").write_text("[]")
    with pytest.raises(RunError, match=r"cannot use .*list"):
        run(tmp_path / "list", steps=1)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"")
    with pytest.raises(RunError, match=r"not a run directory; choose another with --out"):
        run(tmp_path / "photos", steps=1)
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.jpg"]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def test_a_damaged_state_falls_back_to_the_one_before_it(tmp_path):
    run(tmp_path / "whole", "save_every=1")
    run(tmp_path / "parts", "save_every=1")
    truncate(tmp_path / "parts" / "state.safetensors")
    console = Console(soft_wrap=True)
    config, model_config = resolve(
        {"batch": 2, "size": 32, "max_steps": 4, "warmup": 1}, [*TINY, "save_every=1"]
    )
    with console.capture() as said:
        training.train(config, model_config, tmp_path / "parts", "cpu", console)
    assert "14 classes, kronecker in 16 dimensions" in said.get()
    assert "state.safetensors is damaged" in said.get()
    assert "going on from the state saved before it, at step 3" in said.get()
    whole, parts = (load_file(tmp_path / part / "state.safetensors") for part in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    load_file(tmp_path / "parts" / "previous.safetensors")  # still the good one


def test_two_damaged_states_are_named_and_kept(tmp_path):
    run(tmp_path / "run", "save_every=1", steps=2)
    states = [tmp_path / "run" / f"{name}.safetensors" for name in ("state", "previous")]
    for state in states:
        truncate(state)
    with pytest.raises(
        CheckpointError, match=r"state.safetensors is damaged .*previous.safetensors is damaged"
    ):
        run(tmp_path / "run", "save_every=1", steps=2)
    assert all(state.exists() for state in states)


def test_a_full_disk_leaves_the_old_state_and_says_so(tmp_path, monkeypatch):
    run(tmp_path / "run", steps=1)
    state = tmp_path / "run" / "state.safetensors"
    before, files = state.read_bytes(), sorted(path.name for path in state.parent.iterdir())

    def full(number):
        raise OSError(28, "No space left on device")

    model, ema = (FlowSeg(resolve({"size": 32}, TINY)[1]) for _ in range(2))
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(CheckpointError, match=r"No space left.*the file before it is kept"):
            save_state(state.parent, model, ema, training.make_optimizer(model, TrainConfig()), (2, 0, -1.0))
    assert state.read_bytes() == before
    assert sorted(path.name for path in state.parent.iterdir()) == files


def test_a_step_without_a_finite_gradient_is_left_out(tmp_path, monkeypatch):
    real, calls = FlowSeg.loss, []

    def broken_once(self, *args):
        calls.append(1)
        loss, stats = real(self, *args)
        return (loss * float("nan") if len(calls) == 2 else loss), stats

    monkeypatch.setattr(FlowSeg, "loss", broken_once)
    assert run(tmp_path / "run") == 0
    state = load_file(tmp_path / "run" / "state.safetensors")
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert {float(value) for key, value in state.items() if key.endswith(".step")} == {3.0}  # of 4 steps


def test_init_starts_from_the_weights_of_another_run(tmp_path):
    run(tmp_path / "first", steps=1)
    best = str(tmp_path / "first" / "best.safetensors")
    model = FlowSeg.load(best)
    other = FlowSeg(replace(model.config, num_classes=3))  # the weights fit any number of classes
    start_from(other, best)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    with pytest.raises(CheckpointError, match=r"has another network .*match --preset"):
        run(tmp_path / "second", "hidden=32", steps=1, init=best)


def test_the_second_stage_starts_from_the_best_weights_of_the_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(RECIPES, "ade20k", {"1": {}, "2": {"init": "runs/ade20k-stage-1"}})
    given = {"recipe": "ade20k", "stage": 2, "batch": 2, "size": 32, "max_steps": 1}
    message = r"no weights in runs/ade20k-stage-1/: run `flowseg train --recipe ade20k --stage 1`"
    with pytest.raises(RunError, match=message):
        training.train(*resolve(given, TINY), Path("second"), "cpu", Console(quiet=True))
    assert not list(tmp_path.iterdir())

    said = []
    for folder, stage in (("runs/ade20k-stage-1", 1), ("second", 2)):
        console = Console(soft_wrap=True)
        with console.capture() as capture:
            training.train(*resolve(given | {"stage": stage}, TINY), Path(folder), "cpu", console)
        said.append(capture.get())
    assert "from random weights: shapes" in said[0]
    assert "from runs/ade20k-stage-1/best.safetensors: shapes" in said[1]
    shutil.rmtree("runs")  # to go on takes the run's own state alone
    assert training.train(*resolve(given, TINY), Path("second"), "cpu", Console(quiet=True)) == 0


def test_the_state_from_before_the_failures_is_kept(tmp_path, monkeypatch):
    real, calls = FlowSeg.loss, []

    def broken_from_third(self, *args):
        calls.append(1)
        loss, stats = real(self, *args)
        return (loss * float("nan") if len(calls) > 2 else loss), stats

    monkeypatch.setattr(FlowSeg, "loss", broken_from_third)
    with pytest.raises(RunError, match="no finite gradient in 10 steps"):
        run(tmp_path / "run", "save_every=1", steps=30)
    with safe_open(tmp_path / "run" / "state.safetensors", "pt") as state:
        assert json.loads(state.metadata()["at"])[0] == 2


def test_no_finite_gradient_any_more_stops_with_advice(tmp_path):
    message = (
        r"no finite gradient in 10 steps in a row, the last at step \d+, first in network\.\w+, "
        r"t 0\.\d\d to 0\.\d\d; lower --set lr=1e\+30, or look at shapes/training/\d+, shapes"
    )
    with pytest.raises(RunError, match=message):
        run(tmp_path / "run", "clip=1e30", steps=30, lr=1e30)


def test_without_any_run_the_error_says_what_to_type(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match=r"no weights in runs/: run `flowseg train`"):
        newest_checkpoint()
