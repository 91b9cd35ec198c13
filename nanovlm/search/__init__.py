"""A search from plan to confirmed result: Optuna suggests, Tune and the rungs decide.

Imports all folders above it in docs/architecture.md. Begin with `run.py`.
"""
