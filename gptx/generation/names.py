"""Names of options: an unknown one is an error that says what to use.

People know names of transformers, llama.cpp, mlx-lm, vLLM, OpenAI's API and others.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping

from gptx.errors import ParameterError

# Option -> its names in other libraries.
SYNONYMS = {
    "max_tokens": "max_new_tokens max_completion_tokens max_output_tokens max_gen_len max_length "
    "n_predict num_predict num_tokens new_tokens",
    "temperature": "temp",
    "top_k": "topk top_tokens",
    "top_p": "topp nucleus",
    "min_p": "minp",
    "repetition_penalty": "repeat_penalty rep_pen",
    "logit_bias": "sequence_bias logits_bias bad_words_ids suppress_tokens",
    "seed": "random_seed rng_seed random_state generator rng manual_seed",
    "stop": "stops stop_sequences stop_strings stop_words stop_tokens stopping_criteria",
    "overflow": "truncation truncate",
    "logprobs": "top_logprobs n_probs output_scores output_logits return_logprobs",
    "allow_special": "parse_special add_special_tokens special",
    "batch_size": "batch max_batch_size",
    "cache": "past_key_values prompt_cache kv_cache",
    "backend": "framework xp",
    "dtype": "torch_dtype precision type",
    "device": "device_map",
    "threads": "num_threads n_threads nthreads",
    "compile": "jit torch_compile",
    "cache_dtype": "cache_type type_k type_v kv_bits",
    "quantize": "quantise quantization quantization_config quant bits load_in_8bit load_in_4bit",
    "group_size": "q_group_size",
    "offline": "local_files_only local_only",
    "token": "use_auth_token auth_token hf_token",
}
OPTIONS = {other: name for name, others in SYNONYMS.items() for other in others.split()}

_COPIES = "give a list with several copies of the prompt; each copy gets another text"
_NOT_NEEDED = "leave it out, prompts of different lengths need no padding"
_CONTEXT = "leave it out, the context is that of the model"
# Names that no single option replaces -> the way in gptx.
ADVICE = {
    "do_sample": "a temperature above 0 samples, 0 takes the most probable token",
    "greedy": "a temperature of 0 takes the most probable token",
    "n": _COPIES,
    "num_return_sequences": _COPIES,
    "num_samples": _COPIES,
    "best_of": _COPIES,
    "num_beams": "leave it out, there is no beam search",
    "eos_token_id": "leave it out, the config of the model has its ends of text; stop takes "
    "strings, ignore_eos=True ends at no token",
    "pad_token_id": _NOT_NEEDED,
    "padding": _NOT_NEEDED,
    "attention_mask": _NOT_NEEDED,
    "stream": "call stream(prompt), which yields a chunk for each token",
    "streamer": "call stream(prompt), which yields a chunk for each token",
    "echo": "print result.prompt and result.text",
    "return_full_text": "print result.prompt and result.text",
    "input_ids": "give the token ids as the prompt",
    "inputs": "give them as the prompt",
    "messages": "GPT-2 has no chat format; give one text as the prompt",
    "use_cache": "leave it out, keys and values are always cached",
    "n_ctx": _CONTEXT,
    "max_seq_len": _CONTEXT,
    "max_model_len": _CONTEXT,
    "trust_remote_code": "leave it out, gptx runs no code of a model",
    "cache_dir": "set HF_HUB_CACHE in the environment",
}

MIN_LIKENESS = 0.6  # of difflib's ratio, 0 to 1


def check_names(
    given: Iterable[str], known: Collection[str], elsewhere: Mapping[str, str] | None = None
) -> None:
    """Raise ParameterError for the first name of an option that a call does not have.

    Parameters
    ----------
    given, known
        Names in the call, and those that it takes.
    elsewhere
        Name -> another call that takes it.
    """
    for name in given:
        if name not in known:
            advice = _advice(name, known, elsewhere or {})
            raise ParameterError(f"unknown option {name}: {advice}")


def _advice(name: str, known: Collection[str], elsewhere: Mapping[str, str]) -> str:
    option = name if name in elsewhere else OPTIONS.get(name.lower(), name)
    if option in known:
        return f"did you mean {option}?"
    if option in elsewhere:
        return f"give {option} to {elsewhere[option]}"
    if name in ADVICE:
        return ADVICE[name]
    if close := difflib.get_close_matches(name, known, 1, MIN_LIKENESS):
        return f"did you mean {close[0]}?"
    return f"expected {', '.join(known)}"
