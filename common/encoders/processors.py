"""transformers' image processors as `Preprocess`: what a directory of weights says of its pixels, or a refusal."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from common.checks import UserError
from common.encoders.preprocess import LARGEST, OPENAI_MEAN, OPENAI_STD, PREPROCESSING, Preprocess
from common.pretrained import SWITCH, checked, number, one_of

FILES = ("processor_config.json", "preprocessor_config.json")
HALF = (0.5, 0.5, 0.5)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""PIL's numbers."""
WARPED_FROM = 384
"""Sides from which ConvNeXt's processor squashes instead of cropping."""


class _Processor(NamedTuple):
    """What a class does where its file says nothing."""

    crops: bool = False
    resample: int = 3
    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF
    short: bool = False
    """A size that is one number is the shorter side's."""


_CLIP = _Processor(crops=True, mean=OPENAI_MEAN, std=OPENAI_STD, short=True)
PROCESSORS = {
    "CLIP": _CLIP,
    "ChineseCLIP": _CLIP,
    "Bit": _CLIP,
    "Siglip": _Processor(short=True),
    "ViT": _Processor(resample=2),
    "DeiT": _Processor(crops=True),
    "Beit": _Processor(),
    "Blip": _Processor(mean=OPENAI_MEAN, std=OPENAI_STD),
    "ConvNext": _Processor(short=True),
    "EfficientNet": _Processor(),
    "DINOv3ViT": _Processor(resample=2, mean=IMAGENET_MEAN, std=IMAGENET_STD),
    "MobileNetV1": _Processor(crops=True, resample=2, short=True),
    "MobileNetV2": _Processor(crops=True, resample=2, short=True),
}
"""Image processors of transformers that are honoured, without the ending ImageProcessor."""
RULES = {
    **dict.fromkeys(("do_rescale", "do_normalize", "include_top", "rescale_offset"), SWITCH),
    "do_resize": one_of(True),
    "do_center_crop": SWITCH | None,
    "do_pad": one_of(False) | None,
    "resample": one_of(*RESAMPLING),
    "rescale_factor": number(0.0039, 0.00786),
    "crop_pct": number(0.05, 1),
}


def read_fields(source: str) -> tuple[str, dict[str, Any]] | None:
    """What a directory or hub id says of images, and the file that says it; None where there is no such file."""
    from transformers.utils import cached_file

    for file in FILES:
        found = cached_file(source, file, _raise_exceptions_for_missing_entries=False)
        fields = json.loads(Path(found).read_text(encoding="utf-8")) if found else None
        if found and file == "processor_config.json":  # of images, text and more
            fields = fields.get("image_processor") if isinstance(fields, dict) else None
        if fields is not None:
            return file, fields
    return None


def read_preprocess(source: str, usual: str, size: int | None) -> Preprocess:
    """The preprocessing that was saved with weights.

    Args:
        source: directory or hub id.
        usual: the processor where the file names none, one of `PROCESSORS`.
        size: side of the square that the vision tower sees, which it must make; None takes the processor's.

    Raises:
        UserError: there is none, or something in it cannot be honoured.
    """
    found = read_fields(source)
    if found is None:
        raise UserError(f"{source!r} has no {FILES[1]}: copy it from where the weights come from.")
    return to_preprocess(found[1], f"{found[0]} of {source!r}", usual, size)


def to_preprocess(fields: Mapping[str, Any], place: str, usual: str, size: int | None) -> Preprocess:
    """`fields` of a processor's file as preprocessing; `place` is for messages, the rest as in `read_preprocess`."""
    checked(fields, RULES, place)
    kind = _kind(fields, place, usual)
    usually = PROCESSORS[kind]
    resize, squash, side = _sizes(fields, place, kind, size)
    mean, std = _colours(fields, place, kind)
    return Preprocess(
        side,
        mean,
        std,
        RESAMPLING[fields.get("resample", usually.resample)],
        squash,
        resize=None if resize == side else resize,
        in_floats=kind == "DINOv3ViT",
        crop_down=True,
    )


def _kind(fields: Mapping[str, Any], place: str, usual: str) -> str:
    """The processor's name in `PROCESSORS`."""
    name = fields.get("image_processor_type", fields.get("feature_extractor_type")) or f"{usual}ImageProcessor"
    kind = re.sub("(ImageProcessor(Fast|Pil)?|FeatureExtractor)$", "", name) if isinstance(name, str) else name
    if kind not in PROCESSORS:
        raise UserError(
            f"{place}: image_processor_type is {str(name)[:60]!r}, whose pixels cannot be made here: use weights with "
            f"one of {', '.join(PROCESSORS)}."
        )
    return str(kind)


def _sizes(fields: Mapping[str, Any], place: str, kind: str, size: int | None) -> tuple[int, bool, int]:
    """Side after the resize, whether both sides are resized to it, and side after the crop."""
    square = {"height": size, "width": size} if size else "a height equal to its width"
    needs = f"the vision tower sees {size} pixels, use {square}" if size else f"use {square}"
    given = fields.get("size")
    if "size" not in fields:
        raise UserError(f"{place} has no size: {needs}.")
    resize = _square(given)
    squash = resize is not None and not (_is_side(given) and PROCESSORS[kind].short)
    if isinstance(given, dict) and set(_given(given)) == {"shortest_edge"} and _is_side(given["shortest_edge"]):
        resize = given["shortest_edge"]
    if resize is None:
        raise UserError(f"{place}: size is {str(given)[:60]}: {needs}.")
    crops = fields.get("do_center_crop", PROCESSORS[kind].crops)
    side = resize
    if kind == "ConvNext":
        squash = resize >= WARPED_FROM
        resize = resize if squash else int(resize / fields.get("crop_pct", 224 / 256))
    elif not crops and not squash:
        raise UserError(f"{place}: size is {given} without a crop, which makes no square: {needs}.")
    if crops:
        crop = fields.get("crop_size") or {"height": size or 224, "width": size or 224}
        side = _square(crop) or 0
        if not side or side > resize:
            raise UserError(f"{place}: crop_size is {str(crop)[:60]}: {needs}, at most size {resize}.")
    if size and side != size:
        name, value = ("crop_size", fields.get("crop_size")) if crops else ("size", given)
        raise UserError(f"{place}: {name} is {value!r}: {needs}.")
    return resize, squash, side


def _square(size: Any) -> int | None:
    """The side that a size of equal height and width, or one number, means."""
    if _is_side(size):
        return int(size)
    if isinstance(size, dict) and set(_given(size)) == {"height", "width"} and size["height"] == size["width"]:
        return size["height"] if _is_side(size["height"]) else None
    return None


def _is_side(value: Any) -> bool:
    return type(value) is int and 1 <= value <= LARGEST


def _given(size: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in size.items() if value is not None}


def _colours(fields: Mapping[str, Any], place: str, kind: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation to apply to pixels from 0 to 1, with the rescaling folded in.

    A processor computes y = 255·factor·x - offset and then (y - mean) / std.
    """
    usual = {"mean": PROCESSORS[kind].mean, "std": PROCESSORS[kind].std}
    given = {f"image_{name}": fields.get(f"image_{name}", value) for name, value in usual.items()}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    factor = 255 * fields.get("rescale_factor", 1 / 255) if fields.get("do_rescale", True) else 255.0
    factor = 1.0 if abs(factor - 1) < 1e-5 else factor
    normalizes, efficient = fields.get("do_normalize", True), kind == "EfficientNet"
    again = efficient and fields.get("include_top", True)  # divides by the standard deviation once more
    if normalizes or again:
        rules = {name: PREPROCESSING["fill" if factor == 255 else name.removeprefix("image_")] for name in given}
        checked(given, rules, place)
    offset = 1.0 if efficient and fields.get("rescale_offset", False) and fields.get("do_rescale", True) else 0.0
    mean = given["image_mean"] if normalizes else (0.0,) * 3
    std = given["image_std"] if normalizes else (1.0,) * 3
    if again:
        std = tuple(a * b for a, b in zip(std, given["image_std"], strict=True))
    if factor == 1 and not offset:
        return mean, std
    return tuple((value + offset) / factor for value in mean), tuple(value / factor for value in std)
