"""What uses encoders: captions from one without text, the semantic loss, and refusals before any work."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from clipcap.backbones import absolute
from clipcap.captioner import Captioner
from clipcap.config import ClipCapConfig
from clipcap.data.embeddings import build_store
from clipcap.data.readers.captioned import CaptionedImage
from clipcap.evaluation.evaluate import EvaluateConfig, evaluate
from clipcap.model import ClipCapModel
from clipcap.processing import ClipCapProcessor
from clipcap.training.settings import TrainConfig
from clipcap.training.train import train
from common.checks import UserError
from common.clip import load_clip
from common.encoders.preprocess import Preprocess
from common.runtime import RuntimeConfig
from dietnerf.semantic import SemanticConfig, SemanticLoss
from experiments.backbones.tiny_encoders import save_encoder, save_torchvision
from tests.common.encoders.pictures import photo

CPU = RuntimeConfig(device="cpu")


@pytest.fixture(scope="module")
def vision(tmp_path_factory) -> Path:
    """A DINOv2 with registers."""
    return save_encoder("DINOv2 with registers", tmp_path_factory.mktemp("vision") / "dinov2")


@pytest.fixture
def pictures(tmp_path):
    """Three of odd sizes with captions."""
    items = []
    for number, size in enumerate([(37, 53), (101, 38), (64, 64)]):
        path = tmp_path / f"{number}.png"
        photo(*size, seed=number).save(path)
        items.append(CaptionedImage(path.name, path, ("a cat",), "train"))
    return items


@pytest.mark.parametrize("inputs", ["embedding", "patches"])
def test_captions_from_an_encoder_without_text(vision, pictures, gpt2_directory, inputs, tmp_path):
    clip = load_clip(vision, device="cpu")
    store = build_store(pictures, clip, tmp_path / "store", inputs=inputs, dtype="float32")
    image = photo(101, 38, seed=1)
    features = clip.encode_image_features(clip.preprocess(image))
    expected = features.patches[0] if inputs == "patches" else features.embedding[0]
    np.testing.assert_allclose(store[store.row("1.png")], expected, atol=1e-5)
    config = ClipCapConfig(
        mapper="transformer", inputs=inputs, clip_width=16, prefix_length=3, clip_length=2, mapper_layers=1,
        mapper_heads=2, gpt2=str(gpt2_directory), clip=str(vision),
    )  # fmt: skip
    captioner = Captioner(ClipCapModel.from_backbones(config), clip)
    assert isinstance(captioner.caption(image, max_new_tokens=8), str)


def test_a_processor_keeps_all_of_the_preprocessing(gpt2_directory, tmp_path):
    from common.gpt2 import load_gpt2

    preprocess = Preprocess(
        32, (0.5,) * 3, (0.3,) * 3, "lanczos", pad=True, resize=36, fill=(1, 2, 3), in_floats=True, crop_down=True
    )
    ClipCapProcessor(preprocess, load_gpt2(gpt2_directory)[1]).save_pretrained(tmp_path)
    assert ClipCapProcessor.from_pretrained(tmp_path).preprocess == preprocess
    plain = Preprocess(32)
    assert list(plain.to_dict()) == ["size", "mean", "std", "interpolation", "squash"]  # as files of 0.1 have them
    assert Preprocess.from_dict({k: list(v) if isinstance(v, tuple) else v for k, v in asdict(plain).items()}) == plain


@pytest.mark.parametrize("feature", ["class_token", "embedding", "patches"])
def test_the_semantic_loss_moves_a_render(vision, feature):
    views = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    loss = SemanticLoss(SemanticConfig(weight=0.1, encoder=str(vision), feature=feature, targets=0), views, "cpu")
    render = views[:1].permute(0, 2, 3, 1).mul(0.5).requires_grad_()
    loss(render).sum().backward()
    assert (render.grad.abs().sum(-1) > 0).float().mean() > 0.99
    with pytest.raises(UserError, match="knows no text"):
        SemanticLoss(SemanticConfig(weight=0.1, encoder=str(vision), text="a ball"), views, "cpu")


def test_what_needs_texts_or_patches_is_refused_before_any_work(vision, tmp_path, pictures, gpt2_directory):
    options = {"data": tmp_path / "none.txt", "out": tmp_path / "run", "gpt2": str(gpt2_directory), "runtime": CPU}
    for more in ({"text_only": True}, {"retrieval": 2}):
        with pytest.raises(UserError, match=f"no text tower, which --{next(iter(more)).replace('_', '-')} needs"):
            train(TrainConfig(**options, clip=str(vision), **more))
    (tmp_path / "captions.jsonl").write_text('{"image": "0.png", "captions": ["a cat"], "split": "val"}\n')
    with pytest.raises(UserError, match="no text tower, which --clip-score needs"):
        evaluate(
            EvaluateConfig(
                data=tmp_path / "captions.jsonl",
                out=tmp_path / "scores",
                clip_score=str(vision),
                split="all",
                model="tiny",
                runtime=CPU,
            )  # fmt: skip
        )
    assert not (tmp_path / "scores").exists()
    name = save_torchvision("squeezenet1_1", tmp_path)[0]
    with pytest.raises(UserError, match="no patches, which --inputs patches needs"):
        build_store(pictures, load_clip(name, device="cpu"), tmp_path / "store", inputs="patches")
    with pytest.raises(UserError, match="no patches, which --inputs patches needs"):
        train(TrainConfig(**options, clip=name, inputs="patches", mapper="transformer"))


@pytest.mark.parametrize("prefix", ["timm:test_vit", "torchvision:resnet18", "open_clip:RN50"])
def test_names_with_a_path_hold_in_another_directory(prefix, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.pth").touch()
    assert absolute(f"{prefix}/weights.pth") == f"{prefix}/{tmp_path / 'weights.pth'}"
    assert absolute(prefix) == prefix
