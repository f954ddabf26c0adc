"""A head whose vocabulary is spread over processes.

Who holds what and what moves is in docs/parallel.md.

:mod:`.placement` takes DTensors apart. :mod:`.agreement` makes sure that all ranks make the same
call before any of them waits for another. :mod:`.operator` is the statistics of the whole
vocabulary, from each rank's shard.
"""

from __future__ import annotations

from crosscut.parallel.placement import vocab_shard

__all__ = ["vocab_shard"]
