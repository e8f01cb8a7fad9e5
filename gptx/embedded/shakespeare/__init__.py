"""A small GPT-2 trained on tiny Shakespeare; README.md beside this file says how."""
