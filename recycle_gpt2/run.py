"""The whole of recycling in one resumable command: text in, a model of its language out."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from common.checks import UserError, require_place, require_text
from common.decoders.families import positions
from common.files import require_own_directory, write_text
from common.gpt2 import load_gpt2
from common.processes import is_first_process, sole_run
from common.runtime import autocast, hardware, start, versions
from recycle_gpt2.baseline import fit_ngrams, name_of, score_ngrams
from recycle_gpt2.blocks import TokenBlocks
from recycle_gpt2.card import model_card
from recycle_gpt2.corpus import (
    build_corpus,
    corpus_hash,
    load_documents,
    read_manifest,
    require_outside,
)
from recycle_gpt2.evaluate import DocumentScore, compare, score_documents, shown, summarise_by, table
from recycle_gpt2.lexical import MIXED, train_only
from recycle_gpt2.lexicon import LexiconConfig, read_dictionary, require_direction, word_tokens
from recycle_gpt2.lexicon import run as run_lexicon
from recycle_gpt2.records import reading
from recycle_gpt2.sampling import sample
from recycle_gpt2.settings import RunConfig as RunConfig  # one of the names that scripts call
from recycle_gpt2.settings import one_language
from recycle_gpt2.stages import (
    DONE,
    MODEL,
    SETTINGS,
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
from recycle_gpt2.texts import RECORD, KeptText
from recycle_gpt2.tokenizer import (
    TokenizerOptions,
    describe,
    extended,
    load_tokenizer,
    save_tokenizer,
    texts_but_test,
    train_tokenizer,
)

STAGES = tuple("text tokenizer corpus english relearn align relearn-large finetune evaluate lexicon card".split())


@dataclass(frozen=True)
class _Tokenizer:
    """What decides the tokenizer."""

    text: tuple[Path, ...]
    vocab_size: int | None
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


@dataclass(frozen=True)
class Job:
    """A run whose settings are checked."""

    config: RunConfig
    work: Path
    """Directory of the stages."""
    text: KeptText
    english: KeptText
    """Without a path where no English text is given."""
    begun: bool
    """Something has been made of the text."""
    known: str | None
    """The text's hash then, the same to every process; None where it is gone."""


def recycle(config: RunConfig) -> Path:
    """Make the model that `config` describes, of one language; returns its directory, `config.out`.

    Raises:
        UserError: anything in the text, the models or the settings that cannot work, with its cure.
    """
    job = check(config)
    start(config.runtime)
    block = check_models(config)
    with sole_run(job.work):
        make_data(job, block)
        make_model(job)
    return config.out


def check(config: RunConfig, *, english: Path | None = None) -> Job:
    """What can be known before any model is loaded and any document read.

    Args:
        config: of one language.
        english: directory in which the English documents are kept, if runs share it.

    Raises:
        UserError: anything in the settings or the paths that cannot work.
    """
    config.check()
    if config.dictionary is not None:
        read_dictionary(config.dictionary)
    require_outside(config.out, (*config.text, *config.kept.english))
    work = config.out.with_name(config.out.name + ".stages")
    require_text("out", config.out)
    require_place(work, directory=True)
    text = KeptText(config.text, config.reading, work / "text")
    english_text = KeptText(config.kept.english, config.reading, english or work / "text" / "english")
    begun = any((work / name / SETTINGS).exists() for name in ("tokenizer", "corpus"))
    if not begun:
        text.check()
        if english_text.paths:
            english_text.check()
    known = _hash_of(text) if begun else None
    if is_first_process():
        _require_own(config, work, known)
    return Job(config, work, text, english_text, begun, known)


def make_data(job: Job, block: int) -> None:
    """The stages that read text, each unless it is done: text, tokenizer, corpus and english."""
    config, work = job.config, job.work
    if is_first_process() and job.known is not None:
        take_over(config.text, work, job.known)
    seed, column, kept = config.runtime.seed, config.reading.column, config.kept
    _begin(work, "text")
    text = {"text": job.known if job.begun else _read(job.text)}
    english: dict[str, str | None] = {}
    if kept.english:
        english = {"english": _hash_of(job.english) if job.begun else _read(job.english)}
    keep = kept.english if kept.extend else ()
    tokenizer_directory = _begin(work, "tokenizer")
    once(
        tokenizer_directory,
        _Tokenizer(config.text, config.vocab_size, config.shares, seed, config.options, column, kept.extend, keep),
        lambda: _make_tokenizer(job, tokenizer_directory),
        inputs=text | (english if keep else {}),
    )
    if config.dictionary is not None:
        words = word_tokens(load_tokenizer(tokenizer_directory), unspaced=True)
        english_words = word_tokens(load_gpt2(config.small)[1])
        require_direction(read_dictionary(config.dictionary), config.dictionary, words, english_words)
    corpus = _begin(work, "corpus")
    once(
        corpus,
        _Corpus(config.text, block, config.shares, seed, column, config.drop.duplicates),
        lambda: _make_corpus(config, job.text, tokenizer_directory, corpus, block),
        inputs=text | {"tokenizer": file_hash(tokenizer_directory / "tokenizer.json")},
    )
    if kept.replay:
        replayed = _begin(work, "english")
        once(
            replayed,
            _Corpus(kept.english, block, config.shares, seed, column, config.drop.duplicates),
            lambda: _make_corpus(config, job.english, tokenizer_directory, replayed, block),
            inputs=english | {"tokenizer": file_hash(tokenizer_directory / "tokenizer.json")},
        )


def make_model(job: Job) -> None:
    """The stages after those of the text, each unless it is done."""
    config, work, begin = job.config, job.work, partial(_begin, job.work)
    corpus, replayed = work / "corpus", work / "english" if config.kept.replay else None
    relearning = RelearnConfig(
        corpus=corpus,
        tokenizer=work / "tokenizer",
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
                    stage=replace(config.stage, share=config.large_share),
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
                replay=config.kept.replay,
                stage=replace(config.stage, share=config.finetune_share, lr=config.finetune_lr),
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


def _begin(work: Path, name: str) -> Path:
    """Say that a stage begins; returns its directory."""
    if is_first_process():
        print(f"[{STAGES.index(name) + 1}/{len(STAGES)}] {name}", flush=True)
    return work / name


def _hash_of(text: KeptText) -> str | None:
    """A text's hash, the same to every process; None where it is gone."""
    try:
        return text.hash(progress=is_first_process())
    except UserError:  # the stage that reads it complains, if it is not done
        return None


def _read(text: KeptText) -> str:
    """Have the first process read a text; returns its hash."""
    if is_first_process():
        return text.keep()
    wait_for(text.directory / RECORD)
    return text.hash()


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


def check_models(config: RunConfig) -> int:
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


def _make_tokenizer(job: Job, directory: Path) -> dict[str, Any]:
    config, documents = job.config, (document for document, _ in job.text.documents())
    texts = texts_but_test(documents, config.shares, config.runtime.seed)
    if config.kept.extend:
        keep = (document for document, _ in job.english.documents()) if job.english.paths else ()
        tokenizer = extended(config.small, texts, config.kept.extend, keep, config.vocab_size, config.options)
    else:
        tokenizer = train_tokenizer(texts, config.vocab_size, options=config.options, progress=True)
    save_tokenizer(tokenizer, directory)
    return {"tokens": len(tokenizer), "tokenizer": describe(tokenizer)}


def _make_corpus(config: RunConfig, text: KeptText, tokenizer: Path, directory: Path, block: int) -> dict[str, Any]:
    build_corpus(
        text,
        load_tokenizer(tokenizer),
        directory,
        block=block,
        shares=config.shares,
        workers=config.workers,
        seed=config.runtime.seed,
        duplicates=config.drop.duplicates,
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
            language=one_language(config.language),
            small=_public(config.small),
            large=_public(config.large),
            corpus=read_done(work / "corpus"),
            vocabulary=f"{len(tokenizer):,} tokens, {describe(tokenizer)}",
            method=f"Rows began by `{config.rows.initialisation}`; {config.stage.optimizer}, {config.stage.schedule}.",
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
