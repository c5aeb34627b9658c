"""A captioner's processor in transformers' manner: images -> pixels, captions -> token ids, and token ids -> text."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import BatchFeature, ProcessorMixin
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from clipcap.data.images import ImageSource, read_image
from clipcap.generation import prompt_tokens
from clipcap.model import PACKAGED, WHAT, ClipCapModel
from common.checks import UserError
from common.clip import load_clip
from common.encoders.preprocess import Preprocess
from common.files import write_json
from common.pretrained import load_tokenizer, loading, locate, saving

FILE = "processor_config.json"


class ClipCapProcessor(ProcessorMixin):
    """CLIP's preprocessing and GPT-2's tokenizer, without weights.

    Example:
        >>> processor = ClipCapProcessor.from_pretrained("tiny")
        >>> model = ClipCapModel.from_pretrained("tiny")
        >>> ids = model.generate(**processor(images=["photo.jpg"], return_tensors="pt"), num_beams=5)
        >>> processor.batch_decode(ids, skip_special_tokens=True)
    """

    def __init__(self, preprocess: Preprocess, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no eos_token, which ends captions: use GPT-2's own.")
        self.preprocess, self.tokenizer, self.chat_template = preprocess, tokenizer, None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.preprocess}, {type(self.tokenizer).__name__})"

    @classmethod
    def from_pretrained(cls, path_or_name: str | os.PathLike[str], **kwargs: Any) -> ClipCapProcessor:
        """The processor that `save_pretrained` wrote, or else that of the captioner there.

        Args:
            path_or_name: packaged name ("tiny"), directory or hub id.
            kwargs: taken for AutoProcessor's sake, such as `trust_remote_code`; no code that comes with it is run.

        Raises:
            UserError: there is neither, or a backbone of the captioner cannot be found.
        """
        source = locate(path_or_name, PACKAGED, WHAT) if _is_captioner(path_or_name) else os.fspath(path_or_name)
        path = Path(source) / FILE
        if path.is_file():
            with loading(source, PACKAGED, WHAT):
                fields = json.loads(path.read_text(encoding="utf-8"))["image"]
                return cls(Preprocess.from_dict(fields), load_tokenizer(source))
        model = ClipCapModel.from_pretrained(path_or_name)
        if model.config.clip is None or model.tokenizer is None:
            raise UserError(f"captioner {str(path_or_name)!r} does not name its CLIP and its GPT-2: give a processor.")
        return cls(load_clip(model.config.clip, device="cpu").preprocess, model.tokenizer)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Write `processor_config.json` and the tokenizer.

        Args:
            save_directory: where.
            push_to_hub: then upload both, as `push_to_hub` does.
            kwargs: `push_to_hub`'s; its `repo_id` is the directory's name when left out.

        Raises:
            UserError: they cannot be written.
        """
        with saving(save_directory, "processor"):
            write_json(
                Path(save_directory) / FILE,
                {"processor_class": type(self).__name__, "image": self.preprocess.to_dict()},
            )
            self.tokenizer.save_pretrained(save_directory)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)

    def __call__(
        self,
        images: ImageSource | Sequence[ImageSource] | None = None,
        text: str | Sequence[str] | None = None,
        *,
        return_tensors: str | None = "pt",
        padding: bool | str = True,
    ) -> BatchFeature:
        """What the model takes: `pixel_values` (b, 3, s, s) of images; `input_ids`, `attention_mask` of texts.

        Texts without images are captions, which get their end token; with images they are prompts, which
        `ClipCapModel.generate` goes on from.

        Args:
            images: one, or several.
            text: one, or several.
            return_tensors: "pt": tensors of torch.
            padding: captions are padded on the right, whatever it is.

        Raises:
            UserError: neither images nor text, an image that cannot be read, tensors of another library, or captions
                of several lengths that are not to be padded.
        """
        if images is None and text is None:
            raise UserError("images and text are both None: give one of them.")
        if return_tensors not in ("pt", None):
            raise UserError(f"return_tensors is {return_tensors!r}: use 'pt', torch's.")
        found: dict[str, Any] = {}
        if images is not None:
            several: list[Any] = list(images) if isinstance(images, list | tuple) else [images]
            found["pixel_values"] = self.preprocess([read_image(image) for image in several])
        if text is not None:
            texts = [text] if isinstance(text, str) else list(text)
            end = [self.tokenizer.eos_token_id] if images is None else []
            rows = [torch.tensor(prompt_tokens(self.tokenizer, t) + end, dtype=torch.long) for t in texts]
            if padding is False and len({len(row) for row in rows}) > 1:
                raise UserError("padding is False but the texts have several lengths: use padding=True.")
            pad = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
            found["attention_mask"] = (pad >= 0).long()
            found["input_ids"] = pad.where(pad >= 0, self.tokenizer.eos_token_id)
        return BatchFeature(found)

    def decode(self, token_ids: Any, *, skip_special_tokens: bool = True, **kwargs: Any) -> str:
        """A caption's text, by default without the end token; `kwargs` are the tokenizer's `decode`'s."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens, **kwargs).strip()

    def batch_decode(self, token_ids: Any, *, skip_special_tokens: bool = True, **kwargs: Any) -> list[str]:
        """The texts of several captions."""
        return [self.decode(row, skip_special_tokens=skip_special_tokens, **kwargs) for row in token_ids]

    def post_process_image_text_to_text(self, token_ids: Any, **kwargs: Any) -> list[str]:
        """`batch_decode`, by the name that transformers' pipeline has for it; its spaces are those of the tokenizer."""
        kwargs.pop("clean_up_tokenization_spaces", None)
        return [self.tokenizer.decode(row, **{"skip_special_tokens": True} | kwargs) for row in token_ids]


def _is_captioner(path_or_name: str | os.PathLike[str]) -> bool:
    """Not a directory that holds a processor alone."""
    path = Path(path_or_name)
    return not (path / FILE).is_file() or (path / "config.json").is_file()
