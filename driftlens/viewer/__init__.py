"""One self-contained HTML page about one edit: see :func:`driftlens.viewer.page`."""

from __future__ import annotations

from driftlens.viewer.page import HeadSet, PageData, Restored, State, Sweep, Table, page

__all__ = ["HeadSet", "PageData", "Restored", "State", "Sweep", "Table", "page"]
