"""Every family of transformers: pixels, embeddings, patches and texts equal the library's own."""

from __future__ import annotations

import importlib.util
import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

from common.checks import UserError
from common.clip import load_clip
from experiments.backbones.tiny_encoders import DUAL, SIZE, VISION, save_encoder
from tests.common.encoders.pictures import SIZES, as_tensor, photo

TEXTS = ["a red cube", "the dog", "a photo of two cat on a large ball " * 9]
PREFIXED = {"DeiT": 2, "DINOv2 with registers": 5, "DINOv3": 5}
"""Tokens before the patches, where there are others than a class token."""
TOKENLESS = ("SigLIP", "SigLIP 2", "SigLIP's vision tower", "Swin", "Swin V2")
"""Families of tokens without one of the class."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Directory of a family, made once."""
    place, made = tmp_path_factory.mktemp("encoders"), {}

    def directory(family: str):
        if family not in made:
            made[family] = save_encoder(family, place / str(len(made)))
        return made[family]

    return directory


def library(directory, family: str):
    """The model as transformers loads it, what it gives for pixels, and its own processor (of PIL, where it has one)."""
    model = AutoModel.from_pretrained(directory).eval()
    name = json.loads((directory / "preprocessor_config.json").read_text())["image_processor_type"]
    processor = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)

    def output(pixels):
        return model.get_image_features(pixel_values=pixels) if family in DUAL else model(pixel_values=pixels)

    return model, output, processor.from_pretrained(directory)


@pytest.mark.slow
@pytest.mark.parametrize("family", [*DUAL, *VISION])
def test_embeddings_are_the_librarys(saved, family):
    directory = saved(family)
    clip = load_clip(directory, device="cpu")
    _, output, processor = library(directory, family)
    assert clip.has_text == (family in DUAL) and clip.image_size == SIZE and clip.has_patches
    for size in SIZES:
        image = photo(*size)
        theirs = torch.as_tensor(processor(images=image, return_tensors="pt")["pixel_values"]).float()
        ours = clip.preprocess(image)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
        with torch.no_grad():
            expected = output(theirs).pooler_output.flatten(1)
        found = clip.encode_images(ours)
        assert found.shape == (1, clip.width) and expected.std() > 0.05
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(clip.encode_images(ours, packed=True), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", [*DUAL, *VISION])
def test_tensors_embed_as_in_the_library_and_have_gradients(saved, family):
    directory = saved(family)
    clip = load_clip(directory, device="cpu")
    _, output, processor = library(directory, family)
    torchvision = getattr(transformers, type(processor).__name__.removesuffix("Pil")).from_pretrained(directory)
    image = as_tensor(photo(101, 53)).requires_grad_()
    theirs = torchvision(images=image.detach()[0], do_rescale=False, return_tensors="pt")["pixel_values"]
    ours = clip.preprocess(image)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    found = clip.encode_images(ours)
    with torch.no_grad():
        torch.testing.assert_close(found, output(theirs).pooler_output.flatten(1), atol=1e-5, rtol=1e-5)
    found.square().sum().backward()
    middle = image.grad[..., 27:-27]  # that the crop keeps
    assert image.grad.isfinite().all() and (middle != 0).float().mean() > 0.6
    assert all(weight.grad is None for weight in clip.backbone.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("family", [*DUAL, *VISION])
def test_patches_are_the_cells_of_the_grid(saved, family):
    directory = saved(family)
    clip = load_clip(directory, device="cpu")
    _, output, _ = library(directory, family)
    pixels = torch.randn(2, 3, SIZE, SIZE)
    found = clip.encode_image_features(pixels)
    with torch.no_grad():
        tokens = output(pixels).last_hidden_state
    if tokens.ndim == 4:
        expected, class_token = tokens.flatten(2).transpose(1, 2), tokens.mean((2, 3))
    elif family in TOKENLESS:
        expected, class_token = tokens, tokens.mean(1)
    else:
        expected, class_token = tokens[:, PREFIXED.get(family, 1) :], tokens[:, 0]
    assert int(expected.shape[1] ** 0.5) ** 2 == expected.shape[1]  # a square of cells
    torch.testing.assert_close(found.patches, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.class_token, class_token, atol=1e-5, rtol=1e-5)
    assert found.patches.shape[-1] == clip.patch_width


@pytest.mark.slow
@pytest.mark.parametrize("family", DUAL)
def test_texts_are_the_librarys(saved, family):
    directory = saved(family)
    clip = load_clip(directory, device="cpu")
    model, _, _ = library(directory, family)
    siglip = family.startswith("SigLIP")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    length = 18 if family == "AltCLIP" else 16  # of 20 positions 2 are of padding
    tokens = tokenizer(
        TEXTS, padding="max_length" if siglip else True, truncation=True, max_length=length, return_tensors="pt"
    )
    with torch.no_grad():
        expected = model.get_text_features(**tokens).pooler_output
    found = clip.encode_texts(TEXTS)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (found[0] - found[1]).abs().max() > 1e-3  # the texts are read
    torch.testing.assert_close(clip.encode_texts(TEXTS[:1]), found[:1], atol=1e-5, rtol=1e-4)  # whatever is beside


def test_a_tower_without_text_says_so(saved):
    clip = load_clip(saved("DINOv2"), device="cpu")
    with pytest.raises(UserError, match="has no text tower.*--text-only.*use a CLIP") as caught:
        clip.require_text("--text-only")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="has no text tower"):
        clip.encode_texts(["a cube"])


def test_a_classifiers_class_token_stands_for_its_missing_pooling(tmp_path):
    config = transformers.ViTConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    model = transformers.ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    clip = load_clip(tmp_path, device="cpu")
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model.vit(pixels).last_hidden_state[:, 0]
        torch.testing.assert_close(model.classifier(clip.encode_images(pixels)), model(pixels).logits)
    torch.testing.assert_close(clip.encode_images(pixels), expected)
    assert clip.width == 16


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(saved, tmp_path):
    """The message when a directory of a family is loaded after a change."""

    def message(family: str, change) -> str:
        path = shutil.copytree(saved(family), tmp_path / f"copy{len(list(tmp_path.iterdir()))}")
        change(path)
        with pytest.raises(UserError) as caught:
            load_clip(path, device="cpu")
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
        return str(caught.value)

    return message


def edited(file: str = "config.json", **values):
    """A change of some fields; those of a part by "part__field", None deletes."""

    def change(path) -> None:
        fields = json.loads((path / file).read_text())
        for name, value in values.items():
            part, _, field = name.partition("__")
            place, key = (fields[part], field) if field else (fields, name)
            if value is None:
                del place[key]
            else:
                place[key] = value
        (path / file).write_text(json.dumps(fields))

    return change


def test_a_lying_config_is_refused_before_memory_is_taken(refused):
    assert "asks for" in refused("DINOv2", edited(hidden_size=2**20, num_attention_heads=2))
    assert "has shape" in refused("DINOv2", edited(patch_size=4))
    assert "lacks weights" in refused("ConvNeXt", edited(depths=[1, 2]))
    assert "asks for" in refused("SigLIP", edited(text_config__vocab_size=10**7))
    assert "num_hidden_layers is 100000" in refused("ViT", edited(num_hidden_layers=10**5))
    assert "depths is [1, 100000]" in refused("ConvNeXt", edited(depths=[1, 10**5]))
    assert "hidden_size is" in refused("ViT", edited(hidden_size=10**12))
    assert "do not fit" in refused("ViT", edited(image_size=64))
    assert "num_channels is 4" in refused("ViT", edited(num_channels=4))
    refused("ViT", edited(num_attention_heads=3))
    refused("ViT", edited(hidden_act="nope"))
    refused("DINOv2", edited(patch_size=0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(refused, bad):
    def spoil(path) -> None:
        weights = load_file(path / "model.safetensors")
        weights["embeddings.cls_token"].flatten()[-1] = bad
        save_file(weights, path / "model.safetensors", {"format": "pt"})

    assert "cls_token holds NaN or infinity" in refused("ViT", spoil)


def test_half_a_directory_is_refused(refused):
    assert "preprocessor_config.json" in refused("DINOv2", lambda path: (path / "preprocessor_config.json").unlink())
    refused("DINOv2", lambda path: (path / "model.safetensors").unlink())
    for family in ("SigLIP", "Chinese-CLIP", "MetaCLIP 2", "CLIP, MetaCLIP"):
        assert "copy tokenizer.json" in refused(family, lambda path: (path / "tokenizer.json").unlink())
    cut = lambda path: (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:3000])  # noqa: E731
    assert "cut short" in refused("Swin", cut)


def test_processors_that_cannot_be_honoured_are_refused(refused):
    file = "preprocessor_config.json"
    assert "has no size" in refused("ViT", edited(file, size=None))
    assert "'Siglip2ImageProcessor'" in refused("ViT", edited(file, image_processor_type="Siglip2ImageProcessor"))
    assert "'Mine'" in refused("ViT", edited(file, image_processor_type="Mine", auto_map={"AutoImageProcessor": "x.M"}))
    assert "do_resize is False" in refused("ViT", edited(file, do_resize=False))
    assert "do_pad is True" in refused("ViT", edited(file, do_pad=True))
    assert "resample is 4" in refused("ViT", edited(file, resample=4))
    assert "size is" in refused("ViT", edited(file, size={"height": 32, "width": 48}))
    assert "size is" in refused("ViT", edited(file, size={"shortest_edge": 32, "longest_edge": 64}))
    assert "without a crop" in refused("ViT", edited(file, size={"shortest_edge": 32}))
    assert "64 x 64 pixels" in refused("ViT", edited(file, size={"height": 64, "width": 64}))


def test_families_that_cannot_be_used_are_refused_by_name(refused):
    assert "NaFlex" in refused("SigLIP", edited(model_type="siglip2"))
    assert "no pooled output" in refused("ViT", edited(model_type="vit_msn"))
    assert "'gpt2' model" in refused("ViT", edited(model_type="gpt2"))
    assert "timm:NAME/PATH" in refused("ViT", edited(model_type="timm_wrapper"))
    code = {"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}
    assert "run code" in refused("ViT", edited(model_type="mine", auto_map=code))
    assert "quantized" in refused("ViT", edited(quantization_config={"quant_method": "bitsandbytes"}))
    assert "adapter" in refused("ViT", lambda path: (path / "adapter_config.json").write_text("{}"))
    pair = "vision-text-dual-encoder (ViT, BERT)"
    assert "text_config: model_type is 'gpt2'" in refused(pair, edited(text_config__model_type="gpt2"))
    assert "vision_config: model_type is 'gpt2'" in refused(pair, edited(vision_config__model_type="gpt2"))


def test_code_that_comes_with_a_known_family_is_not_run(saved, tmp_path):
    path = shutil.copytree(saved("ViT"), tmp_path / "vit")
    edited(auto_map={"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}, _attn_implementation="org/kernel")(path)
    (path / "mine.py").write_text(f"open({str(tmp_path / 'made')!r}, 'w')\n")
    assert load_clip(path, device="cpu").width == 16
    assert not (tmp_path / "made").exists()


def test_a_tokenizer_that_needs_a_package_names_it(refused):
    change = edited("tokenizer_config.json", tokenizer_class="SiglipTokenizer")
    if importlib.util.find_spec("sentencepiece") is None:
        assert "pip install sentencepiece" in refused("SigLIP", change)


def test_tokenizers_of_another_model_are_refused(refused, saved):
    def other(path) -> None:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(saved("CLIP, MetaCLIP") / name, path / name)

    assert "use the tokenizer that" in refused("Chinese-CLIP", other)
    assert "the text tower with 5" in refused("MetaCLIP 2", edited(text_config__eos_token_id=5))
