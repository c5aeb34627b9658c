"""Rays of the training views: each step's own, drawn from (seed, rank, step) alone, as nerfstudio's DataManager."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from jaxtyping import Bool, Float, Int, Shaped, UInt8
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.cameras.rays import RayBundle
from nerfstudio.data.datamanagers.base_datamanager import DataManager, VanillaDataManagerConfig
from nerfstudio.data.utils.dataloaders import FixedIndicesEvalDataloader, RandIndicesEvalDataloader
from torch import Tensor

from common.checks import UserError, require_at_least
from dietnerf.data import FewViewDataset, FewViewParserConfig
from dietnerf.losses import PointRays

PATCH = 8
"""Side of a patch for the depth smoothness, in pixels."""
POINT_SHARE = 1 / 8
"""Rays to sparse points, as a share of a step's."""
REDRAWS = 32
"""Times that pixels which a mask hides are drawn again, before what it leaves is listed."""
CACHED_PIXELS = 2**24
"""Rays of at most as many training pixels are kept in memory; those of more are made when drawn."""


@dataclass
class FewViewDataManagerConfig(VanillaDataManagerConfig):
    """Rays of few views: drawn from one image or all a step, from their centre at first.

    `ns-render` asks for a VanillaDataManagerConfig; what only its own loaders read is kept out of the command line.
    """

    _target: type = field(default_factory=lambda: FewViewDataManager)
    masks_on_gpu: tyro.conf.Suppress[bool] = False
    images_on_gpu: tyro.conf.Suppress[bool] = False
    train_num_images_to_sample_from: tyro.conf.Suppress[int] = -1
    train_num_times_to_repeat_images: tyro.conf.Suppress[int] = -1
    eval_num_images_to_sample_from: tyro.conf.Suppress[int] = -1
    eval_num_times_to_repeat_images: tyro.conf.Suppress[int] = -1
    eval_image_indices: tyro.conf.Suppress[tuple[int, ...] | None] = None
    collate_fn: tyro.conf.Suppress[Any] = None
    camera_res_scale_factor: tyro.conf.Suppress[float] = 1.0
    patch_size: tyro.conf.Suppress[int] = 1
    pixel_sampler: tyro.conf.Suppress[Any] = None
    dataparser: FewViewParserConfig = field(default_factory=FewViewParserConfig)
    """The scene and the views of it that are trained on."""
    train_num_rays_per_batch: int = 1024
    """Rays a step."""
    eval_num_rays_per_batch: int = 1024
    """Rays of a step's evaluation."""
    rays_from: Literal["one", "all"] = "one"
    """Draw a step's rays from one image (the paper), or from all."""
    crop_steps: int = 500
    """Steps at the start that draw from the centre of the images alone."""
    crop_fraction: float = 0.5
    """Share of the width and height that this centre has."""
    pyramid: tuple[int, ...] = ()
    """Factors by which the images are smaller at first, such as 4 2 (a last stage of 1 follows)."""
    pyramid_steps: tuple[int, ...] = ()
    """Steps at which each stage of the pyramid ends."""
    seed: int = 0
    """Seed of the rays."""


class FewViewDataManager(DataManager):
    """Gives each step's rays and colours as a function of (seed, rank, step) alone, so that a run resumes exactly."""

    config: FewViewDataManagerConfig
    train_dataset: FewViewDataset
    eval_dataset: FewViewDataset

    def __init__(
        self,
        config: FewViewDataManagerConfig,
        device: torch.device | str = "cpu",
        test_mode: Literal["test", "val", "inference"] = "val",
        world_size: int = 1,
        local_rank: int = 0,
        **kwargs: Any,
    ) -> None:
        self.config, self.device, self.test_mode = config, torch.device(device), test_mode
        self.with_alpha = False
        self.world_size, self.local_rank = world_size, local_rank
        require_at_least("train_num_rays_per_batch", config.train_num_rays_per_batch, 1)
        if not 0 < config.crop_fraction <= 1:
            raise UserError(f"crop_fraction is {config.crop_fraction}: use a share above 0 and up to 1.")
        if len(config.pyramid) != len(config.pyramid_steps):
            raise UserError(
                f"pyramid has {len(config.pyramid)} stages but pyramid_steps {len(config.pyramid_steps)}: give an end "
                f"for each."
            )
        if config.data is not None:
            config.dataparser.data = Path(config.data)
        else:
            config.data = config.dataparser.data
        self.test_split = "val" if test_mode == "val" else "test"
        self.dataparser = config.dataparser.setup()
        self.train_dataparser_outputs = self.dataparser.get_dataparser_outputs(split="train")
        self.train_dataset = self.create_train_dataset()
        self.eval_dataset = self.create_eval_dataset()
        self._stages: dict[int, tuple[Tensor, Tensor | None, RayBundle | None, Cameras]] = {}
        super().__init__()

    def create_train_dataset(self) -> FewViewDataset:
        """The views that are trained on."""
        return FewViewDataset(self.train_dataparser_outputs)

    def create_eval_dataset(self) -> FewViewDataset:
        """The held-out views."""
        return FewViewDataset(self.dataparser.get_dataparser_outputs(split=self.test_split))

    def setup_train(self) -> None:
        """Nothing: a stage's rays are made when its first step comes."""

    def setup_eval(self) -> None:
        """Loaders of the held-out views, as nerfstudio's pipeline and scripts ask for them."""
        self.fixed_indices_eval_dataloader = FixedIndicesEvalDataloader(
            input_dataset=self.eval_dataset, device=self.device, num_workers=0
        )
        self.eval_dataloader = RandIndicesEvalDataloader(
            input_dataset=self.eval_dataset, device=self.device, num_workers=0
        )

    def factor(self, step: int) -> int:
        """How many times smaller the images are at `step`."""
        for factor, end in zip(self.config.pyramid, self.config.pyramid_steps, strict=True):
            if step < end:
                return factor
        return 1

    def next_train(self, step: int) -> tuple[RayBundle, dict[str, Tensor]]:
        """Rays (r,) and a batch with `image` (r, 3), `indices` (r, 3): image, row, column, and, where `with_alpha` is
        set, `alpha` (r, 1)."""
        self.train_count += 1
        return self.draw(step, self.local_rank)

    def draw(self, step: int, rank: int) -> tuple[RayBundle, dict[str, Tensor]]:
        """What `next_train` gives the process of this rank."""
        images, masks, bundle, cameras = self._stage(self.factor(step))
        generator = torch.Generator().manual_seed(
            int(np.random.SeedSequence((self.config.seed, rank, step)).generate_state(1, np.uint64)[0] >> 1)
        )
        indices = draw_pixels(
            *images.shape[:3],
            number=self.config.train_num_rays_per_batch,
            one_image=self.config.rays_from == "one",
            crop=self.config.crop_fraction if step < self.config.crop_steps else 1.0,
            masks=masks,
            generator=generator,
        ).to(self.device)
        view, row, column = indices.unbind(-1)
        if bundle is not None:
            rays = bundle[view, row, column]
        else:
            coordinates = torch.stack((row, column), dim=-1) + 0.5
            rays = cameras.generate_rays(camera_indices=view[:, None], coords=coordinates)
        values = images[view, row, column]
        values = values if values.is_floating_point() else values.float() / 255
        colour, alpha = values.split((3, values.shape[-1] - 3), dim=-1)
        return rays, {"image": colour, "indices": indices} | ({"alpha": alpha} if self.with_alpha else {})

    def draw_points(self, step: int, rank: int) -> PointRays | None:
        """Rays to sparse points, an eighth as many as a step has; None where no photograph is known to see one.

        A random photograph's random point each, so that photographs that see few are not forgotten.
        """
        if (observed := self.train_dataset.observed) is None:
            return None
        generator = torch.Generator().manual_seed(
            int(np.random.SeedSequence((self.config.seed, rank, step, 1)).generate_state(1, np.uint64)[0] >> 1)
        )
        number = max(1, round(POINT_SHARE * self.config.train_num_rays_per_batch))
        filled = torch.tensor([view for view, (positions, _) in enumerate(observed) if len(positions)])
        view = filled[torch.randint(len(filled), (number,), generator=generator)]
        counts = torch.tensor([len(positions) for positions, _ in observed])
        place = (torch.rand(number, generator=generator) * counts[view]).long()
        place = torch.minimum(place, counts[view] - 1) + (counts.cumsum(0) - counts)[view]
        targets = torch.cat([positions for positions, _ in observed])[place]
        confidence = torch.cat([one for _, one in observed])[place]
        origins = self.train_dataset.cameras.camera_to_worlds.cpu()[view, :, 3]
        depth = (targets - origins).norm(dim=-1)
        rays = RayBundle(
            origins=origins,
            directions=(targets - origins) / depth[:, None].clamp(min=1e-9),
            pixel_area=torch.ones(number, 1),
            camera_indices=view[:, None],
        )
        return PointRays(rays.to(self.device), depth.to(self.device), confidence.to(self.device))

    def next_eval(self, step: int) -> tuple[RayBundle, dict[str, Tensor]]:
        """Rays of one held-out view, with their colours."""
        self.eval_count += 1
        index = step % len(self.eval_dataset)
        image, mask = self.eval_dataset.load(index)[0].to(self.device), self.eval_dataset.mask(index)
        indices = draw_pixels(
            1,
            *image.shape[:2],
            number=self.config.eval_num_rays_per_batch,
            masks=None if mask is None else mask[None],
            generator=torch.Generator().manual_seed(step),
        ).to(self.device)
        _, row, column = indices.unbind(-1)
        rays = self.eval_dataset.cameras.to(self.device).generate_rays(
            camera_indices=torch.full_like(row, index)[:, None], coords=torch.stack((row, column), dim=-1) + 0.5
        )
        return rays, {"image": image[row, column], "indices": indices}

    def next_eval_image(self, step: int) -> tuple[Cameras, dict[str, Any]]:
        """One held-out view, in turn."""
        return self.fixed_indices_eval_dataloader.get_camera(step % len(self.eval_dataset))

    def get_train_rays_per_batch(self) -> int:
        return self.config.train_num_rays_per_batch

    def get_eval_rays_per_batch(self) -> int:
        return self.config.eval_num_rays_per_batch

    def get_datapath(self) -> Path:
        return Path(self.config.dataparser.data)

    def get_param_groups(self) -> dict[str, list[torch.nn.Parameter]]:
        return {}

    def _stage(
        self, factor: int
    ) -> tuple[Shaped[Tensor, "n h w c"], Bool[Tensor, "n h w 1"] | None, RayBundle | None, Cameras]:
        """Images (8 bit at full size, else float; with alpha as a fourth channel where it is asked for), masks, rays
        (n, h, w) and cameras of a stage of the pyramid; only the last one is kept."""
        if factor not in self._stages:
            images, cameras = self.train_dataset.pixels, self.train_dataset.cameras.to("cpu")
            masks = self.train_dataset.masks
            if not self.with_alpha:
                images = images[..., :3]
            if factor > 1:
                images = torch.stack([mean_of_blocks(image, factor) for image in images])
                if masks is not None:
                    share = torch.nn.functional.avg_pool2d(masks[..., 0].float(), factor)[..., None]
                    masks = share > 0.999 * share.amax(dim=(1, 2), keepdim=True)
                cameras = shrink(cameras, factor)
            cameras = cameras.to(self.device)
            bundle = None
            if images[..., 0].numel() <= CACHED_PIXELS:
                bundle = join_rays([all_rays(cameras, i, *images.shape[1:3]) for i in range(len(images))])
            self._stages = {factor: (images.to(self.device), masks, bundle, cameras)}
        return self._stages[factor]


def mean_of_blocks(image: UInt8[Tensor, "h w c"], factor: int) -> Float[Tensor, "rows columns c"]:
    """An image in [0, 1], `factor` times smaller, with the rest of each side cut off."""
    channels_first = image.permute(2, 0, 1)[None].float() / 255
    return torch.nn.functional.avg_pool2d(channels_first, factor)[0].permute(1, 2, 0).contiguous()


def shrink(cameras: Cameras, factor: int) -> Cameras:
    """Cameras whose images are `factor` times smaller, with the rest of each side cut off."""
    return Cameras(
        camera_to_worlds=cameras.camera_to_worlds,
        fx=cameras.fx / factor,
        fy=cameras.fy / factor,
        cx=cameras.cx / factor,
        cy=cameras.cy / factor,
        width=cameras.width // factor,
        height=cameras.height // factor,
        distortion_params=cameras.distortion_params,
        camera_type=cameras.camera_type,
    )


def all_rays(cameras: Cameras, index: int, height: int, width: int) -> RayBundle:
    """Rays (height, width) of one camera; beyond its image they go on as if it were larger."""
    lines = (torch.arange(side, device=cameras.device) + 0.5 for side in (height, width))
    coordinates = torch.stack(torch.meshgrid(*lines, indexing="ij"), dim=-1)
    views = torch.full((height, width, 1), index, device=cameras.device)
    return cameras.generate_rays(camera_indices=views, coords=coordinates)


def join_rays(bundles: Sequence[RayBundle]) -> RayBundle:
    """Bundles (h, w) of several cameras as one (n, h, w)."""

    def stack(name: str) -> Any:
        values = [getattr(bundle, name) for bundle in bundles]
        return None if values[0] is None else torch.stack(values)

    metadata = {key: torch.stack([bundle.metadata[key] for bundle in bundles]) for key in bundles[0].metadata}
    names = ("origins", "directions", "pixel_area", "camera_indices", "nears", "fars", "times")
    return RayBundle(**{name: stack(name) for name in names}, metadata=metadata)


def patch_rays(cameras: Cameras, poses: Float[Tensor, "n 3 4"], generator: torch.Generator | None = None) -> RayBundle:
    """Rays (n, PATCH, PATCH) of a random patch of neighbouring pixels at each pose, seen as by the first camera."""
    number, first = len(poses), cameras[0]
    seen = Cameras(
        camera_to_worlds=poses.to(cameras.camera_to_worlds),
        fx=float(first.fx),
        fy=float(first.fy),
        cx=float(first.cx),
        cy=float(first.cy),
        width=int(first.width),
        height=int(first.height),
        camera_type=cameras.camera_type.flatten()[:1],
    )
    places = [max(1, int(side) - PATCH + 1) for side in (first.height, first.width)]
    corner = torch.stack([torch.randint(count, (number,), generator=generator) for count in places], dim=-1)
    line = torch.arange(PATCH)
    offsets = torch.stack(torch.meshgrid(line, line, indexing="ij"), dim=-1)  # (p, p, 2)
    pixels = (corner[:, None, None] + offsets).flatten(0, 2) + 0.5
    index = torch.arange(number).repeat_interleave(PATCH * PATCH)[:, None]
    return seen.generate_rays(camera_indices=index, coords=pixels).reshape((number, PATCH, PATCH))


def draw_pixels(
    views: int,
    height: int,
    width: int,
    *,
    number: int,
    one_image: bool = False,
    crop: float = 1.0,
    masks: Bool[Tensor, "n h w 1"] | None = None,
    generator: torch.Generator,
) -> Int[Tensor, "r 3"]:
    """(view, row, column) of random pixels: of one view or all, within the centre that has `crop` of both sides.

    Each pixel that `masks` leaves there is as likely as the others. Where they hide nearly all of the centre, pixels
    are drawn from all that they leave of the views.
    """
    rows, columns = (max(1, round(side * crop)) for side in (height, width))

    def draw(view: Tensor) -> Tensor:
        row = torch.randint(rows, view.shape, generator=generator) + (height - rows) // 2
        column = torch.randint(columns, view.shape, generator=generator) + (width - columns) // 2
        return torch.stack((view, row, column), dim=-1)

    def draw_views(count: int) -> Tensor:
        return torch.randint(views, (count,), generator=generator)

    found = draw(draw_views(1).expand(number) if one_image else draw_views(number))
    if masks is None:
        return found
    for _ in range(REDRAWS):
        hidden = ~masks[found[:, 0], found[:, 1], found[:, 2], 0]
        if not (count := int(hidden.sum())):
            return found
        found[hidden] = draw(found[hidden, 0] if one_image else draw_views(count))
    left = masks[..., 0].nonzero()
    if one_image:
        left = left[left[:, 0] == found[0, 0]]
    found[hidden] = left[torch.randint(len(left), (count,), generator=generator)]
    return found
