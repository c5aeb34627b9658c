"""What the page compares an image with: labels by templates, neighbours by embedding, in order of similarity."""

import pytest
import torch
from torch.nn import functional as F

from clipcap.data.images import read_image
from clipcap.references import LABELS, TEMPLATES, Reference, label_reference, neighbour_reference
from common.checks import UserError
from common.clip import load_clip
from common.pretrained import ASSETS

PHOTOGRAPHS = ASSETS / "samples" / "photographs"


@pytest.fixture(scope="module")
def clip():
    return load_clip("photo", device="cpu")


def test_the_nearest_come_first_whatever_their_length():
    known = Reference(["x", "y", "z"], torch.tensor([[9.0, 0.0], [0.3, 0.3], [0.0, 2.0]]))
    found = known.nearest(torch.tensor([0.1, 5.0]), 2)
    assert [name for name, _ in found] == ["z", "y"]
    expected = [F.cosine_similarity(torch.tensor([0.1, 5.0]), other, dim=0).item()
                for other in (torch.tensor([0.0, 2.0]), torch.tensor([0.3, 0.3]))]  # fmt: skip
    assert [value for _, value in found] == pytest.approx(expected)
    assert len(known.nearest(torch.ones(2), 50)) == 3


def test_packaged_labels_name_what_photographs_show(clip):
    known = label_reference(clip)
    assert len(known.texts) == 100 == len(set(known.texts)) and known.rows.shape == (100, clip.width)
    shown = {"000000214753.jpg": "horse", "000000165518.jpg": "motorcycle", "000000189775.jpg": "tennis player"}
    images = [read_image(PHOTOGRAPHS / name) for name in shown]
    embeddings = clip.encode_images(clip.preprocess(images))
    for embedding, name in zip(embeddings, shown.values(), strict=True):
        assert name in [label for label, _ in known.nearest(embedding)]


def test_a_label_is_the_mean_of_its_prompts(clip):
    known = label_reference(clip, "dog,snow")
    prompts = F.normalize(clip.encode_texts([template.format("snow") for template in TEMPLATES]), dim=-1)
    torch.testing.assert_close(known.rows[1], F.normalize(prompts.mean(0), dim=-1), atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="at least 2"):
        label_reference(clip, "dog")


def test_the_tiny_clip_knows_its_shapes_and_one_without_text_nothing(clip, monkeypatch):
    tiny = label_reference(load_clip("tiny", device="cpu"))
    assert tiny.texts == (LABELS / "shapes.txt").read_text().splitlines() and len(tiny.texts) == 64
    monkeypatch.setattr(type(clip), "has_text", False)
    assert label_reference(clip) is None
    with pytest.raises(UserError, match="--labels"):
        label_reference(clip, "dog,cat")


def test_a_known_image_is_its_own_nearest_neighbour(clip, tmp_path):
    data = PHOTOGRAPHS / "dataset.json"
    known = neighbour_reference(clip, data, None, tmp_path / "store")
    assert len(known.texts) == 24 and (tmp_path / "store" / "manifest.json").is_file()
    paths = sorted(PHOTOGRAPHS.glob("*.jpg"))[:2]
    [first, second] = clip.encode_images(clip.preprocess([read_image(path) for path in paths]))
    (text, best), (_, other) = known.nearest(first, 2)
    assert best > 0.999 > other and text != known.nearest(second, 1)[0][0]
