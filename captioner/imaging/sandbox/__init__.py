"""Decoding in a process of its own, which an image may crash or stop: `decoder.py` is the caller's side."""
