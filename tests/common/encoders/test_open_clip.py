"""open_clip's architectures beside CLIP's ViT and ResNet: timm's towers, CoCa, padding; all that it lists."""

from __future__ import annotations

import json

import open_clip
import pytest
import timm
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from safetensors.torch import save_file

from common.checks import UserError
from common.clip import load_clip
from common.encoders.open_clip import _OpenClip
from experiments.backbones.tiny_encoders import shake
from tests.common.encoders.pictures import SIZES, as_tensor, photo

TEXT = {"context_length": 20, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "mlp_ratio": 2.0, "patch_size": 8}
COCA = {
    "embed_dim": 12,
    "vision_cfg": VIT | {"attentional_pool": True, "attn_pooler_queries": 5, "attn_pooler_heads": 2, "output_tokens": True},
    "text_cfg": TEXT | {"embed_cls": True, "output_tokens": True},
    "multimodal_cfg": TEXT | {"attn_pooler_heads": 2},
    "custom_text": True,
}  # fmt: skip
SIGLIP = {
    "embed_dim": 192,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {"image_size": 224, "timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear"},
    "text_cfg": TEXT | {"hf_tokenizer_name": "no/such-tokenizer", "tokenizer_kwargs": {"clean": "canonicalize"}},
}  # fmt: skip
TOWERS = {
    "test_vit": {"timm_pool": "token"},
    "test_vit2": {"timm_pool": "map", "timm_proj": "none"},
    "test_vit3": {"timm_pool": "avg"},
    "test_convnext": {"timm_pool": "avg", "timm_proj": "mlp"},
    "test_resnet": {"timm_pool": "avg"},
    "test_byobnet": {"timm_pool": "avg"},
}
"""timm's test models, with the ways of pooling that open_clip's architectures use."""


@pytest.fixture
def load(tmp_path):
    """Load a random model of an architecture given by its configuration, beside open_clip's own."""

    def both(config: dict, **preprocessing):
        name = f"tiny-{len(list(tmp_path.iterdir()))}"
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(tmp_path / f"{name}.json")
        model = shake(open_clip.create_model(name, pretrained_text=False))
        save_file({key: value.clone() for key, value in model.state_dict().items()}, tmp_path / f"{name}.safetensors")
        return load_clip(f"open_clip:{name}/{tmp_path}/{name}.safetensors", device="cpu"), model

    return both


def assert_same_images(clip, model) -> None:
    transform = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    for size in SIZES[:3]:
        image = photo(*size)
        pixels = clip.preprocess(image)
        torch.testing.assert_close(pixels[0], transform(image), atol=1e-6, rtol=0)
    expected = model.visual(pixels)
    expected = expected[0] if isinstance(expected, tuple) else expected
    assert clip.width == expected.shape[1]
    found = clip.encode_image_features(pixels)
    torch.testing.assert_close(found.embedding, expected, atol=1e-5, rtol=1e-5)
    assert found.patches.shape[-1] == clip.patch_width == found.class_token.shape[-1] and found.patches.shape[1] > 1
    image = as_tensor(photo(64, 64)).requires_grad_()
    clip.encode_images(clip.preprocess(image)).square().sum().backward()
    assert (image.grad != 0).float().mean() > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("tower", TOWERS)
def test_towers_of_timm(load, tower):
    size = timm.get_pretrained_cfg(tower).input_size[-1]
    config = {"embed_dim": 64 if TOWERS[tower].get("timm_proj") == "none" else 12, "text_cfg": TEXT}
    config |= {"vision_cfg": {"image_size": size, "timm_model_name": tower, "timm_proj": "linear", **TOWERS[tower]}}
    clip, model = load(config)
    assert_same_images(clip, model)
    texts = ["a red cube", "two dogs"]
    with torch.no_grad():
        expected = model.encode_text(open_clip.get_tokenizer("ViT-B-32", context_length=20)(texts))
    torch.testing.assert_close(clip.encode_texts(texts), expected, atol=1e-5, rtol=1e-5)
    pixels = torch.randn(1, 3, size, size)
    found = clip.encode_image_features(pixels)
    if "vit" in tower:  # of the last block, before the final norm
        trunk = model.visual.trunk
        with torch.no_grad():
            tokens = trunk.norm(torch.cat([found.class_token[:, None][:, : trunk.num_prefix_tokens], found.patches], 1))
            expected = trunk.forward_features(pixels)
        torch.testing.assert_close(tokens[:, -16:], expected[:, -16:], atol=1e-4, rtol=1e-4)
    else:
        torch.testing.assert_close(found.class_token, found.patches.mean(1))


def test_the_image_side_of_coca(load):
    clip, model = load(COCA)
    assert_same_images(clip, model)
    texts = ["a red cube"]
    with torch.no_grad():
        expected = model.encode_text(clip.backbone._tokenizer(texts) if clip.backbone._tokenizer else
                                     open_clip.get_tokenizer("ViT-B-32", context_length=20)(texts), normalize=False)  # fmt: skip
    torch.testing.assert_close(clip.encode_texts(texts), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["longest", "squash"])
def test_ways_to_resize(load, mode, monkeypatch):
    config = {"embed_dim": 12, "vision_cfg": VIT, "text_cfg": TEXT}
    create = open_clip.create_model
    given = {"resize_mode": mode, "fill_color": 7, "interpolation": "bilinear"}
    monkeypatch.setattr(open_clip, "create_model", lambda *a, **k: create(*a, **k, force_preprocess_cfg=given))
    clip, model = load(config)
    assert clip.preprocess.pad == (mode == "longest")
    assert_same_images(clip, model)


def test_images_need_no_tokenizer_from_the_hub(load):
    size = timm.get_pretrained_cfg("test_vit").input_size[-1]
    vision = SIGLIP["vision_cfg"] | {"image_size": size}
    clip, model = load(SIGLIP | {"vision_cfg": vision})
    assert_same_images(clip, model)
    with pytest.raises(UserError, match="texts need the tokenizer 'no/such-tokenizer'.*hf download") as caught:
        clip.encode_texts(["a cube"])
    assert "\n" not in str(caught.value)


def towers() -> dict[str, str]:
    """Every vision tower that open_clip lists, as JSON, with an architecture that has it."""
    configs = {arch: open_clip.get_model_config(arch) for arch in open_clip.list_models() if "tiny-" not in arch}
    found = {}
    for arch, config in configs.items():
        found.setdefault(json.dumps([config["embed_dim"], config["vision_cfg"]], sort_keys=True), arch)
    return {arch: tower for tower, arch in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("arch", towers())
def test_every_architecture_gives_features(arch):
    config = open_clip.get_model_config(arch)
    model = torch.nn.Module()
    with torch.device("meta"):  # shapes alone
        model.visual = open_clip.model._build_vision_tower(config["embed_dim"], config["vision_cfg"]).eval()
    size = config["vision_cfg"]["image_size"]
    found = _OpenClip(arch, arch, model).image_features(torch.zeros(1, 3, size, size, device="meta"))
    assert found.embedding.shape == (1, config["embed_dim"]) and found.class_token.shape[-1] == found.patches.shape[-1]
    assert int(found.patches.shape[1] ** 0.5) ** 2 == found.patches.shape[1]
