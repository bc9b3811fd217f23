"""BatchNorm in a base that stays frozen: its running statistics stay as they were pretrained."""

from __future__ import annotations

import functools

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def hold_statistics(model: nn.Module) -> list[str]:
    """Keep the BatchNorm layers of a frozen base in eval mode, also in training; return their names.

    An adapter's checkpoint has no running statistics of the base, so statistics that move would be lost on a reload
    (PEFT's vision examples keep them frozen, too). Layers in `modules_to_save` are trained and saved: they are left.
    """
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and ".modules_to_save." not in name and module.track_running_stats
    ]
    for name in names:
        module = model.get_submodule(name)
        module.train = functools.partial(_stay_in_eval, module)  # a partial follows its module through deepcopy
        module.eval()
    return names


def _stay_in_eval(module: nn.Module, mode: bool = True) -> nn.Module:
    return nn.Module.train(module, False)
