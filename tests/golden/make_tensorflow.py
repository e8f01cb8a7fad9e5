"""Save a small random model with TensorFlow, the independent reference.

The environment needs TensorFlow and the sources of gptx:

    python -m venv /tmp/tensorflow
    /tmp/tensorflow/bin/pip install tensorflow-cpu
    PYTHONPATH=. /tmp/tensorflow/bin/python tests/golden/make_tensorflow.py

tf-tiny/
    model.ckpt: the model "tiny" of `random_models.py`, saved as OpenAI's code does, with the number
    of a step and one slot of Adam. sharded.ckpt: the same tensors in two files, as several machines
    save them. `checkpoint` names the first.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import tensorflow as tf

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from gptx.random_weights import random_weights  # noqa: E402
from tests.support.files.tensor_bundle_bytes import variables  # noqa: E402
from tests.support.random_models import CASES  # noqa: E402

CONFIG = CASES["tiny"]
FOLDER = HERE / "tf-tiny"


def save(prefix: Path) -> None:
    """Write one file with the Saver of TensorFlow 1."""
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        kept = [
            tf.compat.v1.get_variable(name, initializer=array)
            for name, array in variables(random_weights(CONFIG)).items()
        ]
        slot = tf.compat.v1.get_variable("model/ln_f/g/Adam", initializer=[0.5] * CONFIG.n_embd)
        step = tf.compat.v1.train.get_or_create_global_step()
        session.run(tf.compat.v1.global_variables_initializer())
        saver = tf.compat.v1.train.Saver([*kept, slot, step], save_relative_paths=True)
        saver.save(session, str(prefix), write_meta_graph=False)


def save_sharded(prefix: Path) -> None:
    """Write two files: save the parts separately, then merge them."""
    items = sorted(variables(random_weights(CONFIG)).items())
    with tempfile.TemporaryDirectory() as parts:
        prefixes = []
        for i, part in enumerate((items[:5], items[5:])):
            prefixes.append(f"{parts}/part{i}")
            names, arrays = zip(*part, strict=True)
            tf.raw_ops.SaveV2(
                prefix=prefixes[-1],
                tensor_names=names,
                shape_and_slices=[""] * len(names),
                tensors=arrays,
            )
        tf.raw_ops.MergeV2Checkpoints(checkpoint_prefixes=prefixes, destination_prefix=str(prefix))


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    save_sharded(FOLDER / "sharded.ckpt")
    save(FOLDER / "model.ckpt")
    sizes = {"n_vocab": CONFIG.vocab_size, "n_ctx": CONFIG.n_positions, "n_embd": CONFIG.n_embd}
    sizes |= {"n_head": CONFIG.n_head, "n_layer": CONFIG.n_layer}
    (FOLDER / "hparams.json").write_text(json.dumps(sizes, indent=2) + "\n")
    for path in sorted(FOLDER.iterdir()):
        print(path.name, path.stat().st_size)
