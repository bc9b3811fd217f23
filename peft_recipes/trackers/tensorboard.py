"""TensorBoard: event files in the run's own folder, so that TensorBoard names it by its path there."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_recipes.trackers.tracker import Tracker

if TYPE_CHECKING:
    from transformers import TrainerCallback

EVENTS = "events.out.tfevents."  # how the names of its files begin


class TensorBoard(Tracker):
    """Scalars, a row of the table HPARAMS, and the configuration as text. It has no artifacts."""

    name = "tensorboard"

    def open(self, config: dict[str, Any], place: dict[str, Any] | None, step: int | None) -> dict[str, Any]:
        from torch.utils.tensorboard import SummaryWriter

        identity, root = self.identity, os.getenv("TENSORBOARD_LOGGING_DIR")
        path = f"{identity.group}/{identity.arm}/seed-{identity.seed}"
        folder = Path(root).expanduser() / path if root else self.folder
        if place is not None and place.get("folder"):
            folder = Path(place["folder"])
        self._config = config
        # Of the steps that training repeats, those of the earlier process are hidden.
        self._writer = SummaryWriter(str(folder), purge_step=None if step is None else step + 1 if step else 0)
        if step == 0:
            self._writer.add_text("config", f"```json\n{json.dumps(config, indent=2, default=str)}\n```")
        return {"id": path, "url": None, "folder": str(folder) if root else None}

    def callback(self) -> TrainerCallback:
        from transformers.integrations import TensorBoardCallback

        return TensorBoardCallback(tb_writer=self._writer)

    def add(self, metrics: dict[str, float], texts: dict[str, str], files: Sequence[Path], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        if any(name.startswith("test/") for name in metrics):
            self._add_row(metrics)
        for name, text in texts.items():
            self._writer.add_text(name, text, step)
        self._writer.flush()

    def _add_row(self, metrics: dict[str, float]) -> None:
        """Make the run a row of the tab HPARAMS: arm, seed and learning rate beside its figures."""
        from torch.utils.tensorboard.summary import hparams

        options = {key: self._config.get(key) for key in ("arm", "seed", "learning_rate")}
        chosen = {key: value for key, value in options.items() if value is not None}
        for summary in hparams(chosen, metrics):  # SummaryWriter.add_hparams would write the scalars a second time
            self._writer._get_file_writer().add_summary(summary)

    def close(self, status: str) -> None:
        self._writer.close()
