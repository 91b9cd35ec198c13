"""What to try next: samplers of Optuna, and the one that learns from unfinished trials.

Imports results; no Ray. Begin with `optuna_samplers.py`.
"""
