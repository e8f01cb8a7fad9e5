"""The same weights in every engine that is installed; see README.md."""
