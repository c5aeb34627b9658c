"""Photographs through the packaged CLIP's image tower per CPU second, as it is shipped against the eager tower.

Eager is the library's EfficientNet-Lite0 as its weights come; shipped is the copy that captions, embeddings and probes
use on a CPU: batch norms folded into the convolutions, channels last (`common.encoders.folded`). Both start from
preprocessed pixels, give the embedding and the 7x7 patches, and run in turns, so that a busy machine slows both.

Keys of the last line: `shipped_ratio` and `shipped_batch_ratio`, times faster than the eager tower for one photograph
and for a batch; `eager_seconds`, `shipped_seconds`, `eager_batch_seconds`, `shipped_batch_seconds`, CPU seconds for
each photograph; `difference`, the largest of an embedding of length 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import parser_of, print_result
from benchmarks.timing import in_turns
from common.clip import load_clip


def main() -> None:
    parser = parser_of(__doc__, quick="fewer rounds", threads=True, seed="the pixels")
    parser.add_argument("--batch-size", type=int, default=16, help="photographs in a batch")
    parser.add_argument("--clip", default="photo", help="a convolutional encoder of transformers or a packaged one")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    repeats = 3 if arguments.quick else 15
    clip = load_clip(arguments.clip, device="cpu")
    size = clip.image_size
    pixels = torch.randn(arguments.batch_size, 3, size, size, generator=torch.Generator().manual_seed(arguments.seed))

    @torch.no_grad()
    def eager(batch: Tensor) -> Tensor:
        return clip.encode_image_features(batch).embedding

    def shipped(batch: Tensor) -> Tensor:
        return clip.encode_image_features(batch, packed=True).embedding

    def rows(way: Callable[[Tensor], Tensor]) -> Tensor:
        return F.normalize(way(pixels).float(), dim=-1)

    difference = (rows(eager) - rows(shipped)).abs().max().item()  # and the warm-up
    one = pixels[:1].clone()
    single = in_turns({"eager": lambda: eager(one), "shipped": lambda: shipped(one)}, repeats)
    batch = in_turns({"eager": lambda: eager(pixels), "shipped": lambda: shipped(pixels)}, max(1, repeats // 3))
    batch = {name: seconds / len(pixels) for name, seconds in batch.items()}
    for what, times in (("one photograph", single), (f"{len(pixels)} at once", batch)):
        shown = ", ".join(f"{name} {1000 * seconds:.1f} ms" for name, seconds in times.items())
        print(f"{what}: {shown} a photograph, {times['eager'] / times['shipped']:.2f}x", flush=True)
    result = {
        "clip": arguments.clip,
        "batch_size": len(pixels),
        "shipped_ratio": single["eager"] / single["shipped"],
        "shipped_batch_ratio": batch["eager"] / batch["shipped"],
        "eager_seconds": single["eager"],
        "shipped_seconds": single["shipped"],
        "eager_batch_seconds": batch["eager"],
        "shipped_batch_seconds": batch["shipped"],
        "difference": difference,
    }
    print_result(result)


if __name__ == "__main__":
    main()
