"""The lexical embeddings: a new language's token table, how its rows begin, and what trains beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from common.checks import UserError, require_at_least, require_one_of
from common.decoders.families import blocks as blocks_of
from common.decoders.families import is_norm, position_embeddings
from common.gpt2 import replace_token_table, token_tables
from common.runtime import fork_generators
from recycle_gpt2.lexicon import read_dictionary, require_direction, word_tokens
from recycle_gpt2.transplant import subword_means, transplant

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Initialisation = Literal["random", "mean", "frequency", "copy", "subwords", "focus", "transplant"]
INITIALISATIONS: tuple[str, ...] = get_args(Initialisation)
MIXED = ("focus", "transplant")
"""Initialisations that need vectors of the new tokens."""
PIECE = 1 << 24
"""Values that are held at once where a whole matrix, or text, would not fit."""


@dataclass(frozen=True)
class RowsConfig:
    """The new rows, and what is relearned with them."""

    initialisation: Initialisation = "focus"
    """First values of the new rows: random (matched mean and variance), mean, frequency (rank), copy (tokens spelled
    as English ones). Beside these copied rows: subwords (means of a token's English pieces), focus (means of copied
    rows that are alike in the new language's text), transplant (sparse combinations of them, by matching pursuit)."""
    vectors: Path | None = None
    """For focus and transplant: vectors of tokens or words in fastText's text format (.vec), instead of those made from
    the text. Tokens without one begin as random rows."""
    positions: bool = False
    """Relearn the position embeddings too."""
    norms: bool = False
    """Relearn the layer norms too."""


def initialise(
    name: str,
    source_table: Float[Tensor, "v d"],
    source_tokenizer: PreTrainedTokenizerBase,
    target_tokenizer: PreTrainedTokenizerBase,
    *,
    generator: torch.Generator,
    source_counts: Int[Tensor, " v"] | None = None,
    target_counts: Int[Tensor, " n"] | None = None,
    dictionary: Path | None = None,
    auxiliary: Float[Tensor, "n e"] | None = None,
) -> Float[Tensor, "n d"]:
    """Rows for the target language's tokens, made of the source language's.

    Args:
        name: "random": normal, with the source rows' mean and variance in each dimension.
            "mean": all rows are the source rows' mean.
            "frequency": the row of the source token with the same frequency rank; random where there are more tokens.
            "copy": the row of the source token that is spelled the same; random for the others.
            "focus": as "copy", and the others are means of the copied rows, weighted by how similar the tokens are in
            the auxiliary embeddings (FOCUS, Dobler & de Melo 2023), or their translations' rows by the dictionary.
            "subwords": as "copy", and the others are means of the rows of their text's source tokens.
            "transplant": as "focus", with sparse combinations instead of means (`recycle_gpt2.transplant`).
        source_table: the source model's token table.
        source_tokenizer: its tokenizer.
        target_tokenizer: the new language's.
        generator: of the random rows.
        source_counts: how often each source token occurs, for "frequency"; None ranks by id, as BPE's ids roughly do.
        target_counts: the same for the target's tokens.
        dictionary: for "focus" and "transplant": a file of target word, tab, source word in each line.
        auxiliary: for "focus" and "transplant": an embedding of each target token, 0 where none is known; see
            `cooccurrence_embeddings` and `recycle_gpt2.vectors`.

    Raises:
        UserError: an unknown name, counts or embeddings of another number of rows, or "focus" or "transplant" without
            both auxiliary and dictionary.
    """
    require_one_of("initialisation", name, INITIALISATIONS)
    num_source, num_target = len(source_tokenizer), len(target_tokenizer)
    _require_rows("source_table", source_table, num_source)
    for what, given, size in (
        ("source_counts", source_counts, num_source),
        ("target_counts", target_counts, num_target),
        ("auxiliary", auxiliary, num_target),
    ):
        if given is not None and len(given) != size:
            raise UserError(f"{what} has {len(given)} rows but the tokenizer {size} tokens: make it with that one.")
    source = source_table[:num_source].float()
    if name == "mean":
        return source.mean(0).expand(num_target, -1).clone().to(source_table.dtype)
    noise = torch.randn(num_target, source.shape[1], generator=generator, device=generator.device)
    rows = source.mean(0) + source.std(0) * noise.to(source)  # (n, d)
    if name == "frequency":
        ranked_source, ranked_target = (
            torch.arange(size) if counts is None else counts.argsort(descending=True, stable=True).cpu()
            for counts, size in ((source_counts, num_source), (target_counts, num_target))
        )
        both = min(num_source, num_target)
        rows[ranked_target[:both]] = source[ranked_source[:both]]
    elif name in ("copy", "subwords", *MIXED):
        target_ids, source_ids = same_tokens(source_tokenizer, target_tokenizer)
        if name == "subwords":
            for index, row in subword_means(source, source_tokenizer, target_tokenizer).items():
                rows[index] = row
        rows[target_ids] = source[source_ids]
        if name in MIXED:
            known = torch.zeros(num_target, dtype=torch.bool)
            known[target_ids] = True
            _translate_and_mix(name, rows, known, source, source_tokenizer, target_tokenizer, dictionary, auxiliary)
    return rows.to(source_table.dtype)


def cooccurrence_embeddings(
    token_ids: Int[np.ndarray, " n"],
    vocab_size: int,
    *,
    dim: int = 128,
    window: int = 5,
    seed: int = 0,
    end: int | None = None,
) -> Float[Tensor, "v e"]:
    """Embeddings of tokens from the text that they occur in: PPMI of co-occurrence, factored by truncated SVD.

    PPMI(i, j) = max(0, log P(i, j) / (P(i) P(j)^0.75)) over pairs at most `window` apart (Levy, Goldberg & Dagan 2015,
    sec. 3); the rows of U √S are the embeddings. Tokens that do not occur have zero rows.

    Args:
        token_ids: the text.
        vocab_size: of its tokenizer.
        dim: e.
        window: tokens on each side.
        seed: of the randomised SVD.
        end: end token; pairs do not reach over it.
    """
    require_at_least("window", window, 1)
    require_at_least("dim", dim, 1)
    ids = np.asarray(token_ids, dtype=np.int64).reshape(-1)
    if len(ids) == 0:
        raise UserError("the text has 0 tokens: co-occurrence needs some.")
    keys: np.ndarray = np.zeros(0, dtype=np.int64)
    counts: np.ndarray = keys
    for begin in range(0, len(ids), PIECE):
        part = ids[max(0, begin - window) : begin + PIECE]
        text = np.cumsum(part == end) if end is not None else np.zeros(len(part), dtype=np.int64)
        pairs = []
        for offset in range(1, window + 1):
            right = np.arange(max(offset, min(begin, window)), len(part))  # each pair once, with its right token
            left = right - offset
            together = text[left] == text[right]
            if end is not None:
                together &= part[left] != end  # the end token is counted with the text after it
            pairs.append(part[left][together] * vocab_size + part[right][together])
        fresh, number = np.unique(np.concatenate(pairs), return_counts=True)
        keys, inverse = np.unique(np.concatenate([keys, fresh]), return_inverse=True)
        counts = np.bincount(inverse.reshape(-1), np.concatenate([counts, number]), len(keys)).astype(np.int64)
    rows, columns = np.divmod(keys, vocab_size)
    matrix = torch.sparse_coo_tensor(
        torch.from_numpy(np.stack([np.r_[rows, columns], np.r_[columns, rows]])),
        torch.from_numpy(np.r_[counts, counts].astype(np.float64)),
        (vocab_size, vocab_size),
        check_invariants=True,
    ).coalesce()
    (row, column), joint = matrix.indices(), matrix.values()
    total = torch.zeros(vocab_size, dtype=torch.float64).index_add(0, row, joint)
    if not len(joint):
        return torch.zeros(vocab_size, dim)
    smoothed = total**0.75
    information = torch.log(joint / total[row] * smoothed.sum() / smoothed[column])
    positive = information > 0
    ppmi = torch.sparse_coo_tensor(
        matrix.indices()[:, positive],
        information[positive].float(),
        (vocab_size, vocab_size),
        check_invariants=True,
    ).coalesce()
    rank = min(dim, vocab_size)
    with fork_generators(seed):  # torch's randomised SVD draws from the global generator
        u, s, _ = torch.svd_lowrank(ppmi, q=min(rank + 8, vocab_size), niter=4)
    embeddings = u[:, :rank] * s[:rank].sqrt()
    embeddings[total == 0] = 0
    return F.pad(embeddings, (0, dim - rank))


def replace_lexical(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    table: Float[Tensor, "n d"],
    output: Float[Tensor, "n d"] | None = None,
) -> None:
    """Put the new language's token table into `model`, and the ids of its end token in its config.

    Args:
        model: changed in place; what is tied stays tied.
        tokenizer: of the new language.
        table: a row for each of its tokens.
        output: the same for the output, of a model whose output has rows of its own.

    Raises:
        UserError: `table` has not a row for each token of `tokenizer`, is of another width, or holds NaN or infinity.
    """
    if len(table) != len(tokenizer):
        raise UserError(f"token table has {len(table)} rows but the tokenizer {len(tokenizer)} tokens: match them.")
    replace_token_table(model, table, output)
    for config in (model.config, model.generation_config):
        if config is not None:
            config.bos_token_id = tokenizer.bos_token_id
            config.eos_token_id = tokenizer.eos_token_id
            config.pad_token_id = tokenizer.pad_token_id


def tables_to_align(
    small: PreTrainedModel, large: PreTrainedModel, recycled: PreTrainedModel, shared: int
) -> list[tuple[Float[Tensor, "v s"], Float[Tensor, "v l"], Float[Tensor, "n s"]]]:
    """The small and large source rows and the recycled ones, for each table of the large model: input, then output.

    Args:
        small, large: source models of one vocabulary.
        recycled: the small model in the new language.
        shared: tokens of that vocabulary; rows beyond them are no token's.
    """
    ours, theirs, new = token_tables(small), token_tables(large), token_tables(recycled)
    last = min(len(ours), len(new)) - 1  # a small model's only table is its output's too
    return [(ours[min(i, last)][:shared], rows[:shared], new[min(i, last)]) for i, rows in enumerate(theirs)]


def train_only(
    model: PreTrainedModel,
    *,
    positions: bool = False,
    norms: bool = False,
    layers: Sequence[int] | Literal["all"] = (),
) -> list[str]:
    """Let the lexical embeddings train, the output's too, and what else is asked; freeze the rest.

    Args:
        model: changed in place.
        positions: also the position embeddings.
        norms: also every layer norm.
        layers: also these blocks, counted from the input; "all" is every parameter of the model.

    Returns:
        Names of the parameters that train.

    Raises:
        UserError: the model has no such layer, or no position embeddings to train.
    """
    blocks = blocks_of(model)
    if layers != "all":
        for layer in layers:
            if not 0 <= layer < len(blocks):
                raise UserError(f"layer {layer} is not in the model: its layers are 0 to {len(blocks) - 1}.")
    wanted = {id(model.get_input_embeddings().weight)}
    wanted |= {id(parameter) for parameter in model.get_output_embeddings().parameters()}
    if positions:
        wanted |= {id(embedding.weight) for embedding in position_embeddings(model)}
        if not position_embeddings(model):
            raise UserError(f"positions are to train but {model.config.model_type!r} models learn none: leave it out.")
    if norms:
        wanted |= {id(p) for m in model.modules() if is_norm(m) for p in m.parameters()}
    for part in [model] if layers == "all" else [blocks[layer] for layer in layers]:
        wanted |= {id(parameter) for parameter in part.parameters()}
    names = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(id(parameter) in wanted)
        if id(parameter) in wanted:
            names.append(name)
        else:
            parameter.grad = None
    return names


def layers_from_top(n_layer: int, count: int) -> list[int]:
    """The `count` blocks nearest to the output, the topmost first: n_layer - 1, n_layer - 2, ..."""
    if not 0 <= count <= n_layer:
        raise UserError(f"{count} layers are to be unfrozen but the model has {n_layer}: use 0 to {n_layer}.")
    return list(range(n_layer - 1, n_layer - 1 - count, -1))


def shuffle_weights(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Permute the values within each parameter but the token table, in place: the control of same scale, no English."""
    for parameter in _but_table(model).values():
        order = torch.randperm(parameter.numel(), generator=generator, device=generator.device).to(parameter.device)
        with torch.no_grad():
            parameter.copy_(parameter.flatten()[order].view_as(parameter))


def reinitialise_layers(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Draw every parameter but the token table anew as GPT-2's own initialisation does, in place."""
    norms = {f"{name}.weight" for name, module in model.named_modules() if is_norm(module)}
    for name, parameter in _but_table(model).items():
        std = getattr(model.config, "initializer_range", 0.02)
        if name.endswith("c_proj.weight"):  # they add to the residual stream (Radford et al. 2019, sec. 2.3)
            std /= math.sqrt(2 * model.config.num_hidden_layers)
        with torch.no_grad():
            if name in norms:
                parameter.fill_(1)
            elif name.endswith(".bias"):
                parameter.zero_()
            else:
                noise = torch.randn(parameter.shape, generator=generator, device=generator.device)
                parameter.copy_(std * noise)


def same_tokens(
    source_tokenizer: PreTrainedTokenizerBase, target_tokenizer: PreTrainedTokenizerBase
) -> tuple[Int[Tensor, " m"], Int[Tensor, " m"]]:
    """Target ids and source ids of the tokens that both tokenizers spell the same, and of their end tokens."""
    source = source_tokenizer.get_vocab()
    pairs = {index: source[token] for token, index in target_tokenizer.get_vocab().items() if token in source}
    if target_tokenizer.eos_token_id is not None and source_tokenizer.eos_token_id is not None:
        pairs[target_tokenizer.eos_token_id] = source_tokenizer.eos_token_id
    ordered = torch.tensor(sorted(pairs.items()), dtype=torch.long).reshape(-1, 2)
    return ordered[:, 0], ordered[:, 1]


def sparsemax(scores: Float[Tensor, "*b n"]) -> Float[Tensor, "*b n"]:
    """The nearest probability distribution to each row of scores; most entries are 0 (Martins & Astudillo 2016)."""
    ordered = scores.sort(dim=-1, descending=True).values
    rank = torch.arange(1, scores.shape[-1] + 1, device=scores.device, dtype=scores.dtype)
    surplus = ordered.cumsum(-1) - 1
    support = (rank * ordered > surplus).sum(-1, keepdim=True)
    return (scores - surplus.gather(-1, support - 1) / support).clamp(min=0)


def _translate_and_mix(
    name: str,
    rows: Tensor,
    known: Tensor,
    source: Tensor,
    source_tokenizer: PreTrainedTokenizerBase,
    target_tokenizer: PreTrainedTokenizerBase,
    dictionary: Path | None,
    auxiliary: Tensor | None,
) -> None:
    """Fill `rows` (n, d), in place: words by the dictionary, then what is not `known` yet by similar tokens."""
    if dictionary is None and auxiliary is None:
        raise UserError(f"initialisation is {name!r} with neither auxiliary embeddings nor a dictionary: give one.")
    if dictionary is not None:
        spelled = word_tokens(target_tokenizer, unspaced=True)
        words = {word.casefold(): index for word, index in reversed(spelled.items())}
        pairs = read_dictionary(dictionary)
        require_direction(pairs, dictionary, spelled, word_tokens(source_tokenizer))
        translations: dict[int, list[Tensor]] = {}
        for target, translation in pairs:
            index = words.get(target.casefold())
            if index is not None:
                ids = source_tokenizer(" " + translation, add_special_tokens=False).input_ids
                translations.setdefault(index, []).append(source[ids].mean(0))
        for index, several in translations.items():
            rows[index] = torch.stack(several).mean(0)
            known[index] = True
    if auxiliary is not None:
        vectors = F.normalize(auxiliary.to(rows), dim=-1)
        seen = vectors.abs().sum(-1).cpu() > 0
        anchors, others = (known & seen).nonzero()[:, 0], (~known & seen).nonzero()[:, 0]
        if not len(anchors):
            raise UserError("no token of the text is spelled as a source token: give a dictionary, or use random.")
        if name == "transplant":
            rows[others] = transplant(vectors[others], vectors[anchors], rows[anchors])
            return
        for chunk in others.split(max(1, PIECE // len(anchors))):
            rows[chunk] = sparsemax(vectors[chunk] @ vectors[anchors].T) @ rows[anchors]


def _require_rows(what: str, table: Tensor, least: int) -> None:
    if table.ndim != 2 or len(table) < least:
        raise UserError(f"{what} has shape {tuple(table.shape)} but its tokenizer {least} tokens: use one model's.")
    if not torch.isfinite(table).all():
        raise UserError(f"{what} holds NaN or infinity: check how it was made.")


def _but_table(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    tables = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in tables}
