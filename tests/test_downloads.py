"""Downloads of datasets and students, against a hub on the loopback.

| case | dataset (through its room) | student (through `load_student`) |
|---|---|---|
| success, recorded, asked for once | bAbI, CoTempQA, MARCO | pinned, unpinned, gated, token |
| cut short, resumed with `Range` | bAbI | – |
| wrong hash, wrong size | both | hash |
| 404: repository, commit, file | all | repository |
| 401: gated | – | all |
| no network, offline with a full cache | both | both |

No request leaves the machine; the hub's cache is in a temporary folder.
"""

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import huggingface_hub as hf
import pandas as pd
import pytest
from conftest import ROOT, notebook_functions
from families import make_llama
from huggingface_hub import constants

import tracekd_utils as tk

ROOMS = {
    "babi": notebook_functions("10_decompose_babi"),
    "cotempqa": notebook_functions("11_decompose_cotempqa"),
    "marco": notebook_functions("12_decompose_marco"),
}
LLAMA = "meta-llama/Llama-3.2-1B-Instruct"
SOURCES = {name: tk.dataset(name).source for name in ROOMS}
DATASETS = {name: (source["hub"], source["commit"]) for name, source in SOURCES.items()}
BABI, COTEMPQA, MARCO = (f"datasets/{repository}" for repository, _ in DATASETS.values())
# a short pin is completed from the list of commits: neither the newest nor the first
COMMITS = ["1" * 40, SOURCES["cotempqa"]["commit"].ljust(40, "0"), "2" * 40]


class Hub:
    """A few routes of the hub: commits, tree and files of `repositories` {path: {file: bytes}}.

    `sent` replaces the bytes of a file that the tree and its HEAD keep promising, `cut` ends
    the first answers for a file after so many bytes, `gated` wants a token.
    """

    def __init__(self):
        self.repositories, self.commits = {}, {}
        self.sent, self.cut, self.gated, self.log = {}, {}, set(), []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self):
                hub.answer(self)

            def do_GET(self):
                hub.answer(self)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request):
        path = unquote(urlsplit(request.path).path).strip("/")
        self.log.append((request.command, path, request.headers.get("Range")))
        api = re.fullmatch(r"api/(models|datasets)/([^/]+/[^/]+)/(tree|commits)/([^/]+)", path)
        file = re.fullmatch(r"((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        name = (
            (("datasets/" if api[1] == "datasets" else "") + api[2]) if api else (file and file[1])
        )
        if name not in self.repositories:
            return self.refuse(request, 404, "RepoNotFound")
        commits, files = self.commits[name], self.repositories[name]
        if api and api[3] == "commits":
            return self.send(
                request,
                json.dumps(
                    [
                        {
                            "id": c,
                            "authors": [],
                            "date": "2024-06-13T00:00:00.000Z",
                            "title": "",
                            "message": "",
                        }
                        for c in commits
                    ]
                ).encode(),
            )
        if (api or file)[4 if api else 2] not in commits:
            return self.refuse(request, 404, "RevisionNotFound")
        if api:
            return self.send(
                request, json.dumps([self.entry(k, v) for k, v in files.items()]).encode()
            )
        if name in self.gated and not request.headers.get("Authorization"):
            return self.refuse(request, 401, "GatedRepo")
        if file[3] not in files:
            return self.refuse(request, 404, "EntryNotFound")
        self.send_file(request, file[2], file[3], files[file[3]])

    @staticmethod
    def entry(path, data):
        """Row of a tree: weights are stored by SHA-256, other files by git's SHA-1."""
        row = {
            "type": "file",
            "path": path,
            "size": len(data),
            "oid": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(),
        }
        if path.endswith((".safetensors", ".parquet")):
            row["lfs"] = {
                "oid": hashlib.sha256(data).hexdigest(),
                "size": len(data),
                "pointerSize": 130,
            }
        return row

    def send_file(self, request, commit, path, data):
        entry = self.entry(path, data)
        head = {
            "X-Repo-Commit": commit,
            "ETag": f'"{entry.get("lfs", entry)["oid"]}"',
            "Accept-Ranges": "bytes",
        }
        if request.command == "HEAD":
            return self.send(request, data, head)
        data, status = self.sent.get(path, data), 200
        if given := re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range") or ""):
            start, status = int(given[1]), 206
            head["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            data = data[start:]
        self.send(request, data, head, status, self.cut.pop(path, None))

    @staticmethod
    def send(request, data, head=(), status=200, limit=None):
        request.send_response(status)
        for key, value in {**dict(head), "Content-Length": len(data)}.items():
            request.send_header(key, str(value))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(data[:limit])

    @staticmethod
    def refuse(request, status, code):
        request.send_response(status)
        request.send_header("X-Error-Code", code)
        request.send_header("Content-Length", "0")
        request.end_headers()

    def requested(self, *commands):
        return [r for r in self.log if r[0] in (commands or ("GET", "HEAD"))]


def point_at(monkeypatch, url, offline=False):
    """Let huggingface_hub, imported already, take `url` for the hub."""
    hf.close_session()  # its client knows the proxies of the environment
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty hub; data/raw and the hub's cache are in the test's folder."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "TRACEKD_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache/hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "cache/token"))
    monkeypatch.setattr(tk, "RAW", tmp_path / "raw")
    nap = SimpleNamespace(sleep=lambda seconds: None)  # between the library's retries
    for module in ("file_download", "utils._http"):
        monkeypatch.setattr(import_module(f"huggingface_hub.{module}"), "time", nap)
    hub = Hub()
    point_at(monkeypatch, hub.url)
    yield hub
    hub.close()
    hf.close_session()


def story(number):
    return [
        (1, f"Mary went to room {number}.", "", []),
        (2, "John took the ball.", "", []),
        (3, "Where is Mary?", f"room {number}", [1]),
        (4, "What is it?", "a,b", [1, 2]),
    ]


def parquet(stories):
    """A table as the hub has it: one row a story, lists of ids, types, texts, answers."""
    table = pd.DataFrame(
        {
            "story": [
                {
                    "id": [str(i) for i, *_ in lines],
                    "type": [int(bool(ids)) for *_, ids in lines],
                    "text": [text for _, text, *_ in lines],
                    "answer": [a for _, _, a, _ in lines],
                    "supporting_ids": [list(map(str, ids)) for *_, ids in lines],
                }
                for lines in stories
            ]
        }
    )
    buffer = io.BytesIO()
    table.to_parquet(buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def babi_files():
    # no two alike: the cache keeps equal files once
    return {
        f"en-qa{n}/{split}/0000.parquet": parquet([story(k) for k in range(n + extra)])
        for n in range(1, 21)
        for split, extra in (("train", 30), ("test", 1))
    }


@pytest.fixture
def babi(hub, babi_files):
    """The hub with bAbI, beside files of other configurations."""
    hub.repositories[BABI] = {
        **babi_files,
        "en-10k-qa1/test/0000.parquet": b"large",
        "README.md": b"read me",
    }
    hub.commits[BABI] = [SOURCES["babi"]["commit"]]
    return hub


@pytest.fixture
def cotempqa(hub, monkeypatch):
    """The hub with CoTempQA, three rows a file."""
    row = json.dumps({"question": "%s?", "facts": ["F in 1999."], "answer": ["A"]}) + "\n"
    hub.repositories[COTEMPQA] = {
        f"{k}.json": 3 * (row % k).encode() for k in SOURCES["cotempqa"]["rows"]
    }
    hub.commits[COTEMPQA] = COMMITS
    source = SOURCES["cotempqa"]
    monkeypatch.setitem(source, "rows", dict.fromkeys(source["rows"], 3))
    return hub


@pytest.fixture
def marco(hub, data_dir):
    """The hub with four records of MARCO's validation part, and a part for training."""
    from datasets import Dataset

    lines = (data_dir / "msmarco/sample_v2.1.jsonl").read_text().splitlines()
    buffer = io.BytesIO()
    Dataset.from_list([*map(json.loads, lines[:2] + lines[-2:])]).to_parquet(buffer)
    hub.repositories[MARCO] = {
        ROOMS["marco"].MARCO_PART: buffer.getvalue(),
        "v2.1/train-00000-of-00007.parquet": b"large",
    }
    hub.commits[MARCO] = [SOURCES["marco"]["commit"]]
    return hub


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Files of a tiny Llama."""
    folder = make_llama(tmp_path_factory.mktemp("llama"))
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture
def student(hub, llama):
    hub.repositories |= {
        LLAMA: {**llama, "original/consolidated.00.pth": b"a pickle"},
        "someone/tiny": llama,
    }
    hub.commits |= {LLAMA: [tk.PINS[LLAMA]], "someone/tiny": ["a" * 40]}
    return hub


def nothing_in_raw():
    """No file, not even a hidden or a partial one, in data/raw."""
    return not [p for p in tk.RAW.rglob("*") if p.is_file()]


# ------------------------------------------------------------------------------ success
def test_babi_arrives_once_in_its_official_format(babi):
    folder = ROOMS["babi"].raw_folder()
    assert folder == tk.RAW / "babi/en" and len(list(folder.iterdir())) == 40
    assert ROOMS["babi"].parse_babi(folder / "qa2_two-supporting-facts_test.txt")[2] == [
        (
            ("Mary went to room 2.", "John took the ball."),
            "Where is Mary?",
            ("room 2",),
            ("Mary went to room 2.",),
        ),
        (
            ("Mary went to room 2.", "John took the ball."),
            "What is it?",
            ("a", "b"),
            ("Mary went to room 2.", "John took the ball."),
        ),
    ]
    assert not [p for _, p, _ in babi.log if "10k" in p or "README" in p]
    assert {p.split("/")[4] for _, p, _ in babi.log if "/resolve/" in p} == {
        SOURCES["babi"]["commit"]
    }
    assert (tk.RAW / "hub/dataset--facebook--babi_qa").read_text() == SOURCES["babi"]["commit"]
    assert sorted(p.name for p in tk.RAW.iterdir()) == ["babi", "hub"]
    babi.log.clear()
    assert ROOMS["babi"].raw_folder() == folder and babi.log == []


def test_the_real_babi_comes_back_through_the_hubs_table(babi, data_dir):
    name = "qa8_lists-sets_train.txt"
    lines, stories = (data_dir / "babi/en" / name).read_text().splitlines(), []
    for line in lines[:400]:
        number, _, text = line.partition(" ")
        stories += [[]] * (number == "1")
        text, answer, ids = (*text.split("\t"), "", "")[:3]
        stories[-1] = [*stories[-1], (number, text.strip(), answer, ids.split())]
    babi.repositories[BABI]["en-qa8/train/0000.parquet"] = parquet(stories[:-1])
    found = ROOMS["babi"].parse_babi(ROOMS["babi"].raw_folder() / name)
    official = ROOMS["babi"].parse_babi(data_dir / "babi/en" / name)
    assert len(found) > 20 and found == official[: len(found)]


def test_marco_arrives_once_record_by_record(marco, data_dir):
    path = ROOMS["marco"].raw_folder() / ROOMS["marco"].MARCO_FILE
    real = (data_dir / "msmarco/sample_v2.1.jsonl").read_text().splitlines()
    found = tk.read_jsonl(path)
    assert path == tk.RAW / "msmarco" / ROOMS["marco"].MARCO_FILE
    assert [{k: r[k] for k in found[0]} for r in map(json.loads, real[:2] + real[-2:])] == found
    assert {"query_id", "query_type", "answers", "passages"} <= set(found[0])
    assert not [p for _, p, _ in marco.log if "train" in p]
    marco.log.clear()
    assert ROOMS["marco"].raw_folder() == path.parent and marco.log == []


def test_a_short_pin_is_completed_and_recorded(cotempqa, monkeypatch):
    folder = ROOMS["cotempqa"].raw_folder()
    assert (tk.RAW / "hub/dataset--Warrieryes--CotempQA").read_text() == COMMITS[1]
    assert {p.split("/")[4] for _, p, _ in cotempqa.log if "/resolve/" in p} == {COMMITS[1]}
    test = json.loads((folder / "published_test_rows.json").read_text())
    assert {k: len(v) for k, v in test.items()} == dict.fromkeys(SOURCES["cotempqa"]["rows"], 1)
    for path in folder.iterdir():
        path.unlink()
    cotempqa.log.clear()  # what the record and the cache hold is not asked for again
    point_at(monkeypatch, cotempqa.url, offline=True)
    assert ROOMS["cotempqa"].raw_folder() == folder and cotempqa.log == []


def test_a_pinned_student_is_fetched_once(student, monkeypatch):
    model, tokenizer = tk.load_student(LLAMA)
    assert [m for m in model.modules() if type(m).__name__ == "Linear4bit"]
    assert tokenizer.eos_token == "<|eot_id|>"
    assert not [p for _, p, _ in student.log if p.endswith(".pth")]
    record = tk.RAW / f"hub/model--{LLAMA.replace('/', '--')}"
    assert record.read_text() == tk.PINS[LLAMA]
    student.log.clear()
    assert tk.student_folder(LLAMA).endswith(tk.PINS[LLAMA]) and student.log == []
    record.unlink()  # a cache that was filled elsewhere
    point_at(monkeypatch, student.url, offline=True)
    assert tk.student_folder(LLAMA).endswith(tk.PINS[LLAMA]) and student.log == []


def test_any_other_student_stays_at_the_commit_found_first(student):
    first = tk.student_folder("someone/tiny")
    student.commits["someone/tiny"] = ["b" * 40, "a" * 40]  # its owner goes on
    assert tk.student_folder("someone/tiny") == first and first.endswith("a" * 40)


def test_a_gated_student_comes_with_a_token(student, monkeypatch):
    student.gated.add(LLAMA)
    monkeypatch.setenv("HF_TOKEN", "hf_of_this_test")
    assert tk.student_folder(LLAMA).endswith(tk.PINS[LLAMA])


def test_the_environment_leads_to_the_loopback(babi, student, tmp_path):
    """A process of its own, with the variables that a user sets."""
    code = """
import tracekd_utils as tk
from conftest import notebook_functions
from pathlib import Path
tk.RAW = Path("raw").resolve()
print(notebook_functions("10_decompose_babi").raw_folder())
print(type(tk.load_student("someone/tiny")[0]).__name__)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        env={
            **os.environ,
            "HF_ENDPOINT": babi.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        },
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [str(tmp_path / "raw/babi/en"), "LlamaForCausalLM"]
    assert (tmp_path / "home/hub/models--someone--tiny").is_dir()


# ----------------------------------------------------------------------- broken downloads
def test_a_download_that_breaks_off_is_resumed(babi, babi_files, monkeypatch):
    path = "en-qa3/train/0000.parquet"
    babi.cut[path] = 1000
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 200)  # 10 MB: more than the file
    folder = ROOMS["babi"].raw_folder()
    asked = [r for r in babi.requested("GET") if r[1].endswith(path)]
    assert [r[2] for r in asked] == [None, "bytes=1000-"]
    whole = folder / "qa3_three-supporting-facts_train.txt"
    assert len(ROOMS["babi"].parse_babi(whole)) == 33 and len(babi_files[path]) > 1000


def test_other_bytes_of_a_dataset_are_refused_and_not_kept(babi):
    path, algorithm = "en-qa3/train/0000.parquet", "sha256"
    data = babi.repositories[BABI][path]
    babi.sent[path] = data[:-1] + b"?"
    for _ in range(2):  # a failure is not taken for a success the second time
        with pytest.raises(
            RuntimeError,
            match=(
                rf"{' at '.join(DATASETS['babi'])} .*{path}: {algorithm} is [0-9a-f]+, not "
                f"{hashlib.sha256(data).hexdigest()}"
            ),
        ):
            ROOMS["babi"].raw_folder()
        assert nothing_in_raw()
    babi.sent.clear()
    assert len(list(ROOMS["babi"].raw_folder().iterdir())) == 40


def test_other_bytes_of_a_student_are_refused(student):
    student.sent["config.json"] = student.repositories[LLAMA]["config.json"][:-1] + b" "
    with pytest.raises(RuntimeError, match=rf"{LLAMA} at .*config.json: git-sha1 is"):
        tk.load_student(LLAMA)
    assert nothing_in_raw()
    student.sent.clear()
    tk.load_student(LLAMA)


def test_a_file_of_another_size_is_refused(cotempqa):
    cotempqa.sent["mix.json"] = cotempqa.repositories[COTEMPQA]["mix.json"][:-40]
    with pytest.raises(RuntimeError, match=rf"{COMMITS[1][:7]}\w* .*should be of size"):
        ROOMS["cotempqa"].raw_folder()
    assert nothing_in_raw()


def test_a_dataset_with_other_rows_leaves_nothing(cotempqa):
    cotempqa.repositories[COTEMPQA]["mix.json"] += b"{}\n"
    with pytest.raises(RuntimeError, match=r"not as expected: .*mix\.json.*TRACEKD_DATA_DIR"):
        ROOMS["cotempqa"].raw_folder()
    assert not (tk.RAW / "cotempqa").exists()


@pytest.mark.parametrize(
    "content", ["no table", {"text": [1]}, {"story": [1]}, {"story": [{"id": ["1"]}]}], ids=repr
)
def test_a_table_of_another_form_leaves_nothing(babi, content):
    buffer = io.BytesIO(content.encode() if isinstance(content, str) else b"")
    if not isinstance(content, str):
        pd.DataFrame(content).to_parquet(buffer)
    babi.repositories[BABI]["en-qa20/test/0000.parquet"] = buffer.getvalue()
    with pytest.raises(
        RuntimeError, match=f"{DATASETS['babi'][0]} .*not as expected.*TRACEKD_DATA_DIR"
    ):
        ROOMS["babi"].raw_folder()
    assert not (tk.RAW / "babi").exists() or not list((tk.RAW / "babi").iterdir())


@pytest.mark.parametrize("failing", [1, 20, 40])
def test_a_write_that_fails_leaves_no_folder(babi, monkeypatch, failing):
    ROOMS["babi"].raw_folder()
    for path in (tk.RAW / "babi/en").iterdir():
        path.unlink()
    real, count = tk.write_atomic, iter(range(1, 99))

    def write(path, content):
        if next(count) == failing:
            raise OSError("disk full")
        return real(path, content)

    monkeypatch.setattr(tk, "write_atomic", write)
    with pytest.raises(RuntimeError, match="disk full"):
        ROOMS["babi"].raw_folder()
    assert not [p for p in (tk.RAW / "babi").rglob("*") if p.is_file()]


def test_a_folder_with_other_files_is_left_alone(cotempqa):
    other = tk.write_atomic(tk.RAW / "cotempqa/notes.txt", "mine")
    with pytest.raises(RuntimeError, match="not empty.*cotempqa"):
        ROOMS["cotempqa"].raw_folder()
    assert [p.name for p in (tk.RAW / "cotempqa").iterdir()] == ["notes.txt"]
    assert other.read_text() == "mine"


# ------------------------------------------------------------------------------ refusals
@pytest.mark.parametrize("name", DATASETS)
def test_a_dataset_that_is_not_there_is_named(hub, name):
    repository, commit = DATASETS[name]
    with pytest.raises(
        RuntimeError,
        match=(
            rf"{repository} at {commit}.*no such repository, commit or file; or put its files "
            rf"\(.*\) into .*{name}.*TRACEKD_DATA_DIR"
        ),
    ):
        ROOMS[name].raw_folder()
    assert nothing_in_raw()


def test_a_commit_that_is_not_there_is_named(hub, babi, cotempqa, marco):
    hub.commits = dict.fromkeys(hub.commits, ["3" * 40])
    for name, (repository, commit) in DATASETS.items():
        with pytest.raises(RuntimeError, match=f"{repository} at {commit} .*no such"):
            ROOMS[name].raw_folder()
    assert nothing_in_raw()


def test_a_file_that_is_not_there_is_named(babi):
    del babi.repositories[BABI]["en-qa7/test/0000.parquet"]
    with pytest.raises(RuntimeError, match="not as expected.*en-qa7/test/0000.parquet"):
        ROOMS["babi"].raw_folder()
    assert not (tk.RAW / "babi/en").exists()


def test_a_student_that_is_not_there_is_named(hub):
    for name, commit in ((LLAMA, tk.PINS[LLAMA]), ("someone/else", "main")):
        with pytest.raises(
            RuntimeError,
            match=(f"{name} at {commit} .*no such repository.*give a local folder as student"),
        ):
            tk.load_student(name)
    assert nothing_in_raw()


def test_a_gated_student_says_what_to_do(student):
    student.gated.add(LLAMA)
    for _ in range(2):
        with pytest.raises(
            RuntimeError,
            match=(
                f"{LLAMA} at {tk.PINS[LLAMA]} .*accept the licence on its page, then set "
                "HF_TOKEN or run `hf auth login`; or give a local folder"
            ),
        ):
            tk.load_student(LLAMA)
    assert nothing_in_raw()


@pytest.mark.parametrize("offline", [False, True])
def test_without_a_network_the_message_says_what_to_do(hub, monkeypatch, offline):
    point_at(monkeypatch, "http://127.0.0.1:9", offline)  # nobody listens there
    for name, (repository, _) in DATASETS.items():
        with pytest.raises(
            RuntimeError,
            match=(f"{repository} at .*is there a network.*HF_HUB_OFFLINE=1.*data/README.md"),
        ) as e:
            ROOMS[name].raw_folder()
        assert str(tk.RAW) in str(e.value) and "TRACEKD_DATA_DIR" in str(e.value)
    with pytest.raises(RuntimeError, match=f"{LLAMA} at .*network.*local folder as student"):
        tk.load_student(LLAMA)
    assert nothing_in_raw() and hub.log == []
