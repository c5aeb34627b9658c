"""An English GPT-2 made into a GPT-2 of another language (de Vries & Nissim 2021, "As Good as New")."""

from __future__ import annotations

from typing import TYPE_CHECKING

try:
    from common.exports import lazy_exports
except ModuleNotFoundError:  # a folder of the caller's has that name
    import common

    raise ImportError(
        f"recycle_gpt2 needs the toolkit's 'common', but Python finds {common.__file__} first: rename yours, or "
        "run Python from another folder."
    ) from None

if TYPE_CHECKING:
    from recycle_gpt2.alignment import align
    from recycle_gpt2.blocks import TokenBlocks
    from recycle_gpt2.corpus import build_corpus
    from recycle_gpt2.documents import read_documents
    from recycle_gpt2.evaluate import score
    from recycle_gpt2.lexical import initialise, replace_lexical, train_only
    from recycle_gpt2.tokenizer import train_tokenizer

__version__: str
__all__ = [
    "TokenBlocks",
    "__version__",
    "align",
    "build_corpus",
    "initialise",
    "read_documents",
    "replace_lexical",
    "score",
    "train_only",
    "train_tokenizer",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "TokenBlocks": "recycle_gpt2.blocks",
        "align": "recycle_gpt2.alignment",
        "build_corpus": "recycle_gpt2.corpus",
        "initialise": "recycle_gpt2.lexical",
        "read_documents": "recycle_gpt2.documents",
        "replace_lexical": "recycle_gpt2.lexical",
        "score": "recycle_gpt2.evaluate",
        "train_only": "recycle_gpt2.lexical",
        "train_tokenizer": "recycle_gpt2.tokenizer",
    },
)
