"""The archive as history: who wrote this, since when, what exactly changed."""

from knockwood.history.transaction import ColumnValue, RelationChanges, RowChange, TableId, Transaction

__all__ = ["ColumnValue", "RelationChanges", "RowChange", "TableId", "Transaction"]
