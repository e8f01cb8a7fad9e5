"""Hooks: every result is read and replaced by its name, on every backend."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gptx
from gptx.backends import Backend
from gptx.backends.cpu.compiled import CompiledForward
from gptx.errors import NonFiniteError, ParameterError
from gptx.generation.text_model import Model
from gptx.hooks import LENS_NAMES, HookedTransformer, Site, logits_from, with_hooks
from gptx.kv_cache import KVCache
from gptx.logits import all_logits, next_token_logits
from gptx.quantization import Quantization
from gptx.random_weights import random_weights
from tests.support.backends import make_backend
from tests.support.lens_cases import CASES as LENS_CASES
from tests.support.lens_cases import HEAD, LAYER, TOKEN
from tests.support.models import EXACT, drawn_weights, make_model
from tests.support.random_models import CASES, checksum, random_ids

GOLDEN = Path(__file__).parent / "golden"
TINY = LENS_CASES["gelu_new"]  # two layers, three heads
IDS = random_ids(TINY, 1, 5, seed=11)[0].tolist()
# Backends whose forward pass without hooks runs the same ops.
OP_BY_OP = ("numpy-ops", "numpy-generic", "mlx", "mlx-generic", "strict")

Arrays = dict[str, np.ndarray]


def read(model: Model, ids: list[int], patterns: str | list[str] = "*") -> Arrays:
    """Return what hooks read, on the host, and the logits as `logits`."""
    found: Arrays = {}
    patterns = [patterns] if isinstance(patterns, str) else patterns

    def hook(x: Any, site: Site) -> None:
        assert site.name not in found
        found[site.name] = np.array(model.backend.to_numpy(x))

    with model.hooks(dict.fromkeys(patterns, hook)), model.backend.scope():
        logits = np.array(model.backend.to_numpy(all_logits(model.gpt2, ids)))
    return found | {"logits": logits}


def copied(model: Model) -> Callable[[Any], Any]:
    """Return a hook that replaces an array by a copy, in the order of memory of a new array."""
    return lambda x: model.backend.asarray(np.array(model.backend.to_numpy(x), order="C"))


@lru_cache
def exact_activations(case: str) -> Arrays:
    """Every activation of a golden model, on the generic ops in float64."""
    config = CASES[case]
    return read(make_model(config, EXACT), random_ids(config, 1, 4)[0].tolist())


EVERY_NAME = [(case, name) for case in CASES for name in ("numpy", "mlx", "strict")]
EVERY_NAME += [(case, "cupy-cpu") for case in ("untied", "layer-scaled", "tiny")]


@pytest.mark.parametrize(("case", "name"), EVERY_NAME)
def test_every_name_of_every_golden_model_is_read(case: str, name: str) -> None:
    config = CASES[case]
    model = make_model(config, make_backend(name))
    found, expected = read(model, random_ids(config, 1, 4)[0].tolist()), exact_activations(case)
    assert len(model.hook_names) == 4 + 18 * config.n_layer
    assert list(found)[:-1] == sorted(model.hook_names, key=list(found).index)
    assert set(found) == set(expected) == {*model.hook_names, "logits"}
    np.testing.assert_array_equal(found["lm_head"][0], found["logits"])
    for key, x in found.items():
        np.testing.assert_allclose(x, expected[key], rtol=0, atol=1e-4, err_msg=key)


def test_shapes_are_those_of_the_page(shakespeare: Model) -> None:
    ids = shakespeare.encode("To be, or not to be")
    config = shakespeare.config
    B, T, C, H, V = 1, len(ids), config.n_embd, config.n_head, config.vocab_size
    heads, square, rows = (B, H, T, C // H), (B, H, T, T), (B, T, C)
    expected = {
        "wte": rows, "wpe": rows, "h.0.resid_pre": rows, "h.0.ln_1": rows,
        "h.0.attn.c_attn": (B, T, 3 * C), "h.0.attn.q": heads, "h.0.attn.k": heads,
        "h.0.attn.v": heads, "h.0.attn.keys": heads, "h.0.attn.values": heads,
        "h.0.attn.scores": square, "h.0.attn.pattern": square, "h.0.attn.z": rows,
        "h.0.attn.c_proj": rows, "h.0.resid_mid": rows, "h.0.ln_2": rows,
        "h.0.mlp.c_fc": (B, T, 4 * C), "h.0.mlp.act": (B, T, 4 * C), "h.0.mlp.c_proj": rows,
        "h.0.resid_post": rows, "ln_f": rows, "lm_head": (B, T, V),
    }  # fmt: skip
    found = read(shakespeare, ids, list(expected))
    assert {name: found[name].shape for name in expected} == expected
    pattern = found["h.0.attn.pattern"]
    np.testing.assert_allclose(pattern.sum(axis=-1), 1, rtol=1e-6)
    assert not np.triu(pattern, 1).any()


# Patches


def test_patching_an_activation_with_itself_changes_no_bit(backend: Backend) -> None:
    """All of them at once with those of an earlier run, and each one with a copy of itself."""
    model = make_model(TINY, backend)
    earlier = read(model, IDS)
    stored = {name: x for name, x in earlier.items() if name != "logits"}
    with model.hooks({name: lambda x, site: backend.asarray(stored[site.name]) for name in stored}):
        np.testing.assert_array_equal(model.logits(IDS), earlier["logits"])
    one_layer = [name for name in stored if "." not in name or name.startswith("h.1.")]
    for name in one_layer if backend.name != "cupy" else ["h.1.attn.pattern", "h.1.attn.q"]:
        once = read(model, IDS, name)["logits"]
        with model.hooks({name: copied(model)}):
            np.testing.assert_array_equal(model.logits(IDS), once, err_msg=name)


@pytest.mark.parametrize("name", OP_BY_OP)
def test_hooks_run_the_ops_of_the_pass_without_hooks(name: str) -> None:
    model = make_model(TINY, make_backend(name))
    logits = model.logits(IDS)
    for key in model.hook_names:
        if not key.endswith((".scores", ".pattern")) or "generic" in name or name == "strict":
            np.testing.assert_array_equal(read(model, IDS, key)["logits"], logits, err_msg=key)


def test_a_replaced_activation_is_that_of_all_later_ops(backend: Backend) -> None:
    model, other = make_model(TINY, backend), IDS[::-1]
    stored = read(model, other)
    for name in ("h.0.resid_pre", "h.0.resid_mid", "h.0.resid_post", "ln_f", "lm_head"):
        with model.hooks({name: lambda x, site: backend.asarray(stored[site.name])}):
            np.testing.assert_allclose(model.logits(IDS), stored["logits"], rtol=0, atol=1e-5)


def test_logits_from_a_result_on(backend: Backend) -> None:
    model = make_model(TINY, backend)
    found = read(model, IDS, ["h.1.resid_post", "ln_f"])
    with backend.scope():
        for name in ("h.1.resid_post", "ln_f"):
            logits = logits_from(model.gpt2, name, backend.asarray(found[name]))
            np.testing.assert_array_equal(backend.to_numpy(logits)[0], found["logits"])


# TransformerLens and transformers


@pytest.fixture(scope="module")
def lens() -> Any:
    with np.load(GOLDEN / "lens.npz") as data:
        return {name: data[name] for name in data.files}


GOLDEN_RUNS = [(case, name) for case in LENS_CASES for name in ("numpy", "mlx", "strict")]
GOLDEN_RUNS += [("gelu_new", "cupy-cpu"), ("gelu", "cupy-cpu")]


@pytest.mark.parametrize(("case", "name"), GOLDEN_RUNS)
def test_activations_equal_those_of_transformer_lens(case: str, name: str, lens: Any) -> None:
    config = LENS_CASES[case]
    assert checksum(drawn_weights(config)) == int(lens[f"{case}.crc"])
    expected = {
        key.removeprefix(f"{case}."): x for key, x in lens.items() if key.startswith(f"{case}.")
    }
    expected = {key: x for key, x in expected.items() if "hook_" in key}
    model = make_model(config, make_backend(name))
    if case in ("unscaled", "n-inner"):  # settings that TransformerLens's GPT-2 does not have
        assert not expected
        return
    names = {key.format(i) for key in LENS_NAMES for i in range(config.n_layer)}
    assert set(expected) == names  # of all of its hooks but `hook_scale`
    ids = lens[f"{case}.ids"][0].tolist()
    found = read(model, ids, list(expected))
    for key, x in expected.items():
        np.testing.assert_allclose(found[key], x, rtol=0, atol=1e-4, err_msg=key)


@pytest.mark.parametrize("name", ["numpy", "mlx", "strict", "cupy-cpu"])
def test_replaced_activations_equal_those_of_transformer_lens(name: str, lens: Any) -> None:
    for case in ("gelu_new", "124M") if name != "cupy-cpu" else ("gelu_new",):
        model = make_model(LENS_CASES[case], make_backend(name))
        xp, asarray = model.backend.xp, model.backend.asarray
        ids = lens[f"{case}.ids"][0].tolist()

        def ablate(z: Any, xp: Any = xp, asarray: Any = asarray) -> Any:
            return xp.where(asarray(np.arange(z.shape[2]))[:, None] == HEAD, xp.zeros_like(z), z)

        with model.hooks({f"blocks.{LAYER}.attn.hook_z": ablate}):
            logits = model.logits(ids)
        np.testing.assert_allclose(logits, lens[f"{case}.ablated"], rtol=0, atol=1e-4)
        place = f"blocks.{LAYER}.hook_resid_post"
        other = asarray(read(model, ids[::-1], place)[place])

        def patch(x: Any, xp: Any = xp, asarray: Any = asarray, other: Any = other) -> Any:
            return xp.where(asarray(np.arange(x.shape[1]))[:, None] == TOKEN, other, x)

        with model.hooks({place: patch}):
            logits = model.logits(ids)
        np.testing.assert_allclose(logits, lens[f"{case}.patched"], rtol=0, atol=1e-4)


# Prompts and decoding


def test_hooks_see_prompts_and_each_decode_step(backend: Backend) -> None:
    model = make_model(TINY, backend)
    calls: list[tuple[Any, ...]] = []

    def hook(x: Any, site: Site) -> None:
        calls.append((site.name, site.layer, tuple(x.shape), site.positions.tolist()))

    plain = model.generate(IDS[:3], max_tokens=3).tokens
    names = ["h.1.attn.pattern", "lm_head"]
    with model.hooks(dict.fromkeys(names, hook)):
        assert model.generate(IDS[:3], max_tokens=3).tokens == plain
    H, V = TINY.n_head, TINY.vocab_size
    assert calls == [
        ("h.1.attn.pattern", 1, (1, H, 3, 3), [[0, 1, 2]]),
        ("lm_head", None, (1, 1, V), [[2]]),
        ("h.1.attn.pattern", 1, (1, H, 1, 4), [[3]]),
        ("lm_head", None, (1, 1, V), [[3]]),
        ("h.1.attn.pattern", 1, (1, H, 1, 5), [[4]]),
        ("lm_head", None, (1, 1, V), [[4]]),
    ]


def test_a_replaced_activation_changes_prompts_and_decoding(backend: Backend) -> None:
    """Logits that prefer the token after the number of the position."""
    model = make_model(TINY, backend)

    def prefer(x: Any, site: Site) -> Any:
        hot = np.arange(TINY.vocab_size) == site.positions[..., None] + 10
        return site.backend.asarray(np.where(hot, 50.0, 0.0), "float32")

    with model.hooks({"lm_head": prefer}):
        results = model.generate([IDS[:3], IDS[:1]], max_tokens=3)
    assert [r.tokens for r in results] == [[12, 13, 14], [10, 11, 12]]


def test_cached_equals_uncached_with_hooks(backend: Backend) -> None:
    """A replaced key is in the cache; a pattern covers all cached tokens."""
    model, xp = make_model(TINY, backend), backend.xp
    hooks = {"h.0.attn.k": lambda x: 0.5 * x, "h.1.attn.pattern": lambda x: x * x}
    hooks |= {"h.1.attn.keys": lambda x: -x, "h.0.attn.values": lambda x: 2.0 * x}
    with model.hooks(hooks), backend.scope():
        whole = np.array(backend.to_numpy(all_logits(model.gpt2, IDS)))
        cache = KVCache(TINY, backend, 1, len(IDS))
        steps = [next_token_logits(model.gpt2, [IDS[:2]], cache)]
        steps += [next_token_logits(model.gpt2, [[id]], cache) for id in IDS[2:]]
        found = np.array(backend.to_numpy(xp.concat(steps)))
    np.testing.assert_allclose(found, whole[1:], rtol=0, atol=1e-5)
    assert np.abs(whole - model.logits(IDS)).max() > 1e-3


def test_a_quantized_model_has_hooks() -> None:
    for name in ("numpy", "mlx", "strict", "cupy-cpu"):
        config = LENS_CASES["124M"]
        model = make_model(config, make_backend(name), quantization=Quantization(32, 8))
        ids = random_ids(config, 1, 4)[0].tolist()
        found = read(model, ids)
        assert set(found) == {*model.hook_names, "logits"}
        np.testing.assert_allclose(found["logits"], model.logits(ids), rtol=0, atol=0.02)
        stored = {key: x for key, x in found.items() if key != "logits"}
        asarray = model.backend.asarray
        with model.hooks(
            dict.fromkeys(stored, lambda x, site, a=asarray, s=stored: a(s[site.name]))
        ):
            np.testing.assert_array_equal(model.logits(ids), found["logits"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_hooks_in_16_bits(dtype: str) -> None:
    model = make_model(TINY, make_backend("mlx", dtype=dtype))
    logits = read(model, IDS)["logits"]
    with model.hooks({"*": lambda x: x * 1.0}):
        np.testing.assert_array_equal(model.logits(IDS), logits)


# The compiled path, and the context


def test_a_model_without_hooks_is_compiled() -> None:
    """Before, and after; within the context it is another object, which is not."""
    model = make_model(TINY, make_backend("numpy"))
    before, compiled = model.gpt2, model.gpt2.forward
    assert isinstance(compiled, CompiledForward)
    with model.hooks({"ln_f": lambda x: None}) as same:
        assert same is model
        assert isinstance(model.gpt2, HookedTransformer)
        assert not isinstance(model.gpt2.forward, CompiledForward)
        model.logits(IDS)
    assert model.gpt2 is before
    assert model.gpt2.forward is compiled
    with model.hooks({}):
        assert model.gpt2 is before


def test_a_model_without_hooks_is_never_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(TINY, make_backend("numpy"))
    with model.hooks({"ln_f": lambda x: None}):
        model.generate(IDS, max_tokens=2)
    expected = model.generate(IDS, max_tokens=3).tokens

    def refuse(*_: Any) -> None:
        raise AssertionError("a replay")

    monkeypatch.setattr("gptx.backends.replay.Replay.__init__", refuse)
    assert model.generate(IDS, max_tokens=3).tokens == expected
    with pytest.raises(AssertionError, match="a replay"), model.hooks({"ln_f": print}):
        model.generate(IDS, max_tokens=2)


def test_nested_hooks_run_in_order() -> None:
    model = make_model(TINY, make_backend("numpy"))
    seen: list[float] = []

    def add(x: Any) -> Any:
        return x * 0 + 1

    def look(x: Any) -> None:
        seen.append(float(x.max()))

    with model.hooks({"h.0.resid_post": add}), model.hooks({"h.1.resid_pre": look}):
        model.logits(IDS)
    with model.hooks({"blocks.0.hook_resid_post": look, "h.1.resid_pre": add}):
        model.logits(IDS)
    assert seen[0] == 1 != seen[1]


def test_an_exception_in_a_hook_ends_the_hooks() -> None:
    model = make_model(TINY, make_backend("numpy"))
    logits, tokens = model.logits(IDS), model.generate(IDS, max_tokens=3).tokens

    def fail(x: Any) -> None:
        raise KeyError("own error")

    with pytest.raises(KeyError, match="own error"), model.hooks({"h.1.ln_2": fail}):
        model.generate(IDS, max_tokens=2)
    np.testing.assert_array_equal(model.logits(IDS), logits)
    assert model.generate(IDS, max_tokens=3).tokens == tokens


def test_a_stream_keeps_its_hooks() -> None:
    model = make_model(TINY, make_backend("numpy"))
    calls: list[int] = []
    with model.hooks({"ln_f": lambda x: calls.append(1)}):
        chunks = model.stream(IDS, max_tokens=3)
    assert isinstance(model.gpt2.forward, CompiledForward)
    assert len(list(chunks)) == len(calls) == 3


def test_a_model_may_be_closed_within_hooks() -> None:
    model = make_model(TINY, make_backend("numpy"))
    with model.hooks({"ln_f": lambda x: None}):
        model.close()
    with pytest.raises(ParameterError, match="closed"):
        model.logits(IDS)
    with pytest.raises(ParameterError, match="closed"):
        model.hooks({"ln_f": print})


@pytest.mark.parametrize("name", ["numpy", "mlx"])
def test_the_last_reference_frees_the_weights_of_a_hooked_model(name: str) -> None:
    gc.disable()
    try:
        model = make_model(TINY, make_backend(name), random_weights(TINY))
        weight = weakref.ref(model.gpt2.weights.h[0].mlp.c_fc.weight)
        with model.hooks({"*": lambda x: x}):
            model.generate(IDS, max_tokens=2)
        del model
        assert weight() is None
    finally:
        gc.enable()


# Names and patterns


def test_patterns_match_names_here_first() -> None:
    gpt2 = make_model(TINY, make_backend("numpy")).gpt2

    def names(*patterns: str) -> list[str]:
        hooked = with_hooks(gpt2, dict.fromkeys(patterns, print))
        assert isinstance(hooked, HookedTransformer)
        return [hook.name for hook in hooked.hooks]

    assert names("h.*.resid_post") == ["h.0.resid_post", "h.1.resid_post"]
    assert names("h.1.*.c_proj") == ["h.1.attn.c_proj", "h.1.mlp.c_proj"]
    assert names("blocks.*.hook_mlp_out") == ["blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out"]
    assert names("w?e", "ln_f", "w[tp]e") == ["wte", "wpe", "ln_f", "wte", "wpe"]
    assert len(names("*")) == 4 + 2 * 18


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("h.0.mlp.acts", "did you mean 'h.0.mlp.act'?"),
        ("blocks.1.hook_resid_pst", "did you mean 'blocks.1.hook_resid_post'?"),
        ("transformer.h.0.attn.c_attn", "did you mean 'h.0.attn.c_attn'?"),
        ("h.7.resid_post", "its layers are 0 to 1"),
        ("blocks.7.hook_resid_post", "its layers are 0 to 1"),
        ("blocks.0.ln1.hook_scale", "did you mean"),
        ("zzz", "expected a name such as 'h.0.resid_post', see Model.hook_names"),
        ("", "expected a name such as"),
        (3, "is 3, expected a text"),
    ],
)
def test_an_unknown_name_is_refused(name: Any, message: str) -> None:
    model = make_model(TINY, make_backend("numpy"))
    with pytest.raises(ParameterError) as error:
        model.hooks({name: print})
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    "hook",
    [None, 3, "h.0.ln_1", lambda: None, lambda a, b, c: None, lambda x, *, site: None],
)
def test_a_hook_is_a_function_of_one_or_two_arguments(hook: Any) -> None:
    model = make_model(TINY, make_backend("numpy"))
    with pytest.raises(ParameterError, match="expected a function of an array"):
        model.hooks({"ln_f": hook})


def test_hooks_are_a_dict() -> None:
    model = make_model(TINY, make_backend("numpy"))
    with pytest.raises(ParameterError, match="expected a dict of names and functions"):
        model.hooks(["ln_f"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "hook",
    [[].append, print, lambda *xs: None, lambda x, site=None: None, lambda x, /: None, np.shape],
)
def test_functions_of_one_array_get_no_site(hook: Any) -> None:
    model = make_model(TINY, make_backend("numpy"))
    hooked = with_hooks(model.gpt2, {"ln_f": hook})
    assert isinstance(hooked, HookedTransformer)
    assert [bound.n_arguments for bound in hooked.hooks] == [1]


# Results of hooks


def other_dtype(x: Any, xp: Any) -> Any:
    return xp.astype(x, xp.float16 if hasattr(xp, "float16") else xp.float64)


WRONG: dict[str, Callable[[Any, Any], Any]] = {
    "shape": lambda x, xp: x[:, :1, ...],
    "axes": lambda x, xp: x[0, ...],
    "dtype": other_dtype,
    "number": lambda x, xp: 0.0,
    "list": lambda x, xp: [1.0],
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_result_of_another_shape_or_dtype_is_refused(kind: str, library: Backend) -> None:
    model = make_model(TINY, library)
    logits = model.logits(IDS)
    hooks = {"h.1.mlp.act": lambda x: WRONG[kind](x, library.xp)}
    message = r"the hook of h.1.mlp.act returned .* expected"
    with pytest.raises(ParameterError, match=message) as e, model.hooks(hooks):
        model.generate(IDS, max_tokens=2)
    assert "\n" not in str(e.value)
    np.testing.assert_array_equal(model.logits(IDS), logits)


def test_an_array_of_another_library_is_refused() -> None:
    model = make_model(TINY, make_backend("mlx"))
    wrong = model.hooks({"ln_f": lambda x: np.array(x)})
    with pytest.raises(ParameterError, match="returned numpy's ndarray float32"), wrong:
        model.logits(IDS)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("h.0.resid_post", float("nan")),
        ("h.1.attn.scores", float("inf")),
        ("blocks.0.attn.hook_q", -float("inf")),
    ],
)
def test_a_result_that_is_not_finite_is_refused(name: str, number: float, library: Backend) -> None:
    model = make_model(TINY, library)
    logits = model.logits(IDS)
    wrong = model.hooks({name: lambda x: library.xp.zeros_like(x) + number})
    message = f"the hook of {name} returned a NaN or an infinity"
    with pytest.raises(NonFiniteError, match=message) as e, wrong:
        model.generate(IDS, max_tokens=2)
    assert e.value.exit_code == 70
    np.testing.assert_array_equal(model.logits(IDS), logits)


def test_scores_may_hide_some_positions_but_not_all(library: Backend) -> None:
    model, xp = make_model(TINY, library), library.xp
    first = library.asarray(np.arange(len(IDS))) == 0

    def only_the_first(x: Any) -> Any:
        return xp.where(first, x, xp.zeros_like(x) - float("inf"))

    patterns: list[Any] = []
    with model.hooks({"h.0.attn.scores": only_the_first, "h.0.attn.pattern": patterns.append}):
        model.logits(IDS)
    expected = np.broadcast_to(np.arange(len(IDS)) == 0, (1, TINY.n_head, len(IDS), len(IDS)))
    np.testing.assert_array_equal(library.to_numpy(patterns[0]), expected)
    wrong = model.hooks({"h.0.attn.scores": lambda x: xp.zeros_like(x) - float("inf")})
    with pytest.raises(NonFiniteError, match="or -inf for some of the positions"), wrong:
        model.logits(IDS)


def test_a_hook_is_not_blamed_for_a_damaged_model() -> None:
    weights = {name: x.copy() for name, x in random_weights(TINY).items()}
    weights["h.0.mlp.c_fc.weight"][0, 0] = np.nan
    model = make_model(TINY, make_backend("numpy"), weights)
    hooks = model.hooks({"ln_f": lambda x: x + 1})
    with pytest.raises(NonFiniteError, match="its weights are damaged"), hooks:
        model.generate(IDS, max_tokens=2)


def test_a_prompt_with_a_cache_is_hooked_after_the_cache() -> None:
    model = make_model(TINY, make_backend("numpy"))
    cache = model.prefill(IDS[:3])
    positions: list[list[int]] = []
    with model.hooks({"h.0.ln_1": lambda x, site: positions.append(site.positions.tolist())}):
        model.generate(IDS, cache=cache, max_tokens=1)
    assert positions == [[[3, 4]]]


def test_gptx_load_has_hooks() -> None:
    model = gptx.load("shakespeare", backend="numpy")
    with model.hooks({"h.*.mlp.act": lambda x: 0 * x}):
        changed = model.generate("ROMEO:", max_tokens=5).tokens
    assert changed != model.generate("ROMEO:", max_tokens=5).tokens
