"""File formats of GPT-2 models: one module a format, its reader and writer together."""
