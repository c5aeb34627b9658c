"""The command `recycle-gpt2`."""

from __future__ import annotations

from common.commands import Subcommand, run_cli

SUBCOMMANDS = {
    "run": Subcommand(
        "recycle_gpt2.languages",
        "RunConfig",
        "run",
        "make a GPT-2 of a new language, or of several, resumably",
    ),
    "tokenizer": Subcommand("recycle_gpt2.tokenizer", "TokenizerConfig", "run", "train a tokenizer on text"),
    "corpus": Subcommand("recycle_gpt2.corpus", "CorpusConfig", "run", "pack text into token blocks"),
    "relearn": Subcommand(
        "recycle_gpt2.stages", "RelearnConfig", "run_relearn", "relearn the lexical embeddings of an English model"
    ),
    "align": Subcommand(
        "recycle_gpt2.stages", "AlignConfig", "run_align", "carry relearned embeddings over to a larger model"
    ),
    "finetune": Subcommand("recycle_gpt2.stages", "FinetuneConfig", "run_finetune", "unfreeze a model and train on"),
    "evaluate": Subcommand("recycle_gpt2.evaluate", "EvaluateConfig", "run", "score models on text, by genre"),
    "sample": Subcommand("recycle_gpt2.sampling", "SampleConfig", "run_sample", "let a model write"),
    "lexicon": Subcommand("recycle_gpt2.lexicon", "LexiconConfig", "run", "list each word's nearest English words"),
    "judge": Subcommand("recycle_gpt2.judge", "JudgeConfig", "run_form", "make a form: human or machine?"),
    "judge-report": Subcommand(
        "recycle_gpt2.judge", "JudgeReportConfig", "run_report", "read the answers to such forms"
    ),
}


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the command `recycle-gpt2`."""
    return run_cli("recycle-gpt2", "Make an English GPT-2 into a GPT-2 of another language.", SUBCOMMANDS, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
