"""What tiles of rows hold, for those who compute logits themselves."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from foretoken import _core
from foretoken.ops._choices import table_of
from foretoken.sampling import Sampling, SamplingTable

TILE: int = _core.TILE


def tile_stats(
    logits: Tensor,
    *,
    sampling: Sampling | SamplingTable | None = None,
    slots: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The largest logit of every tile of 1024 of a row, and the sum of the tile's weights relative to it.

    A weight is ``2 ** ((logit - largest) * log2(e) / temperature)``. With them ``verify(target_stats=...)``
    reads one row of a request in place of all: the one that its closing token is drawn from. This function
    reads every logit itself; it says what a kernel that computes logits has to leave behind in passing (the
    epilogue of a language model's head), and is the answer to hold such a kernel against.

    Parameters
    ----------
    logits
        float32, bfloat16 or float16 ``[B, V]`` or ``[B, T, V]``; rows may lie anywhere.
    sampling
        A :class:`Sampling` or a prepared table, of which the temperatures are read.
    slots
        int32 ``[B]``: the table slot of each row; None: row b uses slot b.
    out
        float32 ``[B, tiles, 2]`` or ``[B, T, tiles, 2]`` to write, contiguous; ``tiles = ceil(V / TILE)``.

    Returns
    -------
    Tensor
        ``out``: (largest, sum) by tile. The last tile ends where the row ends; a tile of -inf alone is
        ``(-inf, 0)``; at temperature 0 the sum is 0; a tile with a NaN, or +inf at another temperature, has
        an infinite sum, and a row with such a tile has no law.

    Raises
    ------
    TypeError, ValueError
        An argument is of the wrong kind, dtype, shape, device or layout, named in the message.

    Examples
    --------
    >>> tile_stats(torch.tensor([[1.0, 3.0, 3.0, -torch.inf]]), sampling=Sampling(temperature=0.5))
    tensor([[[3.0000, 2.0183]]])
    """
    shape = (*logits.shape[:-1], -(-logits.shape[-1] // TILE), 2)
    if out is None:
        out = torch.empty(shape, dtype=torch.float32, device=logits.device)
    if is_dynamo_compiling():
        from foretoken.ops import _library

        return _library.tile_stats(logits, sampling, slots, out)
    _core.tile_stats(logits, table_of("sampling", sampling, logits.shape[0]), slots, out)
    return out
