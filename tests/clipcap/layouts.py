"""Small files in the layouts of data sets, of their real shape."""

import io
import json
import pickle
import tarfile

import torch


def karpathy(folder, rows):
    path = folder / "dataset.json"
    path.write_text(json.dumps({"images": rows}))
    return path


def row(name, split="train", captions=("a red square",)):
    return {"filename": name, "split": split, "sentences": [{"raw": text} for text in captions]}


def original(folder, rows):
    (folder / "train_caption.json").write_text(json.dumps(rows))
    return folder / "train_caption.json"


def original_pickle(folder, rows, protocol=None):
    path = folder / "oscar_split_ViT-B_32_train.pkl"
    path.write_bytes(pickle.dumps({"clip_embedding": torch.randn(3, 4), "captions": rows}, protocol))
    return path


def tar(path, members):
    with tarfile.open(path, "w") as file:
        for member in members:
            name, data = member[:2]
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.type, info.linkname = member[2:] or (tarfile.REGTYPE, "")
            file.addfile(info, io.BytesIO(data))
    return path


def parquet(path, rows):
    import pyarrow
    from pyarrow.parquet import write_table

    write_table(pyarrow.Table.from_pylist(rows), path)
    return path
