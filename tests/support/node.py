"""JavaScript of the page in Node.js, and onnxruntime-web for it."""

from __future__ import annotations

import json
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from gptx.server.sites.onnx_runtime_web import MODULE

PAGE = Path(str(files("gptx.server") / "page"))
TIMEOUT_SECONDS = 300

# Reads an input from standard input, and writes what the body returns.
PROGRAM = """
import fs from "node:fs";
const input = JSON.parse(fs.readFileSync(0, "utf8"));
const page = (name) => import(input.page + "/" + name);
const body = async (input, page, fs) => {{ {body} }};
fs.writeFileSync(1, JSON.stringify(await body(input.value, page, fs)));
process.exit();
"""

# Loads the model of a site; the body has `site`, `model`, `tokenizer`, and can collect a generator.
MODEL = """
const ort = await import("{ort}");
ort.env.wasm.numThreads = 1;
const manifest = JSON.parse(fs.readFileSync("{site}/model/model.json"));
const readPiece = ({{ name }}) => fs.readFileSync("{site}/model/" + name);
const read = async (pieces) => new Uint8Array(Buffer.concat(pieces.map(readPiece)));
const {{ loadModel }} = await page("site_model.js");
const {{ model, tokenizer }} = await loadModel(ort, manifest, read);
const collect = async (items) => {{
  const found = [];
  for await (const item of items) found.push(item);
  return found;
}};
"""


def run(body: str, value: Any = None) -> Any:
    """Return what the body of an async function of `input`, `page` and `fs` returns in Node.js.

    `page(name)` imports a module of the page.
    """
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node: apt-get install nodejs")
    done = subprocess.run(
        [node, "--input-type=module", "--eval", PROGRAM.format(body=body)],
        input=json.dumps({"page": str(PAGE), "value": value}),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def run_model(site: Path, body: str, value: Any = None) -> Any:
    """Return what a body returns that uses the `model` and the `tokenizer` of a site."""
    return run(MODEL.format(ort=site / "ort" / MODULE, site=site) + body, value)
