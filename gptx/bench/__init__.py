"""The measurements of `gptx bench`, their tables and plots; see README.md."""

PRESETS = ("ablation", "threads", "budget", "total")
FORMATS = ("md", "csv", "json", "jsonl")
