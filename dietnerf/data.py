"""Scenes: posed photographs in any of the usual layouts, and the few of them that are trained on."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from nerfstudio.data.dataparsers.base_dataparser import DataParser, DataParserConfig, DataparserOutputs
from nerfstudio.data.dataparsers.nerfstudio_dataparser import MAX_AUTO_RESOLUTION
from nerfstudio.data.datasets.base_dataset import InputDataset
from nerfstudio.data.scene_box import SceneBox
from torch import Tensor

from common.checks import UserError, require_at_least
from common.images import ImageLimit, open_image
from dietnerf.bounds import Bounds, BoxConfig, chosen_box, few_inside, find_bounds
from dietnerf.captures import Capture, Frame, read_capture
from dietnerf.images import is_opaque, load_image, load_mask, read_size
from dietnerf.layouts import check_pose
from dietnerf.lenses import Size, build_cameras, fits, lens_size
from dietnerf.sparse import SparsePoints, read_points
from dietnerf.views import ViewsConfig, held_out, places_of, select_views
from dietnerf.world import World, object_world, other_convention, photographs_world

BLENDER_SIDE = 1.5
"""Of the box of NeRF's synthetic scenes, from the origin."""
BLENDER_PLANES = (2.0, 6.0)
"""Near and far of NeRF's synthetic scenes."""


@dataclass
class FewViewParserConfig(DataParserConfig, ViewsConfig, BoxConfig):
    """A Blender, nerfstudio, COLMAP or LLFF scene, of which few views are trained on."""

    _target: type = field(default_factory=lambda: FewViewParser)
    data: Path = Path("scene")
    """Directory of the scene, or the file in it that has the cameras."""
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


class FewViewOutputs(DataparserOutputs):
    """What `FewViewParser` finds; its transform is float64, since coordinates of a map have no room in float32."""

    def transform_poses_to_original_space(
        self, poses: Float[Tensor, "n 3 4"], camera_convention: Literal["opengl", "opencv"] = "opencv"
    ) -> Float[Tensor, "n 3 4"]:
        return super().transform_poses_to_original_space(poses.double(), camera_convention)


@dataclass
class FewViewParser(DataParser):
    """Reads a scene's cameras and the paths of its images; the training split holds the chosen views alone."""

    config: FewViewParserConfig
    _decided: str | None = None

    @property
    def _max_pixels(self) -> int:
        return ImageLimit(self.config.max_megapixels).max_pixels

    def _generate_dataparser_outputs(self, split: str = "train", **_: Any) -> DataparserOutputs:
        config = self.config
        require_at_least("image_size", config.image_size, 0)
        require_at_least("eval_every", config.eval_every, 1)
        capture = read_capture(Path(config.data), split, skip_missing=config.skip_missing)
        if config.hold_out:
            capture = held_out(capture, split, config.hold_out)
        poses, world = self._place(capture)
        if split == "train":
            self._check_convention(capture)
        ids = tuple(range(len(capture.ids)))
        if split == "train" or capture.from_training:
            images = [capture.frames[i].image for i in capture.ids]
            chosen = select_views(
                torch.from_numpy(poses[capture.ids]),
                number=config.num_views,
                ids=places_of(config.view_ids, images),
                order=config.view_order,
                seed=config.view_seed,
            )
            ids = chosen if split == "train" else tuple(i for i in ids if i not in chosen) or chosen
        if split != "train":
            ids = ids[:: config.eval_every]
        places = [capture.ids[i] for i in ids]
        frames = [capture.frames[i] for i in places]
        paths = [frame.image for frame in frames]
        for frame, pose in zip(frames, poses[places], strict=True):
            check_pose(pose, f"camera of {str(frame.image)!r}")
        measured = [self._measure(frame, capture.kind) for frame in frames]
        sizes = self._sizes([size for size, _ in measured])
        names = [f"{str(frame.image)!r} in {str(capture.file)!r}" for frame in frames]
        lenses = [frame.lens for frame in frames]
        cameras = build_cameras(
            torch.from_numpy(poses[places]).float(), lenses, [size for size, _ in measured], sizes, names
        )
        background = self._background(paths, split)
        self._decided = background if split == "train" else self._decided
        colour = {"white": torch.ones(3), "black": torch.zeros(3), "image": None}[background]
        bounds, points, unbounded = self._bounds(capture, poses, world, background, split)
        original = world.after(capture.applied, capture.applied_scale)
        return FewViewOutputs(
            image_filenames=paths,
            cameras=cameras,
            alpha_color=colour,
            mask_filenames=[frame.mask for frame in frames if frame.mask] or None,
            scene_box=SceneBox(aabb=torch.from_numpy(bounds.box).float()),
            dataparser_scale=original.scale,
            dataparser_transform=torch.from_numpy(original.transform),
            metadata={
                "view_ids": ids,
                "background": background,
                "kind": capture.kind,
                "size": sizes[0],
                "sizes": sizes,
                "upright": [turned for _, turned in measured],
                "max_pixels": self._max_pixels,
                "source": capture.source,
                "planes": bounds.planes,
                "unbounded": unbounded,
                "observed": [points.observed(place) for place in places] if points and points.seen else None,
                "world": original if capture.kind == "colmap" else world,
            },
        )

    def _place(self, capture: Capture) -> tuple[np.ndarray, World]:
        """Poses (n, 3, 4) of all frames in the field's coordinates."""
        known = np.stack([frame.pose for frame in capture.frames])
        factor = self.config.scale_factor
        if capture.kind != "blender":
            try:
                found = photographs_world(known, capture.orientation)
            except UserError as error:
                raise UserError(f"scene {str(self.config.data)!r}: {error}") from error
        elif factor == 1:
            found = object_world(known if capture.poses is None else capture.poses)
        else:
            found = World(np.eye(4)[:3], 1.0)
        world = World(found.transform, found.scale * factor)
        return world.place(known), world

    def _bounds(
        self, capture: Capture, poses: np.ndarray, world: World, background: str, split: str
    ) -> tuple[Bounds, SparsePoints | None, bool]:
        """Where the scene is, its sparse points in the field's units, and whether space outside its box is held too."""
        config = self.config
        photographs = capture.kind in ("nerfstudio", "colmap")
        unbounded = (
            photographs and background == "image" if config.contraction == "auto" else config.contraction == "on"
        )
        found = read_points(capture)
        points = None if found is None else found.placed(world)
        if capture.kind == "blender":
            bounds = Bounds(np.array([[-BLENDER_SIDE] * 3, [BLENDER_SIDE] * 3]), BLENDER_PLANES)
        elif capture.bounds:  # these scenes lie before the cameras, not between them
            near, far = 0.9 * capture.bounds[0] * world.scale, 1.1 * capture.bounds[1] * world.scale
            side = max(1.0, far)
            bounds = Bounds(np.array([[-side] * 3, [side] * 3]), (near, far))
        else:
            bounds = find_bounds(poses, points, unbounded=unbounded)
        bounds = chosen_box(bounds, config, points)
        if split == "train" and (wrong := few_inside(bounds)):
            print(f"warning: {wrong}", file=sys.stderr, flush=True)
        return bounds, points, unbounded

    def _check_convention(self, capture: Capture) -> None:
        """Poses of another convention: refused where no camera could see the object, else said."""
        cure = None
        if capture.kind in ("blender", "nerfstudio"):
            cure = other_convention(np.stack([frame.pose for frame in capture.frames]))
        if cure is None:
            return
        said = f"the cameras of {str(capture.file)!r} look away from the point that they have in common"
        if capture.kind == "blender":
            raise UserError(f"{said}: {cure}.")
        print(f"warning: {said}. If they were to look at it, {cure}.", file=sys.stderr, flush=True)

    def _measure(self, frame: Frame, kind: str) -> tuple[Size, bool]:
        """The size of a frame's image, and whether it is that of the image turned upright by its EXIF tag.

        It is turned where its camera has room for it so; COLMAP poses images as they lie in the file.
        """
        raw, upright = read_size(frame.image, max_pixels=self._max_pixels)
        camera = lens_size(frame.lens, repr(str(frame.image)))
        sizes = [(upright, True), (raw, False)]
        fitting = [one for one in sizes if camera is None or fits(one[0], camera)]
        if camera and not fitting:
            raise UserError(
                f"image {str(frame.image)!r} is {upright[0]}x{upright[1]} but its camera's w and h are "
                f"{camera[0]}x{camera[1]}: give it the camera of the whole image, without cropping or turning it."
            )
        size, turned = fitting[-1 if kind == "colmap" else 0]
        if frame.mask and read_size(frame.mask, "mask", max_pixels=self._max_pixels)[1] != size:
            raise UserError(
                f"mask {str(frame.mask)!r} has another size than its image: give it {size[0]}x{size[1]} pixels."
            )
        return size, turned

    def _sizes(self, images: Sequence[Size]) -> list[Size]:
        """To which size each image is averaged down."""
        wanted = self.config.image_size
        sides = [width for width, _ in images] if len(set(images)) == 1 else [max(size) for size in images]
        if wanted > max(sides):
            raise UserError(
                f"image_size is {wanted} but the images are {max(sides)} pixels wide: use at most {max(sides)}."
            )
        scales = [
            min(1.0, wanted / side if wanted else MAX_AUTO_RESOLUTION / max(image))
            for image, side in zip(images, sides, strict=True)
        ]
        return [
            (max(1, round(width * scale)), max(1, round(height * scale)))
            for (width, height), scale in zip(images, scales, strict=True)
        ]

    def _background(self, paths: Sequence[Path], split: str) -> str:
        """What is behind the scene, after a look at whether the images have alpha; the training views decide."""
        wanted: str = self.config.background
        if wanted == "auto" and split != "train":
            wanted = self._training_background()
        if wanted == "image":
            return wanted
        opaque: list[Path] = []
        cut_out: list[Path] = []
        for path in paths:
            with open_image(path, f"image {str(path)!r}", max_pixels=self._max_pixels) as image:
                (cut_out if image.has_transparency_data else opaque).append(path)
        if split == "train" and all(is_opaque(path, max_pixels=self._max_pixels) for path in cut_out):
            opaque, cut_out = list(paths), []  # alpha that hides nothing is none
        if wanted == "auto" and opaque and cut_out:
            raise UserError(
                f"image {str(opaque[0])!r} has no alpha but {str(cut_out[0])!r} has: cut it out as well, leave it out, "
                f"or use background image, which shows what is transparent as it lies in the file."
            )
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


class FewViewDataset(InputDataset):
    """The images that `FewViewParser` names: over the background, scaled by area, with their alpha."""

    exclude_batch_keys_from_device = ["image", "mask", "alpha"]

    def load(self, index: int) -> tuple[Float[Tensor, "h w 3"], Float[Tensor, "h w 1"] | None]:
        """Colour and alpha of one view."""
        meta = self._dataparser_outputs.metadata
        return load_image(
            self.image_filenames[index],
            meta["sizes"][index],
            meta["background"],
            upright=meta["upright"][index],
            max_pixels=meta["max_pixels"],
        )

    def mask(self, index: int) -> Bool[Tensor, "h w 1"] | None:
        """Which pixels of a view may be used; None: all."""
        names, meta = self._dataparser_outputs.mask_filenames, self._dataparser_outputs.metadata
        return load_mask(names[index], meta["sizes"][index], max_pixels=meta["max_pixels"]) if names else None

    def get_numpy_image(self, image_idx: int) -> np.ndarray:
        return self.get_image_uint8(image_idx).numpy()

    def get_image_float32(self, image_idx: int) -> Float[Tensor, "h w 3"]:
        return self.load(image_idx)[0]

    def get_image_uint8(self, image_idx: int) -> Tensor:
        return _eight_bit(self.load(image_idx)[0], None)

    def get_data(self, image_idx: int, image_type: Literal["uint8", "float32"] = "float32") -> dict[str, Any]:
        colour, alpha = self.load(image_idx)
        image = colour if image_type == "float32" else _eight_bit(colour, None)
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
    def observed(self) -> list[tuple[Float[Tensor, "_ 3"], Float[Tensor, " _"]]] | None:
        """Of each photograph the sparse points that it sees, in the field's units, and how much each counts; None: not
        known, or there are none."""
        found = self._dataparser_outputs.metadata["observed"]
        if found is None or not sum(len(positions) for positions, _ in found):
            return None
        return [(torch.from_numpy(where).float(), torch.from_numpy(counts).float()) for where, counts in found]

    @property
    def same_size(self) -> bool:
        """Whether all images have one size; else they fill the upper left of `images`, and `masks` says where."""
        return len(set(self._dataparser_outputs.metadata["sizes"])) == 1

    @cached_property
    def pixels(self) -> UInt8[Tensor, "n h w c"]:
        """All views in 8 bit, with alpha as a fourth channel where it is used; kept from the first use on."""
        return _stack([_eight_bit(*self.load(i)) for i in range(len(self))])

    @property
    def images(self) -> Float[Tensor, "n h w 3"]:
        """The colours of all views, recomputed from `pixels`."""
        return self.pixels[..., :3].float() / 255

    @cached_property
    def masks(self) -> Bool[Tensor, "n h w 1"] | None:
        """Which pixels of all views may be used; None: all."""
        found = [self.mask(i) for i in range(len(self))]
        if self.same_size and found[0] is None:
            return None
        sizes = self._dataparser_outputs.metadata["sizes"]
        whole = [torch.ones(height, width, 1, dtype=torch.bool) for width, height in sizes]
        return _stack([there if mask is None else mask for mask, there in zip(found, whole, strict=True)])

    @property
    def alphas(self) -> Float[Tensor, "n h w 1"]:
        """Their opacity; only for a scene whose images have alpha."""
        return self.pixels[..., 3:].float() / 255

    @property
    def squeezed(self) -> Float[Tensor, "n 3 h w"]:
        """All views at the first one's size, as an encoder may see them, which squeezes them anyway."""
        if self.same_size:
            return self.images.permute(0, 3, 1, 2)
        width, height = self._dataparser_outputs.metadata["size"]
        views = (self.load(i)[0].permute(2, 0, 1)[None] for i in range(len(self)))
        return torch.cat([torch.nn.functional.interpolate(view, (height, width), mode="area") for view in views])


def _eight_bit(colour: Float[Tensor, "h w 3"], alpha: Float[Tensor, "h w 1"] | None) -> UInt8[Tensor, "h w c"]:
    return ((colour if alpha is None else torch.cat((colour, alpha), dim=-1)) * 255 + 0.5).to(torch.uint8)


def _stack(images: Sequence[Tensor]) -> Tensor:
    """Images (h, w, c) in the upper left of (n, most h, most w, c), with zeros in the rest."""
    height, width = (max(image.shape[axis] for image in images) for axis in (0, 1))
    found = images[0].new_zeros(len(images), height, width, images[0].shape[-1])
    for place, image in zip(found, images, strict=True):
        place[: image.shape[0], : image.shape[1]] = image
    return found
