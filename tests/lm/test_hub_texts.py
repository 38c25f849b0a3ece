"""Texts of hub data sets, by a stand-in for `datasets`: names, streams read as far as needed, saved folders."""

import sys
from itertools import islice
from types import ModuleType, SimpleNamespace

import pytest

from sampled_sae.lm import load_texts, shuffled_texts

CHAT = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]


class Stream:
    """What datasets.load_dataset(..., streaming=True) gives: endless, and counts what is asked for."""

    def __init__(self, make, most=None):
        self.make, self.most, self.asked = make, most, 0

    def __iter__(self):
        while self.most is None or self.asked < self.most:
            self.asked += 1
            yield self.make(self.asked)


@pytest.fixture
def hub(monkeypatch):
    module = ModuleType("datasets")
    calls = SimpleNamespace(stream=Stream(lambda i: {"text": f"text {i}", "body": f"body {i}"}), loaded=[], saved=None)

    def load_dataset(path, name=None, split=None, streaming=False):
        calls.loaded.append((path, name, split))
        assert streaming
        return calls.stream

    module.load_dataset = load_dataset
    module.load_from_disk = lambda path: calls.loaded.append(path) or calls.saved
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


@pytest.mark.parametrize(
    ("source", "call", "first"),
    [
        ("hf:owner/name", ("owner/name", None, "train"), "text"),
        ("hf:owner/name:test", ("owner/name", None, "test"), "text"),
        ("hf:name:test:body", ("name", None, "test"), "body"),
        ("hf:name::body", ("name", None, "train"), "body"),
        ("hf:name:config=en", ("name", "en", "train"), "text"),
        ("hf:name:test:body:config=20231101.en", ("name", "20231101.en", "test"), "body"),
        ("hf:name:config=en:split=test:column=body", ("name", "en", "test"), "body"),
    ],
)
def test_hub_names(hub, source, call, first):
    assert load_texts(source, limit=2) == [f"{first} 1", f"{first} 2"]
    assert hub.loaded == [call]
    assert hub.stream.asked <= 3


def test_a_stream_is_read_as_far_as_needed(hub):
    stream = shuffled_texts("hf:name", 0)
    assert hub.stream.asked == 0
    assert len(set(islice(stream, 50))) == 50
    assert hub.stream.asked <= 1100


@pytest.mark.parametrize("source", ["hf:", "hf:a:b:c:d", "hf:a:other=b", "hf::train"])
def test_wrong_hub_names(hub, source):
    with pytest.raises(ValueError, match=r"must read hf:NAME\[:split\[:column\]\]\[:config=CONFIG\]"):
        shuffled_texts(source, 0)


def test_records_of_a_stream_without_text(hub):
    hub.stream = Stream(lambda i: {"title": "x"})
    with pytest.raises(ValueError, match=r"hf:name, record 0 must be .*, has title"):
        load_texts("hf:name")
    hub.stream = Stream(lambda i: {"text": None if i < 3 else f"text {i}"}, most=5)
    with pytest.warns(UserWarning, match="2 null texts"):
        assert load_texts("hf:name") == ["text 3", "text 4", "text 5"]
    hub.stream = Stream(lambda i: {"messages": CHAT}, most=2)
    assert load_texts("hf:name") == [CHAT]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("Dataset scripts are no longer supported"), ValueError),
        (NotImplementedError("zip in zip"), ValueError),
        (KeyError("train"), ValueError),
        (ConnectionError("no network"), OSError),
    ],
)
@pytest.mark.parametrize("when", ["opened", "read", "from disk"])
def test_errors_of_datasets_name_the_source(hub, tmp_path, monkeypatch, error, kind, when):
    def fail(*given, **more):
        raise error

    if when == "opened":
        monkeypatch.setattr(sys.modules["datasets"], "load_dataset", fail)
    hub.stream = Stream(lambda i: {"text": "x"} if i == 1 else fail())
    source = "hf:name"
    if when == "from disk":
        (tmp_path / "state.json").touch()
        monkeypatch.setattr(sys.modules["datasets"], "load_from_disk", fail)
        source = str(tmp_path)
    with pytest.raises(kind, match=r"source=.*: cannot be read: \W?(Data|zip|train|no net)"):
        load_texts(source)


def test_split_and_column_of_a_saved_data_set_without_splits(hub, tmp_path):
    (tmp_path / "state.json").touch()
    for source in (f"{tmp_path}:body", f"hf:{tmp_path}:train:body"):
        hub.saved = Stream(lambda i: {"text": "text", "body": f"body {i}"}, most=2)
        assert load_texts(source) == ["body 1", "body 2"]
    with pytest.raises(ValueError, match="has no split 'body', but 'train'"):
        load_texts(f"hf:{tmp_path}:body")


@pytest.mark.parametrize("prefix", ["", "hf:"])
def test_folders_of_save_to_disk(hub, tmp_path, prefix):
    (tmp_path / "state.json").write_text("{}")
    hub.saved = Stream(lambda i: {"text": f"text {i}"}, most=2)
    assert load_texts(f"{prefix}{tmp_path}") == ["text 1", "text 2"]
    (tmp_path / "state.json").rename(tmp_path / "dataset_dict.json")
    hub.saved = {
        "train": Stream(lambda i: {"text": "train"}, most=1),
        "test": Stream(lambda i: {"text": "test"}, most=1),
    }
    assert load_texts(f"{prefix}{tmp_path}") == ["train"]
    assert load_texts(f"hf:{tmp_path}:test") == ["test"]
    with pytest.raises(ValueError, match="has no split 'dev', but 'train', 'test'"):
        load_texts(f"hf:{tmp_path}:dev")
    assert set(hub.loaded) == {str(tmp_path)}
