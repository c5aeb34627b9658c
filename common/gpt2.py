"""GPT-2, or any other causal decoder, by name: what stands in `common.decoders`, under its first names."""

from common.decoders.configs import END, PACKAGED, decoder_config, gpt2_config, require_decoder
from common.decoders.load import freeze
from common.decoders.load import load_decoder as load_gpt2
from common.decoders.tables import is_tied, replace_token_table, token_table, token_tables

__all__ = [
    "END",
    "PACKAGED",
    "decoder_config",
    "freeze",
    "gpt2_config",
    "is_tied",
    "load_gpt2",
    "replace_token_table",
    "require_decoder",
    "token_table",
    "token_tables",
]
