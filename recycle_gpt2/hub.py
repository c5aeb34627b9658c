"""The Hugging Face hub: text that is streamed from a dataset by its name, and a model that is uploaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from common.checks import UserError, reason_of
from common.files import MARKER
from recycle_gpt2.bad_rows import BadRows
from recycle_gpt2.formats import Document, rows_of_splits

PREFIX = "hf:"
"""Before a dataset's name in place of a path: hf:wikimedia/wikipedia:20231101.nl."""


def is_hub(path: Path) -> bool:
    """Whether what was given as a path names a dataset on the hub."""
    return str(path).startswith(PREFIX)


def read_hub(path: Path, column: str, bad: BadRows, held_out: bool) -> Iterator[Document]:
    """The rows of hf:NAME or hf:NAME:CONFIGURATION as they arrive: nothing but the row at hand is held.

    A split called test is never trained on: it is read if `held_out`, and otherwise all others are.

    Raises:
        UserError: the hub cannot be reached, has no such dataset, or the dataset has no such column.
    """
    import datasets

    name, _, configuration = str(path).removeprefix(PREFIX).partition(":")
    if not name:
        raise UserError(f"text {str(path)!r} names no dataset: write hf:NAME or hf:NAME:CONFIGURATION.")
    try:
        found = datasets.load_dataset(name, configuration or None, streaming=True)
    except Exception as error:  # of datasets, of the hub's client, of the network
        raise UserError(
            f"dataset {name!r} cannot be streamed from the hub ({reason_of(error)}): check its name and configuration, "
            f"or save it to disk where it can be reached and give the directory."
        ) from error
    parts = dict(found) if isinstance(found, dict) else {"": found}
    try:
        yield from rows_of_splits(parts, f"dataset {name!r}", str(path), name.split("/")[-1], column, bad, held_out)
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"dataset {name!r} was cut off ({error}): give the same command again.") from error


def upload(directory: Path, repository: str) -> str:
    """Upload a model's directory to the hub; returns the address.

    Raises:
        UserError: the hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(repository, exist_ok=True)
        return str(HfApi().upload_folder(folder_path=directory, repo_id=repository, ignore_patterns=[MARKER]))
    except Exception as error:  # the client's library decides which: no connection, no token, no such name
        raise UserError(
            f"{str(directory)!r} could not be uploaded to {repository!r} ({reason_of(error)}): log in with "
            f"`hf auth login` and give the same command again; nothing is trained again."
        ) from error
