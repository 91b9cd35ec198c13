"""The training loop, an optimizer step, memory, saved states.

Imports models and data; no Ray. Begin with `loop.py`.
"""
