"""Documents become sequences that lose nothing, keep documents apart, and come in one order on every mesh."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from automodel.training.config import DataConfig
from automodel.training.data import IGNORED, STARTS, TRAINED, PackedData, SampleOrder, open_tokens, tokenized
from ckpt_tools.core.errors import FormatError, NotFoundError, UsageError


class Words:
    """A tokenizer whose tokens are the numbers in the text."""

    eos_token_id = 0

    def encode(self, text: str, *, add_special_tokens: bool = True, verbose: bool = True) -> list[int]:
        assert not add_special_tokens
        assert not verbose
        return [int(word) for word in text.split()]

    def apply_chat_template(self, conversation, *, tokenize, add_generation_prompt, return_dict):
        assert tokenize
        assert return_dict
        role = {"user": 101, "assistant": 102}
        ids = [
            i
            for m in conversation
            for i in (role[m["role"]], *self.encode(m["content"], add_special_tokens=False, verbose=False))
        ]
        return {"input_ids": ids + [102] * add_generation_prompt}


def pack(tmp_path: Path, seq_len: int, loss_on: str = "assistant", **files: str) -> PackedData:
    paths = []
    for name, content in files.items():
        paths.append(tmp_path / name.replace("_", "."))
        paths[-1].write_text(content)
    config = DataConfig(files=tuple(paths), seq_len=seq_len, loss_on=loss_on)
    name = tokenized(config, Words(), "words", tmp_path / "cache", write=True)
    return open_tokens(tmp_path / "cache", name, seq_len)


def test_documents_are_packed_and_kept_apart(tmp_path):
    batch = pack(tmp_path, 4, a_txt="1 2 3 4 5", b_txt="6 7").batch([0, 1])
    # Stream: 1 2 3 4 | 5 <end> 6 7 | <end>, and the rest is shorter than a sequence.
    assert batch.input_ids.tolist() == [[1, 2, 3, 4], [5, 0, 6, 7]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3], [0, 1, 0, 1]]
    # 6 starts a document: it must not be predicted from the end of the one before.
    assert batch.labels.tolist() == [[IGNORED, 2, 3, 4], [5, 0, IGNORED, 7]]
    assert batch.target_tokens == 3 + 2


def test_json_lines_hold_texts(tmp_path):
    lines = "\n".join(json.dumps({"text": text}) for text in ("1 2", "3 4"))
    assert pack(tmp_path, 6, a_jsonl=lines + "\n\n").tokens.tolist() == [1, 2, 0, 3, 4, 0]


def test_only_answers_count_in_conversations(tmp_path):
    messages = [
        {"role": "user", "content": "1 2"},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": "4"},
        {"role": "assistant", "content": "5 6"},
    ]
    line = json.dumps({"messages": messages})
    data = pack(tmp_path, 11, a_jsonl=line)
    assert data.tokens.tolist() == [101, 1, 2, 102, 3, 101, 4, 102, 5, 6, 0]
    counted = [token for token, flag in zip(data.tokens.tolist(), data.flags.tolist(), strict=True) if flag & TRAINED]
    assert counted == [3, 5, 6, 0]
    everything = pack(tmp_path, 11, "all", a_jsonl=line)
    assert all(flag & TRAINED for flag in everything.flags.tolist())


@pytest.mark.parametrize("line", ['{"txt": "1"}', "[1]", '{"messages": []}', "{"])
def test_lines_of_another_form_are_named(tmp_path, line):
    with pytest.raises(FormatError, match=r"a\.jsonl:2"):
        pack(tmp_path, 2, a_jsonl='{"text": "1 2"}\n' + line + "\n")


def test_missing_files_and_too_little_data_are_said_so(tmp_path):
    with pytest.raises(NotFoundError, match=r"none\.txt"):
        tokenized(DataConfig(files=(tmp_path / "none.txt",)), Words(), "words", tmp_path, write=True)
    with pytest.raises(UsageError, match=r"3 tokens, fewer than one sequence"):
        pack(tmp_path, 8, a_txt="1 2")


def test_tokens_are_made_once_and_again_when_the_text_changes(tmp_path):
    pack(tmp_path, 2, a_txt="1 2 3")
    (made,) = (tmp_path / "cache").glob("*.tokens")
    stamp = made.stat().st_mtime_ns
    pack(tmp_path, 2, a_txt="1 2 3")
    assert made.stat().st_mtime_ns == stamp
    assert pack(tmp_path, 2, a_txt="4 5").tokens.tolist() == [4, 5, 0]


def test_every_sample_comes_once_in_an_epoch():
    order = SampleOrder(samples=10, global_batch_size=4, seed=3)
    first = [sample for step in range(5) for sample in order.global_batch(step)]
    assert sorted(first[:10]) == list(range(10))
    assert sorted(first[10:]) == list(range(10))
    assert first[:10] != first[10:], "both epochs have one order"
    assert first[:10] != [s for t in range(3) for s in SampleOrder(10, 4, seed=4).global_batch(t)][:10]


def test_the_global_batch_does_not_depend_on_the_processes():
    order = SampleOrder(samples=50, global_batch_size=8, seed=0)
    for step in range(10):
        expected = order.global_batch(step)
        for size, micro in ((1, 8), (2, 2), (4, 1), (8, 1)):
            order.check(size, micro)
            parts = [order.micro_batches(step, rank, size, micro) for rank in range(size)]
            assert [s for rank in parts for batch in rank for s in batch] == expected


def test_the_order_of_a_seed_never_changes():
    # A resume with another version of numpy has to see the same samples.
    assert SampleOrder(samples=12, global_batch_size=12, seed=7).global_batch(0) == [
        4,
        6,
        10,
        0,
        1,
        3,
        8,
        7,
        2,
        5,
        9,
        11,
    ]


def test_without_shuffling_the_stream_is_read_in_order():
    order = SampleOrder(samples=3, global_batch_size=2, seed=0, shuffle=False)
    assert [order.global_batch(step) for step in range(3)] == [[0, 1], [2, 0], [1, 2]]


def test_a_batch_that_does_not_divide_names_those_that_do():
    with pytest.raises(UsageError, match="global_batch_size=10 is not a multiple") as caught:
        SampleOrder(100, 10, 0).check(4, 2)
    assert caught.value.hint == "choose global_batch_size=8 or 16"


def test_flags_are_distinct_bits():
    assert TRAINED & STARTS == 0
