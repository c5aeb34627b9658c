"""The original ClipCap project's `.pt` checkpoints: load them, and convert them."""

from __future__ import annotations

import os
import pickle
import re
import warnings
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn

from clipcap.backbones import absolute
from clipcap.config import ClipCapConfig
from clipcap.model import ClipCapModel
from common.checks import UserError, require_at_least, require_file, require_text
from common.decoders.configs import decoder_config
from common.decoders.families import width
from common.files import require_own_directory, whole_directory
from common.gpt2 import load_gpt2
from common.pretrained import require_finite, require_plain, saving

BUFFERS = re.compile(r"\.attn\.(bias|masked_bias)$")
"""Masks that old versions of transformers kept among the weights."""


def load_original_checkpoint(
    path: str | os.PathLike[str],
    *,
    n_head: int = 12,
    gpt2: str | None = None,
    mapper_heads: int = 8,
    clip: str | None = None,
    normalize_embeddings: bool = False,
    eos_token_id: int | list[int] | None = None,
) -> ClipCapModel:
    """Load a checkpoint that the original project's `train.py` saved; sizes and mapper type come from the file.

    Args:
        path: `.pt` file with `clip_project.*` and, unless it is prefix-only, `gpt.*`.
        n_head: attention heads of its GPT-2, which the file does not tell (12 for gpt2, 16 medium, 20 large, 25 xl).
        gpt2: name or directory of the GPT-2 it was trained on. Needed when the file holds the mapper alone, which is
            then a frozen backbone; otherwise only its tokenizer is taken from there.
        mapper_heads: heads of a Transformer mapper; the original always has 8.
        clip: name of the CLIP it was trained on, such as "openai/clip-vit-base-patch32".
        normalize_embeddings: it was trained with `--normalize_prefix`.
        eos_token_id: token that ends its captions. The original stops at ".", 13 in GPT-2's vocabulary, and never
            learned GPT-2's own end token, which it is when left out.

    Raises:
        UserError: not such a file, damaged, holding code, without GPT-2 where none is named, or with another number of
            tokens than the one that is named.
    """
    path = require_file(path, "checkpoint")
    require_at_least("n_head", n_head, 1)
    weights = _read(path)
    require_finite(weights, f"checkpoint {str(path)!r}")
    mapper = {k.removeprefix("clip_project."): v for k, v in weights.items() if k.startswith("clip_project.")}
    language = {k.removeprefix("gpt."): v for k, v in weights.items() if k.startswith("gpt.") and not BUFFERS.search(k)}
    backbone, tokenizer = load_gpt2(gpt2) if gpt2 is not None else (None, None)
    if language:
        gpt2_config = _gpt2_sizes(path, language, n_head)
        own = gpt2_config["vocab_size"]
        if backbone is not None and (named := len(backbone.get_input_embeddings().weight)) != own:
            raise UserError(
                f"checkpoint {str(path)!r} has {own:,} tokens but GPT-2 {gpt2!r} {named:,}: its tokenizer is not the "
                f"checkpoint's; name the GPT-2 it was trained on (gpt2)."
            )
    elif backbone is not None:
        gpt2_config = backbone.config.to_dict()
    else:
        raise UserError(f"checkpoint {str(path)!r} holds the mapper alone: name the GPT-2 it was trained on (gpt2).")
    config = ClipCapConfig(
        **_mapper_sizes(path, mapper, width(decoder_config(gpt2_config, "gpt2"))),
        mapper_heads=mapper_heads,
        normalize_embeddings=normalize_embeddings,
        tune_gpt2=bool(language),
        gpt2=gpt2 and absolute(gpt2),
        gpt2_config=gpt2_config,
        clip=clip and absolute(clip),
        eos_token_id=eos_token_id if eos_token_id is not None else gpt2_config.get("eos_token_id"),
    )
    if not language:
        model = ClipCapModel.from_backbones(config)
    else:
        model = ClipCapModel(config)
        _load(path, model.gpt2, language, "gpt.", ignore={"lm_head.weight"})
        model.tokenizer = tokenizer
    _load(path, model.mapper, mapper, "clip_project.")
    return model.eval()


def convert(
    path: str | os.PathLike[str], out: str | os.PathLike[str], *, stop: str = "", **options: Any
) -> ClipCapModel:
    """Write an original checkpoint as a captioner's directory, whole or not at all.

    Args:
        path: as in `load_original_checkpoint`.
        out: directory; it is new, empty, or was written by an earlier call, which it replaces.
        stop: text of the token that ends captions and stays in them, in place of `eos_token_id`; needs `gpt2`.
        options: `load_original_checkpoint`'s.

    Raises:
        UserError: as there, `stop` is not one token, or `out` holds something else or cannot be written.
    """
    require_own_directory(out, "captioner")
    model = load_original_checkpoint(path, **options)
    if stop:
        model.config.eos_token_id = _stop_token(model, stop)
    with saving(out, "captioner"), whole_directory(out, "captioner") as directory:
        model.save_pretrained(directory)
    return model


def _stop_token(model: ClipCapModel, stop: str) -> int:
    if model.tokenizer is None:
        raise UserError(f"stop is {stop!r} but the GPT-2 whose token it is was not named: name it (gpt2).")
    require_text("stop", stop)
    ids = model.tokenizer(stop, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise UserError(
            f"stop is {stop!r}, {len(ids)} tokens of this GPT-2: give a text of one token such as '.', or '' for "
            f"GPT-2's own end token."
        )
    return ids[0]


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors in a checkpoint, read without running any code that it may hold."""
    damaged = f"checkpoint {str(path)!r} is not a PyTorch checkpoint or is damaged: copy it again."
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols, in files that are refused anyway
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "nsupported" in str(error):
            raise UserError(
                f"checkpoint {str(path)!r} holds objects other than tensors, which could run code when loaded, "
                f"and is refused: save its state_dict() alone."
            ) from error
        raise UserError(damaged) from error
    except Exception as error:  # whatever unpickling a broken file comes upon
        raise UserError(damaged) from error
    if isinstance(weights, dict) and isinstance(weights.get("state_dict"), dict):
        weights = weights["state_dict"]
    if not isinstance(weights, dict):
        raise UserError(f"checkpoint {str(path)!r} is not a state_dict: save the model's state_dict() alone.")
    require_plain(weights, f"checkpoint {str(path)!r}")
    weights = {str(k).removeprefix("module."): v for k, v in weights.items()}
    if not any(k.startswith("clip_project.") for k in weights):
        raise UserError(f"checkpoint {str(path)!r} has no clip_project.* weights: it is not the original ClipCap's.")
    return weights


def _gpt2_sizes(path: Path, weights: dict[str, Tensor], n_head: int) -> dict[str, Any]:
    """GPT-2's config from its weights; the number of heads must be told."""
    for name in ("transformer.wte.weight", "transformer.wpe.weight"):
        if name not in weights or weights[name].ndim != 2:
            raise UserError(f"checkpoint {str(path)!r} lacks gpt.{name}: it is cut short or not a GPT-2's.")
    vocabulary, width = weights["transformer.wte.weight"].shape
    if width % n_head:
        raise UserError(f"n_head is {n_head}: use a divisor of this GPT-2's width {width}.")
    layers = {int(m[1]) for k in weights if (m := re.match(r"transformer\.h\.(\d+)\.", k))}
    inner = None
    if "transformer.h.0.mlp.c_fc.weight" in weights:
        inner = _sides(path, weights, "transformer.h.0.mlp.c_fc.weight")[1]
    end = 50256 if vocabulary > 50256 else None
    return {
        "vocab_size": vocabulary,
        "n_embd": width,
        "n_layer": len(layers),
        "n_head": n_head,
        "n_positions": weights["transformer.wpe.weight"].shape[0],
        "n_inner": inner if inner is not None and inner != 4 * width else None,
        "bos_token_id": end,
        "eos_token_id": end,
    }


def _mapper_sizes(path: Path, weights: dict[str, Tensor], width: int) -> dict[str, Any]:
    """The mapper's fields of ClipCapConfig from its weights."""
    sizes: dict[str, Any]
    if "model.0.weight" in weights and "model.2.weight" in weights:
        out = _sides(path, weights, "model.2.weight")[0]
        clip_width = _sides(path, weights, "model.0.weight")[1]
        sizes = {"mapper": "mlp", "clip_width": clip_width, "prefix_length": out // width}
    elif "prefix_const" in weights and "linear.weight" in weights:
        out, clip_width = _sides(path, weights, "linear.weight")
        layers = {m[1] for k in weights if (m := re.match(r"transformer\.layers\.(\d+)\.", k))}
        sizes = {
            "mapper": "transformer",
            "clip_width": clip_width,
            "prefix_length": _sides(path, weights, "prefix_const")[0],
            "clip_length": out // width,
            "mapper_layers": len(layers),
        }
    else:
        raise UserError(f"checkpoint {str(path)!r}: clip_project.* is neither the MLP nor the Transformer mapper.")
    if out % width:
        raise UserError(f"checkpoint {str(path)!r}: its mapper does not fit GPT-2's width {width}: name another GPT-2.")
    return sizes


def _sides(path: Path, weights: dict[str, Tensor], name: str) -> tuple[int, int]:
    """Rows and columns of a matrix."""
    shape = tuple(weights[name].shape)
    if len(shape) != 2 or 0 in shape:
        raise UserError(f"checkpoint {str(path)!r}: {name} has shape {shape}, no matrix: copy it again.")
    return shape  # type: ignore[return-value]


def _load(
    path: Path, module: nn.Module, weights: dict[str, Tensor], prefix: str, ignore: Set[str] = frozenset()
) -> None:
    """Load `weights`, which must be exactly the module's."""
    own = module.state_dict()
    for name in sorted(own.keys() - ignore):
        if name not in weights:
            raise UserError(f"checkpoint {str(path)!r} lacks {prefix}{name}: it is cut short, or of another version.")
        if weights[name].shape != own[name].shape:
            raise UserError(
                f"checkpoint {str(path)!r}: {prefix}{name} has shape {tuple(weights[name].shape)} where its other "
                f"weights ask for {tuple(own[name].shape)}: copy it again."
            )
    unknown = sorted(weights.keys() - own.keys() - ignore)
    if unknown:
        raise UserError(f"checkpoint {str(path)!r} has {prefix}{unknown[0]}, which the original ClipCap has not.")
    module.load_state_dict({k: v for k, v in weights.items() if k in own and k not in ignore}, strict=False)


@dataclass(frozen=True)
class ConvertConfig:
    """Convert a checkpoint (.pt) of the original ClipCap project to a captioner directory."""

    checkpoint: tyro.conf.Positional[Path]
    """The original project's .pt file."""
    out: tyro.conf.Positional[Path]
    """Directory to write."""
    gpt2: str = "gpt2"
    """GPT-2 that the checkpoint was trained on: where its tokenizer is, and its weights when the file has none."""
    clip: str = "openai/clip-vit-base-patch32"
    """CLIP that the checkpoint was trained on."""
    n_head: int = 12
    """GPT-2's attention heads, which the file does not tell."""
    mapper_heads: int = 8
    """Heads of a Transformer mapper, which the file does not tell; the original always has 8."""
    normalize_embeddings: bool = False
    """The checkpoint was trained with the original's --normalize_prefix, which the file does not tell."""
    stop: str = "."
    """Text of the one token that ends a caption and stays in it, as in the original, which never learns an end token;
    empty takes GPT-2's own."""


def run(config: ConvertConfig) -> int:
    """`clipcap convert`: convert an original checkpoint."""
    convert(
        config.checkpoint,
        config.out,
        stop=config.stop,
        gpt2=config.gpt2,
        clip=config.clip,
        n_head=config.n_head,
        mapper_heads=config.mapper_heads,
        normalize_embeddings=config.normalize_embeddings,
    )
    print(f"captioner written to {config.out}")
    return 0
