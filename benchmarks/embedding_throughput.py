"""Images embedded per CPU second (ViT-B/32, random weights) against the original's way, one image at a time.

The original's way is the library's model in fp32; ours is what `clipcap embed` runs, batches through the packed tower
(`common.vision`). Both start from preprocessed pixels and give the same embeddings. The original also encodes an image
again for each of its captions (five in COCO), which is counted apart.

Keys of the last line: `embed_{fp32|bf16}_ratio`, times faster than one image at a time in fp32; `..._seconds`, CPU
seconds for each image; `..._of_floor`, arithmetic over the matrix rate measured in this run, as a share of the time;
`..._difference`, largest difference of an embedding of length 1; `embed_{precision}_with_captions_ratio`, the same
ratio when the plain side encodes an image once per caption. A processor without bf16 leaves `bf16` out.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from benchmarks import parser_of, print_result
from benchmarks.caption_throughput import fast_precisions, matrix_rate
from benchmarks.timing import cpu_seconds
from common.runtime import fork_generators, resolve_dtype
from common.vision import packed_vision

CAPTIONS = 5
TOKENS = 50


def main() -> None:
    parser = parser_of(__doc__, quick="16 images instead of 64, once", threads=True, seed="weights and images")
    parser.add_argument("--batch-size", type=int, default=32, help="images encoded at once")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    count, repeats = (16, 1) if arguments.quick else (64, 3)
    with fork_generators(arguments.seed):
        vision = CLIPVisionModelWithProjection(CLIPVisionConfig(projection_dim=512)).eval()
    pixels = torch.randn(count, 3, 224, 224, generator=torch.Generator().manual_seed(arguments.seed))
    result: dict[str, object] = {"images": count, "captions": CAPTIONS}

    @torch.inference_mode()
    def plain() -> Tensor:
        return torch.cat([vision(pixel_values=image).image_embeds for image in pixels.split(1)])

    @torch.inference_mode()
    def ours(dtype: torch.dtype) -> Tensor:
        tower = packed_vision(vision, dtype)
        if tower is None:
            raise SystemExit(f"{dtype} weights cannot be packed here: use a CPU and a torch with oneDNN.")
        return torch.cat([tower(batch)[1] for batch in pixels.split(arguments.batch_size)])

    plain_rows = F.normalize(plain(), dim=-1)  # also the warm-up
    plain_seconds = cpu_seconds(plain, repeats) / count
    result["plain_seconds"] = plain_seconds
    print(f"one image at a time, fp32: {plain_seconds:.4f} s an image", flush=True)
    arithmetic = TOKENS * sum(p.numel() for p in vision.vision_model.encoder.parameters())
    for precision in fast_precisions():
        dtype = resolve_dtype(precision)
        floor = arithmetic / matrix_rate(dtype)
        difference = (F.normalize(ours(dtype).float(), dim=-1) - plain_rows).abs().max().item()  # packs, once
        seconds = cpu_seconds(partial(ours, dtype), repeats) / count
        key = f"embed_{precision}"
        result |= {
            f"{key}_ratio": plain_seconds / seconds,
            f"{key}_with_captions_ratio": CAPTIONS * plain_seconds / seconds,
            f"{key}_seconds": seconds,
            f"{key}_of_floor": floor / seconds,
            f"{key}_difference": difference,
        }
        ratio, share = plain_seconds / seconds, floor / seconds
        print(f"{key}: {seconds:.4f} s an image, {ratio:.2f}x, {share:.0%} of the floor", flush=True)
    print_result(result)


if __name__ == "__main__":
    main()
