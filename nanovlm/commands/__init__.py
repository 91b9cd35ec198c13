"""Commands of `python -m nanovlm`, a module each.

Begin with `nanovlm/__main__.py`.
"""
