"""ClipCap as a Hugging Face model: a mapper makes a prefix from CLIP's embedding, and GPT-2 continues it.

Where GPT-2 is said, any other causal decoder may stand.
"""

from __future__ import annotations

import contextlib
import copy
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.activations import NewGELUActivation
from transformers.modeling_outputs import CausalLMOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from clipcap.backbones import absolute, copy_backbones, load_named_gpt2, located, named_for
from clipcap.checkpoint import (
    has_tokenizer,
    local_file,
    one_dtype,
    require_fit,
    resolve_dtype,
    take_places,
)
from clipcap.confidence import FILE as CALIBRATION
from clipcap.confidence import Calibration
from clipcap.config import ClipCapConfig, end_tokens, require_prefix_fits
from clipcap.decoding import decode, room_for_captions
from clipcap.generation import FILE as GENERATION
from clipcap.generation import LENGTHS, decode_options, default_generation, prompt_tokens, read_generation
from clipcap.mapper import build_mapper
from clipcap.retrieval import FILE, Datastore
from common import gpt2 as gpt2_backbones
from common.checks import UserError
from common.decoders.configs import decoder_class
from common.decoders.families import base_model, positions, width
from common.decoders.heads import output_head, require_known_head
from common.gpt2 import freeze, load_gpt2
from common.language import IGNORE, head_cross_entropy
from common.pretrained import (
    CAPTIONERS,
    checked,
    load_tokenizer,
    loading,
    locate,
    no_progress_bar,
    optional_file,
    read_config,
    require_finite,
    require_reachable,
    require_room,
    require_tokens,
    saving,
    tokens,
)

PACKAGED = CAPTIONERS
WHAT = "captioner"
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "subfolder")


class ClipCapModel(PreTrainedModel):
    """A mapper and a GPT-2: image embedding in, caption logits or loss out.

    Built from a config it has random weights throughout. `from_backbones` gives a new captioner on a trained GPT-2,
    `from_pretrained` a saved one, `clipcap.load_original_checkpoint` one of the original project's.

    A frozen GPT-2 is in eval mode also in training, takes and stores no gradient, and is not saved.

    Attributes:
        mapper: the mapping network.
        gpt2: GPT-2 with its language modelling head.
        tokenizer: GPT-2's, or None where none is known.
        datastore: captions to retrieve, when the config's `retrieval` is not 0.
        calibration: what tells how sure a caption is, where `clipcap calibrate` has made it.
        generation_config: what `generate` does where it is not told otherwise; saved with the captioner.
    """

    config_class = ClipCapConfig
    base_model_prefix = ""
    main_input_name = "clip_embeddings"
    _no_split_modules = ["GPT2Block"]
    _supports_sdpa = True
    _clip: Any = None

    config: ClipCapConfig
    gpt2: PreTrainedModel

    def __init__(self, config: ClipCapConfig, *, with_gpt2: bool = True) -> None:
        super().__init__(config)
        gpt2_config = config.build_gpt2_config()
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.datastore: Datastore | None = None
        self.calibration: Calibration | None = None
        self.mapper = build_mapper(
            config.mapper,
            clip_width=config.clip_width,
            width=width(gpt2_config),
            prefix_length=config.prefix_length - config.retrieval_tokens,
            clip_length=config.clip_length,
            num_layers=config.mapper_layers,
            num_heads=config.mapper_heads,
            patches=config.inputs == "patches",
        )
        self.generation_config = default_generation(positions(gpt2_config) - config.prefix_length + 1)
        if with_gpt2:
            self._attach(decoder_class(gpt2_config)(gpt2_config), None)
        self.post_init()

    def _attach(self, gpt2: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Take `gpt2` as the language model, frozen or not as the config says."""
        require_prefix_fits(self.config.prefix_length, gpt2.config)
        checked(vars(self.config), {"eos_token_id": tokens(gpt2.config.vocab_size) | None}, "the captioner's config")
        for module in gpt2.modules():
            if isinstance(getattr(module, "act", None), NewGELUActivation):  # the same in one operation, not eight
                module.act = nn.GELU(approximate="tanh")
        self.gpt2, self.tokenizer = gpt2, tokenizer
        if not self.config.tune_gpt2:
            freeze(gpt2)

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: torch's own initialisation of the mapper's layers is the published one, and GPT-2 has its own."""

    @classmethod
    def from_backbones(
        cls, config: ClipCapConfig, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
    ) -> ClipCapModel:
        """A new captioner: the GPT-2 named in `config.gpt2` with its weights, and a mapper with random ones.

        The config is copied; GPT-2's sizes and end token are filled in from the backbone.
        """
        if config.gpt2 is None:
            raise UserError(f"gpt2 is None: name a GPT-2 ({', '.join(gpt2_backbones.PACKAGED)}, hub id or directory).")
        gpt2, tokenizer = load_gpt2(config.gpt2, device=device, dtype=dtype)
        sizes = {name: value for name, value in gpt2.config.to_dict().items() if name != "_name_or_path"}
        fields = config.to_dict() | {"gpt2_config": sizes, "gpt2": absolute(config.gpt2)}
        if config.clip is not None:
            fields["clip"] = absolute(config.clip)
        if fields["eos_token_id"] is None:
            fields["eos_token_id"] = end_tokens(gpt2.config.eos_token_id, tokenizer.eos_token_id)
        model = cls(ClipCapConfig(**fields), with_gpt2=False).to(gpt2.device, gpt2.dtype)
        model._attach(gpt2, tokenizer)
        return model

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *model_args: Any,
        config: ClipCapConfig | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device: str | torch.device = "cpu",
        **kwargs: Any,
    ) -> ClipCapModel:
        """Load a captioner that `save_pretrained` wrote; a frozen GPT-2 is loaded by the name in its config.

        Args:
            pretrained_model_name_or_path: packaged name ("tiny"), directory or hub id.
            config: to use instead of the saved one.
            dtype: of all weights; None is float32 whatever the file holds.
            torch_dtype: its older name.
            device: where to put it.
            kwargs: `PreTrainedModel.from_pretrained`'s, such as `revision`.

        Raises:
            UserError: no such captioner, its weights do not fit its config, or its GPT-2 cannot be found.
        """
        source = locate(pretrained_model_name_or_path, PACKAGED, WHAT)
        hub = {name: value for name, value in kwargs.items() if name in HUB_OPTIONS}
        want_info = kwargs.pop("output_loading_info", False)
        kwargs.pop("ignore_mismatched_sizes", None)
        with loading(source, PACKAGED, WHAT):
            if not os.path.isdir(source):
                require_reachable(source, ("config.json",))
            fields = read_config(source, WHAT, "clipcap", **hub)
            config = located(config or ClipCapConfig.from_dict(fields), source, **hub)
            wanted = resolve_dtype(one_dtype(dtype, torch_dtype), config)
            require_room(source, WHAT, lambda: cls(config, with_gpt2=config.saves_gpt2), **hub)
            model, info = super().from_pretrained(
                source,
                *model_args,
                config=config,
                dtype=wanted,
                with_gpt2=config.saves_gpt2,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **kwargs | {"trust_remote_code": False},
            )
            require_fit(source, info)
            require_finite(model.state_dict(), f"{WHAT} {source!r}")
            tokenizer = None
            if config.saves_gpt2 and has_tokenizer(source, hub):
                tokenizer = load_tokenizer(source, config, **hub)
                require_tokens(source, WHAT, tokenizer, model.gpt2.config.vocab_size)
        if config.saves_gpt2:
            require_known_head(model.gpt2, source)
            model._attach(model.gpt2, tokenizer)
        else:
            model._attach(*load_named_gpt2(source, config, wanted))
        if saved := optional_file(source, GENERATION, hub):
            model.generation_config = read_generation(saved)
        if config.retrieval:
            model.datastore = Datastore.load(local_file(source, FILE, hub))
            model.datastore.require_fits(config, model.gpt2.config.vocab_size, source)
        if saved := optional_file(source, CALIBRATION, hub):
            model.calibration = Calibration.load(saved, (config.prefix_length, width(model.gpt2.config)))
        model.to(device).eval()
        return (model, info) if want_info else model  # type: ignore[return-value]

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | os.PathLike[str], *, bundle: bool = False, **kwargs: Any
    ) -> None:
        """Write `config.json` and `model.safetensors`: the mapper, and GPT-2 with its tokenizer when it was tuned.

        Files of these names give way to new ones, each of them whole; whatever else lies there stays. Backbones in
        directories are named relative to `save_directory`.

        Args:
            save_directory: where.
            bundle: also copy the backbones there, to folders `clip` and `gpt2`, so that it can go to other machines.
            kwargs: `PreTrainedModel.save_pretrained`'s.

        Raises:
            UserError: `save_directory` is a file, or cannot be written, or a backbone cannot be bundled; then nothing
                there has changed.
        """
        place = Path(save_directory)
        if place.is_file():
            raise UserError(f"output {str(save_directory)!r} is a file: give a directory.")
        if not kwargs.get("is_main_process", True):
            return
        state = kwargs.pop("state_dict", None) or self.state_dict()
        if not self.config.saves_gpt2:
            state = {name: value for name, value in state.items() if name.startswith("mapper.")}
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", place.name)  # transformers would take the temporary directory's
        is_new = not place.exists()
        try:
            with saving(place, WHAT), no_progress_bar():
                place.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(dir=place, prefix=".saving-") as whole_files:
                    directory = Path(whole_files)
                    names = named_for(self.config, place) | (copy_backbones(self.config, directory) if bundle else {})
                    self._save_files(directory, state, names, kwargs)
                    take_places(Path(whole_files), place)
        finally:
            if is_new:
                with contextlib.suppress(OSError):  # not empty: all went well
                    place.rmdir()

    def _save_files(
        self, directory: Path, state: dict[str, Tensor], names: dict[str, str], options: dict[str, Any]
    ) -> None:
        """Write all that belongs to the captioner, with these names of its backbones."""
        if self.datastore is not None:
            self.datastore.save(directory / FILE)
        if self.calibration is not None:
            self.calibration.save(directory / CALIBRATION)
        config = self.config
        self.config = copy.copy(config)
        for name, value in names.items():
            setattr(self.config, name, value)
        try:
            super().save_pretrained(directory, state_dict=state, **options)
        finally:
            self.config = config
        if self.config.saves_gpt2 and self.tokenizer is not None:
            self.tokenizer.save_pretrained(directory)

    def get_input_embeddings(self) -> nn.Module:
        return self.gpt2.get_input_embeddings()

    def train(self, mode: bool = True) -> ClipCapModel:
        """Training mode for what is trained; a frozen GPT-2 stays in eval mode (no dropout)."""
        super().train(mode)
        if not self.config.tune_gpt2 and "gpt2" in self._modules:
            self.gpt2.eval()
        return self

    def prefix(
        self,
        clip_embeddings: Float[Tensor, "b e"] | Float[Tensor, "b n e"],
        prompts: Int[Tensor, "b r"] | None = None,
    ) -> Float[Tensor, "b K d"]:
        """The prefix that stands for an image in GPT-2's input.

        Args:
            clip_embeddings: (b, e) embeddings, or (b, n, e) patch features when the config's `inputs` is "patches".
            prompts: retrieved captions as `Datastore.prompts` gives them, which it is asked for when left out.

        Raises:
            UserError: another shape or width than the mapper's; NaN or infinity, except in training, where to look at
                every batch would make a GPU wait, and stores hold none.
        """
        wanted = 3 if self.config.inputs == "patches" else 2
        shape, width = tuple(clip_embeddings.shape), self.config.clip_width
        if len(shape) != wanted or shape[-1] != width:
            form = f"(batch, patches, {width})" if wanted == 3 else f"(batch, {width})"
            raise UserError(
                f"clip_embeddings have shape {shape}: this captioner reads {self.config.inputs} of shape {form}"
                + (f", made by CLIP {self.config.clip!r}." if self.config.clip else ".")
            )
        if not self.training and not torch.isfinite(clip_embeddings).all():
            bad = (~torch.isfinite(clip_embeddings)).flatten(1).any(1).nonzero().flatten().tolist()
            raise UserError(f"clip_embeddings hold NaN or infinity in rows {bad[:5]}: check how they were made.")
        if self.config.normalize_embeddings:
            clip_embeddings = F.normalize(clip_embeddings.float(), dim=-1)
        mapped = self.mapper(clip_embeddings.to(next(self.mapper.parameters()).dtype))
        if not self.config.retrieval:
            return mapped
        if prompts is None:
            if self.datastore is None:
                raise UserError("the captioner has no datastore: load it from the directory it was saved in.")
            prompts = self.datastore.prompts(clip_embeddings, self.config.retrieval)
        text = self.gpt2.get_input_embeddings()(prompts.to(mapped.device))  # (b, r, d)
        return torch.cat([text.to(mapped.dtype), mapped], dim=1)

    def forward(
        self,
        clip_embeddings: Float[Tensor, "b e"] | Float[Tensor, "b n e"],
        input_ids: Int[Tensor, "b t"],
        attention_mask: Shaped[Tensor, "b t"] | None = None,
        labels: Int[Tensor, "b t"] | None = None,
        *,
        prompts: Int[Tensor, "b r"] | None = None,
        return_logits: bool = True,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """Loss and logits of captions given their images (sec. 3, eq. 2).

        Args:
            clip_embeddings: as in `prefix`.
            input_ids: captions, padded on the right, with their end tokens.
            attention_mask: 1 for tokens, 0 for padding. With padding on the right it changes only what is predicted
                at padded places, so training may leave it out.
            labels: input_ids with IGNORE (-100) where nothing is to be predicted.
            prompts: as in `prefix`.
            return_logits: False makes no logits, and the loss in chunks, to save memory.

        Returns:
            `.logits` (b, t, v), where `logits[:, i]` predicts `input_ids[:, i]`; `.loss`, the mean over labels in
            nats (float32), or None without labels.
        """
        hidden = self.hidden(clip_embeddings, input_ids, attention_mask, prompts)  # (b, t, d)
        head = output_head(self.gpt2)
        logits = head.logits(hidden) if return_logits else None
        loss = None
        if labels is not None:
            if labels.shape != input_ids.shape:
                raise UserError(f"labels have shape {tuple(labels.shape)}: use input_ids' {tuple(input_ids.shape)}.")
            if logits is None:
                loss = head_cross_entropy(hidden.flatten(0, 1), head, labels.flatten())
            else:
                total = F.cross_entropy(
                    logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, reduction="sum"
                )
                loss = total / (labels != IGNORE).sum().clamp(min=1)
        return CausalLMOutput(loss=loss, logits=logits)  # type: ignore[arg-type]

    def hidden(
        self,
        clip_embeddings: Float[Tensor, "b e"] | Float[Tensor, "b n e"],
        input_ids: Int[Tensor, "b t"],
        attention_mask: Shaped[Tensor, "b t"] | None = None,
        prompts: Int[Tensor, "b r"] | None = None,
    ) -> Float[Tensor, "b t d"]:
        """GPT-2's last hidden states where they predict the caption: K-1 .. K+t-2 of prefix and caption together."""
        with _attention(self.device):
            return self.hidden_after(self.prefix(clip_embeddings, prompts), input_ids, attention_mask)

    def hidden_after(
        self,
        prefix: Float[Tensor, "b K d"],
        input_ids: Int[Tensor, "b t"],
        attention_mask: Shaped[Tensor, "b t"] | None = None,
    ) -> Float[Tensor, "b t d"]:
        """`hidden` for a prefix that is made already."""
        length, places = prefix.shape[1], positions(self.gpt2.config)
        if length + input_ids.shape[1] > places:
            raise UserError(
                f"captions have {input_ids.shape[1]} tokens: with a prefix of {length}, GPT-2's {places} positions "
                f"hold at most {places - length}; cut them."
            )
        tokens = self.gpt2.get_input_embeddings()(input_ids[:, :-1])  # the last token predicts nothing
        if attention_mask is not None:
            attention_mask = torch.cat([attention_mask.new_ones(prefix.shape[:2]), attention_mask[:, :-1]], dim=1)
        inputs = torch.cat([prefix.to(tokens.dtype), tokens], dim=1)
        states = base_model(self.gpt2)(inputs_embeds=inputs, attention_mask=attention_mask, use_cache=False)
        return states.last_hidden_state[:, length - 1 :]

    def generate(
        self,
        clip_embeddings: Float[Tensor, "b e"] | Float[Tensor, "b n e"] | None = None,
        *,
        pixel_values: Float[Tensor, "b 3 s s"] | None = None,
        input_ids: Int[Tensor, "b p"] | None = None,
        prompt: str | None = None,
        **options: Any,
    ) -> Int[Tensor, "c t"]:
        """Captions as one tensor of token ids, padded on the right with GPT-2's end token: `clipcap.decoding.decode`'s.

        Rows are image by image, best first. Options are `decode`'s, or those of transformers' `generate` that ask for
        the same (`clipcap.generation.decode_options`); what is not asked is taken from `generation_config`.

        Args:
            clip_embeddings: as in `prefix`.
            pixel_values: instead of them, what `clipcap.ClipCapProcessor` makes of images; the CLIP named in the config
                is loaded for them, once.
            input_ids: tokens that the captions of each image begin with.
            prompt: instead of them, a text that all captions begin with.

        Raises:
            UserError: both or neither of embeddings and pixels are given, the config names no CLIP, or an option cannot
                be honoured.
        """
        if (clip_embeddings is None) == (pixel_values is None):
            raise UserError("generate takes either clip_embeddings or pixel_values: give one of them.")
        if input_ids is not None:
            if prompt is not None:
                raise UserError("input_ids and prompt are given together: both are what captions begin with.")
            mask = options.get("attention_mask")
            if mask is not None and not mask.bool().all():
                raise UserError("attention_mask has zeros: give prompts of one length, without padding.")
            options["prompt_ids"] = input_ids
        pad = options.pop("pad_token_id", None)
        options = self.decode_options(options, prompt)
        if pixel_values is not None:
            clip_embeddings = self._embed(pixel_values)
        assert clip_embeddings is not None
        found = decode(self, clip_embeddings, **options)
        rows = [torch.tensor(caption.token_ids) for captions in found for caption in captions]
        if pad is None:
            end = self.gpt2.config.eos_token_id  # the config's may be a word of the caption
            if end is None:
                end = self.config.eos_token_id
            pad = (end[0] if isinstance(end, list) else end) or 0
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad).to(self.device)

    def decode_options(self, asked: dict[str, Any], prompt: str | None = None) -> dict[str, Any]:
        """`decode`'s options for those of `generate` and `Captioner`, with the captioner's own where nothing is asked.

        Raises:
            UserError: one that cannot be honoured, or a prompt without a tokenizer.
        """
        if prompt is not None:
            if self.tokenizer is None:
                raise UserError(f"prompt is {prompt!r} but the captioner has no tokenizer: give input_ids.")
            asked = asked | {"prompt_ids": prompt_tokens(self.tokenizer, prompt)}
        ids = asked.get("prompt_ids")
        length = 0 if ids is None else ids.shape[-1] if isinstance(ids, Tensor) else len(ids)
        found = decode_options(asked, self.generation_config, length)
        if not LENGTHS & asked.keys():
            found["max_new_tokens"] = max(1, min(found["max_new_tokens"], room_for_captions(self) - length))
        return found

    @classmethod
    def can_generate(cls) -> bool:
        """Yes: transformers' pipelines ask."""
        return True

    @torch.inference_mode()
    def _embed(self, pixel_values: Float[Tensor, "b 3 s s"]) -> Tensor:
        """What the mapper reads of preprocessed images."""
        from clipcap.data.embeddings import encode
        from common.clip import load_clip

        if self.config.clip is None:
            raise UserError("the captioner does not name its CLIP: give clip_embeddings instead of pixel_values.")
        weight = self.gpt2.get_input_embeddings().weight
        clip = self._clip
        if clip is None or clip.device != weight.device:
            clip = load_clip(self.config.clip, device=weight.device, dtype=weight.dtype)
            object.__setattr__(self, "_clip", clip)  # beside the model: no weights of its checkpoint
        return encode(clip, pixel_values.to(weight.device), self.config.inputs)  # type: ignore[arg-type]


def _attention(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Attention for training in bf16 on a CPU is by plain products: on captions, their backward is 4 times as fast."""
    if device.type == "cpu" and torch.is_grad_enabled() and torch.is_autocast_enabled("cpu"):
        return sdpa_kernel(SDPBackend.MATH)
    return contextlib.nullcontext()
