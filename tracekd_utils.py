"""Thin helper of the tracekd notebooks: what two or more of them share, and nothing else.

Heavy libraries are imported inside functions, so that a wrong parameter fails at once. What is
particular to a dataset is on its card (data/datasets.toml) and in the notebook that reads it; code
that is a lesson stands in the notebook that teaches it (`TAUGHT_IN`). The paper: arXiv 2505.13792.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import hashlib
import html
import io
import json
import os
import random
import re
import sys
import tomllib
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
from typing_extensions import TypedDict

if TYPE_CHECKING:
    import pandas as pd
    from pandas.io.formats.style import Styler

# ------------------------------------------------------------------------------------ paths
ROOT = Path(__file__).resolve().parent
RAW = ROOT / "data" / "raw"
INTERIM = ROOT / "data" / "interim"
RUNS = ROOT / "data" / "runs"
RESULTS = ROOT / "data" / "results"
CARDS = ROOT / "data" / "datasets.toml"
FIGURES = ROOT / "figures"

# ---------------------------------------------------------------------------- dataset cards
SPLITS = ("train", "validation", "test")


class Rows(TypedDict):
    """Rows of each split that a study takes."""

    train: int
    validation: int
    test: int


class Published(TypedDict):
    """How the paper writes and corrupts a dataset."""

    context: Literal["list", "lines"]
    after_question: str
    category: str
    evidence: str
    answers: Literal["list", "commas", "first"]
    gold: Literal["annotated", "holds answer", "most words"]
    wrong: Literal["as many facts, lower case", "one fact", "one passage"]
    warmup: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """What is particular to one dataset; data/datasets.toml explains each field."""

    __pydantic_config__ = {"extra": "forbid"}
    name: str
    labels: tuple[str, ...]
    rows: Rows
    epochs: int
    answers: Literal["all", "any"]
    separators: tuple[str, ...]
    ordered: tuple[str, ...] = ()
    private: bool = False
    max_new_tokens: int = 96
    batch_size: int = 8
    room: str = ""
    source: dict[str, Any] = dataclasses.field(default_factory=dict)
    published: Published | None = None

    def in_published_words(self) -> Published:
        """The card's table `published`; ValueError where the dataset has none."""
        if self.published is None:
            raise ValueError(
                f"dataset {self.name}: its card has no table `published`; use protocol=controlled"
            )
        return self.published


def dataset_names() -> list[str]:
    """Names of all datasets that have a card, the repository's own first."""
    own = tomllib.loads(CARDS.read_text(encoding="utf-8"))
    return [*own, *sorted(path.parent.name for path in INTERIM.glob("*/card.toml"))]


def dataset(name: str) -> Dataset:
    """Card of a dataset: data/interim/<name>/card.toml, else its entry in data/datasets.toml."""
    own = INTERIM / name / "card.toml"
    path = own if own.exists() else CARDS
    return _read_card(path, name, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _read_card(path: Path, name: str, changed: int) -> Dataset:
    """Read one card; `changed` is the file's time, so that an edited file is read again."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no TOML: {error}; correct the file") from None
    if path == CARDS and name not in table:
        refuse("dataset", name, dataset_names())
    fields = table[name] if path == CARDS else table
    allowed = ", ".join(field.name for field in dataclasses.fields(Dataset))
    where, advice = f"{path}, entry {name}", f"allowed fields: {allowed}"
    return check_type(Dataset, {**fields, "name": name}, where, advice, strict=False)


# ---------------------------------------------------------------------- examples and traces
@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """One question with context and gold; tuples are compared as sets, gold facts are in facts."""

    id: str
    dataset: str
    split: str
    question: str
    facts: tuple[str, ...]
    label: str
    gold_facts: tuple[str, ...]
    answers: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trace:
    """A reasoning trace: a label and cited facts, or `text` that is no list of facts."""

    label: str = ""
    facts: tuple[str, ...] = ()
    text: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parsed:
    """What an output says; `trace` and `answers` are None where there is none to read."""

    trace: Trace | None
    answers: tuple[str, ...] | None
    layout: str  # where the trace stood: before, after or none
    problems: tuple[str, ...] = ()  # every departure from the grammar
    reading: Trace | None = None  # lenient view of a trace that is free text


def item_of(example: Example) -> str:
    """Name of what an example says: 12 hex digits of the sha256 of its content, id left out.

    The same id under another seed of the dataset's notebook is another item.
    """
    parts = (example.question, example.facts, example.label, example.gold_facts, example.answers)
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()[:12]


def check_items(**sources: dict[str, str]) -> None:
    """Raise `ValueError` where an id has another item in one source than in the one before.

    `sources`: what is going to be joined by id, under the name that an error shall give it.
    """
    known: dict[str, tuple[str, str]] = {}
    for where, items in sources.items():
        for example_id, item in items.items():
            first, before = known.setdefault(example_id, (where, item))
            if item != before:
                raise ValueError(
                    f"id {example_id} is item {before} in {first} and item {item} in {where}: the "
                    "same id names two questions (another seed, other raw files); make the "
                    "examples of one of them again, or give them studies of their own"
                )


def stream(seed: int, example_id: str, purpose: str) -> random.Random:
    """Random stream of one decision about one example, independent of all others."""
    return random.Random(f"{seed}:{example_id}:{purpose}")


def _find_fault(example: Example) -> str | None:
    """What is wrong with an example, in words."""
    try:
        labels = dataset(example.dataset).labels
    except ValueError as error:  # no such card, or a bad one
        return str(error)
    strange = sorted(set(example.gold_facts) - set(example.facts))
    if example.label not in labels:
        return f"label {example.label!r} is none of {', '.join(labels)}"
    if example.split not in SPLITS:
        return f"split {example.split!r} is none of {', '.join(SPLITS)}"
    if not example.answers or not all(a.strip() for a in example.answers):
        return f"answers {example.answers!r} hold none"
    if not example.question.strip() or not example.facts:
        return "the question or the list of facts is empty"
    return f"gold facts {strange} are not in facts" if strange else None


def check_example(example: Example, where: str) -> Example:
    """Raise `ValueError` naming `where` and the id if an example breaks its contract."""
    fault = _find_fault(example)
    if fault:
        raise ValueError(f"{where}: example {example.id!r}: {fault}; correct or remove the row")
    return example


def read_examples(path: str | Path) -> list[Example]:
    """Read and check `examples.jsonl`; ids must be unique, and there must be rows."""
    examples = {}
    for number, row in enumerate(read_jsonl(path), start=1):
        where = f"{path}, row {number}"
        example = check_type(Example, row, where, "make the examples again", strict=False)
        check_example(example, where)
        if example.id in examples:
            raise ValueError(f"{where}: id {example.id!r} stands twice")
        examples[example.id] = example
    if not examples:
        raise ValueError(f"{path} holds no example; make the examples again")
    return list(examples.values())


def save_examples(name: str, examples: Iterable[Example]) -> Path:
    """Check the examples of a dataset and write data/interim/<name>/examples.jsonl."""
    path = INTERIM / name / "examples.jsonl"
    return write_jsonl(path, [check_example(e, str(path)) for e in examples])


# ------------------------------------------------------------------------------------ files
def write_atomic(path: str | Path, content: str | bytes) -> Path:
    """Write `content` so that `path` holds either the old file or the whole new one."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(partial, path)
    except OSError as error:
        raise OSError(
            f"{path} could not be written ({error}); free some space or make its folder "
            "writable and run this again: what is finished is kept"
        ) from None
    finally:
        if os.path.lexists(partial):
            partial.unlink()
    return path


def write_json(path: str | Path, value: Any) -> Path:
    """Write `value` as indented JSON; NaN is refused, since JSON has none."""
    return write_atomic(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_jsonl(path: str | Path, rows: Iterable) -> Path:
    """Write dictionaries or dataclasses, an object a line, all or nothing."""
    rows = (dataclasses.asdict(row) if dataclasses.is_dataclass(row) else row for row in rows)
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
    return write_atomic(path, "".join(lines))


def _object(pairs: list[tuple[str, Any]]) -> dict:
    """Fields of a JSON object, each once: of two, one would be lost in silence."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a field stands twice among {[name for name, _ in pairs]}")
    return found


def _read_object(text: bytes, where: str) -> dict:
    """One JSON object in UTF-8; ValueError with `where` and what was found there."""
    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=_object)
        if isinstance(found, dict):
            return found
        error = f"a {type(found).__name__}"
    except ValueError as failure:  # UnicodeDecodeError and JSONDecodeError too
        error = str(failure)
    raise ValueError(
        f"{where}: expected one JSON object in UTF-8, found {text[:60]!r} ({error}); "
        "write the file again"
    )


@functools.lru_cache(maxsize=64)
def _type_adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def check_type(kind: Any, value: Any, where: str, advice: str, strict: bool = True) -> Any:
    """`value` as a `kind` (dataclass, TypedDict), checked by pydantic.

    ValueError names `where`, each field with what was found there, and `advice`. Not `strict`:
    a list may stand for a tuple.
    """
    from pydantic import ValidationError

    try:
        return _type_adapter(kind).validate_python(value, strict=strict)
    except ValidationError as error:
        faults = []
        for e in error.errors()[:5]:
            field = ".".join(map(str, e["loc"]))
            faults.append(f"field {field}: {e['msg']}, found {e['input']!r:.60}")
        raise ValueError(f"{where}: {'; '.join(faults)}; {advice}") from None


def _existing(path: str | Path) -> Path:
    if not Path(path).exists():
        raise FileNotFoundError(f"{path} is missing: run the notebook that writes it (README.md)")
    return Path(path)


def read_json(path: str | Path) -> dict:
    """Read a file that holds one JSON object."""
    return _read_object(_existing(path).read_bytes(), str(path))


def read_jsonl(path: str | Path) -> list[dict]:
    """Read JSON lines; an error names the file, the line and what was found there."""
    lines = enumerate(_existing(path).read_bytes().split(b"\n"), start=1)
    return [_read_object(line, f"{path}, line {n}") for n, line in lines if line.strip()]


def write_parquet(path: str | Path, rows: list[dict], types: dict[str, str] | None = None) -> Path:
    """Write rows as Parquet (zstd); `types`: Arrow types of columns that may be all null."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(rows)
    for name, kind in (types or {}).items():
        if name in table.column_names:
            column = table.column(name).cast(pyarrow.type_for_alias(kind))
            table = table.set_column(table.column_names.index(name), name, column)
    content = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, content, compression="zstd")
    return write_atomic(path, content.getvalue().to_pybytes())


def read_parquet(path: str | Path) -> list[dict]:
    """Rows of a Parquet file as plain Python values; ValueError where it cannot be read."""
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(_existing(path), partitioning=None).to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is no whole Parquet file ({error}); write it again") from None


# ------------------------------------------------------------------------------------- text
LONGEST = 20_000  # characters read of an output, and of a text that is normalised
WORD = re.compile(r"(?:(?<![\w.,)\]])-)?\d+(?:[.,:/]\d+)*\w*|\w+")
THOUSANDS = re.compile(r"(?<![\w.,:/])\d{1,3}(?:,\d{3})+(?![\d,:/])")
# stream-safe text (UAX 15): 30 combining marks in a row, or normalisation takes quadratic time
MANY_MARKS = re.compile(
    r"((?:[^\w\s\x00-\x7f]|[\uff9e\uff9f]){30})(?:[^\w\s\x00-\x7f]|[\uff9e\uff9f])+"
)


def compatible(text: str) -> str:
    """The first `LONGEST` characters in Unicode's form NFKC, in linear time."""
    text = MANY_MARKS.sub(r"\1", text[:LONGEST])
    return unicodedata.normalize("NFKC", text)[:LONGEST]


def whole_word(answer: str) -> re.Pattern:
    """Pattern of an answer as a whole word or phrase, upper or lower case; no part of a number."""
    before = r"(?<!\w)(?<!\d[.,:/])" if answer[:1].isdigit() else r"(?<!\w)"
    after = r"(?!\w|[.,:/]\d)" if answer[-1:].isdigit() else r"(?!\w)"
    return re.compile(f"{before}{re.escape(answer)}{after}", re.IGNORECASE)


@functools.lru_cache(maxsize=100_000)
def normalise(text: str) -> str:
    """Words of a text in lower case, joined by one space (Unicode NFKC, no marks).

    A number is one word: `-2`, `3.5`, `1/2` and `10:30` stay whole, `1,000` is `1000`.
    """
    text = compatible(text).casefold().replace("\u2212", "-").replace("\u2044", "/")
    text = THOUSANDS.sub(lambda m: m[0].replace(",", ""), text)
    return " ".join(WORD.findall(text))


def holds(text: str, phrase: str) -> bool:
    """Does a text hold a phrase, such as an answer, as whole words (see `normalise`)?"""
    return f" {normalise(phrase)} " in f" {normalise(text)} "


@functools.lru_cache(maxsize=10_000)
def label_key(text: str) -> str:
    """Form in which labels are compared: plurals and joining marks do not count."""
    words = normalise(text).replace("_", " ").split()
    return " ".join(w[:-1] if len(w) > 3 and w.endswith("s") else w for w in words)


def escape(text: str) -> str:
    """What the grammar uses becomes \\uXXXX, reversibly."""
    return re.sub(r"[\\;<\n\r]", lambda m: f"\\u{ord(m[0]):04x}", text)


def unescape(text: str) -> str:
    """Text that `escape` has changed, as it was."""
    return re.sub(r"\\u([0-9a-f]{4})", lambda m: chr(int(m[1], 16)), text)


FORMAT_REQUEST = """
Answer the question. First name the type of the question, one of: {labels}. \
Then copy the facts that are needed from the context. Then answer in as few words as possible. \
Write exactly this format and nothing else:
<think>Question type: the type
Facts:
- a fact
- another fact</think>
<answer>the answer</answer>"""


def render_prompt(example: Example, protocol: str = "controlled", direct: bool = False) -> str:
    """Text that the student reads: the facts, one a line, and the question.

    With `direct` the untuned student of `controlled` is also told format and labels (for its
    chat template). `published` has the paper's wording.
    """
    check_protocol(protocol)
    card = dataset(example.dataset)
    if protocol == "published":
        words = card.in_published_words()
        facts = str([*example.facts]) if words["context"] == "list" else "\n".join(example.facts)
        return (
            f"Answer the question based on the context:\n{facts}\nQuestion: {example.question}"
            f"{words['after_question']}Only return the answer.\n"
        )
    facts = "\n".join(map(escape, example.facts))
    prompt = f"Context:\n{facts}\nQuestion: {escape(example.question)}\n"
    if direct:
        prompt += FORMAT_REQUEST.format(labels=", ".join(card.labels))
    return prompt


def published_parts(card: Dataset) -> tuple[str, str, str, str]:
    """What stands before label, facts and answer in the paper's targets, and at the end."""
    words = card.in_published_words()
    start, middle = f"<think>{words['category']}: ", f".\n{words['evidence']}: "
    return start, middle, "</think> <answer>", "</answer>"


def _render_published(example: Example, trace: Trace | None) -> str:
    """Target in the paper's words; without a trace the answer stands alone, without tags."""
    card = dataset(example.dataset)
    answer = ",".join(example.answers)
    if card.in_published_words()["answers"] == "list":
        answer = str([*example.answers])
    if card.in_published_words()["answers"] == "first":
        answer = example.answers[0]
    if trace is None:
        return answer
    start, middle, end, last = published_parts(card)
    cited = trace.text or str([*trace.facts])  # `text` is one fact that is no list
    return start + trace.label + middle + cited + end + answer + last


def render_target(
    example: Example, trace: Trace | None, protocol: str = "controlled", layout: str = "before"
) -> str:
    """Text that the student is trained to write: trace and answers, joined by `; `.

    Where a card says that answers are alternatives, the first one is written. The trace, unless
    it is None, stands `before` or `after` the answers (`layout`).
    """
    check_protocol(protocol)
    if protocol == "published":
        return _render_published(example, trace)
    one = dataset(example.dataset).answers == "any"
    answers = example.answers[:1] if one else example.answers
    answer = f"<answer>{'; '.join(map(escape, answers))}</answer>"
    if trace is None:
        return answer
    content = "\n- ".join(
        [f"Question type: {escape(trace.label)}\nFacts:", *map(escape, trace.facts)]
    )
    if trace.text is not None:
        content = escape(trace.text)
    thought = f"<think>{content}</think>"
    return f"{answer}\n{thought}" if layout == "after" else f"{thought}\n{answer}"


# ------------------------------------------------------------------------------- statistics


def estimate(
    value: float | None, low: float | None, high: float | None, n: int, reason: str | None = None
) -> dict:
    """An estimate with its 95 % interval and n; None and a reason where it is not defined."""
    numbers = {"estimate": value, "low": low, "high": high}
    found = {name: None if v is None else float(v) for name, v in numbers.items()}
    return {**found, "n": int(n), "reason": reason}


def proportion(successes: int, n: int) -> dict:
    """Share with its 95 % Wilson interval (statsmodels); null with n = 0."""
    from statsmodels.stats.proportion import proportion_confint

    if n == 0:
        return estimate(None, None, None, 0, "no item to count")
    return estimate(successes / n, *proportion_confint(successes, n, method="wilson"), n)


def share(values: pd.Series) -> dict:
    """Share of true values with its Wilson interval, empty ones left out."""
    known = values.dropna().astype(bool)
    return proportion(int(known.sum()), len(known))


def mean_interval(values: Iterable[float]) -> dict:
    """Mean of item values with a 95 % percentile bootstrap interval over items.

    4,000 resamples by `scipy.stats.bootstrap`, seed 0; empty values are left out. Without spread
    there is no interval, and the reason says so.
    """
    from scipy.stats import bootstrap

    x = np.asarray(values, float)
    x = x[~np.isnan(x)]
    if len(x) == 0:
        return estimate(None, None, None, 0, "no item")
    if np.ptp(x) == 0:
        return estimate(x.mean(), None, None, len(x), f"all {len(x)} values are equal")
    rng = np.random.default_rng(0)
    found = bootstrap((x,), np.mean, n_resamples=4000, method="percentile", rng=rng)
    return estimate(x.mean(), *found.confidence_interval, len(x))


def mcnemar_midp(only_first: int, only_second: int) -> float:
    """Mid-p value of McNemar's test on the two counts of discordant pairs.

    p = 2 P(X <= k) - P(X = k) with X ~ Binomial(b + c, 1/2) and k the smaller count (Fagerland,
    Lydersen and Laake 2013); 1 where the counts are equal.
    """
    from scipy.stats import binom

    if only_first == only_second:
        return 1.0
    k, n = min(only_first, only_second), only_first + only_second
    return float(min(1.0, 2 * binom.cdf(k, n, 0.5) - binom.pmf(k, n, 0.5)))


def paired_difference(first: Sequence, second: Sequence) -> dict:
    """Mean of first minus second over the same items in the same order.

    The interval is the percentile bootstrap of `mean_interval`. For two columns of right and wrong
    answers, `p` is McNemar's mid-p and `only_first`, `only_second` count the discordant items; for
    other numbers the three are None. Pairs with an empty value are left out.
    """
    pairs = np.column_stack([np.asarray(first, float), np.asarray(second, float)])
    pairs = pairs[~np.isnan(pairs).any(axis=1)]
    difference = pairs[:, 0] - pairs[:, 1]
    found = mean_interval(difference) | dict.fromkeys(("only_first", "only_second", "p"))
    if len(pairs) and np.isin(pairs, (0, 1)).all():
        discordant = int((difference > 0).sum()), int((difference < 0).sum())
        found["only_first"], found["only_second"] = discordant
        found["p"] = mcnemar_midp(*discordant)
    return found


# --------------------------------------------------------------------------------- students
STUDENTS = ("tiny", "smollm2-135m")  # by name; any hub id or local folder works as well
PINS = {  # commits on the hub
    "meta-llama/Llama-3.2-1B-Instruct": "9213176726f574b556790deb65791e0c5aa438b6",
    "Qwen/Qwen3-1.7B": "70d244cc86ccca08cf5af4e1e306ecf908b1ad5e",
}
# the paper's seven, where LoRA stands
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# words of the generated stories; the tiny student's tokenizer is trained on them
PEOPLE = ("Mary", "John", "Sandra", "Daniel", "Emma", "Peter", "Lucy", "Oscar")
PLACES = ("kitchen", "garden", "office", "hallway", "bedroom", "library", "cellar")
THINGS = ("apple", "ball", "book", "lamp", "coin", "key", "cup")
BOXES = ("box", "chest", "crate", "basket", "jar", "bag")
QUESTION_TYPES = (
    "person-place",
    "object-place",
    "object-holder",
    "carried-count",
    "place-before",
    "size-compare",
)


def resolve_device(dtype: str = "auto") -> dict:
    """{device, dtype, reason}; a CPU without tile units (AMX) is slower in bf16 than in fp32.

    `dtype`: auto, float32 or bfloat16. On a GPU without fast bf16, auto is fp16.
    """
    import torch

    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    if dtype != "auto":
        return {"device": device, "dtype": getattr(torch, dtype), "reason": "dtype as asked for"}
    found = "a GPU was found, it" if gpu else "no GPU found; this CPU"
    fast = torch.cuda.is_bf16_supported() if gpu else torch.cpu._is_amx_tile_supported()
    if fast:
        return {"device": device, "dtype": torch.bfloat16, "reason": f"{found} has fast bf16"}
    slow = torch.float16 if gpu else torch.float32
    return {"device": device, "dtype": slow, "reason": f"{found} has no fast bf16"}


def quiet() -> None:
    """Keep the libraries' progress bars and notices out of a notebook's output."""
    import logging
    import warnings

    warnings.filterwarnings("ignore", message="IProgress not found")  # raised by the next line
    from transformers.utils import logging as notices

    notices.set_verbosity_error()
    notices.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)


# ------------------------------------------------------------------------------- parameters
PROTOCOLS = ("controlled", "published")
# conditions whose student is not trained
UNTRAINED = ("direct", "direct_few_shot", "direct_few_shot_plain")


def refuse(what: str, value: Any, known: Iterable[str], extra: str = "") -> None:
    """Raise `ValueError` about an unknown name, with the known ones and the nearest."""
    near = difflib.get_close_matches(str(value), list(known), 1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{what}: {value!r} is unknown; known: {', '.join(known)}{extra}.{hint}")


def check_protocol(protocol: str) -> None:
    """Raise `ValueError` for a protocol that is none."""
    if protocol not in PROTOCOLS:
        refuse("protocol", protocol, PROTOCOLS)


def check_student(name: str) -> None:
    """Raise `ValueError` unless the name is an embedded student, a hub id or a folder."""
    if name not in STUDENTS:
        lesson("31_run_students").find_folder(name)


class _Code(NamedTuple):
    """Code of a notebook as syntax trees; nothing is executed."""

    path: Path
    parameters: list[ast.stmt]  # of the cell tagged so
    others: list[ast.stmt]


@functools.lru_cache(maxsize=64)
def _read_code(path: Path, changed: int) -> _Code:
    code = _Code(path, [], [])
    for cell in read_json(path)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and not source.startswith("%"):
            tagged = "parameters" in cell["metadata"].get("tags", [])
            (code.parameters if tagged else code.others).extend(ast.parse(source).body)
    return code


def _code_of(notebook: str) -> _Code:
    path = ROOT / "notebooks" / f"{notebook}.ipynb"
    if not path.exists():
        refuse("notebook", notebook, sorted(p.stem for p in path.parent.glob("[0-9]*.ipynb")))
    return _read_code(path, path.stat().st_mtime_ns)


def _assigned(nodes: Iterable[ast.stmt]) -> dict[str, ast.expr]:
    """Names that statements assign, with their expressions."""
    plain = [n for n in nodes if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name)]
    return {node.targets[0].id: node.value for node in plain}


def notebook_defaults(name: str) -> dict[str, Any]:
    """Values in the notebook's cell tagged `parameters`."""
    return {k: ast.literal_eval(v) for k, v in _assigned(_code_of(name).parameters).items()}


def conditions(protocol: str = "controlled") -> list[str]:
    """Conditions of a protocol: the keys of the registry in 02_corrupt_traces."""
    check_protocol(protocol)
    registry = "CONDITIONS" if protocol == "controlled" else "PUBLISHED"
    return [key.value for key in _assigned(_code_of("02_corrupt_traces").others)[registry].keys]


def lesson(name: str, /, **parameters: Any) -> SimpleNamespace:
    """What a notebook defines, so that another one calls the very code that is taught there.

    Its imports, functions, classes and UPPERCASE constants; `parameters` replace its defaults.
    """
    return _run_lesson(_code_of(name).path.stat().st_mtime_ns, name, tuple(parameters.items()))


@functools.lru_cache(maxsize=64)
def _run_lesson(changed: int, name: str, parameters: tuple) -> SimpleNamespace:
    names = {"tk": sys.modules[__name__], "__name__": name}
    names |= {**notebook_defaults(name), **dict(parameters)}
    definitions = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    body = []
    for node in _code_of(name).others:
        constant = any(name.isupper() for name in _assigned([node]))
        if constant or isinstance(node, definitions):
            body.append(node)
    # the helper's own `annotations` import would make those of a notebook's dataclass text
    exec(compile(ast.Module(body, []), name, "exec", dont_inherit=True), names)
    return SimpleNamespace(**names)


# code that stands where it is taught: `tk.score` is the function `score` of 35_score_answers
TAUGHT_IN = {
    "00_run_study": ("fetch", "find_examples", "read_predictions"),
    "03_finetune_student": (
        "collate",
        "training_order",
        "progress_callback",
        "speed_up_lora",
        "finetune",
    ),
    "05_analyse_disconnect": ("phi_coefficient", "stratified_association", "disconnect_statistics"),
    "09_reaudit_published": ("released_extract", "released_score"),
    "30_read_outputs": ("parse_output",),
    "31_run_students": (
        "find_student",
        "student_folder",
        "load_tokenizer",
        "load_student",
        "encode_prompt",
        "encode_row",
        "end_tokens",
        "own_settings",
        "check_ids",
        "generate",
        "decode_output",
        "weigh",
        "answer_weights",
        "check_round_trip",
    ),
    "36_keep_runs_whole": (
        "read_rows",
        "lock_folder",
        "read_outputs",
        "output_writer",
        "last_checkpoint",
        "half_written",
    ),
    "35_score_answers": ("match_fact", "token_f1", "score", "quadrant", "quadrants"),
    "38_read_pieces": ("read_answers", "take_answers"),
}


def __getattr__(name: str) -> Any:
    """Names of the public surface that stand in the notebook that teaches them."""
    for notebook, names in TAUGHT_IN.items():
        if name in names:
            globals()[name] = getattr(lesson(notebook), name)  # looked up once
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _read_bool(value: Any) -> Any:
    """`false` for False: papermill's -p passes it as text."""
    words = {"true": True, "false": False}
    return words.get(value.lower(), value) if isinstance(value, str) else value


def _validate(notebook: str, values: dict[str, Any]) -> dict[str, Any]:
    """Parameters in the types of the notebook's defaults and within its literal `LIMITS`.

    `LIMITS`: name -> [lowest, highest] or (choice, choice, …). pydantic's ValidationError.
    """
    from pydantic import BeforeValidator, ConfigDict, Field, create_model

    limits = ast.literal_eval(_assigned(_code_of(notebook).others)["LIMITS"])
    limits["seed"] = [0, 2**31 - 1]
    fields: dict[str, Any] = {}
    for name, default in notebook_defaults(notebook).items():
        kind, rule = type(default), limits.get(name)
        if kind is bool:
            kind = Annotated[bool, BeforeValidator(_read_bool)]
        if isinstance(rule, tuple):
            kind = Literal[rule]
        fields[name] = (kind, Field(ge=rule[0], le=rule[1]) if isinstance(rule, list) else ...)
    strict = ConfigDict(strict=True, extra="forbid")
    return create_model(notebook, __config__=strict, **fields).model_validate(values).model_dump()


def _complain(notebook: str, error: dict) -> None:
    """Raise `ValueError` about something that pydantic found wrong with a parameter."""
    name, value = error["loc"][0], error["input"]
    if error["type"] == "extra_forbidden":
        refuse(f"parameter of {notebook}", name, notebook_defaults(notebook))
    if error["type"] == "missing":
        raise ValueError(f"{notebook}: parameters missing: {name}")
    kind = type(notebook_defaults(notebook)[name]).__name__
    raise ValueError(
        f"parameter {name} = {value!r} is {type(value).__name__} or out of range, expected {kind}: "
        f"{error['msg']}; papermill: numbers and true/false by -p, strings by -r"
    )


def _given_names(values: dict[str, Any]) -> set[str]:
    """Names that were passed; in a kernel those in papermill's injected cell."""
    if not isinstance(values.get("In"), list):
        return {name for name in values if not name.startswith("_")}
    cells = [ast.parse(cell).body for cell in values["In"] if cell.startswith("# Parameters")]
    return {name for cell in cells for name in _assigned(cell)}


def _check_meaning(values: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Check parameters that mean the same in every notebook; an empty default is allowed."""
    given = {name: value for name, value in values.items() if value or defaults[name]}
    protocol = given.get("protocol", "controlled")
    check_protocol(protocol)
    for condition in given.get("conditions", given.get("condition", "correct")).split(","):
        if condition not in conditions(protocol):
            refuse(f"condition (protocol {protocol})", condition, conditions(protocol))
    if "dataset" in given and given["dataset"] not in dataset_names():
        refuse("parameter dataset", given["dataset"], dataset_names())
    if "student" in given:
        check_student(given["student"])
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,60}", given.get("study", "x")):
        raise ValueError(f"parameter study = {given['study']!r} is no name for a folder")


def check_parameters(notebook: str, values: dict[str, Any]) -> dict[str, Any]:
    """Check the parameters of a notebook in `values` (its `globals()`) and return them.

    Coerced values are written back; an empty `study` becomes the dataset's name, and a study that
    holds another dataset is refused. A wrong name, type or value raises ValueError naming it.
    """
    from pydantic import ValidationError

    defaults = notebook_defaults(notebook)
    names = _given_names(values) | (defaults.keys() & values.keys())
    try:
        resolved = _validate(notebook, {name: values[name] for name in names})
    except ValidationError as error:
        return _complain(notebook, error.errors()[0])
    _check_meaning(resolved, defaults)
    if "/" in resolved.get("student", ""):  # children run elsewhere, results name no path
        resolved["student"] = lesson("31_run_students").find_student(resolved["student"])
    if resolved.get("dataset") and "study" in resolved:
        resolved["study"] = resolved["study"] or resolved["dataset"]
        claim_study(resolved["study"], resolved["dataset"])
    values.update(resolved)
    return resolved


# ---------------------------------------------------------------------- runs and launching
def claim_study(study: str, name: str) -> Path:
    """Folder of the results of a study; ValueError if it holds another dataset."""
    folder = RESULTS / study
    for path in (*sorted(folder.glob("*.json")), *sorted(folder.glob("*/metrics.json"))):
        found = read_json(path)
        given = found.get("parameters")
        held = found.get("dataset") or (isinstance(given, dict) and given.get("dataset")) or name
        if held != name:
            raise ValueError(
                f"study {study!r} holds the dataset {held} ({path}), not {name}: a study holds "
                f"one. Give this one a study of its own, such as study={name}"
            )
    return folder


def find_room(name: str) -> str | None:
    """Notebook that makes the examples of a dataset, None where the repository has none."""
    found = sorted((ROOT / "notebooks").glob(f"*_decompose_{name}.ipynb"))
    return dataset(name).room or (found[0].stem if found else None)


def sft_path(name: str, protocol: str, condition: str, dose: float, seed: int) -> Path:
    """File of (prompt, target) rows that 02 writes and 03 reads."""
    return INTERIM / name / "sft" / protocol / f"{condition}-dose{dose:g}-seed{seed}.jsonl"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One run of 03: its identity and its folder. `parameters` are resolved, 0 is filled in."""

    run_id: str
    data_hash: str
    parameters: dict[str, Any]
    sft: Path

    @property
    def folder(self) -> Path:
        """Adapter, outputs and whatever is not committed."""
        return RUNS / self.run_id

    @property
    def adapter(self) -> Path:
        """The file that holds the trained weights."""
        return self.folder / "adapter" / "adapter_model.safetensors"

    @property
    def is_trained(self) -> bool:
        """Is nothing left to train? An adapter that is empty or cut short is none."""
        from safetensors import SafetensorError, safe_open

        if self.parameters["condition"] in UNTRAINED:
            return True
        try:
            with safe_open(self.adapter, framework="numpy"):
                return (self.folder / "training.json").exists()
        except (OSError, SafetensorError):
            return False


def resolve_run(parameters: dict[str, Any]) -> Run:
    """Identity of a run of 03: readable slug, and hash of parameters and training file."""
    p, card = dict(parameters), dataset(parameters["dataset"])
    for name in ("epochs", "batch_size", "max_new_tokens"):
        p[name] = p[name] or getattr(card, name)
    if p["student"] not in STUDENTS:  # a folder counts by its content
        p["student"] = lesson("31_run_students").find_student(p["student"])
    path = sft_path(p["dataset"], p["protocol"], p["condition"], p["dose"], p["seed"])
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing; run 02_corrupt_traces with dataset={p['dataset']}, "
            f"seed={p['seed']}, dose={p['dose']:g}"
        )
    rows = read_jsonl(path)
    for row in rows:  # what a row was made of is no part of what is trained on
        row.pop("item", None)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    data_hash = hashlib.sha256(lines.encode()).hexdigest()
    return Run(run_id=make_run_id(p, data_hash), data_hash=data_hash, parameters=p, sft=path)


# parameters of 03 that say nothing about what comes out, and those added when runs were
# committed, at their default
NO_IDENTITY = (
    ("study", None),
    ("checkpoint_steps", None),
    ("dtype", "auto"),
    ("loss", "completion"),
    ("temperature", 0.0),
)


def make_run_id(parameters: dict[str, Any], data_hash: str) -> str:
    """Slug and eight hex digits of resolved parameters and of the training file's hash."""
    p = parameters
    free = [name for name, default in NO_IDENTITY if default is None or p.get(name) == default]
    identity = json.dumps({name: p[name] for name in sorted(p) if name not in free})
    student = p["student"].strip("./").replace("/", "--")
    digest = hashlib.sha256((identity + data_hash).encode()).hexdigest()[:8]
    parts = (p["dataset"], student, p["condition"], p["protocol"], f"seed{p['seed']}", digest)
    return "-".join(parts)


RESTORE = "restore this run's folder, or remove it and score the run again (04)"


class _Fields(dict):
    """Fields of a file; one that is missing is a ValueError that names file and field."""

    def __init__(self, path: Path, fields: dict[str, Any]):
        super().__init__(fields)
        self.path = path

    def __missing__(self, name: str) -> None:
        raise ValueError(f"{self.path}: field {name} is missing; {RESTORE}")


@dataclasses.dataclass(kw_only=True)
class StoredRun:
    """A scored run of a study, as its files in data/results/<study>/<run_id>/ tell it."""

    folder: Path
    metrics: dict[str, Any]
    parameters: dict[str, Any]  # of 03, resolved, and `n_train`
    condition: str
    seed: int
    dose: float
    arm: str = ""  # what the runs of a study differ in besides their seed

    @functools.cached_property
    def frame(self) -> pd.DataFrame:
        """One row a test item: output, scores, quadrant, finished; checked as 00 teaches."""
        return lesson("00_run_study").read_predictions(self)

    @functools.cached_property
    def curve(self) -> pd.DataFrame | None:
        """Losses of the training, None for a student that was not trained."""
        import pandas as pd

        path = self.folder / "training_curve.csv"
        return pd.read_csv(path) if path.exists() else None


def _read_run(path: Path) -> StoredRun:
    metrics = read_json(path)
    check_type(lesson("00_run_study").Metrics, metrics, str(path), RESTORE)
    p = _Fields(path, metrics["parameters"])
    metrics = _Fields(path, metrics | {"parameters": p})
    known = {name: p[name] for name in ("condition", "seed", "dose")}
    return StoredRun(folder=path.parent, metrics=metrics, parameters=p, **known)


def check_runs(runs: Iterable[StoredRun]) -> None:
    """Raise `ValueError` where runs that are going to be joined by id have other items."""
    sources = {}
    for run in runs:
        rows = run.frame
        sources[run.folder.name] = dict(zip(rows["id"], rows["item"], strict=True))
    check_items(**sources)


def _name_arm(p: dict[str, Any], others: list[dict[str, Any]]) -> str:
    """Name of an arm: condition, dose if it is not 1, and what else varies in the study."""
    name = p["condition"] if p["dose"] == 1 else f"{p['condition']}, {p['dose']:.0%} of rows"
    for key in ("student", "protocol"):
        if p[key] != "controlled" and len({other[key] for other in others}) > 1:
            name += f", {p[key].rpartition('/')[2]}"
    if p.get("loss", "completion") != "completion":
        name += f", loss {p['loss']}"
    return name + (f", temperature {p['temperature']:g}" if p.get("temperature") else "")


def study_runs(study: str) -> list[StoredRun]:
    """Scored runs of a study, in the order of the registry of conditions, doses and seeds."""
    folder = RESULTS / study
    runs = [_read_run(path) for path in sorted(folder.glob("*/metrics.json"))]
    if not runs:
        raise FileNotFoundError(f"{folder} holds no run; run 00_run_study with study={study}")
    claim_study(study, runs[0].parameters["dataset"])
    for run in runs:
        run.arm = _name_arm(run.parameters, [other.parameters for other in runs])
    order = [*conditions(), *(run.condition for run in runs)]  # those of nobody's registry last
    runs.sort(key=lambda run: (order.index(run.condition), run.dose, run.arm, run.seed))
    twice = [key for key, n in Counter((run.arm, run.seed) for run in runs).items() if n > 1]
    if twice:
        raise ValueError(
            f"{folder}: more than one run of {sorted(twice)}; remove the stale folder, or give "
            "the new runs another study"
        )
    return runs


class _Lines(io.TextIOBase):
    """File that passes each line of a notebook's output on as it comes."""

    def __init__(self, on_line: Callable[[str], None]):
        self.on_line, self.rest = on_line, ""

    def write(self, text: str) -> int:
        """Pass on the lines that are whole."""
        *whole, self.rest = (self.rest + text).split("\n")
        for line in whole:
            self.on_line(line.rstrip())
        return len(text)


def run_notebook(
    name: str, /, *, on_line: Callable[[str], None] = lambda line: None, **parameters: Any
) -> Path:
    """Execute a notebook in a process of its own; return the executed notebook's path.

    `on_line` gets each line that it prints. ValueError for a wrong parameter, before anything
    starts; RuntimeError, with its error, for a notebook that fails.
    """
    values = check_parameters(name, {**notebook_defaults(name), **parameters})
    import papermill
    from papermill.exceptions import PapermillExecutionError

    which = [str(values[key]) for key in ("condition", "seed", "run_id") if values.get(key)]
    output = RUNS / "notebooks" / values.get("study", "") / f"{'-'.join([name, *which])}.ipynb"
    output.parent.mkdir(parents=True, exist_ok=True)
    options = {"stdout_file": _Lines(on_line), "progress_bar": False}
    options["extra_arguments"] = ["--IPKernelApp.log_level=40"]  # no notice about its port
    try:
        papermill.execute_notebook(str(_code_of(name).path), str(output), parameters, **options)
    except PapermillExecutionError as error:
        raise RuntimeError(f"{name} failed ({output}): {error.ename}: {error.evalue}") from None
    return output


# ---------------------------------------------------------------------------------- showing
MARKERS = "osD^vPX"
RIGHT, WRONG = "#029e73", "#d55e00"  # trace right, trace wrong


def use_style() -> None:
    """Seaborn theme of figures: colour-blind palette, one size, stable SVG ids, text as text."""
    import seaborn

    settings = {
        "figure.figsize": (7.2, 4.2),
        "figure.dpi": 100,
        "savefig.dpi": 80,
        "svg.fonttype": "none",
        "svg.hashsalt": "tracekd",
        "font.sans-serif": "DejaVu Sans",
        "text.parse_math": False,  # a `$` in a name is a dollar
        "axes.titlesize": "medium",
        "figure.constrained_layout.use": True,
    }
    seaborn.set_theme(context="notebook", style="whitegrid", palette="colorblind", rc=settings)


def condition_colours() -> dict[str, tuple]:
    """One colour a condition, the same in all figures."""
    import seaborn

    # the first three colours are the most distinct ones
    names = dict.fromkeys(["correct", "incorrect", "vanilla", *conditions()])
    palette = [*seaborn.color_palette("colorblind"), *seaborn.color_palette("dark")]
    return dict(zip(names, palette, strict=False))


def draw_intervals(
    axis,
    table: pd.DataFrame,
    y: str,
    *,
    by: str | None = None,
    order: Sequence | None = None,
    series: Sequence | None = None,
    colours: dict | None = None,
    hollow: str | None = None,
) -> None:
    """Draw points with intervals, one line of the y axis for each value of column `y`.

    `table` has columns `estimate`, `low` and `high`; rows without an estimate are left out, those
    without an interval are points. Values of `by` stand beside each other with a marker each (and
    a colour, unless `colours` gives one to the values of `y` or `by`). A true value in column
    `hollow` makes an open marker. `order`, `series`: the values of `y` from the top, and of `by`.
    """
    import seaborn

    table = table.assign(_series=table[by] if by else "").dropna(subset=["estimate"])
    order = list(dict.fromkeys(table[y]) if order is None else order)
    series = list(dict.fromkeys(table["_series"]) if series is None else series)
    colours = dict(zip(series, seaborn.color_palette("colorblind", len(series)), strict=True)) | (
        colours or {}
    )
    for row in table.astype({"low": float, "high": float}).to_dict("records"):
        k = series.index(row["_series"])
        at = order.index(row[y]) + (k - (len(series) - 1) / 2) * 0.6 / len(series)
        colour = colours.get(row[y], colours[row["_series"]])
        axis.plot([row["low"], row["high"]], [at, at], color=colour, linewidth=1.6, zorder=2)
        form = {"marker": MARKERS[k % len(MARKERS)], "markersize": 6, "zorder": 3}
        face = "white" if hollow and row[hollow] else colour
        axis.plot(row["estimate"], at, color=colour, markerfacecolor=face, **form)
    for k, value in enumerate(series if by else []):  # for the legend
        axis.plot([], [], MARKERS[k % len(MARKERS)], color=colours[value], label=f"{value}")
    axis.set_yticks(range(len(order)), order)
    axis.set_ylim(len(order) - 0.5, -0.5)


def save_figure(fig, name: str, data: pd.DataFrame) -> list[Path]:
    """Write `figures/<name>.svg`, `.png` and the plotted data as `.csv`; return the paths.

    `name` is `<study>/<NN>_<name>`. No dates, no random ids: the same data give the same bytes.
    """
    from PIL import Image

    svg, png, small = io.StringIO(), io.BytesIO(), io.BytesIO()
    fig.savefig(svg, format="svg", metadata={"Date": None})
    fig.savefig(png, format="png")
    # its 256 main colours look the same in a third of the bytes
    Image.open(png).convert("RGB").quantize(256, dither=0).save(small, "png", optimize=True)
    short = re.sub(r"([1-9]\d*\.\d\d)\d+(?=[^<>]*>)", r"\1", svg.getvalue())  # of coordinates
    table = data.to_csv(index=False, float_format="%.6g", lineterminator="\n")
    contents = {"svg": short, "png": small.getvalue(), "csv": table}
    return [write_atomic(FIGURES / f"{name}.{kind}", part) for kind, part in contents.items()]


def percent(found: dict) -> str:
    """A share in words, with interval and n."""
    if found["estimate"] is None:
        return f"not defined ({found['reason']})"
    return "{estimate:.1%} ({low:.1%} to {high:.1%}, n {n})".format(**found)


def plain(text: Any) -> str:
    """Text of a model or a file for Markdown or HTML: it shows as it is.

    No tag, no mark of Markdown, no formula comes out of it.
    """
    marks = re.sub(r"[&<>\"'`*_~|\\\[\]{}#$!^]", lambda m: f"&#{ord(m[0])};", str(text))
    return marks.replace("&#36;", "<span>&#36;</span>")  # a `$` alone starts no formula


def show_table(table: pd.DataFrame, caption: str = "", index: bool = True, **how: Any) -> Styler:
    """A table with its caption, all text as it is; `how`: `formatter`, `precision`, `na_rep`."""
    how = {"na_rep": "–", "escape": "html"} | how
    style = table.style.format(**how)
    for axis in (0, 1):
        style.format_index(escape="html", axis=axis)
        style.format_index_names(escape="html", axis=axis)
    style.set_table_attributes('class="tex2jax_ignore mathjax_ignore"')
    style.set_caption(html.escape(caption))
    if not index:
        style.hide(axis="index")
    return style


def show_example(example: Example, outputs: dict[str, str] | None = None, note: str = ""):
    """HTML of one item, escaped: story, question, gold, outputs by name; no private text."""
    from IPython.display import HTML

    head = f"<b>{plain(note)}</b> <code>{plain(example.id)}</code>"
    if dataset(example.dataset).private:
        return HTML(f"{head}<br>(the text may not be passed on)")
    facts = []
    for fact in example.facts:
        text = plain(fact[:1500])
        facts.append(f"<u>{text}</u>" if fact in example.gold_facts else text)
    gold = f"{example.label}, the underlined facts → {'; '.join(example.answers)}"
    story = f"{head}<br>{' '.join(facts)}<br><i>{plain(example.question)}</i> gold: "
    said = [f"{name}: {text[:600]}" for name, text in (outputs or {}).items()]
    shown = "".join(f"<pre>{html.escape(text)}</pre>" for text in said)
    return HTML(story + plain(gold) + shown)
