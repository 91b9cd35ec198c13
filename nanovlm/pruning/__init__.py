"""Which trials go on: successive halving as pure rules with a log.

Neither Optuna nor Ray. Begin with `successive_halving.py`.
"""
