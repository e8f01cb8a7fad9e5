"""onnxruntime, with the fused operators of its own optimizer.

The graph is built here, since exporters of GPT-2 come and go. Its fused operators: layer norm with
the sum before it, attention with growing keys and values, and GELU with its bias. Only the last
position goes through the head. The weights are in a file beside the graph.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from benchmarks.compare.peers.base import Engine, Prompts, Tick, best

GRAPH, WEIGHTS = "model.onnx", "weights.bin"


class OnnxEngine(Engine):
    """A session that keeps the keys and values."""

    version = onnxruntime.__version__

    @classmethod
    def prepare(cls, folder: Path, work: Path, **options: Any) -> None:
        write_graph(folder, work)

    def __init__(self, folder: Path, threads: int, work: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(
            work / GRAPH, options, providers=["CPUExecutionProvider"]
        )
        self.n_bytes = (work / WEIGHTS).stat().st_size
        self.names = [x.name for x in self.session.get_inputs()[1:]]
        _, _, self.n_head, _, self.head_dim = self.session.get_inputs()[1].shape
        self.past: list[Any] = []
        self.known: list[Any] = []

    def generate(self, prompts: Prompts, n_tokens: int, tick: Tick, known: bool = False) -> None:
        if known and self.known:
            self.past, ids = self.known, np.array(prompts)[:, -1:]
        else:
            self._clear(len(prompts))
            ids = np.array(prompts)
            if known:
                self._run(ids[:, :-1])
                self.known, ids = self.past, ids[:, -1:]
        for _ in range(n_tokens):
            tokens = best(self._run(ids))
            tick(tokens)
            ids = np.array(tokens)[:, None]

    def logits(self, ids: list[int]) -> list[float]:
        self._clear(1)
        return [float(x) for x in self._run(np.array([ids]))[0]]

    def _clear(self, n: int) -> None:
        empty = np.zeros((2, n, self.n_head, 0, self.head_dim), np.float32)
        self.past = [onnxruntime.OrtValue.ortvalue_from_numpy(empty)] * len(self.names)

    def _run(self, ids: np.ndarray) -> np.ndarray:
        binding = self.session.io_binding()
        binding.bind_cpu_input("ids", np.ascontiguousarray(ids, np.int64))
        for name, value in zip(self.names, self.past, strict=True):
            binding.bind_ortvalue_input(name, value)
        for output in self.session.get_outputs():
            binding.bind_output(output.name)
        self.session.run_with_iobinding(binding)
        logits, *self.past = binding.get_outputs()
        return np.asarray(logits.numpy())


def write_graph(folder: Path, work: Path) -> None:
    """Write the model as ONNX, tensor by tensor."""
    import onnx
    from onnx import TensorProto, helper

    from gptx.config import GPT2Config
    from gptx.safetensors_file import widen_bfloat16
    from gptx.safetensors_weights import open_weights

    config = GPT2Config.from_file(folder / "config.json")
    tensors = open_weights(sorted(folder.glob("*.safetensors")), config).map()
    H, D, V = config.n_head, config.head_dim, config.vocab_size
    nodes, initializers = [], []

    with open(work / WEIGHTS, "wb") as file:
        for name, array in tensors.items():
            where = {"location": WEIGHTS, "offset": str(file.tell()), "length": str(4 * array.size)}
            entries = [onnx.StringStringEntryProto(key=k, value=v) for k, v in where.items()]
            initializers.append(
                TensorProto(
                    name=name,
                    data_type=TensorProto.FLOAT,
                    dims=array.shape,
                    data_location=TensorProto.EXTERNAL,
                    external_data=entries,
                )
            )
            file.write(np.ascontiguousarray(widen_bfloat16(array), "<f4").data)

    def constant(name: str, value: Any) -> str:
        initializers.append(onnx.numpy_helper.from_array(np.array(value, np.int64), name))
        return name

    def op(kind: str, inputs: list[str], *outputs: str, **attributes: Any) -> str:
        fused = kind in ("Attention", "SkipLayerNormalization", "FastGelu")
        domain = "com.microsoft" if fused else ""
        nodes.append(helper.make_node(kind, inputs, outputs, domain=domain, **attributes))
        return outputs[0]

    # ids [B, T], each past [2, B, H, P, D]; positions are P, ..., P + T - 1
    length = op("Squeeze", [op("Shape", ["ids"], "T1", start=1, end=2)], "T")
    known = op("Squeeze", [op("Shape", ["past.0"], "P1", start=3, end=4)], "P")
    stop = op("Add", [known, length], "stop")
    positions = op("Range", [known, stop, constant("one", 1)], "positions")
    tokens = op("Gather", ["wte.weight", "ids"], "tokens")
    x = op("Add", [tokens, op("Gather", ["wpe.weight", positions], "places")], "x")
    norm = {"epsilon": config.layer_norm_epsilon}
    y = op("LayerNormalization", [x, "h.0.ln_1.weight", "h.0.ln_1.bias"], "h.0.norm", **norm)
    for layer in range(config.n_layer):
        h = f"h.{layer}"
        following = "ln_f" if layer == config.n_layer - 1 else f"h.{layer + 1}.ln_1"
        qkv = [f"{h}.attn.c_attn.weight", f"{h}.attn.c_attn.bias"]
        y = op(
            "Attention",
            [y, *qkv, "", f"past.{layer}"],
            f"{h}.heads",
            f"present.{layer}",
            num_heads=H,
            unidirectional=1,
        )
        y = op("MatMul", [y, f"{h}.attn.c_proj.weight"], f"{h}.attn")
        ln = [f"{h}.ln_2.weight", f"{h}.ln_2.bias", f"{h}.attn.c_proj.bias"]
        y = op("SkipLayerNormalization", [x, y, *ln], f"{h}.mid", "", "", f"{h}.x1", **norm)
        y = op("MatMul", [y, f"{h}.mlp.c_fc.weight"], f"{h}.fc")
        y = op("FastGelu", [y, f"{h}.mlp.c_fc.bias"], f"{h}.gelu")
        y = op("MatMul", [y, f"{h}.mlp.c_proj.weight"], f"{h}.mlp")
        ln = [f"{following}.weight", f"{following}.bias", f"{h}.mlp.c_proj.bias"]
        x1, x = f"{h}.x1", f"{h}.x2"
        y = op("SkipLayerNormalization", [x1, y, *ln], f"{h}.out", "", "", x, **norm)
    last = op("Gather", [y, constant("last", -1)], "last_hidden", axis=1)
    head = "wte.weight" if config.tie_word_embeddings else "lm_head.weight"
    op("Gemm", [last, head], "logits", transB=1)

    def value(name: str, shape: list[Any], kind: int = TensorProto.FLOAT) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    layers = range(config.n_layer)
    graph = helper.make_graph(
        nodes,
        "gpt2",
        [
            value("ids", ["B", "T"], TensorProto.INT64),
            *(value(f"past.{i}", [2, "B", H, "P", D]) for i in layers),
        ],
        [value("logits", ["B", V])] + [value(f"present.{i}", [2, "B", H, "S", D]) for i in layers],
        initializers,
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), work / GRAPH)
