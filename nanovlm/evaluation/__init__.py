"""What a model can do: MMStar and the validation loss.

Imports training for the forward pass. Begin with `mmstar.py`.
"""
