"""Preprocessing equals every image processor of transformers that is accepted, on images of odd sizes."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from common.checks import UserError
from common.encoders.preprocess import Preprocess
from common.encoders.processors import PROCESSORS, to_preprocess
from tests.common.encoders.pictures import SIZES, photo

SIDE, SQUARE, SHORT = 32, {"height": 32, "width": 32}, {"shortest_edge": 32}
LARGER = {"height": 41, "width": 41}
SETTINGS = [
    {"size": SQUARE, "do_center_crop": False},
    {"size": LARGER, "crop_size": SQUARE, "do_center_crop": True},
    {"size": {"shortest_edge": 39}, "crop_size": SQUARE, "do_center_crop": True},
    {"size": SHORT, "crop_size": SQUARE, "do_center_crop": True, "resample": 1},
    {"size": SQUARE, "do_center_crop": False, "resample": 0},
    {"size": SQUARE, "do_center_crop": False, "do_normalize": False},
    {"size": SQUARE, "do_center_crop": False, "rescale_factor": 1 / 127.5, "image_mean": [1.0, 0.9, 0.8]},
    {"size": SQUARE, "do_center_crop": False, "do_rescale": False, "image_mean": [120.0, 110.0, 100.0], "image_std": [60.0] * 3},
    {"size": SQUARE, "do_center_crop": False, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.2, 0.3, 0.4]},
]  # fmt: skip
OWN = {
    "ConvNext": [
        {"size": SHORT, "crop_pct": 0.8},
        {"size": SHORT, "crop_pct": 0.9, "resample": 2},
        {"size": {"shortest_edge": 384}},
        {"size": SHORT, "do_normalize": False},
    ],
    "EfficientNet": [
        {"size": SQUARE, "include_top": False},
        {"size": SQUARE, "include_top": True, "image_std": [0.3, 0.4, 0.5]},
        {"size": SQUARE, "rescale_offset": True, "rescale_factor": 1 / 127.5, "include_top": False},
        {"size": SQUARE, "do_normalize": False, "rescale_offset": True, "rescale_factor": 1 / 127.5, "include_top": True},
    ],
}  # fmt: skip


def processor(kind: str, settings: dict):
    """transformers' own: of PIL, but for DINOv3's, which has numbers alone."""
    name = f"{kind}ImageProcessor"
    return (getattr(transformers, f"{name}Pil", None) or getattr(transformers, name))(**settings)


def assert_equal(kind: str, settings: dict) -> None:
    theirs = processor(kind, settings)
    fields = json.loads(theirs.to_json_string())  # as in the file
    ours = to_preprocess(fields, "here", kind, None)
    for size in SIZES:
        image = photo(*size)
        expected = torch.as_tensor(theirs(images=image, return_tensors="pt")["pixel_values"]).float()
        scale = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(ours(image), expected, atol=1e-5 * scale, rtol=0)
    assert Preprocess.from_dict(ours.to_dict()) == ours


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", [kind for kind in PROCESSORS if kind != "ConvNext"])
def test_pixels_equal_the_processors(kind, settings):
    if settings.get("do_rescale", True) or kind not in ("EfficientNet", "DINOv3ViT"):  # which need it
        assert_equal(kind, settings)


@pytest.mark.parametrize(
    ("kind", "settings"), [(kind, one) for kind, several in OWN.items() for one in several], ids=str
)
def test_pixels_equal_the_odd_processors(kind, settings):
    assert_equal(kind, settings)


@pytest.mark.parametrize("kind", PROCESSORS)
def test_what_a_file_leaves_out_is_the_class_default(kind):
    theirs = processor(kind, {})
    fields = {"image_processor_type": f"{kind}ImageProcessorFast", "size": dict(theirs.size)}
    if kind == "EfficientNet":
        fields["do_center_crop"] = False
    ours, image = to_preprocess(fields, "here", "CLIP", None), photo(301, 211)
    expected = torch.as_tensor(theirs(images=image, return_tensors="pt")["pixel_values"]).float()
    torch.testing.assert_close(ours(image), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("settings, message", [
    ({"size": SQUARE, "rescale_factor": 1.0}, "rescale_factor is 1.0"),
    ({"size": SQUARE, "image_mean": [120.0] * 3}, "image_mean is"),
    ({"size": {"height": 8, "width": 8}}, "crop_size"),
    ({"size": {"height": 32, "width": 32}, "crop_size": {"height": 32, "width": 30}}, "crop_size is"),
    ({"size": 10**6}, "size is 1000000"), ({"size": {}}, "size is {}"), ({"size": None}, "size is None"), ({}, "has no size"),
    ({"size": SHORT, "do_center_crop": False}, "without a crop"),
], ids=str)  # fmt: skip
def test_what_cannot_be_honoured_is_refused(settings, message):
    with pytest.raises(UserError) as caught:
        to_preprocess({"crop_size": SIDE} | settings, "file of 'here'", "CLIP", SIDE)
    assert message in str(caught.value) and "\n" not in str(caught.value) and "file of 'here'" in str(caught.value)
