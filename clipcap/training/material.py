"""What a captioner is trained on: captions, and each image or text encoded once."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from clipcap.data.dataset import CaptionedImage
from clipcap.data.embeddings import build_store
from clipcap.data.members import exists
from clipcap.data.readers import is_plain_text, read_dataset
from clipcap.data.store import EmbeddingStore
from clipcap.data.views import with_views
from clipcap.retrieval import Datastore, number_images
from clipcap.training.capdec import TextStore, build_text_store, one_item_a_caption, read_captions
from clipcap.training.settings import TrainConfig
from common.checks import UserError, printable
from common.clip import FrozenCLIP
from common.decoders.families import positions
from common.gpt2 import load_gpt2
from common.processes import is_first_process
from common.progress import Progress


def embed_with_progress(
    items: list[CaptionedImage], config: TrainConfig, clip: FrozenCLIP, directory: Path
) -> EmbeddingStore:
    """Encode all images once, with a progress bar, and name what was skipped."""
    with progress_bar(len(items), f"embedding images with CLIP {config.clip}", " images") as bar:
        store = build_store(
            items,
            clip,
            directory,
            inputs=config.inputs,
            precision=config.runtime.precision,
            progress=lambda done: bar.update(done - bar.n),
            workers=config.workers,
            max_pixels=config.limit.max_pixels,
        )
    if store.skipped and is_first_process():
        print(f"skipped {len(store.skipped)} of {len(items)} images:", file=sys.stderr)
        for reason in list(store.skipped.values())[:10]:
            print(f"  {printable(reason)}", file=sys.stderr)
    return store


def progress_bar(total: int, what: str, unit: str) -> Any:
    return Progress(total=total, desc=what, unit=unit, disable=not is_first_process())


def _embed_texts(items: list[CaptionedImage], clip: FrozenCLIP, directory: Path) -> TextStore:
    with progress_bar(len(items), f"embedding captions with CLIP {clip.name}", " captions") as bar:
        return build_text_store(items, clip, directory, progress=lambda done: bar.update(done - bar.n))


@dataclass(frozen=True)
class Material:
    """What a captioner is trained and validated on."""

    items: dict[str, list[CaptionedImage]]
    """By split; "val" may be empty."""
    stores: dict[str, Any]
    """Embedding store of each split that has items."""
    datastore: Datastore | None = None
    """Captions to retrieve."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Images that could not be read, with the reason."""

    @property
    def width(self) -> int:
        """Width of an embedding."""
        return int(self.stores["train"].array.shape[-1])


def read_items(config: TrainConfig) -> dict[str, list[CaptionedImage]]:
    """The captions by split.

    Raises:
        UserError: nothing to train on, or anything in the data that cannot be read.
    """
    if config.text_only and config.format == "auto" and is_plain_text(config.data):
        items = read_captions(config.data)
    else:
        items = read_dataset(
            config.data,
            images=config.images,
            skip_missing=config.skip_missing,
            format=config.format,
            need_images=not config.text_only,
        )
    by_split = {split: [item for item in items if item.split == split] for split in ("train", "val")}
    if not by_split["train"]:
        raise UserError(f"{str(config.data)!r} has nothing in its train split: check its 'split' fields.")
    return by_split


def encode_items(config: TrainConfig, by_split: dict[str, list[CaptionedImage]], clip: FrozenCLIP) -> Material:
    """Encode images, or with --text-only captions, once."""
    directory = config.embeddings or config.out / "embeddings"
    directory.parent.mkdir(parents=True, exist_ok=True)
    if not config.text_only:
        by_split = by_split | {"train": with_views(by_split["train"], config.views)}
        store = embed_with_progress(by_split["train"] + by_split["val"], config, clip, directory)
        stores = {split: store for split, part in by_split.items() if part}
        datastore = build_datastore(by_split["train"], store, config, clip) if config.retrieval else None
        return Material(by_split, stores, datastore, store.skipped)
    train, val = one_item_a_caption(by_split["train"]), by_split["val"]
    if val and all(exists(item.path) for item in val):  # judged on images all the same
        texts = _embed_texts(train, clip, directory)
        images = embed_with_progress(val, config, clip, directory / "val")
        return Material({"train": train, "val": val}, {"train": texts, "val": images}, skipped=images.skipped)
    val = one_item_a_caption(val)
    texts = _embed_texts(train + val, clip, directory)
    return Material({"train": train, "val": val}, {"train": texts} | ({"val": texts} if val else {}))


def build_datastore(
    items: list[CaptionedImage], store: EmbeddingStore, config: TrainConfig, clip: FrozenCLIP
) -> Datastore:
    """The training captions with their embeddings; images that share an embedding are one."""
    kept = [item for item in items if item.image_id in store]
    numbers = number_images([store[store.row(item.image_id)] for item in kept])
    texts = one_item_a_caption(kept)
    owners = [number for number, item in zip(numbers, kept, strict=True) for _ in item.captions]
    embeddings = _embed_texts(texts, clip, config.out / "datastore").array
    gpt2, tokenizer = load_gpt2(config.gpt2)
    captions = [item.captions[0] for item in texts]
    datastore = Datastore.build(captions, owners, torch.from_numpy(embeddings[:]), tokenizer)
    taken = datastore.prompt_length(config.retrieval)
    if taken + config.prefix_length >= positions(gpt2.config):
        raise UserError(
            f"retrieval is {config.retrieval}: the captions and the prefix of {config.prefix_length} take "
            f"{taken + config.prefix_length} of GPT-2's {positions(gpt2.config)} positions, use fewer."
        )
    return datastore
