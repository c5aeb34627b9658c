"""CLIP by open_clip, which only this file imports, and only when it is asked for."""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from common.checks import UserError, require_file
from common.encoders.interface import OPEN_CLIP_PREFIX, PACKAGED, Backbone, ImageFeatures, from_map, widths
from common.encoders.preprocess import Preprocess
from common.encoders.timm import trunk_features
from common.pretrained import loading, require_finite, require_plain, require_reachable


class _OpenClip(Backbone):
    def __init__(self, name: str, arch: str, model: Any) -> None:
        super().__init__()
        self.name, self.arch, self.model = name, arch, model
        self.trunk = hasattr(model.visual, "trunk")  # timm's
        self.has_class_token = hasattr(model.visual, "class_embedding")
        self._tokenizer: Callable[[list[str]], Tensor] | None = None

    def image_features(self, pixels: Float[Tensor, "b 3 s s"]) -> ImageFeatures:
        visual = self.model.visual
        if self.trunk:
            found = trunk_features(visual.trunk, pixels)
            return found._replace(embedding=visual.head(found.embedding))
        if self.has_class_token:
            found = visual.forward_intermediates(pixels, indices=1, output_fmt="NLC", output_extra_tokens=True)
            class_token = found["image_intermediates_prefix"][0][:, 0]
            return ImageFeatures(class_token, found["image_intermediates"][0], found["image_features"])
        found = visual.forward_intermediates(pixels, indices=1)
        patches = from_map(found["image_intermediates"][0])
        return ImageFeatures(patches.mean(dim=1), patches, found["image_features"])

    def text_embeddings(self, texts: list[str]) -> Float[Tensor, "b e"]:
        if self._tokenizer is None:
            self._tokenizer = _load_tokenizer(self.name, self.arch)
        return self.model.encode_text(self._tokenizer(texts).to(self.model.logit_scale.device), normalize=False)


def _load_tokenizer(name: str, arch: str) -> Callable[[list[str]], Tensor]:
    """open_clip's own, or one that transformers fetches from the hub: then only once a text is to be embedded."""
    import open_clip

    repository = open_clip.get_model_config(arch)["text_cfg"].get("hf_tokenizer_name")
    if repository is None:
        return open_clip.get_tokenizer(arch)
    try:
        require_reachable(repository, ("tokenizer.json", "tokenizer_config.json"))
        with loading(name, PACKAGED, "CLIP"):  # its tokenizers may come with code; open_clip's has none
            return open_clip.get_tokenizer(arch, trust_remote_code=False)
    except (OSError, UserError) as error:
        raise UserError(
            f"CLIP {name!r}: texts need the tokenizer {repository!r}, which is not in the cache and could not be "
            f"fetched from the hub: check the connection, or fetch it elsewhere with hf download {repository}."
        ) from error


def load_open_clip(name: str) -> tuple[Backbone, Preprocess]:
    import open_clip
    from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME

    arch, _, weights = name.removeprefix(OPEN_CLIP_PREFIX).partition("/")
    if arch not in open_clip.list_models():
        near = difflib.get_close_matches(arch, open_clip.list_models(), n=5, cutoff=0)
        raise UserError(f"open_clip has no architecture {arch!r}: choose one such as {', '.join(near)}.")
    architecture = open_clip.get_model_config(arch)
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
    if int(open_clip.__version__.split(".")[0]) >= 3:
        safe = {"weights_only": True, "pretrained_text": False}
    else:
        safe = {"load_weights_only": True, "pretrained_hf": False}
    with loading(name, PACKAGED, "CLIP"):
        if tagged.get("hf_hub"):
            repository, file = os.path.split(tagged["hf_hub"])
            require_reachable(repository, (file,) if file else (HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME))
        if text := architecture["text_cfg"].get("hf_model_name"):  # its sizes are on the hub alone
            require_reachable(text, ("config.json",))
        with _quiet():
            model = open_clip.create_model(
                arch,
                pretrained=weights if tagged else None,
                force_quick_gelu=tagged.get("quick_gelu", False),
                **safe,
            )
    if state is not None:
        _put_in(model, arch, state, weights)
    if tagged:
        require_finite(model.state_dict(), f"CLIP {name!r}")
    preprocess = _preprocess(model.visual.preprocess_cfg, name)
    backbone = _OpenClip(name, arch, model)
    visual = model.visual
    if backbone.trunk:
        backbone.width, backbone.patch_width = widths(backbone, preprocess.size)
    else:
        has_class_token = backbone.has_class_token
        backbone.width = visual.output_dim
        backbone.patch_width = len(visual.class_embedding) if has_class_token else visual.attnpool.q_proj.in_features
    return backbone, preprocess


def _preprocess(config: dict[str, Any], name: str) -> Preprocess:
    """open_clip's own configuration of pixels."""
    size = config["size"]
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise UserError(f"CLIP {name!r} sees images of {height} x {width} pixels, no squares: use other weights.")
    return Preprocess(
        size=height,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation="bilinear" if config["interpolation"] == "bilinear" else "bicubic",  # as open_clip reads it
        squash=config["resize_mode"] == "squash",
        pad=config["resize_mode"] == "longest",
        fill=(config["fill_color"],) * 3,
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without open_clip's warning that a model has no weights, which it gets next."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


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
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict

    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    state = convert_state_dict(model, state)  # Apple's and Google's names
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
