"""`gptx verify`: a comparison of two models, of any formats."""

from __future__ import annotations

from dataclasses import asdict

import click

from gptx.cli.formatting import print_json
from gptx.cli.options import complete_model, config_option, json_option, offline_option
from gptx.conversions import read
from gptx.conversions.checkpoint import Checkpoint
from gptx.conversions.verify import PROMPT_LENGTH, Comparison, compare
from gptx.errors import ConfigError

DIFFERENT = 1  # the exit code for a difference, as in cmp and diff
MAX_TENSORS_SHOWN = 10


@click.command()
@click.argument("a", shell_complete=complete_model)
@click.argument("b", shell_complete=complete_model)
@config_option
@offline_option
@json_option
def verify(a: str, b: str, config: str | None, offline: bool, as_json: bool) -> None:
    """Compare two models: configuration, tokenizer, tensors and logits.

    A and B are files or folders of any format (see gptx convert --list), embedded models or Hub
    ids. The logits are those of a fixed prompt. Of the tokenizers, everything that decides the
    token ids of a text, or the text of token ids, is compared.

    The exit code is 0 if the models are the same, except for rounding to the types in which they
    are stored; 1 if they differ. A model without a tokenizer, as some formats store it, may be the
    same as one with a tokenizer; a line says so.

    \b
    Example:
      gptx verify gpt2 model.gguf
    """
    models = [_open(source, config, offline) for source in (a, b)]
    result = compare(*models)
    if as_json:
        print_json({"same": result.same, "identical": result.identical, **asdict(result)})
    else:
        click.echo(_text(result))
    if not result.same:
        raise click.exceptions.Exit(DIFFERENT)


def _open(source: str, config: str | None, offline: bool) -> Checkpoint:
    """Open a model; use `config` only if the model's files have no complete configuration."""
    try:
        checkpoint = read(source, offline=offline)[1]
    except ConfigError:
        if config is None:
            raise
    else:
        if config is None or not checkpoint.notes:
            return checkpoint
    return read(source, config=config, offline=offline)[1]


def _text(result: Comparison) -> str:
    lines = [f"{name}: {x} in A, {y} in B" for name, (x, y) in result.config.items()]
    lines += [
        f"tokenizer: {part}: {x} in A, {y} in B"
        for part, (x, y) in result.tokenizer_differences.items()
    ]
    if models := " and ".join(result.without_tokenizer):
        lines.append(f"tokenizer: not compared, none that gptx reads in {models}")
    differing = {name: d for name, d in result.tensors.items() if d.largest != 0}
    if differing:
        lines.append(f"{'tensor':<28} {'largest difference':>18} {'relative difference':>22}")
        by_size = sorted(differing.items(), key=lambda item: -item[1].relative)
        for name, d in by_size[:MAX_TENSORS_SHOWN]:
            rest = "" if d.rounded else "  more than rounding"
            lines.append(f"{name:<28} {d.largest:>18.3g} {d.relative:>22.3g}{rest}")
        if (more := len(differing) - MAX_TENSORS_SHOWN) > 0:
            lines.append(f"... and {more} more")
    if result.logits is not None:
        lines.append(
            f"logits of a fixed prompt of {PROMPT_LENGTH} tokens: largest difference "
            f"{result.logits:.3g}, the same next token at {result.agreement:.0%} of the positions"
        )
    if result.identical:
        verdict = f"the same: all {len(result.tensors)} tensors, bit for bit"
    elif result.same:
        verdict = "the same, except for rounding to the types in which they are stored"
    else:
        verdict = "different"
    return "\n".join([*lines, verdict])
