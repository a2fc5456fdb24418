"""Parity with PyTorch: the same cases on Sesame's architecture, on transformers' and on ours."""
