"""The Hugging Face Hub: resolve, download, verify, cache, upload."""
