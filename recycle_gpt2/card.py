"""The card of a recycled model: what it was made of, how long it took, and its scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recycle_gpt2.evaluate import interval

DROPPED = {
    "documents": "Exact duplicates of documents",
    "near": "Exact and near duplicates of documents (MinHash)",
    "paragraphs": "Exact duplicates of documents and paragraphs",
}
"""What `--duplicates` leaves out; a corpus that does not say is of an earlier version."""


def model_card(
    *,
    name: str,
    language: str,
    small: str,
    large: str,
    corpus: Mapping[str, Any],
    vocabulary: str,
    method: str,
    stages: Mapping[str, Mapping[str, Any]],
    scores: Mapping[str, Mapping[str, Mapping[str, Any]]],
    differences: Mapping[str, str],
    samples: Sequence[str],
    hardware: str,
    versions: Mapping[str, str],
) -> str:
    """README.md of a Hugging Face model directory.

    Args:
        name: of the model.
        language: its code.
        small: the English model whose embeddings were relearned.
        large: the larger English model, or nothing.
        corpus: the corpus's manifest.
        vocabulary: of the tokenizer, in words: its size, kind, split and normalisation.
        method: how the rows began and what trained them, in words.
        stages: the record of each training stage, by name.
        scores: of each model: of each genre, as `recycle_gpt2.evaluate.Summary`.
        differences: of the model's bits per byte from each other model's, for people.
        samples: texts that the model wrote.
        hardware: one line.
        versions: of the libraries.
    """
    base = large or small
    bases = "\n".join(f"- {model}" for model in dict.fromkeys(model for model in (large, small) if model))
    splits = corpus["splits"]
    training = [
        "| stage | trained parameters | tokens | peak rate | computed FLOPs | hours | validation perplexity |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for stage, record in stages.items():
        rate = "" if record.get("rate") is None else f"{record['rate']:.2g}"
        training.append(
            f"| {stage} | {record['trained_parameters']:,} | {record['tokens']:,} | {rate} | {record['flops']:.2e} "
            f"| {record['seconds'] / 3600:.2f} | {2.718281828459045 ** record['val_loss']:.2f} |"
        )
    table = [
        "| model | documents of | tokens | perplexity | bits per character | bits per byte | 95% interval |",
        "|---|---|--:|--:|--:|--:|---|",
    ]
    for model, groups in scores.items():
        for group, found in groups.items():
            ends = interval(found["bits_per_byte_interval"])
            table.append(
                f"| {model} | {group} | {found['tokens']:,} | {found['perplexity']:.2f} "
                f"| {found['bits_per_character']:.4f} | {found['bits_per_byte']:.4f} | {ends} |"
            )
    paired = [f"- minus {model}: {text}" for model, text in differences.items()]
    quoted = "\n\n".join("> " + text.strip().replace("\n", "\n> ") for text in samples if text.strip())
    hours = sum(record["seconds"] for record in stages.values()) / 3600
    libraries = ", ".join(f"{library} {version}" for library, version in versions.items())
    return f"""---
language: {language}
library_name: transformers
pipeline_tag: text-generation
base_model:
{bases}
tags:
- gpt2
- recycle-gpt2
---

# {name}

A GPT-2 for `{language}`, recycled from the English `{base}`: its token embeddings were relearned for a new
vocabulary{" in " + f"`{small}` and aligned to `{large}`" if large else ""}, after de Vries & Nissim 2021, "As Good as
New. How to Successfully Recycle English GPT-2 to Make Models for Other Languages".

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

## Data

{splits["train"]["documents"]:,} documents of {splits["train"]["bytes"]:,} bytes, {splits["train"]["tokens"]:,} tokens;
{splits["valid"]["documents"]:,} documents held out for choices and {splits["test"]["documents"]:,} for the scores
below. {DROPPED[corpus.get("duplicates", "paragraphs")]} were dropped. Vocabulary: {vocabulary}.

## Training

{method}

{chr(10).join(training)}

{hours:.2f} hours on {hardware}. {libraries}.

## Scores

On the held-out documents; every token counts once. Models with other tokenizers compare by bits per byte.

{chr(10).join(table)}

The recycled model, document by document (below 0 it is better; 95% intervals by paired bootstrap):

{chr(10).join(paired) or "Not compared."}

## Samples

{quoted or "None."}

## Limits

The model repeats what its text says, errors and prejudices included, and what its English model had learnt before.
Whether it may be passed on depends on the licences of that text and of the English model.
"""
