"""Settings of a run: presets, recipes, and NAME=VALUE on the command line."""

import json
import os
import tomllib
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path

from data import BUILT_IN, locate, nearest, open_dataset
from flowseg_tools.dinov2 import encoder_config
from flowseg_tools.options import written_fields
from flowseg_tools.runs import CONFIG, RunError, from_torchrun
from model import ModelConfig

TABLES_DIR = Path(__file__).parent / "tables"
PRESETS = tomllib.loads((TABLES_DIR / "presets.toml").read_text(encoding="utf-8"))
KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
RECIPES = tomllib.loads((TABLES_DIR / "recipes.toml").read_text(encoding="utf-8"))


def resolve_as(kind: type, given: dict, settings: Iterable[str]) -> tuple:
    """A configuration of `kind`, which is train.TrainConfig, and the ModelConfig; see train.resolve."""
    kinds = {field.name: type(field.default) for field in (*fields(ModelConfig), *fields(kind))}
    del kinds["num_classes"]  # the data set decides
    chosen = merge(given, settings, kinds, kind.preset)
    if chosen.get("encoder"):
        chosen |= encoder_config(chosen["encoder"])
    try:
        config = kind(**{name: chosen[name] for name in chosen if hasattr(kind, name)})
        config = with_absolute_paths(config)
        data = open_dataset(config.dataset, "training", config.root, strict=False)  # for its label table
        network = {name: chosen[name] for name in chosen if hasattr(ModelConfig, name)}
        model_config = ModelConfig(num_classes=len(data.labels.classes), **network)
    except ValueError as error:
        raise RunError(str(error)) from error

    patch_size = model_config.patch_size
    if config.crop_size % patch_size:
        raise RunError(f"crop_size is {config.crop_size}; expected a multiple of the patch size {patch_size}")
    parts = from_torchrun("WORLD_SIZE", 1) * config.grad_accum_steps
    if config.batch_size % parts:
        expected = f"a multiple of {parts}, processes x grad_accum_steps"
        raise RunError(f"batch_size is {config.batch_size}; expected {expected}")
    return config, model_config


def with_absolute_paths(config):
    """A train.TrainConfig whose files are found from every folder, so that a run and its weights are, too."""
    dataset, root = locate(config.dataset, config.root)
    paths = {"root": root, "init": config.init, "encoder": config.encoder, "teacher": config.teacher}
    if not root and dataset not in BUILT_IN:
        paths["dataset"] = dataset
    return replace(config, **{name: os.path.abspath(path) if path else "" for name, path in paths.items()})


def given_fields(parameters: dict, config_file: Path | None) -> dict:
    """The fields that parameters of the train command set, which have their names; None is not given."""
    given = {}
    for name, value in parameters.items():
        if name == "compile" and value is not None:
            value = str(value).lower()  # --no-compile is a choice, too
        if name in written_fields() and value is not None and value is not False:
            given[name] = str(value) if isinstance(value, Path) else value
    return read_config(config_file, given) if config_file else given


def run_folder(config) -> Path:
    """Where a run goes if nobody says it; config is a train.TrainConfig."""
    return Path("runs") / (config.recipe or f"{Path(config.dataset).resolve().name}-{config.preset}")


def read_config(file: Path, given: dict) -> dict:
    """The options `given` and, for all fields that they leave out, the settings in a run's config.json.

    file: that file, or the run directory. RunError: it is none, or an option would change many of its fields.
    """
    path = file / CONFIG if file.is_dir() else file
    for name in ("preset", "recipe"):
        if name in given:
            raise RunError(f"--config {file} has a {name} already; leave out --{name} or --config")
    try:
        groups = json.loads(path.read_text(encoding="utf-8"))
        stored = groups["train"] | groups["model"]
        del stored["num_classes"]  # the data set decides
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "it holds no settings"
        raise RunError(f"--config {file}: {reason}; expected a run directory or its config.json") from error
    return stored | given


def command_for(init: str) -> str:
    """The command that makes the weights that --init or a recipe starts from."""
    folder = Path(init)
    if folder.parent.name == "runs" and folder.name in RECIPES:
        return f"flowseg train --recipe {folder.name}"
    return "flowseg train"


def merge(given: dict, settings: Iterable[str], kinds: dict[str, type], preset: str) -> dict:
    """The value of every field that is set: by NAME=VALUE, else an option, else the recipe, else the preset.

    given: options by the names of their fields. kinds: the type of every field. preset: the one that counts
    where none is named. RunError names what is unknown.
    """
    for name, value in given.items():
        if name in kinds and type(value) is not kinds[name] and (type(value), kinds[name]) != (int, float):
            raise RunError(f"{name} is {value!r}; expected {KINDS[kinds[name]]}")
    chosen = dict(given)
    for setting in settings:
        name, value = parse_setting(setting, kinds)
        chosen[name] = value
    for name in chosen:
        if name not in kinds:
            raise RunError(f"{name} is no setting{nearest(name, kinds)}")
    if chosen.get("recipe"):
        chosen = choose("--recipe", chosen["recipe"], RECIPES) | chosen
    return choose("--preset", chosen.get("preset", preset), PRESETS) | chosen


def parse_setting(setting: str, kinds: dict[str, type]) -> tuple[str, str | int | float | bool]:
    """Name and value of NAME=VALUE, where the value gets the type of the field."""
    name, _, text = setting.partition("=")
    if name not in kinds:
        expected = "FIELD=VALUE; `--set help` lists the fields"
        raise RunError(f"--set {setting}: expected {expected}{nearest(name, kinds)}")
    kind = kinds[name]
    if kind is bool:
        if text not in ("true", "false"):
            raise RunError(f"--set {setting}: expected {name}=true or {name}=false")
        return name, text == "true"
    try:
        return name, kind(text)
    except ValueError:
        raise RunError(f"--set {setting}: expected {KINDS[kind]} after {name}=") from None


def choose(option: str, name: str, tables: dict) -> dict:
    """The table of that name. RunError names the option and the tables that there are."""
    if name not in tables:
        raise RunError(f"{option} {name}: expected {', '.join(tables)}{nearest(name, tables)}")
    return tables[name]
