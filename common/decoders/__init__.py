"""Causal decoders with their tokenizers: any that transformers knows, by name, with GPT-2 as the reference."""

from common.decoders.configs import decoder_config, gpt2_config, require_decoder
from common.decoders.families import base_model, blocks, positions, width
from common.decoders.heads import OutputHead, output_head
from common.decoders.load import PACKAGED, freeze, load_decoder
from common.decoders.tables import is_tied, replace_token_table, token_table, token_tables

__all__ = [
    "PACKAGED",
    "OutputHead",
    "base_model",
    "blocks",
    "decoder_config",
    "freeze",
    "gpt2_config",
    "is_tied",
    "load_decoder",
    "output_head",
    "positions",
    "replace_token_table",
    "require_decoder",
    "token_table",
    "token_tables",
    "width",
]
