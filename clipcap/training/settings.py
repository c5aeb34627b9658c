"""What `clipcap train` is asked for, and whether it can work."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from clipcap.backbones import absolute, located, require_copyable
from clipcap.config import ClipCapConfig
from clipcap.data.dataset import CaptionedImage
from clipcap.data.readers import Format
from common.checks import UserError, require_fields_at_least, require_rate
from common.images import ImageLimit
from common.pretrained import CAPTIONERS, read_config
from common.runtime import RuntimeConfig
from common.training import GradientConfig, ScaleConfig, settings_of

FREE = (
    "data", "images", "out", "embeddings", "format", "skip_missing", "workers", "epochs", "steps", "val_every",
    "val_captions", "val_beams", "monitor", "patience", "resume", "bundle", "devices", "num_nodes", "strategy",
)  # fmt: skip
"""Settings that may be others when a run is resumed; its captions must be the same wherever they are."""

PAPER_RATE, SMALL_RATE, SMALL = 2e-5, 1e-3, 512
"""AdamW's rate for GPT-2, and for decoders narrower than SMALL, which need a higher one."""


@dataclass(frozen=True)
class TrainConfig:
    """Train a captioner on your images.

    DATA is a Karpathy JSON file (COCO, Flickr8k, Flickr30k), or a folder of images with captions.csv or
    captions.jsonl (columns file_name and caption), or with a text file of captions beside each image, or one of the
    other layouts that --format names.

    The captions of images that are held out are written to OUT/samples.html while it trains, the losses and scores to
    OUT/metrics.csv and OUT/tensorboard. The same command resumes a run that was interrupted.
    """

    data: Path
    """Captions with their images; with --text-only also captions without them, or a .txt file with a caption a line."""
    images: Path | None = None
    """Directory of the images, when they are not beside the captions."""
    out: Path = Path("out/captioner")
    """Where the run goes; the trained captioner is in its folder `model`."""
    embeddings: Path | None = None
    """Directory of the embedding store, OUT/embeddings when not given; runs with the same images and CLIP share it."""
    format: Format = "auto"
    """Layout of DATA, where it should not be guessed from its content."""
    skip_missing: bool = False
    """Leave out captions whose image is missing and images without a caption, instead of stopping."""
    workers: int = 2
    """Processes that read images; 0 reads them in this one."""
    init: Path | None = None
    """Trained captioner to continue from: photo, tiny, or a directory; its sizes, CLIP and GPT-2, frozen or not, are
    then used."""
    clip: str = "photo"
    """Image encoder: photo or tiny (packaged, of photographs and of rendered scenes), a Hugging Face id or directory,
    open_clip:ARCH/TAG-or-path, timm:NAME[/PATH] or torchvision:NAME[/PATH]."""
    gpt2: str = "tiny"
    """GPT-2, or any other causal decoder: tiny, tiny-medium, a Hugging Face id or directory."""
    mapper: Literal["mlp", "transformer"] = "transformer"
    """Mapping network."""
    tune_gpt2: bool = False
    """Train GPT-2 with the mapper (the paper's fine-tuned variant), instead of keeping it frozen."""
    lora: int = 0
    """Rank of low-rank updates of GPT-2 (LoRA), between frozen and fine-tuned; 0 for none."""
    bundle: bool = False
    """Copy CLIP and GPT-2 into the captioner's directory, so that it can be moved to another machine."""
    prefix_length: int = 10
    """Prefix embeddings per image (the paper's K)."""
    clip_length: int = 10
    """Tokens that the Transformer mapper makes of the embedding."""
    mapper_layers: int = 8
    """Layers of the Transformer mapper."""
    mapper_heads: int = 8
    """Attention heads of the Transformer mapper."""
    inputs: Literal["embedding", "patches"] = "embedding"
    """What the mapper reads: the pooled embedding (the paper), or the patch features."""
    views: int = 1
    """Views of each training image: itself, and random ones (cropped, mirrored, smaller, recompressed) beside it."""
    normalize_embeddings: bool = False
    """Scale embeddings to length 1 before the mapper."""
    epochs: int = 10
    """Passes over the captions, each with every view of its image."""
    steps: int = 0
    """Optimizer steps, when not 0, instead of epochs."""
    batch_size: int = 40
    """Captions in a batch of each process."""
    lr: float | None = None
    """AdamW's peak learning rate. Left out, the paper's 2e-5, or 1e-3 for decoders narrower than 512, such as tiny;
    with --init a tenth of that."""
    warmup: int = 5000
    """Steps of linear warm-up; at most a tenth of the run."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """How the rate falls to 0 after warm-up; linear is the paper's."""
    weight_decay: float = 0.01
    """AdamW's weight decay."""
    max_tokens: int = 67
    """Longest caption, its end token included."""
    val_every: int = 0
    """Steps between validations; 0 is a tenth of the run, at most 500."""
    val_captions: int = 200
    """Images that are captioned at each validation, for CIDEr and OUT/samples.html; 0 for none."""
    val_beams: int = 1
    """Beams of these captions; 1 is greedy."""
    monitor: Literal["auto", "loss", "cider"] = "auto"
    """What the best checkpoint is the best in, on the validation split; auto is cider with --scst, else loss."""
    patience: int = 0
    """Validations without improvement after which the run ends; 0 never ends it early."""
    text_only: bool = False
    """Train on the captions alone, no images: noisy CLIP embeddings of captions stand in for images (CapDec)."""
    text_noise: float = 0.016
    """Variance of that noise."""
    scst: bool = False
    """Self-critical training on CIDEr of a captioner given by --init: use a low rate, such as 1e-5."""
    scst_samples: int = 5
    """Captions sampled for each image of a batch with --scst."""
    retrieval: int = 0
    """Captions of similar images (from the training captions, by CLIP) put as text before each caption; 0 for none."""
    resume: bool = True
    """Resume from last.ckpt in OUT when there is one; --no-resume starts over."""
    gradients: GradientConfig = field(default_factory=GradientConfig)
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    limit: ImageLimit = field(default_factory=ImageLimit)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)


def settings_of_run(config: TrainConfig, items: list[CaptionedImage]) -> dict[str, Any]:
    """What a resumed run must have in common with its beginning."""
    texts = "\0".join(text for item in items for text in (item.image_id, *item.captions))
    digest = hashlib.sha256(texts.encode("utf-8", "surrogatepass"))
    captions = f"{sum(len(item.captions) for item in items)} with hash {digest.hexdigest()[:12]}"
    return settings_of(config, FREE) | {"captions": captions}


def resolve_init(config: TrainConfig) -> TrainConfig:
    """The settings with the sizes and backbones of --init; one that was given and differs is an error."""
    if config.init is None:
        return config
    init = Path(CAPTIONERS.get(str(config.init), config.init))
    if not (init / "config.json").is_file():
        raise UserError(
            f"init {str(config.init)!r} is no trained captioner: give {', '.join(CAPTIONERS)} or the directory `model` "
            f"of a run."
        )
    read_config(str(init), "captioner", ClipCapConfig.model_type)
    saved = located(ClipCapConfig.from_pretrained(init), str(init))
    plain = TrainConfig(data=config.data)
    taken: dict[str, Any] = {"init": init, "tune_gpt2": config.tune_gpt2 or saved.tune_gpt2}
    if config.text_only and not saved.normalize_embeddings:
        raise UserError(
            f"init {str(config.init)!r} reads embeddings of any length and text_only trains on those of length 1: give "
            f"a captioner trained with --text-only or --normalize-embeddings."
        )
    for name in (
        "mapper",
        "inputs",
        "prefix_length",
        "clip_length",
        "mapper_layers",
        "mapper_heads",
        "clip",
        "gpt2",
        "normalize_embeddings",
    ):
        ours, theirs = getattr(config, name), getattr(saved, name)
        if theirs is None:
            continue
        if name in ("clip", "gpt2"):
            ours = absolute(ours)
        if ours not in (getattr(plain, name), theirs):
            raise UserError(f"{name} is {ours!r} but init {str(config.init)!r} has {theirs!r}: leave it out.")
        taken[name] = theirs
    return replace(config, **taken)


def resolve_rate(config: TrainConfig) -> TrainConfig:
    """What `resolve_init` returns, with a learning rate: one that is left out goes with the width of the decoder."""
    from common.decoders import require_decoder, width

    if config.lr is not None:
        return config
    if config.init is not None:
        decoder = ClipCapConfig.from_pretrained(config.init).build_gpt2_config()
    else:
        decoder = require_decoder(config.gpt2)
    lr = SMALL_RATE if width(decoder) < SMALL else PAPER_RATE
    return replace(config, lr=lr / 10 if config.init else lr)


def check(config: TrainConfig) -> None:
    """Raise UserError for settings that cannot work."""
    config.scale.check()
    config.gradients.check()
    least_one = "batch_size max_tokens mapper_layers prefix_length val_beams epochs scst_samples views"
    require_fields_at_least(config, 1, *least_one.split())
    least_zero = "lora retrieval val_every val_captions patience text_noise warmup steps weight_decay workers"
    require_fields_at_least(config, 0, *least_zero.split())
    if config.embeddings is not None and config.embeddings.resolve() == config.out.resolve():
        raise UserError(f"embeddings and out are both {str(config.out)!r}: give each a directory of its own.")
    require_rate("lr", config.lr)
    if config.bundle:
        require_copyable("clip", config.clip)
    ways = [name for name in ("text_only", "scst", "retrieval") if getattr(config, name)]
    if len(ways) > 1:
        raise UserError(f"{' and '.join(ways)} are given together: choose one.")
    if config.views > 1 and (config.text_only or config.retrieval):
        way = "text_only" if config.text_only else "retrieval"
        raise UserError(f"views is {config.views} with {way}, which has no views of images: use 1.")
    if config.scst and config.init is None:
        raise UserError("scst is given without --init: name a trained captioner to continue from.")
    if config.retrieval and config.init is not None:
        raise UserError("retrieval is given with --init: a captioner with retrieval is trained from the start.")
    if config.lora and config.tune_gpt2:
        raise UserError("lora and tune_gpt2 are given together: choose one.")
    if config.inputs == "patches" and ways and not config.scst:
        raise UserError(f"{ways[0]} is given with inputs 'patches': texts have no patches, use 'embedding'.")
