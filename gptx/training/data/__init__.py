"""Data for training: texts to token files, and batches of them."""
