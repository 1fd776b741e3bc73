"""Rows held in memory and rows streamed are the same rows, whoever examines which part of the files."""

from __future__ import annotations

import contextlib
import json
import random
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest

from r1_megatron.config.schema import DataConfig, DataSourceConfig, SFTConfig, TokenizerConfig
from r1_megatron.data.demonstrations import build_demonstrations
from r1_megatron.data.loading import Share
from r1_megatron.data.prompts import PromptStream, build_prompts
from r1_megatron.data.rows import Part, find_files, read_rows
from r1_megatron.data.tokenizers import build_tokenizer

TOKENIZER = build_tokenizer(TokenizerConfig("bilingual"))
CFG = DataConfig(source="jsonl", on_duplicate_prompt="skip", on_long_prompt="skip", max_prompt_tokens=40)


def shards(folder: Path, num: int, seed: int = 0) -> str:
    """JSONL in three files: lines of very different lengths, blank lines, duplicates, rows that are too long."""
    rng = random.Random(seed)
    for shard in range(3):
        lines = []
        for i in range(num):
            text = (
                f"{shard}-{i}" if rng.random() < 0.8 else rng.choice(["again", "x" * 60, "苹果" * rng.randrange(1, 9)])
            )
            row = {"prompt": text, "label": i, "response": f"r{shard}-{i}"}
            lines.append(json.dumps(row, ensure_ascii=shard == 0))
            if rng.random() < 0.1:
                lines.append("  ")
        end = "" if shard == 1 else "\n"  # one file does not end its last line
        (folder / f"part-{shard}.jsonl").write_text("\n".join(lines) + end, encoding="utf-8")
    return str(folder / "part-*.jsonl")


def readers(count: int, run):
    """``run(share)`` of every reader of a job, in one process: first all examine, then each sees what all found."""
    found: list = []
    for number in range(count):

        def hand_in(mine, number=number):
            found.append(mine)
            raise StopIteration

        with contextlib.suppress(StopIteration):
            run(Share(Part(number, count), hand_in))
    return [run(Share(Part(number, count), lambda mine: found)) for number in range(count)]


@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_parts_of_files_are_read_once_each(tmp_path: Path, count: int):
    files = find_files(shards(tmp_path, 30))
    whole = [(row.file, row.offset, row.fields) for row in read_rows(files, [])]
    parts = [[*read_rows(files, [], Part(number, count))] for number in range(count)]
    assert [(row.file, row.offset, row.fields) for part in parts for row in part] == whole
    assert len(whole) == 90 and {row[0] for row in whole} == {0, 1, 2}


@pytest.mark.parametrize("count", [1, 3, 8])
def test_streamed_prompts_are_the_same(tmp_path: Path, count: int):
    cfg = replace(CFG, path=shards(tmp_path, 40))
    held, _, _ = build_prompts(cfg, TOKENIZER)
    assert held.num_too_long and held.num_duplicates
    streamed = replace(cfg, streaming=True)
    for prompts, _, _ in readers(count, lambda share: build_prompts(streamed, TOKENIZER, share=share)):
        assert [*prompts] == [*held] and prompts.left_out == held.left_out
        assert PromptStream(prompts, seed=3).take(2 * len(held)) == PromptStream(held, seed=3).take(2 * len(held))


def test_streamed_rows_are_held_out_alike(tmp_path: Path):
    cfg = replace(CFG, path=shards(tmp_path, 40))

    def build(cfg: DataConfig, share: Share = Share()):  # noqa: B008
        return build_demonstrations(cfg, SFTConfig(), TOKENIZER, None, 80, num_held_out=11, share=share)

    held = build(cfg)
    assert 11 <= len(held.held_out) < 40
    for rows in readers(3, lambda share: build(replace(cfg, streaming=True), share)):
        assert rows.num_rows == held.num_rows and [*rows.held_out] == [*held.held_out]
        assert [rows.at(place) for place in range(150)] == [held.at(place) for place in range(150)]
    prompts = {row.tokens[: row.prompt_len] for row in held.held_out}
    assert not prompts & {row.tokens[: row.prompt_len] for row in map(held.at, range(held.num_rows))}


def test_every_reader_raises_what_one_has_found(tmp_path: Path):
    path = shards(tmp_path, 20)
    with (tmp_path / "part-1.jsonl").open("a") as file:
        file.write('\n{"prompt": 7, "label": 1}\nnonsense\n')
    cfg = replace(CFG, path=path, streaming=True)

    def problems(share: Share) -> str:
        with pytest.raises(ValueError) as caught:
            build_prompts(cfg, TOKENIZER, share=share)
        return str(caught.value)

    seen = readers(4, problems)
    assert len(set(seen)) == 1 and "2 bad rows" in seen[0]
    assert "part-1.jsonl byte" in seen[0] and "malformed JSON" in seen[0] and "expected text or a list" in seen[0]
    assert "part-1.jsonl line 2" in problems(Share()).replace("byte", "line")


def test_readers_of_different_files_do_not_go_on(tmp_path: Path):
    (tmp_path / "here").mkdir(), (tmp_path / "there").mkdir()
    found: list = []
    for folder, num in (("here", 5), ("there", 6)):
        cfg = replace(CFG, path=shards(tmp_path / folder, num), streaming=True)
        with contextlib.suppress(ValueError, IndexError):
            build_prompts(cfg, TOKENIZER, share=Share(Part(len(found), 2), lambda mine: [found.append(mine)][1:]))
    with pytest.raises(ValueError, match="not the same on all nodes"):
        build_prompts(cfg, TOKENIZER, share=Share(Part(1, 2), lambda mine: found))


def test_a_file_that_changes_under_the_run_is_noticed(tmp_path: Path):
    cfg = replace(CFG, path=shards(tmp_path, 20), streaming=True)
    prompts, _, _ = build_prompts(cfg, TOKENIZER)
    assert prompts[0].text
    with (tmp_path / "part-0.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match=r"part-0.jsonl has been changed since the run began"):
        prompts[0]


def test_memory_does_not_grow_with_the_file(tmp_path: Path):
    """5,000 rows of 8 kB: 40 MB of file. What is examined and kept takes some 20 bytes a row."""
    path, filler = tmp_path / "big.jsonl", "y" * 8000
    with path.open("w") as file:
        for i in range(5_000):
            file.write(f'{{"prompt": "{i}", "response": "{i}", "note": "{filler}"}}\n')
    assert path.stat().st_size > 40e6
    cfg = replace(CFG, path=str(path), streaming=True)
    build_demonstrations(replace(cfg, path=shards(tmp_path, 3)), SFTConfig(), TOKENIZER, None, 80)  # imports
    tracemalloc.start()
    try:
        rows = build_demonstrations(cfg, SFTConfig(), TOKENIZER, None, 80)
        assert [rows.at(place).prompt_len for place in range(100)]
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert rows.num_rows == 5_000
    assert kept < 1e6 and peak < 2e6, (kept, peak)


def test_mixtures_of_files_and_tasks(tmp_path: Path):
    (tmp_path / "eval.jsonl").write_text(json.dumps({"prompt": "held", "label": 1}) + "\n")
    sources = (
        DataSourceConfig("chain_sum", weight=2, num_train=100, num_eval=30),
        DataSourceConfig("bilingual", weight=1, num_train=80, num_eval=20),
        DataSourceConfig(
            "jsonl", "files", 1, path=shards(tmp_path, 20), eval_path=str(tmp_path / "eval.jsonl"), label_key="response"
        ),
    )
    cfg = replace(CFG, source="mixture", sources=sources)
    train, held_out, task = build_prompts(cfg, TOKENIZER)
    assert task is None and len(held_out) == 51 and [len(part) for part in train.parts[:2]] == [100, 80]
    taken = PromptStream(train).take(400)
    shares = {name: sum(prompt.source == name for prompt in taken) for name in ("chain_sum", "bilingual", "files")}
    assert shares == {"chain_sum": 200, "bilingual": 100, "files": 100}
    assert {p.label[0] for p in taken if p.source == "files"} == {"r"}
    assert {p.metadata.get("language") for p in taken if p.source == "bilingual"} == {"en", "zh"}
    first = {name: sum(prompt.source == name for prompt in held_out[:10]) for name in shares}
    assert abs(first["chain_sum"] - 6) <= 1 and abs(first["bilingual"] - 4) <= 1
    rows = build_demonstrations(cfg, SFTConfig(), TOKENIZER, None, 80, num_held_out=9)
    texts = [TOKENIZER.decode(rows.at(place).tokens) for place in range(400)]
    assert sum("</think>" in text for text in texts) == 300 and len(rows.held_out) >= 9
    assert [rows.at(place) for place in range(20)] == [rows.at(place) for place in range(20)]


def test_a_source_that_cannot_be_made_is_named():
    source = DataSourceConfig("countdown", num_train=100_000)
    cfg = replace(CFG, source="mixture", sources=(DataSourceConfig("bilingual", num_train=8, num_eval=8), source))
    with pytest.raises(ValueError, match=r"^data.sources.1.num_train=100000, data.sources.1.num_eval=256: countdown"):
        build_prompts(cfg, TOKENIZER)
