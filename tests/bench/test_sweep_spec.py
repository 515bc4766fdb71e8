"""Specifications of sweeps: what they say, what they may not, and the keys of their jobs."""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("yaml", reason="a sweep's specification needs pyyaml")

from stoker.mobile_bench.sweep import cache as sweep_cache
from stoker.mobile_bench.sweep import spec as sweep_spec
from stoker.mobile_bench.sweep.jobs import Job
from stoker.mobile_bench.sweep.sweep import plan
from stoker.runtime.base.errors import OptionError

TEXT = "the more of the words that you hear in the night, the less is it that they say. " * 60
GROUP = "jobs:\n  - models: a.gguf\n    "


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "dense.gguf").write_bytes(b"no model")
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.setenv("STOKER_CACHE", str(tmp_path / "cache"))
    return tmp_path


def spec_of(folder: Path, text: str, name: str = "spec.yaml") -> sweep_spec.Spec:
    (folder / name).write_text(text)
    return sweep_spec.load(folder / name)


def test_product_of_the_lists_repeat_by_repeat(folder: Path) -> None:
    spec = spec_of(
        folder,
        """
        retries: 5
        timeout: 60
        cache: kept
        jobs:
          - models: [dense.gguf, smollm2, hf:owner/name/file.gguf]
            types: [as-is, q4_k_m]
            memory: [resident, 500MB, auto, 60%]
            threads: [1, 2]
            repeats: 3
            prompts: [16, 32]
            policy: [lru, reuse]
            device: [laptop, phone]
          - kind: perplexity
            models: 7b
            text: text.txt
        """,
    )
    assert len(spec.jobs) == 3 * 2 * 4 * 2 * 3 * 2 * 2 + 1
    assert [job.repeat for job in spec.jobs] == sorted(job.repeat for job in spec.jobs)
    first = spec.jobs[0]
    assert first.model == str(folder / "dense.gguf") and first.type is None
    assert first.memory == "resident" and first.device == "laptop"
    assert first.settings["prompts"] == [16, 32] and first.settings["engine"] == "stoker"
    assert {job.type for job in spec.jobs} == {None, "Q4_K_M"}
    assert {job.settings["options"].get("policy") for job in spec.jobs} == {"lru", "reuse", None}
    last = next(job for job in spec.jobs if job.kind == "perplexity")
    assert last.model == "7b" and spec.texts[last.text or ""] == TEXT
    assert (spec.retries, spec.timeout, spec.cache) == (5, 60.0, folder / "kept")


@pytest.mark.parametrize(
    ("text", "line", "expected"),
    [
        ("", None, "found nothing"),
        ("- 1", 1, "expected a sweep: keys and values"),
        ("jobs: 3", 1, "jobs: expected a list of groups"),
        ("jobs: []", 1, "at least one group"),
        ("retries: 2", 1, "lacks the key 'jobs'"),
        ("jobs:\n  - types: Q4_0", 2, "lacks the key 'models'"),
        ("jobs:\n  - models:\n    types: Q4_0", 2, "models is empty"),
        ("jobs:\n  - models: []", 2, "models: expected at least one value"),
        ("jobs:\n  - models: [[a]]", 2, "models: expected one value"),
        ("jobs:\n  - models: ''", 2, "models: expected some text"),
        ("jobs:\n  - models: a\n    [1, 2]: b", 3, "unknown key that is no word"),
        (GROUP + "tpyes: Q4_0", 3, "unknown key 'tpyes' of a group of kind measure"),
        (GROUP + "bits: 3", 3, "unknown key 'bits' of a group of kind measure"),
        (GROUP + "models: b.gguf", 3, "'models' is there twice"),
        (GROUP + "kind: sweep", 3, "kind: expected one of measure, perplexity, bitwidth"),
        (GROUP + "kind: [measure]", 3, "kind: expected one value"),
        (GROUP + "kind: bitwidth", 2, "lacks the key 'text'"),
        (GROUP + "types: [Q4_0,\n      Q9_9]", 4, "type: expected one of F32"),
        (GROUP + "memory: lots", 3, "memory must be bytes"),
        (GROUP + "threads: 0", 3, "threads: expected a whole number from 1 to 1024, found 0"),
        (GROUP + "threads: two", 3, "threads: expected a whole number from 1 to 1024, found 'two'"),
        (GROUP + "threads: yes", 3, "threads: expected a whole number"),
        (GROUP + "repeats: 1.5", 3, "repeats: expected a whole number"),
        (GROUP + "engines: vllm", 3, "engines: expected one of stoker, llama-cpp, onnx"),
        (GROUP + "time_limit: .inf", 3, "time_limit: expected a number"),
        (GROUP + "time_limit: .nan", 3, "time_limit: expected a number"),
        (GROUP + "prompts: " + "9" * 4000, 3, "prompts: expected a"),
        (GROUP + "prompts: " + "9" * 5000, 3, "prompts: expected at most 4096 characters"),
        (GROUP + 'device: "a\\0b"', 3, "device: expected some text"),
        (GROUP + "kind: perplexity\n    text: nowhere.txt", 4, "nowhere.txt: No such file"),
        (GROUP + "kind: perplexity\n    text: /dev/zero", 4, "/dev/zero: expected a file"),
        (GROUP + "kind: perplexity\n    text: .", 4, "expected a file"),
        (GROUP + "kind: bitwidth\n    text: text.txt\n    bits: x", 5, "bits: expected a number"),
        (
            GROUP + "kind: bitwidth\n    text: text.txt\n    bits: 4\n    types: F99",
            6,
            "types: expected a type of",
        ),
        ("jobs: [a: b", 1, "not YAML"),
        ("jobs:\n\t- models: a", 2, "not YAML"),
        ("jobs: []\n---\njobs: []", 2, "not YAML"),
        # Attacks that a stranger's file could try.
        ("jobs: &a [1]\nretries: *a", 1, "anchor"),
        ("jobs: !!python/object/apply:os.system ['true']", 1, "tag"),
        ("jobs: " + "[" * 100_000, 1, "at most 8 levels"),
        ("? " * 50_000, 1, "at most 8 levels"),
        ("- " * 50_000, 1, "at most 8 levels"),
        ("{" * 100_000, 1, "at most 8 levels"),
        (GROUP + "repeats: 1000\n    threads: " + repr([*range(1, 500)]), 2, "at most 10000 jobs"),
        (
            GROUP + "".join(f"{k}: {['a'] * 1000}\n    " for k in ("policy", "io", "predictor")),
            2,
            "at most 10000 jobs",
        ),
        ("#" * (128 << 10) + "\n", None, "at most 131072 bytes"),
    ],
)
def test_errors_name_the_line(folder: Path, text: str, line: int | None, expected: str) -> None:
    start = time.monotonic()
    with pytest.raises(OptionError) as caught:
        spec_of(folder, text, "bad.yaml")
    message = str(caught.value)
    assert message.startswith(f"{folder / 'bad.yaml'}:" + ("" if line is None else f"{line}: "))
    assert expected in message and len(message) < 600
    assert time.monotonic() - start < 20


def test_not_a_text(folder: Path) -> None:
    (folder / "bad.yaml").write_bytes(b"jobs: \xff")
    with pytest.raises(OptionError, match="expected UTF-8"):
        sweep_spec.load(folder / "bad.yaml")
    with pytest.raises(OptionError, match="No such file"):
        sweep_spec.load(folder / "nowhere.yaml")
    with pytest.raises(OptionError, match="directory"):
        sweep_spec.load(folder)


def test_example_is_valid() -> None:
    example = Path(sweep_spec.__file__).with_name("example.yaml")
    spec = sweep_spec.load(example)
    assert {job.kind for job in spec.jobs} == {"measure", "perplexity", "bitwidth"}


# ---- keys, models by content


def test_a_key_is_what_decides_the_result() -> None:
    job = Job("measure", "a.gguf", settings={"tokens": 8, "engine": "stoker"})
    assert job.key(None) == Job(**json.loads(json.dumps(job.__dict__))).key(None)
    others = [
        replace(job, model="b.gguf"),
        replace(job, type="Q4_0"),
        replace(job, memory="1GiB"),
        replace(job, threads=1),
        replace(job, repeat=1),
        replace(job, device="laptop"),
        replace(job, settings={"tokens": 9, "engine": "stoker"}),
    ]
    assert len({other.key(None) for other in [job, *others]}) == len(others) + 1
    # The content of a model that is here counts, rather than its name.
    assert job.key("5" * 64) == others[0].key("5" * 64) != job.key("6" * 64)


def test_content_is_read_once_and_again_where_it_changed(tmp_path: Path) -> None:
    model, copy = tmp_path / "model.onnx", tmp_path / "copy.onnx"
    model.write_bytes(b"content")
    copy.write_bytes(b"content")
    digest = sweep_cache.content_digest(model, tmp_path)
    assert digest == hashlib.sha256(b"content").hexdigest()
    assert digest == sweep_cache.content_digest(copy, tmp_path)
    copy.write_bytes(b"others!")
    os.utime(copy, (1, 1))
    assert sweep_cache.content_digest(copy, tmp_path) == hashlib.sha256(b"others!").hexdigest()
    for note in (tmp_path / "digests").iterdir():
        note.write_text("0" * 64)
    assert sweep_cache.content_digest(model, tmp_path) == "0" * 64  # remembered


def test_the_same_job_twice_is_one(folder: Path) -> None:
    spec = spec_of(folder, "jobs:\n  - models: [dense.gguf, dense.gguf]\n    types: [as-is, as-is]")
    assert len(spec.jobs) == 4 and len(plan(spec, None)) == 1
