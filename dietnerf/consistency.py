"""How similar an encoder finds views of one scene and of different scenes (Jain et al. 2021, figure 26)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import tyro
from jaxtyping import Float
from torch import Tensor

from common.checks import UserError, require_at_least, require_place
from common.files import write_json
from common.images import ImageLimit
from common.progress import Progress
from common.report import Page
from common.runtime import RuntimeConfig, autocast, provenance, start
from dietnerf.data import FewViewDataset, FewViewParserConfig
from dietnerf.semantic import load_encoder

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class ConsistencyConfig:
    """Measure the similarity of embeddings within and across scenes: what the semantic loss can rest on."""

    scenes: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Directories of scenes, best two or more."""
    encoder: str = "tiny"
    """Image encoder: tiny, a Hugging Face id or directory, open_clip:ARCH/TAG-or-path, timm:NAME[/PATH] or
    torchvision:NAME[/PATH]."""
    feature: Literal["class_token", "embedding"] = "class_token"
    """What of it is compared."""
    split: Literal["train", "val", "test"] = "train"
    """Views of each scene."""
    views: int = 20
    """At most so many views of each scene, evenly spread over its list."""
    out: Path = Path("out/consistency")
    """Where results.json and the page go."""
    limit: ImageLimit = field(default_factory=ImageLimit)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)


@dataclass(frozen=True)
class Similarities:
    """Cosine similarities of pairs of views."""

    within: dict[str, Float[Tensor, " p"]]
    """By scene: pairs of two of its views."""
    across: Float[Tensor, " q"]
    """Pairs of views of different scenes."""


def pair_similarities(embeddings: Mapping[str, Float[Tensor, "n e"]]) -> Similarities:
    """Cosine similarity of every pair of views, each pair once."""
    units = {name: torch.nn.functional.normalize(e.float(), dim=-1) for name, e in embeddings.items()}
    within = {}
    for name, unit in units.items():
        first, second = torch.triu_indices(len(unit), len(unit), offset=1)
        within[name] = (unit @ unit.T)[first, second]
    names = list(units)
    blocks = [(units[a] @ units[b].T).flatten() for i, a in enumerate(names) for b in names[i + 1 :]]
    return Similarities(within, torch.cat(blocks) if blocks else torch.empty(0))


def plot_similarities(found: Similarities) -> Figure:
    """Histograms of both kinds of pairs, each of area 1."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    groups = {"views of one scene": torch.cat(list(found.within.values())), "views of different scenes": found.across}
    shown = {name: values.numpy() for name, values in groups.items() if len(values)}
    low = min(float(values.min()) for values in shown.values())
    for name, values in shown.items():
        axes.hist(values, bins=40, range=(min(low, 0.9), 1.0), density=True, alpha=0.6, label=name)
    axes.set_xlabel("cosine similarity of embeddings")
    axes.set_ylabel("share of pairs")
    axes.set_yticks([])
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def embed_scene(
    path: Path,
    encoder: Any,
    *,
    feature: str,
    split: str = "train",
    views: int = 20,
    max_megapixels: float = ImageLimit.max_megapixels,
) -> Float[Tensor, "n e"]:
    """Embeddings of at most `views` views of a scene (by a classifier, which has one feature, that one)."""
    parser = FewViewParserConfig(data=path, max_megapixels=max_megapixels).setup()
    data = FewViewDataset(parser.get_dataparser_outputs(split))
    stride = max(1, -(-len(data) // views))
    found = []
    for index in range(0, len(data), stride):
        image = data.load(index)[0].permute(2, 0, 1)[None]
        with torch.no_grad():
            features = encoder(image)
        found.append(features[encoder.feature_of(features, feature)].cpu())
    return torch.cat(found)


def measure(config: ConsistencyConfig) -> dict[str, Any]:
    """Measure, and write results.json, histogram.svg and index.html; returns what results.json holds."""
    if not config.scenes:
        raise UserError("0 scenes are given: name at least one directory.")
    require_at_least("views", config.views, 2)
    require_place(config.out, directory=True)
    device = start(config.runtime)
    encoder = load_encoder(config.encoder, device=device)
    embeddings: dict[str, Tensor] = {}
    for path in Progress(config.scenes, desc=f"embedding with {config.encoder}", unit=" scenes"):
        name = path.name if path.name not in embeddings else str(path)
        if name in embeddings:
            raise UserError(f"scene {str(path)!r} is given twice: name each once.")
        with autocast(device, config.runtime.precision):
            embeddings[name] = embed_scene(
                path,
                encoder,
                feature=config.feature,
                split=config.split,
                views=config.views,
                max_megapixels=config.limit.max_megapixels,
            )
        if len(embeddings[name]) < 2:
            raise UserError(f"scene {str(path)!r} has one {config.split} view: pairs need 2, take another --split.")
    found = pair_similarities(embeddings)
    everything = torch.cat(list(found.within.values()))
    record: dict[str, Any] = {
        "config": asdict(config),
        "within": summary(everything),
        "across": summary(found.across) if len(found.across) else None,
        "scenes": {name: {"views": len(embeddings[name]), **summary(v)} for name, v in found.within.items()},
        **provenance(),
    }
    write_json(config.out / "results.json", record)
    figure = plot_similarities(found)
    figure.savefig(config.out / "histogram.svg")
    page = Page("Similarity of views", f"Encoder {config.encoder}, {config.feature}")
    page.section(
        "Within and across scenes",
        "The semantic loss can tell a right view from a wrong one only as far as views of one scene are more alike "
        "than views of different scenes.",
    )
    page.figure(figure, "Cosine similarity of the embeddings of two views")
    page.table([{"pairs": "of one scene", **record["within"]}])
    if record["across"]:
        page.table([{"pairs": "of different scenes", **record["across"]}])
    page.table([{"scene": name, **values} for name, values in record["scenes"].items()])
    page.details("configuration, hardware and versions", record)
    page.write(config.out / "index.html")
    return record


def summary(values: Float[Tensor, " p"]) -> dict[str, float | int]:
    """Number of pairs, mean, spread and range of similarities."""
    return {
        "number": len(values),
        "mean": float(values.mean()),
        "spread": float(values.std(correction=0)),
        "least": float(values.min()),
        "most": float(values.max()),
    }


def run(config: ConsistencyConfig) -> int:
    """`dietnerf consistency`: measure and print the means."""
    record = measure(config)
    print(f"views of one scene: {record['within']['mean']:.4f} ± {record['within']['spread']:.4f}")
    if record["across"]:
        print(f"views of different scenes: {record['across']['mean']:.4f} ± {record['across']['spread']:.4f}")
    print(f"page: {config.out / 'index.html'}")
    return 0
