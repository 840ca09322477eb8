"""What the two clouds look like, before and after: the metrics with which the papers argue, and the report.

`compare` measures one alignment, `report` writes a page; the modules hold the metrics one by one.
"""

from __future__ import annotations

from .report import compare, report

__all__ = ["compare", "report"]
