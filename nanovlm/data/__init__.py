"""From rows of any source to prepared samples and batches.

No model. Begin with `prepared.py`, which names the steps.
"""
