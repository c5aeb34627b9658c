"""A captioner in transformers' manner: AutoModel and AutoProcessor round trips, generate from pixels."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

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


ORDERS = {
    "clipcap first": "import clipcap\nassert 'transformers' not in sys.modules and 'torch' not in sys.modules",
    "transformers first": "from transformers import AutoModel\nimport clipcap\nassert 'clipcap.model' not in sys.modules",
}
KNOWS = """
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline
processor = AutoProcessor.from_pretrained(place)
for auto in (AutoModel, AutoModelForImageTextToText):
    assert type(auto.from_pretrained(place)).__name__ == "ClipCapModel"
assert type(AutoConfig.from_pretrained(place)) is clipcap.ClipCapConfig
pipe = pipeline("image-text-to-text", model=place)
print(pipe(images=photo, text="the cat", max_new_tokens=5)[0]["generated_text"])
model = AutoModel.from_pretrained(place)
ids = model.generate(**processor(images=[photo], return_tensors="pt"), prompt="the cat", max_new_tokens=5)
print(processor.batch_decode(ids, skip_special_tokens=True)[0])
"""


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_auto_classes_know_a_captioner_after_importing_clipcap(directory, photos, order):
    if order == "transformers first":  # and the processor from its own file
        ClipCapProcessor.from_pretrained(directory).save_pretrained(directory)
    photo = sorted(photos.glob("*.jpg"))[0]
    code = f"import sys\nplace, photo = {str(directory)!r}, {str(photo)!r}\n{ORDERS[order]}\n{KNOWS}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    by_pipeline, by_model = done.stdout.splitlines()[-2:]
    assert by_pipeline == by_model and by_model.startswith("the cat")


def test_the_processor_speaks_as_transformers_ones(directory, photos, monkeypatch):
    processor = ClipCapProcessor.from_pretrained(directory)
    images = sorted(photos.glob("*.jpg"))[:2]
    inputs = processor(images=images, text=["the cat", "the bat"], return_tensors="pt")
    assert inputs["pixel_values"].shape == (2, 3, 32, 32)
    assert inputs["input_ids"].tolist() == [processor.tokenizer(text)["input_ids"] for text in ("the cat", "the bat")]
    ids = [*processor.tokenizer("the cat")["input_ids"], processor.tokenizer.eos_token_id]
    assert processor.batch_decode([ids], skip_special_tokens=True) == ["the cat"] == [processor.decode(ids)]
    assert processor.decode(ids, skip_special_tokens=False) == "the cat" + processor.tokenizer.eos_token
    with pytest.raises(UserError, match="return_tensors is 'np'"):
        processor(images=images, return_tensors="np")
    with pytest.raises(UserError, match="several lengths"):
        processor(text=["the cat", "the bat sat on the mat"], padding=False)

    pushed = []

    def upload(self, folder, repository, **options):
        pushed.append((repository, sorted(os.listdir(folder))))

    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda *a, **k: SimpleNamespace(create_repo=lambda name, **o: SimpleNamespace(repo_id=name)))  # fmt: skip
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *a, **k: SimpleNamespace(save=lambda path: None))  # fmt: skip
    monkeypatch.setattr(ClipCapProcessor, "_upload_modified_files", upload)
    processor.push_to_hub("me/captioner")
    [(repository, files)] = pushed
    assert repository == "me/captioner" and {"processor_config.json", "tokenizer.json"} <= set(files)


def test_a_prompt_begins_every_caption(directory, photos):
    images = sorted(photos.glob("*.jpg"))[:2]
    captioner = Captioner.from_pretrained(directory, device="cpu", torch_dtype="bfloat16")
    assert captioner.model.dtype == captioner.clip.dtype == torch.bfloat16
    captioner = Captioner.from_pretrained(directory, device="cpu", dtype=torch.float32)
    for options in ({}, {"do_sample": True, "num_return_sequences": 2}, {"strategy": "greedy"}):
        found = captioner.caption(images, prompt="the bat sat", max_new_tokens=4, **options)
        for texts in found:
            assert all(text.startswith("the bat sat") for text in ([texts] if isinstance(texts, str) else texts))
    plain = captioner.caption(images, max_new_tokens=8, num_beams=3)
    assert captioner.caption(images, max_new_tokens=8, num_beams=3, prompt=" ") == plain
    assert captioner.caption(images, max_length=8, num_beams=3) == plain
    repeated = captioner.caption(images, max_new_tokens=8, num_beams=3, no_repeat_ngram_size=1, min_new_tokens=8)
    for text in repeated:
        ids = captioner.tokenizer(text)["input_ids"]
        assert len(ids) > 1
    with pytest.raises(UserError, match="penalty_alpha is 0.6"):
        captioner.caption(images, penalty_alpha=0.6)


def test_dtype_by_either_name(directory):
    assert ClipCapModel.from_pretrained(directory, torch_dtype=torch.bfloat16).dtype == torch.bfloat16
    assert ClipCapModel.from_pretrained(directory, dtype="float16").dtype == torch.float16
    with pytest.raises(UserError, match="torch_dtype"):
        ClipCapModel.from_pretrained(directory, dtype="float16", torch_dtype="bfloat16")


def test_importing_clipcap_loads_neither_torch_nor_transformers():
    code = "import sys, clipcap; print([m for m in ('torch', 'transformers', 'gradio') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
