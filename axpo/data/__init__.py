"""Rows of questions and conversations: read lazily, checked by name, converted from other formats (docs/data.md)."""

from axpo.data.dataset import DataError, Rows
from axpo.data.rows import INSTRUCTION, Row, parse_row

__all__ = ["INSTRUCTION", "DataError", "Row", "Rows", "parse_row"]
