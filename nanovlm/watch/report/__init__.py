"""The page `report.html` of a results folder.

Begin with `page.py`.
"""
