"""Untuned students: what `direct` and `direct_few_shot` are shown, and that nothing is trained."""

from dataclasses import replace

import pytest
from conftest import make_workspace, notebook_functions, papermill

import tracekd_utils as tk

nb = notebook_functions("02_corrupt_traces")


@pytest.fixture(scope="module")
def pool(microworld):
    return nb.Pool(microworld)


def test_the_prompt_of_direct_is_as_it_was(example):
    assert tk.render_prompt(example, direct=True) == (
        "Context:\nMary went to the garden.\nMary took the apple.\nMary went to the kitchen.\n"
        "John did not take the ball.\nQuestion: Where is the apple?\n\nAnswer the question. First "
        "name the type of the question, one of: person-place, object-place, object-holder, "
        "carried-count, place-before, size-compare. Then copy the facts that are needed from the "
        "context. Then answer in as few words as possible. Write exactly this format and nothing "
        "else:\n<think>Question type: the type\nFacts:\n- a fact\n- another fact</think>\n"
        "<answer>the answer</answer>"
    )


def test_shots_are_training_items_of_other_stories(pool):
    train = {e.id for e in pool.splits["train"]}
    for e in pool.examples[::5]:
        shots = nb.worked_examples(e, pool, 0)
        assert len({s.id for s in shots}) == nb.SHOTS == 4 and {s.id for s in shots} <= train
        assert e.id not in {s.id for s in shots}
        for s in shots:
            a, b = set(s.facts), set(e.facts)
            assert len(a & b) * 2 <= min(len(a), len(b))


def test_another_question_on_the_story_is_never_a_shot(pool):
    e = pool.splits["test"][0]
    twins = [
        replace(e, id=f"microworld/train/t{k}", split="train", facts=e.facts[: len(e.facts) - k])
        for k in range(3)
    ]
    strangers = pool.splits["train"][:5]
    study = nb.Pool([*twins, *(s for s in strangers if not nb.same_story(s, e)), e])
    for seed in range(50):
        assert not {s.id for s in nb.worked_examples(e, study, seed)} & {t.id for t in twins}


def test_a_prompt_depends_on_its_item_and_the_seed_alone(pool, microworld):
    moved = nb.Pool(reversed(microworld))
    prompts = [nb.few_shot_prompt(e, pool, 0, 8192) for e in microworld[::40]]
    assert prompts == [nb.few_shot_prompt(e, moved, 0, 8192) for e in microworld[::40]]
    assert prompts != [nb.few_shot_prompt(e, pool, 1, 8192) for e in microworld[::40]]


def test_worked_examples_stand_before_the_prompt_of_direct(pool):
    e = pool.splits["test"][3]
    text, n = nb.few_shot_prompt(e, pool, 0, 8192)
    shots = nb.worked_examples(e, pool, 0)
    assert n == 4 and text == "".join(
        f"Example {k}:\n{tk.render_prompt(s)}"
        f"{tk.render_target(s, nb.make_trace(s, 'correct', pool))}\n\n"
        for k, s in enumerate(shots, start=1)
    ) + tk.render_prompt(e, direct=True)


def test_plain_shots_are_training_rows_and_the_same_ones(pool):
    for e in pool.splits["test"][:20]:
        shots = nb.worked_examples(e, pool, 0)
        text, n = nb.few_shot_prompt(e, pool, 0, 8192, plain=True)
        assert n == 4 and text == "".join(
            f"{tk.render_prompt(s)}{tk.render_target(s, nb.correct(s, pool, 0))}\n\n" for s in shots
        ) + tk.render_prompt(e)
        assert "Write exactly this format" not in text and "Example 1" not in text
        need = pool.count(nb.few_shot_prompt(e, pool, 0, 8192)[0]) + nb.ROOM
        assert [nb.few_shot_prompt(e, pool, 0, w, True)[1] for w in (need, need - 1)] == [4, 3]


def test_fewer_examples_are_shown_where_the_window_is_short(pool):
    e = pool.splits["test"][3]
    whole, alone = nb.few_shot_prompt(e, pool, 0, 8192)[0], tk.render_prompt(e, direct=True)
    need = pool.count(whole) + nb.ROOM
    assert [nb.few_shot_prompt(e, pool, 0, w)[1] for w in (need, need - 1)] == [4, 3]
    assert nb.few_shot_prompt(e, pool, 0, 1) == (alone, 0)


def test_both_are_untrained_wherever_it_matters(outside_root):
    assert {nb.CONDITIONS[c].layout for c in tk.UNTRAINED} == {"before"}
    parameters = tk.notebook_defaults("03_finetune_student")
    for condition in (*tk.UNTRAINED, "correct"):
        p = {**parameters, "dataset": "babi20", "condition": condition, "student": "tiny"}
        tk.write_jsonl(tk.sft_path("babi20", "controlled", condition, 1.0, 0), [{"id": "x"}])
        run = tk.resolve_run(p)  # there is no adapter
        assert run.is_trained is (condition in tk.UNTRAINED)
    study = notebook_functions("00_run_study")
    study.of_run.__globals__.update(chosen=study.PROFILES["laptop"])
    assert [study.of_run(c, "babi") for c in (*tk.UNTRAINED, "correct")] == [
        *[{"max_new_tokens": 64}] * 3,
        {},
    ]
    for name, longest, size in (("cotempqa", 224, 8), ("marco", 448, 4)):  # those of the card
        for condition in ("direct", "correct"):
            given = study.of_run(condition, name)
            tk.write_jsonl(tk.sft_path(name, "controlled", condition, 1.0, 0), [{"id": "x"}])
            p = {**parameters, "dataset": name, "condition": condition, **given}
            found = tk.resolve_run(p).parameters
            assert (found["max_new_tokens"], found["batch_size"]) == (longest, size)
    study.of_run.__globals__.update(chosen=study.PROFILES["paper"])
    assert study.of_run("correct", "marco") == study.PROFILES["paper"]["run"]


def test_a_few_shot_run_trains_nothing(tmp_path):
    folder = make_workspace(tmp_path)
    tk.write_jsonl(
        folder / "data/interim/microworld/examples.jsonl",
        notebook_functions("01_decompose_microworld").make_microworld(24, 12, 12),
    )
    options = ("-p", "study", "few", "-p", "student", "tiny")
    both = "direct_few_shot,direct_few_shot_plain"
    done = papermill(folder, "02_corrupt_traces", *options, "-p", "conditions", both)
    assert done.returncode == 0, done.stderr[-3000:]
    examples = {
        e.id: e for e in tk.read_examples(folder / "data/interim/microworld/examples.jsonl")
    }
    sft = folder / "data/interim/microworld/sft/controlled"
    for row in tk.read_jsonl(sft / "direct_few_shot_plain-dose1-seed0.jsonl"):
        assert list(row)[-1] == "item" and row["item"] == tk.item_of(examples[row["id"]])
        assert row["prompt"].count("<answer>") == 4 and row["prompt"].endswith("?\n")
    baselines = tk.read_parquet(folder / "data/results/few/baselines.parquet")
    assert {r["id"]: r["item"] for r in baselines} == {
        e.id: tk.item_of(e) for e in examples.values() if e.split == "test"
    }
    rows = tk.read_jsonl(
        folder / "data/interim/microworld/sft/controlled/direct_few_shot-dose1-seed0.jsonl"
    )
    assert len(rows) == 48
    for row in rows:
        assert "Example 4:\n" in row["prompt"] and "Example 5:" not in row["prompt"]
    done = papermill(
        folder,
        "03_finetune_student",
        *options,
        "-p",
        "condition",
        "direct_few_shot",
        "-p",
        "max_new_tokens",
        "8",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (run,) = folder.glob("data/runs/*direct_few_shot*")
    assert len(tk.read_jsonl(run / "outputs.jsonl")) == 12
    assert not (run / "training_curve.csv").exists() and not (run / "adapter").exists()
    assert tk.read_json(run / "run.json")["layout"] == "before"
