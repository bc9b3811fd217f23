"""The reference log-probabilities of DPO: computed once, with the untrained base, before it gets an adapter.

So there is no second model in memory, every arm has the same reference (also one that changes its base, as PiSSA does),
and the runs of a comparison share the result.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import send_to_device

from peft_recipes.data.packing import COMPLETIONS, KEPT, REFERENCES
from peft_recipes.distributed import processes
from peft_recipes.hardware.device import Hardware, synchronise
from peft_recipes.measuring.memory import PeakMemory
from peft_recipes.runs.files import write_json
from peft_recipes.tasks.causal_losses import logits_bytes, tensors
from peft_recipes.tasks.causal_trainer import LOGITS_BYTES
from peft_recipes.tasks.preference_trainer import answer_log_probs, token_log_probs

if TYPE_CHECKING:
    import datasets
    import torch.nn as nn


class Reference:
    """Compute the base's log-probabilities of the answers of every split, in batches of `batch_size` pairs.

    ld_alpha: trl's option of that name. figures: seconds and peak memory of the train split's pass, also where another
    run computed it.
    """

    def __init__(self, collator: Any, hardware: Hardware, batch_size: int, ld_alpha: float | None):
        self.collator, self.hardware, self.batch_size, self.ld_alpha = collator, hardware, batch_size, ld_alpha
        self.figures: dict[str, Any] | None = None

    def add(
        self, model: nn.Module, splits: dict[str, datasets.Dataset], folder: Path | None, key: dict[str, Any]
    ) -> dict[str, datasets.Dataset]:
        """Return the splits with the columns ref_chosen_logps and ref_rejected_logps.

        folder: where the first run of a comparison keeps them for the others. key: what they depend on besides the
        examples; stored ones of another key are computed again. Rank 0, which alone is sure to hold the base's weights,
        computes them for all ranks.
        """

        def read_or_compute() -> dict[str, Any]:
            file = folder and folder / f"reference-{key.get('quantise') or 'fp32'}.json"
            if file is not None and (stored := _read(file, key)) is not None:
                return stored
            made = {"what": key, "splits": {name: self._of_split(model, rows) for name, rows in splits.items()}}
            if file is not None:
                write_json(file, made)
            return made

        stored = processes.from_rank_zero(read_or_compute)
        self.figures = {name: stored["splits"]["train"][name] for name in ("seconds", "peak_memory_bytes")}
        with_columns = dict(splits)
        for name in splits:
            for column, values in zip(REFERENCES, zip(*stored["splits"][name]["log_probs"], strict=True), strict=True):
                with_columns[name] = with_columns[name].add_column(column, list(values))
        return with_columns

    def _of_split(self, model: nn.Module, rows: datasets.Dataset) -> dict[str, Any]:
        from tqdm.auto import tqdm

        memory = PeakMemory(self.hardware.device)
        memory.release()
        memory.reset()
        start = time.perf_counter()
        log_probs = np.empty((len(rows), 2))
        order = np.argsort([-length for length in rows["length"]], kind="stable")
        batches = [order[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        was_training = model.training
        model.eval()
        for indices in tqdm(batches, desc="Reference log-probabilities", disable=None):
            log_probs[indices] = self._of_batch(model, [rows[int(i)] for i in indices])
        model.train(was_training)
        synchronise(self.hardware.device)
        seconds = time.perf_counter() - start
        return {"log_probs": log_probs.tolist(), "seconds": seconds, "peak_memory_bytes": memory.read()}

    @torch.no_grad()
    def _of_batch(self, model: nn.Module, pairs: list[dict[str, Any]]) -> np.ndarray:
        """[pairs, 2]: the log-probabilities of the chosen and of the rejected answers."""
        batch = self.collator(pairs)
        if len(pairs) > 1 and KEPT in batch and logits_bytes(model.config, batch) > LOGITS_BYTES:
            half = len(pairs) // 2
            return np.concatenate([self._of_batch(model, part) for part in (pairs[:half], pairs[half:])])
        batch = send_to_device(tensors(batch), next(model.parameters()).device)
        with self.hardware.autocast():
            log_probs = token_log_probs(model, batch)
        sums = answer_log_probs(log_probs.float(), batch[COMPLETIONS], self.ld_alpha)
        return torch.stack(sums.chunk(2), dim=1).cpu().numpy()


def _read(file: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    stored = json.loads(file.read_text(encoding="utf-8"))
    return stored if stored["what"] == key else None
