"""Classify texts, pairs, images or the words of texts, or score answers, with a saved adapter, in batches that fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from peft_recipes.adapters.open import OpenedAdapter, open_adapter
from peft_recipes.data import images, words
from peft_recipes.data.encoding import check_ends, encode
from peft_recipes.errors import RecipeError
from peft_recipes.hardware.fitting import halve_until_it_fits
from peft_recipes.inference import inputs
from peft_recipes.inference.entities import find_entities
from peft_recipes.inference.outputs import check_writable
from peft_recipes.inference.predictions import result, write_results
from peft_recipes.models.positions import learnt_positions, position_limit

if TYPE_CHECKING:
    from PIL.Image import Image


class Predictor:
    """A classifier or reward model: a saved adapter on its base.

    batch_size: to start with; it is halved each time memory runs out. model: the adapter on its base, if it is loaded
    already. Raises RecipeError: no adapter, or one that does not classify.
    """

    def __init__(
        self,
        adapter: str | Path | OpenedAdapter,
        base: str | None = None,
        *,
        batch_size: int = 32,
        trust_remote_code: bool = False,
        model: nn.Module | None = None,
    ):
        if batch_size < 1:
            raise RecipeError(f"--batch-size {batch_size}: expected 1 or more.")
        if not isinstance(adapter, OpenedAdapter):
            adapter = open_adapter(adapter, base, trust_remote_code=trust_remote_code)
        if adapter.generates:
            raise RecipeError(f"{adapter.folder} is for {adapter.recipe.task}, it writes text: use `generate`.")
        self.adapter, self.batch_size = adapter, batch_size
        self.takes_images = adapter.recipe.task == "image-classification"
        self.tags_words = adapter.recipe.task == "token-classification"
        self.scores = adapter.recipe.task == "reward"
        self._model = model

    @property
    def model(self) -> nn.Module:
        """The adapter on its base, loaded on first use."""
        if self._model is None:
            self._model = self.adapter.attach(self.adapter.load_base())
        return self._model

    def texts(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None, prompt: str | None = None
    ) -> list[dict[str, Any]]:
        """Classify texts, or pairs of texts. Returns for each what predictions.py says: its class, classes or number.

        A token classifier's results are `entities` (see entities.py).

        A reward model returns a `score`, a number without bounds: of the text as it is, or as an answer to `prompt` in
        the format of the training data.

        pairs: the second text of each pair. Raises RecipeError for pairs where the adapter was trained on single texts,
        and the reverse.
        """
        if self.takes_images:
            raise RecipeError(f"{self.adapter.folder} classifies images, not texts: use --image.")
        if prompt is not None and not self.scores:
            raise RecipeError(f"{self.adapter.folder} classifies texts: --prompt is for reward models.")
        self._check_pairs(pairs is not None)
        if self.tags_words:
            words.check_fast(self.adapter.processor, self.adapter.base_name)
            return find_entities(texts, self.adapter.processor, self.labels(), self._max_length(), self.logits)
        tokenizer = self.adapter.processor
        if self.scores:
            columns = self._scored(texts, prompt)
        else:
            columns = encode(tokenizer, texts, pairs, self._max_length(), self.model.config)
            check_ends(columns["input_ids"], self.model.config, "The texts")
        tokens = [ids or [tokenizer.pad_token_id] for ids in columns["input_ids"]]  # an empty text is a padding token
        self._check_tokens(tokens)
        columns |= {"input_ids": tokens, "attention_mask": [[1] * len(ids) for ids in tokens]}

        def batch(indices: Sequence[int]) -> dict[str, torch.Tensor]:
            chosen = {key: [values[i] for i in indices] for key, values in columns.items()}
            return tokenizer.pad(chosen, return_tensors="pt")

        # Sorted by length, so that little is padded; the longest first, so that memory runs out early or not at all.
        return self._results(self.logits(batch, np.argsort([-len(ids) for ids in tokens], kind="stable").tolist()))

    def _check_tokens(self, tokens: list[list[int]]) -> None:
        """Raise RecipeError for a text with a token that has no row in the model's embedding."""
        rows = self.model.get_input_embeddings().weight.shape[0]
        for number, ids in enumerate(tokens, 1):
            if max(ids) >= rows:
                raise RecipeError(f"Text {number} has token {max(ids)}, and the model's embedding has {rows} rows: its "
                                  "tokenizer is another model's, or has tokens that were added after it.")  # fmt: skip

    def _scored(self, texts: Sequence[str], prompt: str | None) -> dict[str, list[Any]]:
        """The tokens of texts that a reward model scores. Raises RecipeError for one that is too long."""
        from peft_recipes.tasks.reward import scored_tokens

        tokens = [scored_tokens(text, prompt, self.adapter.processor) for text in texts]
        longest = self._max_length()
        for number, ids in enumerate(tokens, 1):
            if len(ids) > longest:  # the score is read at the end
                raise RecipeError(f"Text {number} has {len(ids)} tokens, more than {longest}: shorten it.")
        return {"input_ids": tokens}

    def _check_pairs(self, given: bool) -> None:
        columns = self.adapter.recipe.dataset.text_columns
        if self.adapter.saved.is_run and given != (len(columns) > 1):
            if given:
                raise RecipeError(f"{self.adapter.folder} was trained on single texts: leave out the second ones.")
            raise RecipeError(
                f"{self.adapter.folder} was trained on pairs ({', '.join(columns)}): give both texts, --text A "
                "--text-pair B, or a file with both columns."
            )

    def images(self, pictures: Sequence[Image | Path]) -> list[dict[str, Any]]:
        """Classify images or image files. Returns the same as `texts`. The recipe's transforms are not applied."""
        if not self.takes_images:
            raise RecipeError(f"{self.adapter.folder} classifies texts, not images: use --text or --file.")
        config, processor = self.model.config, self.adapter.processor

        def batch(indices: Sequence[int]) -> dict[str, torch.Tensor]:
            chosen = [pictures[i] for i in indices]
            decoded = [inputs.read_image(picture) if isinstance(picture, Path) else picture for picture in chosen]
            pixels = np.stack([images.pixels(picture, config, processor) for picture in decoded])
            return {"pixel_values": torch.from_numpy(pixels)}

        return self._results(self.logits(batch, list(range(len(pictures)))))

    def labels(self) -> list[str]:
        """The class names in the order of the model's outputs."""
        names = self.model.config.id2label
        return self.adapter.labels or [str(names[i]) for i in range(len(names))]

    def _max_length(self) -> int:
        """Return the number of tokens that a text is truncated to: as in training, else the model's own limit."""
        positions = learnt_positions(self.model)
        if self.adapter.saved.is_run:
            return min(self.adapter.recipe.max_length, positions or self.adapter.recipe.max_length)
        limits = (positions or position_limit(self.model.config), self.adapter.processor.model_max_length, 4_096)
        virtual = getattr(self.adapter.saved.config, "num_virtual_tokens", None) or 0
        return max(min(limit for limit in limits if limit) - virtual, 2)

    def _results(self, logits: list[np.ndarray]) -> list[dict[str, Any]]:
        if self.scores:
            return [{"score": float(values[0])} for values in logits]
        labels = self.labels()
        return [result(self.adapter.problem_type, values, labels) for values in logits]

    def logits(self, batch: Callable[[Sequence[int]], dict[str, torch.Tensor]], order: list[int]) -> list[np.ndarray]:
        """Compute examples in this order; return their logits in the original order.

        Each is [outputs], or [length, outputs] where each token has its own.
        """
        from tqdm.auto import tqdm

        logits: dict[int, np.ndarray] = {}
        device = next(self.model.parameters()).device

        def run(batch_size: int) -> None:
            self.batch_size = batch_size
            while len(logits) < len(order):  # a smaller batch continues where memory ran out
                indices = order[len(logits) : len(logits) + batch_size]
                with torch.no_grad():
                    given = {key: value.to(device) for key, value in batch(indices).items()}
                    output = self.model(**given).logits
                if output.dim() == 3:  # without an adapter's virtual tokens
                    output = output[:, -given["input_ids"].shape[1] :]
                logits.update(zip(indices, output.float().cpu().numpy(), strict=True))
                bar.update(len(indices))

        with tqdm(total=len(order), unit=" examples", disable=None if len(order) > self.batch_size else True) as bar:
            halve_until_it_fits(run, self.batch_size)
        return [values for _, values in sorted(logits.items())]


def predict_file(
    predictor: Predictor, path: str | Path, output: str | Path | None = None, columns: Sequence[str] = ()
) -> tuple[list[tuple[str, ...]], list[dict[str, Any] | None]]:
    """Classify the texts of a file; return them (one, or the two of a pair) with their results.

    A row without a text has no result: None. columns: the names of the columns; (): those of the recipe. output: also
    write the file's rows with these.
    """
    if output is not None:
        check_writable(Path(output))
    adapter = predictor.adapter
    if predictor.takes_images:
        raise RecipeError(f"{adapter.folder} classifies images: use --image FILE or --image FOLDER.")
    own = adapter.recipe.dataset.text_columns
    if len(columns) > 2 or (len(columns) == 1 and len(own) == 2):
        raise RecipeError(f"--column: expected {len(own) if len(own) > 1 else '1 or 2'} columns, got {len(columns)}.")
    texts = []
    for column in columns or (own if len(own) > 1 else [None]):  # None: whichever column has texts
        table, name = inputs.read_texts(path, column, own)
        texts.append([value or "" for value in table.values(name)])
    names = list(zip(*texts, strict=True))
    given = [i for i, name in enumerate(names) if any(text.strip() for text in name)]
    results: list[dict[str, Any] | None] = [None] * len(names)
    for i, found in zip(given, predictor.texts(*([column[i] for i in given] for column in texts)), strict=True):
        results[i] = found
    if output is not None:
        write_results(table, results, Path(output), Path(path).expanduser())
    return names, results
