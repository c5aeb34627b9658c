"""What the tests of dietnerf share: the golden numbers of the original implementation."""

from __future__ import annotations

import contextlib
import io
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import ExifTags, Image
from safetensors.torch import load_file

from tests.dietnerf.ball import write_scene


@pytest.fixture(scope="session")
def golden(root) -> dict[str, torch.Tensor]:
    """Outputs of the original DietNeRF code on small random inputs, by name."""
    return load_file(root / "tests" / "golden" / "dietnerf.safetensors")


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def ball_scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 train, 2 val and 3 test views of 16 x 16 pixels; read it, do not write to it."""
    return write_scene(tmp_path_factory.mktemp("ball") / "ball")


WALKED = range(3, 11)
TURNED = "walk_5.jpg"


@pytest.fixture(scope="session")
def walk(root, tmp_path_factory) -> Path:
    """8 of the packaged photographs, one of which lies on its side with an EXIF tag that says so, beside one of
    somewhere else and one that is broken; read it, do not write to it."""
    samples, place = root / "common/assets/samples", tmp_path_factory.mktemp("walk")
    for number in WALKED:
        shutil.copy(samples / f"walk/walk_{number}.jpg", place)
    with Image.open(place / TURNED) as image:
        exif = image.getexif()
        exif[ExifTags.Base.Orientation] = 6
        image.transpose(Image.Transpose.ROTATE_90).save(place / TURNED, quality=95, exif=exif)
    shutil.copy(samples / "photographs/000000012280.jpg", place / "some where else.jpg")
    (place / "walk_99.jpg").write_bytes(b"no photograph")
    return place


@pytest.fixture(scope="session")
def posed(walk, tmp_path_factory) -> SimpleNamespace:
    """`walk`, posed by the command: `scene`, what it said on `out` and `err`, and the `options`."""
    pytest.importorskip("nerfstudio")
    from dietnerf.cli import main

    scene, out, err = tmp_path_factory.mktemp("posed") / "scene", io.StringIO(), io.StringIO()
    options = ("--image-size", "320", "--features", "1500")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert main(["pose", str(walk), str(scene), *options]) == 0
    return SimpleNamespace(scene=scene, out=out.getvalue(), err=err.getvalue(), options=options)
