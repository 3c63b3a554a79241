"""90: measures with the tiny student, and draws what it has saved again."""

import json

import pytest
from conftest import make_workspace, notebook_functions, papermill


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Workspace after one measurement with the tiny student, and the executed process."""
    folder = make_workspace(tmp_path_factory.mktemp("speed"))
    done = papermill(
        folder,
        "90_benchmark_speed",
        "-p",
        "student",
        "tiny",
        "-p",
        "repeats",
        "1",
        "-p",
        "steps",
        "1",
        "-p",
        "tokens",
        "200",
        "-p",
        "batch_size",
        "4",
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def test_every_promised_field_is_measured(measured):
    found = json.loads((measured / "data/results/benchmark/speed.json").read_text())
    train, generate, score = found["train"], found["generate"], found["score"]
    assert train["ratio"] == pytest.approx(train["ours_tokens_per_s"] / train["trl_tokens_per_s"])
    assert 0 <= train["max_rel_loss_diff"] < 0.01  # the same loss, by two trainers
    assert train["max_rel_loss_diff_after_updates"] is None  # two steps: no update before them
    assert 0 < train["share_of_matmul_rate"] < 1
    # the first layer needs no gradient of its input, which tells with two layers
    assert train["flops_formula_over_counted"] == pytest.approx(1, abs=0.1)
    assert generate["ratio"] > 0 and 0 <= generate["identical_share"] <= 1
    assert score["outputs_per_s"] is None and "no predictions" in score["reason"]
    assert {"machine", "device", "versions", "parameters"} <= set(found)


def test_saved_measurements_are_drawn_again_to_the_byte(measured):
    figures = sorted((measured / "figures/benchmark").iterdir())
    before = {p: p.read_bytes() for p in figures}
    assert {p.suffix for p in figures} == {".svg", ".png", ".csv"}
    for path in figures:
        path.unlink()
    done = papermill(measured, "90_benchmark_speed", "-p", "repeats", "0")
    assert done.returncode == 0, done.stderr[-3000:]
    assert {p: p.read_bytes() for p in figures} == before


def test_nothing_saved_is_one_clear_error(tmp_path):
    done = papermill(make_workspace(tmp_path), "90_benchmark_speed", "-p", "repeats", "0")
    assert done.returncode and "speed.json is missing" in done.stderr


def test_operations_of_a_step_by_hand():
    """One layer, hidden 4, inner 8, one head; two rows of 3 and 2 tokens, 3 in the loss."""
    from types import SimpleNamespace

    config = SimpleNamespace(
        hidden_size=4,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        vocab_size=10,
    )
    rows = [{"mask": [0, 1, 1]}, {"mask": [0, 1]}]
    attention, products = notebook_functions("90_benchmark_speed").step_flops(config, rows, 2)
    frozen = 4 * 4 * 4 + 3 * 4 * 8  # q, k, v, o and the three of the inner layer
    lora = 2 * (4 * (4 + 4) + 3 * (4 + 8))
    assert attention == 6 * 1 * 4 * (9 + 4)
    assert products == 4 * frozen * 5 + 6 * lora * 5 + 4 * 4 * 10 * 3
