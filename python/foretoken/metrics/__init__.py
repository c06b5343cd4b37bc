"""What a session counts, and where its time goes.

Names mirror vLLM's (``vllm:spec_decode_num_drafts`` is ``foretoken:spec_decode_num_drafts`` for Prometheus
and ``foretoken_drafts`` in :meth:`Metrics.as_dict`). Two figures are often mixed up: the **acceptance rate**
is accepted drafts over checked drafts and knows nothing of closing tokens; the **acceptance length** is
tokens emitted by a round that checked drafts, *including* the closing token, so it is 1 when nothing is ever
accepted.
"""

from __future__ import annotations

from foretoken.metrics.counters import Counters, Metrics, Seconds
from foretoken.metrics.prometheus import prometheus, prometheus_collector
from foretoken.metrics.reader import CounterReader

__all__ = ["CounterReader", "Counters", "Metrics", "Seconds", "prometheus", "prometheus_collector"]
