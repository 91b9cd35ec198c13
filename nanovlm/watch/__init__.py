"""Who watches a run: terminal, report page, TensorBoard, Weights & Biases.

Imports results; a run does not depend on any of it. Begin with `observer.py`.
"""
