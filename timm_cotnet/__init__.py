"""Contextual Transformer networks (CoTNet, arXiv:2107.12292) for timm. Importing this registers the models with timm."""
__version__ = '0.1.0'
