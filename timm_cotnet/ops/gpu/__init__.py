"""Kernels of a GPU, in Triton; `ops/dispatch.py` says when they run. Triton itself is imported when it is needed."""
