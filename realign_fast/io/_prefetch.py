"""Work ahead in one background thread."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def prefetch(items: Generator[T, None, None], depth: int) -> Generator[T, None, None]:
    """Yield from `items`, which runs in a thread and stays up to `depth - 1` items ahead.

    While the consumer holds item `i`, the producer makes items up to `i + depth - 1`: memory of item `i` may be
    reused for item `i + depth`. The thread lives as long as the iteration: it ends when that ends, raises (here) or is
    abandoned.
    """
    process = os.getpid()
    pool = ThreadPoolExecutor(1, thread_name_prefix="realign-read")
    pending: deque[Future[T | None]] = deque()
    try:
        pending.extend(pool.submit(next, items, None) for _ in range(depth))
        while True:
            if os.getpid() != process:
                raise RuntimeError("an iteration over batches cannot be continued in a forked process: begin a new one")
            item = pending.popleft().result()
            if item is None:
                return
            yield item
            pending.append(pool.submit(next, items, None))
    finally:
        if os.getpid() == process:
            pool.shutdown(wait=True, cancel_futures=True)
            items.close()
