"""The arrays of a run: weights, and moments of the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from gptx import weights as weight_trees
from gptx.backends import Backend
from gptx.config import GPT2Config
from gptx.model import Transformer
from gptx.safetensors_file import widen_bfloat16
from gptx.training import optimizers
from gptx.training.settings import TrainingSettings

Array = Any
Read = Callable[[], np.ndarray]


@dataclass(frozen=True)
class HostTensor:
    """An array on a device, described before it is copied to the host.

    Attributes
    ----------
    dtype, shape
        Type on the host, and shape.
    read
        Function that copies it.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    read: Read


class Parameters:
    """The weights of a run on a backend, and the arrays of its optimizer.

    Parameters
    ----------
    config, settings, backend
        Config of the model, settings of the run, and the backend.
    first
        Name and array of each weight.
    moments
        Kind ("m", "v") -> name -> function that reads an array of a checkpoint; None for zeros.

    Attributes
    ----------
    config, settings, backend
        Parameters.
    weights : dict
        Name -> array, float64 for that type of activations, float32 for the others.
    computed : dict
        Name -> array in the type of the activations; `weights` itself if that is the same type.
    trainable : list of str
        Names of the weights to train.
    moments : dict
        Kind -> arrays of the optimizer, in the order of `trainable` and in the type of `weights`;
        an empty list for SGD without momentum.
    host_dtype : numpy.dtype
        Type of weights and moments.
    """

    def __init__(
        self,
        config: GPT2Config,
        settings: TrainingSettings,
        backend: Backend,
        first: Iterable[tuple[str, Any]],
        moments: Mapping[str, Mapping[str, Read]] | None = None,
    ) -> None:
        self.config, self.settings, self.backend = config, settings, backend
        self.host_dtype = np.dtype("float64" if backend.dtype == "float64" else "float32")
        shapes = config.tensor_shapes()
        self.trainable = settings.select_trainable(list(shapes))
        self.weights: dict[str, Array] = {}
        self.computed: dict[str, Array] = {}
        with backend.scope():
            self.set_weights(first)
            self.moments = {
                kind: [
                    self._on_backend(moments[kind][name]())
                    if moments is not None
                    else backend.zeros(shapes[name], str(self.host_dtype))
                    for name in self._names_of_moments()
                ]
                for kind in optimizers.MOMENTS[settings.optimizer]
            }

    def _names_of_moments(self) -> list[str]:
        settings = self.settings
        return self.trainable if settings.optimizer == "adamw" or settings.momentum else []

    @property
    def dtype(self) -> Any:
        """The backend's type of `host_dtype`, which is its accumulation dtype."""
        return self.backend.accumulation_dtype

    def transformer(self, backend: Backend | None = None) -> Transformer:
        """Return the model with the current weights; a later update may change them in place."""
        tree = weight_trees.as_tree(self.computed)
        return Transformer(self.config, tree, backend or self.backend)

    def update(self, grads: list[Array], *, lr: float, grad_scale: float, number: int) -> None:
        """Update weights and moments; call it in the backend's scope.

        Parameters
        ----------
        grads
            Gradients, in the order of `trainable`.
        lr
            Learning rate.
        grad_scale
            Factor of the gradients.
        number
            Number of this update, from 1.
        """
        settings = self.settings
        weights = [self.weights[name] for name in self.trainable]
        options: dict[str, Any] = {
            "lr": lr,
            "decays": [settings.weight_decay if w.ndim >= 2 else 0.0 for w in weights],
            "grad_scale": grad_scale,
        }
        if settings.optimizer == "adamw":
            constants = {"beta1": settings.beta1, "beta2": settings.beta2, "eps": settings.eps}
            options |= {**constants, "step": number}
        else:
            options["momentum"] = settings.momentum
        update = optimizers.function(self.backend, f"{settings.optimizer}_update")
        new, *moments = update(weights, grads, *self.moments.values(), **options)
        self.moments = dict(zip(self.moments, moments, strict=True))
        self._set(dict(zip(self.trainable, new, strict=True)))

    def set_weights(self, arrays: Iterable[tuple[str, Any]]) -> None:
        """Copy weights from the host, one at a time; call it in the backend's scope."""
        self._set({name: self._on_backend(array) for name, array in arrays})

    def set_moments(self, kind: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Copy the moments of one kind from the host; call it in the backend's scope."""
        self.moments[kind] = [self._on_backend(arrays[name]) for name in self.trainable]

    def _set(self, changed: dict[str, Array]) -> None:
        """Replace weights, and convert them to the type in which the model computes."""
        ops = self.backend
        self.weights |= changed
        if ops.float_dtype == self.dtype:
            self.computed = self.weights
        else:
            self.computed |= {n: ops.xp.astype(w, ops.float_dtype) for n, w in changed.items()}

    def _on_backend(self, host: np.ndarray) -> Array:
        """Copy an array to the backend; a copy, since an update may change it in place."""
        wide = np.array(widen_bfloat16(host), self.host_dtype, order="C")
        return self.backend.asarray(wide, str(self.host_dtype))

    def to_host(self, array: Array) -> np.ndarray:
        """Copy an array to the host, or share its memory."""
        with self.backend.scope():
            return self.backend.to_numpy(array)

    def host_weights(self) -> dict[str, Read]:
        """Return name -> function that copies a weight to the host, as float32."""

        def read(name: str) -> np.ndarray:
            return self.to_host(self.weights[name]).astype(np.float32, copy=False)

        return {name: partial(read, name) for name in self.config.tensor_shapes()}

    def host_moments(self) -> dict[str, HostTensor]:
        """Return "m.wte.weight" and the like -> array; also the weights if not float32."""
        arrays = {
            f"{kind}.{name}": array
            for kind, values in self.moments.items()
            for name, array in zip(self._names_of_moments(), values, strict=True)
        }
        if self.host_dtype != np.float32:
            arrays |= {f"weights.{name}": array for name, array in self.weights.items()}
        return {
            name: HostTensor(self.host_dtype, tuple(array.shape), partial(self.to_host, array))
            for name, array in arrays.items()
        }
