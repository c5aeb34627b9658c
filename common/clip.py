"""Frozen CLIP behind one interface, whichever library holds the weights: packaged, Hugging Face or open_clip."""

from __future__ import annotations

import difflib
import json
import os
import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from common.checks import UserError, require_file
from common.images import to_rgb as to_rgb
from common.pretrained import (
    ASSETS,
    DROPOUT,
    EPSILON,
    LAYERS,
    SIZE,
    SWITCH,
    Rule,
    checked,
    load_tokenizer,
    loading,
    locate,
    number,
    one_of,
    read_config,
    require_finite,
    require_plain,
    require_reachable,
    require_room,
    require_tokens,
    whole,
)
from common.runtime import resolve_device

if TYPE_CHECKING:
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerBase

PACKAGED = {"tiny": ASSETS / "clip-tiny"}
OPEN_CLIP_PREFIX = "open_clip:"
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
WIDEST_ASPECT = 32
LARGEST = 8192
"""Side of an encoder's square in pixels, far above that of any there is."""


class ImageFeatures(NamedTuple):
    """What the vision tower knows of a batch of images."""

    class_token: Float[Tensor, "b w"]
    """ViT: the class token of the last hidden state, before the final layer norm and the projection (DietNeRF's
    choice). ResNet, which has none: the spatial mean of `patches`, the query of its attention pooling."""
    patches: Float[Tensor, "b n w"]
    """ViT: the patch tokens beside it, row by row. ResNet: the feature map before attention pooling, flattened."""
    embedding: Float[Tensor, "b e"]
    """After the projection, not normalised: what `FrozenCLIP.encode_images` gives."""


def load_clip(
    name: str | os.PathLike[str],
    *,
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
) -> FrozenCLIP:
    """Load a CLIP and freeze it.

    Args:
        name: "tiny" (packaged, offline); a Hugging Face id such as "openai/clip-vit-base-patch32" or a directory;
            or "open_clip:ARCH/TAG" and "open_clip:ARCH/PATH" with PATH a .pt, .bin or .safetensors file, such as
            "open_clip:RN50/openai" or "open_clip:ViT-B-32-quickgelu//data/ViT-B-32.safetensors". A tag knows
            its activation; with a path, ARCH must name it: OpenAI's weights need the "-quickgelu" kind.
        device: "auto", "cpu", "cuda", ...
        dtype: of the weights; None is float32 whatever the file holds.

    Raises:
        UserError: the name is unknown, files are missing, corrupt or of other sizes, or it is not a CLIP.
    """
    target = resolve_device(device)
    text = os.fspath(name)
    try:
        if text.startswith(OPEN_CLIP_PREFIX):
            backbone, preprocess = _load_open_clip(text)
        else:
            backbone, preprocess = _load_hugging_face(text)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"CLIP {text!r}: the weights file is corrupt or holds more than weights: copy it again."
        ) from error
    return FrozenCLIP(text, backbone.to(device=target, dtype=dtype or torch.float32), preprocess)


def _three(least: float, most: float) -> Rule:
    one = number(least, most)
    return Rule(
        lambda value: isinstance(value, tuple) and len(value) == 3 and all(map(one.holds, value)),
        f"three numbers from {least} to {most}, for pixels from 0 to 1",
    )


PREPROCESSING = {
    "size": whole(1, LARGEST),
    "mean": _three(0, 1),
    "std": _three(0.001, 10),
    "interpolation": one_of("bicubic", "bilinear", "nearest"),
    "squash": SWITCH,
}
"""What the fields of `Preprocess` may be."""


@dataclass(frozen=True)
class Preprocess:
    """Images -> CLIP's pixels. Holds no weights, so a DataLoader's workers can carry it."""

    size: int
    """Side of the square that the vision tower sees, in pixels."""
    mean: tuple[float, ...] = OPENAI_MEAN
    std: tuple[float, ...] = OPENAI_STD
    interpolation: str = "bicubic"
    squash: bool = False
    """Resize both sides to `size`; otherwise the shorter side, and crop the centre."""

    def __post_init__(self) -> None:
        checked(asdict(self), PREPROCESSING, "preprocessing")

    def __call__(
        self, images: Image.Image | Sequence[Image.Image] | Float[Tensor, "b 3 h w"]
    ) -> Float[Tensor, "b 3 s s"]:
        """Resize with antialiasing, crop the centre, rescale and normalise (Radford et al. 2021).

        Args:
            images: PIL images of any size and mode (the first frame, upright, over white), one or many; or a
                float tensor in [0, 1], through which gradients flow. The tensor's resize is not clipped to [0, 1]
                as PIL's is, so that no pixel loses its gradient.

        Returns:
            float32; on the CPU for PIL images, on their own device for tensors.

        Raises:
            UserError: no images, wrong shape or type, NaN, values outside [0, 1], a file that cannot be read.
        """
        from torchvision.transforms import functional

        if isinstance(images, Tensor):
            _check_image_tensor(images)
            pixels = self._fit(images.float())
        else:
            several = [images] if isinstance(images, Image.Image) else list(images)
            if not several:
                raise UserError("images is empty: give at least one image.")
            pixels = torch.stack([functional.to_tensor(self._fit(to_rgb(image))) for image in several])
        return functional.normalize(pixels, list(self.mean), list(self.std))

    def _fit(self, image: Any) -> Any:
        """Resize and crop a PIL image or a tensor to the square."""
        from torchvision.transforms import functional

        kind = functional.InterpolationMode(self.interpolation)
        if self.squash:
            return functional.resize(image, [self.size, self.size], kind, antialias=True)
        _, height, width = functional.get_dimensions(image)
        longest = WIDEST_ASPECT * min(height, width)
        if max(height, width) > longest:  # a strip: the crop would drop all but its middle after a huge resize
            image = functional.center_crop(image, [min(height, longest), min(width, longest)])
        return functional.center_crop(
            functional.resize(image, [self.size], kind, antialias=True), [self.size, self.size]
        )


class FrozenCLIP(nn.Module):
    """A CLIP whose weights never change; use `load_clip` to make one.

    It may sit inside a module that is trained: it stays in eval mode and follows `.to()`, but has no parameters
    and nothing in `state_dict()`, so no optimizer and no checkpoint ever holds it.
    """

    def __init__(self, name: str, backbone: _Backbone, preprocess: Preprocess) -> None:
        super().__init__()
        self.name = name
        self.preprocess = preprocess
        backbone.requires_grad_(False).eval()
        self._unregistered = (backbone,)  # a tuple hides it from parameters(), state_dict() and train()
        self.training = False

    @property
    def image_size(self) -> int:
        """Side of the images that the vision tower sees, in pixels (s)."""
        return self.preprocess.size

    @property
    def mean(self) -> tuple[float, ...]:
        """Of the red, green and blue that `preprocess` subtracts."""
        return self.preprocess.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Of the red, green and blue that `preprocess` divides by."""
        return self.preprocess.std

    @property
    def width(self) -> int:
        """Width of embeddings (e)."""
        return self.backbone.width

    @property
    def patch_width(self) -> int:
        """Width of the vision tower's features (w)."""
        return self.backbone.patch_width

    @property
    def device(self) -> torch.device:
        return next(self.backbone.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.backbone.parameters()).dtype

    def encode_images(self, pixels: Float[Tensor, "b 3 s s"], *, packed: bool = False) -> Float[Tensor, "b e"]:
        """Embeddings, not normalised, of what `preprocess` gave. Gradients reach `pixels` when it asks for them.

        Args:
            pixels: of images.
            packed: as in `encode_image_features`.
        """
        return self.encode_image_features(pixels, packed=packed).embedding

    def encode_image_features(self, pixels: Float[Tensor, "b 3 s s"], *, packed: bool = False) -> ImageFeatures:
        """The embeddings together with the class token and patches that they are made from.

        Args:
            pixels: of images.
            packed: without gradients, and on a CPU by a second copy of the vision tower's weights that is faster there
                (`common.vision`); where there is none (a GPU, open_clip's towers), by the tower itself.

        Raises:
            UserError: `pixels` has another shape than (b, 3, s, s).
        """
        size = self.image_size
        if pixels.ndim != 4 or pixels.shape[1:] != (3, size, size):
            raise UserError(
                f"pixels has shape {tuple(pixels.shape)}: {self.name!r} needs (b, 3, {size}, {size}); use preprocess."
            )
        if not packed:
            return self.backbone.image_features(pixels.to(self.device, self.dtype))
        with torch.no_grad():
            return self.backbone.packed_image_features(pixels.to(self.device, self.dtype))

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Float[Tensor, "b e"]:
        """Embeddings, not normalised, of texts, each cut to the tower's context length.

        Raises:
            UserError: no texts, or one string instead of a list.
        """
        if isinstance(texts, str):
            raise UserError(f"texts is the string {texts!r}: give a list of strings.")
        if not len(texts):
            raise UserError("texts is empty: give at least one text.")
        return self.backbone.text_embeddings(list(texts))

    def train(self, mode: bool = True) -> FrozenCLIP:
        """Stays in eval mode."""
        return self

    def requires_grad_(self, requires_grad: bool = True) -> FrozenCLIP:
        """Stays frozen."""
        return self

    @property
    def backbone(self) -> _Backbone:
        """The two towers as their library holds them: to be read, for this module hides them from all training."""
        return self._unregistered[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenCLIP:
        """What `.to()`, `.cuda()`, `.bfloat16()`, ... call, also from a module around this one."""
        self.backbone._apply(fn)
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"{self.name!r}, image_size={self.image_size}, width={self.width}, patch_width={self.patch_width}"


class _Backbone(nn.Module, ABC):
    """The two towers as one library holds them."""

    width: int
    patch_width: int

    @abstractmethod
    def image_features(self, pixels: Float[Tensor, "b 3 s s"]) -> ImageFeatures: ...

    def packed_image_features(self, pixels: Float[Tensor, "b 3 s s"]) -> ImageFeatures:
        """`image_features` by a copy that is for inference alone, where there is one."""
        return self.image_features(pixels)

    @abstractmethod
    def text_embeddings(self, texts: list[str]) -> Float[Tensor, "b e"]: ...


class _HuggingFace(_Backbone):
    def __init__(self, model: CLIPModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.width: int = model.config.projection_dim
        self.patch_width: int = model.config.vision_config.hidden_size

    def image_features(self, pixels: Float[Tensor, "b 3 s s"]) -> ImageFeatures:
        vision = self.model.vision_model(pixel_values=pixels)
        tokens = vision.last_hidden_state  # (b, 1 + n, w)
        return ImageFeatures(tokens[:, 0], tokens[:, 1:], self.model.visual_projection(vision.pooler_output))

    def packed_image_features(self, pixels: Float[Tensor, "b 3 s s"]) -> ImageFeatures:
        from common.vision import packed_vision

        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else pixels.dtype
        vision = packed_vision(self.model, dtype)
        if vision is None:
            return self.image_features(pixels)
        with torch.autocast("cpu", enabled=False):  # all is in `dtype` already
            tokens, embedding = vision(pixels)
        return ImageFeatures(tokens[:, 0], tokens[:, 1:], embedding)

    def text_embeddings(self, texts: list[str]) -> Float[Tensor, "b e"]:
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        text = self.model.text_model(**tokens.to(self.model.device))
        return self.model.text_projection(text.pooler_output)


class _OpenClip(_Backbone):
    def __init__(self, model: Any, tokenizer: Callable[[list[str]], Tensor]) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.has_class_token = hasattr(model.visual, "class_embedding")
        self.width: int = model.visual.output_dim
        self.patch_width: int = (
            model.visual.class_embedding.shape[0] if self.has_class_token else model.visual.attnpool.q_proj.in_features
        )

    def image_features(self, pixels: Float[Tensor, "b 3 s s"]) -> ImageFeatures:
        visual = self.model.visual
        if self.has_class_token:
            found = visual.forward_intermediates(pixels, indices=1, output_fmt="NLC", output_extra_tokens=True)
            class_token = found["image_intermediates_prefix"][0][:, 0]
            return ImageFeatures(class_token, found["image_intermediates"][0], found["image_features"])
        found = visual.forward_intermediates(pixels, indices=1)
        patches = found["image_intermediates"][0].flatten(2).transpose(1, 2)  # (b, n, w)
        return ImageFeatures(patches.mean(dim=1), patches, found["image_features"])

    def text_embeddings(self, texts: list[str]) -> Float[Tensor, "b e"]:
        return self.model.encode_text(self.tokenizer(texts).to(self.model.logit_scale.device))


def _load_hugging_face(name: str) -> tuple[_Backbone, Preprocess]:
    from transformers import CLIPModel

    source = locate(name, PACKAGED, "CLIP")
    with loading(source, PACKAGED, "CLIP"):
        if not Path(source).is_dir():
            require_reachable(source, ("config.json",))
        config = _clip_config(read_config(source, "CLIP", "clip"), f"config.json of {source!r}")
        preprocess = _read_preprocess(source, config.vision_config.image_size)
        require_room(source, "CLIP", lambda: CLIPModel(config))
        model, report = CLIPModel.from_pretrained(
            source,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
        )
        for key, found, needed in sorted(report["mismatched_keys"]):
            raise UserError(
                f"CLIP {source!r}: {key} has shape {tuple(found)} but its config.json asks for {tuple(needed)}: "
                f"use the config.json that the weights were saved with."
            )
        for key in sorted(report["missing_keys"]):
            raise UserError(f"CLIP {source!r} lacks weights that its config.json asks for, such as {key!r}.")
        require_finite(model.state_dict(), f"CLIP {source!r}")
        tokenizer = load_tokenizer(source, config)
        require_tokens(source, "CLIP", tokenizer, config.text_config.vocab_size)
        end = config.text_config.eos_token_id
        if end not in (2, tokenizer.eos_token_id):  # 2: old configs
            raise UserError(
                f"CLIP {source!r}: the tokenizer ends texts with {tokenizer.eos_token_id}, the text tower with {end}: "
                f"use the tokenizer that it was trained with."
            )
        if tokenizer.pad_token_id is None:
            raise UserError(f"CLIP {source!r}: the tokenizer has no pad_token: use the one that it was trained with.")
    return _HuggingFace(model, tokenizer), preprocess


def _clip_config(fields: Mapping[str, Any], place: str) -> CLIPConfig:
    """transformers' config of the sizes and functions in `fields`; nothing else there is believed."""
    from transformers import CLIPConfig
    from transformers.activations import ACT2FN

    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "num_attention_heads"), SIZE)
    tower = sizes | {"num_hidden_layers": LAYERS, "hidden_act": one_of(*ACT2FN), "layer_norm_eps": EPSILON}
    tower |= {"attention_dropout": DROPOUT}
    text = tower | dict.fromkeys(("vocab_size", "max_position_embeddings"), SIZE) | {"eos_token_id": whole(0, 10**7)}
    side = whole(1, LARGEST)
    vision = tower | {"num_channels": one_of(3), "image_size": side, "patch_size": side}
    parts = {
        name: checked(fields[name], rules, f"{place}, {name}")
        for part, rules in (("text_config", text), ("vision_config", vision))
        for name in (part, f"{part}_dict")  # the second in old files, where it counts more
        if fields.get(name) is not None
    }
    config = CLIPConfig(**checked(fields, {"projection_dim": SIZE}, place), **parts)
    for part, one in (("text_config", config.text_config), ("vision_config", config.vision_config)):
        if one.hidden_size % one.num_attention_heads:
            raise UserError(
                f"{place}, {part}: num_attention_heads is {one.num_attention_heads}: use a divisor of hidden_size "
                f"{one.hidden_size}."
            )
    if config.vision_config.patch_size > config.vision_config.image_size:
        raise UserError(
            f"{place}, vision_config: patch_size is {config.vision_config.patch_size}: use at most image_size "
            f"{config.vision_config.image_size}."
        )
    return config


def _read_preprocess(source: str, size: int) -> Preprocess:
    """The preprocessing that was saved with weights, or OpenAI's where none was; it must make squares of `size`."""
    from transformers.utils import cached_file

    for file in ("processor_config.json", "preprocessor_config.json"):
        found = cached_file(source, file, _raise_exceptions_for_missing_entries=False)
        fields = json.loads(Path(found).read_text(encoding="utf-8")) if found else None
        if found and file == "processor_config.json":  # of images, text and more
            fields = fields.get("image_processor") if isinstance(fields, dict) else None
        if fields is not None:
            break
    else:
        return Preprocess(size)
    place = f"{file} of {source!r}"
    yes = one_of(True)
    rules = {"do_resize": yes, "do_rescale": yes, "do_normalize": yes, "do_center_crop": SWITCH}
    rules |= {"resample": one_of(2, 3), "rescale_factor": number(0.0039, 0.00393)}
    checked(fields, rules, place)
    crops, square = fields.get("do_center_crop", True), {"height": size, "width": size}
    squash = fields.get("size") == square
    usual = (size, {"shortest_edge": size}) if crops else ()
    if not squash and "size" in fields and fields["size"] not in usual:
        raise UserError(f"{place}: size is {fields['size']!r}: the vision tower sees {size} pixels, use {square}.")
    if crops and fields.get("crop_size", size) not in (size, square):
        raise UserError(f"{place}: crop_size is {fields['crop_size']!r}: the vision tower sees {size}, use {square}.")
    given = {f"image_{name}": fields.get(f"image_{name}") for name in ("mean", "std")}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    checked(given, {f"image_{name}": PREPROCESSING[name] for name in ("mean", "std")}, place)
    interpolation = "bilinear" if fields.get("resample") == 2 else "bicubic"
    return Preprocess(size, given["image_mean"], given["image_std"], interpolation, squash)


def _load_open_clip(name: str) -> tuple[_Backbone, Preprocess]:
    import open_clip
    from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME

    arch, _, weights = name.removeprefix(OPEN_CLIP_PREFIX).partition("/")
    if arch not in open_clip.list_models():
        near = difflib.get_close_matches(arch, open_clip.list_models(), n=5, cutoff=0)
        raise UserError(f"open_clip has no architecture {arch!r}: choose one such as {', '.join(near)}.")
    architecture = open_clip.get_model_config(arch)
    if "timm_model_name" in architecture["vision_cfg"] or "multimodal_cfg" in architecture:
        raise UserError(
            f"open_clip architecture {arch!r} is neither CLIP's ViT nor its ResNet: use one such as ViT-B-32 or RN50."
        )
    tags = open_clip.list_pretrained_tags_by_model(arch)
    if not weights:
        raise UserError(
            f"CLIP {name!r} names no weights: add /PATH of a checkpoint, or /TAG, one of {', '.join(tags)}."
        )
    tagged = open_clip.get_pretrained_cfg(arch, weights)
    if not tagged and (Path(weights).suffix in (".pt", ".pth", ".bin", ".safetensors") or os.path.exists(weights)):
        weights = str(require_file(Path(weights).expanduser(), "open_clip checkpoint"))
    elif not tagged:
        raise UserError(
            f"open_clip has no weights {weights!r} for {arch!r}: give a file's path, or one of {', '.join(tags)}."
        )
    state = None if tagged else _read_checkpoint(weights)
    with loading(name, PACKAGED, "CLIP"):
        if tagged.get("hf_hub"):
            repository, file = os.path.split(tagged["hf_hub"])
            require_reachable(repository, (file,) if file else (HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME))
        model = open_clip.create_model(
            arch,
            pretrained=weights if tagged else None,
            force_quick_gelu=tagged.get("quick_gelu", False),
            pretrained_hf=False,
            load_weights_only=True,
        )
        # transformers' own tokenizers may come with code; open_clip's has none and knows no such option
        trust = {"trust_remote_code": False} if "hf_tokenizer_name" in architecture["text_cfg"] else {}
        tokenizer = open_clip.get_tokenizer(arch, **trust)
    if state is not None:
        _put_in(model, arch, state, weights)
    if tagged:
        require_finite(model.state_dict(), f"CLIP {name!r}")
    config = model.visual.preprocess_cfg
    if config["resize_mode"] == "longest":
        raise UserError(f"CLIP {name!r} pads its images, which is not supported: use other weights.")
    size = config["size"]
    preprocess = Preprocess(
        size=size if isinstance(size, int) else size[0],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=config["interpolation"],
        squash=config["resize_mode"] == "squash",
    )
    return _OpenClip(model, tokenizer), preprocess


def _read_checkpoint(path: str) -> dict[str, Tensor]:
    """The weights in a checkpoint file, without running any code that it may hold."""
    from open_clip.factory import load_state_dict

    try:
        state = {str(key): value for key, value in load_state_dict(path, weights_only=True).items()}
    except Exception as error:  # pickle, zip, safetensors and torch each have their own for a broken file
        if "TorchScript" in str(error):
            raise UserError(
                f"open_clip checkpoint {path!r} is a TorchScript program, which is not loaded for safety: "
                f"keep its weights only, torch.save(torch.jit.load(PATH).float().state_dict(), NEW_PATH)."
            ) from error
        raise UserError(
            f"open_clip checkpoint {path!r} is corrupt, cut short or not a checkpoint: copy it again."
        ) from error
    for key in ("input_resolution", "context_length", "vocab_size"):  # notes in OpenAI's files
        state.pop(key, None)
    require_plain(state, f"open_clip checkpoint {path!r}")
    require_finite(state, f"open_clip checkpoint {path!r}")
    return state


def _put_in(model: Any, arch: str, state: dict[str, Tensor], path: str) -> None:
    """Put a checkpoint file's weights into an open_clip model, exactly: none missing, left over or of another size.

    open_clip's own loader would stretch position embeddings of another image size without a word.
    """
    from open_clip.model import convert_to_custom_text_state_dict

    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    needed = model.state_dict()
    fix = f"choose the architecture that it was trained with instead of {arch!r}."
    for key in sorted(needed.keys() & state.keys()):
        if needed[key].squeeze().shape != state[key].squeeze().shape:  # logit_scale may be (1,)
            raise UserError(
                f"open_clip checkpoint {path!r}: {key} has shape {tuple(state[key].shape)} but {arch!r} needs "
                f"{tuple(needed[key].shape)}: {fix}"
            )
    missing = sorted(key for key in needed.keys() - state.keys() if not key.endswith("num_batches_tracked"))
    if missing:
        raise UserError(
            f"open_clip checkpoint {path!r} lacks {missing[0]!r} and {len(missing) - 1} more weights: {fix}"
        )
    extra = sorted(state.keys() - needed.keys())
    if extra:
        raise UserError(
            f"open_clip checkpoint {path!r} holds {extra[0]!r} and {len(extra) - 1} more weights too many: {fix}"
        )
    model.load_state_dict({key: value.reshape(needed[key].shape) for key, value in state.items()}, strict=False)


def _check_image_tensor(images: Tensor) -> None:
    """Raise UserError unless `images` is a float batch (b, 3, h, w) of values in [0, 1]."""
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise UserError(f"images has shape {tuple(images.shape)}: give (b, 3, h, w).")
    if not images.is_floating_point():
        raise UserError(f"images has dtype {images.dtype}: give floats in [0, 1].")
    low, high = (value.item() for value in images.detach().aminmax())
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # also NaN
        raise UserError(f"images has values from {low:.4g} to {high:.4g}: give finite values in [0, 1].")
