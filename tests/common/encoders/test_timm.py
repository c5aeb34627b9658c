"""timm's and torchvision's models: pixels, embeddings and patches equal the libraries' own."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config
from timm.data.transforms_factory import transforms_imagenet_eval
from torchvision import models

from common.checks import UserError
from common.clip import load_clip
from common.encoders.preprocess import Preprocess, resize_lanczos
from common.encoders.timm import OLDEST, import_timm, trunk_features
from experiments.backbones.tiny_encoders import shake
from tests.common.encoders.pictures import SIZES, as_tensor, photo

MODELS = (
    "test_vit", "test_vit2", "test_vit3", "test_vit4", "test_convnext", "test_convnext2", "test_convnext3", "test_resnet",
    "test_efficientnet", "test_efficientnet_gn", "test_byobnet", "test_mambaout", "test_nfnet",
)  # fmt: skip
ANY_SIZE = ("edgenext_xx_small", "ghostnet_050", "lcnet_035", "mobilenetv3_small_050", "tinynet_e", "efficientvit_b0")
TOKENS = {
    "vit_tiny_patch16_224": 1, "deit_tiny_distilled_patch16_224": 2, "vit_wee_patch16_reg1_gap_256": 1,
    "vit_small_patch16_dinov3": 5, "vit_tiny_r_s16_p8_224": 1, "eva02_tiny_patch14_224": 1, "vit_pe_core_tiny_patch16_384": 1,
    "vit_base_patch16_siglip_224": 0, "beit_base_patch16_224": 1, "vit_little_patch16_reg4_gap_256": 4,
    "swin_tiny_patch4_window7_224": 0, "mixer_s32_224": 0, "cait_xxs24_224": 1, "levit_128s": 0,
}  # fmt: skip
"""Tokens before the patches."""
CLASSLESS = ("vit_wee_patch16_reg1_gap_256", "vit_little_patch16_reg4_gap_256")
"""With registers but no class token."""


def test_a_timm_that_is_too_old_is_named_with_its_cure(monkeypatch):
    """`pip install` takes nerfstudio's when it installs both."""
    assert import_timm() is timm
    monkeypatch.setattr(timm, "__version__", "0.6.7")
    for name in ("photo", "timm:test_vit"):
        with pytest.raises(UserError, match=rf"timm is 0\.6\.7, .* pip install 'timm>={OLDEST},<2'"):
            load_clip(name, device="cpu")


def saved(name: str, path, **options):
    model = shake(timm.create_model(name, **options))
    save_file({key: value.clone() for key, value in model.state_dict().items()}, path)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_embeddings_are_timms(name, tmp_path):
    path = tmp_path / "model.safetensors"
    model = saved(name, path)  # with its classifier, as it is published
    clip = load_clip(f"timm:{name}/{path}", device="cpu")
    assert not clip.has_text and clip.has_patches
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    model.reset_classifier(0)
    for size in SIZES[:3]:
        image = photo(*size)
        pixels = clip.preprocess(image)
        torch.testing.assert_close(pixels[0], transform(image), atol=1e-6, rtol=0)
        with torch.no_grad():
            expected = model(pixels)
        assert expected.shape == (1, clip.width)
        torch.testing.assert_close(clip.encode_images(pixels), expected, atol=1e-5, rtol=1e-5)
    found = clip.encode_image_features(pixels)
    assert (
        found.patches.shape[-1] == clip.patch_width
        and int(found.patches.shape[1] ** 0.5) ** 2 == found.patches.shape[1]
    )
    image = as_tensor(photo(64, 64)).requires_grad_()
    clip.encode_images(clip.preprocess(image)).square().sum().backward()
    assert (image.grad != 0).float().mean() > 0.5


@pytest.mark.parametrize("name", ANY_SIZE)
def test_feature_maps_are_what_is_pooled(name):
    model = shake(timm.create_model(name, num_classes=0))
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        found = trunk_features(model, pixels)
        torch.testing.assert_close(found.embedding, model(pixels), atol=1e-5, rtol=1e-5)
        features = model.forward_features(pixels)
    torch.testing.assert_close(found.patches, features.flatten(2).transpose(1, 2))
    torch.testing.assert_close(found.class_token, features.mean((2, 3)))


@pytest.mark.slow
@pytest.mark.parametrize("name", TOKENS)
def test_tokens_that_are_no_patches_are_left_out(name):
    with torch.device("meta"):  # shapes alone
        model = timm.create_model(name, num_classes=0).eval()
    side = resolve_model_data_config(model)["input_size"][-1]
    pixels = torch.zeros(1, 3, side, side, device="meta")
    found, whole = trunk_features(model, pixels), model.forward_features(pixels)
    tokens = whole.shape[1] if whole.ndim == 3 else whole.shape[1] * whole.shape[2]
    assert (
        found.patches.shape[1] == tokens - TOKENS[name]
        and int(found.patches.shape[1] ** 0.5) ** 2 == found.patches.shape[1]
    )


@pytest.mark.parametrize("name", ["test_vit3", "test_vit"])
def test_class_token_and_patches_are_before_the_final_norm(name):
    model = shake(timm.create_model(name, num_classes=0))
    side = resolve_model_data_config(model)["input_size"][-1]
    pixels, seen = torch.randn(2, 3, side, side), []
    model.blocks[-1].register_forward_hook(lambda module, given, made: seen.append(made))
    with torch.no_grad():
        found = trunk_features(model, pixels)
    extra = model.num_prefix_tokens
    torch.testing.assert_close(found.patches, seen[0][:, extra:])
    if model.cls_token is not None:
        torch.testing.assert_close(found.class_token, seen[0][:, 0])
    else:
        torch.testing.assert_close(found.class_token, found.patches.mean(1))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("share", [0.875, 0.95, 1.0])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos", "nearest"])
def test_every_way_to_crop_is_timms(mode, share, interpolation):
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
    transform = transforms_imagenet_eval(32, share, mode, interpolation=interpolation, mean=mean, std=std)
    ours = Preprocess(
        32, mean, std, interpolation, squash=mode == "squash", pad=mode == "border", resize=int(np.floor(32 / share)),
        fill=tuple(round(255 * value) for value in mean) if mode == "border" else (0, 0, 0),
    )  # fmt: skip
    for size in SIZES:
        image = photo(*size)
        torch.testing.assert_close(ours(image)[0], transform(image), atol=1e-6, rtol=0)
        tensor = as_tensor(image).requires_grad_()
        difference = (ours(tensor) - ours(image)) * torch.tensor(std)[:, None, None]
        if interpolation == "nearest":  # but where two are as near
            assert (difference != 0).float().mean() < 0.25
        else:  # PIL rounds to 8 bits, and clips
            assert difference.abs().max() < 6e-2 and difference.abs().mean() < 2e-3
        ours(tensor).square().sum().backward()
        assert tensor.grad.isfinite().all() and tensor.grad.abs().sum() > 0


def test_lanczos_keeps_what_it_should():
    images = torch.rand(2, 3, 9, 14)
    torch.testing.assert_close(resize_lanczos(images, 9, 14), images, atol=1e-6, rtol=0)
    flat = torch.full((1, 3, 17, 5), 0.3)
    torch.testing.assert_close(resize_lanczos(flat, 6, 11), torch.full((1, 3, 6, 11), 0.3))


# --- bad input -----------------------------------------------------------------------------------------------------


def refused(name) -> str:
    with pytest.raises(UserError) as caught:
        load_clip(name, device="cpu")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_files_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "weights.pth"
    state = timm.create_model("test_vit").state_dict()
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, path)
    assert load_clip(f"timm:test_vit:{path}", device="cpu").width == 64  # as in older runs
    torch.save({key: value for key, value in state.items() if key != "norm.bias"}, path)
    assert "lacks 'norm.bias'" in refused(f"timm:test_vit/{path}")
    torch.save({**state, "more": torch.zeros(2)}, path)
    assert "holds 'more'" in refused(f"timm:test_vit/{path}")
    assert "do not fit" in refused(f"timm:test_convnext/{path}")
    torch.save({**state, "norm.bias": torch.full((64,), torch.nan)}, path)
    assert "norm.bias holds NaN" in refused(f"timm:test_vit/{path}")
    torch.save({**state, "norm.bias": torch.zeros(1).expand(2**40)}, path)
    assert "no plain tensor" in refused(f"timm:test_vit/{path}")
    path.write_bytes(path.read_bytes()[:500])
    assert "corrupt" in refused(f"timm:test_vit/{path}")
    (tmp_path / "weights.safetensors").write_bytes(b"nonsense")
    assert "corrupt" in refused(f"timm:test_vit/{tmp_path}/weights.safetensors")
    torch.save([1], path)
    assert "corrupt" in refused(f"torchvision:resnet18/{path}")


@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v3_small"])
def test_torchvisions_classifiers_without_their_last_layer(name, tmp_path):
    model = shake(models.get_model(name))
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    clip = load_clip(f"torchvision:{name}/{tmp_path}/weights.pth", device="cpu")
    image, last = photo(301, 211), {}
    layer = model.classifier[1 if name == "squeezenet1_1" else -1]
    layer.register_forward_hook(lambda module, given, made: last.update(given=given[0]))
    pixels = models.get_model_weights(name).DEFAULT.transforms()(image)[None]
    torch.testing.assert_close(clip.preprocess(image), pixels, atol=1e-6, rtol=0)
    with torch.no_grad():
        model(pixels)
    expected = last["given"] if last["given"].ndim == 2 else last["given"].relu().mean((2, 3))
    torch.testing.assert_close(clip.encode_images(pixels), expected, atol=1e-4, rtol=1e-4)
    assert not clip.has_patches and clip.encode_image_features(pixels).patches.shape == (1, 0, clip.width)
    with pytest.raises(UserError, match="has no patches, which --inputs patches needs"):
        clip.require_patches("--inputs patches")
