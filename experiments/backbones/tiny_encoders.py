"""Tiny random encoders of every family, saved as their libraries save them: what tables and tests load."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

SIZE = 32
"""Side of the images that they see, in pixels."""
WORDS = "a the red blue photo of cat dog cube ball on two small large <unk-word>".split()

_TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
_VIT = _TOWER | {"image_size": SIZE, "patch_size": 8}
_CONV = {"hidden_sizes": [8, 16], "depths": [1, 1]}
_PIXELS = {"size": {"height": 40, "width": 40}, "do_center_crop": True, "crop_size": {"height": SIZE, "width": SIZE}}
_SHORT = _PIXELS | {"size": {"shortest_edge": 36}}
_SQUARE = {"size": {"height": SIZE, "width": SIZE}}


def save_tokenizer(directory: Path, kind: str) -> Any:
    """A tokenizer of a few words in a directory, of the class that a family's checkpoints name."""
    if kind == "bert":
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
        tokenizer: Any = transformers.BertTokenizer(vocab={word: number for number, word in enumerate(words)})
    elif kind == "xlm-roberta":
        words = ["<s>", "<pad>", "</s>", "<unk>", *("\u2581" + word for word in WORDS), *"abcdefghijklmnopqrstuvwxyz"]
        tokenizer = transformers.XLMRobertaTokenizer(vocab=[(word, -float(n)) for n, word in enumerate(words)])
    elif kind == "gemma":
        words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581", *"abcdefghijklmnopqrstuvwxyz"]
        tokenizer = transformers.GemmaTokenizer(vocab={word: n for n, word in enumerate(words)}, merges=[])
    else:
        letters = sorted(set("abcdefghijklmnopqrstuvwxyz"))
        tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
        tokenizer = transformers.CLIPTokenizer(vocab={token: n for n, token in enumerate(tokens)}, merges=[])
    tokenizer.save_pretrained(directory)
    return tokenizer


def shake(model: nn.Module) -> nn.Module:
    """Random weights far from their start, biases, norms and running statistics too, so that no term can hide."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                noise = torch.randn_like(value)
                if not bool((value.abs() < 100).all()):  # CoCa leaves some as memory has them
                    value.zero_()
                value.add_(noise.abs() if "running_var" in name else 0.1 * noise)
    return model.eval()


def _text(tokenizer: Any, **more: Any) -> dict[str, Any]:
    sizes = _TOWER | {"vocab_size": len(tokenizer), "max_position_embeddings": 16}
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    return sizes | ends | {"bos_token_id": tokenizer.bos_token_id} | more


def _clip(tokenizer: Any) -> nn.Module:
    config = transformers.CLIPConfig(text_config=_text(tokenizer), vision_config=_VIT, projection_dim=12)
    return transformers.CLIPModel(config)


def _metaclip_2(tokenizer: Any) -> nn.Module:
    config = transformers.MetaClip2Config(text_config=_text(tokenizer), vision_config=_VIT, projection_dim=12)
    return transformers.MetaClip2Model(config)


def _siglip(tokenizer: Any) -> nn.Module:
    text = _text(tokenizer, projection_size=16)
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=_VIT))


def _altclip(tokenizer: Any) -> nn.Module:
    text = _text(tokenizer, project_dim=12, max_position_embeddings=20)
    config = transformers.AltCLIPConfig(text_config=text, vision_config=_VIT, projection_dim=12)
    return transformers.AltCLIPModel(config)


def _chinese_clip(tokenizer: Any) -> nn.Module:
    config = transformers.ChineseCLIPConfig(text_config=_text(tokenizer), vision_config=_VIT, projection_dim=12)
    return transformers.ChineseCLIPModel(config)


def _pair(tokenizer: Any) -> nn.Module:
    text = transformers.BertConfig(**_text(tokenizer))
    vision = transformers.ViTConfig(**_VIT)
    config = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=12)
    return transformers.VisionTextDualEncoderModel(config)


DUAL: dict[str, tuple[str, str, dict[str, Any], Callable[[Any], nn.Module]]] = {
    "CLIP, MetaCLIP": ("clip", "CLIP", _SHORT, _clip),
    "MetaCLIP 2": ("xlm-roberta", "CLIP", _SHORT, _metaclip_2),
    "SigLIP": ("xlm-roberta", "Siglip", _SQUARE, _siglip),
    "SigLIP 2": ("gemma", "Siglip", _SQUARE | {"resample": 2}, _siglip),
    "AltCLIP": ("xlm-roberta", "CLIP", _SHORT, _altclip),
    "Chinese-CLIP": ("bert", "ChineseCLIP", _SQUARE | {"do_center_crop": False}, _chinese_clip),
    "vision-text-dual-encoder (ViT, BERT)": ("bert", "ViT", _SQUARE, _pair),
}
"""Family -> tokenizer, image processor, its settings, model."""


def _vision(name: str, **sizes: Any) -> Callable[[], nn.Module]:
    config, model = (getattr(transformers, f"{name}{part}") for part in ("Config", "Model"))
    return lambda: model(config(**sizes))


_SWIN = {"image_size": SIZE, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
VISION: dict[str, tuple[str, dict[str, Any], Callable[[], nn.Module]]] = {
    "CLIP's vision tower": ("CLIP", _SHORT, _vision("CLIPVision", **_VIT)),
    "SigLIP's vision tower": ("Siglip", _SQUARE, _vision("SiglipVision", **_VIT)),
    "DINOv2": ("Bit", _SHORT, _vision("Dinov2", **_VIT | {"image_size": 48, "mlp_ratio": 2})),
    "DINOv2 with registers": (
        "Bit",
        _SHORT,
        _vision("Dinov2WithRegisters", **_VIT | {"image_size": 48, "mlp_ratio": 2, "num_register_tokens": 4}),
    ),
    "DINOv3": ("DINOv3ViT", _SQUARE, _vision("DINOv3ViT", **_VIT | {"num_register_tokens": 4})),
    "DINOv3 ConvNeXt": (
        "DINOv3ViT",
        _SQUARE,
        _vision("DINOv3ConvNext", hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1]),
    ),
    "ViT": ("ViT", _SQUARE, _vision("ViT", **_VIT)),
    "DeiT": ("DeiT", _PIXELS, _vision("DeiT", **_VIT)),
    "BEiT": ("Beit", _SQUARE, _vision("Beit", **_VIT | {"use_mean_pooling": True})),
    "Swin": ("ViT", _SQUARE, _vision("Swin", **_SWIN)),
    "Swin V2": ("ViT", _SQUARE, _vision("Swinv2", **_SWIN)),
    "ConvNeXt": ("ConvNext", {"size": {"shortest_edge": SIZE}}, _vision("ConvNext", **_CONV, num_stages=2)),
    "ConvNeXt V2": ("ConvNext", {"size": {"shortest_edge": SIZE}}, _vision("ConvNextV2", **_CONV, num_stages=2)),
    "EfficientNet": (
        "EfficientNet",
        _SQUARE,
        _vision(
            "EfficientNet",
            image_size=SIZE,
            width_coefficient=0.25,
            depth_coefficient=0.2,
            hidden_dim=320,
            in_channels=[32, 16],
            out_channels=[16, 24],
            kernel_sizes=[3, 3],
            strides=[1, 2],
            num_block_repeats=[1, 1],
            expand_ratios=[1, 6],
            depthwise_padding=[],
        ),
    ),
    "ResNet": (
        "ConvNext",
        {"size": {"shortest_edge": SIZE}},
        _vision("ResNet", **_CONV, embedding_size=8, layer_type="basic"),
    ),
    "RegNet": (
        "ConvNext",
        {"size": {"shortest_edge": SIZE}},
        _vision("RegNet", **_CONV, embedding_size=8, groups_width=8),
    ),
    "BiT": ("Bit", _SHORT, _vision("Bit", **_CONV, embedding_size=8, num_groups=4)),
    "MobileNet V1": ("MobileNetV1", _SHORT, _vision("MobileNetV1", image_size=SIZE, depth_multiplier=0.25)),
    "MobileNet V2": ("MobileNetV2", _SHORT, _vision("MobileNetV2", image_size=SIZE, depth_multiplier=0.25)),
}
"""Family -> image processor, its settings, model."""


def save_encoder(family: str, directory: Path) -> Path:
    """A tiny random model of a family, with its processor and, in a pair of towers, its tokenizer.

    Args:
        family: of `DUAL` or `VISION`.
        directory: made, when it is missing.
    """
    directory.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    if family in DUAL:
        kind, processor, settings, build = DUAL[family]
        model = build(save_tokenizer(directory, kind))
    else:
        processor, settings, alone = VISION[family]
        model = alone()
    shake(model).save_pretrained(directory)  # type: ignore[operator]
    fields = {"image_processor_type": f"{processor}ImageProcessor", **settings}
    (directory / "preprocessor_config.json").write_text(json.dumps(fields))
    return directory


_OPEN_TEXT = {"context_length": 20, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
_OPEN_VIT = {"image_size": SIZE, "layers": 2, "width": 16, "head_width": 8, "mlp_ratio": 2.0, "patch_size": 8}


def _timm_tower(name: str, size: int, **pooling: str) -> dict[str, Any]:
    return {
        "embed_dim": 64,
        "vision_cfg": {"image_size": size, "timm_model_name": name, "timm_proj": "linear", **pooling},
        "text_cfg": _OPEN_TEXT,
    }


OPEN_CLIP: dict[str, dict[str, Any]] = {
    "open_clip's ViT": {"embed_dim": 12, "vision_cfg": _OPEN_VIT, "text_cfg": _OPEN_TEXT},
    "open_clip's ResNet": {
        "embed_dim": 12,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
        "text_cfg": _OPEN_TEXT,
    },
    "CoCa's image side": {
        "embed_dim": 12,
        "vision_cfg": _OPEN_VIT
        | {"attentional_pool": True, "attn_pooler_queries": 5, "attn_pooler_heads": 2}
        | {"output_tokens": True},
        "text_cfg": _OPEN_TEXT | {"embed_cls": True, "output_tokens": True},
        "multimodal_cfg": _OPEN_TEXT | {"attn_pooler_heads": 2},
        "custom_text": True,
    },
    "timm's ViT by class token (EVA02, MobileCLIP2-B)": _timm_tower("test_vit", 160, timm_pool="token"),
    "timm's ViT by attention pooling (SigLIP 2, PE)": _timm_tower("test_vit2", 160, timm_pool="map", timm_proj="none"),
    "timm's convolutions (ConvNeXt, MobileCLIP2-S, ViTamin)": _timm_tower("test_convnext", 160, timm_proj="mlp"),
}
"""Family -> architecture, as open_clip's JSON files have it."""
TIMM = ("test_vit", "test_vit3", "test_convnext", "test_resnet", "test_efficientnet", "test_nfnet")
TORCHVISION = ("squeezenet1_1",)


def save_open_clip(family: str, directory: Path) -> tuple[Any, ...]:
    """A tiny random model of a family of `OPEN_CLIP`.

    Returns:
        Its name for `load_clip`, and as open_clip computes them: pixels, image embeddings, text embeddings.
    """
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2

    arch = f"tiny-{list(OPEN_CLIP).index(family)}"
    (directory / f"{arch}.json").write_text(json.dumps(OPEN_CLIP[family]))
    open_clip.add_model_config(directory / f"{arch}.json")
    model: Any = shake(open_clip.create_model(arch))
    torch.save(model.state_dict(), directory / f"{arch}.pt")
    transform = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    tokenizer = open_clip.get_tokenizer(arch)
    return (
        f"open_clip:{arch}/{directory}/{arch}.pt",
        lambda image: transform(image)[None],
        lambda pixels: model.encode_image(pixels, normalize=False),
        lambda texts: model.encode_text(tokenizer(texts), normalize=False),
    )


def save_timm(name: str, directory: Path) -> tuple[Any, ...]:
    """A timm model of random weights: its name for `load_clip`, and timm's pixels and image embeddings."""
    import timm
    from timm.data import create_transform, resolve_model_data_config

    model: Any = shake(timm.create_model(name))
    torch.save(model.state_dict(), directory / f"{name}.pth")
    model.reset_classifier(0)
    transform: Any = create_transform(**resolve_model_data_config(model), is_training=False)
    return f"timm:{name}/{directory}/{name}.pth", lambda image: transform(image)[None], model


def save_torchvision(name: str, directory: Path) -> tuple[Any, ...]:
    """A torchvision classifier of random weights: its name for `load_clip`, and torchvision's pixels and embeddings."""
    from torchvision import models

    model: Any = shake(models.get_model(name))
    torch.save(model.state_dict(), directory / f"{name}.pth")
    transform = models.get_model_weights(name).DEFAULT.transforms()  # type: ignore[attr-defined]
    model.classifier[1] = nn.Identity()  # SqueezeNet's
    return f"torchvision:{name}/{directory}/{name}.pth", lambda image: transform(image)[None], model
