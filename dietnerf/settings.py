"""What `dietnerf train` is asked for, and the nerfstudio configuration that it means."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from common.checks import UserError, require_at_least, require_between, require_one_of
from common.commands import named
from common.images import ImageLimit
from common.runtime import RuntimeConfig
from common.training import LogConfig, ScaleConfig, flat, settings_of
from dietnerf.bounds import BoxConfig
from dietnerf.grid import DietGridModelConfig
from dietnerf.methods import EXTRA, FewViewTrainerConfig, method_config
from dietnerf.mlp import DietNeRFModelConfig
from dietnerf.regularizers import RegularizerConfig
from dietnerf.semantic import SemanticConfig, check_semantic_config
from dietnerf.views import PROTOCOLS, ViewsConfig

METHODS = {
    "mlp": "dietnerf",
    "mlp-small": "small-nerf",
    "simplified": "simplified-nerf",
    "nerfacto": "dietnerf-nerfacto",
    "grid": "dietnerf-grid",
}
FREE = (
    "steps", "out", "chunk", "val_views", "val_every", "devices", "num_nodes", "strategy", "resume", "tensorboard",
    "progress",
)  # fmt: skip
"""Options that may be others when a run is resumed."""
MOST_STEPS = 10_000_000
GROW_AFTER = 100
"""A grid's level lasts at least so many steps, however short the run."""
OF_FIELD: dict[type, tuple[str, tuple[str, ...]]] = {
    DietGridModelConfig: ("the grid", ("resolutions", "harmonics", "min_views", "prune")),
    DietNeRFModelConfig: ("the MLPs", ("position_bands", "density_activation")),
}
"""Options that one kind of field has."""
SEMANTIC = {one.name: f"semantic_{one.name}" for one in fields(SemanticConfig)}
SEMANTIC |= {"random_weights": "semantic_random", "chunk": "chunk"}
"""Options of the semantic loss's fields."""
OWN: Any = None
"""The method's own."""
PARTS: dict[str, type] = {
    "views": ViewsConfig,
    "box": BoxConfig,
    "semantic": SemanticConfig,
    "regularizers": RegularizerConfig,
    "scale": ScaleConfig,
    "log": LogConfig,
}
"""What the configuration holds that other code needs on its own; its options stand among the others."""


@dataclass(frozen=True)
class TrainConfig:
    """Train a radiance field on a few photographs.

    SCENE is a directory in Blender's (transforms_train.json), nerfstudio's (transforms.json), COLMAP's (sparse/0) or
    LLFF's (poses_bounds.npy) layout, or the file in it that has the cameras. A folder of photographs without poses is
    posed first, as dietnerf pose does, in OUT/scene.
    """

    scene: Annotated[Path, tyro.conf.Positional]
    """Directory of the scene, its file of cameras, or a folder of photographs without poses."""
    out: Path = Path("out/dietnerf")
    """Where the run goes; give it to dietnerf render and evaluate, or OUT/config.yml to the ns- commands."""
    method: Literal["mlp", "mlp-small", "simplified", "nerfacto", "grid"] = "grid"
    """mlp (the published field, for a GPU), mlp-small (a small one, for a CPU), simplified (the paper's baseline),
    nerfacto (hash grid), grid (voxels). With --help it shows the method's own settings."""
    protocol: Literal["none", "paper", "standard"] = "none"
    """paper: the 8 training views, image size and test views of the publication."""
    background: Literal["auto", "white", "black", "image", "random"] = "auto"
    """Behind transparent pixels; image leaves photographs as they are; auto is white where there is alpha; random is
    white, but trains over colours redrawn for each ray, which teaches the field what is empty."""
    steps: int = 0
    """Training steps; 0 is the method's own number. The schedule stretches with it."""
    lr: float = 0.0
    """Learning rate; 0 is the method's own."""
    rays: int = 0
    """Rays a step; 0 is the method's own number."""
    resolutions: tuple[int, ...] = ()
    """Of the grid, the cube root of the number of voxels, level by level; left out, the method's own."""
    harmonics: int | None = None
    """Of the grid, the degree of the spherical harmonics of colour (0 is the same from all sides); left out, 1 where
    the space outside the box is contracted, else 0."""
    min_views: int | None = None
    """Of the grid, how many training cameras must see what is not empty, where images have alpha; left out, the
    method's own."""
    prune: bool | None = None
    """Of the grid, whether what is empty is left out; with False anything may still grow anywhere, and training takes
    longer. Left out, the method's own."""
    position_bands: int | None = None
    """Of the MLPs, the frequency bands of positions; left out, the method's own (published: 10)."""
    density_activation: Literal["relu", "softplus"] | None = None
    """Of the MLPs: relu as published, or softplus, which cannot die; left out, the method's own."""
    near: float = 0.0
    """Where rays start, in training and in renders; 0 suits the layout of the scene. Cameras of photographs reach to 1
    from the centre; Blender's that are not about 4 units from it are scaled to be."""
    far: float = 0.0
    """Where rays end, likewise; 0 suits the layout of the scene."""
    appearance: Literal["auto", "on", "off"] = "auto"
    """Let each training photograph have its own gain and offset of colour, as exposures differ; renders have the mean
    one. auto: where the space outside the box is contracted."""
    refine_poses: bool = False
    """Move the training cameras while training (nerfstudio's camera optimizer)."""
    val_views: int = 2
    """Held-out views that are looked at during training; 0 looks at none."""
    val_every: int = 0
    """Steps between looks; 0 is a tenth of the run."""
    resume: bool = True
    """Resume from last.ckpt in OUT when there is one, which must be of a run with the same settings; --no-resume starts
    over."""
    views: ViewsConfig = field(default_factory=ViewsConfig)
    box: BoxConfig = field(default_factory=BoxConfig)
    semantic: Annotated[SemanticConfig, named(SemanticConfig, SEMANTIC)] = OWN
    regularizers: Annotated[RegularizerConfig, named(RegularizerConfig)] = OWN
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    log: LogConfig = field(default_factory=lambda: LogConfig(tensorboard=False))
    limit: ImageLimit = field(default_factory=ImageLimit)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def __post_init__(self) -> None:
        """Parts that are left out are the method's own."""
        model = preset(self.method).pipeline.model
        for name in ("semantic", "regularizers"):
            if getattr(self, name) is OWN:
                object.__setattr__(self, name, getattr(model, name))

    @classmethod
    def for_arguments(cls, arguments: Sequence[str]) -> TrainConfig:
        """What the options of a command line change: the settings of the method that it names."""
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--method", nargs="?")
        chosen = parser.parse_known_args(arguments)[0].method
        return cls(scene=tyro.MISSING, method=chosen if chosen in METHODS else cls.method)


def preset(method: str) -> FewViewTrainerConfig:
    """A fresh configuration of one of `METHODS`, from which both front doors start.

    Raises:
        UserError: an unknown method.
    """
    require_one_of("method", method, list(METHODS))
    return method_config(METHODS[method])


def options_of(config: TrainConfig) -> dict[str, Any]:
    """The settings by the names of their options: semantic_weight, occlusion, devices."""
    found = asdict(config)
    found["semantic"] = {SEMANTIC[name]: value for name, value in found["semantic"].items()}
    return flat(found, PARTS)


def without_effect(config: TrainConfig) -> set[str]:
    """Options that decide nothing: those of a semantic loss that is off."""
    return set() if config.semantic.weight else set(SEMANTIC.values()) - {"semantic_weight"}


def settings_of_run(config: TrainConfig) -> dict[str, Any]:
    """What a resumed run must have in common with its beginning."""
    found = settings_of(options_of(config), {*FREE, *without_effect(config)})
    return found | {"scene": str(config.scene.resolve())}


def changed(config: TrainConfig, **options: Any) -> TrainConfig:
    """The settings with other options; another method comes with its own semantic loss and regularizers.

    Raises:
        UserError: an option that `dietnerf train` has not.
    """
    places = {one.name: ("", one.name) for one in fields(TrainConfig)}
    for part, kind in PARTS.items():
        names = SEMANTIC if part == "semantic" else {one.name: one.name for one in fields(kind)}
        places |= {option: (part, name) for name, option in names.items()}
    changes: dict[str, dict[str, Any]] = {}
    for option, value in options.items():
        if option not in places:
            raise UserError(f"{option!r} is no setting of dietnerf train: see its --help.")
        part, name = places[option]
        changes.setdefault(part, {})[name] = value
    own = changes.pop("", {})
    if "method" in own:
        own = {"semantic": OWN, "regularizers": OWN} | own
    config = replace(config, **own)
    parts: dict[str, Any] = {part: replace(getattr(config, part), **given) for part, given in changes.items()}
    return replace(config, **parts)


def train_config(scene: Path, **options: Any) -> TrainConfig:
    """The settings of `dietnerf train SCENE` with these options."""
    return changed(TrainConfig(scene), **options)


def nerfstudio_config(config: TrainConfig) -> FewViewTrainerConfig:
    """The nerfstudio configuration that a training command means.

    Raises:
        UserError: a value that cannot work.
    """
    run = preset(config.method)
    data, model = run.pipeline.datamanager, run.pipeline.model
    require_between("steps", config.steps, 0, MOST_STEPS)
    for name in ("rays", "val_views", "val_every", "near", "far", "lr"):
        require_at_least(name, getattr(config, name), 0)
    check_semantic_config(config.semantic)
    config.scale.check()
    steps = config.steps or run.max_num_iterations
    scale = steps / run.max_num_iterations
    run.max_num_iterations = steps
    data.crop_steps = round(data.crop_steps * scale)
    for kind, (owner, names) in OF_FIELD.items():
        given = {name: value for name in names if (value := getattr(config, name)) not in (None, ())}
        if isinstance(model, kind):
            vars(model).update(given)
        elif given:
            raise UserError(f"{' and '.join(given)}: of {owner} only, but method is {config.method!r}; leave it out.")
    if isinstance(model, DietGridModelConfig):
        if config.resolutions:
            model.grow_at = spread_levels(model.grow_at, len(config.resolutions))
        # Never so early that the coarse grid has found nothing yet to crop to.
        model.grow_at = tuple(max(GROW_AFTER * i, round(at * scale)) for i, at in enumerate(model.grow_at, start=1))
    for name, group in run.optimizers.items():
        if name not in EXTRA:
            group["optimizer"].lr = config.lr or group["optimizer"].lr
        if config.method in ("mlp-small", "nerfacto", "grid"):
            group["scheduler"].steps = steps
    protocol, parser = PROTOCOLS.get(config.protocol), data.dataparser
    parser.data = data.data = config.scene.resolve()
    vars(parser).update(vars(config.views) | vars(config.box))
    if protocol and not config.views.num_views:
        parser.view_ids = config.views.view_ids or protocol.view_ids
    if protocol:
        parser.image_size = config.views.image_size or protocol.image_size
    parser.max_megapixels = config.limit.max_megapixels
    parser.background = "white" if config.background == "random" else config.background
    if config.background == "random":
        model.background_color = "random"
    data.train_num_rays_per_batch = config.rays or data.train_num_rays_per_batch
    data.seed = run.pipeline.seed = run.machine.seed = parser.view_seed = config.runtime.seed
    if (config.near or config.far) and not 0 < config.near < config.far:
        raise UserError(f"near is {config.near} and far is {config.far}: give both, with 0 < near < far.")
    if config.far:
        model.near, model.far = config.near, config.far
    model.appearance, model.refine_poses = config.appearance, config.refine_poses
    model.semantic, model.regularizers = config.semantic, config.regularizers
    model.eval_num_rays_per_chunk = config.semantic.chunk
    run.run_directory = config.out.resolve()
    run.experiment_name, run.timestamp = config.out.name or "run", "run"
    run.machine.device_type = "cuda" if torch.cuda.is_available() and config.runtime.device != "cpu" else "cpu"
    return run


def spread_levels(grow_at: Sequence[int], levels: int) -> tuple[int, ...]:
    """Steps at which each further level starts, when there are more or fewer levels: over the same span, evenly."""
    if levels - 1 == len(grow_at):
        return tuple(grow_at)
    return tuple(round(grow_at[-1] * i / (levels - 1)) for i in range(1, levels))
