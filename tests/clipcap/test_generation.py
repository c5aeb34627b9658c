"""What users of transformers type for `generate`, beside its own answers on tiny models with large weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from clipcap import ClipCapConfig, ClipCapModel
from clipcap.cli import main
from clipcap.decoding import decode, ignored_options, require_options
from clipcap.generation import decode_options, default_generation
from common.checks import UserError

pytestmark = pytest.mark.filterwarnings("ignore:Passing `")  # the library's, about prefixes without tokens
STOPS = [3, 7, 11]
LENGTH = 3


@pytest.fixture(scope="module", params=[0, 1])
def model(request) -> ClipCapModel:
    torch.manual_seed(request.param)
    sizes = dict(vocab_size=41, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.4)
    return ClipCapModel(ClipCapConfig(gpt2_config=sizes, clip_width=8, prefix_length=LENGTH, eos_token_id=STOPS)).eval()


@pytest.fixture(scope="module")
def embeddings() -> Tensor:
    return 3 * torch.randn(5, 8, generator=torch.Generator().manual_seed(9))


@torch.no_grad()
def library(model: ClipCapModel, embeddings: Tensor, prompt: list[int], **options) -> list[list[int]]:
    """The library's captions from the same prefixes, each up to its end."""
    inputs, extra = model.prefix(embeddings), {}
    if prompt:
        ids = torch.tensor([prompt]).expand(len(embeddings), -1)
        inputs, extra = torch.cat([inputs, model.gpt2.transformer.wte(ids)], 1), {"input_ids": ids}
    rows = model.gpt2.generate(
        inputs_embeds=inputs, attention_mask=torch.ones(inputs.shape[:2]), eos_token_id=STOPS, pad_token_id=40,
        **extra, **options,
    )  # fmt: skip
    return [cut(row, len(prompt)) for row in rows.tolist()]


def cut(row: list[int], begin: int = 0) -> list[int]:
    """A row without what pads it behind its end."""
    end = next((place for place in range(begin, len(row)) if row[place] in STOPS), len(row) - 1)
    return row[: end + 1]


OPTIONS = [
    {},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"min_new_tokens": 6},
    {"min_new_tokens": 12},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 4},
]
BEAM_OPTIONS = [
    {"length_penalty": 2.5},
    {"length_penalty": 0.0},
    {"length_penalty": -1.0},
    {"early_stopping": True},
    {"early_stopping": "never"},
    {"early_stopping": "never", "length_penalty": 0.0},
    {"early_stopping": True, "length_penalty": 2.0, "min_new_tokens": 3, "repetition_penalty": 1.2},
]


@pytest.mark.slow
@pytest.mark.parametrize("prompt", [[], [5, 8, 5]], ids=["no prompt", "prompt"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_greedy_is_the_library_s(model, embeddings, options, prompt):
    theirs = library(model, embeddings, prompt, max_new_tokens=12, do_sample=False, num_beams=1, **options)
    ours = model.generate(
        embeddings, prompt_ids=prompt, num_beams=1, do_sample=False, max_new_tokens=12, pad_token_id=40, **options
    )
    assert [cut(row, len(prompt)) for row in ours.tolist()] == theirs
    assert len({tuple(row) for row in theirs}) > 1


@pytest.mark.slow
@pytest.mark.parametrize("prompt", [[], [5, 8, 5]], ids=["no prompt", "prompt"])
@pytest.mark.parametrize("options", [*OPTIONS, *BEAM_OPTIONS], ids=str)
def test_beams_are_the_library_s(model, embeddings, options, prompt):
    shared = dict(num_beams=4, num_return_sequences=4, max_new_tokens=12) | options
    theirs = library(model, embeddings, prompt, do_sample=False, **shared)
    ours = model.generate(embeddings, prompt_ids=prompt, **shared)
    assert len(ours) == 20 and [cut(row, len(prompt)) for row in ours.tolist()] == theirs


def test_every_option_changes_a_caption(model, embeddings):
    """So that the comparisons above show something."""
    plain = model.generate(embeddings, max_new_tokens=12).tolist()
    for options in ({"repetition_penalty": 1.7}, {"no_repeat_ngram_size": 1}, {"min_new_tokens": 12}):
        assert model.generate(embeddings, max_new_tokens=12, **options).tolist() != plain
    assert model.generate(embeddings, max_new_tokens=12, length_penalty=-3.0).shape[1] <= len(plain[0])


def test_lengths_count_the_prompt_and_not_the_prefix(model, embeddings):
    prompt = [5, 8]
    theirs = library(model, embeddings, prompt, max_length=LENGTH + len(prompt) + 9, num_beams=2)
    ours = model.generate(embeddings, input_ids=torch.tensor([prompt]).expand(5, -1), max_length=9, num_beams=2)
    assert ours.shape[1] <= 9 and all(row[:2] == prompt for row in ours.tolist())
    assert [cut(row, 2) for row in theirs] == [cut(row, 2) for row in ours.tolist()]
    shortest = model.generate(embeddings, prompt_ids=prompt, min_length=8, max_length=9).tolist()
    assert all(not set(row[2:7]) & set(STOPS) for row in shortest)


def test_sampling_draws_from_what_the_constraints_leave(model, embeddings):
    torch.manual_seed(0)
    rows = model.generate(embeddings, do_sample=True, num_return_sequences=30, no_repeat_ngram_size=1, max_new_tokens=9)
    assert len(rows) == 150 and len({tuple(row) for row in rows.tolist()}) > 100
    for row in rows.tolist():
        caption = cut(row)
        assert len(set(caption)) == len(caption)
    one = model.generate(embeddings, do_sample=True, top_k=1, max_new_tokens=9)
    assert one.tolist() == model.generate(embeddings, do_sample=False, num_beams=1, max_new_tokens=9).tolist()


def test_scores_are_of_the_length_penalty(model, embeddings):
    plain = decode(model, embeddings, max_new_tokens=6, early_stopping=True)
    for [a], [b] in zip(plain, decode(model, embeddings, max_new_tokens=6, length_penalty=0.0), strict=True):
        if a.token_ids == b.token_ids:
            assert b.score == pytest.approx(a.score * len(a.token_ids), rel=1e-4)


def test_a_generation_config_is_taken_from_call_and_directory(model, embeddings, tmp_path):
    config = GenerationConfig(num_beams=3, max_new_tokens=7, no_repeat_ngram_size=2)
    wanted = model.generate(embeddings, num_beams=3, max_new_tokens=7, no_repeat_ngram_size=2)
    assert torch.equal(model.generate(embeddings, generation_config=config), wanted)
    longer = model.generate(embeddings, generation_config=config, max_new_tokens=8)
    assert torch.equal(longer, model.generate(embeddings, num_beams=3, max_new_tokens=8, no_repeat_ngram_size=2))
    before = model.generation_config
    model.generation_config = config
    try:
        model.save_pretrained(tmp_path)
    finally:
        model.generation_config = before
    loaded = ClipCapModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.generate(embeddings), wanted)
    assert not torch.equal(loaded.generate(embeddings, num_beams=1), wanted)
    (tmp_path / "generation_config.json").write_text("[")
    with pytest.raises(UserError, match="generation_config.json"):
        ClipCapModel.from_pretrained(tmp_path)


SAVED = default_generation(30)


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({}, {"strategy": "beam", "num_beams": 5, "max_new_tokens": 30}),
        ({"do_sample": True}, {"strategy": "sample", "top_k": 50, "temperature": 1.0, "max_new_tokens": 30}),
        ({"do_sample": True, "top_k": 0, "temperature": 2.0}, {"strategy": "sample", "temperature": 2.0, "max_new_tokens": 30}),
        ({"do_sample": False, "num_beams": 1}, {"strategy": "greedy", "num_beams": 1, "max_new_tokens": 30}),
        ({"strategy": "sample"}, {"strategy": "sample", "max_new_tokens": 30}),
        ({"num_return_sequences": 2, "use_cache": True, "output_scores": False}, {"strategy": "beam", "num_beams": 5, "num_captions": 2, "max_new_tokens": 30}),
        ({"eos_token_id": 4, "max_length": 9}, {"strategy": "beam", "num_beams": 5, "stop_token_ids": 4, "max_new_tokens": 9}),
    ],
)  # fmt: skip
def test_options_are_translated(asked, found):
    assert decode_options(asked, SAVED) == found


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"num_beam_groups": 2}, "num_beam_groups is 2"),
        ({"typical_p": 0.5}, "typical_p is 0.5"),
        ({"bad_words_ids": [[3]]}, "bad_words_ids"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate is True"),
        ({"nonsense": 1}, "nonsense is 1"),
        ({"do_sample": True, "num_beams": 3}, "num_beams 3"),
        ({"do_sample": True, "strategy": "greedy"}, "do_sample is True with strategy 'greedy'"),
        ({"generation_config": {"num_beams": 2}}, "generation_config"),
        ({"num_return_sequences": 2, "num_captions": 3}, "num_captions 3"),
        ({"max_length": 2}, "max_length is 2 with a prompt of 2"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(asked, words):
    with pytest.raises(UserError, match=words):
        decode_options(asked, SAVED, 2)


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 0.0}, {"repetition_penalty": float("nan")}, {"no_repeat_ngram_size": -1},
        {"min_new_tokens": 68}, {"length_penalty": float("inf")}, {"early_stopping": "soon"},
        {"strategy": "greedy", "length_penalty": 2.0}, {"strategy": "beam_original", "early_stopping": True},
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(options):
    with pytest.raises(UserError, match=str(list(options)[-1])):
        require_options(**options)


def test_a_prompt_must_fit(model, embeddings):
    with pytest.raises(UserError, match="room for 2"):
        decode(model, embeddings, prompt_ids=[5] * 60, max_new_tokens=12)
    with pytest.raises(UserError, match="prompt_ids"):
        decode(model, embeddings, prompt_ids=[41])
    with pytest.raises(UserError, match="no tokenizer"):
        model.generate(embeddings, prompt="a photo of")
    with pytest.raises(UserError, match="attention_mask"):
        model.generate(embeddings, input_ids=torch.ones(5, 2).long(), attention_mask=torch.zeros(5, 2))
    assert model.generate(embeddings, prompt_ids=[5] * 55).shape[1] <= 62  # the default takes the room there is


def test_ignored_options_are_named():
    assert ignored_options("greedy", num_beams=3, temperature=0.5) == [
        "num_beams 3 is ignored: strategy 'greedy' has no beams.",
        "temperature 0.5 is ignored: strategy 'greedy' takes the most probable token.",
    ]
    assert ignored_options("beam", num_beams=3, temperature=0.5) == ignored_options("greedy") == []


@pytest.mark.slow
def test_the_command_begins_captions_with_a_prompt_and_names_what_it_ignores(root, capsys):
    photo = str(root / "common/assets/samples/scenes/test_000.jpg")
    arguments = ["caption", photo, "--prompt", "a photo of", "--strategy", "greedy", "--num-beams", "3"]
    assert main([*arguments, "--max-new-tokens", "4"]) == 0
    out, err = capsys.readouterr()
    assert out.split("\t")[1].startswith("a photo of") and "num_beams 3 is ignored" in err
