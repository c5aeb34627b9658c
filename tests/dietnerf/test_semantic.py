from __future__ import annotations

import pytest
import torch
from nerfstudio.cameras.cameras import Cameras
from torch.nn import functional as F

from common.checks import UserError
from dietnerf.poses import pose_spherical
from dietnerf.semantic import (
    SemanticConfig,
    SemanticLoss,
    ViewSampler,
    augment,
    check_semantic_config,
    is_due,
    load_encoder,
    patch_consistency_loss,
    semantic_consistency_loss,
)


@pytest.fixture(scope="module")
def images():
    """Four smooth random images in [0, 1]."""
    generator = torch.Generator().manual_seed(1)
    return F.interpolate(torch.rand(4, 3, 5, 5, generator=generator), size=40, mode="bicubic").clamp(0, 1)


@pytest.fixture(scope="module")
def cameras():
    poses = torch.stack([pose_spherical(theta, -30, 4)[:3] for theta in (0, 60, 120)])
    return Cameras(poses, fx=60.0, fy=60.0, cx=25.0, cy=20.0, width=50, height=40)


def test_loss_is_the_originals(golden):
    found = semantic_consistency_loss(golden["consistency.rendered"], golden["consistency.target"])
    torch.testing.assert_close(found, golden["consistency.loss_per_target"], atol=1e-4, rtol=0)


def test_loss_is_least_for_the_target_itself_at_any_length(generator):
    targets = torch.randn(3, 8, generator=generator)
    assert semantic_consistency_loss(5 * targets[1], targets)[1] == pytest.approx(-1, abs=1e-5)
    assert semantic_consistency_loss(-targets[1], targets)[1] == pytest.approx(1, abs=1e-5)


def test_patches_are_matched_wherever_they_are(generator):
    target = torch.randn(2, 6, 8, generator=generator)
    shuffled = target[0][torch.randperm(6, generator=generator)]
    found = patch_consistency_loss(shuffled, target)
    assert found[0] == pytest.approx(-1, abs=1e-5) and found[1] > -0.99
    naive = -sum(max(float(F.cosine_similarity(p, q, dim=0)) for q in target[1]) for p in shuffled) / 6
    assert found[1] == pytest.approx(naive, abs=1e-5)


def test_schedule_starts_repeats_and_ends():
    config = SemanticConfig(weight=0.1, every=10, start=5, end=40)
    assert [step for step in range(60) if is_due(config, step)] == [5, 15, 25, 35]
    assert not is_due(SemanticConfig(weight=0.0), 0)
    assert is_due(SemanticConfig(weight=0.1), 1_000_000)


@pytest.mark.parametrize(
    "field, value", [("every", 0), ("weight", -1.0), ("resolution", 0), ("poses", "random"), ("feature", "cls")]
)
def test_bad_settings_are_named(field, value):
    with pytest.raises(UserError, match=f"semantic.{field} is"):
        check_semantic_config(SemanticConfig(**{field: value}))


def test_class_token_is_before_the_final_norm_and_projection(images):
    from common.clip import load_clip

    encoder, clip = load_encoder("tiny", device="cpu"), load_clip("tiny", device="cpu")
    found = encoder(images)
    squeezed = F.interpolate(images, (clip.image_size,) * 2, mode="bicubic", antialias=True)
    pixels = (squeezed - torch.tensor(clip.mean)[:, None, None]) / torch.tensor(clip.std)[:, None, None]
    hidden = clip.backbone.model.vision_model(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(found["class_token"], hidden[:, 0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found["patches"], hidden[:, 1:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found["embedding"], clip.encode_images(pixels), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("feature", ["class_token", "embedding", "patches"])
def test_gradients_reach_every_pixel_and_no_weight(images, feature):
    loss = SemanticLoss(SemanticConfig(weight=0.1, feature=feature, targets=0), images, "cpu")
    render = images[:1].permute(0, 2, 3, 1).clone().mul(0.5).requires_grad_()
    value = loss(render)
    assert value.shape == (1,)
    value.sum().backward()
    assert (render.grad.abs().sum(dim=-1) > 0).float().mean() > 0.99
    expected = -loss.similarity(render.detach().permute(0, 3, 1, 2)).mean()
    torch.testing.assert_close(value.detach()[0], expected, atol=1e-5, rtol=0)


def test_targets_are_embedded_once_and_drawn_each_step(images):
    loss = SemanticLoss(SemanticConfig(weight=0.1), images, "cpu")
    calls = []
    encode, loss.encoder._features = (
        loss.encoder._features,
        lambda pixels: (calls.append(len(pixels)), encode(pixels))[1],
    )
    render = images[:2].permute(0, 2, 3, 1)
    generator = torch.Generator().manual_seed(0)
    values = torch.stack([loss(render, generator) for _ in range(12)])
    assert calls == [2] * 12
    alone = -loss.similarity(images[:2])  # (2, n): every value is one target's
    for row in values:
        assert ((row[:, None] - alone).abs() < 1e-5).all(dim=0).any()
    assert len({round(float(v), 5) for v in values[:, 0]}) > 1


def test_the_hinge_asks_for_no_more_than_real_views_have(images):
    config = SemanticConfig(weight=0.1, targets=0, hinge=True)
    loss = SemanticLoss(config, images, "cpu")
    cosines = loss.similarity(images)
    ceiling = torch.stack([cosines[[i for i in range(4) if i != j], j].mean() for j in range(4)])
    same = images[:1].permute(0, 2, 3, 1).clone().requires_grad_()
    value = loss(same)
    torch.testing.assert_close(value.detach()[0], -torch.minimum(cosines[0], ceiling).mean(), atol=1e-5, rtol=0)
    only = SemanticLoss(SemanticConfig(weight=0.1, targets=0, hinge=True), images[:1].repeat(2, 1, 1, 1), "cpu")
    met = only(same)
    (gradient,) = torch.autograd.grad(met.sum(), same)
    assert met.item() == pytest.approx(-1, abs=1e-4) and gradient.abs().max() < 1e-2
    with pytest.raises(UserError, match="hinge"):
        SemanticLoss(config, images[:1], "cpu")


def test_a_text_is_one_more_target(images):
    plain = SemanticLoss(SemanticConfig(weight=0.1, targets=0), images, "cpu")
    texted = SemanticLoss(SemanticConfig(weight=0.1, targets=0, text="a red ball", text_weight=0.5), images, "cpu")
    render = images[:1].permute(0, 2, 3, 1)
    text = texted.encoder.embed_text("a red ball")
    likeness = F.cosine_similarity(texted.encoder(images[:1])["embedding"], text)
    torch.testing.assert_close(texted(render), plain(render) - 0.5 * likeness, atol=1e-5, rtol=0)


def test_the_random_control_has_the_trained_encoders_gradient_norm(images):
    render = (0.5 * images[:2]).permute(0, 2, 3, 1)
    found = []
    for random_weights in (False, True):
        loss = SemanticLoss(SemanticConfig(weight=0.1, targets=0, random_weights=random_weights), images, "cpu")
        leaf = render.clone().requires_grad_()
        value = loss(leaf)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        found.append((value.detach(), gradient))
    (value, trained), (other, control) = found
    torch.testing.assert_close(control.flatten(1).norm(dim=1), trained.flatten(1).norm(dim=1), rtol=1e-3, atol=0)
    assert (F.cosine_similarity(control.flatten(1), trained.flatten(1)) < 0.9).all()  # another direction
    assert (value - other).abs().max() > 1e-3


def test_augmentation_is_one_for_all_renders_and_keeps_gradients(images, generator):
    pair = images[:1].repeat(2, 1, 1, 1).requires_grad_()
    changed = augment(pair, generator)
    assert changed.shape == pair.shape
    torch.testing.assert_close(changed[0], changed[1])
    assert (changed - pair).abs().mean() > 1e-3
    changed.sum().backward()
    assert pair.grad.abs().sum() > 0
    again = augment(images[:1], torch.Generator().manual_seed(0))
    torch.testing.assert_close(again[0], changed[0].detach())


@pytest.mark.slow
def test_classifiers_are_encoders_with_weights_from_a_file(images, tmp_path):
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    network = torchvision.models.get_model("resnet18", weights=None)
    path = tmp_path / "resnet18.pth"
    torch.save(network.state_dict(), path)
    encoder = load_encoder(f"torchvision:resnet18:{path}", device="cpu")
    pixels = F.interpolate(images, (224, 224), mode="bicubic", antialias=True)
    pixels = (pixels - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[
        :, None, None
    ]
    network.fc = torch.nn.Identity()
    torch.testing.assert_close(encoder(images)["embedding"], network.eval()(pixels), atol=1e-4, rtol=1e-4)
    with pytest.raises(UserError, match="knows no text"):
        encoder.embed_text("a ball")
    timm = pytest.importorskip("timm")
    torch.save(timm.create_model("resnet18").state_dict(), path)
    assert load_encoder(f"timm:resnet18:{path}", device="cpu").size == 224
    torch.save({"conv1.weight": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="do not fit"):
        load_encoder(f"timm:resnet18:{path}", device="cpu")
    with pytest.raises(UserError, match="did you mean .*resnet18"):
        load_encoder("timm:resnet81", device="cpu")
    with pytest.raises(UserError, match="knows no text"):
        torch.save(timm.create_model("test_resnet").state_dict(), path)
        SemanticLoss(SemanticConfig(encoder=f"timm:test_resnet/{path}", text="a ball"), images, "cpu")


@pytest.mark.parametrize("random_weights", [False, True])
@pytest.mark.parametrize(
    "name, size",
    [("torchvision:squeezenet1_1", 512), ("timm:deit_tiny_distilled_patch16_224", 192), ("timm:test_convnext", 64)],
)
def test_classifiers_lose_their_last_layer_of_whatever_kind(images, name, size, random_weights, tmp_path):
    import timm
    from torchvision import models

    library, _, model = name.partition(":")
    network = timm.create_model(model) if library == "timm" else models.get_model(model)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    encoder = load_encoder(f"{name}/{tmp_path}/weights.pth", random_weights=random_weights, device="cpu")
    found = encoder(images[:1])
    assert found["embedding"].shape == (1, size) and ("patches" in found) == (library == "timm")
    if library == "torchvision":
        with pytest.raises(UserError, match="has no patches"):
            encoder.feature_of(found, "patches")


def test_a_classifier_with_nan_is_refused_by_name(tmp_path):
    from torchvision import models

    state = models.squeezenet1_1().state_dict()
    state["features.3.squeeze.weight"][0] = torch.nan
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(UserError, match="features.3.squeeze.weight holds NaN or infinity"):
        load_encoder(f"torchvision:squeezenet1_1:{tmp_path / 'weights.pt'}", device="cpu")


def test_a_classifier_without_its_weights_is_named(monkeypatch):
    from torchvision import models

    def refuse(*arguments, **options):
        raise OSError("no network")

    monkeypatch.setattr(models, "get_model", refuse)
    with pytest.raises(UserError, match="give a file, torchvision:resnet18/PATH"):
        load_encoder("torchvision:resnet18", device="cpu")


@pytest.mark.parametrize("poses", ["published", "sphere", "interpolate"])
def test_random_views_are_never_a_training_view_and_repeat_with_their_generator(cameras, poses):
    sampler = ViewSampler(SemanticConfig(weight=0.1, poses=poses, resolution=12), cameras)
    generators = [torch.Generator().manual_seed(4) for _ in range(2)]
    first, second = (sampler(generator) for generator in generators)
    assert first.origins.shape == (12, 12, 3) and torch.equal(first.origins, second.origins)
    assert ((cameras.camera_to_worlds[:, :, 3] - first.origins[0, 0]).norm(dim=1) > 1e-3).all()
    third = sampler(generators[0])
    assert (third.origins[0, 0] - first.origins[0, 0]).norm() > 1e-3


def test_random_views_cover_the_whole_frame(cameras):
    """The original's jittered render covers 84 or 56 percent of the frame; ours tiles it, at any resolution."""
    sampler = ViewSampler(SemanticConfig(weight=0.1, resolution=168), cameras, encoder_size=12)
    assert sampler().origins.shape == (12, 12, 3)  # more than the encoder sees would be lost
    for resolution in (7, 16, 168):
        view = ViewSampler(SemanticConfig(weight=0.1, resolution=resolution), cameras).camera(
            torch.Generator().manual_seed(0)
        )
        bundle = view.generate_rays(camera_indices=0, keep_shape=True)
        pose = view.camera_to_worlds[0]
        local = bundle.directions @ pose[:, :3]
        plane = local[..., :2] / -local[..., 2:]  # where rays cross the image plane
        column = plane[0, :, 0] * 60 + 25  # in pixels of the training cameras: (50, 40)
        row = -plane[:, 0, 1] * 60 + 20
        for found, side in ((column, 50), (row, 40)):
            pixel = side / resolution
            torch.testing.assert_close(found, (torch.arange(resolution) + 0.5) * pixel, atol=1e-2, rtol=0)
            covered = (found[-1] - found[0] + pixel) / side
            assert covered == pytest.approx(1, abs=1e-3)


def test_one_view_cannot_be_interpolated(cameras):
    with pytest.raises(UserError, match="1 training view"):
        ViewSampler(SemanticConfig(weight=0.1, poses="interpolate"), cameras[:1])
