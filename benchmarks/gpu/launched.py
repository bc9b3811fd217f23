"""`peft-recipes train` under `accelerate launch`, which also writes the backend and the world size of the run."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    import torch.distributed as dist
    from transformers import Trainer

    train = Trainer.train

    def train_and_say(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not dist.is_initialized():
            raise RuntimeError("accelerate launch has started no process group.")
        made = {"backend": dist.get_backend(), "world_size": dist.get_world_size()}
        Path(os.environ["PEFT_RECIPES_BACKEND_FILE"]).write_text(json.dumps(made))
        return train(self, *args, **kwargs)

    Trainer.train = train_and_say
    from peft_recipes.cli.app import app

    sys.argv[1:] = ["train", *sys.argv[1:]]
    app()


if __name__ == "__main__":
    main()
