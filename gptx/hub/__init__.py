"""The Hugging Face Hub: resolve names, download, verify and cache files, upload models."""
