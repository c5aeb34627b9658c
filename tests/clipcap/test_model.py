"""The captioner as a model: loss, frozen backbone, saving, errors; and the Captioner around it."""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AutoModel, GPT2Config, GPT2LMHeadModel

from clipcap import ClipCapConfig, ClipCapModel
from clipcap.captioner import Captioner
from clipcap.data.images import ImageError, find_images, read_image
from clipcap.decoding import decode
from common.checks import UserError
from common.encoders.interface import ImageFeatures
from common.language import IGNORE

GPT2 = dict(vocab_size=53, n_embd=16, n_layer=2, n_head=2, n_positions=40)


def make(seed: int = 0, **fields) -> ClipCapModel:
    torch.manual_seed(seed)
    fields = (
        dict(clip_width=12, prefix_length=3, clip_length=2, mapper_layers=2, mapper_heads=4, gpt2_config=GPT2) | fields
    )
    return ClipCapModel(ClipCapConfig(**fields)).eval()


def example(model: ClipCapModel, b: int = 4, t: int = 7) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (b, 12) if model.config.inputs == "embedding" else (b, 5, 12)
    return {
        "clip_embeddings": torch.randn(shape, generator=generator),
        "input_ids": torch.randint(0, 53, (b, t), generator=generator),
    }


@pytest.fixture
def backbone(tmp_path):
    """A directory with a tiny GPT-2 and a tokenizer, as `load_gpt2` takes it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<end>", *(f"w{i}" for i in range(52))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(tmp_path / "gpt2")
    torch.manual_seed(5)
    GPT2LMHeadModel(GPT2Config(**GPT2, eos_token_id=0, bos_token_id=0)).save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


KINDS = [
    {"mapper": "mlp"},
    {"mapper": "transformer"},
    {"mapper": "transformer", "inputs": "patches"},
    {"mapper": "mlp", "normalize_embeddings": True},
]


@pytest.mark.parametrize("fields", KINDS)
def test_logits_predict_the_token_at_their_place(fields):
    model = make(**fields)
    batch = example(model)
    logits = model(**batch).logits
    words = model.gpt2.transformer.wte(batch["input_ids"])
    whole = model.gpt2(inputs_embeds=torch.cat([model.prefix(batch["clip_embeddings"]), words], 1)).logits
    torch.testing.assert_close(logits, whole[:, 2:-1], atol=1e-5, rtol=1e-5)


def test_loss_counts_labels_only_and_needs_no_logits():
    model = make()
    batch = example(model)
    labels = batch["input_ids"].clone()
    labels[0, 4:] = IGNORE
    labels[2, 1:] = IGNORE
    out = model(**batch, labels=labels)
    log_probs = out.logits.log_softmax(-1)
    picked = [-log_probs[i, j, labels[i, j]] for i in range(4) for j in range(7) if labels[i, j] != IGNORE]
    torch.testing.assert_close(out.loss, torch.stack(picked).mean())
    lean = model(**batch, labels=labels, return_logits=False)
    assert lean.logits is None
    torch.testing.assert_close(lean.loss, out.loss)
    assert model(**batch).loss is None
    assert model(**batch, labels=torch.full_like(labels, IGNORE)).loss == 0


def test_token_zero_counts_in_the_loss():
    """The original ignores token 0 ("!"), which it also pads with."""
    model = make()
    batch = example(model, b=1, t=3)
    batch["input_ids"][:] = 0
    out = model(**batch, labels=batch["input_ids"])
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits[0], torch.zeros(3, dtype=torch.long)))
    assert out.loss > 0


def test_padding_is_not_counted_in_the_loss():
    model = make()
    batch = example(model, b=2, t=5)
    alone = model(**batch, labels=batch["input_ids"]).loss
    padded = F.pad(batch["input_ids"], (0, 4), value=7)
    labels = F.pad(batch["input_ids"], (0, 4), value=IGNORE)
    for mask in (None, (labels != IGNORE).long()):
        loss = model(batch["clip_embeddings"], padded, attention_mask=mask, labels=labels).loss
        torch.testing.assert_close(loss, alone)


def test_normalized_embeddings_have_no_length():
    model = make(normalize_embeddings=True)
    x = torch.randn(3, 12)
    torch.testing.assert_close(model.prefix(7 * x), model.prefix(x))


def train_step(model: ClipCapModel) -> None:
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    batch = example(model)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    optimizer.step()


def test_frozen_gpt2_stores_no_gradients():
    model = make(mapper="transformer")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train_step(model)
    assert not model.gpt2.training and model.mapper.training
    assert all(p.grad is None and not p.requires_grad for p in model.gpt2.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("gpt2."), name


def test_fine_tuned_gpt2_learns_too_and_stays_tied():
    model = make(tune_gpt2=True)
    before = model.gpt2.transformer.wte.weight.clone()
    train_step(model)
    assert model.gpt2.training
    assert not torch.equal(model.gpt2.transformer.wte.weight, before)
    assert model.gpt2.lm_head.weight is model.gpt2.transformer.wte.weight


@pytest.mark.parametrize("fields", KINDS)
def test_save_and_load_are_exact(fields, tmp_path):
    model = make(**fields, tune_gpt2=True)
    model.save_pretrained(tmp_path / "out")
    batch = example(model)
    for load in (ClipCapModel.from_pretrained, AutoModel.from_pretrained):
        again = load(tmp_path / "out")
        assert isinstance(again, ClipCapModel) and not again.training
        assert torch.equal(again(**batch).logits, model(**batch).logits)
        assert again.config.to_diff_dict().items() >= fields.items() - {("mapper", "mlp")}


def test_frozen_captioner_saves_its_mapper_alone(backbone, tmp_path, monkeypatch):
    from safetensors import safe_open

    monkeypatch.chdir(tmp_path)  # a relative name is kept so that it works elsewhere too
    config = ClipCapConfig(clip_width=12, prefix_length=3, gpt2="gpt2")
    model = ClipCapModel.from_backbones(config)
    assert config.gpt2 == "gpt2" and config.gpt2_config is None  # the caller's config is untouched
    assert model.config.gpt2 == str(backbone) and model.config.eos_token_id == 0
    train_step(model)
    model.eval().save_pretrained(tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert all(name.startswith("mapper.") for name in file.keys())  # noqa: SIM118
    monkeypatch.chdir("/")
    again = ClipCapModel.from_pretrained(tmp_path / "out")
    batch = example(model)
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert not any(p.requires_grad for p in again.gpt2.parameters())
    assert len(again.tokenizer) == 53

    backbone.rename(tmp_path / "gone")
    with pytest.raises(UserError, match="needs the GPT-2 .*gpt2.* it was trained on"):
        ClipCapModel.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("tuned", [False, True])
def test_captioner_of_the_hub(tuned, backbone, tmp_path, monkeypatch):
    """As the hub's client keeps one on the disk; a frozen GPT-2 has no tokenizer there, the mapper being alone."""
    model = ClipCapModel.from_backbones(ClipCapConfig(clip_width=12, gpt2=str(backbone), tune_gpt2=tuned)).eval()
    repository, commit = tmp_path / "cache" / "models--me--captioner", "0" * 40
    model.save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("clipcap.model.require_reachable", lambda *arguments: None)
    again = ClipCapModel.from_pretrained("me/captioner", cache_dir=tmp_path / "cache")
    batch = example(model)
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert again.tokenizer.decode([1, 2]) == "w0 w1"


def test_names_of_clips_are_right_in_another_directory(backbone, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-clip").mkdir()
    (tmp_path / "clip.pt").write_bytes(b"weights")
    for given, kept in (
        ("./my-clip", str(tmp_path / "my-clip")),
        ("open_clip:RN50/clip.pt", f"open_clip:RN50/{tmp_path / 'clip.pt'}"),
        ("open_clip:RN50/openai", "open_clip:RN50/openai"),
        ("openai/clip-vit-base-patch32", "openai/clip-vit-base-patch32"),
        ("tiny", "tiny"),
        (None, None),
    ):
        model = ClipCapModel.from_backbones(ClipCapConfig(clip_width=12, gpt2=str(backbone), clip=given))
        assert model.config.clip == kept


def test_generated_rows_are_padded_with_no_word_of_the_caption(backbone):
    """A captioner may end its captions with a "."; padding with it would add dots to them."""
    config = ClipCapConfig(clip_width=12, prefix_length=3, gpt2=str(backbone), eos_token_id=list(range(1, 9)))
    model, embeddings = ClipCapModel.from_backbones(config), torch.zeros(8, 12)

    def options():
        generator = torch.Generator().manual_seed(0)
        return {"strategy": "sample", "temperature": 9.0, "generator": generator, "max_new_tokens": 9}

    captions = [c.token_ids for [c] in decode(model, embeddings, **options())]
    rows = model.generate(embeddings, **options()).tolist()
    longest = max(map(len, captions))
    assert longest > min(map(len, captions))
    assert rows == [[*ids, *[0] * (longest - len(ids))] for ids in captions]


def test_another_gpt2_than_it_was_trained_on_is_refused(backbone, tmp_path):
    ClipCapModel.from_backbones(ClipCapConfig(clip_width=12, gpt2=str(backbone))).save_pretrained(tmp_path / "out")
    GPT2LMHeadModel(GPT2Config(**GPT2 | {"n_layer": 1})).save_pretrained(backbone)
    with pytest.raises(UserError, match="n_layer 2 but .* has 1"):
        ClipCapModel.from_pretrained(tmp_path / "out")


def test_fine_tuned_captioner_needs_nothing_else(backbone, tmp_path):
    model = ClipCapModel.from_backbones(ClipCapConfig(clip_width=12, gpt2=str(backbone), tune_gpt2=True))
    model.save_pretrained(tmp_path / "out")
    for file in backbone.iterdir():
        file.unlink()
    again = ClipCapModel.from_pretrained(tmp_path / "out")
    batch = example(model)
    assert torch.equal(again(**batch).logits, model.eval()(**batch).logits)
    assert again.tokenizer.decode([1, 2]) == "w0 w1"


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
def test_dtype_is_honoured(dtype, backbone, tmp_path):
    for tune in (False, True):
        ClipCapModel.from_backbones(ClipCapConfig(clip_width=12, gpt2=str(backbone), tune_gpt2=tune)).save_pretrained(
            tmp_path / "out"
        )
        model = ClipCapModel.from_pretrained(tmp_path / "out", dtype=dtype)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert ClipCapModel.from_pretrained(tmp_path / "out").dtype == torch.float32
    with pytest.raises(UserError, match="dtype is 'int8'"):
        ClipCapModel.from_pretrained(tmp_path / "out", dtype="int8")


def test_checkpoint_of_other_sizes_is_named(tmp_path):
    make(tune_gpt2=True).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"prefix_length": 5}))
    with pytest.raises(UserError, match=r"mapper.model.0.* has shape .* but its config.json asks for"):
        ClipCapModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"mapper": "transformer"}))
    with pytest.raises(UserError, match=r"lacks mapper"):
        ClipCapModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:300])
    with pytest.raises(UserError, match="corrupt|cut short|cannot be loaded"):
        ClipCapModel.from_pretrained(tmp_path)


def files(directory) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


@pytest.fixture
def small_disk():
    """As if a disk had room for files of 4000 bytes alone."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_while_saving_is_one_line_and_changes_nothing(tmp_path, small_disk):
    model = make(tune_gpt2=True)
    with pytest.raises(UserError, match="captioner .* cannot be written .*free some space") as caught:
        model.save_pretrained(tmp_path / "new")
    assert len(str(caught.value).splitlines()) == 1 and not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text("before")
    with pytest.raises(UserError, match="cannot be written"):
        model.save_pretrained(tmp_path / "old")
    assert files(tmp_path) == {"old/config.json": b"before"}


def test_saving_replaces_its_own_files_and_no_others(tmp_path):
    place, elsewhere = tmp_path / "clone", tmp_path / "elsewhere.safetensors"
    (place / ".git").mkdir(parents=True)
    others = {".git/HEAD": b"main", "README.md": b"mine", "onnx.bin": b"mine", "tokenizer.model": b"mine"}
    for name, content in others.items():
        (place / name).write_bytes(content)
    elsewhere.write_bytes(b"in the hub's cache")
    (place / "model.safetensors").symlink_to(elsewhere)
    first, second = make(0, tune_gpt2=True), make(1, tune_gpt2=True)
    first.save_pretrained(place, max_shard_size="20kB")  # several files
    assert len(list(place.glob("model-*.safetensors"))) > 1 and not (place / "model.safetensors").exists()
    batch = example(first)
    assert torch.equal(ClipCapModel.from_pretrained(place)(**batch).logits, first(**batch).logits)
    second.save_pretrained(place)
    assert torch.equal(ClipCapModel.from_pretrained(place)(**batch).logits, second(**batch).logits)
    first.save_pretrained(place, max_shard_size="20kB")
    assert torch.equal(ClipCapModel.from_pretrained(place)(**batch).logits, first(**batch).logits)
    assert elsewhere.read_bytes() == b"in the hub's cache"
    assert files(place).items() >= others.items() and not list(place.glob(".saving-*"))
    modes = {file.stat().st_mode & 0o777 for file in place.glob("*.safetensors")}
    assert modes == {0o644}  # anybody may read them, as the rest


def test_a_config_keeps_nothing_that_chooses_code():
    config = ClipCapConfig(
        gpt2_config=GPT2 | {"_attn_implementation": "somebody/kernel"}, attn_implementation="somebody/kernel",
        _attn_implementation="somebody/kernel", quantization_config={}, auto_map={"AutoModel": "evil.Evil"},
    )  # fmt: skip
    assert config._attn_implementation is None
    assert not hasattr(config, "auto_map") and not hasattr(config, "quantization_config")
    assert ClipCapModel(config).gpt2.config._attn_implementation == "sdpa"


def test_not_a_captioner(backbone, tmp_path):
    with pytest.raises(UserError, match="is a 'gpt2' model, not a captioner"):
        ClipCapModel.from_pretrained(backbone)
    with pytest.raises(UserError, match="does not exist"):
        ClipCapModel.from_pretrained(str(tmp_path / "nowhere"))


@pytest.mark.usefixtures("any_shape")
def test_bad_embeddings_are_named():
    model = make()
    for bad, message in [
        (torch.zeros(2, 13), r"shape \(2, 13\): this captioner reads embedding of shape \(batch, 12\)"),
        (torch.zeros(12), r"shape \(12,\)"),
        (torch.tensor([[0.0] * 12, [float("nan")] * 12]), r"NaN or infinity in rows \[1\]"),
    ]:
        with pytest.raises(UserError, match=message):
            model.prefix(bad)
    on_a_gpu = make().to("meta")  # where nothing can be read back
    assert on_a_gpu.train().prefix(torch.zeros(2, 12, device="meta")).shape == (2, 3, 16)
    with pytest.raises(UserError, match="at most 37; cut them"):
        model(torch.zeros(1, 12), torch.zeros(1, 38, dtype=torch.long))
    with pytest.raises(UserError, match="prefix_length is 40"):
        make(prefix_length=40)
    with pytest.raises(UserError, match="mapper is 'rnn'"):
        ClipCapConfig(mapper="rnn")


def test_import_is_light():
    code = "import sys, clipcap; print(clipcap.__version__, [m for m in ('torch', 'transformers') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip().endswith("[]")


class FakeCLIP:
    """Stands for `common.encoders.interface.FrozenCLIP`: the mean colour of an image, repeated."""

    name, width, patch_width, image_size = "fake", 12, 12, 4

    class preprocess:
        size = 4

        def __new__(cls, images):
            return torch.stack(
                [torch.from_numpy(np.array(i.resize((4, 4))).transpose(2, 0, 1) / 255.0) for i in images]
            ).float()

    def encode_image_features(self, pixels, *, packed=False):
        colour = pixels.mean((2, 3)).repeat(1, 4)
        return ImageFeatures(colour, colour[:, None], colour)


@pytest.fixture
def captioner(backbone):
    torch.manual_seed(2)
    model = ClipCapModel.from_backbones(ClipCapConfig(clip_width=12, prefix_length=3, gpt2=str(backbone)))
    return Captioner(model, FakeCLIP())


def test_captioner_takes_paths_images_arrays_and_generators(captioner, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    forms = [tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(pixels), pixels]
    options = {"max_new_tokens": 6}
    texts = captioner.caption(forms, batch_size=3, **options)
    assert len(texts) == 4 and len(set(texts)) == 1 and isinstance(texts[0], str)
    assert captioner.caption(iter(forms), progress=True, **options) == texts
    assert [captioner.caption(form, **options) for form in forms] == texts
    assert captioner.caption(np.stack([pixels, pixels]), **options) == texts[:2]
    several = captioner.caption(pixels, num_captions=3, **options)
    assert len(several) == 3 and several[0] == texts[0]
    assert captioner.caption([], **options) == []


def test_stream_goes_on_after_a_bad_image(captioner, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"not an image")
    good = np.zeros((5, 5), dtype=np.uint8)
    errors = []
    found = list(captioner.stream([good, tmp_path / "bad.png", good], on_error=errors.append, max_new_tokens=4))
    assert len(found) == 2 and found[0].captions == found[1].captions and found[0].scores[0] < 0
    assert len(errors) == 1 and "bad.png" in str(errors[0])
    with pytest.raises(ImageError, match="not an image"):
        captioner.caption(tmp_path / "bad.png", max_new_tokens=4)
    assert list(captioner.stream([tmp_path / "bad.png"], on_error=errors.append, max_new_tokens=4)) == []


def test_sampled_captions_are_reproducible(captioner):
    image = np.full((6, 6, 3), 0.5)
    draw = [captioner.caption(image, strategy="sample", num_captions=4, seed=s, max_new_tokens=8) for s in (1, 1, 2)]
    assert draw[0] == draw[1] != draw[2]


def test_captioner_wants_its_own_clip(backbone):
    model = ClipCapModel.from_backbones(ClipCapConfig(clip_width=10, gpt2=str(backbone), clip="openai/other"))
    with pytest.raises(
        UserError, match=r"width 12 but the captioner reads 10: use the CLIP it was trained on \(openai"
    ):
        Captioner(model, FakeCLIP())


def test_images_that_cannot_be_read(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.jpg").write_bytes(b"")
    for source, message in [
        (tmp_path / "missing.jpg", "does not exist"),
        (tmp_path / "empty.jpg", "is empty"),
        (tmp_path / "cut.jpg", "cut short"),
        (tmp_path, "is a directory"),
        (7, "is a int"),
        (np.zeros((4, 4, 2)), r"shape \(4, 4, 2\)"),
        (np.full((4, 4), 3.0), "scale them"),
        (np.full((4, 4), float("nan")), "scale them"),
        (np.full((4, 4), -1), "dtype int64"),
    ]:
        with pytest.raises(ImageError, match=message):
            read_image(source)


def test_every_kind_of_array_is_the_same_picture():
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    wanted = np.array(read_image(grey))
    for same in (grey[..., None], grey / 255, np.stack([grey] * 3, -1), grey.astype(np.uint16) * 257, grey.astype(int)):
        assert np.array_equal(np.array(read_image(same)), wanted)


def test_find_images(tmp_path):
    (tmp_path / "in/deep").mkdir(parents=True)
    for name in ("in/b.JPG", "in/deep/a.png", "in/notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    found = find_images([tmp_path / "in", tmp_path / "given.xyz"])
    assert [p.name for p in found] == ["b.JPG", "a.png", "given.xyz"]
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="holds no image"):
        find_images([tmp_path / "none"])
