"""The generator, the bAbI files, and files that are broken."""

import hashlib
import json
import re
from collections import Counter
from dataclasses import asdict, replace

import pandas as pd
import pytest
from conftest import ROOT, make_workspace, notebook_functions, papermill

import tracekd_utils as tk

RULED = {"single-supporting-fact", "two-supporting-facts", "counting", "lists-sets", "conjunction"}


NAMES = ("microworld", "babi", "babi20")
LABELS = {name: tk.dataset(name).labels for name in NAMES}


@pytest.fixture(scope="module")
def nb():
    return notebook_functions("01_decompose_microworld")


@pytest.fixture(scope="module")
def room():
    return notebook_functions("10_decompose_babi")


def test_microworld_stories(corrupter, microworld):
    assert len(LABELS["microworld"]) >= 5
    assert {len(e.gold_facts) for e in microworld} == {1, 2, 3}
    for e in microworld:
        tk.check_example(e, "microworld")
        assert len(set(e.facts)) == len(e.facts)
        assert len(set(e.gold_facts)) == len(e.gold_facts)
        assert len(corrupter.non_gold_facts(e)) >= 3


def test_microworld_is_balanced_and_holds_nothing_twice(microworld):
    for split, size in zip(tk.SPLITS, (240, 60, 180), strict=True):
        labels = Counter(e.label for e in microworld if e.split == split)
        assert sum(labels.values()) == size and len(labels) == 6
        assert max(labels.values()) - min(labels.values()) <= 1
    assert len({(e.facts, e.question) for e in microworld}) == len(microworld)
    assert len({e.id for e in microworld}) == len(microworld)


def test_microworld_answers_are_not_settled_by_the_question_type(microworld):
    for label in LABELS["microworld"]:
        answers = Counter(e.answers for e in microworld if e.label == label)
        assert max(answers.values()) <= 0.6 * sum(answers.values()), label


def test_microworld_is_seeded_and_grows_by_appending(nb, microworld):
    assert nb.make_microworld(240, 60, 180) == microworld
    larger = {e.id: e for e in nb.make_microworld(300, 70, 200)}
    assert all(larger[e.id] == e for e in microworld)
    other = nb.make_microworld(240, 60, 180, seed=1)
    assert not {(e.facts, e.question) for e in other} & {(e.facts, e.question) for e in microworld}


def test_microworld_rule_and_annotation_agree_in_full(nb, microworld):
    for e in microworld:
        label, facts, answers = nb.rule_microworld(e.facts, e.question)
        assert (label, set(facts), set(answers)) == (e.label, set(e.gold_facts), set(e.answers)), (
            e.id
        )


def test_microworld_prompts_have_60_to_120_tokens(microworld):
    # SmolLM2's own tokenizer where the student has been fetched; else 1.3 tokens a word
    # and one a line, which is within 10 % of it on these stories
    folder, prompts = ROOT / "data/raw/students/smollm2-135m", map(tk.render_prompt, microworld)
    if (folder / "complete").exists():
        from transformers import AutoTokenizer

        lengths = [len(i) for i in AutoTokenizer.from_pretrained(folder)(list(prompts)).input_ids]
    else:
        lengths = [1.3 * len(p.split()) + p.count("\n") for p in prompts]
    assert min(lengths) >= 60 and max(lengths) <= 120, (min(lengths), max(lengths))


def test_babi_has_all_tasks_and_one_question_a_story(room, babi, data_dir):
    examples, read = babi
    stories, rows = Counter(), Counter()
    for path in (data_dir / "babi/en").glob("qa*.txt"):
        lines = path.read_text().splitlines()
        split = path.stem.rpartition("_")[2]
        stories[split] += sum(line.startswith("1 ") for line in lines)
        rows[split] += sum("\t" in line for line in lines)
    assert {e.label for e in examples} == set(room.TASKS.values()) == set(LABELS["babi20"])
    assert read["rows_read"] == dict(rows)
    assert read["one_question_a_story"] == sum(stories.values())
    assert len({e.id for e in examples}) == len(examples)
    for e in examples:
        tk.check_example(e, "babi")


def test_babi_questions_are_drawn_by_the_seed_and_not_the_first(room, data_dir, babi):
    again, other = (room.read_babi(data_dir / "babi/en", "babi20", s)[0] for s in (0, 1))
    assert again == babi[0] and other != babi[0]
    lengths = Counter(len(e.facts) for e in babi[0] if "/qa1/" in e.id)
    assert len(lengths) == 5  # five questions a story, after 2, 4, 6, 8 and 10 sentences


def test_babi_leaks_leave_the_training_set_and_are_counted(babi):
    examples, read = babi
    test = {(e.facts, e.question) for e in examples if e.split == "test"}
    assert not [e.id for e in examples if e.split != "test" and (e.facts, e.question) in test]
    left = [i for ids in read["left_out"].values() for i in ids]
    assert left and len(left) == read["one_question_a_story"] - len(examples)
    assert not any("/test/" in i for i in left)


def test_babi_validation_stands_apart_from_test(babi):
    splits = Counter(e.split for e in babi[0])
    assert splits["test"] > splits["validation"] > 0
    assert all("/train/" in e.id for e in babi[0] if e.split == "validation")


def test_babi_rule_agrees_on_its_five_labels(room, data_dir):
    compared, differing = Counter(), []
    for _, ident, label, questions in room.babi_stories(data_dir / "babi/en", "babi20"):
        if label not in RULED:
            continue
        for facts, question, answers, gold in questions:
            found = room.rule_babi(facts, question)
            compared[label] += 1
            if not found or (found[0], set(found[1]), set(found[2])) != (
                label,
                set(gold),
                set(answers),
            ):
                differing.append((ident, question, found, gold))
    assert set(compared) == RULED and min(compared.values()) > 1000
    assert not differing, (len(differing), differing[:3])


STORY = "1 Mary went to the kitchen.\n2 John went to the garden.\n3 Where is Mary? \tkitchen\t1\n"


def test_babi_file_by_hand(room, tmp_path):
    path = tmp_path / "qa1_x_train.txt"
    path.write_text(
        STORY + "4 Mary took the apple.\n5 Mary took the ball.\n"
        "6 What is Mary carrying?\tapple,ball\t4 5\n" + STORY
    )
    facts = ("Mary went to the kitchen.", "John went to the garden.")
    first = (facts, "Where is Mary?", ("kitchen",), facts[:1])
    took = ("Mary took the apple.", "Mary took the ball.")
    assert room.parse_babi(path) == [
        [first, (facts + took, "What is Mary carrying?", ("apple", "ball"), took)],
        [first],
    ]


TURNED = "1 John went to the garden.\n2 Mary went to the kitchen.\n3 Where is Mary? \tkitchen\t2\n"


@pytest.mark.parametrize("leaks, n", [("exact", 0), ("sets", 1)])
def test_a_leak_with_its_sentences_exchanged(room, tmp_path, leaks, n):
    for k, label in enumerate(LABELS["babi"]):
        for split, story in (("train", STORY), ("test", TURNED)):
            name = f"qa{room.NUMBER[label]}_{label}_{split}.txt"
            other = STORY.replace("Mary", f"{split}{k}")
            (tmp_path / name).write_text(other + story * (k == 3))
    examples, read = room.read_babi(tmp_path, "babi", 0, leaks)
    assert [len(ids) for ids in read["left_out"].values()] == [n]
    assert read["also_in_test"] == {"exact": 0, "sets": 1} and len(examples) == 2 * 11 + 2 - n


def test_a_committed_study_keeps_the_rule_it_was_made_by(room):
    made = json.loads((ROOT / "data/results/babi/decomposition.json").read_text())
    assert made["parameters"]["leaks"] == "exact"
    assert made["also_in_test"]["sets"] > made["also_in_test"]["exact"] > 0
    assert tk.notebook_defaults("10_decompose_babi")["leaks"] == ""


def test_a_leak_by_hand_is_left_out(room, tmp_path):
    for k, label in enumerate(LABELS["babi"]):
        for split in ("train", "test"):
            name = f"qa{room.NUMBER[label]}_{label}_{split}.txt"
            other = STORY.replace("Mary", f"{split}{k}")
            (tmp_path / name).write_text(other + STORY * (k == 3))
    examples, read = room.read_babi(tmp_path, "babi", 0)
    left = [i for ids in read["left_out"].values() for i in ids]
    assert left == [f"babi/train/qa{room.NUMBER[LABELS['babi'][3]]}/0001"]
    assert len(examples) == 2 * 11 + 1


@pytest.mark.parametrize(
    "content, line",
    [
        (STORY.encode() + b"1 Mary went to the kit", 4),
        (STORY.encode() + b"1 Mary went.\n2 Where is Ma", 5),
        (STORY.encode() + b"1 Mary went.\n2 Where is Mary? \tkit", 5),
        (STORY.encode() + b"1 Mary went.\n2 Where is Mary? \tkitchen\t", 5),
        (STORY.encode() + b"1 Mary went to the kitchen.\n", 4),
        (b"1 Mary went.\n2 Where is Mary?\n", 2),
        (b"1 Mary went.\n2 Where is Mary? \t\t1\n", 2),
        (b"1 Mary went.\n2 Where is Mary? \tapple,\t1\n", 2),
        (b"1 Mary went.\n2 Where is Mary? \tkitchen\t7\n", 2),
        (b"1 Mary went.\n2 Where is Mary? \tkitchen\tone\n", 2),
        (b"1 Mary went.\n2 Where is Mary? \tkitchen\t2\n", 2),
        (b"1 Mary w\xe9nt.\n2 Where is Mary? \tkitchen\t1\n", 1),
        (b"one Mary went.\n", 1),
        (b"{\n", 1),
        (b"2 Mary went.\n3 Where is Mary? \tkitchen\t2\n", 1),
        (b"", ""),
        # ids that do not rise by one: a line twice, a lost first line, a lost line, id 1 twice
        (b"1 A went.\n2 B went.\n2 C went.\n3 Where is A? \tx\t1\n", 3),
        (STORY.encode() + b"2 John left.\n3 Where is John? \tx\t2\n", 4),
        (STORY.encode() + b"1 John left.\n3 Where is John? \tx\t1\n", 5),
        (b"1 Mary went.\n1 Mary went.\n2 Where is Mary? \tkitchen\t1\n", 2),
        (b"0 Mary went.\n1 Where is Mary? \tkitchen\t0\n", 1),
        # a sentence or a question without words
        (b"1 Mary went.\n2  \n3 Where is Mary? \tkitchen\t1\n", 2),
        (b"1 Mary went.\n2 \tkitchen\t1\n", 2),
    ],
    ids=repr,
)
def test_a_broken_babi_file_is_named_with_its_line(room, tmp_path, content, line):
    path = tmp_path / "qa1_x_train.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"qa1_x_train\.txt.*\b{line}\b"):
        room.parse_babi(path)


def test_a_missing_babi_file_is_named(room, tmp_path):
    with pytest.raises(FileNotFoundError, match="qa1_single-supporting-fact_train.txt"):
        room.read_babi(tmp_path, "babi", 0)


def test_an_empty_data_dir_counts_as_unset(room, tmp_path, monkeypatch):
    folder = tmp_path / "babi/en"
    folder.mkdir(parents=True)
    (folder / "qa1_x_train.txt").write_text(STORY)
    monkeypatch.setattr(tk, "RAW", tmp_path)
    (tmp_path / "other").mkdir()
    for value in ("", str(tmp_path / "other"), str(tmp_path)):
        monkeypatch.setenv("TRACEKD_DATA_DIR", value)
        assert room.raw_folder() == folder


@pytest.mark.parametrize("value", ["/nosuch", "no/such"])
def test_a_data_dir_that_is_none_is_refused(room, monkeypatch, value):
    monkeypatch.setenv("TRACEKD_DATA_DIR", value)
    others = [notebook_functions(n) for n in ("11_decompose_cotempqa", "12_decompose_marco")]
    for call in [nb.raw_folder for nb in (room, *others)]:
        with pytest.raises(ValueError, match=f"TRACEKD_DATA_DIR = '{value}' names no folder"):
            call()
    with pytest.raises(ValueError, match=f"TRACEKD_DATA_DIR = '{value}' names no folder"):
        notebook_functions("09_reaudit_published").find_published()


def test_a_data_dir_means_the_same_from_every_folder(room, tmp_path, monkeypatch):
    monkeypatch.setattr(tk, "ROOT", tmp_path)
    (tmp_path / "raw").mkdir()
    monkeypatch.setenv("TRACEKD_DATA_DIR", "raw")
    for folder in (tmp_path, tmp_path / "raw"):
        monkeypatch.chdir(folder)
        assert room.data_dir() == tmp_path / "raw"


@pytest.mark.parametrize(
    "change, named",
    [
        ({"label": "weather"}, "weather.*object-place"),
        ({"split": "dev"}, "dev.*validation"),
        ({"answers": []}, "answer"),
        ({"answers": [" "]}, "answer"),
        ({"facts": []}, "facts"),
        ({"gold_facts": ["never said"]}, "never said"),
        ({"question": " "}, "question"),
        ({"dataset": "mars"}, "mars"),
        ({"id": "microworld/test/0"}, "microworld/test/0.*twice"),
        ({"label": None}, "None"),
        ({"answers": None}, "answers"),
        ({"question": 3}, "question"),
        ({"answers": "kitchen"}, "answers"),
        ({"facts": [1]}, "facts"),
    ],
    ids=repr,
)
def test_a_broken_row_is_named_with_file_and_line(example, tmp_path, change, named):
    path = tmp_path / "examples.jsonl"
    good = {**asdict(example), "id": "microworld/test/0"}
    tk.write_jsonl(path, [good, {**good, "id": "microworld/test/1", **change}])
    with pytest.raises(ValueError, match=rf"examples\.jsonl, (row|line) 2: (?s:.*){named}"):
        tk.read_examples(path)


@pytest.mark.parametrize(
    "line, named",
    [
        (b'{"id": "x"', "line 3"),
        (b"\xff\xfe{}", "line 3.*UTF-8"),
        (b"[1]", "line 3.*list"),
        (b"3", "line 3.*int"),
        (b"null", "line 3"),
    ],
    ids=repr,
)
def test_a_broken_line_is_named(tmp_path, line, named):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n\n' + line + b"\n")
    with pytest.raises(ValueError, match=rf"rows\.jsonl, {named}"):
        tk.read_jsonl(path)


def test_missing_fields_files_and_rows_are_named(tmp_path):
    path = tmp_path / "examples.jsonl"
    with pytest.raises(FileNotFoundError, match="examples.jsonl"):
        tk.read_examples(path)
    path.write_text("")
    with pytest.raises(ValueError, match="examples.jsonl"):
        tk.read_examples(path)
    path.write_text('{"id": "x", "facts": []}\n')
    with pytest.raises(ValueError, match="row 1.*gold_facts"):
        tk.read_examples(path)


def test_examples_come_back_as_written(microworld, tmp_path):
    odd = replace(microworld[0], question='漢字\u2028 \x85\t\\ "?', id="microworld/train/odd")
    path = tk.write_jsonl(tmp_path / "a" / "examples.jsonl", [*microworld[:9], odd])
    assert tk.read_examples(path) == [*microworld[:9], odd]


def broken_rows(last):
    yield {"a": 1}
    if isinstance(last, Exception):
        raise last
    yield {"a": last}


@pytest.mark.parametrize(
    "last, error",
    [(RuntimeError("cut"), RuntimeError), (float("nan"), ValueError), ({1, 2}, TypeError)],
)
def test_a_failed_write_leaves_the_old_file(tmp_path, last, error):
    path = tk.write_jsonl(tmp_path / "rows.jsonl", [{"old": 1}])
    with pytest.raises(error):
        tk.write_jsonl(path, broken_rows(last))
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]
    assert json.loads(path.read_text()) == {"old": 1}


def test_a_write_cut_short_by_the_system_leaves_the_old_file(tmp_path, monkeypatch):
    path = tk.write_json(tmp_path / "metrics.json", {"old": 1})

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(tk.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        tk.write_json(path, {"new": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.json"]
    assert json.loads(path.read_text()) == {"old": 1}


# ------------------------------------------------------------------------------- the rooms
def test_the_room_says_what_the_examples_were_made_from(nb, tmp_path, monkeypatch, microworld):
    monkeypatch.setattr(tk, "INTERIM", tmp_path / "interim")
    monkeypatch.setattr(tk, "RESULTS", tmp_path / "results")
    parameters = {"dataset": "microworld", "study": "s", "seed": 0, "n_test": 180}
    rows = [nb.compare(e, nb.rule_microworld(e.facts, e.question)) for e in microworld]
    parts = ["label_same", "facts_same", "answers_same"]
    found = nb.summarise(microworld, {"left_out": {}, "rows_read": {}}, pd.DataFrame(rows), parts)
    found |= {"dataset": "microworld", "seed": 0}
    found |= nb.made_from(microworld, parameters, {"a.txt": "0" * 64})
    examples, _ = nb.save_decomposition("s", found, microworld)
    stored = nb.check_study("s", parameters)
    assert stored == found and stored["parameters"] == {
        "dataset": "microworld",
        "seed": 0,
        "n_test": 180,
    }
    assert stored["examples_sha256"] == hashlib.sha256(examples.read_bytes()).hexdigest()
    assert stored["raw_as_on_card"] == {"a.txt": False} and stored["rows_known"] is None
    assert nb.check_study("another", {**parameters, "seed": 1}) == {}
    for name in ("seed", "n_test"):
        with pytest.raises(
            ValueError, match=rf"decomposition\.json: .*{name} = .*study=s-{name}-7"
        ):
            nb.check_study("s", {**parameters, name: 7})


def test_other_examples_do_not_replace_those_of_a_study(nb, tmp_path, monkeypatch, microworld):
    monkeypatch.setattr(tk, "INTERIM", tmp_path / "interim")
    monkeypatch.setattr(tk, "RESULTS", tmp_path / "results")
    parameters = {"dataset": "microworld", "study": "s", "seed": 0}
    found = {"dataset": "microworld", **nb.made_from(microworld, parameters, {})}
    paths = nb.save_decomposition("s", found, microworld)
    before = [path.read_bytes() for path in paths]
    other = {**found, **nb.made_from(microworld[1:], parameters, {"a.txt": "0" * 64})}
    with pytest.raises(
        ValueError, match=r"decomposition\.json: .*other examples.*a\.txt.*study=s-2"
    ):
        nb.save_decomposition("s", other, microworld[1:])
    assert [path.read_bytes() for path in paths] == before


def test_a_split_without_a_row_ends_the_run(nb, microworld):
    train = [e for e in microworld if e.split == "train"]
    rows = pd.DataFrame([nb.compare(e, None) for e in train])
    with pytest.raises(ValueError, match="no example in validation, test"):
        nb.summarise(train, {}, rows, ["label_same"])


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """The repository as it is cloned: with the stored decompositions, without raw data."""
    folder = make_workspace(tmp_path_factory.mktemp("clone"))
    for path in (ROOT / "data" / "results").glob("*/decomposition.json"):
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True)
        copy.write_bytes(path.read_bytes())
    return folder


def stored_files(folder):
    return {p: p.read_bytes() for p in (folder / "data").rglob("*") if p.is_file()}


def test_another_seed_leaves_the_committed_study_alone(committed):
    before = stored_files(committed)
    done = papermill(committed, "01_decompose_microworld", "-p", "seed", "1")
    assert done.returncode and re.search(
        r"ValueError: .*microworld/decomposition\.json: .*seed = 0, asked for is 1; give another",
        done.stderr,
    )
    assert stored_files(committed) == before


@pytest.mark.parametrize(
    "name", ["10_decompose_babi", "11_decompose_cotempqa", "12_decompose_marco"]
)
def test_without_raw_files_a_room_shows_what_is_committed(committed, name, monkeypatch):
    monkeypatch.setenv("TRACEKD_DATA_DIR", "")
    before = stored_files(committed)
    done = papermill(committed, name)
    assert done.returncode == 0, done.stderr[-3000:]
    assert stored_files(committed) == before
    found = tk.read_json(committed / f"data/results/{name.split('_')[-1]}/decomposition.json")
    out = json.loads((committed / f"{name}-out.ipynb").read_text())
    text = json.dumps([c.get("outputs") for c in out["cells"]])
    assert re.search(r"no raw files, so the stored .* was not fetched: .*TRACEKD_DATA_DIR", text)
    assert f"{found['kept']} examples are" in text and "Rule and annotation agree" in text
    assert all(f"{label}" in text for label in found["agreement"])
    for kind in found.get("disagreement_kinds", {}):
        assert kind in text


def test_without_raw_files_and_stored_counts_a_room_ends_with_advice(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACEKD_DATA_DIR", "")
    workspace = make_workspace(tmp_path / "clone")
    done = papermill(workspace, "12_decompose_marco")
    assert done.returncode and re.search(
        r"RuntimeError: microsoft/ms_marco at .*is there a network.*TRACEKD_DATA_DIR", done.stderr
    )
    assert not list((workspace / "data").glob("*/marco/*"))


def test_the_rule_carries_by_hand(nb):
    facts = (
        "Mary took the apple.",
        "Mary went to the garden.",
        "Mary gave the apple to John.",
        "John journeyed to the hall.",
        "John dropped the apple there.",
    )
    state = nb.simulate(facts)
    assert state.handled == {"Mary": [facts[0], facts[2]], "John": [facts[2], facts[4]]}
    assert state.held == {"Mary": {}, "John": {}}
    assert nb.rule_place(state, "apple") == ((facts[4], facts[3]), ("hall",))
    carried = nb.simulate(facts[:4])
    assert nb.rule_place(carried, "apple") == ((facts[2], facts[3]), ("hall",))
    assert nb.rule_place(nb.simulate(facts[:1]), "apple") is None  # nobody moved
