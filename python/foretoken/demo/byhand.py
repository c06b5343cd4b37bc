"""The loop a careful user would write on the same lean forward without foretoken: the bar to beat.

Batch 1, a chain of drafts, the token rule (Leviathan et al. 2023, algorithm 1), and nothing else: no stop, no
seed of its own, no ragged batch, no filter. It calls the models directly, without a step to fill in.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Forward = Callable[..., Tensor]  # `LeanLlama.forward`


@torch.inference_mode()
def speculate(
    target: Forward, draft: Forward, prompt: list[int], new: int, drafts: int, temperature: float
) -> tuple[list[int], list[int]]:
    """`new` tokens after `prompt`, and how many drafts each round accepted."""
    text = list(prompt)
    head = torch.tensor(text[:-1])
    target(head, [0], [0], [len(head)], logits=False)
    draft(head, [0], [0], [len(head)], logits=False)
    known = len(head)  # tokens in the draft's cache
    accepted: list[int] = []
    while len(text) - len(prompt) < new:
        length = len(text)
        count = min(drafts, len(prompt) + new - length - 1)
        laws, guesses = [], []
        ids = torch.tensor(text[known:])
        for _ in range(count):
            last = draft(ids, [0], [known], [len(ids)])[-1]
            known += len(ids)
            if temperature > 0:
                laws.append((last / temperature).softmax(-1))
                ids = torch.multinomial(laws[-1], 1)
            else:
                ids = last.argmax().view(1)
            guesses.append(ids)
        logits = target(torch.cat([torch.tensor(text[-1:]), *guesses]), [0], [length - 1], [count + 1])
        guess = torch.cat(guesses) if guesses else torch.empty(0, dtype=torch.int64)
        if temperature > 0:
            wanted = (logits / temperature).softmax(-1)
            if count == 0:
                hits, rest = 0, wanted[0]
            else:
                drawn = torch.stack(laws)
                kept = wanted[:count].gather(1, guess[:, None])[:, 0]
                offered = drawn.gather(1, guess[:, None])[:, 0]
                hits = int((torch.rand(count) * offered < kept).long().cumprod(0).sum())
                rest = wanted[hits] if hits == count else (wanted[hits] - drawn[hits]).clamp_(min=0)
            closing = int(torch.multinomial(rest, 1))
        else:
            best = logits.argmax(-1)
            hits = int((best[:count] == guess).long().cumprod(0).sum())
            closing = int(best[hits])
        text += [*guess[:hits].tolist(), closing]
        known = min(known, length + hits)
        accepted.append(hits)
    return text[len(prompt) :], accepted
