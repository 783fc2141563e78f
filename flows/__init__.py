"""Prefect flows: decide, submit, wait, gate, publish. Never a tensor, an array or a pixel."""
