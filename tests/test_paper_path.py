"""The `paper` profile without its GPU: every object of that path, built and run on the CPU.

Students are tiny random ones of both families (`families.py`); what differs on a GPU
(optimiser, checkpointing, bf16 autocast) is taken from the very function that 03 uses.
"""

import dataclasses
import json
import math
import re

import pytest
import torch
import transformers.training_args
from conftest import make_workspace, notebook_functions, papermill
from families import ENDS, FAMILIES, LLAMA_CHAT, QWEN3_CHAT
from safetensors.torch import load_file
from test_student import make_lora, make_trainer, recipe

import tracekd_utils as tk

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
BOTH = pytest.mark.parametrize("family", sorted(FAMILIES))
SYSTEM = "You are an AI assistant."
# how the prompt of an example is written, and the options of its encoding; a protocol with its
# own way joins here
PATHS = {
    "prompt": ({}, {}),
    "chat": ({"direct": True}, {"chat": True}),
    "published": ({"protocol": "published"}, {"chat": True, "system": SYSTEM}),
}
EVERY_PATH = pytest.mark.parametrize("path", PATHS)


def encode_prompt(path, tokenizer, example):
    """Ids of an example's prompt."""
    written, options = PATHS[path]
    return tk.encode_prompt(tokenizer, tk.render_prompt(example, **written), **options)


def encode_row(path, tokenizer, example, target):
    """Ids and mask of an example's prompt with a target."""
    written, options = PATHS[path]
    return tk.encode_row(tokenizer, tk.render_prompt(example, **written), target, **options)


def as_row(pair):
    """A row that `collate` takes."""
    return dict(zip(("input_ids", "mask"), pair, strict=True))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {k: make(tmp_path_factory.mktemp("students") / k) for k, make in FAMILIES.items()}


@pytest.fixture(scope="module")
def loaded(folders):
    """{family: (model in NF4, tokenizer)}."""
    return {k: tk.load_student(str(folder)) for k, folder in folders.items()}


@pytest.fixture(scope="module")
def rows(corrupter, microworld):
    """40 rows of the condition `correct`, with their examples."""
    pool = corrupter.Pool(microworld)
    return [
        {
            "example": e,
            "prompt": tk.render_prompt(e),
            "target": tk.render_target(e, corrupter.make_trace(e, "correct", pool)),
        }
        for e in microworld[:40]
    ]


# ----------------------------------------------------------------------------- objects
@BOTH
def test_the_student_is_quantised_as_in_the_paper(loaded, family):
    model, tokenizer = loaded[family]
    linear = {n: m for n, m in model.named_modules() if type(m).__name__ == "Linear4bit"}
    assert sorted(n.rpartition(".")[2] for n in linear) == sorted(2 * tk.PROJECTIONS)
    for module in linear.values():
        state = module.weight.quant_state
        assert (state.quant_type, state.nested, state.blocksize) == ("nf4", True, 64)
        assert module.compute_dtype == tk.resolve_device()["dtype"]
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert type(model.get_output_embeddings()) is torch.nn.Linear
    assert model.config._attn_implementation == "sdpa" and not model.training
    assert tokenizer.eos_token == ENDS[family][0]
    assert tokenizer.pad_token == ENDS[family][0 if family == "llama" else 1]


def pretend(patch, device):
    """Let the helper and the Trainer's arguments take this machine for one with `device`."""
    patch.setattr(
        tk,
        "resolve_device",
        lambda dtype="auto": {"device": device, "dtype": torch.bfloat16, "reason": dtype},
    )
    patch.setattr(transformers.training_args, "is_torch_bf16_gpu_available", lambda: True)


@pytest.mark.parametrize(
    "device, optimiser, checkpointing",
    [("cpu", "adamw_torch", False), ("cuda", "paged_adamw_8bit", True)],
)
def test_the_device_chooses_optimiser_and_checkpointing(
    monkeypatch, tmp_path, device, optimiser, checkpointing
):
    pretend(monkeypatch, device)
    chosen = recipe.training_arguments(tmp_path, 40, learning_rate=2e-4)
    assert (chosen.optim.value, chosen.activation_checkpointing, chosen.bf16) == (
        optimiser,
        checkpointing,
        True,
    )


# ---------------------------------------------------------------------- tokens of templates
def naive(tokenizer, example, target):
    """What a plain use of the chat template gives: the whole dialogue, tokenised."""
    chat = [
        {"role": "user", "content": tk.render_prompt(example)},
        {"role": "assistant", "content": target},
    ]
    return tokenizer(tokenizer.apply_chat_template(chat, tokenize=False)).input_ids


@EVERY_PATH
def test_a_vanilla_target_holds_no_empty_thought(loaded, rows, path):
    tokenizer = loaded["qwen3"][1]
    assert tokenizer.chat_template == QWEN3_CHAT
    tags = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    assert tokenizer.convert_tokens_to_ids("no such token") not in tags
    for r in rows[:8]:
        vanilla = tk.render_target(r["example"], None)
        # the danger is real: the template by itself puts the empty block there
        assert [naive(tokenizer, r["example"], vanilla).count(t) for t in tags] == [1, 1]
        for target, expected in ((vanilla, [0, 0]), (r["target"], [1, 1])):
            ids, mask = encode_row(path, tokenizer, r["example"], target)
            completion = [i for i, m in zip(ids, mask, strict=True) if m]
            assert [completion.count(t) for t in tags] == expected
            assert tokenizer.decode(completion) == target + "<|im_end|>"
            prompt = encode_prompt(path, tokenizer, r["example"])
            assert ids[: len(prompt)] == prompt
            # the untuned student is told not to think: its template closes the thought
            told = tokenizer.decode(prompt).endswith("<think>\n\n</think>\n\n")
            assert told is (path == "chat")


@EVERY_PATH
def test_llama_reads_one_begin_of_text(loaded, rows, path):
    tokenizer = loaded["llama"][1]
    assert tokenizer.chat_template == LLAMA_CHAT
    begin = tokenizer.convert_tokens_to_ids("<|begin_of_text|>")
    for r in rows[:8]:
        assert naive(tokenizer, r["example"], r["target"]).count(begin) == 2  # the danger
        prompt = encode_prompt(path, tokenizer, r["example"])
        ids, mask = encode_row(path, tokenizer, r["example"], r["target"])
        assert prompt.count(begin) == ids.count(begin) == 1 and prompt[0] == begin == ids[0]
        assert ids[-1] == tokenizer.convert_tokens_to_ids("<|eot_id|>") and mask[-1]
        day = "Today is 26 Jul 2024." if path != "prompt" else ""  # not the day of the run
        assert day in tokenizer.decode(prompt)


@BOTH
@EVERY_PATH
def test_padding_is_not_learnt_and_the_end_is(loaded, rows, family, path):
    model, tokenizer = loaded[family]
    pairs = [encode_row(path, tokenizer, r["example"], r["target"]) for r in rows[:5]]
    batch = tk.collate([as_row(pair) for pair in pairs], tokenizer.pad_token_id)
    targets = [[i for i, m in zip(ids, mask, strict=True) if m] for ids, mask in pairs]
    assert batch["shift_labels"].tolist() == sum(targets, [])
    assert [t[-1] for t in targets] == [tokenizer.eos_token_id] * 5
    assert (batch["input_ids"] == tokenizer.pad_token_id).sum() > 5  # there was padding
    with torch.no_grad():
        together = model(**batch).loss.item()
        alone = [model(**tk.collate([as_row(pair)], 0)).loss.item() for pair in pairs]
    counts = [len(t) for t in targets]
    assert together == pytest.approx(
        sum(a * n for a, n in zip(alone, counts, strict=True)) / sum(counts), rel=2e-3
    )


# -------------------------------------------------------------------------- generation
def forced(model, ends, stop, after):
    """Hook of the output layer: no end token but `stop`, for row 0, as token `after`."""
    step = 0

    def hook(module, args, logits):
        nonlocal step
        step += 1
        logits[..., ends] = -1e4
        if step == after:
            logits[0, -1, stop] = 1e4
        return logits

    return model.get_output_embeddings().register_forward_hook(hook)


@pytest.mark.parametrize("family, stop", [(k, e) for k in ENDS for e in ENDS[k]])
def test_generation_stops_at_every_end_token(loaded, rows, family, stop):
    model, tokenizer = loaded[family]
    ends = tokenizer.convert_tokens_to_ids(list(ENDS[family]))
    prompts = [tk.encode_prompt(tokenizer, r["prompt"]) for r in rows[:2]]
    prompts[0] = prompts[0][: len(prompts[1]) - 4]  # the shorter one is row 0 of the batch
    handle = forced(model, ends, tokenizer.convert_tokens_to_ids(stop), 4)
    try:
        first, second = tk.generate(model, tokenizer, prompts, max_new_tokens=9)
    finally:
        handle.remove()
    assert (len(first), len(second)) == (3, 9)
    assert not set(first + second) & set(ends)


@BOTH
def test_sampling_defaults_and_missing_ends_do_not_matter(loaded, rows, family, monkeypatch):
    model, tokenizer = loaded[family]
    assert model.generation_config.do_sample and model.generation_config.temperature == 0.6
    prompts = [tk.encode_prompt(tokenizer, r["prompt"]) for r in rows[:3]]
    first, again = (tk.generate(model, tokenizer, prompts, max_new_tokens=8) for _ in range(2))
    greedy = []
    with torch.no_grad():
        for prompt in prompts:
            ids = list(prompt)
            for _ in range(8):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            greedy.append(ids[len(prompt) :])
    assert first == again == greedy
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    assert tk.generate(model, tokenizer, prompts, max_new_tokens=8) == greedy


# ---------------------------------------------------------------------- the whole path
def arguments_of_a_gpu(monkeypatch, **changes):
    """Let 03 train on this CPU under the Trainer arguments of a GPU."""
    here, real, seen = tk.resolve_device, recipe.training_arguments, []

    def arguments(*given, **options):
        with monkeypatch.context() as patch:
            pretend(patch, "cuda")
            seen.append(dataclasses.replace(real(*given, **options), use_cpu=True, **changes))
        assert tk.resolve_device is here
        return seen[-1]

    monkeypatch.setattr(recipe, "training_arguments", arguments)
    return seen


def train(folder, rows, run_dir, steps=6, lora_dropout=0.0):
    """Losses and adapter of a short training by the functions of 03."""
    trainer = make_trainer(
        tk.load_student(str(folder)),
        rows[: 4 * steps],
        run_dir,
        lora=make_lora(dropout=lora_dropout),
        validation=rows[-4:],
        learning_rate=5e-3,
        save_steps=50,
    )
    assert tk.finetune(trainer, run_dir)["train_tokens"] > 0
    return (
        [row["loss"] for row in trainer.state.log_history if "loss" in row],
        load_file(run_dir / "adapter" / "adapter_model.safetensors"),
    )


@BOTH
@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_a_student_goes_the_whole_way(folders, rows, tmp_path, monkeypatch, family, device):
    seen = arguments_of_a_gpu(monkeypatch) if device == "gpu" else []
    losses, adapter = train(folders[family], rows, tmp_path, lora_dropout=0.05)
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    moved = {k: bool(v.abs().max() > 0) for k, v in adapter.items() if "lora_B" in k}
    assert len(moved) == 2 * len(tk.PROJECTIONS) and all(moved.values())
    assert {k.split(".")[-3] for k in adapter} == set(tk.PROJECTIONS)
    for used in seen:
        assert (used.optim.value, used.activation_checkpointing) == ("paged_adamw_8bit", True)
    model, tokenizer = tk.load_student(str(folders[family]), True, tmp_path / "adapter")
    assert not [m for m in model.modules() if type(m).__name__ == "Linear4bit"]
    examples = [r["example"] for r in rows[:4]]
    outputs = tk.generate(
        model,
        tokenizer,
        [tk.encode_prompt(tokenizer, tk.render_prompt(e)) for e in examples],
        max_new_tokens=12,
    )
    for e, ids in zip(examples, outputs, strict=True):
        text = tokenizer.decode(ids, skip_special_tokens=True)
        fields = tk.score(tk.parse_output(text, e), e, "before")
        assert len(ids) <= 12 and fields["answer_ok"] in (True, False)


def test_checkpointing_changes_no_number(folders, rows, tmp_path, monkeypatch):
    found = []
    for checkpointing in (True, False):
        with monkeypatch.context() as patch:
            arguments_of_a_gpu(patch, activation_checkpointing=checkpointing)
            found.append(train(folders["qwen3"], rows, tmp_path / str(checkpointing), 4))
    (losses, adapter), (plain, reference) = found
    assert losses == pytest.approx(plain, rel=1e-3)
    assert adapter.keys() == reference.keys()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, corrupter, microworld):
    """A workspace with the rows that 03 reads: 16 for training, 4 and 4."""
    workspace = make_workspace(tmp_path_factory.mktemp("paper"))
    interim, pool = workspace / "data/interim/microworld", corrupter.Pool(microworld)
    parts = [
        e
        for split, n in zip(tk.SPLITS, (16, 4, 4), strict=True)
        for e in [e for e in microworld if e.split == split][:n]
    ]
    tk.write_jsonl(interim / "examples.jsonl", parts)
    tk.write_jsonl(
        interim / "sft/controlled/correct-dose1-seed0.jsonl",
        [
            {
                "id": e.id,
                "split": e.split,
                "condition": "correct",
                "prompt": tk.render_prompt(e),
                "target": tk.render_target(e, corrupter.make_trace(e, "correct", pool)),
                "item": tk.item_of(e),
            }
            for e in parts
        ],
    )
    return workspace


def test_03_takes_a_local_folder(prepared, folders):
    options = {
        "student": folders["qwen3"],
        "study": "local",
        "epochs": 1,
        "batch_size": 8,
        "lora_rank": 4,
        "max_new_tokens": 8,
    }
    done = papermill(
        prepared, "03_finetune_student", *(x for k, v in options.items() for x in ("-p", k, str(v)))
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = prepared.glob("data/runs/*/run.json")
    record = json.loads(path.read_text())
    assert record["n_test"] == 4 and record["train_tokens"] > 0
    assert (record["layout"], record["has_facts"]) == ("before", True)
    assert re.fullmatch(r"qwen3@[0-9a-f]{12}", record["student_files"]) and record["studies"] == [
        "local"
    ]
    assert [r for r in tk.read_jsonl(path.with_name("outputs.jsonl")) if r["ids"]]
    assert (path.parent / "adapter").is_dir()


# ------------------------------------------------------------------------- grid and cost
LLAMA, QWEN = "meta-llama/Llama-3.2-1B-Instruct", "Qwen/Qwen3-1.7B"


@pytest.fixture
def grid():
    """Steps of 00 with the profile `paper`, all of them or a part."""
    nb = notebook_functions("00_run_study", profile="paper")

    def choose(datasets=None, students=None, seeds=(0, 1, 2), conditions=None):
        chosen = nb.PROFILES["paper"]
        names = {
            "chosen": chosen,
            "seed_list": list(seeds),
            "conditions": conditions or "direct,vanilla,correct,incorrect",
        }
        nb.grid_of.__globals__.update(names)
        return [
            step
            for data in datasets or chosen["datasets"]
            for who in students or chosen["students"]
            for step in nb.grid_of(data, who)
        ]

    return choose


def test_the_grid_is_the_papers(grid):
    steps = grid()
    runs = [given for name, given in steps if name == "03_finetune_student"]
    assert len(steps) == 6 * (1 + 3 * 5 + 2) and len(runs) == 2 * 3 * 4 * 3
    assert {(r["student"], r["condition"], r["seed"]) for r in runs} == {
        (s, c, k)
        for s in (LLAMA, QWEN)
        for k in (0, 1, 2)
        for c in ("direct", "vanilla", "correct", "incorrect")
    }
    assert {r["learning_rate"] for r in runs} == {2e-4}
    sizes = {g["dataset"]: (g["n_train"], g["n_test"]) for n, g in steps if n[:2] == "02"}
    assert sizes == {"cotempqa": (3798, 950), "marco": (5000, 1000), "babi": (3773, 376)}
    assert len({g["study"] for _, g in steps}) == 6
    assert "paper-babi-Qwen3-1.7B" in {g["study"] for _, g in steps}
    assert set(tk.PINS) == {LLAMA, QWEN}


def test_every_step_of_the_grid_passes_the_schema(grid):
    for name, given in grid():
        values = {**tk.notebook_defaults(name), **given}
        assert tk.check_parameters(name, values).items() >= given.items()


def test_a_part_of_the_grid_can_be_run(grid):
    part = grid(datasets=["babi"], students=[QWEN], seeds=[1], conditions="vanilla")
    assert [name[:2] for name, _ in part] == ["10", "02", "03", "04", "05"]
    assert (
        part[2][1].items()
        >= {
            "dataset": "babi",
            "student": QWEN,
            "seed": 1,
            "condition": "vanilla",
            "batch_size": 16,
        }.items()
    )


def test_the_cost_by_hand():
    nb = notebook_functions("00_run_study")
    # q and o 2048 x 2048, k and v 2048 x 512, three of 2048 x 8192, 16 layers
    assert nb.weights_of(nb.SHAPES[LLAMA], 16) == {
        "linear": 973_078_528,
        "embeddings": 262_668_288,
        "lora": 11_272_192,
    }
    assert nb.weights_of(nb.SHAPES[QWEN], 16) == {
        "linear": 1_409_286_144,
        "embeddings": 311_164_928,
        "lora": 17_432_576,
    }
    parts = nb.memory(nb.SHAPES[LLAMA], batch=16, length=1024, completion=100, rank=16)
    assert {k: round(1000 * v) for k, v in parts.items()} == {
        "weights, GB": 1027,  # 973.08 x 0.51587 + 2 x 262.67
        "LoRA, GB": 113,  # 11.27 x 10.03125
        "activations, GB": 2819,  # 2 x 16,384 x (16 x 2,048 + 10 x 2,048 + 4 x 8,192)
        "logits, GB": 2873,  # 14 x 1,600 x 128,256
        "context, GB": 1000,
    }
    # 6 x 973,078,528 x 3e6 tokens / (0.25 x 125e12) = 560.5 s; 32 batches x 500 x 0.03 s
    training = nb.training_hours(nb.SHAPES[LLAMA], 3_000_000, 16)
    assert training == pytest.approx(560.493 / 3600, rel=1e-4)
    assert nb.generation_hours(1000, 500) == pytest.approx(480 / 3600)
    totals = [
        nb.cost_of(data, who)["total, GB"]
        for data in nb.PAPER["datasets"]
        for who in nb.PAPER["students"]
    ]
    assert len(totals) == 6 and max(totals) < nb.CARD["memory"]


@BOTH
def test_the_cost_counts_what_the_libraries_build(folders, family):
    model, _ = tk.load_student(str(folders[family]))
    c, nb = model.config, notebook_functions("00_run_study")
    width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    shape = {
        "hidden": c.hidden_size,
        "inner": c.intermediate_size,
        "vocab": c.vocab_size,
        "layers": c.num_hidden_layers,
        "q": width * c.num_attention_heads,
        "kv": width * c.num_key_value_heads,
    }
    expected = nb.weights_of(shape, 8)
    packed = [m.weight for m in model.modules() if type(m).__name__ == "Linear4bit"]
    assert sum(math.prod(w.quant_state.shape) for w in packed) == expected["linear"]
    assert model.get_input_embeddings().weight.numel() == expected["embeddings"]
    constants = sum(w.quant_state.absmax.nbytes for w in packed)
    assert (sum(w.nbytes for w in packed), constants) == (
        expected["linear"] / 2,
        expected["linear"] / 64,
    )
    adapted = recipe.get_peft_model(model, make_lora(rank=8))
    assert adapted.get_nb_trainable_parameters()[0] == expected["lora"]
