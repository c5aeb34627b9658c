"""`dietnerf train` and `ns-train` begin with the same settings, each of which stands once."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
import tyro

pytest.importorskip("nerfstudio")

from common.checks import UserError
from dietnerf import model
from dietnerf.cli import main
from dietnerf.grid import DietGridModel, DietGridModelConfig
from dietnerf.methods import method_config
from dietnerf.mlp import DietNeRFModel, DietNeRFModelConfig
from dietnerf.nerfacto import DietNerfactoModel, DietNerfactoModelConfig
from dietnerf.settings import (
    FREE,
    METHODS,
    PARTS,
    SEMANTIC,
    TrainConfig,
    changed,
    nerfstudio_config,
    options_of,
    train_config,
)

SCENE = Path("SCENE")
DIFFERENT = {
    "run_directory", "experiment_name", "timestamp",  # where a run lies
    "pipeline.datamanager.data", "pipeline.datamanager.dataparser.data",
    "machine.device_type",  # that of --device
    "machine.seed",  # nerfstudio's is 42, that of --seed is 0
}  # fmt: skip
"""What the two doors must have of their own."""


def leaves(config, path=""):
    """Every value of a configuration by its path."""
    if is_dataclass(config) and not isinstance(config, type):
        config = vars(config)
    if not isinstance(config, dict):
        return {path[1:]: config}
    return {name: value for key in config for name, value in leaves(config[key], f"{path}.{key}").items()}


def through_ours(*arguments):
    """What `dietnerf train` with these arguments would train."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dietnerf.training.run", lambda config: found.append(config) or 0)
        assert main(["train", *arguments]) == 0
    return found[0]


def through_nerfstudio(method, *arguments):
    """What `ns-train` with these arguments would train."""
    preset = method_config(METHODS[method])
    return tyro.cli(type(preset), default=preset, args=list(arguments), config=(tyro.conf.FlagConversionOff,))


@pytest.mark.parametrize("method", METHODS)
def test_both_doors_build_the_same(method):
    theirs = leaves(through_nerfstudio(method))
    ours = leaves(nerfstudio_config(through_ours("SCENE", "--method", method)))
    assert ours.keys() == theirs.keys() and len(ours) > 100
    assert {name for name in ours if ours[name] != theirs[name]} <= DIFFERENT
    assert theirs == leaves(method_config(METHODS[method]))
    assert options_of(through_ours("SCENE", "--method", method)) == options_of(train_config(SCENE, method=method))


def test_the_same_options_through_both_doors():
    ours = through_ours(
        "SCENE", "--method", "mlp", "--semantic-weight", "0.3", "--semantic-text-weight", "0.5", "--semantic-random",
        "--occlusion", "0.1", "--occlusion-distance", "0.2", "--depth-patches", "3", "--num-views", "5", "--image-size", "9",
    )  # fmt: skip
    model_, parser = "--pipeline.model", "--pipeline.datamanager.dataparser"
    theirs = through_nerfstudio(
        "mlp", f"{model_}.semantic.weight", "0.3", f"{model_}.semantic.text-weight", "0.5",
        f"{model_}.semantic.random-weights", "True", f"{model_}.regularizers.occlusion", "0.1",
        f"{model_}.regularizers.occlusion-distance", "0.2", f"{model_}.regularizers.depth-patches", "3",
        f"{parser}.num-views", "5", f"{parser}.image-size", "9",
    )  # fmt: skip
    ours_built, theirs_built = leaves(nerfstudio_config(ours)), leaves(theirs)
    assert {name for name in ours_built if ours_built[name] != theirs_built[name]} <= DIFFERENT
    assert (ours.semantic.poses, ours.semantic.text_weight, ours.regularizers.depth_patches) == ("published", 0.5, 3)


def test_a_captures_options_through_both_doors():
    ours = through_ours(
        "SCENE", "--box-size", "1", "2", "3", "--box-center", "0", "0", "1", "--contraction", "on", "--hold-out", "5",
        "--refine-poses", "--appearance", "off", "--depth", "0.5", "--lr", "0.1",
    )  # fmt: skip
    parser = "--pipeline.datamanager.dataparser"
    theirs = through_nerfstudio(
        "grid", f"{parser}.box-size", "1", "2", "3", f"{parser}.box-center", "0", "0", "1", f"{parser}.contraction", "on",
        f"{parser}.hold-out", "5", "--pipeline.model.refine-poses", "True", "--pipeline.model.appearance", "off",
        "--pipeline.model.regularizers.depth", "0.5", "--optimizers.fields.optimizer.lr", "0.1",
    )  # fmt: skip
    ours_built, theirs_built = leaves(nerfstudio_config(ours)), leaves(theirs)
    assert {name for name in ours_built if ours_built[name] != theirs_built[name]} <= DIFFERENT
    found = nerfstudio_config(ours).pipeline
    assert (found.datamanager.dataparser.box_size, found.model.refine_poses) == ((1.0, 2.0, 3.0), True)


def test_options_are_named_once_and_those_that_are_free_exist():
    parts = [SEMANTIC[f.name] if part == "semantic" else f.name for part, kind in PARTS.items() for f in fields(kind)]
    own = [f.name for f in fields(TrainConfig) if f.name not in PARTS]
    names = own + parts
    assert len(names) == len(set(names)) and set(names) == options_of(train_config(SCENE)).keys()
    assert set(FREE) <= set(names)


def test_another_method_comes_with_its_own_losses():
    grid = train_config(SCENE, semantic_weight=0.5, distortion=0.1)
    assert (grid.semantic.poses, grid.regularizers.silhouette) == ("sphere", 1.0)
    mlp = changed(grid, method="mlp", occlusion=0.2)
    preset = method_config("dietnerf").pipeline.model
    assert mlp.semantic == preset.semantic and mlp.semantic.poses == "published"
    assert mlp.regularizers == replace(preset.regularizers, occlusion=0.2)
    assert changed(grid, chunk=7).semantic == replace(grid.semantic, chunk=7)
    with pytest.raises(UserError, match="'speed' is no setting of dietnerf train"):
        changed(grid, speed=3)
    with pytest.raises(UserError, match="method is 'best': choose one of"):
        TrainConfig(SCENE, method="best")


def test_configurations_of_version_0_1_find_the_fields_where_they_were():
    for kind in (
        DietNeRFModel, DietNeRFModelConfig, DietNerfactoModel, DietNerfactoModelConfig, DietGridModel, DietGridModelConfig,
    ):  # fmt: skip
        assert getattr(model, kind.__name__) is kind
    with pytest.raises(AttributeError, match="module 'dietnerf.model' has no attribute 'DietCoke'"):
        model.DietCoke  # noqa: B018
