"""What a run shows on the terminal.

Begin with `search_display.py`.
"""
