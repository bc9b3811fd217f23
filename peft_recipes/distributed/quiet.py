"""Keeps the libraries' progress bars and warnings off the terminal; errors still come through."""

from __future__ import annotations

import logging
import os
import sys
import warnings

from peft_recipes.recipe.imports import hide_trackers


def quiet_libraries() -> None:
    """Silence the libraries; call it before transformers and datasets are imported, where that is possible."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch.distributed's, on each rank
    warnings.filterwarnings("ignore")
    hide_trackers()
    for name in ("bitsandbytes", "datasets", "accelerate", "trl", "peft", "torch", "httpx", "huggingface_hub"):
        # datasets logs as an error what it then raises; we show the exception in our own words.
        logging.getLogger(name).setLevel(logging.CRITICAL if name == "datasets" else logging.ERROR)
    if "transformers" in sys.modules:  # a recipe's module may have imported it
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
    if "datasets" in sys.modules:
        import datasets

        datasets.disable_progress_bars()


def skip_bitsandbytes() -> None:
    """Make bitsandbytes look uninstalled to this process, which saves a second and a warning when PEFT is imported.

    For processes that need neither a quantised base nor an 8-bit optimizer. Call it before anything imports PEFT.
    """
    sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]
