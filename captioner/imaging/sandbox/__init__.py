"""Decode images in a child process, which an image may crash or hang; `decoder.py` is the caller's side."""
