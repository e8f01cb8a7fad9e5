"""The HTTP server: models over an API, uploads, and a page."""
