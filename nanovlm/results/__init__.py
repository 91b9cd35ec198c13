"""The results folder as data: writing, reading, comparing.

Displays nothing, imports no model and no Ray. Begin with `read.py`.
"""
