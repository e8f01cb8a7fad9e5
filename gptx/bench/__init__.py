"""What `gptx bench` measures, prints and plots.

`presets.py` is the table of what there is to run: the grid (`grid.py`), which is llama-bench's, and
the tables that people know (`ladder.py`, `budget.py`, `total.py`). Each takes `Settings` and yields
records, plain dicts that go into JSON as they are; `report.py` prints them, `plots.py` draws those
of the grid. Whatever is measured runs in a fresh process (`process.py` starts it, `child.py` is
what runs there).
"""

PRESETS = ("ablation", "threads", "budget", "total")
FORMATS = ("md", "csv", "json", "jsonl")
