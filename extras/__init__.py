"""Beside the core: see README.md. data.py comes before torch, because of what it does about Ctrl-C."""
import data

__all__ = ["data"]
