"""The model: vision encoder, modality projector, decoder, and their files.

No training, no data. Begin with `vision_language_model.py`.
"""
