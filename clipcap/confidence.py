"""How sure a caption is: scores of it, calibrated into a probability of being right, and how far its picture is from
those of training.

`clipcap calibrate` learns a `Calibration` on captioned images; it is kept with the captioner.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F

from clipcap.ranking import similarities
from clipcap.scoring import Scorer, caption_nats
from common.checks import UserError
from common.files import whole_file
from common.pretrained import require_finite

if TYPE_CHECKING:
    from clipcap.search import Caption
    from common.clip import FrozenCLIP
    from common.encoders.interface import ImageFeatures

FILE = "confidence.safetensors"
"""Name of the calibration in a captioner's directory."""
SCORES = ("likelihood", "information", "distance", "similarity")
"""Of a caption; the last needs a CLIP with a text tower."""
ROWS = 32
"""Captions in a pass of GPT-2, for their logits take memory."""
COMPONENTS = 32
"""Of the subspace of the training pictures, at most."""


class Writer(Protocol):
    """What the scores need of a captioner: `clipcap.Captioner` is one."""

    @property
    def model(self) -> Scorer: ...

    clip: FrozenCLIP

    def text(self, caption: Caption) -> str: ...


def whole_picture(features: ImageFeatures) -> Float[Tensor, "b w"]:
    """The mean of a picture's patches, of length 1; where there are none, its class token.

    Before CLIP's projection, which keeps what tells the pictures of its own training apart and little else.
    """
    pooled = features.patches.float().mean(1) if features.patches.shape[1] else features.class_token
    return F.normalize(pooled.float(), dim=-1)


@dataclass(frozen=True)
class Ground:
    """What training pictures look like to the captioner's CLIP: their mean and principal components."""

    mean: Float[Tensor, " w"]
    components: Float[Tensor, "c w"]
    """Of length 1, at right angles."""
    limit: float
    """Distance that a hundredth of held-out pictures of the same kind is beyond."""

    @classmethod
    def fit(cls, training: Float[Tensor, "n w"], held_out: Float[Tensor, "m w"]) -> Ground:
        """From `whole_picture` of training pictures, and of others like them.

        Raises:
            UserError: fewer than 2 training pictures, or none held out.
        """
        if len(training) < 2 or not len(held_out):
            raise UserError(
                f"there are {len(training)} training and {len(held_out)} held-out images: give at least 2 and 1."
            )
        mean = training.mean(0)
        count = min(COMPONENTS, len(training) // 4, training.shape[1] // 2)
        _, _, components = torch.linalg.svd((training - mean).double(), full_matrices=False)
        ground = cls(mean, components[:count].float(), 0.0)
        return cls(mean, ground.components, float(ground.distance(held_out).quantile(0.99)))

    def distance(self, pictures: Float[Tensor, "b w"]) -> Float[Tensor, " b"]:
        """Distance of `whole_picture` from the subspace: what the components leave of it (Jackson & Mudholkar 1979)."""
        rest = pictures - self.mean.to(pictures.device)
        components = self.components.to(pictures.device)
        return (rest - rest @ components.T @ components).norm(dim=1)


class Judgement(NamedTuple):
    """How sure the captions of one image are."""

    confidences: list[float]
    """Probability of each caption to be right."""
    distance: float
    """Of the picture from those of training, as a share of the distance that is usual at most."""

    @property
    def far(self) -> bool:
        """Whether the picture is unlike those of training, so that its captions may mean nothing."""
        return self.distance > 1


@dataclass(frozen=True)
class Calibration:
    """Logistic regression of being right on a caption's scores, with what the scores need."""

    prefix: Float[Tensor, "K d"]
    """Mean of the training pictures' prefixes: it stands for no picture in particular."""
    ground: Ground
    weights: Float[Tensor, " s"]
    """For each of the first s of `SCORES`."""
    bias: float
    record: dict[str, Any]
    """How it was learned, and how good it is."""

    def scores(
        self,
        captioner: Writer,
        features: ImageFeatures,
        prefixes: Float[Tensor, "b K d"],
        captions: Sequence[Sequence[Caption]],
    ) -> list[Float[Tensor, "c s"]]:
        """`SCORES` of the captions of each image, on the CPU (see `caption_scores`)."""
        return caption_scores(captioner, features, prefixes, captions, self.prefix, self.ground)

    def judge(
        self,
        captioner: Writer,
        features: ImageFeatures,
        prefixes: Float[Tensor, "b K d"],
        captions: Sequence[Sequence[Caption]],
    ) -> list[Judgement]:
        """How sure the captions of each image are.

        Args:
            captioner: whose captions.
            features: of the images.
            prefixes: of the images, as its model makes them.
            captions: of each image.
        """
        distances = self.ground.distance(whole_picture(features)).tolist()
        return [
            Judgement(self.confidence(rows).tolist(), distance / self.ground.limit)
            for rows, distance in zip(self.scores(captioner, features, prefixes, captions), distances, strict=True)
        ]

    def confidence(self, scores: Float[Tensor, "c s"]) -> Float[Tensor, " c"]:
        """Probability of being right for captions with these scores."""
        return torch.sigmoid(scores.double() @ self.weights.double() + self.bias)

    def save(self, path: Path) -> None:
        """Write it whole or not at all; the distances' numbers in half precision."""
        from safetensors.torch import save

        tensors = {
            "prefix": self.prefix.half(),
            "mean": self.ground.mean.half(),
            "components": self.ground.components.half(),
            "weights": self.weights.double(),
            "bias": torch.tensor(self.bias, dtype=torch.float64),
            "limit": torch.tensor(self.ground.limit, dtype=torch.float64),
        }
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        with whole_file(path) as file:
            file.write(save(tensors, {"record": json.dumps(self.record)}))

    @classmethod
    def load(cls, path: str | os.PathLike[str], prefix: tuple[int, int]) -> Calibration:
        """Read what `save` wrote.

        Args:
            path: file.
            prefix: length and width of the captioner's prefix.

        Raises:
            UserError: it is damaged, or was made for another captioner.
        """
        from safetensors import safe_open

        cure = "calibrate the captioner again (clipcap calibrate), or delete the file"
        try:
            with safe_open(path, framework="pt") as file:
                record = json.loads((file.metadata() or {})["record"])
                names = ("prefix", "mean", "components", "weights", "bias", "limit")
                found = {name: file.get_tensor(name) for name in names}
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise UserError(f"calibration {os.fspath(path)!r} is damaged ({error}): {cure}.") from error
        shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
        count = shapes["weights"][0] if shapes["weights"] else 0
        fits = (
            shapes["prefix"] == prefix
            and len(shapes["components"]) == 2
            and shapes["mean"] == shapes["components"][1:]
            and shapes["weights"] == (count,)
            and len(SCORES) - 1 <= count <= len(SCORES)
            and shapes["bias"] == shapes["limit"] == ()
            and isinstance(record, dict)
        )
        if not fits or not all(tensor.is_floating_point() for tensor in found.values()) or found["limit"] <= 0:
            raise UserError(f"calibration {os.fspath(path)!r} does not fit the captioner ({shapes}): {cure}.")
        require_finite(found, f"calibration {os.fspath(path)!r}")
        ground = Ground(found["mean"].float(), found["components"].float(), float(found["limit"]))
        return cls(found["prefix"].float(), ground, found["weights"], float(found["bias"]), record)


@torch.inference_mode()
def caption_scores(
    captioner: Writer,
    features: ImageFeatures,
    prefixes: Float[Tensor, "b K d"],
    captions: Sequence[Sequence[Caption]],
    blank: Float[Tensor, "K d"],
    ground: Ground,
) -> list[Float[Tensor, "c s"]]:
    """`SCORES` of the captions of each image, on the CPU; one pass of GPT-2 over each caption with and without image.

    likelihood: log p(caption | image) per token, in nats. information: the same less log p(caption | `blank`), what the
    image makes of it. distance: of the image from `ground`, over its limit. similarity: cosine of image and caption by
    the captioner's CLIP, left out where it has no text tower.
    """
    owners = [image for image, several in enumerate(captions) for _ in several]
    rows = [list(caption.token_ids) or [0] for several in captions for caption in several]
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.float64)
    given = prefixes[owners]
    both = torch.cat([given, blank.to(given)[None].expand_as(given)])
    nats = torch.cat(
        [
            caption_nats(captioner.model, both[begin : begin + ROWS], (rows + rows)[begin : begin + ROWS])
            for begin in range(0, len(both), ROWS)
        ]
    )
    seen, unseen = nats.double().cpu().view(2, -1) / lengths
    distance = (ground.distance(whole_picture(features)) / ground.limit).double().cpu()[owners]
    columns = [seen, seen - unseen, distance]
    if captioner.clip.has_text:
        cosines: Any = [caption.similarity for several in captions for caption in several]
        if None in cosines:
            texts = [[captioner.text(caption) for caption in several] for several in captions]
            cosines = torch.cat(similarities(captioner.clip, features.embedding, texts))
        columns.append(torch.as_tensor(cosines, dtype=torch.float64))
    return list(torch.stack(columns, dim=1).split([len(several) for several in captions]))
