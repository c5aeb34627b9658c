"""A captioner's configuration, as Hugging Face keeps it."""

from __future__ import annotations

from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from common.checks import UserError, require_one_of
from common.decoders.configs import decoder_config
from common.decoders.families import positions
from common.pretrained import LAYERS, SIZE, SWITCH, checked, number, tokens, whole

KEPT = ("name_or_path", "architectures", "transformers_version")
INPUTS = ("embedding", "patches")
MAPPERS = ("mlp", "transformer")
RULES = {
    **dict.fromkeys(("clip_width", "prefix_length", "clip_length", "mapper_heads"), SIZE),
    **dict.fromkeys(("retrieval", "retrieval_tokens"), whole(0, 10_000)),
    **dict.fromkeys(("normalize_embeddings", "tune_gpt2"), SWITCH),
    "mapper_layers": LAYERS,
    "rerank": number(0, 1e6),
    "eos_token_id": tokens(10_000_000) | None,
}


class ClipCapConfig(PreTrainedConfig):
    """Sizes of a captioner and the names of its backbones.

    Fields:
        mapper: "mlp" or "transformer".
        inputs: what the mapper reads: CLIP's pooled "embedding", or (transformer only) its "patches".
        clip_width: e, width of what the mapper reads.
        prefix_length: K, positions of the prefix, those of retrieved captions included.
        retrieval: captions of the datastore that stand in the prefix, before what the mapper makes; 0 for none.
        retrieval_tokens: positions of the prefix that they take.
        clip_length: tokens the Transformer mapper makes of the embedding.
        mapper_layers, mapper_heads: of the Transformer mapper.
        normalize_embeddings: scale embeddings to length 1 first (the original's `normalize_prefix`).
        tune_gpt2: GPT-2 is trained with the mapper, and saved with it; otherwise it is frozen.
        gpt2: packaged name, hub id or directory of GPT-2 or another decoder; None when its weights are saved with the
            mapper only. In a saved config, a directory is relative to the captioner's: it begins with ./ or ../.
        gpt2_config: sizes of GPT-2, or another decoder's with its `model_type`, as in its `config.json`; read from
            `gpt2` when left out.
        clip: name of the CLIP whose embeddings it reads; its path is relative in the same way.
        eos_token_id: token or tokens that end a caption.
        rerank: weight of CLIP's similarity of image and caption when `Captioner` ranks what a search has found, where
            its call says nothing else; chosen on validation images.
    """

    model_type = "clipcap"

    mapper: str = "mlp"
    inputs: str = "embedding"
    clip_width: int = 512
    prefix_length: int = 10
    retrieval: int = 0
    retrieval_tokens: int = 0
    clip_length: int = 10
    mapper_layers: int = 8
    mapper_heads: int = 8
    normalize_embeddings: bool = False
    tune_gpt2: bool = False
    gpt2: str | None = None
    gpt2_config: dict[str, Any] | None = None
    clip: str | None = None
    eos_token_id: int | list[int] | None = None
    rerank: float = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        require_one_of("mapper", self.mapper, MAPPERS)
        require_one_of("inputs", self.inputs, INPUTS)
        for name in ("gpt2", "clip"):
            if not isinstance(value := getattr(self, name), str | None):
                raise UserError(f"{name} is {value!r}: give a name or a directory as text.")
        if isinstance(self.gpt2_config, PreTrainedConfig):
            self.gpt2_config = self.gpt2_config.to_dict()
        if not isinstance(self.gpt2_config, dict | None):
            raise UserError(f"gpt2_config is {self.gpt2_config!r}: give GPT-2's sizes by name.")
        checked(vars(self), RULES, "the captioner's config")
        if bool(self.retrieval) != bool(self.retrieval_tokens) or self.retrieval_tokens >= self.prefix_length:
            raise UserError(
                f"retrieval is {self.retrieval} with retrieval_tokens {self.retrieval_tokens} and prefix_length "
                f"{self.prefix_length}: use 0 for both, or leave positions of the prefix to the mapper."
            )
        super().__post_init__(**{name: value for name, value in kwargs.items() if name in KEPT})

    @property
    def saves_gpt2(self) -> bool:
        """Whether GPT-2's weights belong in the captioner's own checkpoint."""
        return self.tune_gpt2 or self.gpt2 is None

    def build_gpt2_config(self) -> PreTrainedConfig:
        """The decoder's sizes as transformers' config.

        Raises:
            UserError: they are in no field.
        """
        if self.gpt2_config is None:
            raise UserError("gpt2_config is None: give GPT-2's sizes, or use ClipCapModel.from_backbones.")
        return decoder_config(self.gpt2_config, "gpt2_config")


def require_prefix_fits(length: int, config: PreTrainedConfig) -> None:
    """Raise UserError when a prefix leaves a decoder no position for a caption."""
    if length >= positions(config):
        raise UserError(f"prefix_length is {length}: GPT-2 has {positions(config)} positions, use fewer than that.")


def end_tokens(of_config: int | list[int] | None, of_tokenizer: int | None) -> int | list[int] | None:
    """Tokens that end a caption: the config's, and the tokenizer's, which captions in training end with."""
    several = of_config if isinstance(of_config, list) else [] if of_config is None else [of_config]
    if of_tokenizer is None or of_tokenizer in several:
        return of_config
    return [*several, of_tokenizer] if several else of_tokenizer
