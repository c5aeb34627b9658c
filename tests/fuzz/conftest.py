"""Models that tests change or mutate: a captioner, a CLIP and directories of each kind."""

from __future__ import annotations

import pytest
from transformers import AutoModel, AutoProcessor, AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel

from clipcap import ClipCapConfig, ClipCapModel, ClipCapProcessor
from common.clip import load_clip
from common.gpt2 import load_gpt2


@pytest.fixture(scope="module")
def captioner(gpt2_directory, tmp_path_factory):
    """A captioner that keeps its mapper alone."""
    directory = tmp_path_factory.mktemp("captioner") / "model"
    config = ClipCapConfig(gpt2=str(gpt2_directory), clip_width=8, prefix_length=2)
    ClipCapModel.from_backbones(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def clip_directory(gpt2_directory, tmp_path_factory):
    """A random CLIP, all its files."""
    place = tmp_path_factory.mktemp("clip") / "model"
    tokenizer = AutoTokenizer.from_pretrained(gpt2_directory, pad_token="<|endoftext|>")
    tokenizer.save_pretrained(place)
    tower = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = tower | {"vocab_size": len(tokenizer), "max_position_embeddings": 8, "eos_token_id": tokenizer.eos_token_id}
    vision = tower | {"image_size": 8, "patch_size": 4}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=4)).save_pretrained(place)
    CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def directories(captioner, gpt2_directory, clip_directory, tmp_path_factory):
    """A directory of each kind and what reads it."""
    place = tmp_path_factory.mktemp("kinds")
    config = ClipCapConfig(
        gpt2=str(gpt2_directory), clip=str(clip_directory), clip_width=4, prefix_length=2, tune_gpt2=True
    )
    ClipCapModel.from_backbones(config).save_pretrained(place / "tuned")
    ClipCapProcessor.from_pretrained(place / "tuned").save_pretrained(place / "processor")
    return {
        "gpt2": (gpt2_directory, load_gpt2),
        "clip": (clip_directory, lambda path: load_clip(path, device="cpu")),
        "mapper": (captioner, ClipCapModel.from_pretrained),
        "tuned": (place / "tuned", ClipCapModel.from_pretrained),
        "auto": (place / "tuned", AutoModel.from_pretrained),
        "processor": (place / "processor", ClipCapProcessor.from_pretrained),
        "auto processor": (place / "tuned", AutoProcessor.from_pretrained),
    }
