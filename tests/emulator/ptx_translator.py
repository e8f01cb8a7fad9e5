"""Translate PTX to C++, instruction by instruction.

The g++ path compiles `device.h` in place of `device.cuh`. The PTX path runs NVRTC's output of the
real `device.cuh`: its inline assembly, in the order that the compiler chose. `ptx_instructions.h`
defines the instructions; `race_detector.h` checks their memory accesses.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

ENTRY = re.compile(
    r"\.visible \.entry (\w+)\((.*?)\)\s*((?:\.\w+ [^\n]*\n)*)\{\n(.*?)\n\}\n", re.DOTALL
)
SHARED = re.compile(r"(?<!extern )\.shared \.align (\d+) \.\w(\d+) ([\w$]+)(?:\[(\d+)\])?;")
DYNAMIC = re.compile(r"\.extern \.shared \.align \d+ \.b8 ([\w$]+)\[\];")
REGISTERS = re.compile(r"\.reg \.(\w+)\s+%?(\w+)(?:<(\d+)>)?")
PREDICATE = re.compile(r"@(!?)%?(\w+)\s+(.*)")
OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")
ADDRESS = re.compile(r"\[([%\w$]+)(?:\+(-?\d+))?\]")
FLOAT = re.compile(r"0([fd])([0-9A-Fa-f]+)")
SPECIAL = {"%tid": "threadIdx", "%ntid": "blockDim", "%ctaid": "blockIdx", "%nctaid": "gridDim"}

# Instructions with one type for all operands; `ptx_instructions.h` has functions of these names.
UNIFORM = {
    *("add", "sub", "mul", "mul_lo", "mul_hi", "mul_wide", "mad_lo", "div", "rem", "neg", "abs"),
    *("min", "max", "fma", "fma_rm", "copysign", "rcp", "sqrt", "rsqrt", "ex2"),
    *("and", "or", "xor", "not", "prmt", "clz"),
}
IMPLIED = {"rn", "ftz", "approx"}  # modifiers that the functions implement always
# Parameters whose memory no kernel writes; kernels may read it before grid_dependency_sync.
FIXED = {"weight", "scales", "offsets", "bias", "norm_weight", "norm_bias", "caches"}


def translate(ptx: str, parameters: Mapping[str, str]) -> str:
    """Return C++ of the kernels in PTX; the macro KERNEL_f compiles the body of kernel f.

    Parameters
    ----------
    parameters
        Name of a kernel -> its parameters as CUDA C++ declares them.

    Raises
    ------
    AssertionError
        The translator does not support an instruction.
    """
    ptx = re.sub(r"//[^\n]*", "", ptx)
    shared = [
        f"__shared__ __align__({align}) unsigned char {name}[{int(bits) // 8 * int(n or 1)}];"
        for align, bits, name, n in SHARED.findall(ptx)
    ]
    symbols = dict.fromkeys(DYNAMIC.findall(ptx), "0u")
    symbols |= {name: f"address_of_shared({name})" for _, _, name, _ in SHARED.findall(ptx)}
    kernels = []
    for name, passed, _, body in ENTRY.findall(ptx):
        declared = parameters[name].split(",")
        given = [re.split(r"[\s*&]+", text.strip())[-1] for text in declared]
        pointers = [given[i] for i, text in enumerate(declared) if "*" in text]
        fixed, others = ([p for p in pointers if (p in FIXED) is yes] for yes in (True, False))
        waits = str("griddepcontrol.wait" in body).lower()
        named = zip(re.findall(r"\w+_param_\d+", passed), given, strict=True)
        kernel = Kernel(name, symbols, dict(named))
        kernels += [
            f'extern "C" void {name}({parameters[name]}) {{',
            f"#ifdef KERNEL_{name}",
            f"races::begin({waits}, {{{', '.join(fixed)}}}, {{{', '.join(others)}}});",
            *kernel.lines(body),
            "#endif",
            "}",
        ]
    return "\n".join((*shared, *kernels))


def max_threads(ptx: str) -> dict[str, str]:
    """Return the most threads of a block, by name, for the kernels with launch bounds."""
    found = {name: re.search(r"\.maxntid (\d+)", rest) for name, _, rest, _ in ENTRY.findall(ptx)}
    return {name: bound[1] for name, bound in found.items() if bound}


class Kernel:
    """Translator of one kernel.

    An instruction `add.s32 %r1, %r2, 5` becomes `put(r1_, add_<s32>(as<s32>(r2_), as<s32>(5)))`.
    Instructions of another form have a method, named after the first part of the opcode. A method
    receives the parts of the opcode and the operands.
    """

    def __init__(self, name: str, symbols: dict[str, str], parameters: dict[str, str]) -> None:
        self.name, self.symbols, self.parameters = name, symbols, parameters
        self.site = ""  # C++ of the current statement's place, for messages

    def lines(self, body: str) -> Iterator[str]:
        """Yield lines of C++; in PTX as in C++, declarations come before labels."""
        for number, line in enumerate(body.splitlines(), 1):
            self.site = f'emulator::Site{{"{self.name}.ptx", {number}}}'
            for text in line.split(";"):
                statement = text.strip()
                while statement.startswith(("{", "}")):
                    yield statement[0]
                    statement = statement[1:].strip()
                if statement and not statement.startswith((".pragma", ".shared")):
                    yield self.statement(statement)

    def statement(self, text: str) -> str:
        """Translate one statement to a line of C++."""
        if text.endswith(":"):
            return f"{text};"
        if found := REGISTERS.fullmatch(text):
            kind, name, n = found.groups()
            names = [f"{name}{i}_" for i in range(int(n))] if n else [f"{name}_"]
            return f"{kind} {', '.join(names)};"
        if found := PREDICATE.fullmatch(text):
            return f"if ({found[1]}{found[2]}_) {{ {self.statement(found[3])} }}"
        opcode, *rest = text.split(maxsplit=1)
        parts, operands = opcode.split("."), OPERAND.findall(" ".join(rest))
        return f"{getattr(self, f'_{parts[0]}', self.uniform)(parts, operands)};"

    # Operands

    def place(self, operand: str) -> str:
        """Return C++ for a register, a special register, or the address of a variable."""
        name, _, axis = operand.partition(".")
        if name in SPECIAL:
            return f"{SPECIAL[name]}.{axis}"
        return self.symbols.get(operand, operand.removeprefix("%") + "_")

    def places(self, operand: str) -> list[str]:
        """Return C++ for each register of {%a, %b}, or for one register."""
        return [self.place(name) for name in re.findall(r"[%\w]+", operand)]

    def value(self, operand: str, kind: str) -> str:
        """Return C++ that reads a register or constant as a type."""
        if found := FLOAT.fullmatch(operand):
            return f"as<{kind}>(0x{found[2]}{'u' if found[1] == 'f' else 'ull'})"
        if re.fullmatch(r"-?\d+", operand):
            return f"as<{kind}>({int(operand) % 2**64}ull)"
        if operand in self.symbols:
            return f"({kind}){self.symbols[operand]}"
        return f"as<{kind}>({self.place(operand)})"

    def values(self, operands: Sequence[str], kind: str) -> str:
        return ", ".join(self.value(operand, kind) for operand in operands)

    def address(self, operand: str) -> str:
        found = ADDRESS.fullmatch(operand)
        assert found, operand
        return f"{self.place(found[1])} + {found[2] or 0}"

    def put(self, operand: str, value: str) -> str:
        return f"put({self.place(operand)}, {value})"

    def put_all(self, operand: str) -> str:
        """Return C++ that writes the elements of the array v to registers."""
        return " ".join(f"put({to}, v[{i}]);" for i, to in enumerate(self.places(operand)))

    # Values

    def uniform(self, parts: list[str], x: list[str]) -> str:
        kind = parts[-1]
        name = "_".join([parts[0], *(part for part in parts[1:-1] if part not in IMPLIED)])
        assert name in UNIFORM, f"{self.name}: {'.'.join(parts)} is not supported by {__file__}"
        return self.put(x[0], f"{name}_<{kind}>({self.values(x[1:], kind)})")

    def _shl(self, parts: list[str], x: list[str]) -> str:
        value, by = self.value(x[1], parts[1]), self.value(x[2], "u32")
        return self.put(x[0], f"{parts[0]}_<{parts[1]}>({value}, {by})")

    _shr = _shl

    def _bfi(self, parts: list[str], x: list[str]) -> str:
        values, at = self.values(x[1:3], parts[1]), self.values(x[3:], "u32")
        return self.put(x[0], f"bfi_<{parts[1]}>({values}, {at})")

    def _mov(self, parts: list[str], x: list[str]) -> str:
        if x[0].startswith("{"):
            return f"split({', '.join(self.places(x[0]))}, {self.value(x[1], parts[1])})"
        if x[1].startswith("{"):
            return self.put(x[0], f"join({', '.join(self.places(x[1]))})")
        return self.put(x[0], self.value(x[1], parts[1]))

    def _setp(self, parts: list[str], x: list[str]) -> str:
        return f"{self.place(x[0])} = {parts[1]}_<{parts[-1]}>({self.values(x[1:], parts[-1])})"

    def _selp(self, parts: list[str], x: list[str]) -> str:
        yes, no = (self.value(operand, parts[1]) for operand in x[1:3])
        return self.put(x[0], f"{self.place(x[3])} ? {yes} : {no}")

    def _cvt(self, parts: list[str], x: list[str]) -> str:
        *how, to, kind = (part for part in parts if part != "ftz")
        return self.put(x[0], f"{'_'.join(how)}<{to}, {kind}>({self.values(x[1:], kind)})")

    def _cvta(self, parts: list[str], x: list[str]) -> str:
        space = "_".join(parts[1:-1])  # to_shared, shared, to_global, ...
        return self.put(x[0], f"cvta_{space}({self.value(x[1], 'u64')})")

    # Control

    def _bra(self, parts: list[str], x: list[str]) -> str:
        return f"goto {x[0]}"

    def _ret(self, parts: list[str], x: list[str]) -> str:
        return "return"

    def _bar(self, parts: list[str], x: list[str]) -> str:
        if parts == ["bar", "warp", "sync"]:
            return f"__syncwarp({self.value(x[0], 'u32')}, {self.site}); races::pass_warp_barrier()"
        assert (parts, x) == (["bar", "sync"], ["0"])
        return f"emulator::wait_for_block({self.site}); races::pass_block_barrier()"

    def _membar(self, parts: list[str], x: list[str]) -> str:
        return ""  # the race detector takes each atomic operation for a fence

    def _griddepcontrol(self, parts: list[str], x: list[str]) -> str:
        if parts[1] == "launch_dependents":
            return "trigger_dependent_launch()"
        return "grid_dependency_sync(); races::pass_wait()"

    # Memory

    def _ld(self, parts: list[str], x: list[str]) -> str:
        space, kind = parts[1], parts[-1]
        if space == "param":
            return self.put(x[0], f"as<{kind}>({self.parameters[x[1][1:-1]]})")
        n = len(self.places(x[0]))
        name = f"load_{space if space in ('global', 'shared') else 'generic'}"
        load = f"{name}({self.address(x[1])}, v, {self.site});"
        return f"{{ {kind} v[{n}]; {load} {self.put_all(x[0])} }}"

    def _st(self, parts: list[str], x: list[str]) -> str:
        space, kind = parts[1], parts[-1]
        name = f"store_{space if space in ('global', 'shared') else 'generic'}"
        values = self.values(OPERAND.findall(x[1].strip("{}")), kind)
        store = f"{name}({self.address(x[0])}, v, {self.site});"
        return f"{{ const {kind} v[] = {{{values}}}; {store} }}"

    def _atom(self, parts: list[str], x: list[str]) -> str:
        return self.put(x[0], self._red(parts, x[1:]))

    def _red(self, parts: list[str], x: list[str]) -> str:
        *_, space, how, kind = parts
        at = f"at_{space}({self.address(x[0])}, sizeof({kind}), races::ATOMIC, {self.site})"
        return f"atom_{how}(({kind}*){at}, {self.values(x[1:], kind)})"

    def _cp(self, parts: list[str], x: list[str]) -> str:
        if parts[2] == "commit_group":
            return "copy_async_commit()"
        if parts[2] == "wait_group":
            return f"wait_for_copies<{x[0]}>({self.site})"
        assert parts[3:] == ["shared", "global"], parts
        to, source = (self.address(operand) for operand in x[:2])
        return f"copy({to}, {source}, {x[2]}, {self.value(x[3], 'u32')}, {self.site})"

    # Warps

    def _shfl(self, parts: list[str], x: list[str]) -> str:
        to, _, in_range = x[0].partition("|")
        places = ", ".join(self.place(operand) for operand in (to, in_range) if operand)
        return f"shfl_{parts[2]}({self.site}, {self.values(x[1:], 'u32')}, {places})"

    def _vote(self, parts: list[str], x: list[str]) -> str:
        predicate, mask = self.value(x[1], "pred"), self.value(x[2], "u32")
        return self.put(x[0], f"vote_{parts[2]}({self.site}, {predicate}, {mask})")

    def _ldmatrix(self, parts: list[str], x: list[str]) -> str:
        assert parts[3:5] == ["m8n8", "x4"], parts
        name = "ldmatrix_transposed" if "trans" in parts else "ldmatrix"
        load = f"load_matrix({name}, v, {self.address(x[1])}, {self.site});"
        return f"{{ unsigned v[4]; {load} {self.put_all(x[0])} }}"

    def _mma(self, parts: list[str], x: list[str]) -> str:
        assert parts[1:7] == ["sync", "aligned", "m16n8k16", "row", "col", "f32"], parts
        assert parts[7] == parts[8], parts
        a, b = (", ".join(self.places(operand)) for operand in x[1:3])
        sums = self.values(OPERAND.findall(x[3].strip("{}")), "f32")
        multiply = f"mma(v, {{{a}}}, {{{b}}}, {parts[7]}{{}}, {self.site});"
        return f"{{ float v[] = {{{sums}}}; {multiply} {self.put_all(x[0])} }}"
