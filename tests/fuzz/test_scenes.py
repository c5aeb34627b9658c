"""Runs of DietNeRF, broken or hostile: a UserError, no hang, and nothing of them is run."""

from __future__ import annotations

import json
import shutil

import pytest

pytest.importorskip("nerfstudio")

import torch  # noqa: E402
import yaml  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from common.checks import UserError  # noqa: E402
from dietnerf.scene import Scene  # noqa: E402
from dietnerf.settings import nerfstudio_config, train_config  # noqa: E402
from tests.dietnerf.ball import write_scene  # noqa: E402
from tests.fuzz.mutations import FUZZ, break_file, damaged, files_below, only_user_errors  # noqa: E402

VALUES = st.sampled_from([
    None, True, -1, 0, 3, 40, 0.5, float("nan"), float("inf"), "", "x", "../../outside", "a\0b", "é" * 300, [], {}, [None],
    [3, 4, 5], {"": None},
])  # fmt: skip
"""What may stand where something else belongs; sizes are small, so that what is built from them is."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose field knows nothing, of a scene beside it."""
    place = tmp_path_factory.mktemp("run") / "inside"
    config = nerfstudio_config(train_config(
        scene=write_scene(place / "scene"), out=place, num_views=2, image_size=8, resolutions=(4, 6), semantic_weight=0.0,
    ))  # fmt: skip
    pipeline = config.pipeline.setup(device="cpu", test_mode="test")
    (place / "nerfstudio_models").mkdir()
    torch.save({"step": 1, "pipeline": pipeline.state_dict()}, place / "nerfstudio_models/step-000000001.ckpt")
    (place / "config.yml").write_text(yaml.dump(config))
    assert Scene.load(place, device="cpu").step == 1
    return place


@pytest.fixture
def copied(run, tmp_path):
    return shutil.copytree(run, tmp_path / "inside", ignore=shutil.ignore_patterns("scene"))


@st.composite
def other_values(draw, text):
    """A config.yml with one to three values replaced, where they are on a line with their name."""
    lines = text.splitlines()
    named = [number for number, line in enumerate(lines) if ": " in line]
    for number in draw(st.lists(st.sampled_from(named), min_size=1, max_size=3)):
        name = lines[number].split(": ")[0]
        lines[number] = f"{name}: {json.dumps(draw(VALUES))}"
    return "\n".join(lines).encode()


def test_config(copied):
    good = (copied / "config.yml").read_text()

    @settings(FUZZ, max_examples=25)
    @given(st.one_of(other_values(good), damaged(good.encode())))
    def check(data):
        (copied / "config.yml").write_bytes(data)
        before = files_below(copied.parent)
        with only_user_errors():
            Scene.load(copied, device="cpu")
        assert files_below(copied.parent) == before

    check()


@pytest.mark.parametrize("hostile", [
    '!!python/object/apply:os.system ["touch {made}"]',
    '!!python/object/apply:nerfstudio.utils.scripts.run_command ["touch {made}"]',
    '!!python/object/apply:nerfstudio.utils.writer.TensorboardWriter [{made}]',
    '!!python/object/apply:subprocess.Popen [[touch, {made}]]',
    '!!python/object/new:subprocess.Popen [[touch, {made}]]',
    "!!python/name:nerfstudio.utils.scripts.run_command ''",
    "!!python/name:nerfstudio.utils.scripts.subprocess.Popen ''",
    "!!python/object:nerfstudio.utils.writer.TensorboardWriter {{log_dir: {made}}}",
    "!!python/module:os ''",
])  # fmt: skip
def test_a_config_that_would_run_code_is_refused(copied, hostile):
    made, good = copied.parent / "made", (copied / "config.yml").read_text()
    for text in (hostile.format(made=made), good.replace("data: null", f"data: {hostile.format(made=made)}", 1)):
        (copied / "config.yml").write_text(text)
        with pytest.raises(UserError, match="config.yml of .* cannot be read"):
            Scene.load(copied, device="cpu")
        assert not made.exists()


def test_checkpoint_of_other_bytes(copied):
    path = copied / "nerfstudio_models/step-000000001.ckpt"
    break_file(path, damaged(path.read_bytes()), lambda: Scene.load(copied, device="cpu"), 15)


def test_checkpoint_of_other_values(copied):
    path = copied / "nerfstudio_models/step-000000001.ckpt"
    good = torch.load(path, weights_only=True)
    names = sorted(good["pipeline"])

    @settings(FUZZ, max_examples=20)
    @given(st.sampled_from(["all", "step", "pipeline", *names]), st.one_of(VALUES, st.just(torch.zeros(3))))
    def check(name, value):
        bad = {**good, "pipeline": {**good["pipeline"], name: value}} if name in names else {**good, name: value}
        torch.save(value if name == "all" else bad, path)
        with only_user_errors():
            Scene.load(copied, device="cpu")

    check()


class Hostile:
    """Makes a file when it is unpickled."""

    def __init__(self, made):
        self.made = made

    def __reduce__(self):
        return open, (str(self.made), "w")


def test_a_checkpoint_that_would_run_code_or_holds_nan_is_refused(copied):
    path, made = copied / "nerfstudio_models/step-000000001.ckpt", copied.parent / "made"
    good = torch.load(path, weights_only=True)
    parameters = Scene.load(copied, device="cpu").pipeline.named_parameters()
    name = next(name for name, value in parameters if value.numel() > 1)
    torch.save(good | {"pipeline": good["pipeline"] | {name: Hostile(made)}}, path)
    with pytest.raises(UserError, match="is damaged"):
        Scene.load(copied, device="cpu")
    assert not made.exists()
    good["pipeline"][name].view(-1)[0] = float("nan")
    torch.save(good, path)
    with pytest.raises(UserError, match="holds NaN or infinity") as caught:
        Scene.load(copied, device="cpu")
    assert name in str(caught.value)
    torch.save(good | {"step": -1}, path)
    with pytest.raises(UserError, match="is damaged"):
        Scene.load(copied, device="cpu")
