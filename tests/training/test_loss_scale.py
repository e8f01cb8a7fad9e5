"""gptx.training.loss_scale: the scale of the loss in float16."""

from __future__ import annotations

from gptx.training.loss_scale import FIRST, GROWTH_STEPS, LossScale


def test_only_float16_has_a_scale() -> None:
    for dtype in ("float32", "float64", "bfloat16"):
        scale = LossScale.of(dtype)
        assert scale.value == 1
        assert not scale.can_fall
        assert scale.after_step(is_finite=False) == scale
    assert LossScale.of("float16").value == FIRST


def test_an_overflow_halves_the_scale_to_a_limit() -> None:
    scale = LossScale.of("float16")
    values = []
    while scale.can_fall:
        scale = scale.after_step(is_finite=False)
        values.append(scale.value)
    assert values == [FIRST / 2**i for i in range(1, 17)]
    assert scale.after_step(is_finite=False).value == 1


def test_finite_steps_in_a_row_double_the_scale() -> None:
    scale = LossScale.of("float16")
    for _ in range(GROWTH_STEPS - 1):
        scale = scale.after_step(is_finite=True)
    assert scale.value == FIRST
    assert scale.after_step(is_finite=True) == LossScale(2 * FIRST, 0, True)
    scale = scale.after_step(is_finite=False).after_step(is_finite=True)
    assert scale == LossScale(FIRST / 2, 1, True)
