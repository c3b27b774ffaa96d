"""Traces: each rank writes when it did what, and ``merge`` makes one timeline of all ranks."""
