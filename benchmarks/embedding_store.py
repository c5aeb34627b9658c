"""Opening COCO's training captions: our embedding store and token cache against the original's pickles, in one run.

The original (`train.py`, ClipCocoDataset) unpickles one dictionary for each caption, the embeddings as one float32
tensor, and a list of token tensors. Both sides hold random embeddings of width 512 and captions of COCO's lengths; each
is opened, and read once in random order, in a process of its own. Seconds are CPU seconds; memory is resident, and the
peak is the kernel's (VmHWM; ru_maxrss would begin at that of the process that started this one).

Keys of the last line: `open_ratio`, `memory_ratio`, times less than the original; `..._open_seconds` from directory to
first sample (ours reads the captions' JSON too); `store_files_open_seconds`, our store alone; `..._resident_mb` after
the whole was read, `..._peak_mb`, and `..._above_imports_mb`, the peak without what the libraries take.
"""

from __future__ import annotations

import json
import pickle
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import parser_of, print_result
from clipcap.data.dataset import CaptionDataset, CaptionedImage
from clipcap.data.store import EmbeddingStore, Source, StoreWriter
from common.gpt2 import load_gpt2

IMAGES, CAPTIONS, WIDTH = 113_287, 566_747, 512


def sizes(quick: bool) -> tuple[int, int]:
    """Images and captions: COCO's Karpathy training split with restval, or a twentieth of it."""
    return (IMAGES // 20, CAPTIONS // 20) if quick else (IMAGES, CAPTIONS)


def texts(images: int, captions: int, seed: int) -> list[list[str]]:
    """Random captions of about ten short words for each image."""
    rng = np.random.default_rng(seed)
    words = np.array("a the of on in red blue cat dog man bike table street sits holding large small two".split())
    drawn = words[rng.integers(0, len(words), (captions, 10))]
    found: list[list[str]] = [[] for _ in range(images)]
    for number, row in enumerate(drawn.tolist()):
        found[number % images].append(" ".join(row))
    return found


def write(directory: Path, images: int, captions: int, seed: int) -> None:
    """Both ways' files, with the same numbers and captions."""
    rng = np.random.default_rng(seed)
    (directory / "store").mkdir()
    writer = StoreWriter(directory / "store", {"weights": "random", "inputs": "embedding"}, "random")
    for begin in range(0, images, 4096):
        rows = rng.standard_normal((min(4096, images - begin), WIDTH), dtype=np.float32)
        writer.append([f"{begin + n:012}.jpg" for n in range(len(rows))], rows, [Source(1, 1, 1)] * len(rows))
    writer.close()
    writer.finish()
    store = EmbeddingStore(directory / "store")
    found = texts(images, captions, seed)
    (directory / "captions.json").write_text(json.dumps(found))
    _, tokenizer = load_gpt2("tiny")
    data = CaptionDataset(items(directory), store, tokenizer, max_tokens=67, cache=directory / "tokens")
    repeated = torch.from_numpy(np.concatenate(store.array.shards).astype(np.float32))[torch.from_numpy(data.rows)]
    flat = [(number, text) for number, several in enumerate(found) for text in several]
    dictionaries = [
        {"image_id": str(image), "id": n, "caption": text, "clip_embedding": n} for n, (image, text) in enumerate(flat)
    ]
    with open(directory / "train.pkl", "wb") as file:
        pickle.dump({"clip_embedding": repeated, "captions": dictionaries}, file)
    tokens = [torch.tensor(data.pair(n)[1][:-1], dtype=torch.int64) for n in range(len(data))]
    with open(directory / "train_tokens.pkl", "wb") as file:
        pickle.dump([tokens, data.rows.tolist(), int(data.lengths.max())], file)


def items(directory: Path) -> list[CaptionedImage]:
    """The captions as `read_dataset` gives them."""
    found = json.loads((directory / "captions.json").read_text())
    return [
        CaptionedImage(f"{n:012}.jpg", directory / f"{n:012}.jpg", tuple(several), "train")
        for n, several in enumerate(found)
    ]


def megabytes() -> float:
    """Resident memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def peak_megabytes() -> float:
    """Most resident memory that this process has had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024 / 1e6


def measure(way: str, directory: Path, seed: int) -> dict[str, float]:
    """Open one way's files in this process and read every sample once."""
    _, tokenizer = load_gpt2("tiny")
    imports = megabytes()
    begun, result = time.process_time(), {}
    if way == "store":
        store = EmbeddingStore(directory / "store")
        assert "000000000000.jpg" in store
        result["files_open_seconds"] = time.process_time() - begun
        data: Any = CaptionDataset(items(directory), store, tokenizer, max_tokens=67, cache=directory / "tokens")
        sample = data.__getitem__
        count = len(data)
    else:
        with open(directory / "train.pkl", "rb") as file:
            unpickled = pickle.load(file)
        embeddings, captions = unpickled["clip_embedding"], unpickled["captions"]
        with open(directory / "train_tokens.pkl", "rb") as file:
            tokens, _, _ = pickle.load(file)
        count = len(tokens)

        def sample(index: int) -> Any:
            return embeddings[captions[index]["clip_embedding"]], tokens[index]

    sample(0)
    result["open_seconds"] = time.process_time() - begun
    for index in np.random.default_rng(seed).permutation(count).tolist():
        sample(index)
    peak = peak_megabytes()
    result |= {"resident_mb": megabytes(), "peak_mb": peak, "above_imports_mb": peak - imports}
    return result


def main() -> None:
    parser = parser_of(__doc__, quick="a twentieth of COCO", seed="embeddings and captions")
    parser.add_argument("--way", choices=("store", "original"), help="measure this one alone (used by the benchmark)")
    parser.add_argument("--directory", type=Path, help="files to measure (used by the benchmark)")
    arguments = parser.parse_args()
    if arguments.way:
        print(json.dumps(measure(arguments.way, arguments.directory, arguments.seed)))
        return
    images, captions = sizes(arguments.quick)
    result: dict[str, Any] = {"images": images, "captions": captions}
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), images, captions, arguments.seed)
        for way in ("store", "original"):
            command = [sys.executable, "-m", "benchmarks.embedding_store", "--way", way, "--directory", folder]
            done = subprocess.run([*command, "--seed", str(arguments.seed)], capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            print(f"{way}: {found['open_seconds']:.2f} s, {found['peak_mb']:.0f} MB", flush=True)
            result |= {f"{way}_{name}": value for name, value in found.items()}
    result["open_ratio"] = result["original_open_seconds"] / result["store_open_seconds"]
    result["memory_ratio"] = result["original_above_imports_mb"] / result["store_above_imports_mb"]
    print_result(result)


if __name__ == "__main__":
    main()
