"""`POST /v1/embeddings`: a vector for each text, the mean of the last hidden states."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import numpy as np

from gptx.generation.prompts import check_ids
from gptx.generation.request import encode_prompt
from gptx.generation.text_model import Model
from gptx.research.activations import pooled
from gptx.server.api.fields import Choice, Field, Flag, Prompts, Record, Whole
from gptx.server.api.parameters import MAX_COUNT, ignored_fields, model_field
from gptx.server.errors import ApiError
from gptx.server.scheduler import Scheduler
from gptx.server.settings import Settings

ACTIVATION = "ln_f"  # the result of the last layer norm


def embedding_fields(settings: Settings) -> Record:
    """Return the fields of a request."""
    return Record(
        (
            model_field(),
            Field(
                "input",
                Prompts(settings.max_prompts),
                "Text, list of token ids, or list of those.",
                required=True,
            ),
            Field("encoding_format", Choice(("float", "base64")), "Form of the vectors.", "float"),
            Field("dimensions", Whole(1, MAX_COUNT), "The width of the model, if it is given."),
            Field("allow_special", Flag(), "Read <|endoftext|> in texts as that token."),
            *ignored_fields(),
        )
    )


async def embeddings(scheduler: Scheduler, name: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return the vectors; each text is a call of its own, between steps of the engine.

    Raises
    ------
    ApiError, GptxError
        A text is too long, or the server is overloaded.
    """
    info = scheduler.model.info
    width, context = info.config.n_embd, info.config.n_positions
    if values.get("dimensions", width) != width:
        raise ApiError(
            400, f"dimensions is {values['dimensions']}, expected {width}, the width of the model",
            param="dimensions", code="invalid_value",
        )  # fmt: skip
    all_ids = [
        check_ids(encode_prompt(info, one, values.get("allow_special", False)),
                  info.config.vocab_size)
        for one in values["input"]
    ]  # fmt: skip
    if max(map(len, all_ids)) > context:
        raise ApiError(
            400, f"input has {max(map(len, all_ids))} tokens, the context holds {context}",
            param="input", code="context_length_exceeded",
        )  # fmt: skip
    data = []
    for index, ids in enumerate(all_ids):

        def embed(model: Model, ids: list[int] = ids) -> np.ndarray:
            return pooled(model, ids, ACTIVATION, "mean")

        vector = (await asyncio.wrap_future(scheduler.call(embed))).astype("<f4")
        is_base64 = values["encoding_format"] == "base64"
        data.append(
            {
                "object": "embedding",
                "index": index,
                "embedding": base64.b64encode(vector.tobytes()).decode()
                if is_base64
                else vector.tolist(),
            }
        )
    n_tokens = sum(map(len, all_ids))
    return {
        "object": "list",
        "data": data,
        "model": name,
        "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens},
    }
