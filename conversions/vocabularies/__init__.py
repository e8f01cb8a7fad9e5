"""Vocabularies: token lists <-> tokenizer files."""
