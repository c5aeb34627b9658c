"""A tower with folded batch norms is the same function."""

import timm
import torch
from torch import nn

from common.encoders.folded import folded


def normed(model):
    """`model` with batch norms that do something."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.5, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            module.weight.data.uniform_(0.5, 2, generator=generator)
            module.bias.data.normal_(0, 0.5, generator=generator)
    return model.eval()


def test_every_norm_of_an_efficientnet_is_folded():
    model = normed(timm.create_model("tf_efficientnet_lite0", num_classes=0))
    pixels = torch.rand(2, 3, 64, 64)
    faster = folded(model, lambda m: m(pixels[:1]))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in faster.modules())
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules())  # the model itself is left alone
    with torch.no_grad():
        plain, fast = model(pixels), faster(pixels.to(memory_format=torch.channels_last))
    torch.testing.assert_close(fast, plain, atol=1e-4 * plain.abs().max().item(), rtol=1e-4)
    assert folded(model, lambda m: m(pixels[:1])) is faster


def test_norms_that_follow_no_convolution_stay():
    model = normed(
        nn.Sequential(
            nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5)
        )
    )
    pixels = torch.rand(2, 3, 8, 8)
    faster = folded(model, lambda m: m(pixels[:1]))
    assert [isinstance(m, nn.BatchNorm2d) for m in faster] == [True, False, False, True, False, False]
    torch.testing.assert_close(faster(pixels), model(pixels))


def test_nothing_to_fold():
    assert folded(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), lambda m: m(torch.rand(1, 3, 8, 8))) is None
    conv = nn.Conv2d(3, 3, 1)
    twice = normed(nn.Sequential(conv, nn.BatchNorm2d(3), conv, nn.BatchNorm2d(3)))
    assert folded(twice, lambda m: m(torch.rand(1, 3, 8, 8))) is None
