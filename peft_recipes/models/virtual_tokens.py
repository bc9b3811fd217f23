"""Prompts that are learnt stand before the input as vectors: what a classifier must be told of that."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from peft import PeftModel


def read_last_token(model: PeftModel) -> None:
    """Lets a decoder's classification head read a text's last token where its input comes as vectors.

    GPT-2 and Llama find it by the padding token's id. Given vectors, as behind virtual tokens, they have no ids and
    read the last place of the row, which in a batch is padding for all but its longest text. A text alone, without
    padding, is read right with or without this.
    """
    base = model.get_base_model()
    learns_input = any(
        c.is_prompt_learning and c.peft_type.value != "PREFIX_TUNING" for c in model.peft_config.values()
    )
    if not learns_input or "score" not in dict(base.named_children()):
        return
    masks: list[torch.Tensor | None] = [None]

    def before(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        masks[0] = kwargs.get("attention_mask") if kwargs.get("input_ids") is None else None

    def after(module: Any, args: Any, scores: torch.Tensor) -> torch.Tensor:
        mask = masks[0]
        if mask is None or scores.dim() != 3 or mask.shape != scores.shape[:2]:
            return scores
        import torch

        places = torch.arange(mask.shape[1], device=mask.device)
        last = (places * (mask != 0)).argmax(dim=1)
        scores = scores.clone()
        scores[:, -1] = scores[torch.arange(len(last), device=mask.device), last]
        return scores

    base.register_forward_pre_hook(before, with_kwargs=True)
    base.score.register_forward_hook(after)
