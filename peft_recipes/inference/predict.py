"""Classification with a saved adapter: texts or images in, label and probability out, in batches that memory takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from peft_recipes.adapters.open import Served, open_adapter
from peft_recipes.data import images
from peft_recipes.errors import RecipeError
from peft_recipes.inference import inputs

if TYPE_CHECKING:
    import torch
    import torch.nn as nn
    from PIL.Image import Image

BATCH_SIZE = 32


class Predictor:
    """A saved adapter on its base, which classifies.

    batch_size: examples a pass begins with; where memory runs out it is halved, and stays so. Raises RecipeError: no
    adapter, one that does not classify.
    """

    def __init__(
        self,
        adapter: str | Path | Served,
        base: str | None = None,
        *,
        batch_size: int = BATCH_SIZE,
        trust_remote_code: bool = False,
        model: nn.Module | None = None,
    ):
        if batch_size < 1:
            raise RecipeError(f"--batch-size {batch_size}: expected 1 or more.")
        served = adapter
        if not isinstance(served, Served):
            served = open_adapter(adapter, base, trust_remote_code=trust_remote_code)
        if served.generates:
            raise RecipeError(f"{served.folder} is for {served.recipe.task}, it writes text: use `generate`.")
        self.served, self.batch_size = served, batch_size
        self.takes_images = served.recipe.task == "image-classification"
        self._model = model

    @property
    def model(self) -> nn.Module:
        """The adapter on its base, loaded on first use."""
        if self._model is None:
            self._model = self.served.on(self.served.load_base())
        return self._model

    @property
    def labels(self) -> list[str]:
        """The class names, in the order of their numbers."""
        names = self.model.config.id2label
        return self.served.labels or [str(names[i]) for i in range(len(names))]

    def texts(self, texts: Sequence[str]) -> list[dict[str, Any]]:
        """One result a text: `label`, `probability`, and `probabilities` of every class."""
        if self.takes_images:
            raise RecipeError(f"{self.served.folder} classifies images, not texts: use --image.")
        tokenizer, limit = self.served.processor, self._longest()
        tokens = tokenizer(list(texts), truncation=True, max_length=limit)["input_ids"] if texts else []
        # An empty text has no token of its own: it is asked as padding alone, as the tokenizer would pad it.
        tokens = [ids or [tokenizer.pad_token_id] for ids in tokens]

        def batch(places: Sequence[int]) -> dict[str, torch.Tensor]:
            return tokenizer.pad({"input_ids": [tokens[i] for i in places]}, return_tensors="pt")

        # The longest first: memory runs out early or not at all, and batches of like length waste no padding.
        return self._asked(batch, np.argsort([-len(ids) for ids in tokens], kind="stable").tolist())

    def images(self, pictures: Sequence[Image | Path]) -> list[dict[str, Any]]:
        """One result an image (or an image's file), as for texts. No shift is applied: it is seen as it is."""
        if not self.takes_images:
            raise RecipeError(f"{self.served.folder} classifies texts, not images: use --text or --file.")
        import torch

        config, processor = self.model.config, self.served.processor

        def batch(places: Sequence[int]) -> dict[str, torch.Tensor]:
            found = [pictures[i] for i in places]
            found = [inputs.read_image(picture) if isinstance(picture, Path) else picture for picture in found]
            pixels = np.stack([images.pixels(picture, config, processor) for picture in found])
            return {"pixel_values": torch.from_numpy(pixels)}

        return self._asked(batch, list(range(len(pictures))))

    def _longest(self) -> int:
        """Tokens of a text that count: as many as in training, elsewhere as many as the model has places for."""
        if self.served.is_run:
            return self.served.recipe.max_length
        config = self.model.config
        places = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
        limits = [limit for limit in (places, self.served.processor.model_max_length) if limit]
        return min([*limits, 4_096])

    def _asked(self, batch: Any, order: list[int]) -> list[dict[str, Any]]:
        from accelerate.utils import find_executable_batch_size
        from tqdm.auto import tqdm

        found: dict[int, np.ndarray] = {}
        bar = tqdm(total=len(order), unit=" examples", disable=None if len(order) > self.batch_size else True)

        def halved() -> int:
            self.batch_size //= 2
            return self.batch_size

        @find_executable_batch_size(starting_batch_size=self.batch_size, reduce_batch_size_fn=halved)
        def go(batch_size: int) -> None:
            while len(found) < len(order):  # what was done before memory ran out stays done
                places = order[len(found) : len(found) + batch_size]
                found.update(zip(places, self._probabilities(batch(places)), strict=True))
                bar.update(len(places))

        with bar:
            go()
        labels = self.labels
        return [_result(found[i], labels) for i in range(len(order))]

    def _probabilities(self, batch: dict[str, torch.Tensor]) -> np.ndarray:
        import torch

        device = next(self.model.parameters()).device
        with torch.no_grad():
            logits = self.model(**{key: value.to(device) for key, value in batch.items()}).logits
        return logits.float().softmax(-1).cpu().numpy()


def _result(probabilities: np.ndarray, labels: list[str]) -> dict[str, Any]:
    best = int(probabilities.argmax())
    each = {label: float(p) for label, p in zip(labels, probabilities, strict=True)}
    return {"label": labels[best], "probability": float(probabilities[best]), "probabilities": each}


def predict_file(
    predictor: Predictor, path: str | Path, output: str | Path | None = None, column: str | None = None
) -> tuple[list[str], list[dict[str, Any]]]:
    """The texts of a file and their results; with `output` also a file of its rows with label and probability.

    Where the rows have such a column already, what was predicted stands in `predicted_label`, `predicted_probability`.
    """
    if output is not None:
        inputs.check_writable(Path(output))
    if predictor.takes_images:
        raise RecipeError(f"{predictor.served.folder} classifies images: use --image FILE or --image FOLDER.")
    rows, column = inputs.read_texts(path, column, [predictor.served.recipe.dataset.text])
    texts = list(rows[column])
    found = predictor.texts(texts)
    if output is not None:
        for key in ("label", "probability"):
            name = key if key not in rows.column_names else f"predicted_{key}"
            rows = rows.remove_columns([name]) if name in rows.column_names else rows
            rows = rows.add_column(name, [result[key] for result in found])
        inputs.write_rows(rows, Path(output))
    return texts, found


def write_predictions(names: Sequence[str], found: list[dict[str, Any]], key: str, output: Path) -> None:
    """Results of texts or images that came from no file of rows, as rows of `key`, label and probability."""
    import datasets

    columns = {key: list(names), **{k: [result[k] for result in found] for k in ("label", "probability")}}
    inputs.write_rows(datasets.Dataset.from_dict(columns), output)
