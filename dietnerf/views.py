"""The few views of a scene that are trained on, and the protocols that fix them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from common.checks import UserError, require_at_least, require_one_of
from dietnerf.captures import Capture

PAPER_VIEWS = (26, 86, 2, 55, 75, 93, 16, 73)
"""The eight training views of DietNeRF's Blender protocol (Jain et al. 2021, appendix)."""


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


@dataclass
class ViewsConfig:
    """Views that are trained on."""

    num_views: int = 0
    """Training views; 0 takes all."""
    view_ids: tuple[int | str, ...] = ()
    """Exactly these training views, by their place in the training split or by the names of their files."""
    view_order: Literal["farthest", "first", "random"] = "farthest"
    """How num_views are chosen: far from each other, the first ones, or by chance."""
    hold_out: int = 0
    """Hold every Nth photograph of a capture out, from the middle of the first N on (5: the 3rd, 8th, ...), and score
    those; 0 is the scene's own split."""
    image_size: int = 0
    """Width of the images in pixels, averaged down by area, or the longer side of each where they have several sizes;
    0 keeps theirs, up to 1,600 pixels for the longer side."""
    skip_missing: bool = False
    """Leave out the cameras whose image is missing, instead of refusing the scene."""


def select_views(
    poses: Float[Tensor, "n r 4"],
    *,
    number: int = 0,
    ids: Sequence[int] = (),
    order: str = "farthest",
    seed: int = 0,
) -> tuple[int, ...]:
    """Ids of the views to train on.

    Args:
        poses: camera-to-world matrices of all cameras, (3, 4) or (4, 4).
        number: how many; 0 takes all.
        ids: exactly these; then `number` must be 0 or their count.
        order: "farthest" (each next camera is the one farthest from those chosen, from the first on), "first", or
            "random" by `seed`.

    Raises:
        UserError: more views than there are, or ids that do not exist or occur twice.
    """
    total = len(poses)
    if ids:
        outside = [i for i in ids if not 0 <= i < total]
        if outside:
            raise UserError(f"view id {outside[0]} is out of range: this scene has training views 0 to {total - 1}.")
        if len(set(ids)) < len(ids):
            raise UserError(f"view ids {tuple(ids)} name a view twice: name each once.")
        if number not in (0, len(ids)):
            raise UserError(f"num_views is {number} but {len(ids)} view ids are given: leave one of them out.")
        return tuple(ids)
    if number == 0:
        return tuple(range(total))
    if not 0 < number <= total:
        raise UserError(f"num_views is {number}: this scene has {total} training views.")
    require_one_of("view_order", order, ("farthest", "first", "random"))
    if order == "first":
        return tuple(range(number))
    if order == "random":
        return tuple(torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:number].tolist())
    distances = pose_distances(poses)
    chosen, nearest = [0], distances[0].clone()
    while len(chosen) < number:
        nearest[chosen] = -1.0  # never again, wherever the others stand
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, distances[chosen[-1]])
    return tuple(chosen)


def held_out(capture: Capture, split: str, every: int) -> Capture:
    """A capture with every Nth of its frames in the held-out splits, and the others in the training split.

    Raises:
        UserError: a scene with files for its splits, or one that leaves nothing to train on or to hold out.
    """
    require_at_least("hold_out", every, 2)
    if capture.kind == "blender":
        raise UserError(f"hold_out is {every} but {str(capture.file)!r} has a file for each split: leave it out.")
    total = len(capture.frames)
    chosen = range(every // 2, total, every)
    if not chosen:
        raise UserError(f"hold_out is {every} but the scene has {total} photographs: use at most {2 * total - 1}.")
    ids = [i for i in range(total) if (i in chosen) != (split == "train")]
    return replace(capture, ids=ids, source=f"one photograph of {every}", from_training=False)


def pose_distances(poses: Float[Tensor, "n r 4"]) -> Float[Tensor, "n n"]:
    """How different the views of two cameras are, by position and direction.

    The root of the squared distance of the positions, in units of their mean distance from their centre, plus the
    squared distance of the directions (unit vectors). On a sphere whose centre all look at, it is the distance of the
    positions times a constant.
    """
    positions, forward = poses[:, :3, 3].double(), -poses[:, :3, 2].double()
    spread = (positions - positions.mean(dim=0)).norm(dim=1).mean().clamp(min=1e-9)
    places, directions = positions[:, None] - positions, forward[:, None] - forward
    return ((places / spread).square().sum(dim=-1) + directions.square().sum(dim=-1)).sqrt()


def places_of(ids: Sequence[int | str], images: Sequence[Path]) -> tuple[int, ...]:
    """Places of views that are given by place or by the name of their file: r_2, r_2.png or train/r_2.

    Raises:
        UserError: a name that no view or that more than one has.
    """

    def place(name: str) -> int:
        wanted = "/" + name.replace("\\", "/").removeprefix("./").lstrip("/")
        found = [
            i
            for i, image in enumerate(images)
            if f"/{image.as_posix()}".endswith(wanted) or f"/{image.with_suffix('').as_posix()}".endswith(wanted)
        ]
        if len(found) > 1:
            raise UserError(f"view id {name!r} is the name of {len(found)} images: give the folder or suffix too.")
        if not found:
            raise UserError(
                f"view id {name!r} is no training view's file: this scene has {len(images)}, such as "
                f"{images[0].name!r}."
            )
        return found[0]

    return tuple(place(one) if isinstance(one, str) else one for one in ids)
