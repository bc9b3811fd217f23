"""Import modules of trl without the trackers that it imports wherever they are installed (up to 2 s, seen for GRPO)."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

_TRACKERS = ("wandb", "mlflow", "trackio")
_hidden = False


def hide_trackers() -> None:
    """From here on, `import_module` hides the trackers: for processes of ours, where trl itself reports nothing."""
    global _hidden
    _hidden = True


def import_module(name: str) -> ModuleType:
    """Import a module that imports trl; meanwhile no tracker can be imported, if `hide_trackers` was called."""
    missing = [tracker for tracker in _TRACKERS if _hidden and tracker not in sys.modules]
    sys.modules.update(dict.fromkeys(missing))  # type: ignore[arg-type]  # None: not installed, for find_spec too
    try:
        return importlib.import_module(name)
    finally:
        for tracker in missing:
            sys.modules.pop(tracker, None)
            _stay_hidden(tracker)


def _stay_hidden(tracker: str) -> None:
    """What trl has imported without a tracker asks again whether it is installed, and would then use it."""
    for name, module in list(sys.modules.items()):
        if name.startswith("trl.") and (asked := f"is_{tracker}_available") in vars(module):
            setattr(module, asked, lambda: False)
