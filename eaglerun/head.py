"""Head: from hidden states to the best token of each row."""

from collections.abc import Callable

import torch
from torch import Tensor

from eaglerun.kernels.noise import TOKEN, gumbel_argmax
from eaglerun.kernels.rows import Best
from eaglerun.kernels.vocab_argmax import vocab_argmax
from eaglerun.sampling import Scored, SlotRows


class Head:
    """A model's last product, and the choice among what it says.

    The choice leaves as (value, id) pairs, greedy and sampled alike: with counter-based noise a
    draw is an argmax too. So a vocabulary in parts needs no more than the best pair of each part;
    whole logits are only for what ranks tokens (filters, log-probabilities).
    """

    def __init__(self, project: Callable[[Tensor], Tensor]) -> None:
        """``project``: hidden [N, H] -> logits [N, V]."""
        self._project = project

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, H] -> [N, V] in the model's dtype."""
        return self._project(hidden)

    def greedy(self, logits: Tensor) -> Best:
        """The largest logit of each row: [..., V] -> pairs [..., 2]."""
        if logits.ndim == 2:
            return vocab_argmax(logits)
        flat = vocab_argmax(logits.view(-1, logits.shape[-1]))
        return Best(flat.pairs.view(*logits.shape[:-1], 2))

    def best(self, scored: Scored, rows: SlotRows, stream: int = TOKEN) -> Best:
        """Pairs [B, Q, 2] of the largest log p + Gumbel noise, or of the largest logit where a
        sequence is greedy."""
        best = self.greedy(scored.logits)
        if scored.logp is None:
            return best
        assert scored.positions is not None
        drawn = self.draw(scored.logp, scored.positions, rows, stream)
        return Best(torch.where(rows.sampled[:, None, None], drawn.pairs, best.pairs))

    def draw(self, logp: Tensor, positions: Tensor, rows: SlotRows, stream: int) -> Best:
        """Pairs [B, Q, 2] of the largest log p + Gumbel noise, from logp [B, Q, V] for the tokens
        at ``positions`` [B, Q]."""
        B, Q, V = logp.shape
        at = positions.reshape(-1)
        drawn = gumbel_argmax(logp.reshape(-1, V), rows.seeds(Q), at, stream)
        return Best(drawn.pairs.view(B, Q, 2))
