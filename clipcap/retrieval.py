"""Retrieved captions as text in the prefix, from a datastore kept with the captioner (SmallCap, Ramos et al. 2023).

The datastore holds captions with CLIP's embeddings of them; for an image, those whose embeddings are nearest to its
own (cosine) are written before what the mapper makes of it. While training, an image's own captions are left out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from common.checks import UserError, require_file
from common.pretrained import require_finite, saving

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from clipcap.config import ClipCapConfig

FILE = "datastore.safetensors"
"""Name of the datastore in a captioner's directory."""
PART = 65536
"""Captions that are compared at once, so that a datastore of half precision is never converted in full."""
LONGEST = 40
"""Tokens of a caption that are kept."""


class Datastore:
    """Captions by their embeddings.

    Args:
        embeddings: of the captions, of length 1, float16.
        tokens: of the captions, which end with a line break, padded on the left with `pad`.
        owners: number of the image that each caption belongs to.
        pad: token id of padding.
    """

    def __init__(
        self,
        embeddings: Float[Tensor, "n e"],
        tokens: Int[Tensor, "n t"],
        owners: Int[Tensor, " n"],
        pad: int,
    ) -> None:
        self.embeddings, self.tokens, self.owners, self.pad = embeddings, tokens, owners, pad

    @classmethod
    def build(
        cls,
        captions: Sequence[str],
        owners: Sequence[int],
        embeddings: Float[Tensor, "n e"],
        tokenizer: PreTrainedTokenizerBase,
    ) -> Datastore:
        """A datastore of `captions`; those of one image (`owners`) are never retrieved for it in training."""
        if not captions:
            raise UserError("the datastore has 0 captions: give at least 1.")
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no eos_token, which fills up short captions: use a GPT-2 with one.")
        encoded = tokenizer([caption.strip() for caption in captions], add_special_tokens=False)["input_ids"]
        newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
        rows = [[*ids[: LONGEST - len(newline)], *newline] for ids in encoded]
        pad = int(tokenizer.eos_token_id)
        width = max(map(len, rows))
        tokens = torch.full((len(rows), width), pad, dtype=torch.int32)
        for row, ids in enumerate(rows):
            tokens[row, width - len(ids) :] = torch.tensor(ids)
        unit = F.normalize(embeddings.float(), dim=-1).half()
        return cls(unit, tokens, torch.tensor(owners, dtype=torch.int64), pad)

    def __len__(self) -> int:
        return len(self.tokens)

    def prompt_length(self, count: int) -> int:
        """Tokens of a prompt of `count` captions, padding included."""
        return count * self.tokens.shape[1]

    def require_fits(self, config: ClipCapConfig, vocabulary: int, source: str) -> None:
        """Raise UserError when this was not made for the captioner at `source` with this config."""
        length, width = self.prompt_length(config.retrieval), self.embeddings.shape[1]
        largest = int(self.tokens.max())
        if (length, width) != (config.retrieval_tokens, config.clip_width) or largest >= vocabulary:
            raise UserError(
                f"captioner {source!r}: its {FILE} has prompts of {length} tokens up to {largest} and embeddings of "
                f"width {width}, but its config asks for {config.retrieval_tokens} tokens below {vocabulary} and "
                f"width {config.clip_width}: copy the whole captioner again."
            )

    def nearest(
        self, queries: Float[Tensor, "b e"], count: int, own: Int[Tensor, " b"] | None = None
    ) -> Int[Tensor, "b k"]:
        """Rows of the `count` captions of largest cosine with each query, the nearest first.

        Captions with the same tokens count once. `own` is the image of each query, whose captions are left out. The
        search is on the queries' GPU, else on the CPU; rows are on the CPU.

        Raises:
            UserError: fewer than `count` captions are left for a query.
        """
        unit = F.normalize(queries.float(), dim=-1)
        unit = unit if unit.is_cuda else unit.cpu()
        wanted = count
        while True:
            values, rows = (found.cpu() for found in self._search(unit, wanted, own))
            chosen = [self._distinct(found, score, count) for found, score in zip(rows, values, strict=True)]
            if all(len(found) == count for found in chosen):
                return torch.tensor(chosen, dtype=torch.long).view(len(unit), count)
            if wanted >= len(self):
                least = min(map(len, chosen))
                raise UserError(f"retrieval is {count} but only {least} other captions are there: use at most {least}.")
            wanted = min(4 * wanted, len(self))

    def _search(
        self, unit: Float[Tensor, "b e"], count: int, own: Int[Tensor, " b"] | None
    ) -> tuple[Float[Tensor, "b k"], Int[Tensor, "b k"]]:
        values = torch.empty(len(unit), 0, device=unit.device)
        rows = torch.empty(len(unit), 0, dtype=torch.long, device=unit.device)
        for begin in range(0, len(self), PART):
            part = self.embeddings[begin : begin + PART].to(unit.device)
            similarity = unit @ part.float().T  # (b, part)
            if own is not None:
                mine = own[:, None].to(unit.device) == self.owners[None, begin : begin + PART].to(unit.device)
                similarity = similarity.masked_fill(mine, -torch.inf)
            best, where = similarity.topk(min(count, similarity.shape[1]), -1)
            values, rows = torch.cat([values, best], 1), torch.cat([rows, where + begin], 1)
            values, order = values.topk(min(count, values.shape[1]), -1)
            rows = rows.gather(1, order)
        return values, rows

    def _distinct(self, rows: Int[Tensor, " k"], values: Float[Tensor, " k"], count: int) -> list[int]:
        """The first `count` of `rows` that differ in their tokens and are not left out."""
        found: dict[tuple[int, ...], int] = {}
        for row, value in zip(rows.tolist(), values.tolist(), strict=True):
            if value > -torch.inf and len(found) < count:
                found.setdefault(tuple(self.tokens[row].tolist()), row)
        return list(found.values())

    def prompts(
        self, queries: Float[Tensor, "b e"], count: int, own: Int[Tensor, " b"] | None = None
    ) -> Int[Tensor, "b r"]:
        """Token ids of the nearest captions, the nearest last, padded on the left to `prompt_length(count)`."""
        rows = self.nearest(queries, count, own).flip(1)
        prompts = self.tokens[rows].long().flatten(1)  # padding between the captions
        is_text = prompts != self.pad
        order = is_text.int().argsort(dim=1, stable=True)  # padding first, text in its order
        return prompts.gather(1, order)

    def save(self, path: Path) -> None:
        """Write the datastore to `path`, whole or not at all.

        Raises:
            UserError: the disk is full, or it cannot be written.
        """
        from safetensors.torch import save_file

        tensors = {"embeddings": self.embeddings, "tokens": self.tokens, "owners": self.owners}
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            with saving(path, "datastore"):
                path.parent.mkdir(parents=True, exist_ok=True)
                save_file(tensors, temporary, {"pad": str(self.pad)})
                temporary.chmod(0o644)
                temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> Datastore:
        """Read what `save` wrote.

        Raises:
            UserError: the file is missing or damaged.
        """
        from safetensors import SafetensorError, safe_open

        require_file(path, "datastore of retrieved captions")
        damaged = f"datastore {str(path)!r} is damaged"
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in ("embeddings", "tokens", "owners")}
                pad = int(file.metadata()["pad"])
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{damaged} ({error}): copy the captioner again.") from error
        embeddings, tokens, owners = tensors.values()
        count = len(embeddings) if embeddings.ndim else 0
        if (
            (embeddings.ndim, tokens.ndim, tuple(owners.shape)) != (2, 2, (count,))
            or len(tokens) != count
            or min(embeddings.numel(), tokens.numel()) == 0
            or not embeddings.is_floating_point()
            or tokens.dtype not in (torch.int32, torch.int64)
            or owners.dtype != torch.int64
            or min(pad, int(tokens.min())) < 0
        ):
            shapes = ", ".join(f"{name} {tensor.dtype} {tuple(tensor.shape)}" for name, tensor in tensors.items())
            raise UserError(f"{damaged} ({shapes}, pad {pad}): copy the captioner again.")
        require_finite({"embeddings": embeddings}, f"datastore {str(path)!r}")
        return cls(embeddings, tokens, owners, pad)


class PromptedDataset(Dataset[dict[str, Any]]):
    """A caption data set whose items also hold the `prompt` of their image, without the image's own captions.

    Args:
        pairs: items with an `embedding`.
        embeddings: of the images of the datastore, in the order of its `owners`; images that share one are one.
        prompts: of these images.
    """

    def __init__(
        self, pairs: Dataset[dict[str, Any]], embeddings: Sequence[Tensor], prompts: Int[Tensor, "n r"]
    ) -> None:
        self.pairs = pairs
        self.prompts = {embedding_key(row): prompt for row, prompt in zip(embeddings, prompts, strict=True)}

    def __len__(self) -> int:
        return len(self.pairs)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.pairs[index]
        return item | {"prompt": self.prompts[embedding_key(item["embedding"])]}


def embedding_key(embedding: Float[Tensor, " e"]) -> int:
    """What tells images apart: two with the same embedding are one image."""
    return int.from_bytes(hashlib.blake2b(embedding.numpy().tobytes(), digest_size=8).digest(), "big")


def number_images(embeddings: Sequence[Float[Tensor, " e"]]) -> list[int]:
    """A number for each image, the same for images with the same embedding."""
    numbers: dict[int, int] = {}
    return [numbers.setdefault(embedding_key(row), len(numbers)) for row in embeddings]
