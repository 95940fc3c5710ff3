"""The mathematics of pruning: tensors in, tensors out. No module, no family, no configuration, no disk."""
