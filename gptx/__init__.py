"""GPT-2 written once against the Python array API."""
