"""Fine-tune CLIP on a folder of image-caption pairs, exactly, and say honestly how much better it got."""

__version__ = "0.1.0"
