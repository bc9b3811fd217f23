"""BatchNorm: running statistics that stay as pretrained in a frozen base, and that average where they are trained."""

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


def correct_momentum(model: nn.Module) -> None:
    """Set a BatchNorm momentum that is in TensorFlow's convention (0.99 for a slow average) to torch's default of 0.1.

    transformers' EfficientNet and MobileNet hand TensorFlow's value to torch, whose running statistics then are those
    of the last batch alone: a full fine-tune would be evaluated with them. What it means in torch, 0.01, is an average
    over more steps than a fine-tune has. No torch model has a momentum over 0.5.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.momentum is not None and module.momentum > 0.5:
            module.momentum = 0.1


def _stay_in_eval(module: nn.Module, mode: bool = True) -> nn.Module:
    return nn.Module.train(module, False)
