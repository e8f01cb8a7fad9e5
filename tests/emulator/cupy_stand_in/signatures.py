"""Functions and methods that CuPy 14.2 shares with NumPy, with CuPy's signatures."""

from __future__ import annotations

import inspect

UFUNCS = """
    abs absolute add arccos arccosh arcsin arcsinh arctan arctan2 arctanh bitwise_and bitwise_or
    ceil cos cosh divide equal exp expm1 floor floor_divide greater greater_equal invert isfinite
    isinf isnan left_shift less less_equal log log1p log2 logical_and logical_not logical_or maximum
    minimum multiply negative not_equal power remainder right_shift sign sin sinh sqrt square
    subtract tan tanh true_divide trunc
"""

SIGNATURES = """
    all(a, axis=None, out=None, keepdims=False)
    any(a, axis=None, out=None, keepdims=False)
    argmax(a, axis=None, dtype=None, out=None, keepdims=False)
    argmin(a, axis=None, dtype=None, out=None, keepdims=False)
    argsort(a, axis=-1, kind=None)
    broadcast_to(array, shape)
    clip(a, a_min, a_max, out=None)
    copy(a, order='K')
    concatenate(tup, axis=0, out=None, *, dtype=None, casting='same_kind')
    count_nonzero(a, axis=None)
    cumsum(a, axis=None, dtype=None, out=None)
    expand_dims(a, axis)
    flip(a, axis=None)
    isin(element, test_elements, assume_unique=False, invert=False)
    max(a, axis=None, out=None, keepdims=False)
    mean(a, axis=None, dtype=None, out=None, keepdims=False)
    min(a, axis=None, out=None, keepdims=False)
    moveaxis(a, source, destination)
    nonzero(a)
    prod(a, axis=None, dtype=None, out=None, keepdims=False)
    ravel(a, order='C')
    repeat(a, repeats, axis=None)
    reshape(a, newshape, order='C', *, copy=None)
    round(a, decimals=0, out=None)
    sort(a, axis=-1, kind=None)
    squeeze(a, axis=None)
    stack(tup, axis=0, out=None, *, dtype=None, casting='same_kind')
    std(a, axis=None, dtype=None, out=None, ddof=0, keepdims=False)
    sum(a, axis=None, dtype=None, out=None, keepdims=False)
    swapaxes(a, axis1, axis2)
    take(a, indices, axis=None, out=None)
    take_along_axis(a, indices, axis)
    tensordot(a, b, axes=2)
    transpose(a, axes=None)
    var(a, axis=None, dtype=None, out=None, ddof=0, keepdims=False)
    where(condition, x=None, y=None)
"""

METHODS = """
    all(axis=None, out=None, keepdims=False)
    any(axis=None, out=None, keepdims=False)
    argmax(axis=None, out=None, dtype=None, keepdims=False)
    argsort(axis=-1, kind=None)
    astype(dtype, order='K', casting=None, subok=None, copy=True)
    copy(order='C')
    flatten(order='C')
    max(axis=None, out=None, keepdims=False)
    mean(axis=None, dtype=None, out=None, keepdims=False)
    min(axis=None, out=None, keepdims=False)
    ravel(order='C')
    reshape(*shape, order='C', copy=None)
    squeeze(axis=None)
    sum(axis=None, dtype=None, out=None, keepdims=False)
    swapaxes(axis1, axis2)
    take(indices, axis=None, out=None)
    transpose(*axes)
"""


def parse(line: str) -> tuple[str, inspect.Signature]:
    """Parse a line of the tables above to a name and a signature."""
    name, _, parameters = line.strip().partition("(")
    return name, inspect.signature(eval(f"lambda {parameters.removesuffix(')')}: 0"))
