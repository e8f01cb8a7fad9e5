"""The server: models behind an HTTP interface; `gptx serve` starts it."""
