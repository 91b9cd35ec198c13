"""What a user writes: configurations, presets and space files, checked as a whole.

Imports the standard library, yaml and pydantic alone. Begin with `schema.py` and `space.py`.
"""
