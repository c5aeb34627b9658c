"""Frozen CLIP: one interface over two libraries, pixels as the original makes them, and frozen whatever happens."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys

import huggingface_hub
import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from common.checks import UserError
from common.clip import load_clip
from common.encoders.preprocess import OPENAI_MEAN, OPENAI_STD, Preprocess

TEXTS = ["a red cube", "two small metal spheres on grey ground!", "It's a photo of a cat, 123. " * 20]
TINY_TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY_VIT = {
    "embed_dim": 12,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "mlp_ratio": 2.0, "patch_size": 16},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
TINY_RESNET = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


# --- making checkpoints --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    """Hugging Face's tokenizer over the byte pairs that open_clip ships."""
    simple = open_clip.tokenizer.SimpleTokenizer()
    tokens = [*list(simple.encoder)[:-2], "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=list(simple.bpe_ranks))


def random_model(config: CLIPConfig) -> CLIPModel:
    """Random weights, biases and norms too, so that no term can hide."""
    torch.manual_seed(0)
    model = CLIPModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def tiny_config() -> CLIPConfig:
    text = {**TINY_TOWER, "intermediate_size": 64, "max_position_embeddings": 20}  # open_clip fixes 4 x width
    vision = {**TINY_TOWER, "image_size": 32, "patch_size": 16}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, tokenizer):
    """A directory with a random tiny CLIP."""
    path = tmp_path_factory.mktemp("clip")
    random_model(tiny_config()).save_pretrained(path)
    tokenizer.save_pretrained(path)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(path)
    return path


@pytest.fixture(scope="module", autouse=True)
def tiny_architectures(tmp_path_factory):
    """Teach open_clip two tiny architectures."""
    for name, config in {"tiny-vit": TINY_VIT, "tiny-resnet": TINY_RESNET}.items():
        path = tmp_path_factory.mktemp("arch") / f"{name}.json"
        path.write_text(json.dumps(config))
        open_clip.add_model_config(path)


def as_open_clip(model: CLIPModel) -> dict[str, Tensor]:
    """A Hugging Face CLIP's weights under open_clip's names."""
    weights = model.state_dict()
    state = {
        "logit_scale": weights["logit_scale"],
        "text_projection": weights["text_projection.weight"].T,
        "visual.proj": weights["visual_projection.weight"].T,
        "visual.class_embedding": weights["vision_model.embeddings.class_embedding"],
        "visual.conv1.weight": weights["vision_model.embeddings.patch_embedding.weight"],
        "visual.positional_embedding": weights["vision_model.embeddings.position_embedding.weight"],
        "positional_embedding": weights["text_model.embeddings.position_embedding.weight"],
        "token_embedding.weight": weights["text_model.embeddings.token_embedding.weight"],
    }
    norms = {
        "visual.ln_pre": "vision_model.pre_layrnorm",
        "visual.ln_post": "vision_model.post_layernorm",
        "ln_final": "text_model.final_layer_norm",
    }
    parts = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    layers = model.config.text_config.num_hidden_layers
    for ours, theirs in (("visual.transformer", "vision_model"), ("transformer", "text_model")):
        for i in range(layers):
            block, layer = f"{ours}.resblocks.{i}", f"{theirs}.encoder.layers.{i}"
            norms |= {f"{block}.{a}": f"{layer}.{b}" for a, b in parts.items()}
            for kind in ("weight", "bias"):
                qkv = [weights[f"{layer}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
                state[f"{block}.attn.in_proj_{kind}"] = torch.cat(qkv)
    for ours, theirs in norms.items():
        state |= {f"{ours}.{kind}": weights[f"{theirs}.{kind}"] for kind in ("weight", "bias")}
    return {key: value.contiguous() for key, value in state.items()}


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth random colours with some grain, as a photograph has."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(
        (width, height), Image.BICUBIC
    )
    grain = generator.normal(0, 12, (height, width, 3))
    return Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8))


# --- the same weights, the same answers ----------------------------------------------------------------------------


def assert_same_answers(ours, theirs) -> None:
    assert (ours.width, ours.patch_width, ours.image_size) == (theirs.width, theirs.patch_width, theirs.image_size)
    torch.manual_seed(1)
    pixels = torch.randn(2, 3, ours.image_size, ours.image_size)
    for mine, other in zip(ours.encode_image_features(pixels), theirs.encode_image_features(pixels), strict=True):
        assert mine.std() > 0.01
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.encode_texts(TEXTS), theirs.encode_texts(TEXTS), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_both_libraries_agree_on_a_full_size_vit_b_32(tmp_path, tokenizer):
    model = random_model(CLIPConfig()).half()  # half the disk; both load it as float32
    model.save_pretrained(tmp_path / "hf")
    tokenizer.save_pretrained(tmp_path / "hf")
    save_file(as_open_clip(model), tmp_path / "open_clip.safetensors")
    del model
    try:
        ours = load_clip(tmp_path / "hf", device="cpu")
        theirs = load_clip(f"open_clip:ViT-B-32-quickgelu/{tmp_path}/open_clip.safetensors", device="cpu")
        assert (ours.width, ours.patch_width, ours.image_size, ours.dtype) == (512, 768, 224, torch.float32)
        assert_same_answers(ours, theirs)
    finally:
        shutil.rmtree(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_both_libraries_agree_on_a_tiny_vit(tiny, tmp_path, suffix):
    state = as_open_clip(CLIPModel.from_pretrained(tiny))
    path = tmp_path / f"weights.{suffix}"
    if suffix == "pt":  # as open_clip's training script writes it
        torch.save({"epoch": 1, "state_dict": {f"module.{key}": value for key, value in state.items()}}, path)
    else:
        save_file(state, path)
    assert_same_answers(load_clip(tiny, device="cpu"), load_clip(f"open_clip:tiny-vit/{path}", device="cpu"))


def test_features_are_those_before_the_projection(tiny):
    clip = load_clip(tiny, device="cpu")
    model = CLIPModel.from_pretrained(tiny).eval()
    pixels = torch.randn(2, 3, 32, 32)
    found = clip.encode_image_features(pixels)
    assert found.class_token.shape == (2, 16)
    assert found.patches.shape == (2, 4, 16)
    projected = model.visual_projection(model.vision_model.post_layernorm(found.class_token))
    torch.testing.assert_close(projected, found.embedding)
    torch.testing.assert_close(model.get_image_features(pixels).pooler_output, clip.encode_images(pixels))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "size", "width", "patch_width"), [("tiny-resnet", 64, 12, 256), ("RN50", 224, 1024, 2048)]
)
def test_resnet_through_open_clip(tmp_path, arch, size, width, patch_width):
    torch.manual_seed(0)
    model = open_clip.create_model(arch).eval()
    path = tmp_path / "resnet.pt"
    torch.save(model.half().state_dict(), path)
    clip = load_clip(f"open_clip:{arch}/{path}", device="cpu")
    path.unlink()
    assert (clip.image_size, clip.width, clip.patch_width) == (size, width, patch_width)
    pixels = torch.randn(2, 3, size, size, requires_grad=True)
    found = clip.encode_image_features(pixels)
    cells = (size // 32) ** 2
    assert [tuple(part.shape) for part in found] == [(2, patch_width), (2, cells, patch_width), (2, width)]
    torch.testing.assert_close(found.class_token, found.patches.mean(1))
    torch.testing.assert_close(found.embedding, model.float().encode_image(pixels))
    found.class_token.sum().backward()
    assert pixels.grad.abs().sum() > 0
    assert clip.encode_texts(TEXTS).shape == (3, width)


def test_openai_tag_turns_quick_gelu_on(tiny, monkeypatch):
    asked = {}

    def create_model(arch, **options):
        asked.update(options)
        raise RuntimeError("stop here")

    monkeypatch.setattr(open_clip, "create_model", create_model)
    monkeypatch.setattr("common.encoders.open_clip.require_reachable", lambda *_: None)
    for weights, expected in (("openai", True), ("laion2b_s34b_b79k", False)):
        with pytest.raises(UserError):
            load_clip(f"open_clip:ViT-B-32/{weights}")
        assert asked["force_quick_gelu"] is expected
        assert asked.get("weights_only", asked.get("load_weights_only")) is True


# --- pixels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(640, 480), (333, 500), (224, 224), (100, 37), (225, 1000)])
def test_pixels_equal_the_original_preprocessing(size):
    image = photo(*size)
    ours = Preprocess(224)(image)
    assert ours.shape == (1, 3, 224, 224)
    transform = open_clip.image_transform(224, is_train=False, mean=OPENAI_MEAN, std=OPENAI_STD)
    torch.testing.assert_close(ours[0], transform(image), atol=1e-6, rtol=0)
    if (max(transform.transforms[0](image).size) - 224) % 2 == 0:  # else Hugging Face crops a pixel beside the original
        theirs = CLIPImageProcessorPil()(image, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(ours, torch.as_tensor(theirs), atol=1e-5, rtol=0)


def test_a_strip_keeps_its_middle_and_little_memory():
    image = photo(40_000, 20)
    middle = image.crop((20_000 - 320, 0, 20_000 + 320, 20))
    torch.testing.assert_close(Preprocess(224)(image), Preprocess(224)(middle))


def test_tensor_and_pil_pixels_agree():
    image = photo(300, 200)
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    assert (Preprocess(96)(tensor) - Preprocess(96)(image)).abs().max() < 2e-2  # PIL rounds to 8 bits
    squashed = Preprocess(96, squash=True)
    assert squashed(image).shape == (1, 3, 96, 96)
    assert (squashed(tensor) - squashed(image)).abs().max() < 2e-2


def test_a_list_of_images_is_a_batch_in_order():
    images = [photo(60, 40, seed) for seed in range(3)]
    batch = Preprocess(32)(images)
    torch.testing.assert_close(batch, torch.cat([Preprocess(32)(image) for image in images]))


def test_gradients_reach_the_images_and_stay_off_the_weights(tiny):
    clip = load_clip(tiny, device="cpu")
    images = torch.rand(2, 3, 20, 30, requires_grad=True)
    clip.encode_images(clip.preprocess(images)).square().sum().backward()
    assert images.grad[..., 5:25].abs().min() > 0  # the crop keeps the middle 20 columns
    assert all(parameter.grad is None for parameter in clip.backbone.parameters())
    assert not clip.encode_images(clip.preprocess(images.detach())).requires_grad
    assert not clip.encode_texts(TEXTS).requires_grad


def test_packed_features_are_the_same_without_gradients(tiny, tmp_path):
    clip = load_clip(tiny, device="cpu")
    pixels = torch.randn(3, 3, 32, 32, requires_grad=True)
    expected = clip.encode_image_features(pixels)
    found = clip.encode_image_features(pixels, packed=True)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        assert not ours.requires_grad and theirs.requires_grad
    assert torch.equal(clip.encode_images(pixels, packed=True), found.embedding)
    with torch.autocast("cpu", torch.bfloat16):
        half = clip.encode_images(pixels, packed=True)
    assert half.dtype == torch.bfloat16 and (half.float() - found.embedding).norm() < 0.02 * found.embedding.norm()
    expected.embedding.sum().backward()  # as before
    assert pixels.grad.abs().sum() > 0 and not list(nn.Sequential(clip).state_dict())
    path = tmp_path / "vit.pt"
    torch.save(open_clip.create_model("tiny-vit").state_dict(), path)
    other = load_clip(f"open_clip:tiny-vit/{path}", device="cpu")  # has none
    found, expected = other.encode_images(pixels, packed=True), other.encode_images(pixels)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not found.requires_grad and expected.requires_grad


def test_white_pixels_keep_their_gradient():
    images = torch.ones(1, 3, 20, 20, requires_grad=True)
    Preprocess(32)(images).sum().backward()
    assert images.grad.min() > 0


# --- frozen --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_training_step_around_it_changes_nothing(tiny):
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.clip = load_clip(tiny, device="cpu")
            self.head = nn.Linear(self.clip.width, 1)

    outer = Outer().train().requires_grad_(True)
    assert [name for name, _ in outer.named_parameters()] == ["head.weight", "head.bias"]
    assert list(outer.state_dict()) == ["head.weight", "head.bias"]
    assert not any(module.training for module in outer.clip.backbone.modules())
    assert not outer.clip.training

    before = {key: value.clone() for key, value in outer.clip.backbone.state_dict().items()}
    optimizer = torch.optim.AdamW([*outer.parameters(), *outer.clip.parameters()], lr=0.1, weight_decay=0.1)
    outer.head(outer.clip.encode_images(torch.randn(2, 3, 32, 32, requires_grad=True))).sum().backward()
    optimizer.step()
    after = outer.clip.backbone.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    for parameter in outer.clip.backbone.parameters():
        assert not parameter.requires_grad
        assert parameter.grad is None
    outer.load_state_dict(outer.state_dict())  # strict


def test_it_follows_the_module_around_it(tiny):
    outer = nn.Sequential(load_clip(tiny, device="cpu"))
    outer.to(torch.float64)
    clip = outer[0]
    assert clip.dtype == torch.float64
    assert clip.encode_images(torch.zeros(1, 3, 32, 32)).dtype == torch.float64
    assert outer.to("meta")[0].device.type == "meta"


def test_dtype_is_asked_for(tiny):
    clip = load_clip(tiny, device="cpu", dtype=torch.bfloat16)
    assert clip.dtype == torch.bfloat16
    assert clip.encode_images(torch.zeros(1, 3, 32, 32)).shape == (1, 12)
    assert clip.encode_texts(TEXTS).dtype == torch.bfloat16


@pytest.mark.slow
def test_import_is_light():
    code = (
        "import sys, common.clip; print([m for m in ('open_clip', 'nerfstudio', 'transformers') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "empty"),
        (["a.jpg"], "str"),
        (torch.rand(3, 8, 8), r"\(3, 8, 8\)"),
        (torch.rand(1, 4, 8, 8), r"\(1, 4, 8, 8\)"),
        (torch.rand(0, 3, 8, 8), r"\(0, 3, 8, 8\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "uint8"),
        (torch.full((1, 3, 8, 8), float("nan")), "nan"),
        (torch.full((1, 3, 8, 8), 255.0), "255"),
        (torch.full((1, 3, 8, 8), -0.5), "-0.5"),
        (Image.new("RGB", (0, 8)), "0x8"),
    ],
)
@pytest.mark.usefixtures("any_shape")
def test_bad_images_are_named(images, message):
    with pytest.raises(UserError, match=message) as caught:
        Preprocess(32)(images)
    assert "\n" not in str(caught.value)


def test_truncated_image_is_named(tmp_path):
    path = tmp_path / "half.jpg"
    photo(200, 200).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match="half.jpg"):
        Preprocess(32)(Image.open(path))


@pytest.mark.slow
def test_bad_calls_are_named(tiny):
    clip = load_clip(tiny, device="cpu")
    with pytest.raises(UserError, match=r"\(1, 3, 16, 16\)"):
        clip.encode_images(torch.zeros(1, 3, 16, 16))
    with pytest.raises(UserError, match="empty"):
        clip.encode_texts([])
    with pytest.raises(UserError, match="a cat"):
        clip.encode_texts("a cat")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/such-clip", "could not be fetched"),
        ("./no-such-directory", "does not exist"),
        ("open_clip:ViT-B-32/openai", "could not be fetched"),
        ("open_clip:ViT-B32/openai", "ViT-B-32"),
        ("open_clip:RN50", "openai"),
        ("open_clip:RN50/nope", "openai"),
        ("open_clip:RN50/no/such.pt", "does not exist"),
        ("open_clip:ViT-B-16-SigLIP/webli", "could not be fetched"),
        ("open_clip:coca_ViT-B-32/laion2b_s13b_b90k", "could not be fetched"),
        ("timm:resnet18", "give a file, timm:resnet18/PATH"),
        ("timm:resnet81", "did you mean .*resnet18"),
        ("timm:vit_base_patch16_224.nope", "has no weights 'nope': use vit_base_patch16_224"),
        ("timm:resnet18/no/such.pth", "does not exist"),
        ("torchvision:resnet81", "did you mean .*resnet18"),
    ],
)
def test_unknown_names_offline(name, message, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=message) as caught:
        load_clip(name, device="cpu")
    assert "\n" not in str(caught.value)


def test_broken_open_clip_checkpoints_are_named(tiny, tmp_path):
    state = as_open_clip(CLIPModel.from_pretrained(tiny))
    position = state["visual.positional_embedding"]

    def message(value, name="weights.pt") -> str:
        path = tmp_path / name
        path.write_bytes(value) if isinstance(value, bytes) else torch.save(value, path)
        with pytest.raises(UserError) as caught:
            load_clip(f"open_clip:tiny-vit/{path}", device="cpu")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "visual.positional_embedding has shape (10, 16)" in message(
        {**state, "visual.positional_embedding": torch.cat([position, position])}
    )
    assert "lacks 'visual.proj'" in message({key: value for key, value in state.items() if key != "visual.proj"})
    assert "holds 'more'" in message({**state, "more": position})
    assert "corrupt" in message({"weights": object()})  # a pickle that is more than weights is never run
    assert "corrupt" in message([1, 2])
    assert "corrupt" in message((tmp_path / "weights.pt").read_bytes()[:50])
    assert "corrupt" in message(b"nonsense", "weights.safetensors")
    assert "empty" in message(b"")
    program = io.BytesIO()
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), program)
    assert "TorchScript" in message(program.getvalue())


def test_broken_directories_are_named(tiny, tmp_path):
    def message(name: str, change) -> str:
        path = tmp_path / name
        shutil.copytree(tiny, path)
        change(path)
        with pytest.raises(UserError) as caught:
            load_clip(path, device="cpu")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def cut(path) -> None:
        weights = path / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:5000])

    def edit(path, **change) -> None:
        config = json.loads((path / "config.json").read_text())
        for key, value in change.items():
            part, _, field = key.partition("__")
            config[part][field] = value
        (path / "config.json").write_text(json.dumps(config))

    def other_model(path) -> None:
        (path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))

    assert "cut short" in message("cut", cut)
    assert "patch_embedding.weight has shape (16, 3, 16, 16)" in message(
        "sizes", lambda path: edit(path, vision_config__patch_size=8)
    )
    assert "lacks" in message("layers", lambda path: edit(path, vision_config__num_hidden_layers=3))
    assert "the text tower with 7" in message("end", lambda path: edit(path, text_config__eos_token_id=7))
    assert "'gpt2'" in message("kind", other_model)
