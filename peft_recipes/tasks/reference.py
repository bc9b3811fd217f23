"""What the untrained base says of each answer: computed once, before it gets an adapter or is trained.

So there is no second model in memory, every arm is held against the same figures (an adapter that changes its base, as
PiSSA does, among them), and a comparison's runs share them.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from peft_recipes.data.packing import COMPLETIONS, EXAMPLES, KEPT, REFERENCES
from peft_recipes.hardware.device import Hardware, synchronise
from peft_recipes.measuring.memory import PeakMemory
from peft_recipes.runs.files import write_json
from peft_recipes.tasks.causal_trainer import LOGITS_BYTES, logits_bytes, on_device, tensors
from peft_recipes.tasks.preference_trainer import answer_log_probs, token_log_probs

if TYPE_CHECKING:
    import datasets
    import torch.nn as nn

_FILE = "reference.json"


class Reference:
    """The reference's log-probabilities of every split's answers, by the base.

    collator: makes the base's batches, of `batch` pairs. ld_alpha: as trl's option of that name. figures: the seconds
    and the peak memory that the train split took, wherever it was computed.
    """

    def __init__(self, collator: Any, hardware: Hardware, batch: int, ld_alpha: float | None):
        self.collator, self.hardware, self.batch, self.ld_alpha = collator, hardware, batch, ld_alpha
        self.figures: dict[str, Any] | None = None

    def add(
        self, model: nn.Module, splits: dict[str, datasets.Dataset], kept: Path | None, what: dict[str, Any]
    ) -> dict[str, datasets.Dataset]:
        """The splits with the columns ref_chosen_logps and ref_rejected_logps.

        kept: a folder in which a comparison's runs find what the first of them computed. what: what decides the figures
        beside the rows; where it differs they are computed again.
        """
        found = _read(kept, what)
        if found is None:
            found = {"what": what, "splits": {name: self._of_split(model, rows) for name, rows in splits.items()}}
            if kept is not None:
                write_json(kept / _FILE, found)
        train = found["splits"]["train"]
        self.figures = {key: train[key] for key in ("seconds", "peak_memory_bytes")}
        return {name: _with(rows, found["splits"][name]["log_probs"]) for name, rows in splits.items()}

    def _of_split(self, model: nn.Module, rows: datasets.Dataset) -> dict[str, Any]:
        from tqdm.auto import tqdm

        memory = PeakMemory(self.hardware.device)
        memory.release()
        memory.reset()
        start = time.perf_counter()
        made = np.empty((len(rows), 2))
        order = np.argsort([-length for length in rows["length"]], kind="stable")
        batches = [order[i : i + self.batch] for i in range(0, len(rows), self.batch)]
        was_training = model.training
        model.eval()
        for places in tqdm(batches, desc="Reference log-probabilities", disable=None):
            made[places] = self._of_batch(model, [rows[int(i)] for i in places])
        model.train(was_training)
        synchronise(self.hardware.device)
        return {"log_probs": made.tolist(), "seconds": time.perf_counter() - start, "peak_memory_bytes": memory.read()}

    @torch.no_grad()
    def _of_batch(self, model: nn.Module, pairs: list[dict[str, Any]]) -> np.ndarray:
        """[pairs, 2]: the log-probabilities of the chosen and of the rejected answers."""
        batch = self.collator(pairs)
        if len(pairs) > 1 and KEPT in batch and logits_bytes(model.config, batch) > LOGITS_BYTES:
            half = len(pairs) // 2
            return np.concatenate([self._of_batch(model, part) for part in (pairs[:half], pairs[half:])])
        batch = on_device(next(model.parameters()).device, {**tensors(batch), EXAMPLES: batch[EXAMPLES]})
        with self.hardware.autocast():
            log_probs = token_log_probs(model, batch)
        sums = answer_log_probs(log_probs.float(), batch[COMPLETIONS], self.ld_alpha)
        return torch.stack(sums.chunk(2), dim=1).cpu().numpy()


def _read(kept: Path | None, what: dict[str, Any]) -> dict[str, Any] | None:
    if kept is None or not (kept / _FILE).is_file():
        return None
    found = json.loads((kept / _FILE).read_text(encoding="utf-8"))
    return found if found["what"] == what else None


def _with(rows: datasets.Dataset, log_probs: list[list[float]]) -> datasets.Dataset:
    for key, values in zip(REFERENCES, zip(*log_probs, strict=True), strict=True):
        rows = rows.add_column(key, list(values))
    return rows
