"""A small GPT-2 trained on tiny Shakespeare; README.md describes it."""
