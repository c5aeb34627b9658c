"""What the captioner's tests share: a tiny random CLIP on disk and a folder of captioned images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture(scope="session")
def clip_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP (32 pixels, patches of 16, widths 16 and 12) in Hugging Face format; read it, do not write to it."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    from experiments.backbones.train_clip import train_tokenizer

    directory = tmp_path_factory.mktemp("clip") / "random"
    tokenizer = train_tokenizer(["a red cube", "a blue ball next to a cube"], directory)
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 16,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = CLIPConfig(
        projection_dim=12, text_config=sizes | text, vision_config=sizes | {"image_size": 32, "patch_size": 16}
    )
    CLIPModel(config).save_pretrained(directory)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(directory)
    return directory


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve images of several sizes, colour modes and formats, with a Karpathy JSON (8 train, 2 val, 2 test)."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    modes = ("RGB", "L", "RGBA", "P", "CMYK", "1")
    rows = []
    for number in range(12):
        size = (int(rng.integers(8, 90)), int(rng.integers(8, 90)))
        image = Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).convert(modes[number % 6])
        name = f"{number:02}.{'jpg' if image.mode in ('RGB', 'L', 'CMYK') else 'png'}"
        image.save(folder / name)
        split = "train" if number < 8 else "val" if number < 10 else "test"
        rows.append(
            {
                "filename": name,
                "split": split,
                "sentences": [{"raw": "the cat and the hat"}, {"raw": f"the bat sat on mat {number}"}],
            }
        )
    (folder / "dataset.json").write_text(json.dumps({"images": rows}))
    return folder


@pytest.fixture
def folder(tmp_path):
    for name in ("a.jpg", "b.png", "c.jpg"):
        Image.new("RGB", (20, 16), "red").save(tmp_path / name)
    return tmp_path


@pytest.fixture
def clip(clip_directory):
    from common.clip import load_clip

    return load_clip(clip_directory, device="cpu")


@pytest.fixture
def items(photos):
    """The images of `photos` with their captions."""
    from clipcap.data.dataset import read_dataset

    return read_dataset(photos / "dataset.json")


@pytest.fixture
def tiny_run(photos, clip_directory, gpt2_directory, tmp_path):
    """Settings of a short training on `photos`: an MLP before the tiny GPT-2."""
    from clipcap.training.settings import TrainConfig
    from common.runtime import RuntimeConfig

    return TrainConfig(
        data=photos / "dataset.json",
        out=tmp_path / "run",
        clip=str(clip_directory),
        gpt2=str(gpt2_directory),
        mapper="mlp",
        prefix_length=3,
        steps=4,
        batch_size=6,
        val_every=2,
        val_captions=2,
        max_tokens=10,
        lr=1e-2,
        runtime=RuntimeConfig(device="cpu"),
    )


@pytest.fixture
def model(tmp_path, clip_directory, gpt2_directory):
    """A random captioner on disk."""
    from clipcap.config import ClipCapConfig
    from clipcap.model import ClipCapModel

    torch.manual_seed(0)
    captioner = ClipCapModel.from_backbones(
        ClipCapConfig(clip_width=12, prefix_length=3, gpt2=str(gpt2_directory), clip=str(clip_directory))
    )
    captioner.save_pretrained(tmp_path / "captioner")
    return tmp_path / "captioner"
