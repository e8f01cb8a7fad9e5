"""Tokenization: text <-> token ids."""
