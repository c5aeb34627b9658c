"""Train a field with Lightning, in the files of a nerfstudio run: `ns-viewer`, `ns-eval` and `ns-render` open it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
import yaml
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from common.batches import BatchOrder, ResumableLoader
from common.callbacks import save_whole
from common.checks import UserError, require_at_least, require_between, require_place
from common.files import clear_leftovers, write_json, write_text
from common.images import ImageLimit
from common.optimizers import fused
from common.processes import is_first_process, sole_run
from common.runtime import RuntimeConfig, hardware, start, versions
from common.training import (
    TrainerConfig,
    build_trainer,
    fit,
    mean_over_processes,
    require_same_run,
    settings_of,
    validation_interval,
)
from dietnerf.data import PROTOCOLS
from dietnerf.grid import DietGridModelConfig
from dietnerf.methods import DESCRIPTIONS, FewViewTrainerConfig, method_config
from dietnerf.metrics import psnr
from dietnerf.pipeline import FewViewPipeline
from dietnerf.regularizers import RegularizerConfig

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
"""Settings that may be others when a run is gone on with."""
MOST_STEPS = 10_000_000
GROW_AFTER = 100
"""A grid's level lasts at least so many steps, however short the run."""


@dataclass(frozen=True)
class TrainConfig:
    """Train a radiance field on a few posed photographs.

    SCENE is a directory in Blender's (transforms_train.json), nerfstudio's (transforms.json), COLMAP's (sparse/0) or
    LLFF's (poses_bounds.npy) layout.
    """

    scene: Annotated[Path, tyro.conf.Positional]
    """Directory of the scene."""
    out: Path = Path("out/dietnerf")
    """Where the run goes; give it to dietnerf render and evaluate, or OUT/config.yml to the ns- commands."""
    method: Literal["mlp", "mlp-small", "simplified", "nerfacto", "grid"] = "grid"
    """mlp (the published field, for a GPU), mlp-small (a small one, for a CPU), simplified (the paper's baseline),
    nerfacto (hash grid), grid (voxels)."""
    protocol: Literal["none", "paper", "standard"] = "none"
    """paper: the 8 training views, image size and test views of the publication."""
    num_views: int = 0
    """Training views; 0 takes all."""
    view_ids: tuple[int, ...] = ()
    """Exactly these training views."""
    view_order: Literal["farthest", "first", "random"] = "farthest"
    """How num_views are chosen."""
    image_size: int = 0
    """Width of the images, averaged down by area; 0 keeps theirs."""
    background: Literal["auto", "white", "black", "image", "random"] = "auto"
    """Behind transparent pixels; image leaves photographs as they are; auto is white where there is alpha; random is
    white, but trains over colours drawn anew for each ray, which teaches the field what is empty."""
    steps: int = 0
    """Training steps; 0 is the method's own number. The schedule stretches with it."""
    lr: float = 0.0
    """Learning rate; 0 is the method's own."""
    rays: int = 0
    """Rays a step; 0 is the method's own number."""
    resolutions: tuple[int, ...] = ()
    """Of the grid, the cube root of the number of voxels, level by level; left out, the method's own."""
    harmonics: int | None = None
    """Of the grid, the degree of the spherical harmonics of colour (0 is the same from all sides); left out, the
    method's own."""
    min_views: int | None = None
    """Of the grid, how many training cameras must see what is not empty, where images have alpha; left out, the
    method's own."""
    near: float = 0.0
    """Where rays start, in training and in renders; 0 suits the layout of the scene."""
    far: float = 0.0
    """Where rays end, likewise; 0 suits the layout of the scene."""
    semantic_weight: float | None = None
    """Weight of the semantic loss; 0 switches it off; left out, the method's own."""
    semantic_encoder: str = "tiny"
    """Image encoder: tiny, a Hugging Face id or directory, open_clip:ARCH/TAG-or-path, timm:NAME[/PATH] or
    torchvision:NAME[/PATH]."""
    semantic_feature: Literal["class_token", "embedding", "patches"] = "class_token"
    """What of it is compared."""
    semantic_random: bool = False
    """Control: random encoder weights at the same gradient norm."""
    semantic_every: int = 10
    """Compute the semantic loss every so many steps."""
    semantic_start: int = 0
    """First step with it."""
    semantic_end: int = 0
    """First step without it (then MSE fine-tuning); 0 is never."""
    semantic_resolution: int = 168
    """Side of the rendered view in pixels, at most what the encoder sees."""
    semantic_targets: int = 1
    """Training views compared with in a step; 0 is all."""
    semantic_hinge: bool = False
    """Ask for no more similarity than the training views have among each other."""
    semantic_augment: bool = False
    """Zoom, shift and brighten renders as in the encoder's own training."""
    semantic_poses: Literal["published", "sphere", "interpolate"] = "sphere"
    """Random views: on the published sphere (of Blender scenes; elsewhere as sphere), on one around the user's own
    cameras, or between three of these."""
    semantic_text: str = ""
    """A description of the scene as one more target."""
    chunk: int = 4096
    """Rays rendered at once; memory grows with it."""
    frequency_steps: int | None = None
    """Steps over which the bands of the encoding appear; left out, the method's own."""
    occlusion: float | None = None
    """Weight of density near the camera; left out, the method's own."""
    density_variation: float | None = None
    """Weight of the total variation of density, over the number of views; left out, the method's own."""
    colour_variation: float | None = None
    """Weight of the total variation of colour, over the number of views; left out, the method's own."""
    distortion: float | None = None
    """Weight of the distortion loss; left out, the method's own."""
    depth_smoothness: float | None = None
    """Weight of the depth's differences in patches seen from random poses; left out, the method's own."""
    silhouette: float | None = None
    """Weight of the difference between opacity and the images' alpha; left out, the method's own, where the images
    have alpha."""
    val_views: int = 2
    """Held-out views that are looked at during training; 0 looks at none."""
    val_every: int = 0
    """Steps between looks; 0 is a tenth of the run."""
    devices: int = 1
    """Processes or GPUs on each machine."""
    num_nodes: int = 1
    """Machines."""
    strategy: str = "auto"
    """auto, ddp or a variant of it."""
    resume: bool = True
    """Go on from last.ckpt in OUT when there is one, which must be of a run with the same settings; --no-resume begins
    anew."""
    tensorboard: bool = False
    """Write TensorBoard logs beside the CSV."""
    progress: bool = True
    """Show a progress bar; --no-progress shows none."""
    limit: ImageLimit = field(default_factory=ImageLimit)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)


def nerfstudio_config(config: TrainConfig) -> FewViewTrainerConfig:
    """The nerfstudio configuration that a training command means.

    Raises:
        UserError: a value that cannot work.
    """
    run = method_config(METHODS[config.method])
    data, model = run.pipeline.datamanager, run.pipeline.model
    require_between("steps", config.steps, 0, MOST_STEPS)
    for name in ("rays", "val_views", "val_every", "near", "far", "lr"):
        require_at_least(name, getattr(config, name), 0)
    for name in ("chunk", "semantic_every", "semantic_resolution"):
        require_at_least(name, getattr(config, name), 1)
    steps = config.steps or run.max_num_iterations
    scale = steps / run.max_num_iterations
    run.max_num_iterations = steps
    data.crop_steps = round(data.crop_steps * scale)
    if isinstance(model, DietGridModelConfig):
        model.harmonics = model.harmonics if config.harmonics is None else config.harmonics
        model.min_views = model.min_views if config.min_views is None else config.min_views
        if config.resolutions:
            model.grow_at = spread_levels(model.grow_at, len(config.resolutions))
            model.resolutions = config.resolutions
        # Never so early that the coarse grid has found nothing yet to crop to.
        model.grow_at = tuple(max(GROW_AFTER * i, round(at * scale)) for i, at in enumerate(model.grow_at, start=1))
    elif config.resolutions or config.harmonics is not None or config.min_views is not None:
        raise UserError(
            f"resolutions, harmonics and min_views are the grid's, but method is {config.method!r}: leave them out."
        )
    for group in run.optimizers.values():
        group["optimizer"].lr = config.lr or group["optimizer"].lr
        if config.method in ("mlp-small", "nerfacto", "grid"):
            group["scheduler"].steps = steps
    protocol = PROTOCOLS.get(config.protocol)
    parser = data.dataparser
    parser.data = data.data = config.scene.resolve()
    parser.view_ids = config.view_ids or (protocol.view_ids if protocol and not config.num_views else ())
    parser.num_views, parser.view_order, parser.view_seed = config.num_views, config.view_order, config.runtime.seed
    parser.max_megapixels = config.limit.max_megapixels
    parser.image_size = config.image_size or (protocol.image_size if protocol else 0)
    parser.background = "white" if config.background == "random" else config.background
    if config.background == "random":
        model.background_color = "random"
    data.train_num_rays_per_batch = config.rays or data.train_num_rays_per_batch
    data.seed = run.pipeline.seed = run.machine.seed = config.runtime.seed
    if (config.near or config.far) and not 0 < config.near < config.far:
        raise UserError(f"near is {config.near} and far is {config.far}: give both, with 0 < near < far.")
    if config.far:
        model.near, model.far = config.near, config.far
    model.eval_num_rays_per_chunk = config.chunk
    model.semantic = replace(
        model.semantic,
        weight=model.semantic.weight if config.semantic_weight is None else config.semantic_weight,
        encoder=config.semantic_encoder,
        feature=config.semantic_feature,
        random_weights=config.semantic_random,
        every=config.semantic_every,
        start=config.semantic_start,
        end=config.semantic_end,
        resolution=config.semantic_resolution,
        targets=config.semantic_targets,
        hinge=config.semantic_hinge,
        augment=config.semantic_augment,
        poses=config.semantic_poses,
        text=config.semantic_text,
        chunk=config.chunk,
    )
    priors = {prior.name: getattr(config, prior.name, None) for prior in fields(RegularizerConfig)}
    given: dict[str, Any] = {name: value for name, value in priors.items() if value is not None}
    model.regularizers = replace(model.regularizers, **given)
    run.run_directory = config.out.resolve()
    run.experiment_name, run.timestamp = config.out.name or "run", "run"
    run.machine.device_type = "cuda" if torch.cuda.is_available() and config.runtime.device != "cpu" else "cpu"
    return run


def spread_levels(grow_at: Sequence[int], levels: int) -> tuple[int, ...]:
    """Steps at which each further level starts, when there are more or fewer levels: over the same span, evenly."""
    if levels - 1 == len(grow_at):
        return tuple(grow_at)
    return tuple(round(grow_at[-1] * i / (levels - 1)) for i in range(1, levels))


class FewViewTraining(LightningModule):
    """Optimizer, schedule and logging around the pipeline's losses."""

    def __init__(self, config: FewViewTrainerConfig, *, val_views: Sequence[int] = ()) -> None:
        super().__init__()
        self.run_config, self.val_views = config, list(val_views)
        self._row: dict[str, Tensor] = {}  # of the step's loss and its parts
        self._valid: list[float] = []  # PSNR of the validation's views
        self.pipeline: FewViewPipeline = config.pipeline.setup(device="cpu", test_mode="val")
        self.pipeline.on_restart = [self._forget]

    @property
    def model(self) -> Any:
        """The field."""
        return self.pipeline.model

    def configure_optimizers(self) -> dict[str, Any]:
        groups, factors = [], []
        for name, parameters in self.model.get_param_groups().items():
            chosen = self.run_config.optimizers[name]
            groups.append({"params": parameters, "lr": chosen["optimizer"].lr, "eps": chosen["optimizer"].eps})
            factors.append(chosen["scheduler"].setup().factor)
        # One pass over a grid's tables takes a fifth of several.
        optimizer = fused(torch.optim.Adam, groups)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self) -> None:
        self.pipeline.datamanager.device = self.device
        self.pipeline.local_rank = self.pipeline.datamanager.local_rank = self.global_rank
        self.pipeline.prepare()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.model.before_step(self.global_step)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        _, losses, metrics = self.pipeline.get_train_loss_dict(self.global_step)
        loss = torch.stack(list(losses.values())).sum()
        self.log("train/psnr", metrics["psnr"], prog_bar=True, logger=False)
        self.log("train/loss", loss, logger=False)
        self._row = {"loss": loss, "psnr": metrics["psnr"]} | (losses if len(losses) > 1 else {})
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log a step in ten, and the first in ten that has a semantic loss: all that is in a row is of its step.

        Lightning's own rows would repeat what was logged last where a step has no such loss.
        """
        step, every = self.global_step - 1, self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if step % every == 0 or "semantic" in self._row and step % every < self.model.config.semantic.every:
            row = {f"train/{name}": float(value.detach()) for name, value in self._row.items()}
            for logger in self.loggers:
                logger.log_metrics(row, step)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        for index in batch.tolist():
            image, _ = self.pipeline.datamanager.eval_dataset.load(index)
            camera = self.pipeline.datamanager.eval_dataset.cameras[index : index + 1].to(self.device)
            rgb = self.model.get_outputs_for_camera(camera)["rgb"].cpu()
            mask = self.pipeline.datamanager.eval_dataset.mask(index)
            self._valid.append(psnr(rgb, image, mask))

    def on_validation_epoch_start(self) -> None:
        self._valid = []

    def on_validation_epoch_end(self) -> None:
        self.log("val/psnr", mean_over_processes(self, sum(self._valid), len(self._valid)), prog_bar=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["restarts"], checkpoint["began"] = self.pipeline.restarts, self.model.began

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.pipeline.restarts, self.model.began = checkpoint.get("restarts", 0), checkpoint.get("began", 0)
        self.model.update_to_step(checkpoint["global_step"])

    def _forget(self) -> None:
        optimizer = self.optimizers()
        optimizer.optimizer.state.clear()  # type: ignore[union-attr]


def nerfstudio_state(module: FewViewTraining, steps: int) -> dict[str, Any]:
    """What nerfstudio's trainer would save after `steps` steps, optimizers included."""
    optimizer: Any = module.optimizers()
    optimizer = getattr(optimizer, "optimizer", optimizer)
    optimizers = {}
    for (name, parameters), group in zip(module.model.get_param_groups().items(), optimizer.param_groups, strict=True):
        settings = {key: value for key, value in group.items() if key not in ("params", "fused")}
        optimizers[name] = {
            "state": {i: dict(optimizer.state[p]) for i, p in enumerate(parameters) if p in optimizer.state},
            "param_groups": [settings | {"params": list(range(len(parameters)))}],
        }
    schedule: Any = module.lr_schedulers()
    state = schedule.state_dict()
    schedulers = {
        name: state | {key: [state[key][i]] for key in ("base_lrs", "_last_lr", "lr_lambdas")}
        for i, name in enumerate(optimizers)
    }
    return {
        "step": steps - 1,
        "pipeline": module.pipeline.state_dict(),
        "optimizers": optimizers,
        "schedulers": schedulers,
        "scalers": {},
    }


class NerfstudioCheckpoint(Callback):
    """Keeps nerfstudio_models/step-*.ckpt as new as `last.ckpt`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._step = 0  # of the one that this run has written

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if not trainer.is_global_zero or trainer.global_step == self._step:
            return
        assert isinstance(module, FewViewTraining)
        self._step = trainer.global_step
        clear_leftovers(self.directory)
        path = self.directory / f"step-{self._step - 1:09d}.ckpt"
        save_whole(nerfstudio_state(module, self._step), path)
        for other in self.directory.glob("step-*.ckpt"):
            if other != path:
                other.unlink(missing_ok=True)


def train(config: TrainConfig) -> Path:
    """Train a field and return the directory of the run.

    An interrupted run goes on from its last checkpoint, exactly.

    Raises:
        UserError: anything in the scene or the settings that cannot work, with its cure; another run uses OUT.
    """
    require_place(config.out, directory=True)
    run = nerfstudio_config(config)
    with sole_run(config.out):
        return _train(config, run)


def _train(config: TrainConfig, run: FewViewTrainerConfig) -> Path:
    """`train`, alone in its directory and with settings that can work."""
    device = start(config.runtime)
    settings = settings_of(config, FREE) | {"scene": str(config.scene.resolve())}
    if config.resume:
        require_same_run(config.out, settings)
    held_out_looks = config.val_views if config.val_views else 0
    module = FewViewTraining(run)
    if config.silhouette and not module.pipeline.datamanager.train_dataset.has_alpha:
        raise UserError(f"silhouette is {config.silhouette:g} but the images have no alpha: leave it out.")
    held_out = len(module.pipeline.datamanager.eval_dataset)
    stride = max(1, held_out // max(1, held_out_looks))
    looks = list(range(0, held_out, stride))[:held_out_looks]
    steps = run.max_num_iterations
    write_text(config.out / "config.yml", yaml.dump(run))
    strategy = config.strategy
    if config.devices * config.num_nodes > 1 and strategy in ("auto", "ddp"):
        strategy = "ddp_find_unused_parameters_true"  # a grid's other levels have no gradient
    trainer = build_trainer(
        TrainerConfig(
            max_steps=steps,
            val_every=validation_interval(config.val_every, steps),
            precision=config.runtime.precision,
            device=str(device),
            devices=config.devices,
            num_nodes=config.num_nodes,
            strategy=strategy,
            tensorboard=config.tensorboard,
            progress=config.progress,
        ),
        config.out,
        monitor="val/psnr" if looks else "train/loss",
        mode="max" if looks else "min",
        settings=settings,
        callbacks=[NerfstudioCheckpoint(run.get_checkpoint_dir())],
    )
    # The steps are the data: what each one trains on follows from its number.
    numbers: Any = list(range(steps))
    order = BatchOrder(steps, 1, shuffle=False, rank=0, world=1)
    loaders: dict[str, Any] = {"train_dataloaders": ResumableLoader(numbers, order)}
    if looks:
        loaders["val_dataloaders"] = DataLoader(looks, batch_size=1)  # type: ignore[arg-type]
    begun, cpu = time.perf_counter(), time.process_time()
    fit(trainer, module, config.out, resume=config.resume, **loaders)
    record = config.out / "training.json"
    # Without a metric all its steps were made before.
    if trainer.is_global_zero and (trainer.callback_metrics or not record.is_file()):
        data = module.pipeline.datamanager
        write_json(
            record,
            {
                "config": asdict(config),
                "view_ids": data.train_dataset.view_ids,
                "images": [path.name for path in data.train_dataset.image_filenames],
                "steps": trainer.global_step,
                "restarts": module.pipeline.restarts,
                "parameters": sum(p.numel() for p in module.model.parameters()),
                "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
                "seconds": round(time.perf_counter() - begun, 1),
                "cpu_seconds": round(time.process_time() - cpu, 1),
                "hardware": hardware(),
                "versions": versions(),
            },
        )
    return config.out


def run(config: TrainConfig) -> int:
    """`dietnerf train`: train a field and say where it is."""
    directory = train(config)
    if is_first_process():
        print(f"run written to {directory} ({DESCRIPTIONS[METHODS[config.method]]})")
        print(f"next: dietnerf render {directory}, dietnerf evaluate {directory}")
    return 0
