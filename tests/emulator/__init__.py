"""A CUDA emulator: it compiles the CUDA kernels for the CPU and runs them. See README.md."""

from tests.emulator.build import KERNELS, compile_module, compile_text, compiled_by
from tests.emulator.module import Module

__all__ = ["KERNELS", "Module", "compile_module", "compile_text", "compiled_by"]
