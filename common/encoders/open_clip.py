"""CLIP by open_clip, which only this file imports, and only when it is asked for."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from common.checks import UserError, require_file
from common.encoders.interface import PACKAGED, Backbone, ImageFeatures
from common.encoders.preprocess import Preprocess
from common.pretrained import loading, require_finite, require_plain, require_reachable

OPEN_CLIP_PREFIX = "open_clip:"


class _OpenClip(Backbone):
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


def load_open_clip(name: str) -> tuple[Backbone, Preprocess]:
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
    if int(open_clip.__version__.split(".")[0]) >= 3:
        safe = {"weights_only": True, "pretrained_text": False}
    else:
        safe = {"load_weights_only": True, "pretrained_hf": False}
    with loading(name, PACKAGED, "CLIP"):
        if tagged.get("hf_hub"):
            repository, file = os.path.split(tagged["hf_hub"])
            require_reachable(repository, (file,) if file else (HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME))
        model = open_clip.create_model(
            arch,
            pretrained=weights if tagged else None,
            force_quick_gelu=tagged.get("quick_gelu", False),
            **safe,
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
