"""The small convolutional network of the mnist-shift recipe, as a transformers model.

Importing this module registers it with AutoConfig and AutoModelForImageClassification, so that `from_pretrained` loads
a saved folder without remote code.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutput

FIRST_CHANNELS, SECOND_CHANNELS, HIDDEN = 32, 64, 128


class SmallCnnConfig(PreTrainedConfig):
    """Size of the square images and number of classes; the defaults fit MNIST."""

    model_type = "small-cnn"

    def __init__(self, image_size: int = 28, num_channels: int = 1, **kwargs: Any):
        if kwargs.get("id2label") is None:
            kwargs.setdefault("num_labels", 10)
        super().__init__(**kwargs)
        self.image_size = image_size
        self.num_channels = num_channels

    def to_diff_dict(self) -> dict[str, Any]:
        """Always include the labels: transformers leaves out its own default of two, but here the default is ten."""
        return {**super().to_diff_dict(), "id2label": self.id2label, "label2id": self.label2id}


class SmallCnnForImageClassification(PreTrainedModel):
    """Two convolutions with pooling, then two linear layers: 421,642 parameters for ten classes of 28 x 28 grey images.

    conv1 1 -> 32 and conv2 32 -> 64 (3 x 3, padding 1, ReLU, 2 x 2 pooling), fc1 3136 -> 128 (ReLU),
    classifier 128 -> 10.
    """

    config_class = SmallCnnConfig
    main_input_name = "pixel_values"

    def __init__(self, config: SmallCnnConfig):
        super().__init__(config)
        side = config.image_size // 4  # each pooling halves it
        self.conv1 = nn.Conv2d(config.num_channels, FIRST_CHANNELS, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(FIRST_CHANNELS, SECOND_CHANNELS, kernel_size=3, padding=1)
        self.fc1 = nn.Linear(SECOND_CHANNELS * side * side, HIDDEN)
        self.classifier = nn.Linear(HIDDEN, config.num_labels)
        self.post_init()

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, return_dict: bool | None = None
    ) -> ImageClassifierOutput | tuple[torch.Tensor, ...]:
        """Compute logits (batch, num_labels) of images (batch, num_channels, image_size, image_size).

        With `labels` (batch,), class ids, also the mean cross-entropy in nats.
        """
        logits = self.classifier(self.features(pixel_values))
        loss = None if labels is None else functional.cross_entropy(logits, labels)
        output = ImageClassifierOutput(loss=loss, logits=logits)
        return output.to_tuple() if return_dict is False else output

    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Compute the classifier's input (batch, 128) of images (batch, num_channels, image_size, image_size)."""
        hidden = functional.max_pool2d(functional.relu(self.conv1(pixel_values)), 2)
        hidden = functional.max_pool2d(functional.relu(self.conv2(hidden)), 2)
        return functional.relu(self.fc1(hidden.flatten(start_dim=1)))

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise like PyTorch (Kaiming uniform): transformers' normal with sd 0.02 is meant for transformers."""
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            bound = 1 / math.sqrt(module.weight[0].numel())
            init.uniform_(module.bias, -bound, bound)


AutoConfig.register(SmallCnnConfig.model_type, SmallCnnConfig, exist_ok=True)
AutoModelForImageClassification.register(SmallCnnConfig, SmallCnnForImageClassification, exist_ok=True)
