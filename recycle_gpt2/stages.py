"""The stages that make a model: relearn, align and fine-tune, each a function and a command that resumes."""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from common.checks import UserError, require_directory, require_same_settings, require_text
from common.files import hash_content, require_own_directory, whole_directory, write_json
from common.gpt2 import load_gpt2, token_tables
from common.pretrained import no_progress_bar
from common.processes import is_first_process, sole_run
from common.runtime import RuntimeConfig, provenance, start
from common.training import flat, settings_of
from recycle_gpt2.alignment import AlignmentConfig, align, choose_options, held_out_error, neighbour_overlap
from recycle_gpt2.blocks import TokenBlocks
from recycle_gpt2.corpus import corpus_hash
from recycle_gpt2.extend import require_share
from recycle_gpt2.lexical import (
    RowsConfig,
    layers_from_top,
    replace_lexical,
    tables_to_align,
    train_only,
)
from recycle_gpt2.records import RENEW, read_json, reading
from recycle_gpt2.replay import WithReplay
from recycle_gpt2.rows import new_rows, with_english
from recycle_gpt2.tokenizer import load_tokenizer, tokenizer_hash
from recycle_gpt2.training import StageConfig, StageRecord, train_stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DONE = "done.json"
SETTINGS = "settings.json"
MODEL = "model"
TRAINING = "training"
FREE = ("runtime", "devices", "num_nodes", "strategy", "out")
"""Settings that do not change what a finished stage has made (the seed among the runtime's is kept)."""
PROCESSES = "devices * num_nodes"
"""Must stay the same while a stage trains: the blocks of a step and the number of steps follow from it."""
PARTS = ("rows", "alignment")
"""Fields that hold what the whole command asks for too."""


@dataclass(frozen=True)
class RelearnConfig:
    """Relearn the lexical embeddings of a model for a new language; everything else stays as it is."""

    corpus: Path
    """Directory that `recycle-gpt2 corpus` wrote."""
    tokenizer: Path
    """Directory of the new language's tokenizer."""
    out: Path
    """Where the run goes; the model is in its folder `model`."""
    model: str = "gpt2"
    """The model: tiny, tiny-medium, gpt2, distilgpt2, gpt2-medium, gpt2-large, gpt2-xl, or a directory."""
    dictionary: Path | None = None
    """For focus and transplant: a file of target word, tab, English word in each line; these words take their
    translations' rows."""
    keep_table: bool = False
    """Go on from the token table that the model has (it was aligned or relearned), instead of a new one."""
    rows: RowsConfig = field(default_factory=RowsConfig)
    stage: StageConfig = field(default_factory=StageConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)


@dataclass(frozen=True)
class AlignConfig:
    """Carry relearned embeddings over to a larger model, by the English vocabulary that both models share."""

    recycled: Path
    """Directory of the relearned small model."""
    out: Path
    """Where the run goes; the larger model with the aligned rows is in its folder `model`."""
    small: str = "gpt2"
    """The English model that the small one was made from."""
    large: str = "gpt2-medium"
    """The larger English model."""
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)


@dataclass(frozen=True)
class FinetuneConfig:
    """Unfreeze a relearned model and train on at a low rate."""

    model: Path
    """Directory of the relearned or aligned model."""
    corpus: Path
    """Directory that `recycle-gpt2 corpus` wrote."""
    out: Path
    """Where the run goes; the model is in its folder `model`."""
    unfreeze: Literal["all", "top"] = "all"
    """all at once, or top: layer by layer from the output, an equal share of the training for each step."""
    english: Path | None = None
    """For replay: directory that `recycle-gpt2 corpus` wrote of English text, with this model's tokenizer."""
    replay: float = 0.0
    """Share of the blocks that are of that corpus, so that less English is forgotten; they count among the tokens."""
    stage: StageConfig = field(default_factory=StageConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)


def wait_for(path: Path, ready: Callable[[], bool] | None = None) -> None:
    """Return when `path` is there, or when it is `ready`; end with the process that was to write it."""
    parent, ready = os.getppid(), ready or path.exists
    while not ready():
        if os.getppid() != parent:
            raise UserError(f"the first process ended before it wrote {str(path)!r}: see its message.")
        time.sleep(0.5)


def stage_settings(config: Any) -> dict[str, Any]:
    """What of a configuration decides the result, in JSON's own types, with the settings of its training one by one."""
    fields = flat(settings_of(config, FREE), PARTS)
    if isinstance(fields.get("stage"), dict):
        stage = flat(fields.pop("stage"))
        fields |= {f"stage.{name}": value for name, value in stage.items() if name not in FREE}
        fields[PROCESSES] = stage["devices"] * stage["num_nodes"]
    return fields


def file_hash(path: Path) -> str | None:
    """SHA-256 of what a file holds; None where there is none."""
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        return str(hash_content(file, hashlib.sha256()).hexdigest())


def model_hash(model: Path | str) -> str | None:
    """SHA-256 of the record of the stage that made a model; None for any other model."""
    return file_hash(Path(model).parent / DONE) if Path(model).name == MODEL else None


def once(
    directory: Path,
    config: Any,
    work: Callable[[], dict[str, Any]],
    *,
    inputs: Mapping[str, str | None],
    everyone: bool = False,
) -> dict[str, Any]:
    """Do a stage's work, unless it is done: then return its record.

    `settings.json` is written first and `done.json`, whole or not at all, last. In between a stop leaves a stage that
    the same call takes up again. A stage that was made of other inputs is made again; its training is kept.

    Args:
        directory: of the stage.
        config: its configuration.
        work: does it and returns a record for JSON.
        inputs: hashes of what the stage is made of, by name; None is not known and not compared. Where one is known,
            the path in the configuration may be another.
        everyone: all processes of distributed training do the work, not only the first.

    Raises:
        UserError: the directory holds training, or a finished stage, of other settings, or a damaged record; a `model`
            lies there that no stage wrote; or another run is using it.
    """
    directory = Path(directory)
    require_text("out", directory)
    known = {name: value for name, value in inputs.items() if value is not None}
    with sole_run(directory):
        return _once(directory, stage_settings(config), work, known, everyone)


def _once(
    directory: Path, settings: dict[str, Any], work: Callable[[], dict[str, Any]], known: dict[str, str], everyone: bool
) -> dict[str, Any]:
    done, begun = directory / DONE, directory / SETTINGS
    before: dict[str, Any] = {}
    # Only training leaves something half done that other settings would not fit.
    if begun.exists() and (done.exists() or (directory / TRAINING).exists()):
        before = read_settings(directory)
        if done.exists():
            before.pop(PROCESSES, None)
        _require_same(directory, settings, before, known)
    if is_first_process():
        if changed := changed_inputs(before, known):
            start_over(directory, changed)
        known = before.get("inputs", {}) | known
        if before.get("inputs") != known or not done.exists():
            directory.mkdir(parents=True, exist_ok=True)
            write_json(begun, settings | {"inputs": known})
    elif before:
        wait_for(begun, lambda: not changed_inputs(read_settings(directory), known))
    if done.exists():
        return read_done(directory)
    if not (is_first_process() or everyone):
        wait_for(done)
        return read_done(directory)
    if is_first_process():
        require_own_directory(directory / MODEL)  # where the work ends
    record = work()
    if is_first_process():
        write_json(done, record | {"inputs": known})
    else:
        wait_for(done)
    return record


def _require_same(
    directory: Path, settings: Mapping[str, Any], before: Mapping[str, Any], known: Mapping[str, str]
) -> None:
    """Raise UserError when a stage was begun with other settings; a hash says more than a path."""
    hashed = {name.removesuffix(" model") for name in known.keys() & before.get("inputs", {}).keys()}
    now = {name: _place(value) for name, value in settings.items() if name not in hashed}
    was = now | {name: _place(value) for name, value in before.items()}  # older directories lack newer settings
    require_same_settings(directory, was, now, "use the same settings, delete the directory, or give another")


def _place(value: Any) -> Any:
    """A path in one form, however it was given; anything else as it is."""
    if isinstance(value, list):
        return [_place(item) for item in value]
    return os.path.realpath(value) if isinstance(value, str) and os.path.exists(value) else value


def read_settings(directory: Path) -> dict[str, Any]:
    """What a stage was begun with; empty where the first process has just moved it away.

    Raises:
        UserError: the record is damaged.
    """
    path = directory / SETTINGS
    cure = f"delete the directory {str(directory)!r} to make the stage again, or put an intact file there"
    try:
        found = read_json(path, cure)
    except FileNotFoundError:
        return {}
    with reading(path, cure):
        if not all(isinstance(value, str) for value in found.get("inputs", {}).values()):
            raise TypeError
    return found


def read_done(directory: Path) -> dict[str, Any]:
    """The record of a stage that is done.

    Raises:
        UserError: it is damaged.
    """
    return read_json(directory / DONE, RENEW)


def changed_inputs(before: Mapping[str, Any], inputs: Mapping[str, str]) -> list[str]:
    """Names of the inputs that were others when a stage was begun with the settings `before`."""
    return [name for name, value in inputs.items() if before.get("inputs", {}).get(name, value) != value]


def start_over(directory: Path, changed: Sequence[str]) -> None:
    """Make room for a stage whose inputs have changed: its training and its model are kept beside it."""
    what = f"{directory} was made of another {' and '.join(changed)}: it is made again"
    if not any((directory / name).exists() for name in (TRAINING, MODEL)):
        (directory / DONE).unlink(missing_ok=True)
        print(f"{what}.", flush=True)
        return
    places = (directory.with_name(f"{directory.name}.{number}") for number in itertools.count(1))
    kept = next(place for place in places if not place.exists())
    kept.mkdir()
    shutil.copy(directory / SETTINGS, kept)
    # The directory itself stays, for the lock in it. A stop after the training has moved leaves nothing to keep.
    for name in (TRAINING, MODEL, DONE):
        if (directory / name).exists():
            os.replace(directory / name, kept / name)
    print(f"{what}, and what was trained before is kept in {kept}.", flush=True)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path, *, card: str = "") -> Path:
    """Write a Hugging Face directory with its tokenizer, whole or not at all; one of ours that exists is replaced.

    Raises:
        UserError: something else lies there, or the disk takes no more.
    """
    with whole_directory(directory) as partial, no_progress_bar():
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if card:
            (partial / "README.md").write_text(card, encoding="utf-8")
    return directory


def described(record: StageRecord) -> dict[str, Any]:
    """A training record with where it was made."""
    return asdict(record) | provenance()


def relearn(config: RelearnConfig) -> Path:
    """Relearn the lexical embeddings (de Vries & Nissim 2021, sec. 3.2) and return the model's directory."""

    def work() -> dict[str, Any]:
        start(config.runtime)
        model, english = load_gpt2(config.model)
        train, valid = (TokenBlocks(config.corpus, split) for split in ("train", "valid"))
        tokenizer = english if config.keep_table else load_tokenizer(config.tokenizer)
        _require_same_tokenizer(train, tokenizer, config.corpus)
        if not config.keep_table:
            seed = config.runtime.seed
            found = new_rows(config.rows, model, english, tokenizer, train, seed=seed, dictionary=config.dictionary)
            replace_lexical(model, tokenizer, *found)
        train_only(model, positions=config.rows.positions, norms=config.rows.norms)
        record = train_stage(
            model,
            train,
            valid,
            config.out / TRAINING,
            config.stage,
            runtime=config.runtime,
            order=int(config.keep_table),  # a short second relearning sees other blocks than the first began with
        )
        if is_first_process():
            save_model(model, tokenizer, config.out / MODEL)
        return described(record)

    inputs = {
        "corpus": corpus_hash(config.corpus),
        "tokenizer": file_hash(config.tokenizer / "tokenizer.json"),
        "model": model_hash(config.model),
        "dictionary": file_hash(config.dictionary) if config.dictionary else None,
        "vectors": file_hash(config.rows.vectors) if config.rows.vectors else None,
    }
    once(config.out, config, work, inputs=inputs, everyone=True)
    return config.out / MODEL


def align_models(config: AlignConfig) -> Path:
    """Align the relearned rows to the larger model (sec. 3.3) and return its directory.

    Reports the original's measure, the overlap of neighbours, and the error on English rows that were held out.
    """

    def work() -> dict[str, Any]:
        device = start(config.runtime)
        if device.type == "mps":  # which has no float64
            device = torch.device("cpu")
        require_directory(config.recycled, "recycled model")
        small, small_tokenizer = load_gpt2(config.small, device=device, frozen=True)
        large, large_tokenizer = load_gpt2(config.large, device=device, frozen=True)
        recycled, tokenizer = load_gpt2(config.recycled, device=device, frozen=True)
        require_shared_vocabulary((config.small, config.large), small_tokenizer, large_tokenizer)
        shared = 1 + max(large_tokenizer.get_vocab().values())  # a table may be padded with rows of no token
        several = tables_to_align(small, large, recycled, shared)
        *tables, target = several[0]
        generator = torch.Generator().manual_seed(config.runtime.seed)
        how = config.alignment
        settings: dict[str, Any] = {"method": how.method}
        if how.method == "knn":
            settings["k"] = how.k
        elif how.choose:
            options = choose_options(*tables, method=how.method, generator=generator)
            settings |= options.arguments()
        found = [align(*rows, **settings) for rows in several]
        aligned = found[0]
        replace_lexical(large, tokenizer, *with_english(found, token_tables(large), large_tokenizer, tokenizer))
        save_model(large, tokenizer, config.out / MODEL)
        return {
            "settings": settings,
            "neighbour_overlap": neighbour_overlap(target, aligned),
            "held_out_error": held_out_error(
                *tables, generator=torch.Generator().manual_seed(config.runtime.seed), **settings
            ),
        }

    record = once(config.out, config, work, inputs={"recycled model": model_hash(config.recycled)})
    with reading(config.out / DONE, RENEW):
        print(
            f"aligned by {config.alignment.method}: {record['neighbour_overlap']:.1%} of neighbours kept, error on "
            f"held-out English rows {record['held_out_error']:.3f} (0 perfect, 1 useless)"
        )
    return config.out / MODEL


def require_shared_vocabulary(
    names: tuple[str, str], small: PreTrainedTokenizerBase, large: PreTrainedTokenizerBase
) -> None:
    """Raise UserError unless both English models, of these names, have the same token at every row."""
    ours, theirs = small.get_vocab(), large.get_vocab()
    if ours == theirs:
        return
    differing = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
    token = differing[0]
    raise UserError(
        f"the English vocabularies of {names[0]!r} ({len(ours)} tokens) and {names[1]!r} ({len(theirs)}) "
        f"differ in {len(differing)} tokens, such as {token!r}: give a small and a large model of one family."
    )


def finetune(config: FinetuneConfig) -> Path:
    """Unfreeze the layers, all at once or from the top, train on, and return the model's directory."""
    require_share(config.replay)
    if (config.english is None) != (config.replay == 0):
        raise UserError(f"replay is {config.replay:g} and English {config.english}: give both, or neither.")

    def work() -> dict[str, Any]:
        start(config.runtime)
        model, tokenizer = load_gpt2(config.model)
        train, valid = (TokenBlocks(config.corpus, split) for split in ("train", "valid"))
        _require_same_tokenizer(train, tokenizer, config.corpus)
        blocks: TokenBlocks | WithReplay = train
        if config.english is not None:
            english = TokenBlocks(config.english, "train", block=train.block)
            _require_same_tokenizer(english, tokenizer, config.english)
            blocks = WithReplay(train, english, config.replay)
        records = []
        steps = unfreezing(config.unfreeze, model.config.num_hidden_layers)
        part = replace(config.stage, share=config.stage.share / len(steps))
        for number, layers in enumerate(steps, start=1):
            train_only(model, layers=layers)
            directory = config.out / TRAINING / (f"step-{number}" if len(steps) > 1 else "")
            # Each step, a share of an epoch, sees other blocks; 0 and 1 are the orders of relearning.
            records.append(train_stage(model, blocks, valid, directory, part, runtime=config.runtime, order=number + 1))
        if is_first_process():
            save_model(model, tokenizer, config.out / MODEL)
        last = records[-1]
        return described(
            replace(
                last,
                tokens=sum(record.tokens for record in records),
                flops=sum(record.flops for record in records),
                seconds=sum(record.seconds for record in records),
            )
        )

    inputs = {"corpus": corpus_hash(config.corpus), "model": model_hash(config.model)}
    if config.english is not None:
        inputs["english"] = corpus_hash(config.english)
    once(config.out, config, work, inputs=inputs, everyone=True)
    return config.out / MODEL


def unfreezing(how: str, n_layer: int) -> list[Literal["all"] | list[int]]:
    """What trains beside the lexical embeddings in each step: everything, or one layer more from the top each time."""
    if how == "all":
        return ["all"]
    return [layers_from_top(n_layer, count) for count in range(1, n_layer)] + ["all"]


def _require_same_tokenizer(train: TokenBlocks, tokenizer: PreTrainedTokenizerBase, corpus: Path) -> None:
    if train.vocab_size != len(tokenizer):
        raise UserError(
            f"corpus {str(corpus)!r} has a vocabulary of {train.vocab_size} tokens but the tokenizer {len(tokenizer)}: "
            f"build the corpus with this tokenizer."
        )
    if train.tokenizer != tokenizer_hash(tokenizer):
        raise UserError(
            f"corpus {str(corpus)!r} was built with another tokenizer of as many tokens: build the corpus with this "
            f"tokenizer."
        )


def run_relearn(config: RelearnConfig) -> int:
    """`recycle-gpt2 relearn`."""
    directory = relearn(config)
    print(f"relearned model: {directory}")
    return 0


def run_align(config: AlignConfig) -> int:
    """`recycle-gpt2 align`."""
    directory = align_models(config)
    print(f"aligned model: {directory}; relearn briefly with: recycle-gpt2 relearn --keep-table --model {directory}")
    return 0


def run_finetune(config: FinetuneConfig) -> int:
    """`recycle-gpt2 finetune`."""
    directory = finetune(config)
    print(f"fine-tuned model: {directory}")
    return 0
