"""Folders of preference records, which ComfyUI's nodes read as well: see kernels.files.preference_records."""

from ..kernels.files.preference_records import RECORDS, Record, RecordError, read

__all__ = ["RECORDS", "Record", "RecordError", "read"]
