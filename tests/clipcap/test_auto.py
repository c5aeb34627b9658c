"""A captioner in transformers' manner: AutoModel and AutoProcessor round trips, generate from pixels."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoProcessor

from clipcap import Captioner, ClipCapConfig, ClipCapModel, ClipCapProcessor
from common.checks import UserError


@pytest.fixture(scope="module")
def directory(tmp_path_factory, clip_directory, gpt2_directory):
    torch.manual_seed(0)
    config = ClipCapConfig(clip_width=12, prefix_length=3, gpt2=str(gpt2_directory), clip=str(clip_directory))
    out = tmp_path_factory.mktemp("auto")
    ClipCapModel.from_backbones(config).save_pretrained(out)
    return out


def test_round_trip_gives_the_same_captions(directory, photos):
    images = sorted(photos.glob("*.jpg"))[:3]
    assert isinstance(AutoConfig.from_pretrained(directory), ClipCapConfig)
    processor = AutoProcessor.from_pretrained(directory)  # made from the captioner's backbones
    processor.save_pretrained(directory)
    processor = AutoProcessor.from_pretrained(directory)  # read from its own file
    assert isinstance(processor, ClipCapProcessor)
    model = AutoModel.from_pretrained(directory)
    assert isinstance(model, ClipCapModel)

    inputs = processor(images=images)
    ids = model.generate(**inputs, num_beams=3, max_new_tokens=6)
    captioner = Captioner.from_pretrained(directory, device="cpu")
    assert processor.batch_decode(ids) == captioner.caption(images, num_beams=3, max_new_tokens=6)
    embeddings = captioner.clip.encode_images(inputs["pixel_values"])
    assert torch.equal(ids, model.generate(clip_embeddings=embeddings, num_beams=3, max_new_tokens=6))
    assert not any(name.startswith("_clip") or "vision" in name for name in model.state_dict())


def test_text_becomes_padded_ids_with_an_end(directory):
    processor = ClipCapProcessor.from_pretrained(directory)
    found = processor(text=["the cat", "the bat sat on the mat"])
    assert found["input_ids"].shape == found["attention_mask"].shape
    lengths = found["attention_mask"].sum(1).tolist()
    assert lengths[0] < lengths[1] == found["input_ids"].shape[1]
    assert found["input_ids"][0, lengths[0] - 1] == processor.tokenizer.eos_token_id
    assert processor.batch_decode(found["input_ids"]) == ["the cat", "the bat sat on the mat"]


def test_mistakes_are_named(directory):
    model = ClipCapModel.from_pretrained(directory)
    with pytest.raises(UserError, match="either"):
        model.generate()
    with pytest.raises(UserError, match="both None"):
        ClipCapProcessor.from_pretrained(directory)()


def test_importing_clipcap_loads_neither_torch_nor_transformers():
    code = "import sys, clipcap; print([m for m in ('torch', 'transformers', 'gradio') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
