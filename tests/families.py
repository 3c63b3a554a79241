"""Tiny random students of the paper's two families, saved as the hub has the real ones.

Configuration, special tokens and generation defaults follow `meta-llama/Llama-3.2-1B-Instruct`
and `Qwen/Qwen3-1.7B`; weights are random, the vocabulary is small, and the chat templates are
written for these tests: each does the one thing that the real one is known to do.
"""

from pathlib import Path

import tracekd_utils as tk

# begins with the begin-of-text token, as the tokenizer does by itself, and tells the day
LLAMA_CHAT = (
    "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}"
    "{% endif %}{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nToday is "
    "{{ date_string }}.<|eot_id|>{% for m in messages %}<|start_header_id|>{{ m['role'] }}"
    "<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# puts an empty block of thought before an answer without one
QWEN3_CHAT = (
    "{% for m in messages %}{% if m['role'] == 'assistant' and '</think>' not in m['content'] %}"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n{{ m['content'] }}<|im_end|>\n{% else %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
LLAMA_TOKENS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
]
QWEN3_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def train_bpe(special):
    """Byte-level BPE of the microworld's text, with special tokens."""
    from tokenizers import ByteLevelBPETokenizer

    text = [
        f"Context:\n{p} went to the {w}.\n{p} took the {w}.\nQuestion: Where is {p}? <think>"
        f"Question type: {label}\nFacts:\n- </think>\n<answer>{w}; {t}</answer>"
        for p in tk.PEOPLE
        for w, t, label in zip(tk.PLACES, tk.THINGS, tk.QUESTION_TYPES * 2, strict=False)
    ]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        text, vocab_size=600, min_frequency=0, show_progress=False, special_tokens=special
    )
    return bpe._tokenizer


def make_llama(folder: Path) -> Path:
    """A Llama 3.2: begin-of-text by the tokenizer, three end tokens, no padding token."""
    import torch
    from tokenizers import processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = train_bpe(LLAMA_TOKENS)
    bpe.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A",
        pair="<|begin_of_text|> $A <|begin_of_text|>:1 $B:1",
        special_tokens=[("<|begin_of_text|>", bpe.token_to_id("<|begin_of_text|>"))],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        chat_template=LLAMA_CHAT,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
    )
    assert tokenizer.pad_token is None
    tokenizer.save_pretrained(folder)
    ends = tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"])
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            **SHAPE,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=ends,
            pad_token_id=None,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
            },
        )
    )
    model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9, eos_token_id=ends)
    model.save_pretrained(folder)
    return folder


def make_qwen3(folder: Path) -> Path:
    """A Qwen3: no begin token, two end tokens, one of which pads; <think> is a plain token."""
    import json

    import torch
    from tokenizers import AddedToken
    from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

    bpe = json.loads(train_bpe(QWEN3_TOKENS).to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=bpe["vocab"],
        merges=[tuple(m) for m in bpe["merges"]],
        chat_template=QWEN3_CHAT,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    tokenizer.add_tokens(
        [AddedToken(t, special=False, normalized=False) for t in ("<think>", "</think>")]
    )
    tokenizer.save_pretrained(folder)
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            head_dim=32,
            **SHAPE,
            eos_token_id=ends[0],
            pad_token_id=None,
            bos_token_id=None,
        )
    )
    model.generation_config.update(
        do_sample=True,
        temperature=0.6,
        top_k=20,
        top_p=0.95,
        eos_token_id=ends,
        pad_token_id=ends[1],
    )
    model.save_pretrained(folder)
    return folder


FAMILIES = {"llama": make_llama, "qwen3": make_qwen3}
ENDS = {
    "llama": ("<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"),
    "qwen3": ("<|im_end|>", "<|endoftext|>"),
}
