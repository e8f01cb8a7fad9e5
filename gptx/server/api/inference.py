"""`POST /model_inference`: the greedy continuation of token ids, as an Ok or an Err."""

from __future__ import annotations

from typing import Any

from gptx.errors import GptxError
from gptx.generation.options import Options
from gptx.server.api.calls import Call, Limits, collect
from gptx.server.api.completions import TEXT, make_call
from gptx.server.api.fields import Field, Many, Number, Record, Text, Whole
from gptx.server.api.parameters import (
    MAX_BUDGET_SECONDS,
    MAX_COUNT,
    MAX_IDS,
    check_state,
    model_field,
)
from gptx.server.errors import ApiError, api_error
from gptx.server.logs import Record as LogRecord
from gptx.server.scheduler import Scheduler
from gptx.server.settings import Settings
from gptx.server.states import States

INFERENCE = Record(
    (
        model_field(),
        Field("max_tokens", Whole(1, MAX_COUNT), "Limit of new tokens."),
        Field("tokens", Many(Whole(0, MAX_COUNT), MAX_IDS, 1), "Token ids."),
        Field(
            "budget",
            Number(0, MAX_BUDGET_SECONDS, exclusive=True),
            "Seconds after which the call returns what it has, and a state that continues it.",
        ),
        Field("state", Text(1), "State of an earlier call, which this one continues."),
    )
)


async def infer(
    scheduler: Scheduler,
    values: dict[str, Any],
    limits: Limits,
    settings: Settings,
    states: States[Call],
    record: LogRecord,
) -> tuple[int, dict[str, Any]]:
    """Return the status and the answer: new token ids in Ok, or the message of an error in Err."""
    try:
        if (state := values.get("state")) is not None:
            check_state(values)
            call = states.take(state, limits.salt)
        else:
            for name in ("max_tokens", "tokens"):
                if name not in values:
                    raise ApiError(400, f"{name} is missing", param=name, code="missing_field")
            options = Options(n=1, max_tokens=values["max_tokens"], temperature=0.0)
            call = make_call(
                TEXT, scheduler, "", [values["tokens"]], options, settings, may_shorten=True
            )
        call.begin(state)
        [delta] = await collect(call, limits, states, record)
    except (ApiError, GptxError) as error:
        answer = api_error(error)
        return answer.status, {"Err": answer.message}
    answer_ids = {"Ok": delta.ids}
    return 200, answer_ids if call.state is None else {**answer_ids, "state": call.state}
