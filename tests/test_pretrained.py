"""Import of public PixNerd checkpoints: the golden one, random ones, damaged ones; what starts from them."""

import os
import random
import socket
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from experiments.reference import Reference
from flowseg_tools.pretrained import IMAGE_PATH, import_pixnerd, start_from
from model import CheckpointError, FlowSeg, ModelConfig, Network, weights_hash
from tests.conftest import untrained
from train import resolve

GOLDEN = Path(__file__).parent / "golden"
SMALL = {
    "tokens_of": "state",
    "encoding": "kronecker",
    "encoding_dims": 3,
    "patch_size": 4,
    "hidden_size": 16,
    "depth": 2,
    "num_heads": 2,
    "nerf_depth": 2,
    "nerf_width": 8,
    "nerf_mlp_ratio": 2,
}
PUBLIC = (  # parts of our names, and of theirs
    ("patch_embed", "s_embedder.proj"), ("time_mlp", "t_embedder.mlp"),
    ("null_class", "y_embedder.embedding_table.weight"), ("pixel_embed", "x_embedder.embedder.0"),
    ("head_norm", "final_layer.norm"), ("head.", "final_layer.linear."),
    ("modulation", "adaLN_modulation.0"), ("param_generator", "param_generator1.0"),
)  # fmt: skip


def drawn(kind: type[Network], config: ModelConfig, seed: int = 0) -> Network:
    """Every parameter random, the image path zero, but for its encoder, of which then nothing is seen."""
    generator = torch.Generator().manual_seed(seed)
    network = kind(config)
    for name, p in network.named_parameters():
        if name.startswith(IMAGE_PATH) and "encoder" not in name:
            p.data.zero_()
        else:
            p.data.normal_(mean=float("norm" in name), std=0.2, generator=generator)
    return network


def public(network: Network, num_classes: int = 3) -> dict[str, torch.Tensor]:
    """The state of a public checkpoint whose EMA is this network; the raw weights and the rest are sevens."""
    ema = {}
    for name, value in network.state_dict().items():
        if name.startswith(IMAGE_PATH):
            continue
        if name == "null_class":
            value = torch.cat([torch.full((num_classes, len(value)), 7.0), value[None]])
        for i in range(network.config.nerf_depth):
            name = name.replace(f"nerf_blocks.{i}.", f"blocks.{network.config.depth + i}.")
        for ours, theirs in PUBLIC:
            name = name.replace(ours, theirs)
        ema[name] = value
    state = {"diffusion_trainer.proj.0.0.weight": torch.full((4, 4), 7.0)}
    state |= {f"denoiser.{name}": torch.full_like(value, 7) for name, value in ema.items()}
    return state | {f"ema_denoiser.{name}": value.clone() for name, value in ema.items()}


def write(path: Path, state: dict, **more) -> Path:
    torch.save({"state_dict": state, "epoch": 1, "pytorch-lightning_version": "2.5", **more}, path)
    return path


def config_of(num_classes: int = 2, **changes) -> ModelConfig:
    return ModelConfig(num_classes, **SMALL | changes)


@pytest.mark.parametrize("case", ["0", "1"])
def test_the_golden_network_is_the_public_one(case):
    model = import_pixnerd(GOLDEN / "pixnerd_tiny.ckpt")
    io = load_file(GOLDEN / "pixnerd_tiny_io.safetensors")
    x, t, tokens = io[f"{case}.x"], io[f"{case}.t"], []
    model.network.blocks[1].register_forward_hook(lambda block, inputs, output: tokens.append(output))
    with torch.no_grad():
        out = model.network(x, t, model.network.encode_image(x))
        unseen = model.network(x, t, model.network.encode_image(torch.zeros_like(x)))
    assert torch.equal(out, unseen)
    assert torch.allclose(out, io[f"{case}.out"], atol=1e-5)
    assert torch.allclose(tokens[0], io[f"{case}.block2"], atol=1e-5)


@pytest.mark.parametrize("seed", range(12))
def test_any_network_in_the_public_format_is_the_plain_one(seed, tmp_path):
    rng = random.Random(seed)
    num_heads = rng.choice([1, 2, 3, 4])
    torch.manual_seed(seed)
    config = config_of(
        patch_size=rng.choice([1, 2, 4, 8, 16]),
        num_heads=num_heads,
        hidden_size=num_heads * rng.choice([4, 8, 12]),
        depth=rng.choice([1, 2, 3]),
        nerf_depth=rng.choice([1, 2, 11]),
        nerf_width=rng.choice([6, 8, 12]),
        nerf_mlp_ratio=rng.choice([1, 2, 3, 4]),
    )
    plain = drawn(Reference, config, seed)
    model = import_pixnerd(write(tmp_path / "x.ckpt", public(plain, rng.choice([0, 1, 10]))))
    assert model.config == config
    x = torch.randn(2, 3, config.patch_size * rng.randint(1, 5), config.patch_size * rng.randint(2, 6))
    t = torch.rand(2)
    with torch.no_grad():
        ours, theirs = (network(x, t, network.encode_image(x)) for network in (model.network, plain))
    # Blocks of large random weights amplify rounding, each a little more.
    assert (ours - theirs).abs().max() < 1e-5 * config.nerf_depth * theirs.abs().max().clamp_min(1)


def test_half_precision_is_read_as_float32(tmp_path):
    state = {name: value.bfloat16() for name, value in public(drawn(Network, config_of())).items()}
    model = import_pixnerd(write(tmp_path / "x.ckpt", state))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


# ---------------------------------------------------------------- files that are refused


def without(key):
    return lambda state: state.pop(f"ema_denoiser.{key}")


def changed(key, change):
    return lambda state: state.update({f"ema_denoiser.{key}": change(state[f"ema_denoiser.{key}"])})


def with_nan(value):
    value.view(-1)[0] = float("nan")
    return value


TINY = public(drawn(Network, config_of()))
KEYS = [key.removeprefix("ema_denoiser.") for key in TINY if key.startswith("ema_denoiser.")]


@pytest.mark.parametrize("key", [key for key in KEYS if "blocks.1" not in key and "blocks.3" not in key])
@pytest.mark.parametrize(("damage", "message"), [
    (without, "{} is missing, expected \\("), (lambda key: changed(key, with_nan), "{} is not finite"),
    (lambda key: changed(key, lambda v: torch.full_like(v, torch.inf)), "{} is not finite"),
    (lambda key: changed(key, lambda v: torch.cat([v, v])[:-1]), "{} is \\("),
    (lambda key: changed(key, lambda v: v[..., None]), "{} is \\("),
], ids=["missing", "nan", "inf", "longer", "deeper"])  # fmt: skip
def test_every_damaged_tensor_is_named(key, damage, message, tmp_path):
    if "embedding_table" in key and "longer" in os.environ["PYTEST_CURRENT_TEST"]:
        pytest.skip("any number of classes will do")
    state = {name: value.clone() for name, value in TINY.items()}
    damage(key)(state)
    with pytest.raises(CheckpointError, match=message.format(key.replace(".", "\\."))) as caught:
        import_pixnerd(write(tmp_path / "x.ckpt", state))
    assert "\n" not in str(caught.value)


def test_unknown_keys_are_named_and_the_rest_counted(tmp_path):
    state = TINY | {"ema_denoiser.blocks.0.extra": torch.zeros(1), "vae.scale": torch.zeros(1)}
    with pytest.raises(
        CheckpointError,
        match=r"2 faults: .*\.extra is \(1,\), expected nothing; vae\.scale is \(1,\), expected nothing\); ",
    ):
        import_pixnerd(write(tmp_path / "x.ckpt", state))
    for key in KEYS[:4]:
        state.pop(f"ema_denoiser.{key}")
    with pytest.raises(CheckpointError, match=r"6 faults: (\S+ is [^;]+, expected [^;]+; ){3}\.\.\); "):
        import_pixnerd(write(tmp_path / "x.ckpt", state))


def test_files_that_are_no_checkpoint_leave_nothing_behind(tmp_path):
    path, model = tmp_path / "x.ckpt", FlowSeg(config_of(5))
    whole = write(path, TINY).read_bytes()
    for content in (b"", b"hello, world", whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"x\.ckpt is no PixNerd checkpoint, or damaged \("):
            start_from(model, path)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"x\.ckpt"):
        start_from(model, path)
    for content in (
        {"state_dict": TINY | {"ema_denoiser.text": "text"}},
        {"state_dict": torch.nn.Linear(2, 2)},
        {"state_dict": {}},
        {"model": TINY},
        [1],
        TINY,
    ):
        torch.save(content, path)
        with pytest.raises(CheckpointError) as caught:
            start_from(model, str(path))
        assert caught.value.exit_code == 5 and "\n" not in str(caught.value)
        assert "weights_only" not in str(caught.value)  # the advice to switch the safety off
    assert [file.name for file in tmp_path.iterdir()] == ["x.ckpt"]


# ---------------------------------------------------------------- files that are small and say they are large


def of_shape(shape, strides):
    """A tensor of many numbers in a storage of few."""
    return torch.zeros(16).as_strided(shape, strides)


BOMBS = {
    "expanded": lambda v: torch.zeros(1).expand(10**6, 10**6),
    "overlapping": lambda v: of_shape((8, 8), (1, 1)),
    "of no numbers": lambda v: v.to(torch.int64),
    "sparse": lambda v: v.to_sparse(),
    "without values": lambda v: v.to("meta"),
    "complex": lambda v: v.to(torch.complex64),
    "huge and shared": lambda v: BIG.view(-1)[: 2**20],
    "a list": lambda v: [v],
}
BIG = torch.zeros(2**20)


@pytest.mark.parametrize("kind", BOMBS)
def test_tensors_that_are_not_stored_as_they_are_described_are_refused(kind, tmp_path):
    state = {name: value.clone() for name, value in TINY.items()}
    for key in KEYS[:3] if kind == "huge and shared" else KEYS[:1]:
        changed(key, BOMBS[kind])(state)
    with pytest.raises(CheckpointError, match=r"x\.ckpt") as caught:
        import_pixnerd(write(tmp_path / "x.ckpt", state))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("number", "reason"), [(5000, "tensors take"), (1100, "depth")])
def test_thousands_of_blocks_are_refused_before_a_network_is_made(number, reason, tmp_path):
    state = dict(public(drawn(Network, config_of(hidden_size=4, num_heads=1))))
    block = {key: value for key, value in state.items() if key.startswith("ema_denoiser.blocks.0.")}
    for i in range(4, number):
        for key, value in block.items():
            state[key.replace("blocks.0", f"blocks.{i}")] = value.clone() if number < 5000 else value
    path = write(tmp_path / "x.ckpt", state)
    with pytest.raises(CheckpointError, match=reason):
        import_pixnerd(path)


def test_records_that_grow_when_they_are_read_are_refused(tmp_path):
    path = write(tmp_path / "x.ckpt", TINY)
    with (
        zipfile.ZipFile(path) as archive,
        zipfile.ZipFile(tmp_path / "y.ckpt", "w", zipfile.ZIP_DEFLATED) as other,
    ):
        for record in archive.infolist():
            zeros = bytes(10**8) if record.filename.endswith("data.pkl") else b""
            other.writestr(record.filename, archive.read(record) + zeros)
    with pytest.raises(CheckpointError, match="records take"):
        import_pixnerd(tmp_path / "y.ckpt")


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "socket"])
def test_only_regular_files_are_opened(kind, tmp_path):
    for suffix in ("ckpt", "safetensors"):
        path = tmp_path / f"x.{suffix}"
        if kind == "pipe":
            os.mkfifo(path)  # opening it would wait for ever
        elif kind == "folder":
            path.mkdir()
        elif kind == "device":
            path.symlink_to("/dev/zero")
        else:
            with socket.socket(socket.AF_UNIX) as own, pytest.MonkeyPatch.context() as patch:
                patch.chdir(tmp_path)  # the name of a socket is short
                own.bind(path.name)
        with pytest.raises(CheckpointError, match=rf"x\.{suffix}"):
            start_from(FlowSeg(config_of(5)), path)


# ---------------------------------------------------------------- starting from one


@pytest.mark.parametrize(
    "changes",
    [{}, {"encoding_dims": 16}, {"conv_width": 8}, {"encoding": "coded", "encoding_dims": 19}],
    ids=str,
)
def test_a_model_of_more_channels_and_with_an_encoder_starts_as_the_public_network(changes, tmp_path):
    plain = drawn(Reference, config_of())
    path = write(tmp_path / "x.ckpt", public(plain))
    torch.manual_seed(1)
    model = FlowSeg(config_of(5, **changes))
    encoder = {
        name: p.clone() for name, p in model.network.named_parameters() if name.startswith("image_encoder")
    }
    said = start_from(model, path)
    assert ("new channels start at zero" in said) == (model.config.encoding_dims > 3)
    x, t, image = torch.randn(2, model.config.encoding_dims, 12, 20), torch.rand(2), torch.rand(2, 3, 12, 20)
    with torch.no_grad():
        v = model.network(x, t, model.network.encode_image(image))
        expected = plain(x[:, :3], t, plain.encode_image(x[:, :3]))
    assert torch.allclose(v[:, :3], expected, rtol=1e-5, atol=1e-5)
    assert not v[:, 3:].any()
    assert all(torch.equal(model.network.get_parameter(name), value) for name, value in encoder.items())
    model.loss(image, torch.zeros(2, 12, 20, dtype=torch.long))[0].backward()
    levels = [f"image_to_velocity.{level}" for level in range(len(model.network.image_to_velocity))]
    for name in ("image_to_token", "image_to_pixel", *levels, "head", "token_to_velocity"):
        # Nothing stays dead.
        assert model.network.get_submodule(name).weight.grad.abs().sum(-1).all() or name == "image_to_token"
    assert model.network.image_to_token.weight.grad.any()


def test_nothing_is_written_beside_a_checkpoint_and_nothing_there_is_read(tmp_path):
    path, beside = write(tmp_path / "x.ckpt", TINY), tmp_path / "x.safetensors"
    for content in (None, b"of somebody else"):
        if content:
            beside.write_bytes(content)
        before = sorted((file.name, file.read_bytes()) for file in tmp_path.iterdir())
        model = FlowSeg(config_of(5))
        start_from(model, path)
        ours, imported = model.network.state_dict(), import_pixnerd(path).network.state_dict()
        own = [name for name in ours if not name.startswith(IMAGE_PATH)]
        assert len(own) == len(KEYS)
        assert all(torch.equal(ours[name], imported[name]) for name in own)
        assert sorted((file.name, file.read_bytes()) for file in tmp_path.iterdir()) == before


@pytest.mark.parametrize("changes", [
    {"hidden_size": 32}, {"depth": 1}, {"patch_size": 8}, {"num_heads": 1}, {"nerf_mlp_ratio": 1},
    {"nerf_width": 16}, {"nerf_depth": 1},
], ids=str)  # fmt: skip
def test_another_preset_is_one_line_that_names_the_first_mismatch(changes, tmp_path):
    path = write(tmp_path / "x.ckpt", TINY)
    with pytest.raises(CheckpointError, match=r"x\.ckpt has another network \(.*match --preset") as caught:
        start_from(FlowSeg(config_of(5, encoding_dims=16, **changes)), path)
    assert "\n" not in str(caught.value)


def names(count):
    return [f"class {i}" for i in range(count)]


@pytest.mark.parametrize("tokens_of", ["image", "state"])
@pytest.mark.parametrize(("before", "after"), [
    ({"num_classes": 14, "encoding_dims": 11}, {"num_classes": 150}),
    ({"num_classes": 150}, {"num_classes": 14, "encoding_dims": 11}),
    ({"num_classes": 14}, {"num_classes": 14, "encoding": "kronecker", "encoding_dims": 19}),
], ids=["more", "fewer", "another encoding"])  # fmt: skip
def test_a_trained_network_starts_one_of_another_encoding(before, after, tokens_of, tmp_path):
    sizes = {**SMALL, "encoding": "coded", "encoding_dims": 0, "tokens_of": tokens_of}
    source = untrained(ModelConfig(**sizes | before))
    count = before["num_classes"]
    source.save(tmp_path / "x.safetensors", classes=names(count), ids=list(range(count)))
    model = FlowSeg(ModelConfig(**sizes | after))
    fresh = {name: value.clone() for name, value in model.network.state_dict().items()}
    said = start_from(model, tmp_path / "x.safetensors", names(after["num_classes"]))

    # Only what has a row or a column for each channel of the state is new; everything else is the source's.
    read = {"patch_embed.weight", "patch_embed.bias"} if tokens_of == "state" else set()
    outer = {"pixel_embed.weight", "pixel_embed.bias", "head.weight", "head.bias", "token_to_velocity.weight"}
    outer |= {f"image_to_velocity.{level}.weight" for level in range(2)} | read
    theirs = source.network.state_dict()
    for name, value in model.network.state_dict().items():
        assert torch.equal(value, fresh[name] if name in outer else theirs[name]), name
    assert "\n" not in said and "start anew" in said
    assert f"{min(before['num_classes'], after['num_classes'])} of {after['num_classes']} classes" in said
    assert ("class 18 + 131 more" in said) == (after["num_classes"] == 150)

    # It learns: all that is new has a gradient, or waits for what it is multiplied with.
    image = torch.rand(2, 3, 12, 20)
    model.loss(image, torch.zeros(2, 12, 20, dtype=torch.long))[0].backward()
    assert all(model.network.get_parameter(name).grad.any() for name in outer if "embed" not in name)


def test_with_equal_channels_all_weights_are_kept_and_centroids_are_compared(tmp_path):
    source = untrained(ModelConfig(5, **SMALL | {"encoding": "coded", "encoding_dims": 11}))
    source.save(tmp_path / "x.safetensors", classes=names(5), ids=[1, 2, 3, 4, 5])
    for classes, said in (
        (names(5), "5 of 5 classes are known by name, 5 with the same centroid; new: none"),
        (names(5)[::-1], "5 of 5 classes are known by name, 1 with the same centroid; new: none"),
        (["x", *names(5)], "5 of 6 classes are known by name, 0 with the same centroid; new: x"),
        (["x", "y"], "0 of 2 classes are known by name, 0 with the same centroid; new: x, y"),
    ):
        model = FlowSeg(ModelConfig(len(classes), **SMALL | {"encoding": "coded", "encoding_dims": 11}))
        assert start_from(model, tmp_path / "x.safetensors", classes) == said
        assert weights_hash(model) == weights_hash(source)


@pytest.mark.parametrize("changes", [
    {"hidden_size": 32}, {"depth": 1}, {"patch_size": 8}, {"num_heads": 1}, {"nerf_width": 16},
    {"conv_width": 16}, {"nerf_depth": 1}, {"tokens_of": "image"},
], ids=str)  # fmt: skip
def test_another_size_is_an_error_also_where_the_encoding_differs(changes, tmp_path):
    coded = {**SMALL, "encoding": "coded", "encoding_dims": 0}
    untrained(ModelConfig(14, **coded)).save(tmp_path / "x.safetensors")
    model = FlowSeg(ModelConfig(150, **coded | changes))
    before = weights_hash(model)
    with pytest.raises(CheckpointError, match=r"has another network .*match --preset"):
        start_from(model, tmp_path / "x.safetensors")
    assert weights_hash(model) == before


def test_a_network_that_does_not_see_starts_one_of_fewer_channels_that_learns_to(tmp_path):
    network = drawn(Network, config_of(encoding_dims=8))
    for name, value in network.named_parameters():
        if name.startswith(IMAGE_PATH):
            value.data.zero_()
    FlowSeg(network.config, network).save(tmp_path / "wide.safetensors")
    model = FlowSeg(config_of(5))
    assert "start anew" in start_from(model, tmp_path / "wide.safetensors")
    assert all(value.any() for value in model.network.image_encoder.parameters() if value.ndim > 1)


# ---------------------------------------------------------------- the published sizes


def test_xl_has_as_many_parameters_as_the_published_network():
    """Counted from its description. Of its class table we need one row; what we add is the image path."""
    D, P, Dx, r, depth, field = 1152, 16, 64, 2, 26, 4
    inner = int(2 / 3 * 4 * D)
    block = 2 * D + 3 * D * D + 2 * (D // 16) + D * D + D + 3 * D * inner + 6 * D * D + 6 * D

    def published(dims: int) -> int:
        state = (dims * P * P + 1) * D + (dims + 64 + 1) * Dx + (Dx + 1) * dims
        around = state + 257 * D + (D + 1) * D + Dx + 1001 * D
        return depth * block + field * ((D + 1) * 2 * r * Dx * Dx + Dx) + around

    def counted(*settings: str) -> tuple[int, int]:
        with torch.device("meta"):
            network = Network(resolve({"preset": "xl"}, list(settings))[1])
        image = sum(p.numel() for name, p in network.named_parameters() if name.startswith(IMAGE_PATH))
        return sum(p.numel() for p in network.parameters()) - image, image

    assert published(3) == 700_589_219
    for dims, encoding in ((3, "kronecker"), (19, "coded")):
        pixnerd, image = counted(f"encoding_dims={dims}", f"encoding={encoding}")
        assert pixnerd == published(dims) - 1000 * D
        assert 0 < image < 0.01 * pixnerd
