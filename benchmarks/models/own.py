# SPDX-License-Identifier: Apache-2.0
"""Two classes of a user's own, which Transformers does not know."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class OwnConfig(PretrainedConfig):
    """Width and depth of a network of one's own."""

    model_type = "own_network"

    def __init__(self, hidden_size: int = 16, num_hidden_layers: int = 2, vocab_size: int = 60, **kwargs) -> None:
        self.hidden_size, self.num_hidden_layers, self.vocab_size = hidden_size, num_hidden_layers, vocab_size
        self.num_channels, self.image_size = 3, 32
        super().__init__(**kwargs)


class _Own(PreTrainedModel):
    config_class = OwnConfig

    def _init_weights(self, module: nn.Module) -> None:
        pass

    def answer(self, state: Tensor, labels: Tensor | None) -> SequenceClassifierOutput:
        logits = self.classifier(state)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class OwnCNN(_Own):
    """Convolutions, norms and one linear layer."""

    main_input_name = "pixel_values"

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
            for _ in range(config.num_hidden_layers)
        )
        self.classifier = nn.Linear(width, config.num_labels)
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        state = self.stem(pixel_values)
        for layer in self.layers:
            state = state + layer(state)
        return self.answer(state.mean(dim=(2, 3)), labels)


class OwnGRU(_Own):
    """A recurrent layer over tokens."""

    main_input_name = "input_ids"

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.gru = nn.GRU(config.hidden_size, config.hidden_size, config.num_hidden_layers, batch_first=True)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> SequenceClassifierOutput:
        states, _ = self.gru(self.embeddings(input_ids))
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        weights = mask.unsqueeze(-1).to(states.dtype)
        return self.answer((states * weights).sum(dim=1) / weights.sum(dim=1), labels)
