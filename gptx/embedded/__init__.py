"""The models that come with the package: name -> folder."""

from __future__ import annotations

from pathlib import Path

EMBEDDED: dict[str, Path] = {"shakespeare": Path(__file__).with_name("shakespeare")}
