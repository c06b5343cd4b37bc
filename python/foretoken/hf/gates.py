"""Where a recurrent module decides how much of a token enters its state, and how much of the state stays."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

SHUT = -3e4
"""Behind a softplus or a sigmoid this is zero: nothing fades and nothing enters. All float dtypes hold it."""

# Of gated-delta modules, by transformers' names: what the decay and the strength of a write are made of.
_DELTA_GATES = ("in_proj_ba", "in_proj_a", "in_proj_b", "a_proj", "b_proj", "forget_gate.f_b_proj")


class Gate(NamedTuple):
    """A projection of which the last `width` numbers of each token are gates."""

    module: nn.Module
    width: int


def gates_of(module: nn.Module) -> tuple[Gate, ...]:
    """The gates of a module, by what they are called; whether they are is for a trial to say."""
    heads, steps = getattr(module, "num_heads", None), getattr(module, "dt_bias", None)
    projection = getattr(module, "in_proj", None)
    if isinstance(projection, nn.Linear) and isinstance(heads, int) and steps is not None:
        return (Gate(projection, heads),) if steps.shape == (heads,) else ()
    found = dict(module.named_modules())
    linear = [found[name] for name in _DELTA_GATES if name in found]
    return tuple(Gate(child, child.out_features) for child in linear if isinstance(child, nn.Linear))
