"""Scenes: posed photographs in any of the usual layouts, and the few of them that are trained on."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from nerfstudio.cameras.camera_utils import auto_orient_and_center_poses
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.data.dataparsers.base_dataparser import DataParser, DataParserConfig, DataparserOutputs
from nerfstudio.data.dataparsers.colmap_dataparser import ColmapDataParserConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.data.datasets.base_dataset import InputDataset
from nerfstudio.data.scene_box import SceneBox
from torch import Tensor

from common.checks import UserError, require_at_least, require_file, require_one_of
from common.images import ImageLimit, open_image
from dietnerf.images import IMAGE_SUFFIXES, find_image, is_opaque, load_image, load_mask, require_same_size
from dietnerf.layouts import check_pose, colmap_model, read_frames, scene_kind

PAPER_VIEWS = (26, 86, 2, 55, 75, 93, 16, 73)
"""The eight training views of DietNeRF's Blender protocol (Jain et al. 2021, appendix)."""

BLENDER_PLANES = (2.0, 6.0)
"""Near and far of NeRF's synthetic scenes."""
UNBOUNDED_PLANES = (0.05, 4.0)
"""Near and far of scenes whose cameras nerfstudio's parsers scale into [-1, 1]."""
OTHER_SPLIT = {"test": "val", "val": "test"}
"""Held-out views that stand in for those that a scene lacks."""


@dataclass(frozen=True)
class Protocol:
    """A named way to train and score, so that numbers can be compared."""

    view_ids: tuple[int, ...]
    """Training views; empty leaves the choice to the command."""
    image_size: int
    """Width of the images in pixels, by area averaging; 0 keeps theirs."""
    eval_every: int
    """Every how manieth held-out view is scored."""


PROTOCOLS = {"paper": Protocol(PAPER_VIEWS, 400, 8), "standard": Protocol((), 0, 1)}


def select_views(
    positions: Float[Tensor, "n 3"],
    *,
    number: int = 0,
    ids: Sequence[int] = (),
    order: str = "farthest",
    seed: int = 0,
) -> tuple[int, ...]:
    """Ids of the views to train on.

    Args:
        positions: of all cameras.
        number: how many; 0 takes all.
        ids: exactly these; then `number` must be 0 or their count.
        order: "farthest" (each next camera is the one farthest from those chosen, from the first on), "first", or
            "random" by `seed`.

    Raises:
        UserError: more views than there are, ids that do not exist or occur twice, or fewer than two views.
    """
    total = len(positions)
    if ids:
        outside = [i for i in ids if not 0 <= i < total]
        if outside:
            raise UserError(f"view id {outside[0]} is out of range: this scene has training views 0 to {total - 1}.")
        if len(set(ids)) < len(ids):
            raise UserError(f"view ids {tuple(ids)} name a view twice: name each once.")
        if number not in (0, len(ids)):
            raise UserError(f"num_views is {number} but {len(ids)} view ids are given: leave one of them out.")
        chosen = list(ids)
    elif number == 0:
        chosen = list(range(total))
    else:
        if not 0 < number <= total:
            raise UserError(f"num_views is {number}: this scene has {total} training views.")
        require_one_of("view_order", order, ("farthest", "first", "random"))
        if order == "first":
            chosen = list(range(number))
        elif order == "random":
            chosen = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:number].tolist()
        else:
            chosen = [0]
            nearest = (positions - positions[0]).norm(dim=-1)
            while len(chosen) < number:
                chosen.append(int(nearest.argmax()))
                nearest = torch.minimum(nearest, (positions - positions[chosen[-1]]).norm(dim=-1))
    if len(chosen) < 2:
        raise UserError("the scene has one training view: novel views need at least 2.")
    return tuple(chosen)


@dataclass
class ViewsConfig:
    """Views that are trained on."""

    num_views: int = 0
    """Training views; 0 takes all."""
    view_ids: tuple[int, ...] = ()
    """Exactly these training views, by their place in the training split."""
    view_order: Literal["farthest", "first", "random"] = "farthest"
    """How num_views are chosen: far from each other, the first ones, or by chance."""
    image_size: int = 0
    """Width of the images in pixels, averaged down by area; 0 keeps theirs."""


@dataclass
class FewViewParserConfig(DataParserConfig, ViewsConfig):
    """A Blender, nerfstudio, COLMAP or LLFF scene, of which few views are trained on."""

    _target: type = field(default_factory=lambda: FewViewParser)
    data: Path = Path("scene")
    """Directory of the scene, or its transforms.json."""
    view_seed: int = 0
    """Seed of view_order random."""
    background: Literal["auto", "white", "black", "image"] = "auto"
    """What is behind transparent pixels; image leaves photographs as they are; auto is white where there is alpha."""
    eval_every: int = 1
    """Every how manieth held-out view is scored."""
    scale_factor: float = 1.0
    """Factor on the cameras' positions."""
    max_megapixels: float = ImageLimit.max_megapixels
    """Largest image that is read, in millions of pixels."""


@dataclass
class FewViewParser(DataParser):
    """Reads a scene's cameras and the paths of its images; the training split holds the chosen views alone."""

    config: FewViewParserConfig
    _decided: str | None = None

    @property
    def _max_pixels(self) -> int:
        return ImageLimit(self.config.max_megapixels).max_pixels

    def _generate_dataparser_outputs(self, split: str = "train", **_: Any) -> DataparserOutputs:
        require_at_least("image_size", self.config.image_size, 0)
        require_at_least("eval_every", self.config.eval_every, 1)
        kind = scene_kind(Path(self.config.data))
        found = {
            "blender": self._blender,
            "nerfstudio": self._nerfstudio,
            "colmap": self._colmap,
            "llff": self._llff,
        }[kind](split)
        cameras, paths = found.cameras, list(found.image_filenames)
        if not paths:
            raise UserError(f"scene {str(self.config.data)!r} has no {split} views: give it some.")
        ids = tuple(range(len(paths)))
        if split == "train" or found.metadata.get("from_training"):
            chosen = select_views(
                cameras.camera_to_worlds[:, :3, 3],
                number=self.config.num_views,
                ids=self.config.view_ids,
                order=self.config.view_order,
                seed=self.config.view_seed,
            )
            ids = chosen if split == "train" else tuple(i for i in ids if i not in chosen) or chosen
        if split != "train":
            ids = ids[:: self.config.eval_every]
        paths = [paths[i] for i in ids]
        cameras = cameras[torch.tensor(ids)]
        width, height = require_same_size(paths, max_pixels=self._max_pixels)
        for i in range(len(cameras)):
            check_pose(cameras.camera_to_worlds[i].tolist(), f"camera of {str(paths[i])!r}")
        masks = [found.mask_filenames[i] for i in ids] if found.mask_filenames else None
        if masks and require_same_size(masks, "mask", max_pixels=self._max_pixels) != (width, height):
            raise UserError(f"mask {str(masks[0])!r} has another size than its image: give it {width}x{height} pixels.")
        size = self._size(width, height)
        _fit_cameras(cameras, paths[0], (width, height), size)
        background = self._background(paths, split)
        self._decided = background if split == "train" else self._decided
        colour = {"white": torch.ones(3), "black": torch.zeros(3), "image": None}[background]
        return DataparserOutputs(
            image_filenames=paths,
            cameras=cameras,
            alpha_color=colour,
            mask_filenames=masks,
            scene_box=found.scene_box,
            dataparser_scale=found.dataparser_scale,
            dataparser_transform=found.dataparser_transform,
            metadata={
                "view_ids": ids,
                "background": background,
                "kind": kind,
                "size": size,
                "max_pixels": self._max_pixels,
                "source": found.metadata.get("source", split),
                "planes": found.metadata.get("planes", BLENDER_PLANES if kind == "blender" else UNBOUNDED_PLANES),
            },
        )

    def _size(self, width: int, height: int) -> tuple[int, int]:
        wanted = self.config.image_size
        if wanted > width:
            raise UserError(f"image_size is {wanted} but the images are {width} pixels wide: use at most {width}.")
        if not wanted or wanted == width:
            return width, height
        return wanted, max(1, round(height * wanted / width))

    def _background(self, paths: Sequence[Path], split: str) -> str:
        """What is behind the scene, after a look at whether the images have alpha; the training views decide."""
        wanted: str = self.config.background
        if wanted == "auto" and split != "train":
            wanted = self._training_background()
        if wanted == "image":
            return wanted
        opaque = []
        for path in paths:
            with open_image(path, f"image {str(path)!r}", max_pixels=self._max_pixels) as image:
                if not image.has_transparency_data:
                    opaque.append(path)
        if split == "train" and not opaque and all(is_opaque(path, max_pixels=self._max_pixels) for path in paths):
            opaque = list(paths)
        if wanted == "auto":
            return "image" if opaque else "white"
        if opaque:
            raise UserError(
                f"background is {wanted!r} but image {str(opaque[0])!r} has no alpha or nothing transparent: use "
                f"background image, or images with a transparent background."
            )
        return wanted

    def _training_background(self) -> str:
        if self._decided is None:
            self._decided = self.get_dataparser_outputs("train").metadata["background"]
        return self._decided

    def _blender(self, split: str) -> DataparserOutputs:
        directory = Path(self.config.data)
        path = directory / f"transforms_{split}.json"
        from_training = False
        if not path.is_file() and split != "train":  # a scene may come with one held-out split only
            path = directory / f"transforms_{OTHER_SPLIT[split]}.json"
            if from_training := not path.is_file():
                path = directory / "transforms_train.json"
        meta = read_frames(path)
        angle = meta.get("camera_angle_x")
        if not isinstance(angle, (int, float)) or not 0 < angle < math.pi:
            raise UserError(f"camera_angle_x of {str(path)!r} is {angle!r}: give the horizontal angle in radians.")
        paths = [find_image(directory, frame["file_path"]) for frame in meta["frames"]]
        poses = np.stack([check_pose(frame["transform_matrix"], "frame") for frame in meta["frames"]])
        poses[:, :, 3] *= self.config.scale_factor
        width, height = require_same_size(paths[:1], max_pixels=self._max_pixels)
        focal = 0.5 * width / math.tan(0.5 * angle)
        return DataparserOutputs(
            image_filenames=paths,
            cameras=_cameras(torch.from_numpy(poses).float(), focal, width, height),
            scene_box=SceneBox(aabb=torch.tensor([[-1.5] * 3, [1.5] * 3])),
            dataparser_scale=self.config.scale_factor,
            metadata={"source": path.name, "from_training": from_training},
        )

    def _nerfstudio(self, split: str) -> DataparserOutputs:
        path = Path(self.config.data)
        file = path if path.is_file() else path / "transforms.json"
        meta = read_frames(file)
        for frame in meta["frames"]:
            find_image(file.parent, frame["file_path"])
        if "fisheye_crop_radius" in meta and "FISHEYE" in str(meta.get("camera_model")):
            raise UserError(
                f"transforms file {str(file)!r} has fisheye_crop_radius {meta['fisheye_crop_radius']}, which cannot be "
                f"used: undistort the photographs, or leave it out to train on whole images."
            )
        parser = NerfstudioDataParserConfig(data=path, scale_factor=self.config.scale_factor, downscale_factor=1)
        return self._through(parser, split)

    def _colmap(self, split: str) -> DataparserOutputs:
        place = colmap_model(Path(self.config.data))
        assert place is not None
        parser = ColmapDataParserConfig(
            data=Path(self.config.data),
            colmap_path=place,
            scale_factor=self.config.scale_factor,
            downscale_factor=1,
            load_3D_points=False,
        )
        return self._through(parser, split)

    def _through(self, parser: DataParserConfig, split: str) -> DataparserOutputs:
        """What nerfstudio's own parser reads, its failures as one line.

        A scene may list one held-out split only, or have too few images to hold any out.
        """
        try:
            for name in ("train",) if split == "train" else (split, OTHER_SPLIT[split], "train"):
                try:
                    found = parser.setup().get_dataparser_outputs(name)
                except RuntimeError as error:
                    if name == "train" or "list of filenames" not in str(error):
                        raise
                    continue
                if found.image_filenames:
                    break
            found.metadata = {"source": name, "from_training": name == "train"}
            return found
        except ArithmeticError as error:
            raise UserError(
                f"scene {str(self.config.data)!r} cannot be read ({error}): its cameras all stand at one place, or a "
                f"number is out of range; check the camera matrices."
            ) from error
        except (
            AssertionError, AttributeError, RuntimeError, ValueError, KeyError, IndexError, TypeError, EOFError,
            struct.error,
        ) as error:  # fmt: skip
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"scene {str(self.config.data)!r} cannot be read: {reason}") from error

    def _llff(self, split: str) -> DataparserOutputs:
        directory = Path(self.config.data)
        path = require_file(directory / "poses_bounds.npy", "poses file")
        try:
            table = np.asarray(np.load(path), dtype=np.float64)
        except Exception as error:  # numpy reads the head as Python, which has errors of its own
            reason = " ".join(str(error).split())[:150]
            raise UserError(f"poses file {str(path)!r} cannot be read ({reason}): write it again.") from error
        if table.ndim != 2 or table.shape[1] != 17 or not np.isfinite(table).all():
            raise UserError(
                f"poses file of {str(directory)!r} has shape {table.shape}: give (images, 17), without NaN."
            )
        paths = sorted(p for p in (directory / "images").glob("*") if p.suffix in IMAGE_SUFFIXES)
        if len(paths) != len(table):
            raise UserError(f"{str(directory)!r} has {len(paths)} images for {len(table)} poses: make them match.")
        raw = table[:, :15].reshape(-1, 3, 5)
        rotation = np.stack((raw[..., 1], -raw[..., 0], raw[..., 2]), axis=-1)  # down, right, back -> right, up, back
        poses = np.concatenate((rotation, raw[..., 3:4]), axis=-1)
        for i in range(len(poses)):
            check_pose(poses[i], f"pose {i} of {str(directory)!r}")
        oriented, transform = auto_orient_and_center_poses(
            torch.from_numpy(np.concatenate((poses, np.tile([[[0, 0, 0, 1]]], (len(poses), 1, 1))), axis=1)).float(),
            method="up",
            center_method="poses",
        )
        scale = self.config.scale_factor / float(oriented[:, :3, 3].abs().max().clamp(min=1e-9))
        oriented[:, :3, 3] *= scale
        width, height = require_same_size(paths, max_pixels=self._max_pixels)
        held_out = np.arange(0, len(paths), 8)
        chosen = np.setdiff1d(np.arange(len(paths)), held_out) if split == "train" else held_out
        factor = width / float(raw[0, 1, 4])
        near, far = (float(v) * scale for v in (0.9 * table[:, 15].min(), 1.1 * table[:, 16].max()))
        side = max(1.0, far)  # these scenes lie before the cameras, not between them
        return DataparserOutputs(
            image_filenames=[paths[i] for i in chosen],
            cameras=_cameras(oriented[chosen, :3], float(raw[0, 2, 4]) * factor, width, height),
            scene_box=SceneBox(aabb=torch.tensor([[-side] * 3, [side] * 3])),
            dataparser_scale=scale,
            dataparser_transform=transform,
            metadata={"planes": (near, far)},
        )


def _cameras(poses: Float[Tensor, "n 3 4"], focal: float, width: int, height: int) -> Cameras:
    return Cameras(
        camera_to_worlds=poses,
        fx=focal,
        fy=focal,
        cx=width / 2,
        cy=height / 2,
        width=width,
        height=height,
        camera_type=CameraType.PERSPECTIVE,
    )


def _fit_cameras(cameras: Cameras, path: Path, images: tuple[int, int], size: tuple[int, int]) -> None:
    """Scale cameras to images of `size`; they may have been estimated on larger ones than those of size `images`.

    Raises:
        UserError: on ones of another shape than `images`, of which `path` is one.
    """
    width, height = cameras.width.double(), cameras.height.double()
    off = torch.minimum((height * images[0] / width - images[1]).abs(), (width * images[1] / height - images[0]).abs())
    if float(off.max()) > 1:  # one side may have been rounded
        theirs = f"{int(width[off.argmax()])}x{int(height[off.argmax()])}"
        raise UserError(
            f"image {str(path)!r} is {images[0]}x{images[1]} but its camera's w and h are {theirs}: give it the camera "
            f"of the whole image, without cropping or turning it."
        )
    across, down = (size[0] / width).to(cameras.fx), (size[1] / height).to(cameras.fy)
    cameras.fx, cameras.cx = cameras.fx * across, cameras.cx * across
    cameras.fy, cameras.cy = cameras.fy * down, cameras.cy * down
    cameras.width = torch.full_like(cameras.fx, size[0]).long()
    cameras.height = torch.full_like(cameras.fy, size[1]).long()


class FewViewDataset(InputDataset):
    """The images that `FewViewParser` names: over the background, scaled by area, with their alpha."""

    exclude_batch_keys_from_device = ["image", "mask", "alpha"]

    def load(self, index: int) -> tuple[Float[Tensor, "h w 3"], Float[Tensor, "h w 1"] | None]:
        """Colour and alpha of one view."""
        meta = self._dataparser_outputs.metadata
        return load_image(self.image_filenames[index], meta["size"], meta["background"], max_pixels=meta["max_pixels"])

    def mask(self, index: int) -> Bool[Tensor, "h w 1"] | None:
        """Which pixels of a view may be used; None: all."""
        names, meta = self._dataparser_outputs.mask_filenames, self._dataparser_outputs.metadata
        return load_mask(names[index], meta["size"], max_pixels=meta["max_pixels"]) if names else None

    def get_image_float32(self, image_idx: int) -> Float[Tensor, "h w 3"]:
        return self.load(image_idx)[0]

    def get_image_uint8(self, image_idx: int) -> Tensor:
        return (self.load(image_idx)[0] * 255 + 0.5).to(torch.uint8)

    def get_data(self, image_idx: int, image_type: Literal["uint8", "float32"] = "float32") -> dict[str, Any]:
        colour, alpha = self.load(image_idx)
        image = colour if image_type == "float32" else (colour * 255 + 0.5).to(torch.uint8)
        found = {"image": image, "alpha": alpha, "mask": self.mask(image_idx)}
        return {"image_idx": image_idx} | {name: value for name, value in found.items() if value is not None}

    @property
    def view_ids(self) -> tuple[int, ...]:
        """Where each view stands in its split of the scene."""
        return self._dataparser_outputs.metadata["view_ids"]

    @property
    def source(self) -> str:
        """The split or file that the views come from: a scene without held-out views has those that were not chosen of
        its training views, or the chosen ones where there are no others."""
        return self._dataparser_outputs.metadata["source"]

    @property
    def background(self) -> str:
        """white, black or image."""
        return self._dataparser_outputs.metadata["background"]

    @property
    def has_alpha(self) -> bool:
        """Whether the images have alpha, and it is used."""
        return self.background != "image"

    @cached_property
    def images(self) -> Float[Tensor, "n h w 3"]:
        """All views, kept from the first use on."""
        return torch.stack([self.load(i)[0] for i in range(len(self))])

    @cached_property
    def masks(self) -> Bool[Tensor, "n h w 1"] | None:
        """Which pixels of all views may be used; None: all."""
        found = [mask for i in range(len(self)) if (mask := self.mask(i)) is not None]
        return torch.stack(found) if found else None

    @cached_property
    def alphas(self) -> Float[Tensor, "n h w 1"]:
        """Their opacity; only for a scene whose images have alpha."""
        found = [self.load(i)[1] for i in range(len(self))]
        return torch.stack([alpha for alpha in found if alpha is not None])
