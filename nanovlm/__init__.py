"""nanoVLM and the search for its hyperparameters.

A map of the folders: docs/architecture.md. Begin with `trial.py`: one trial from start to end.
"""
