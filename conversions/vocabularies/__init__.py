"""Vocabularies: token lists in the files of other programs, and their comparison."""
