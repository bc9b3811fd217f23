"""Fix for classifiers with prompt tuning: read the last token of each text when the input comes as embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from peft import PeftModel


def read_last_token(model: PeftModel) -> None:
    """Let a decoder's classification head read the last token of each text behind virtual tokens.

    GPT-2 and Llama find it by the padding token's id. Prompt learning passes embeddings instead of ids, and they then
    read the last position of the sequence: in a padded batch that is padding for all but the longest text.
    """
    import torch

    base = model.get_base_model()
    passes_embeddings = any(
        config.is_prompt_learning and config.peft_type.value != "PREFIX_TUNING" for config in model.peft_config.values()
    )
    if not passes_embeddings or "score" not in dict(base.named_children()):
        return
    current_mask: torch.Tensor | None = None

    def keep_mask(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal current_mask
        current_mask = kwargs.get("attention_mask") if kwargs.get("input_ids") is None else None

    def move_last_score(module: Any, args: Any, scores: torch.Tensor) -> torch.Tensor:
        mask = current_mask
        if mask is None or scores.dim() != 3 or mask.shape != scores.shape[:2]:
            return scores
        last = (torch.arange(mask.shape[1], device=mask.device) * (mask != 0)).argmax(dim=1)
        scores = scores.clone()
        scores[:, -1] = scores[torch.arange(len(last), device=mask.device), last]
        return scores

    base.register_forward_pre_hook(keep_mask, with_kwargs=True)
    base.score.register_forward_hook(move_last_score)
