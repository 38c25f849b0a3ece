"""Files of texts: every kind, in every encoding, read as far as needed."""

import gzip
import json
import sys
from itertools import islice

import pytest
import torch

from sampled_sae.lm import load_texts, shuffled_texts, text_files, texts
from sampled_sae.lm.text_files import LongText

CHAT = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "one"),
        ("a.json", '["one", null]'),
        ("a.jsonl", lines({"text": None}, {"text": "one"}, None)),
        ("a.csv", 'id,text\n1,"one"\n2,\n'),
        ("a.tsv", "text\tid\none\t1\n"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "gz"])
@pytest.mark.filterwarnings("ignore:.*null texts")
def test_files_of_every_kind_in_every_encoding(tmp_path, name, content, encoding):
    content = content.replace("one", "où 东西")
    if encoding == "gz":
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content.encode()))
    else:
        (tmp_path / name).write_bytes(content.encode(encoding))
    [file] = tmp_path.iterdir()
    assert load_texts(str(file)) == ["où 东西"]
    assert load_texts(str(tmp_path)) == ["où 东西"]
    assert list(shuffled_texts(str(file), 0)) == ["où 东西"]


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json", "odd:name.csv"])
def test_a_column_by_name(tmp_path, name):
    records = [{"text": "no", "body": "one"}, {"text": "no", "body": "two"}]
    made = {"csv": "text,body\nno,one\nno,two\n", "jsonl": lines(*records), "json": json.dumps(records)}
    (tmp_path / name).write_text(made[name.split(".")[1]])
    assert load_texts(f"{tmp_path / name}:body") == ["one", "two"]
    with pytest.raises(ValueError, match=r"missing.*text.*body"):
        load_texts(f"{tmp_path / name}:missing")


def test_a_folder_gives_one_kind_of_file(tmp_path):
    (tmp_path / "b.jsonl").write_text(lines("three"))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines("one", "two").encode()))
    (tmp_path / "about.json").write_text("{}")
    assert load_texts(str(tmp_path)) == ["one", "two", "three"]
    (tmp_path / "c.txt").write_text("four")
    assert load_texts(str(tmp_path)) == ["four"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"is a folder without any \.txt"):
        load_texts(str(tmp_path / "empty"))


def test_no_source_is_not_the_folder_of_the_moment(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("one")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="source='' is no file or folder"):
        load_texts("")
    assert load_texts(".") == ["one"]


def test_nulls_are_left_out_and_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines({"text": None}, {"text": "one"}, None, {"text": ""}))
    with pytest.warns(UserWarning, match="2 null texts were left out"):
        assert load_texts(str(tmp_path / "a.jsonl")) == ["one"]


def test_chats(tmp_path):
    other = [{"role": "user", "content": [{"type": "text", "text": "three"}]}]
    (tmp_path / "a.jsonl").write_text(lines({"messages": CHAT}, CHAT, {"conversations": other}, {"text": "four"}))
    assert load_texts(str(tmp_path / "a.jsonl")) == [CHAT, other, "four"]
    (tmp_path / "b.json").write_text(json.dumps(CHAT))
    assert load_texts(str(tmp_path / "b.json")) == [CHAT]
    (tmp_path / "c.jsonl").write_text(lines({"turns": CHAT}))
    assert load_texts(f"{tmp_path / 'c.jsonl'}:turns") == [CHAT]


def test_chats_of_sharegpt_and_empty_ones(tmp_path):
    turns = [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two", "weight": 1}]
    system = [{"from": "system", "value": "be kind"}]
    (tmp_path / "a.jsonl").write_text(lines({"conversations": turns}, {"messages": []}, [], turns, system))
    assert load_texts(str(tmp_path / "a.jsonl")) == [CHAT, [{"role": "system", "content": "be kind"}]]
    (tmp_path / "b.json").write_text(json.dumps(turns))
    assert load_texts(str(tmp_path / "b.json")) == [CHAT]


@pytest.mark.parametrize("name", ["wiki-dump.jsonl", "wiki-en", "wiki-x/a.jsonl"])
def test_own_files_with_names_like_a_packages(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / name if "." in name else tmp_path / name / "a.jsonl"
    file.parent.mkdir(exist_ok=True)
    file.write_text(lines({"body": "one"}))
    assert load_texts(f"{name}:body") == ["one"]


def test_paths_and_folders_inside(tmp_path):
    (tmp_path / "inner.txt").mkdir()
    (tmp_path / "a.txt").write_text("one")
    assert load_texts(tmp_path) == list(shuffled_texts(tmp_path, 0)) == ["one"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'"x"\n{"text": "y"', r"a\.jsonl, line 2 is not JSON"),
        ("a.jsonl", b'"x"\n\n{"other": "y", "more": 1}', r"a\.jsonl, line 3 must be .*, has other, more"),
        pytest.param("a.jsonl", b"[" * 200_000, r"a\.jsonl, line 1 is not JSON", id="too deep"),
        pytest.param("a.jsonl", b"1" * 5000, r"a\.jsonl, line 1 is not JSON", id="too long a number"),
        ("a.jsonl", b'[{"role": "user"}]', r"a\.jsonl, line 1 must be .* a chat"),
        ("a.json", b'["x", {"text": 3}]', r"a\.json, record 1 must be"),
        ("a.csv", b"title,body\nx,y\n", r"a\.csv has no column text or .*, but 'title', 'body'"),
        ("a.csv", b"", r"a\.csv has no column"),
        ("a.jsonl.gz", gzip.compress(b'"x"\n' * 5000, mtime=0)[:-20], r"a\.jsonl\.gz is not a whole gzip file"),
        ("a.jsonl.gz", b'"x"\n', r"a\.jsonl\.gz is not a whole gzip file"),
        ("a.pdf", b"x", r"must end in \.txt, \.jsonl, "),
    ],
)
def test_wrong_files_are_named_with_the_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_texts(str(tmp_path / name))


def test_bytes_that_are_no_text_far_into_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "WHOLE_BYTES", 1 << 20)
    (tmp_path / "a.jsonl").write_bytes(lines("x" * 3_000_000).encode() + b'"\xe9"\n')
    (tmp_path / "b.txt").write_bytes("half a character".encode("utf-16")[:-1])
    for name in ("a.jsonl", "b.txt"):
        with pytest.raises(ValueError, match=f"{name} is not in one encoding to its end"):
            load_texts(str(tmp_path / name))


def test_a_small_file_is_shuffled_as_a_whole(tmp_path):
    words = [f"word {i}" for i in range(3000)]
    (tmp_path / "a.jsonl").write_text(lines(*words))
    got = list(shuffled_texts(str(tmp_path / "a.jsonl"), 3))
    order = torch.randperm(3000, generator=torch.Generator().manual_seed(3)).tolist()
    assert got == [words[i] for i in order]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.jsonl.gz"])
def test_a_large_file_is_read_as_far_as_needed(tmp_path, monkeypatch, name):
    monkeypatch.setattr(text_files, "WHOLE_BYTES", 1000)
    words = [f"word {i}" for i in range(20_000)]
    content = ("text\n" + "\n".join(words) if "csv" in name else lines(*words)).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    seen = []
    real = text_files.read_documents
    monkeypatch.setattr(texts, "read_documents", lambda *a: (seen.append(1) or d for d in real(*a)))
    stream = shuffled_texts(str(tmp_path / name), 0)
    first = list(islice(stream, 20))
    assert len(seen) <= 1100
    whole = first + list(stream)
    assert sorted(whole) == sorted(words)
    assert whole == list(shuffled_texts(str(tmp_path / name), 0)) != list(shuffled_texts(str(tmp_path / name), 1))
    assert first != words[:20]
    assert max(abs(int(word.split()[1]) - i) for i, word in enumerate(first)) > 100


def test_a_large_text_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(text_files, "_CHUNK", 100)
    text = " ".join(f"wörd{i}" for i in range(1000))
    (tmp_path / "a.txt").write_text("\n " + text)
    [long] = shuffled_texts(str(tmp_path / "a.txt"), 0)
    assert isinstance(long, LongText)
    assert "".join(long) == text
    assert max(map(len, long)) <= 100
    assert load_texts(str(tmp_path / "a.txt")) == [text]


def test_long_documents_do_not_fill_the_buffer(monkeypatch):
    monkeypatch.setattr(texts, "_BUFFER_CHARACTERS", 100)
    asked = []
    documents = (asked.append(i) or "x" * 30 for i in range(50))
    next(texts._drawn(documents, 0))
    assert len(asked) == 4


def test_missing_packages(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="needs the package datasets: pip install datasets"):
        shuffled_texts("hf:name", 0)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    for source in (tmp_path / "a.parquet", tmp_path):
        with pytest.raises(ImportError, match="needs the package pyarrow: pip install pyarrow"):
            shuffled_texts(str(source), 0)


def test_parquet(tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    table = pyarrow.table({"text": ["one", None, "two"], "body": ["x", "y", "z"], "chat": [CHAT, None, CHAT]})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.warns(UserWarning, match="1 null texts"):
        assert load_texts(str(tmp_path / "a.parquet")) == ["one", "two"]
    assert load_texts(f"{tmp_path}:body") == ["x", "y", "z"]
    with pytest.warns(UserWarning, match="1 null texts"):
        assert load_texts(f"{tmp_path / 'a.parquet'}:chat") == [CHAT]
    with pytest.raises(ValueError, match="has no column 'other', but 'text', 'body', 'chat'"):
        load_texts(f"{tmp_path}:other")
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"b\.parquet is not a parquet file"):
        load_texts(str(tmp_path / "b.parquet"))
