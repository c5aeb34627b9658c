"""A trained scene: open a run of either trainer and render any pose."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, is_dataclass
from enum import Enum
from pathlib import Path, PurePath
from typing import Any, Literal

import torch
import yaml
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras, CameraType
from torch import Tensor

from common.checks import UserError, reason_of, require_file, require_one_of
from common.pretrained import require_finite
from common.runtime import resolve_device
from dietnerf.data import FewViewDataset
from dietnerf.layouts import check_pose
from dietnerf.methods import FewViewTrainerConfig
from dietnerf.model import FewViewModel
from dietnerf.pipeline import FewViewPipeline

PACKAGES = ("nerfstudio.", "dietnerf.", "torch.optim.", "pathlib.")
"""What the classes that a config.yml may name lie in."""


@dataclass(frozen=True)
class Rendering:
    """One rendered view."""

    rgb: Float[Tensor, "h w 3"]
    """Colour in [0, 1]."""
    depth: Float[Tensor, "h w 1"]
    """Distance along the ray, in the scene's units."""
    accumulation: Float[Tensor, "h w 1"]
    """Opacity in [0, 1]."""


class Scene:
    """A run that has been opened: its field, its cameras and its images."""

    def __init__(self, config: FewViewTrainerConfig, pipeline: FewViewPipeline, directory: Path, step: int) -> None:
        self.config, self.pipeline, self.directory, self.step = config, pipeline, directory, step

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        device: str | torch.device = "auto",
        data: str | os.PathLike[str] | None = None,
    ) -> Scene:
        """Open a run of `dietnerf train` or of `ns-train`.

        Args:
            path: directory of the run (that of config.yml), or config.yml itself.
            device: "auto", "cpu", "cuda", ...
            data: where the scene's images lie now, when they have moved since.

        Raises:
            UserError: no run there, not one of ours, a config.yml that names other classes than nerfstudio's and
                ours or does not work, a damaged checkpoint or one of another field.
        """
        directory = find_run(Path(path))
        config = read_config(directory)
        target = resolve_device(device)
        try:
            if data is not None:
                config.pipeline.datamanager.data = Path(data).resolve()
            pipeline: FewViewPipeline = config.pipeline.setup(device=target, test_mode="test")
            checkpoints = directory / config.relative_model_dir
        except (UserError, OSError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever nerfstudio makes of a value that it does not expect
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:150]
            raise UserError(
                f"run {str(directory)!r} cannot be opened ({reason}): put back the config.yml that it was trained "
                f"with, or train it again."
            ) from error
        step = load_checkpoint(pipeline, checkpoints)
        pipeline.eval()
        return cls(config, pipeline, directory, step)

    @property
    def model(self) -> FewViewModel:
        """The field."""
        return self.pipeline.model

    @property
    def training_views(self) -> FewViewDataset:
        """The views that the field was trained on."""
        return self.pipeline.datamanager.train_dataset

    @property
    def held_out_views(self) -> FewViewDataset:
        """The views that it was not trained on; its training views again where there are no others."""
        return self.pipeline.datamanager.eval_dataset

    @property
    def holds_views_out(self) -> bool:
        """Whether there are views that it was not trained on."""
        return set(self.held_out_views.image_filenames).isdisjoint(self.training_views.image_filenames)

    def camera(self, pose: Float[Tensor, "r 4"], *, size: int = 0) -> Cameras:
        """A camera at a camera-to-world pose with the training cameras' field of view.

        Args:
            size: width of the picture in pixels; 0 is the training images'.
        """
        matrix = torch.as_tensor(check_pose(torch.as_tensor(pose).tolist(), "pose"), dtype=torch.float32)
        first = self.training_views.cameras[0]
        width, height = int(first.width), int(first.height)
        camera = Cameras(
            camera_to_worlds=matrix[None],
            fx=float(first.fx),
            fy=float(first.fy),
            cx=float(first.cx),
            cy=float(first.cy),
            width=width,
            height=height,
            camera_type=CameraType.PERSPECTIVE,
        )
        if size:
            camera.rescale_output_resolution(size / width, scale_rounding_mode="round")
            camera.height.clamp_(min=1)
        return camera

    def pose_from_input(self, pose: Float[Tensor, "r 4"]) -> Float[Tensor, "3 4"]:
        """A camera-to-world pose of the coordinates that the scene's files have, in those of the field.

        The run's dataparser_transforms.json has the same transform, as nerfstudio writes it.
        """
        matrix = check_pose(torch.as_tensor(pose).tolist(), "pose")
        return torch.from_numpy(self.training_views.metadata["world"].place(matrix[None])[0]).float()

    def render(
        self,
        pose: Float[Tensor, "r 4"],
        *,
        size: int = 0,
        chunk: int = 0,
        frame: Literal["field", "input"] = "field",
    ) -> Rendering:
        """Render a camera-to-world pose (3 or 4, 4): x right, y up, looking along -z.

        Args:
            pose: float64 where its coordinates are large.
            size: width of the picture in pixels; 0 is the training images'.
            chunk: rays at once; 0 is the run's own number.
            frame: whose coordinates it has: the field's, as `training_views.cameras` have, or those of the scene's
                files. They are the same for a Blender scene of the usual size.

        Raises:
            UserError: not a pose, or no memory for the chunk.
        """
        require_one_of("frame", frame, ("field", "input"))
        pose = self.pose_from_input(pose) if frame == "input" else pose
        return self.render_camera(self.camera(pose, size=size), chunk=chunk)

    def render_camera(self, camera: Cameras, *, chunk: int = 0) -> Rendering:
        """Render one camera (1,)."""
        model = self.model
        usual = model.config.eval_num_rays_per_chunk
        model.config.eval_num_rays_per_chunk = chunk or usual
        try:
            outputs = model.get_outputs_for_camera(camera.to(model.device))
        except RuntimeError as error:
            rays = chunk or usual
            if not is_out_of_memory(error):
                raise
            raise UserError(f"no memory for {rays} rays at once: use --chunk {max(1, rays // 4)}.") from error
        finally:
            model.config.eval_num_rays_per_chunk = usual
        rgb, depth, accumulation = (outputs[name].detach().cpu() for name in ("rgb", "depth", "accumulation"))
        return Rendering(rgb.clamp(0, 1), depth, accumulation.clamp(0, 1))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch says that a GPU or the machine has no memory left."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "can't allocate memory" in text


def find_run(path: Path) -> Path:
    """The directory of config.yml at or below `path`.

    Raises:
        UserError: none there, or several.
    """
    if path.is_file() and path.name == "config.yml":
        return path.parent
    if not path.exists():
        raise UserError(f"run {str(path)!r} does not exist: check the path.")
    if (path / "config.yml").is_file():
        return path
    found = sorted(f for depth in ("*", "*/*", "*/*/*") for f in path.glob(f"{depth}/config.yml"))
    if len(found) == 1:
        return found[0].parent
    if found:
        raise UserError(f"{str(path)!r} holds {len(found)} runs: give one of them, such as {str(found[-1].parent)!r}.")
    raise UserError(f"{str(path)!r} has no config.yml: give the directory of a run of dietnerf train or ns-train.")


def read_config(directory: Path) -> FewViewTrainerConfig:
    """The configuration of a run; nothing that its config.yml names is run.

    Raises:
        UserError: none there, damaged, of another method, or one that names what is no setting.
    """
    path = require_file(directory / "config.yml", "run's config")
    try:
        config = yaml.load(path.read_text("utf-8"), Loader=_ConfigLoader)
    except OSError:
        raise
    except Exception as error:  # yaml's own, and what its constructors come upon in a damaged file
        raise UserError(
            f"config.yml of {str(directory)!r} cannot be read ({reason_of(error)}): train it again."
        ) from error
    if not isinstance(config, FewViewTrainerConfig):
        raise UserError(f"{str(directory)!r} is no run of dietnerf: open it with the ns- commands.")
    return config


class _ConfigLoader(yaml.SafeLoader):
    """Plain values, tuples, paths, and of a few packages classes, members of enumerations and dataclasses.

    A dataclass is filled without its constructor, as pickle does; no function is found and none is called.
    """

    def find_class(self, name: str, node: yaml.Node) -> Any:
        module, _, attribute = name.rpartition(".")
        found = getattr(sys.modules.get(module), attribute, None)
        if not isinstance(found, type) or not f"{found.__module__}.".startswith(PACKAGES):
            raise yaml.MarkedYAMLError(problem=f"it names {name}, which is refused", problem_mark=node.start_mark)
        return found

    def read_class(self, name: str, node: yaml.Node) -> Any:
        return self.find_class(name, node)

    def read_member(self, name: str, node: yaml.SequenceNode) -> Any:
        kind = self.find_class(name, node)
        if not issubclass(kind, (Enum, PurePath)):
            raise yaml.MarkedYAMLError(problem=f"it calls {name}, which is refused", problem_mark=node.start_mark)
        return kind(*self.construct_sequence(node))

    def read_dataclass(self, name: str, node: yaml.MappingNode) -> Any:
        kind: type = self.find_class(name, node)
        if not is_dataclass(kind):
            raise yaml.MarkedYAMLError(problem=f"it makes {name}, which is refused", problem_mark=node.start_mark)
        made = kind.__new__(kind)
        vars(made).update(self.construct_mapping(node, deep=True))
        return made

    def read_tuple(self, node: yaml.SequenceNode) -> tuple[Any, ...]:
        return tuple(self.construct_sequence(node, deep=True))


_PYTHON = "tag:yaml.org,2002:python/"
_ConfigLoader.add_constructor(f"{_PYTHON}tuple", _ConfigLoader.read_tuple)
_ConfigLoader.add_multi_constructor(f"{_PYTHON}name:", _ConfigLoader.read_class)
_ConfigLoader.add_multi_constructor(f"{_PYTHON}object:", _ConfigLoader.read_dataclass)
_ConfigLoader.add_multi_constructor(f"{_PYTHON}object/apply:", _ConfigLoader.read_member)


def load_checkpoint(pipeline: FewViewPipeline, directory: Path) -> int:
    """Load the newest step-*.ckpt of `directory`; returns its step.

    Raises:
        UserError: none there, damaged, of another field, or with NaN or infinity.
    """
    found = sorted(directory.glob("step-*.ckpt"))
    if not found:
        raise UserError(f"{str(directory)!r} has no step-*.ckpt: the run has no checkpoint yet, train it first.")
    path = require_file(found[-1], "checkpoint")
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        weights, step = state["pipeline"], int(state["step"])
        if step < 0:
            raise ValueError(f"step {step}")
    except Exception as error:  # whatever unpickling a broken file comes upon
        raise UserError(f"checkpoint {str(path)!r} is damaged ({type(error).__name__}): copy it again.") from error
    try:
        pipeline.load_pipeline(weights, step)
    except Exception as error:  # torch's RuntimeError for other sizes, anything where no tensors are
        raise UserError(
            f"checkpoint {str(path)!r} is of another field than config.yml says ({reason_of(error)}): "
            f"keep the two together."
        ) from error
    require_finite(dict(pipeline.named_parameters()), f"checkpoint {str(path)!r}")
    return step
