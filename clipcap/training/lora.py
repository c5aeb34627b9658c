"""LoRA on GPT-2: low-rank updates of its matrices, between frozen and fine-tuned (Hu et al. 2022)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.checks import UserError, require_at_least

if TYPE_CHECKING:
    from clipcap.model import ClipCapModel

TARGETS = ["c_attn", "c_proj"]


def add_lora(model: ClipCapModel, rank: int) -> None:
    """Freeze GPT-2 and give every c_attn and c_proj a trained update W + 2 B A, A and B of this rank.

    The update begins at 0. Dropout on its input is 0.1, as GPT-2's own.

    Raises:
        UserError: `rank` is below 1 or not below GPT-2's width.
    """
    from peft import LoraConfig, inject_adapter_in_model

    require_at_least("lora", rank, 1)
    width = model.gpt2.config.n_embd
    if rank >= width:
        raise UserError(f"lora is {rank}: GPT-2 is {width} wide, use a rank below that, or --tune-gpt2.")
    settings = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.1, target_modules=TARGETS, fan_in_fan_out=True)
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
