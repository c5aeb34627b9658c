"""The packaged models for photographs, on photographs that are packaged with their credit."""

import json

import pytest
import torch
from PIL import Image

from clipcap.captioner import Captioner
from clipcap.evaluation.metrics import score_captions
from common.clip import load_clip
from common.pretrained import ASSETS

PHOTOGRAPHS = ASSETS / "samples" / "photographs"


@pytest.fixture(scope="module")
def photographs():
    """File name -> human captions."""
    content = json.loads((PHOTOGRAPHS / "dataset.json").read_text(encoding="utf-8"))
    return {row["filename"]: [one["raw"] for one in row["sentences"]] for row in content["images"]}


@pytest.fixture(scope="module")
def clip():
    return load_clip("photo", device="cpu")


def test_every_photograph_is_credited(photographs):
    readme = (PHOTOGRAPHS / "README.md").read_text(encoding="utf-8")
    content = json.loads((PHOTOGRAPHS / "dataset.json").read_text(encoding="utf-8"))
    assert len(photographs) == 24 and {path.name for path in PHOTOGRAPHS.glob("*.jpg")} == set(photographs)
    for row in content["images"]:
        assert row["source"] in readme and row["licence_url"] in readme and len(row["sentences"]) >= 5


@pytest.mark.slow
def test_the_ecosystem_reads_the_clip_and_computes_the_same(clip):
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    theirs = AutoModel.from_pretrained(ASSETS / "clip-photo", dtype=torch.float32).eval()
    processor = AutoImageProcessor.from_pretrained(ASSETS / "clip-photo", backend="pil")
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "clip-photo")
    images = [Image.open(path) for path in sorted(PHOTOGRAPHS.glob("*.jpg"))[:3]]
    texts = ["a dog", "two people on a motorcycle in the fog"]
    with torch.no_grad():
        pixels = processor(images, return_tensors="pt")["pixel_values"]
        expected = theirs.get_image_features(pixel_values=pixels).pooler_output
        words = theirs.get_text_features(**tokenizer(texts, padding=True, return_tensors="pt")).pooler_output
    torch.testing.assert_close(clip.encode_images(clip.preprocess(images)), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(clip.encode_texts(texts), words, atol=1e-5, rtol=1e-5)


def test_features_for_all_uses(clip):
    pixels = clip.preprocess(torch.rand(2, 3, 50, 70).requires_grad_())
    features = clip.encode_image_features(pixels)
    assert features.patches.shape == (2, 49, 1280) and features.class_token.shape == (2, 1280)
    torch.testing.assert_close(features.class_token, features.patches.mean(1), atol=1e-5, rtol=1e-5)
    packed = clip.encode_image_features(pixels.detach(), packed=True)
    for plain, fast in zip(features, packed, strict=True):
        torch.testing.assert_close(fast, plain.detach(), atol=1e-3, rtol=1e-3)
    [gradient] = torch.autograd.grad(features.embedding.sum(), pixels)
    assert gradient.shape == pixels.shape and gradient.abs().max() > 0


def test_photographs_are_found_by_what_they_show(clip):
    """Zero-shot, among six descriptions; none of these photographs was trained on."""
    shown = {
        "000000020247.jpg": None,  # bears, which it does not know
        "000000129648.jpg": "a man on a skateboard",
        "000000165518.jpg": "a person riding a motorcycle",
        "000000183709.jpg": None,
        "000000189775.jpg": "a tennis player on a court",
        "000000214753.jpg": "people riding horses",
        "000000126107.jpg": "a bird flying over the sea",
    }
    texts = [text for text in shown.values() if text] + ["a plate of food"]
    images = [Image.open(PHOTOGRAPHS / name) for name, text in shown.items() if text]
    embeddings = torch.nn.functional.normalize(clip.encode_images(clip.preprocess(images)), dim=-1)
    words = torch.nn.functional.normalize(clip.encode_texts(texts), dim=-1)
    right = ((embeddings @ words.T).argmax(1) == torch.arange(len(images))).sum().item()
    assert right >= len(images) - 1


@pytest.mark.slow
def test_captions_fit_photographs_that_were_never_seen(photographs):
    captioner = Captioner.from_pretrained("photo", device="cpu")
    found = list(captioner.stream([PHOTOGRAPHS / name for name in photographs]))
    captions = {result.image.name: result.captions[0] for result in found}
    assert len(set(captions.values())) >= 20
    fitting = score_captions(captions, photographs, tokenizer="words").cider
    names = list(photographs)
    others = dict(zip(names, (photographs[name] for name in names[7:] + names[:7]), strict=True))
    assert fitting > 0.2 and fitting > 2 * score_captions(captions, others, tokenizer="words").cider
    for name, word in (
        ("000000214753.jpg", "horse"),
        ("000000165518.jpg", "motorcycle"),
        ("000000129648.jpg", "skate"),
    ):
        assert word in captions[name]


def test_photographs_of_any_size(photographs):
    """Enlarged and halved: what is in the middle of it stays."""
    captioner = Captioner.from_pretrained("photo", device="cpu")
    with Image.open(PHOTOGRAPHS / "000000189775.jpg") as image:
        sizes = [image.copy(), image.resize((image.width // 2, image.height // 2)), image.resize((1600, 1200))]
    assert all("tennis" in result.captions[0] for result in captioner.stream(sizes))
