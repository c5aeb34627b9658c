"""Image encoders of transformers beside CLIP: other pairs of towers, and vision towers alone."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from common.checks import UserError, reason_of
from common.encoders.checkpoint import load_weights
from common.encoders.folded import folded
from common.encoders.interface import Backbone, ImageFeatures, from_map
from common.encoders.preprocess import Preprocess
from common.encoders.processors import read_preprocess
from common.encoders.timm import import_timm
from common.pretrained import (
    load_tokenizer,
    read_config,
    require_finite,
    require_room,
    require_tokens,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from transformers.configuration_utils import PreTrainedConfig

DUAL = {
    "siglip": "Siglip",
    "altclip": "CLIP",
    "chinese_clip": "ChineseCLIP",
    "metaclip_2": "CLIP",
    "vision-text-dual-encoder": "CLIP",
}
"""model_type of two towers -> its usual image processor."""
VISION = {
    "clip_vision_model": "CLIP",
    "siglip_vision_model": "Siglip",
    "dinov2": "Bit",
    "dinov2_with_registers": "Bit",
    "dinov3_vit": "DINOv3ViT",
    "dinov3_convnext": "DINOv3ViT",
    "vit": "ViT",
    "deit": "DeiT",
    "beit": "Beit",
    "swin": "ViT",
    "swinv2": "ViT",
    "convnext": "ConvNext",
    "convnextv2": "ConvNext",
    "efficientnet": "EfficientNet",
    "resnet": "ConvNext",
    "regnet": "ConvNext",
    "bit": "Bit",
    "mobilenet_v1": "MobileNetV1",
    "mobilenet_v2": "MobileNetV2",
}
"""model_type of a vision tower alone -> its usual image processor."""
TEXTS = ("bert", "roberta", "xlm-roberta", "camembert", "clip_text_model")
"""model_type of the text towers that a vision-text-dual-encoder may have: those with a pooled output."""
WHAT = "encoder"

_LEFT_OUT = re.compile(
    "_.*|auto_map|.*attn_implementation|experts_implementation|quantization_config|use_kernels|.*dtype|architectures|"
    "id2label|label2id|task_specific_params|return_dict|output_.*|torchscript|transformers_version|name_or_path"
)
"""Fields of a config that choose code or say nothing of sizes."""
_COUNTS = re.compile(".*layers|.*depths?|num_.*blocks?.*")
_MOST_LAYERS = 512
_MOST = 10**7


class _Tower(Backbone):
    """A vision tower of transformers, and what else its family has."""

    def __init__(self, model: Any, pooled: bool = True) -> None:
        super().__init__()
        self.model, self.pooled = model, pooled

    def image_features(self, pixels: Float[Tensor, "b 3 s s"]) -> ImageFeatures:
        return self._features(self._vision(self.model, pixels), pixels)

    def packed_image_features(self, pixels: Float[Tensor, "b 3 s s"]) -> ImageFeatures:
        faster = None
        if pixels.device.type == "cpu" and pixels.dtype == torch.float32:
            faster = folded(self.model, lambda model: self._vision(model, pixels[:1]))
        if faster is None:
            return self.image_features(pixels)
        return self._features(self._vision(faster, pixels.to(memory_format=torch.channels_last)), pixels)

    def _features(self, found: Any, pixels: Tensor) -> ImageFeatures:
        tokens = found.last_hidden_state
        if tokens.ndim == 4:
            patches = from_map(tokens)
            class_token = patches.mean(1)
        else:
            extra = self._extra_tokens(tokens.shape[1], pixels.shape[-1])
            patches = tokens[:, extra:]
            class_token = tokens[:, 0] if extra else patches.mean(1)
        return ImageFeatures(class_token, patches, found.pooler_output.flatten(1) if self.pooled else class_token)

    def _vision(self, model: Any, pixels: Tensor) -> Any:
        return model(pixel_values=pixels)

    def _extra_tokens(self, tokens: int, side: int) -> int:
        """Tokens before the patches: of the class, of registers, of distillation."""
        config = getattr(self.model.config, "vision_config", self.model.config)
        if config.model_type == "dinov3_convnext":  # its mean comes first
            return 1
        patch = getattr(config, "patch_size", None)
        return max(0, tokens - (side // patch) ** 2) if isinstance(patch, int) else 0


class _VisionOnly(_Tower):
    has_text = False


class _Dual(_Tower):
    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
        super().__init__(model)
        self.tokenizer, self.length = tokenizer, length
        # SigLIP was trained on texts that are all filled to its length, and has no mask for shorter ones.
        self.padding = "max_length" if model.config.model_type == "siglip" else True

    def _vision(self, model: Any, pixels: Tensor) -> Any:
        return model.get_image_features(pixel_values=pixels)

    def text_embeddings(self, texts: list[str]) -> Float[Tensor, "b e"]:
        tokens = self.tokenizer(
            texts, padding=self.padding, truncation=True, max_length=self.length, return_tensors="pt"
        )
        return self.model.get_text_features(**tokens.to(self.model.device)).pooler_output


def load_family(source: str, kind: str) -> tuple[Backbone, Preprocess]:
    """An encoder of another family than CLIP.

    Args:
        source: directory or hub id.
        kind: the model_type in its config.json.

    Raises:
        UserError: a family that is not known here or has no pooled output, files that do not fit each other, ...;
            other errors of transformers are for `common.pretrained.loading`.
    """
    from transformers import AutoModel

    fields = read_config(source, WHAT, kind)
    _require_known(source, kind, fields)
    if any(isinstance(part, Mapping) and part.get("model_type") == "timm_wrapper" for part in fields.values()):
        import_timm()  # before transformers does
    config = _config(fields, f"config.json of {source!r}")
    preprocess = read_preprocess(source, (DUAL | VISION).get(kind, "none"), None)

    def build() -> Any:
        return AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False)

    with torch.device("meta"):
        trial = _VisionOnly(build().eval()) if kind not in DUAL else _trial_pair(build().eval())
    features = _try(source, trial, preprocess.size)
    require_room(source, WHAT, build)
    model, missing = load_weights(AutoModel, source, config, WHAT)
    # A classifier was saved without the pooling layer that it does not use: its class token is the embedding.
    unpooled = kind not in DUAL and any(key.startswith("pooler.") for key in missing)
    for key in missing:
        if not (unpooled and key.startswith("pooler.")):
            raise UserError(f"{WHAT} {source!r} lacks weights that its config.json asks for, such as {key!r}.")
    if unpooled:
        model.pooler = None
    require_finite(model.state_dict(), f"{WHAT} {source!r}")
    backbone = _pair(source, model) if kind in DUAL else _VisionOnly(model, not unpooled)
    backbone.width = features.class_token.shape[-1] if unpooled else features.embedding.shape[-1]
    backbone.patch_width = features.class_token.shape[-1]
    if backbone.has_text:
        _try_text(source, backbone)
    return backbone, preprocess


def _require_known(source: str, kind: str, fields: Mapping[str, Any]) -> None:
    """Raise UserError unless transformers itself has the family, and it takes squares of pixels."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

    known = f"use one of clip, {', '.join((*DUAL, *VISION))}"
    if kind == "siglip2":
        raise UserError(
            f"{source!r} is a 'siglip2' model, whose images have any shape (NaFlex): use a SigLIP 2 of fixed "
            f"resolution, such as google/siglip2-base-patch16-224."
        )
    if kind == "timm_wrapper":
        raise UserError(f"{source!r} is a 'timm_wrapper' model: name it timm:NAME/PATH of its weights file.")
    if "auto_map" in fields and kind not in CONFIG_MAPPING_NAMES:
        raise UserError(
            f"{WHAT} {source!r} asks to run code that comes with it (auto_map), which is never done: use weights of an "
            f"architecture that transformers itself knows."
        )
    vision = VISION.keys() | set(MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES) | {"vit_mae", "ijepa"}
    if kind not in DUAL and (kind not in vision or kind not in CONFIG_MAPPING_NAMES):
        raise UserError(f"{source!r} is a {str(kind)[:60]!r} model, no image encoder that is known here: {known}.")
    if kind == "vision-text-dual-encoder":
        for part, choices in (
            ("vision_config", ("clip_vision_model", "clip", "timm_wrapper", *VISION)),
            ("text_config", TEXTS),
        ):
            inner = fields.get(part)
            found = inner.get("model_type") if isinstance(inner, Mapping) else inner
            if found not in choices:
                raise UserError(
                    f"config.json of {source!r}, {part}: model_type is {str(found)[:60]!r}: use one of "
                    f"{', '.join(choices)}."
                )


def _config(fields: Mapping[str, Any], place: str) -> PreTrainedConfig:
    """transformers' config of the sizes in `fields`, none of them absurd; what would choose code is left out."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[fields["model_type"]](**_believed(fields, place))


def _believed(fields: Mapping[str, Any], place: str, depth: int = 0) -> dict[str, Any]:
    """Fields without those that choose code, nested ones too.

    Raises:
        UserError: a number that no encoder has.
    """
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if _LEFT_OUT.fullmatch(name):
            continue
        if isinstance(value, Mapping):
            if depth > 2:
                raise UserError(f"{place} is nested too deep at {name}: use what was saved with the weights.")
            found[name] = _believed(value, f"{place}, {name}", depth + 1)
            continue
        numbers = list(_numbers(value))
        if name == "num_channels" and value != 3:
            raise UserError(f"{place}: num_channels is {str(value)[:60]}: use 3.")
        most = _MOST_LAYERS if _COUNTS.fullmatch(name) else _MOST
        if any(not math.isfinite(x) or abs(x) > most for x in numbers) or len(numbers) > 10_000:
            raise UserError(f"{place}: {name} is {str(value)[:60]}: use numbers up to {most}.")
        found[name] = value
    return found


def _numbers(value: Any) -> Iterator[float]:
    """Every number in a value and its lists."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield value
    elif isinstance(value, list):
        for one in value:
            yield from _numbers(one)


def _trial_pair(model: Any) -> Backbone:
    return _Dual(model, None, 0)  # type: ignore[arg-type]  # of images alone


def _try(source: str, backbone: Backbone, size: int) -> ImageFeatures:
    """The features of one image on torch's meta device, where shapes are all there is: whether the config can work.

    Raises:
        UserError: there is no pooled output, or shapes do not fit.
    """
    pixels = torch.zeros(1, 3, size, size, device="meta")
    try:
        found = backbone.image_features(pixels)
    except AttributeError as error:
        if "flatten" not in str(error) and "pooler_output" not in str(error):
            raise
        raise UserError(
            f"{WHAT} {source!r} has no pooled output, which would be its embedding: use one of {', '.join(VISION)}."
        ) from error
    except (ValueError, RuntimeError, TypeError) as error:
        raise UserError(
            f"{WHAT} {source!r}: its config.json and an image of {size} x {size} pixels, as its processor makes it, do "
            f"not fit ({reason_of(error)}): use both as they were saved with the weights."
        ) from error
    if 0 in (*found.patches.shape, *found.embedding.shape):
        raise UserError(f"{WHAT} {source!r}: an image of {size} x {size} pixels has no patch: use its own config.json.")
    return found


def _pair(source: str, model: Any) -> _Dual:
    """Both towers with the tokenizer of the second."""
    text = model.config.text_config
    try:
        tokenizer = load_tokenizer(source, model.config)
    except ImportError as error:
        raise UserError(
            f"{WHAT} {source!r}: its tokenizer needs a package that is not here: pip install sentencepiece."
        ) from error
    require_words(source, WHAT, tokenizer)
    require_tokens(source, WHAT, tokenizer, text.vocab_size)
    if tokenizer.pad_token_id is None:
        raise UserError(f"{WHAT} {source!r}: the tokenizer has no pad_token: use the one that it was trained with.")
    end = getattr(text, "eos_token_id", None)
    if model.config.model_type == "metaclip_2" and end != tokenizer.eos_token_id:
        raise UserError(
            f"{WHAT} {source!r}: the tokenizer ends texts with {tokenizer.eos_token_id}, the text tower with {end}: "
            f"use the tokenizer that it was trained with."
        )
    positions = text.max_position_embeddings
    if "roberta" in text.model_type or text.model_type in ("camembert", "altclip_text_model"):
        positions -= text.pad_token_id + 1  # the first ones are of padding
    return _Dual(model, tokenizer, min(positions, tokenizer.model_max_length))


def require_words(source: str, what: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError when a tokenizer has but its special tokens, as transformers' without their file."""
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise UserError(f"{what} {source!r}: its tokenizer knows no words: copy tokenizer.json from where it comes.")


def _try_text(source: str, backbone: Backbone) -> None:
    """Raise UserError when tokenizer and text tower do not work together."""
    with torch.no_grad():
        try:
            found = backbone.text_embeddings(["a photo"])
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f"{WHAT} {source!r}: its tokenizer and its text tower do not fit ({reason_of(error)}): use both as "
                f"they were saved with the weights."
            ) from error
    if found.shape != (1, backbone.width):
        raise UserError(
            f"{WHAT} {source!r}: texts have embeddings of width {found.shape[-1]}, images of width {backbone.width}: "
            f"use the config.json that the weights were saved with."
        )
