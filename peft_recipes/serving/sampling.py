"""The next token of one row: each row has its own options, penalties and random numbers, whatever batch it is in."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

_GREEDY = 1e-5  # a lower temperature is greedy: logits divided by it would overflow


@dataclass(frozen=True)
class Sampling:
    """How one answer is generated, by OpenAI's names; top_k and repetition_penalty by transformers'.

    temperature 0: greedy. seed None: random numbers that differ each time. stop: strings that end the answer.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)


class Sampler:
    """Chooses the tokens of one answer."""

    def __init__(self, sampling: Sampling, prompt: list[int]):
        self.sampling = sampling
        self._prompt, self._counts = prompt, {}  # tokens generated so far: how often
        self._generator: torch.Generator | None = None

    def next(self, logits: torch.Tensor) -> int:
        """Choose a token. logits: [vocabulary] in float32."""
        logits = self._penalised(logits)
        token = int(logits.argmax()) if self.sampling.temperature < _GREEDY else self._sample(logits)
        self._counts[token] = self._counts.get(token, 0) + 1
        return token

    def _sample(self, logits: torch.Tensor) -> int:
        from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        options, scores = self.sampling, logits[None]
        scores = TemperatureLogitsWarper(options.temperature)(None, scores)
        if options.top_k is not None:
            scores = TopKLogitsWarper(options.top_k)(None, scores)
        if options.top_p < 1:
            scores = TopPLogitsWarper(options.top_p)(None, scores)
        if self._generator is None:
            self._generator = torch.Generator(device=logits.device)
            if options.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(options.seed)
        return int(torch.multinomial(scores[0].softmax(-1), 1, generator=self._generator))

    def _penalised(self, logits: torch.Tensor) -> torch.Tensor:
        """Bias and penalties, as OpenAI's reference defines them: of the count and the presence of generated tokens."""
        options = self.sampling
        if options.repetition_penalty != 1:
            from transformers import RepetitionPenaltyLogitsProcessor

            seen = torch.tensor([[*self._prompt, *self._counts]], device=logits.device)
            logits = RepetitionPenaltyLogitsProcessor(options.repetition_penalty)(seen, logits[None])[0]
        changes = dict(options.logit_bias)
        if options.frequency_penalty or options.presence_penalty:
            for token, count in self._counts.items():
                penalty = options.frequency_penalty * count + options.presence_penalty
                changes[token] = changes.get(token, 0.0) - penalty
        if changes:
            logits = logits.clone()
            tokens = torch.tensor(list(changes), device=logits.device)
            logits[tokens] += torch.tensor(list(changes.values()), dtype=logits.dtype, device=logits.device)
        return logits
