"""The report page of a results folder: Python says what it shows, `assets/` how it looks.

Imports results and the terminal's wording. Begin with `page.py`.
"""
