"""Rows on disk: readers, plans and atomic writers."""
