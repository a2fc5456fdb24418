"""The two PyTorch references, each behind the same layer-by-layer interface (`cases.Implementation`)."""
