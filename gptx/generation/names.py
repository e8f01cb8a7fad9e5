"""Names of options: an unknown one is an error that says what to use.

The tables have names of transformers, llama.cpp, vLLM, mlx-lm, OpenAI's API and others.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from gptx.errors import ParameterError

# Option -> its names in other libraries.
SYNONYMS = {
    "max_tokens": "max_new_tokens max_completion_tokens max_output_tokens max_gen_len "
    "n_predict num_predict num_tokens new_tokens",
    "temperature": "temp",
    "top_k": "topk top_tokens",
    "top_p": "topp nucleus",
    "min_p": "minp",
    "typical_p": "typical",
    "repetition_penalty": "repeat_penalty rep_pen",
    "logit_bias": "logits_bias",
    "ban": "bad_words bad_words_ids suppress_tokens banned_strings custom_token_bans",
    "dry_range": "dry_penalty_last_n",
    "dry_sequence_breakers": "dry_sequence_breaker",
    "min_tokens": "min_new_tokens n_min",
    "logits_processor": "logits_processors",
    "n": "num_return_sequences num_samples n_completions",
    "stop_token_ids": "eos_token_id eos_token_ids",
    "prompt_logprobs": "return_prompt_logprobs",
    "seed": "random_seed rng_seed random_state generator rng manual_seed",
    "stop": "stops stop_sequences stop_strings stop_words stop_tokens stopping_criteria",
    "overflow": "truncation truncate",
    "logprobs": "top_logprobs n_probs output_scores output_logits return_logprobs",
    "allow_special": "parse_special special",
    "batch_size": "batch max_batch_size",
    "cache": "past_key_values prompt_cache kv_cache",
    "backend": "framework xp",
    "dtype": "torch_dtype precision type",
    "device": "device_map",
    "threads": "num_threads n_threads nthreads",
    "compile": "jit torch_compile",
    "cache_dtype": "cache_type kv_cache_dtype type_k type_v kv_bits",
    "quantize": "quantise quantization quantization_config quant bits q_bits load_in_8bit "
    "load_in_4bit",
    "group_size": "q_group_size",
    "offline": "local_files_only local_only",
    "token": "use_auth_token auth_token hf_token",
}
OPTIONS = {other: name for name, others in SYNONYMS.items() for other in others.split()}

# The way in gptx -> names that no single option replaces.
NAMES_BY_ADVICE = {
    "a temperature above 0 samples, 0 takes the most probable token": "do_sample greedy",
    "leave it out, there is no beam search": "num_beams num_beam_groups beam_size beam_width "
    "use_beam_search diversity_penalty length_penalty early_stopping",
    "leave it out, the filters of tokens are top_k, top_p, min_p and typical_p": "tfs_z "
    "epsilon_cutoff eta_cutoff top_n_sigma xtc_probability xtc_threshold mirostat mirostat_tau "
    "mirostat_eta dynatemp_range",
    "leave it out, the penalties are repetition_penalty, presence_penalty and frequency_penalty, "
    "of all tokens": "encoder_repetition_penalty repeat_last_n repetition_context_size "
    "penalty_alpha",
    "leave it out, logits_processor takes a function of the tokens and the logits": (
        "allowed_token_ids prefix_allowed_tokens_fn grammar json_schema guided_decoding "
        "response_format"
    ),
    "min_tokens is the least number of new tokens, the prompt not included": "min_length",
    "max_tokens is the limit of new tokens, the prompt not included": "max_length",
    "call stream(prompt), and stop the loop when the time is over": "max_time timeout",
    "leave it out, prompts of different lengths need no padding": "pad_token_id pad_token padding "
    "attention_mask",
    "leave it out, a prompt gets no token that is not in it": "add_special_tokens add_bos "
    "bos_token_id",
    "call stream(prompt), which yields a chunk for each token": "stream streamer",
    "print result.prompt and result.text; prompt_logprobs has the prompt's log-probabilities": (
        "echo return_full_text"
    ),
    "leave it out, a result has the text and the token ids": "return_dict_in_generate "
    "return_tensors skip_special_tokens detokenize",
    "give its values as options, such as temperature=0.8": "sampling_params sampler",
    "leave it out, the model itself computes each token": "assistant_model draft_model "
    "num_assistant_tokens num_draft_tokens prompt_lookup_num_tokens speculative_config",
    "give the token ids as the prompt": "input_ids prompt_token_ids",
    "give them as the prompt": "inputs prompts",
    "GPT-2 has no chat format; give one text as the prompt": "messages chat_format",
    "leave it out, keys and values are always cached": "use_cache cache_prompt",
    "leave it out, the context is that of the model": "n_ctx num_ctx max_seq_len max_model_len "
    "max_kv_size block_size",
    "leave it out, gptx runs no code of a model": "trust_remote_code",
    "set HF_HUB_CACHE in the environment": "cache_dir download_dir",
    "give backend='cupy' for an NVIDIA GPU, backend='mlx' for an Apple one": "n_gpu_layers gpu "
    "num_gpu",
    "leave it out, each backend has one attention": "attn_implementation flash_attn "
    "use_flash_attention_2",
    "leave it out, weights are mapped into memory where their format allows it": "use_mmap "
    "low_cpu_mem_usage",
    "leave it out, each format is known by its content": "use_safetensors load_format from_tf "
    "gguf_file",
    "give it as model": "model_path model_name model_id repo_id pretrained_model_name_or_path",
    "merge the adapter into its model, and load the result": "adapter_path adapter_name lora_path "
    "lora_request",
}
ADVICE = {name: advice for advice, names in NAMES_BY_ADVICE.items() for name in names.split()}

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
    from difflib import get_close_matches

    if close := get_close_matches(name, known, 1, MIN_LIKENESS):
        return f"did you mean {close[0]}?"
    return f"expected {', '.join(known)}"
