"""The whole of recycling in one resumable command: text in, a model of its language out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from common.checks import UserError, require_at_least, require_place, require_text
from common.decoders.families import positions
from common.files import require_own_directory, write_text
from common.gpt2 import load_gpt2
from common.processes import is_first_process, sole_run
from common.runtime import RuntimeConfig, autocast, hardware, start, versions
from recycle_gpt2.alignment import AlignmentConfig
from recycle_gpt2.bad_rows import TextOptions
from recycle_gpt2.baseline import fit_ngrams, name_of, score_ngrams
from recycle_gpt2.blocks import TokenBlocks
from recycle_gpt2.card import model_card
from recycle_gpt2.corpus import (
    build_corpus,
    corpus_hash,
    load_documents,
    read_manifest,
    require_outside,
    text_hash,
)
from recycle_gpt2.documents import read_documents
from recycle_gpt2.duplicates import DuplicatesConfig
from recycle_gpt2.evaluate import DocumentScore, compare, score_documents, shown, summarise_by, table
from recycle_gpt2.extend import EnglishConfig
from recycle_gpt2.hub import is_hub, keep_streams, kept_files, upload
from recycle_gpt2.lexical import MIXED, RowsConfig, train_only
from recycle_gpt2.lexicon import LexiconConfig, read_dictionary, require_direction, word_tokens
from recycle_gpt2.lexicon import run as run_lexicon
from recycle_gpt2.records import reading
from recycle_gpt2.rows import require_rows
from recycle_gpt2.sampling import sample
from recycle_gpt2.splits import SHARES
from recycle_gpt2.stages import (
    DONE,
    MODEL,
    AlignConfig,
    FinetuneConfig,
    RelearnConfig,
    align_models,
    file_hash,
    finetune,
    model_hash,
    once,
    read_done,
    read_settings,
    relearn,
    require_shared_vocabulary,
    save_model,
    wait_for,
)
from recycle_gpt2.takeover import sampled_hash, take_over
from recycle_gpt2.tokenizer import (
    VOCAB_SIZE,
    TokenizerOptions,
    describe,
    extended,
    load_tokenizer,
    require_extended,
    save_tokenizer,
    texts_but_test,
    train_tokenizer,
)
from recycle_gpt2.training import StageConfig

STAGES = tuple("text tokenizer corpus english relearn align relearn-large finetune evaluate lexicon card".split())


@dataclass(frozen=True)
class RunConfig:
    """Make a GPT-2 of a new language from an English one.

    The stages are text (of the hub), tokenizer, corpus, english (with replay), relearn, align, relearn-large, finetune,
    evaluate, lexicon and card. Each has a directory in OUT.stages; a stopped run resumes when the
    same command is given again. A stage that was deleted, or whose text has changed, is made again with all that was
    made of it; earlier training is kept beside it. OUT is an ordinary Hugging Face directory with the tokenizer and a
    card.
    """

    text: tuple[Path, ...]
    """Files or directories of text: .txt, .md, .html, .jsonl, .json, .csv, .parquet (also .xz, .gz, .bz2, .zst), or a
    Hugging Face dataset on disk or, as hf:NAME or hf:NAME:CONFIGURATION, streamed from the hub; a split named test is
    left out."""
    out: Path
    """Directory of the finished model."""
    language: str
    """Code of the new language, such as nld or ita, for the card."""
    small: str = "gpt2"
    """English model whose embeddings are relearned: tiny, gpt2, distilgpt2, or a directory."""
    large: str = ""
    """Larger English model of the same vocabulary that the embeddings are carried over to; nothing stays small."""
    vocab_size: int = VOCAB_SIZE
    """Tokens of the new tokenizer (the paper: 40,000 for Dutch, 30,000 for Italian)."""
    block: int = 1024
    """Tokens in a block; at most the models' positions."""
    shares: tuple[float, float, float] = SHARES
    """Shares of the documents in train, valid and test, each above 0."""
    workers: int = 1
    """Processes that tokenize the corpus."""
    dictionary: Path | None = None
    """File of target word, tab, English word in each line: with focus and transplant, these words take their
    translations' rows; with any other initialisation, it measures the lexicon."""
    large_share: float = 0.25
    """Length of relearning in the large model, as a share of that in the small one; 0 leaves it out."""
    unfreeze: Literal["all", "top", "none"] = "all"
    """Last training of the whole model: all at once, top (layer by layer from the output), or none."""
    finetune_share: float = 1.0
    """Length of that training, as a share of relearning."""
    finetune_lr: float = 1e-4
    """Its learning rate."""
    push_to_hub: str = ""
    """Upload OUT to this repository (user/name) of the Hugging Face hub when it is finished."""
    options: TokenizerOptions = field(default_factory=TokenizerOptions)
    kept: EnglishConfig = field(default_factory=EnglishConfig)
    drop: DuplicatesConfig = field(default_factory=DuplicatesConfig)
    reading: TextOptions = field(default_factory=TextOptions)
    rows: RowsConfig = field(default_factory=RowsConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    stage: StageConfig = field(default_factory=StageConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)


@dataclass(frozen=True)
class _Text:
    """What decides the text that is streamed."""

    text: tuple[Path, ...]
    column: str


@dataclass(frozen=True)
class _Tokenizer:
    """What decides the tokenizer."""

    text: tuple[Path, ...]
    vocab_size: int
    shares: tuple[float, float, float]
    seed: int
    options: TokenizerOptions
    column: str
    extend: int = 0
    english: tuple[Path, ...] = ()


@dataclass(frozen=True)
class _Corpus:
    """What decides the corpus."""

    text: tuple[Path, ...]
    block: int
    shares: tuple[float, float, float]
    seed: int
    column: str
    duplicates: str


@dataclass(frozen=True)
class _Scoring:
    """What decides the scores, the lexicon and the card."""

    model: str
    """The stage that made it."""
    small: str
    dictionary: Path | None = None


def run(config: RunConfig) -> int:
    """`recycle-gpt2 run`: every stage that is not done yet, and say where the model is."""
    directory = recycle(config)
    if is_first_process():
        if config.push_to_hub:
            print(f"uploaded: {upload(directory, config.push_to_hub)}")
        print(f"model: {directory}; try: recycle-gpt2 sample {directory}")
    return 0


def recycle(config: RunConfig) -> Path:
    """Make the model that `config` describes; returns its directory, `config.out`.

    Raises:
        UserError: anything in the text, the models or the settings that cannot work, with its cure.
    """
    for name in ("large_share", "finetune_share"):
        require_at_least(name, getattr(config, name), 0)
    if not min(config.shares) > 0:
        raise UserError(f"shares are {config.shares}: use three above 0, each of train, valid and test is needed.")
    require_rows(config.rows)
    config.kept.check()
    if config.kept.extend:
        require_extended(config.vocab_size, config.options)
    if config.kept.replay and (config.unfreeze == "none" or config.finetune_share == 0):
        raise UserError(f"replay is {config.kept.replay:g} but nothing is fine-tuned: leave it out, or fine-tune.")
    if config.dictionary is not None:
        read_dictionary(config.dictionary)
    if config.out.name in ("", ".."):
        raise UserError(f"out is {str(config.out)!r}, which names no new directory: give one that does, as out/gpt2.")
    require_outside(config.out, (*config.text, *config.kept.english))
    work = config.out.with_name(config.out.name + ".stages")
    require_text("out", config.out)
    require_place(work, directory=True)
    text = _text(config.text)
    if is_first_process():
        _require_own(config, work, text)
    start(config.runtime)
    block = _check_models(config)
    with sole_run(work):
        _make_stages(config, work, block, text)
    return config.out


def _make_stages(config: RunConfig, work: Path, block: int, known_text: str | None) -> None:
    """Every stage that is not done."""
    if is_first_process() and known_text is not None:
        take_over(config.text, work, known_text)

    def begin(name: str) -> Path:
        if is_first_process():
            print(f"[{STAGES.index(name) + 1}/{len(STAGES)}] {name}", flush=True)
        return work / name

    text, column, kept = {"text": known_text}, config.reading.column, config.kept
    english = {"english": _text(kept.english)} if kept.english else {}
    keep = kept.english if kept.extend else ()
    seed = config.runtime.seed
    if any(map(is_hub, config.text)):
        streamed = begin("text")
        asked = _Text(config.text, column)
        once(streamed, asked, lambda: keep_streams(asked.text, streamed, config.reading), inputs=text)
        config = replace(config, text=kept_files(config.text, streamed))
    tokenizer_directory = begin("tokenizer")
    once(
        tokenizer_directory,
        _Tokenizer(config.text, config.vocab_size, config.shares, seed, config.options, column, kept.extend, keep),
        lambda: _make_tokenizer(config, tokenizer_directory),
        inputs=text | (english if keep else {}),
    )
    if config.dictionary is not None:
        words = word_tokens(load_tokenizer(tokenizer_directory), unspaced=True)
        english_words = word_tokens(load_gpt2(config.small)[1])
        require_direction(read_dictionary(config.dictionary), config.dictionary, words, english_words)
    corpus = begin("corpus")
    once(
        corpus,
        _Corpus(config.text, block, config.shares, seed, column, config.drop.duplicates),
        lambda: _make_corpus(config, config.text, tokenizer_directory, corpus, block),
        inputs=text | {"tokenizer": file_hash(tokenizer_directory / "tokenizer.json")},
    )
    replayed = begin("english") if kept.replay else None
    if replayed is not None:
        once(
            replayed,
            _Corpus(kept.english, block, config.shares, seed, column, config.drop.duplicates),
            lambda: _make_corpus(config, kept.english, tokenizer_directory, replayed, block),
            inputs=english | {"tokenizer": file_hash(tokenizer_directory / "tokenizer.json")},
        )

    relearning = RelearnConfig(
        corpus=corpus,
        tokenizer=tokenizer_directory,
        out=begin("relearn"),
        model=config.small,
        dictionary=config.dictionary if config.rows.initialisation in MIXED else None,
        rows=config.rows,
        stage=config.stage,
        runtime=config.runtime,
    )
    current = small = relearn(relearning)
    if config.large:
        out = begin("align")
        align_config = AlignConfig(
            recycled=small,
            out=out,
            small=config.small,
            large=config.large,
            alignment=config.alignment,
            runtime=config.runtime,
        )
        current = align_models(align_config)
        if config.large_share > 0:
            current = relearn(
                replace(
                    relearning,
                    out=begin("relearn-large"),
                    model=str(current),
                    keep_table=True,
                    stage=_scaled(config.stage, config.large_share),
                )
            )
    if config.unfreeze != "none" and config.finetune_share > 0:
        current = finetune(
            FinetuneConfig(
                model=current,
                corpus=corpus,
                out=begin("finetune"),
                unfreeze=config.unfreeze,
                english=replayed,
                replay=kept.replay,
                stage=replace(_scaled(config.stage, config.finetune_share), lr=config.finetune_lr),
                runtime=config.runtime,
            )
        )

    models = {"recycled": str(current), "relearned": str(small), "English, untouched": config.small}
    evaluation = begin("evaluate")
    model, scoring = model_hash(current), _Scoring(current.parent.name, config.small)
    scores = once(
        evaluation,
        scoring,
        lambda: _evaluate(config, corpus, models),
        inputs={"corpus": corpus_hash(corpus), "model": model, "relearned model": model_hash(small)},
    )
    lexicon = begin("lexicon")
    once(
        lexicon,
        replace(scoring, dictionary=config.dictionary),
        lambda: _make_lexicon(config, current, lexicon),
        inputs={"model": model, "dictionary": file_hash(config.dictionary) if config.dictionary else None},
    )
    card = begin("card")
    once(
        card,
        scoring,
        lambda: _finish(config, work, current, scores),
        inputs={"model": model, "scores": file_hash(evaluation / DONE)},
    )
    if is_first_process() and not (config.out / "config.json").exists():  # moved or deleted since
        _finish(config, work, current, scores)
    elif not is_first_process():
        wait_for(config.out / "config.json")


def _text(paths: Sequence[Path]) -> str | None:
    """The text's hash, the same to every process; None where it is gone."""
    try:
        return text_hash(paths, progress=is_first_process())
    except UserError:  # the stage that reads it complains, if it is not done
        return None


def _require_own(config: RunConfig, work: Path, text: str | None) -> None:
    """Raise UserError where a model is to be written and something else lies, before any work.

    What an earlier version wrote has no marker: it stays as it is while there is nothing left to make.
    """
    stages = ["tokenizer", "corpus", "relearn", "evaluate", "lexicon", "card"]
    stages += ["english"] if config.kept.replay else []
    stages += ["align"] if config.large else []
    stages += ["relearn-large"] if config.large and config.large_share > 0 else []
    stages += ["finetune"] if config.unfreeze != "none" and config.finetune_share > 0 else []
    missing = [name for name in stages if not (work / name / DONE).exists()]
    for name in missing:
        require_own_directory(work / name / MODEL)
    recorded = read_settings(work / "corpus").get("inputs", {}).get("text")
    same_text = None in (text, recorded) or recorded == text or recorded == sampled_hash(config.text)
    if missing or not same_text or not (config.out / "config.json").exists():
        require_own_directory(config.out)


def _check_models(config: RunConfig) -> int:
    """Load both English models once, before hours of work; returns the block that fits their positions."""
    small, small_tokenizer = load_gpt2(config.small)
    places = positions(small.config)
    if config.rows.positions:
        train_only(small, positions=True)  # it refuses a model without
    if config.large:
        large, large_tokenizer = load_gpt2(config.large)
        require_shared_vocabulary((config.small, config.large), small_tokenizer, large_tokenizer)
        places = min(places, positions(large.config))
    return min(config.block, places)


def _scaled(stage: StageConfig, share: float) -> StageConfig:
    """The same stage, longer or shorter."""
    return replace(stage, epochs=stage.epochs * share, tokens=round(stage.tokens * share))


def _make_tokenizer(config: RunConfig, directory: Path) -> dict[str, Any]:
    texts = texts_but_test(read_documents(config.text, config.reading), config.shares, config.runtime.seed)
    if config.kept.extend:
        kept = config.kept
        tokenizer = extended(config.small, texts, kept.extend, kept.english, config.vocab_size, config.options)
    else:
        tokenizer = train_tokenizer(texts, config.vocab_size, options=config.options, progress=True)
    save_tokenizer(tokenizer, directory)
    return {"tokens": len(tokenizer), "tokenizer": describe(tokenizer)}


def _make_corpus(
    config: RunConfig, text: Sequence[Path], tokenizer: Path, directory: Path, block: int
) -> dict[str, Any]:
    build_corpus(
        text,
        load_tokenizer(tokenizer),
        directory,
        block=block,
        shares=config.shares,
        workers=config.workers,
        seed=config.runtime.seed,
        duplicates=config.drop.duplicates,
        reading=config.reading,
    )
    return read_manifest(directory)


def _evaluate(config: RunConfig, corpus: Path, models: dict[str, str]) -> dict[str, Any]:
    """Scores of the models and of an n-gram model of the same tokens, what the recycled one gains, and its samples."""
    device, seed = start(config.runtime), config.runtime.seed
    documents, train = load_documents(corpus, "test"), TokenBlocks(corpus, "train")
    scores: dict[str, list[DocumentScore]] = {}
    samples: list[str] = []
    for name, source in models.items():
        model, tokenizer = load_gpt2(source, device=device, frozen=True)
        with autocast(device, config.runtime.precision):
            scores[name] = score_documents(model, tokenizer, documents, progress=True)
            if name == "recycled":
                samples = sample(model, tokenizer, count=3, max_new_tokens=60, seed=seed)
                scores[name_of(train)] = score_ngrams(fit_ngrams(train), tokenizer, documents)
    results: dict[str, Any] = {"scores": {}, "differences": {}, "samples": samples}
    for name, found in scores.items():
        groups = summarise_by(found, seed=seed)
        print(table(name, groups), flush=True)
        results["scores"][name] = {group: asdict(summary) for group, summary in groups.items()}
        if name != "recycled":
            gained = shown(compare(scores["recycled"], found, seed=seed))
            results["differences"][name] = gained
            print(f"  recycled minus this, paired: {gained}", flush=True)
    return results


def _make_lexicon(config: RunConfig, model: Path, directory: Path) -> dict[str, Any]:
    path = directory / "lexicon.tsv"
    lexicon = LexiconConfig(
        model=model,
        source=config.large or config.small,
        out=path,
        # What made the rows would only be found in them again.
        dictionary=None if config.rows.initialisation in MIXED else config.dictionary,
        device=config.runtime.device,
    )
    try:
        run_lexicon(lexicon)
    except UserError as error:  # the model is made: it is finished without
        print(f"the lexicon is left out: {error}", flush=True)
        return {"lexicon": None, "left_out": str(error)}
    return {"lexicon": str(path)}


def _finish(config: RunConfig, work: Path, current: Path, scores: dict[str, Any]) -> dict[str, Any]:
    """Write the finished model with its card."""
    records = {
        name: read_done(work / name)
        for name in ("relearn", "relearn-large", "finetune")
        if (work / name / DONE).exists()
    }
    model, tokenizer = load_gpt2(current)
    model.config.name_or_path = config.out.name
    with reading(work, f"delete {DONE} in each folder there and give the same command again"):
        card = model_card(
            name=config.out.name,
            language=config.language,
            small=_public(config.small),
            large=_public(config.large),
            corpus=read_done(work / "corpus"),
            vocabulary=f"{len(tokenizer):,} tokens, {describe(tokenizer)}",
            stages=records,
            scores=scores["scores"],
            differences=scores.get("differences", {}),  # version 0.1 had none
            samples=scores["samples"],
            hardware=hardware(),
            versions=versions(),
        )
    save_model(model, tokenizer, config.out, card=card)
    write_text(work / "card" / "README.md", card)
    return {"model": str(config.out)}


def _public(name: str) -> str:
    """A model's name without the directories of this machine."""
    return Path(name).name if Path(name).is_dir() else name
