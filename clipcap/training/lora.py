"""LoRA on the decoder: low-rank updates of its matrices, between frozen and fine-tuned (Hu et al. 2022)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.checks import UserError, require_at_least
from common.decoders.families import width

if TYPE_CHECKING:
    from clipcap.model import ClipCapModel

GPT2_TARGETS = ["c_attn", "c_proj"]


def lora_targets(model_type: str) -> list[str] | str:
    """The matrices that are updated: GPT-2's c_attn and c_proj, peft's choice for other families, or else all."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as CHOICES

    chosen = GPT2_TARGETS if model_type == "gpt2" else CHOICES.get(model_type, "all-linear")
    return chosen if isinstance(chosen, str) else list(chosen)


def add_lora(model: ClipCapModel, rank: int) -> None:
    """Freeze the decoder and give its matrices, GPT-2's c_attn and c_proj, a trained update W + 2 B A of this rank.

    The update begins at 0. Dropout on its input is 0.1, as GPT-2's own.

    Raises:
        UserError: `rank` is below 1 or not below GPT-2's width.
    """
    from peft import LoraConfig, inject_adapter_in_model

    require_at_least("lora", rank, 1)
    kind, wide = model.gpt2.config.model_type, width(model.gpt2.config)
    if rank >= wide:
        raise UserError(f"lora is {rank}: GPT-2 is {wide} wide, use a rank below that, or --tune-gpt2.")
    settings = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.1,
        target_modules=lora_targets(kind),
        fan_in_fan_out=kind == "gpt2",  # whose matrices are (in, out)
    )
    inject_adapter_in_model(settings, model.gpt2)
    for name, parameter in model.gpt2.named_parameters():
        parameter.requires_grad_("lora_" in name)
    model.config.tune_gpt2 = True  # GPT-2 is trained, in part, and saved with its updates added


def merge_lora(model: ClipCapModel) -> None:
    """Add the updates to GPT-2's matrices, so that it is a plain GPT-2 again."""
    from peft.tuners.lora import LoraLayer

    for module in list(model.gpt2.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LoraLayer):
                child.merge()
                setattr(module, name, child.get_base_layer())
