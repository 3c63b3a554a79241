"""04: which outputs are scored, how a row comes about, and what is written where."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
from conftest import ROOT, make_workspace, notebook_functions, papermill

import tracekd_utils as tk

NAME = "04_score_outputs"
RUN_ID = "microworld-tiny-correct-controlled-seed0-00000000"
GOLD = "- Mary took the apple.\n- Mary went to the kitchen."


def written(facts=GOLD, answer="kitchen", label="object-place"):
    """An output in the grammar."""
    return f"<think>Question type: {label}\nFacts:\n{facts}</think>\n<answer>{answer}</answer>"


TEXTS = {  # by what it is; ids are microworld/test/0, 1, …
    "TP": written(),
    "FP": written("- Mary went to the garden."),
    "FN": written(answer="garden"),
    "TN": written("- Mary walked to the kitchen.", "garden"),
    "no grammar": "Type: object-place\nFacts:\n" + GOLD + "\nAnswer: kitchen",
    "nothing": "",
}

EVIL = "<img src=x onerror=alert(1)>$x^2$`|**b**"
FACTS = {"parameters": {"protocol": "published"}, "layout": "before", "has_facts": True}


def everything(**parameters):
    """What 04 defines, and 40, which gathers the outputs for it."""
    gathering = vars(notebook_functions("40_gather_outputs", **parameters))
    return SimpleNamespace(**{**gathering, **vars(notebook_functions(NAME, **parameters))})


@pytest.fixture
def functions():
    return everything(study="mini")


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Folders of data of one test."""
    for name in ("INTERIM", "RUNS", "RESULTS"):
        monkeypatch.setattr(tk, name, tmp_path / "data" / name.lower())
    return tmp_path


def save_items(example, dataset="microworld", **changes):
    """Examples of a dataset: a test item for each of TEXTS, and one for training."""
    items = [
        replace(example, id=f"{dataset}/test/{k}", dataset=dataset, **changes)
        for k in range(len(TEXTS))
    ]
    train = replace(items[0], id=f"{dataset}/train/0", split="train")
    tk.save_examples(dataset, [train, *items])
    return items


def make_run(items, texts=None, run_id=RUN_ID, **changes):
    """Folder of a finished run of the tiny student, made by hand."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tk.student_folder("tiny"))
    texts = texts or list(TEXTS.values())
    folder = tk.RUNS / run_id
    lines = [
        {"id": item.id, "ids": tokenizer(text, add_special_tokens=False).input_ids}
        for item, text in zip(items, texts, strict=True)
    ]
    tk.write_jsonl(folder / "outputs.jsonl", lines)
    tk.write_atomic(folder / "training_curve.csv", "step,loss\n1,2.0\n")
    parameters = {
        "dataset": items[0].dataset,
        "study": "mini",
        "seed": 0,
        "student": "tiny",
        "condition": "correct",
        "protocol": "controlled",
        "dose": 1.0,
        "max_new_tokens": 200,
        "n_train": 1,
    }
    facts = {
        "run_id": run_id,
        "studies": ["mini"],
        "data_hash": "0" * 64,
        "parameters": parameters,
        "n_test": len(items),
        "layout": "before",
        "has_facts": True,
        "device": "cpu torch.float32",
        "student_files": "tiny",
        "versions": {},
        "seconds": 1.0,
        "peak_memory_gib": 0.5,
        "train_tokens": 10,
        "train_tokens_per_s": 5.0,
    }
    tk.write_json(folder / "run.json", facts | changes)
    return folder


def score_run(functions, source):
    """Rows and metrics of all outputs of a source."""
    rows = [
        functions.score_output(
            text, source.items[key], source.facts, source.known[key], source.names[key]
        )
        for key, text in source.texts.items()
    ]
    return rows, functions.metrics_of(rows, source.facts)


def score_waiting(functions):
    """Score and store what waits, as the notebook does."""
    found = []
    for folder in functions.waiting_folders("mini"):
        rows, metrics = score_run(functions, functions.read_run(folder))
        found.append(SimpleNamespace(rows=rows, metrics=metrics))
        found[-1].reproduction = functions.store(rows, metrics)
    return found


# ------------------------------------------------------------------------------- one row


def test_row_of_each_output_by_hand(functions, folders, example):
    (run,) = (make_run(save_items(example)) and score_waiting(functions),)[0]
    rows = dict(zip(TEXTS, run.rows, strict=True))
    assert [rows[k]["output"] for k in TEXTS] == list(TEXTS.values())
    assert [rows[k]["quadrant"] for k in TEXTS] == ["TP", "FP", "FN", "TN", "TP", "TN"]
    assert [rows[k]["parsed_ok"] for k in TEXTS] == [True] * 4 + [False] * 2
    assert rows["TP"]["trace_faults"] == rows["FN"]["trace_faults"] == []
    assert rows["FP"]["trace_faults"] == ["other sentences of the story"]
    assert rows["TN"]["trace_faults"] == ["gold in other words"]
    assert rows["nothing"]["trace_faults"] == ["no trace"]
    assert rows["nothing"]["trace_tokens"] == 0 and rows["nothing"]["finished"] is True
    metrics = run.metrics
    assert metrics["quadrants"] == {"TP": 2, "FP": 1, "FN": 1, "TN": 2}
    assert metrics["n_test"] == 6 and metrics["parsed_ok"] == pytest.approx(4 / 6)
    assert metrics["answer_ok"] == metrics["trace_ok"] == 0.5 and metrics["finished"] == 1
    assert (metrics["layout"], metrics["has_facts"]) == ("before", True)
    assert metrics["device"] == "cpu torch.float32" and metrics["seconds"] == 1.0
    assert "answer_rouge_l" not in metrics and "cut_rows" not in metrics


@pytest.mark.parametrize(
    "facts, label, faults",
    [
        (GOLD, "object-place", []),
        (GOLD, "person-place", ["wrong label"]),
        ("- Mary took the apple.", "object-place", ["less than gold"]),
        ("", "object-place", ["less than gold"]),
        (
            GOLD + "\n- Mary went to the garden.",
            "object-place",
            ["more than gold", "other sentences of the story"],
        ),
        (
            "- Mary took the apple.\n- Mary walked to the kitchen.",
            "object-place",
            ["gold in other words"],
        ),
        # another verb, but of a sentence that is not gold
        ("- Mary walked to the garden.", "object-place", ["other sentences of the story"]),
        ("- Emma took the apple.", "object-place", ["a sentence that the story has not"]),
        (
            "- Emma took the apple.\n- Mary grabbed the apple.\n- Mary went to the garden.",
            "size-compare",
            [
                "a sentence that the story has not",
                "gold in other words",
                "other sentences of the story",
                "wrong label",
            ],
        ),
    ],
)
def test_what_is_inside_a_wrong_trace(functions, example, facts, label, faults):
    parsed = tk.parse_output(written(facts, label=label), example)
    scores = tk.score(parsed, example)
    assert functions.find_faults(parsed, example, scores["label_ok"]) == faults
    assert scores["trace_ok"] is (faults == [])


def test_a_sentence_of_the_story_is_no_paraphrase_of_gold(functions, example):
    # the story says it twice, in two words; one of them is gold
    item = replace(example, facts=(*example.facts, "Mary walked to the kitchen."))
    parsed = tk.parse_output(written("- Mary walked to the kitchen."), item)
    assert functions.find_faults(parsed, item, True) == ["other sentences of the story"]


def test_roles_are_not_swapped_by_other_words(functions):
    plain = functions.plain_words
    assert plain("Mary walked to the garden.") == plain("Mary went back to a garden")
    assert plain("Mary gave Emma the cup.") != plain("Emma gave Mary the cup.")
    assert plain("The box is bigger than the jar.") != plain("The jar is bigger than the box.")


@pytest.mark.parametrize("layout", ["none", "before"])
def test_no_trace_scores_where_no_facts_are_meant(functions, example, layout):
    facts = {"parameters": {"protocol": "controlled"}, "layout": layout, "has_facts": False}
    row = functions.score_output(written(), example, facts, {})
    null = ("label_ok", "facts_ok", "facts_recall", "trace_ok", "quadrant", "trace_faults")
    assert {row[k] for k in null} == {None} and row["answer_ok"] is True
    assert (row["trace_words"] is None) is (layout == "none")


def test_every_stored_wrong_trace_says_how():
    seen = 0
    for path in sorted((ROOT / "data" / "results").glob("*/*/predictions.parquet")):
        for row in tk.read_parquet(path):
            if "trace_faults" in row:
                seen += 1
                expected = None if row["trace_ok"] is None else not row["trace_ok"]
                found = None if row["trace_faults"] is None else bool(row["trace_faults"])
                assert found is expected, (path, row["id"])
    assert seen > 17_000


@pytest.mark.parametrize(
    "answer, hedged, exact",
    [
        ("kitchen", False, True),
        ("kitchen or garden", True, False),
        ("perhaps the kitchen", True, False),
        ("the orchard", False, False),  # a word that begins with `or`
    ],
)
def test_alternatives_have_exact_match_and_hedges_beside(functions, example, answer, hedged, exact):
    card = tk.dataset("marco")
    item = replace(example, id="marco/test/0", dataset="marco", label=card.labels[0])
    facts = {"parameters": {"protocol": "controlled"}, "layout": "before", "has_facts": True}
    row = functions.score_output(written(answer=answer, label=card.labels[0]), item, facts, {})
    assert (row["answer_hedged"], row["answer_exact"]) == (hedged, exact)
    assert "answer_hedged" not in functions.score_output(written(), example, FACTS, {})
    metrics = functions.metrics_of([row], facts | {"run_id": "x"})
    assert metrics["answer_hedged"] == hedged and metrics["answer_exact"] == exact


def test_strict_pattern_is_the_helpers(functions, example):
    traces = (tk.Trace(label="object-place", facts=example.gold_facts), tk.Trace(text="so"))
    for trace in (*traces, None):
        for layout in ("before", "after"):
            text = tk.render_target(example, trace, layout=layout)
            form = "none" if trace is None else layout
            for shown in (text, f" {text}", text[:-1], text.replace("answer>", "answers>")):
                scores = tk.score(tk.parse_output(shown, example), example, form)
                labels = tk.dataset(example.dataset).labels
                assert functions.is_in_form(shown, form, labels) is scores["parsed_ok"], shown


def test_colours_hide_no_html(functions):
    for text in (written(answer="&<b>"), written("- <script>"), written(answer="a > b & c")):
        shown = functions.colour(text, "before")
        assert "<script>" not in shown and "<b>" not in shown
    assert functions.colour(written(), "before").count("<span") == 3


# -------------------------------------------------------------- what is written, and where


def test_a_waiting_run_is_stored(functions, folders, example):
    folder = make_run(save_items(example))
    (run,) = score_waiting(functions)
    stored = tk.RESULTS / "mini" / RUN_ID
    assert run.reproduction is None and not functions.waiting_folders("mini")
    names = {"predictions.parquet", "metrics.json", "training_curve.csv"}
    assert {p.name for p in stored.iterdir()} == names
    assert {p.name for p in folder.iterdir()} >= names
    assert tk.read_parquet(stored / "predictions.parquet") == run.rows
    assert tk.read_json(stored / "metrics.json") == run.metrics
    (known,) = tk.study_runs("mini")
    assert known.frame["quadrant"].tolist()[:4] == ["TP", "FP", "FN", "TN"]
    assert functions.waiting_folders("mini", RUN_ID) == [folder]  # asked for by its name
    assert not functions.waiting_folders("other")


def test_scoring_again_needs_no_student_and_changes_nothing(functions, folders, example):
    make_run(save_items(example))
    score_waiting(functions)
    shutil.rmtree(tk.RUNS)
    (known,) = tk.study_runs("mini")
    source = functions.read_stored(known)
    rows, metrics = score_run(functions, source)
    assert functions.changed_scores(source, rows) == []
    assert metrics == known.metrics
    assert metrics.keys() >= {"seconds", "versions", "student_files", "data_hash", "run_id"}


def alter_a_score(rows, metrics, folder):
    """Stored rows in which one answer is right that is not, and metrics that follow from them."""
    rows = [dict(row) for row in rows]
    rows[2] |= {"answer_ok": True, "quadrant": "TP"}
    tk.write_parquet(folder / "predictions.parquet", rows)
    shares = {"answer_ok": 4 / 6, "quadrants": {"TP": 3, "FP": 1, "FN": 0, "TN": 2}}
    tk.write_json(folder / "metrics.json", metrics | shares)
    return rows


def test_changed_scores_are_listed(functions, folders, example):
    make_run(save_items(example))
    (run,) = score_waiting(functions)
    folder = tk.RESULTS / "mini" / RUN_ID
    rows = alter_a_score(run.rows, run.metrics, folder)
    source = functions.read_stored(tk.study_runs("mini")[0])
    changed = functions.changed_scores(source, score_run(functions, source)[0])
    where = {"run_id": RUN_ID, "id": rows[2]["id"]}
    assert changed == [
        {**where, "column": "answer_ok", "stored": True, "now": False},
        {**where, "column": "quadrant", "stored": "TP", "now": "FN"},
    ]
    assert tk.read_parquet(folder / "predictions.parquet") == rows  # and not replaced


def test_stored_results_are_not_replaced(functions, folders, example):
    items = save_items(example)
    make_run(items)
    score_waiting(functions)
    stored = tk.RESULTS / "mini" / RUN_ID
    before = {p.name: p.read_bytes() for p in stored.iterdir()}
    texts = [*TEXTS.values()]
    texts[2] = texts[0]  # one more answer is right
    make_run(items, texts, device="cuda torch.bfloat16")
    (run,) = score_waiting(functions)
    assert {name: (stored / name).read_bytes() for name in before} == before
    found = tk.read_json(stored / "reproduction.json")
    assert found == run.reproduction
    assert found["n"] == 6 and found["identical_outputs"] == pytest.approx(5 / 6)
    assert found["committed"] == {"device": "cpu torch.float32", "answer_ok": 0.5}
    assert found["now"]["device"] == "cuda torch.bfloat16"
    assert found["now"]["answer_ok"] == pytest.approx(4 / 6)
    assert found["answers"]["estimate"] == pytest.approx(1 / 6)  # new minus stored
    assert (found["answers"]["only_first"], found["answers"]["only_second"]) == (1, 0)
    assert not functions.waiting_folders("mini")


def test_text_that_may_not_be_passed_on_stays_out_of_the_results(functions, folders, example):
    card = tk.dataset("marco")
    assert card.private and card.answers == "any"
    items = save_items(example, "marco", label=card.labels[0])
    texts = [written(label="secret label", answer="secret kitchen"), *TEXTS.values()][:6]
    folder = make_run(items, texts)
    (run,) = score_waiting(functions)
    stored = tk.RESULTS / "mini" / RUN_ID
    shown = tk.read_parquet(stored / "predictions.parquet")
    assert not {"output", "output_ids"} & shown[0].keys()
    assert shown[0]["predicted_label"] is None  # it is no label of the card
    for path in stored.iterdir():
        assert b"secret" not in path.read_bytes(), path
    assert tk.read_parquet(folder / "predictions.parquet")[0]["output"] == texts[0]
    # "secret kitchen" shares one of its two words with "kitchen"
    assert run.rows[0]["answer_f1"] == run.rows[0]["answer_rouge_l"] == pytest.approx(2 / 3)
    assert run.metrics["answer_rouge_l"] > 0 and run.metrics["answer_f1"] > 0
    # scored again where the text is; the run made again has no texts to compare
    source = functions.read_stored(tk.study_runs("mini")[0])
    assert functions.changed_scores(source, score_run(functions, source)[0]) == []
    make_run(items, texts)
    (again,) = score_waiting(functions)
    assert again.reproduction["identical_outputs"] is None
    assert again.reproduction["answers"]["estimate"] == 0
    shutil.rmtree(tk.RUNS)
    assert functions.read_stored(tk.study_runs("mini")[0]) is None
    with pytest.raises(FileNotFoundError, match="mini.*may not be passed on.*03_finetune"):
        functions.collect()


def test_a_run_of_two_studies_is_stored_in_both(functions, folders, example):
    make_run(save_items(example), studies=["mini", "second"])
    score_waiting(functions)
    second = everything(study="second")
    (folder,) = second.waiting_folders("second")
    second.store(*score_run(second, second.read_run(folder)))
    assert tk.study_runs("second")[0].parameters["study"] == "second"
    assert tk.study_runs("mini")[0].parameters["study"] == "mini"


def test_published_gold_comes_from_the_training_file(functions, folders, example):
    parameters = {"protocol": "published", "condition": "correct", "dose": 1.0, "seed": 0}
    card = tk.dataset("marco")
    assert card.in_published_words()["gold"] != "annotated"
    items = save_items(example, "marco", label=card.labels[0])
    path = tk.sft_path("marco", "published", "correct", 1.0, 0)
    given = {"dataset": "marco", "study": "mini", **parameters}
    with pytest.raises(FileNotFoundError, match="correct-dose1-seed0"):
        functions.find_items(given)
    tk.write_jsonl(path, [{"id": items[0].id, "gold_facts": ["Mary went to the garden."]}])
    found, names = functions.find_items(given)
    assert found[items[0].id].gold_facts == ("Mary went to the garden.",)
    assert found[items[1].id] == items[1]
    # its name is that of the example: runs of both protocols are about the same item
    assert set(names.values()) == {tk.item_of(items[0])}
    row = functions.score_output("", found[items[0].id], FACTS, {}, names[items[0].id])
    assert row["item"] == tk.item_of(items[0])


# ------------------------------------------------------ the item that a row is about


def other_seed(items):
    """The same ids under another seed of the dataset's notebook: one has another question."""
    asked = replace(items[2], question="Where is the ball?")
    tk.save_examples("microworld", [*items[:2], asked, *items[3:]])
    return tk.item_of(items[2]), tk.item_of(asked)


def test_rows_name_the_item_and_another_one_stops(functions, folders, example):
    items = save_items(example)
    make_run(items)
    (run,) = score_waiting(functions)
    assert [row["item"] for row in run.rows] == [tk.item_of(item) for item in items]
    one, two = other_seed(items)
    path = tk.RESULTS / "mini" / RUN_ID / "predictions.parquet"
    with pytest.raises(ValueError, match="names two questions.*make the examples") as error:
        functions.read_stored(tk.study_runs("mini")[0])
    for part in (str(path), f"id {items[2].id} is item {one}", f"item {two}"):
        assert part in str(error.value)


def test_a_run_made_again_on_other_items_is_not_compared(functions, folders, example):
    items = save_items(example)
    make_run(items)
    score_waiting(functions)
    stored = tk.RESULTS / "mini" / RUN_ID
    before = {p.name: p.read_bytes() for p in stored.iterdir()}
    other_seed(items)
    make_run(items)
    with pytest.raises(ValueError, match="the outputs made again"):
        score_waiting(functions)
    assert {p.name: p.read_bytes() for p in stored.iterdir()} == before


def test_a_file_of_anybody_may_name_its_items(folders, example):
    items = save_items(example)
    rows = [{"id": item.id, "item": tk.item_of(item), "output": "kitchen"} for item in items]
    path = tk.write_jsonl(folders / "theirs.jsonl", rows)
    functions = anybody(outputs=str(path))
    assert len(functions.collect()[0].texts) == len(items)
    other_seed(items)
    with pytest.raises(ValueError, match=f"{items[2].id}.*theirs.jsonl.*names two questions"):
        functions.collect()


def test_every_stored_row_names_the_item_of_its_study(monkeypatch):
    """The same id is the same item in all runs of a study; microworld's are made anew."""
    monkeypatch.setattr(tk, "RESULTS", ROOT / "data" / "results")
    named, counted = {}, 0
    for path in sorted(tk.RESULTS.glob("*/*/predictions.parquet")):
        items = {row["id"]: row["item"] for row in tk.read_parquet(path)}
        counted += len(items)
        tk.check_items(study=named.setdefault(path.parts[-3], dict(items)), run=items)
        named[path.parts[-3]] |= items
    examples = notebook_functions("01_decompose_microworld").make_microworld(400, 48, 400)
    today = {e.id: tk.item_of(e) for e in examples if e.split == "test"}
    assert named["microworld"] == today
    assert counted > 17_700


# ------------------------------------------------------------------------- damaged files


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


def drop_a_line(path):
    path.write_text("".join(path.read_text().splitlines(True)[1:]))


def double_a_line(path):
    lines = path.read_text().splitlines(True)
    path.write_text("".join([*lines, lines[0]]))


def rename_an_id(path):
    path.write_text(path.read_text().replace("test/3", "test/30"))


def drop_ids(path):
    path.write_text(path.read_text().replace('"ids"', '"idz"'))


def drop_layout(path):
    path.write_text(path.read_text().replace('"layout"', '"layouts"'))


@pytest.mark.parametrize(
    "name, damage, expected",
    [
        ("outputs.jsonl", cut, "line 6: expected one JSON object"),
        ("outputs.jsonl", drop_a_line, "5 outputs, expected 6"),
        ("outputs.jsonl", double_a_line, "1 ids stand twice: row 7 'microworld/test/0'"),
        ("outputs.jsonl", rename_an_id, "1 ids are no test item: row 4 'microworld/test/30'"),
        ("outputs.jsonl", drop_ids, "row 1: field 'ids' is None, expected list"),
        ("outputs.jsonl", lambda path: path.write_text(""), "holds no output"),
        ("outputs.jsonl", os.remove, "is missing"),
        ("run.json", drop_layout, "field 'layout' is None, expected str"),
        ("run.json", cut, "write the file again"),
    ],
)
def test_damaged_run_is_one_error_that_names_the_file(
    functions, folders, example, name, damage, expected
):
    path = make_run(save_items(example)) / name
    damage(path)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        score_waiting(functions)
    assert str(path) in str(error.value) and expected in str(error.value)


def change_rows(change):
    """A damage of predictions.parquet: its rows through `change`."""

    def damage(path):
        tk.write_parquet(path, change([dict(row) for row in tk.read_parquet(path)]))

    return damage


def change_metrics(**values):
    return lambda path: tk.write_json(path, tk.read_json(path) | values)


def without(name):
    return change_rows(lambda rows: [{k: v for k, v in r.items() if k != name} for r in rows])


def said(name, value):
    return change_rows(lambda rows: [row | {name: value} for row in rows])


PREDICTIONS, METRICS = "predictions.parquet", "metrics.json"
DAMAGES = {
    "predictions cut": (PREDICTIONS, cut, "is no whole Parquet file"),
    "a row twice": (
        PREDICTIONS,
        change_rows(lambda rows: [*rows, rows[0]]),
        "row 7: id 'microworld/test/0' stands twice",
    ),
    "a row less": (PREDICTIONS, change_rows(lambda rows: rows[1:]), "n_test is 6"),
    "no row": (PREDICTIONS, change_rows(lambda rows: []), ""),
    "no output": (PREDICTIONS, without("output"), "field output"),
    "no item": (PREDICTIONS, without("item"), "field item"),
    "text for a boolean": (PREDICTIONS, said("answer_ok", "yes"), "field answer_ok"),
    "a number for a text": (PREDICTIONS, said("output", 3), "field output"),
    "metrics cut": (METRICS, cut, "write the file again"),
    "metrics empty": (METRICS, lambda path: path.write_text(""), "expected one JSON object"),
    "metrics {}": (METRICS, lambda path: path.write_text("{}"), "parameters"),
    "metrics []": (METRICS, lambda path: path.write_text("[]"), "expected one JSON object"),
    "metrics binary": (METRICS, lambda path: path.write_bytes(b"\xff\x00"), "expected one JSON"),
    "another share": (METRICS, change_metrics(answer_ok=0.9), "answer_ok is 0.9"),
    "other quadrants": (
        METRICS,
        change_metrics(quadrants=dict.fromkeys(("TP", "FP", "FN", "TN"), 2)),
        "quadrants is",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_results_are_one_error_that_names_the_file(functions, folders, example, name):
    """And what to do; numbers that the rows do not give are counted again and said."""
    make_run(save_items(example))
    score_waiting(functions)
    shutil.rmtree(tk.RUNS)
    file, damage, expected = DAMAGES[name]
    path = tk.RESULTS / "mini" / RUN_ID / file
    damage(path)
    before = path.read_bytes()
    with pytest.raises(ValueError) as error:
        functions.collect()
    assert str(path.parent) in str(error.value) and expected in str(error.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", [PREDICTIONS, METRICS])
def test_damaged_results_are_not_compared_with(functions, folders, example, name):
    items = save_items(example)
    make_run(items)
    score_waiting(functions)
    path = tk.RESULTS / "mini" / RUN_ID / name
    cut(path)
    make_run(items)
    with pytest.raises(ValueError) as error:
        score_waiting(functions)
    assert str(path) in str(error.value)


# ---------------------------------------------------------------------- anybody's outputs


def anybody(title="", **parameters):
    given = {"study": "mine", "dataset": "microworld", **parameters}
    functions = everything(**given)
    functions.read_file.__globals__["name"] = title  # `name` is what lesson() calls the notebook
    return functions


def save_file(items, folder, ending="jsonl", texts=None):
    rows = [
        {"id": item.id, "output": text, "more": 1}
        for item, text in zip(items, texts or TEXTS.values(), strict=False)
    ]
    path = folder / f"mymodel.{ending}"
    if ending == "jsonl":
        return tk.write_jsonl(path, rows)
    return tk.write_parquet(path, rows)


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_file_of_anybody_is_scored(folders, example, ending):
    path = save_file(save_items(example), folders, ending)
    functions = anybody(outputs=str(path))
    (source,) = functions.collect()
    rows, metrics = score_run(functions, source)
    assert functions.store(rows, metrics) is None
    (run,) = tk.study_runs("mine")
    assert run.folder.name == run.condition == run.parameters["student"] == "mymodel"
    assert (run.seed, run.dose) == (0, 1.0)
    assert run.parameters["epochs"] is None and run.parameters["n_train"] is None
    assert run.metrics["layout"] == "before" and run.metrics["has_facts"] is True
    assert run.metrics["finished"] is None and run.metrics["n_test"] == 6
    assert run.metrics["quadrants"] == {"TP": 2, "FP": 1, "FN": 1, "TN": 2}
    assert run.metrics["data_hash"] and run.frame["output_ids"].isna().all()


def test_file_of_anybody_gets_its_name_and_a_comparison(folders, example):
    path = save_file(save_items(example), folders)
    functions = anybody(outputs=str(path), title="version-2")
    for expected in (False, True):
        (source,) = functions.collect()
        rows, metrics = score_run(functions, source)
        assert bool(functions.store(rows, metrics)) is expected
    found = tk.read_json(tk.RESULTS / "mine" / "version-2" / "reproduction.json")
    assert found["identical_outputs"] == 1 and found["answers"]["estimate"] == 0


@pytest.mark.parametrize(
    "texts, layout, has_facts",
    [
        (["kitchen", "the garden", written()], "none", False),
        ([written(), written(), "kitchen"], "before", True),
        (["<think>so it is</think>\n<answer>kitchen</answer>"] * 2, "before", False),
        (["\n".join(reversed(written().rsplit("\n", 1)))] * 2, "after", True),
    ],
)
def test_form_of_outputs_is_what_most_of_them_show(folders, example, texts, layout, has_facts):
    path = save_file(save_items(example), folders, texts=texts)
    (source,) = anybody(outputs=str(path)).collect()
    assert (source.facts["layout"], source.facts["has_facts"]) == (layout, has_facts)
    assert len(source.items) - len(source.texts) == len(TEXTS) - len(texts)


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"id": "microworld/test/0"}, "1 ids stand twice: row 2 'microworld/test/0'"),
        ({"id": "microworld/test/99"}, "1 ids are no test item: row 2 'microworld/test/99'"),
        ({"id": "microworld/train/0"}, "1 ids are no test item: row 2 'microworld/train/0'"),
        ({"id": None}, "row 2: field 'id' is None, expected str"),
        ({"output": ["kitchen"]}, "row 2: field 'output' is ['kitchen'], expected str"),
    ],
)
def test_wrong_row_of_a_file_is_named(folders, example, change, expected):
    path = save_file(save_items(example), folders)
    rows = tk.read_jsonl(path)
    tk.write_jsonl(path, [rows[0], rows[1] | change, *rows[2:]])
    with pytest.raises(ValueError) as error:
        anybody(outputs=str(path)).collect()
    assert str(path) in str(error.value) and expected in str(error.value)


def test_wrong_ids_of_a_file_are_counted_and_listed(folders, example):
    path = save_file(save_items(example), folders)
    rows = tk.read_jsonl(path)
    tk.write_jsonl(path, [*rows, *rows[:2], {"id": "who/1", "output": "x"}])
    with pytest.raises(ValueError, match=r"2 ids stand twice: row 7 .*/0', row 8 .*/1'; remove"):
        anybody(outputs=str(path)).collect()
    tk.write_jsonl(path, [*rows, *({"id": f"who/{k}", "output": "x"} for k in range(7))])
    with pytest.raises(ValueError, match="7 ids are no test item: row 7 'who/0'") as error:
        anybody(outputs=str(path)).collect()
    assert str(error.value).count("who/") == 5


def test_wrong_parameters_of_a_file_are_named(folders, example):
    items = save_items(example)
    path = str(save_file(items, folders))
    with pytest.raises(ValueError, match="parameter dataset.*microworld"):
        anybody(outputs=path, dataset="").collect()
    with pytest.raises(ValueError, match="name = '../x' is no name for a folder"):
        anybody(outputs=path, title="../x").collect()
    make_run(items)
    with pytest.raises(ValueError, match=f"{RUN_ID}.*is a run of 03"):
        anybody(outputs=path, title=RUN_ID).collect()
    with pytest.raises(FileNotFoundError, match="none.jsonl is missing"):
        anybody(outputs=str(folders / "none.jsonl")).collect()


# --------------------------------------------------------------------- the notebook itself


@pytest.fixture(scope="module")
def mini(tmp_path_factory, example):
    """Workspace with a waiting run, and what 04 said in four calls."""
    folder = make_workspace(tmp_path_factory.mktemp("mini"))
    students = folder / "data" / "raw" / "students"
    shutil.copytree(tk.student_folder("tiny"), students / "tiny")
    said = []

    def run(*options):
        done = papermill(folder, NAME, *options)
        assert done.returncode == 0, done.stderr[-3000:]
        cells = json.loads((folder / f"{NAME}-out.ipynb").read_text())["cells"]
        said.append(json.dumps([c.get("outputs") for c in cells]))

    with pytest.MonkeyPatch.context() as patch:
        for name in ("interim", "runs", "results"):
            patch.setattr(tk, name.upper(), folder / "data" / name)
        items = save_items(example)
        make_run(items)
        run("-p", "study", "mini")
        make_run(items, [*TEXTS.values()][:5] + [TEXTS["TP"]], device="cpu torch.bfloat16")
        run("-p", "study", "mini")
        run("-p", "study", "mini")
        tk.write_jsonl(
            folder / "theirs.jsonl",
            [{"id": items[k].id, "output": text} for k, text in enumerate(["kitchen", "box"])],
        )
        options = {"study": "theirs", "dataset": "microworld", "outputs": "theirs.jsonl"}
        run(*" ".join(f"-p {k} {v}" for k, v in options.items()).split())
        # another reader stored one answer, and somebody names a student in markup
        results = folder / "data/results/mini" / RUN_ID
        metrics = tk.read_json(results / "metrics.json")
        p = metrics["parameters"] | {"condition": EVIL, "student": EVIL}
        stored = tk.read_parquet(results / "predictions.parquet")
        alter_a_score(stored, metrics | {"parameters": p}, results)
        run("-p", "study", "mini", "-p", "rescore", "true")
        command = [sys.executable, "-m", "nbconvert", "--to", "html", f"{NAME}-out.ipynb"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return SimpleNamespace(folder=folder, said=said)


def test_notebook_scores_what_waits(mini):
    results = mini.folder / "data/results/mini" / RUN_ID
    names = {"predictions.parquet", "metrics.json", "training_curve.csv", "reproduction.json"}
    assert {p.name for p in results.iterdir()} == names
    assert "1 finished runs of study mini wait here" in mini.said[0]
    assert "1 new runs, 0 of them compared with what is stored" in mini.said[0]
    frame = pd.read_parquet(results / "predictions.parquet")
    assert frame["quadrant"].tolist() == ["TP", "FP", "FN", "TN", "TP", "TN"]


def test_notebook_compares_a_run_that_is_made_again(mini):
    results = mini.folder / "data/results/mini" / RUN_ID
    found = tk.read_json(results / "reproduction.json")
    assert found["identical_outputs"] == pytest.approx(5 / 6)
    assert found["now"]["device"] == "cpu torch.bfloat16"
    assert "1 new runs, 1 of them compared with what is stored" in mini.said[1]
    assert tk.read_json(results / "metrics.json")["device"] == "cpu torch.float32"


def test_notebook_scores_stored_runs_again(mini):
    assert "0 finished runs of study mini wait here" in mini.said[2]
    assert "0 values of 6 stored rows are not those of today" in mini.said[2]


def test_notebook_scores_a_file_of_anybody(mini):
    metrics = tk.read_json(mini.folder / "data/results/theirs/theirs/metrics.json")
    assert metrics["n_test"] == 2 and metrics["answer_ok"] == 0.5
    assert (metrics["layout"], metrics["quadrants"]) == ("none", None)
    assert "4 items have no output, left out of n" in mini.said[3]


def test_notebook_replaces_scores_where_it_is_asked_to(mini):
    assert "2 values of 6 stored rows are not those of today, they were replaced" in mini.said[4]
    results = mini.folder / "data/results/mini" / RUN_ID
    frame = pd.read_parquet(results / "predictions.parquet")
    assert frame["quadrant"].tolist() == ["TP", "FP", "FN", "TN", "TP", "TN"]
    metrics = tk.read_json(results / "metrics.json")
    assert metrics["answer_ok"] == 0.5 and metrics["quadrants"]["FN"] == 1
    assert metrics["seconds"] == 1.0 and metrics["parameters"]["condition"] == EVIL


def test_names_out_of_result_files_are_no_markup(mini):
    page = (mini.folder / f"{NAME}-out.html").read_text()
    assert "onerror=alert" in page and "<img src=x" not in page
    assert "<b>b</b>" not in page and "<strong>b</strong>" not in page
