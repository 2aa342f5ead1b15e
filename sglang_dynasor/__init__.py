"""Reasoning programs as first-class citizens of SGLang's scheduler."""

__version__ = "0.1.0"
