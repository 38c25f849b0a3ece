"""Codes of a corpus on disk: what is written, how it resumes, and what the reader says of a feature."""

import itertools
import json
import os
import signal
import sys

import pytest
import torch
from forked import be_quick, forked
from makers import contents, names, write_store
from published_makers import D, F, draw, write_saelens
from safetensors.torch import load_file, save_file

from sampled_sae import ActivationStore, CodesStore, load_inference
from sampled_sae.cli import main
from sampled_sae.formats.portable import silent
from sampled_sae.inference.codes_files import MANIFEST
from sampled_sae.inference.encode_corpus import encode_corpus
from sampled_sae.support.checksums import file_crc32
from sampled_sae.support.token_places import TokenPlaces, TokenShard
from sampled_sae.training.activation_store import StoredActivations


@pytest.fixture
def sae(tmp_path):
    return load_inference(write_saelens(tmp_path / "sae", "jumprelu"), say=silent)


class Texts:
    """A source of three shards with text; it fails at a shard where it is told to."""

    d_in, n_shards = D, 3

    def __init__(self, fails=None, name="texts"):
        self.fails, self.settings = fails, {"name": name}
        self.about = {"model": "made", "layer": 1, "source": "here", "context": 8}

    def token_shard(self, i):
        if i == self.fails:
            raise RuntimeError("stopped")
        rows = torch.arange(5 * 8).view(5, 8) + 100 * i
        stay = torch.ones(5, 8, dtype=torch.bool)
        stay[:, 0] = False
        stay[2, 4] = False
        return TokenShard(draw(34, D, seed=20 + i), TokenPlaces.of_rows(rows, stay))


def dense_of(sae, source):
    return torch.cat([sae.encode(source.token_shard(i).x) for i in range(source.n_shards)])


@pytest.mark.parametrize("batch_size", [7, 4096])
def test_what_is_written_is_what_the_sae_computes(sae, tmp_path, batch_size):
    found = encode_corpus(sae, Texts(), tmp_path / "codes", sae_name="s", batch_size=batch_size, progress=False)
    assert (found.tokens, found.manifest["complete"]) == (102, True)
    store, dense = CodesStore.open(tmp_path / "codes"), dense_of(sae, Texts())
    assert store.tokens == [34, 34, 34]
    assert (store.manifest["sae"], store.manifest["model"], store.manifest["layer"]) == ("s", "made", 1)
    codes = torch.cat([store.codes(i).to_dense() for i in range(3)])
    torch.testing.assert_close(codes, dense)
    assert torch.equal(store.counts(), (codes != 0).sum(0))
    assert torch.equal(store.density(), (codes != 0).double().mean(0))
    assert store.l0 == int(codes.count_nonzero()) / 102
    for feature in range(F):
        values, tokens = store.of_feature(feature)
        assert torch.equal(tokens, codes[:, feature].nonzero().squeeze(1))
        assert torch.equal(values, codes[tokens, feature])


def test_top_contexts(sae, tmp_path):
    encode_corpus(sae, Texts(), tmp_path / "codes", progress=False)
    store, dense = CodesStore.open(tmp_path / "codes"), dense_of(sae, Texts())
    feature = int((dense != 0).sum(0).argmax())
    contexts = store.top_contexts(feature, n=4, before=2, after=1)
    best = dense[:, feature].sort(descending=True, stable=True)
    assert [context.token for context in contexts] == best.indices[:4].tolist()
    torch.testing.assert_close(torch.tensor([c.value for c in contexts]), best.values[:4])
    for context in contexts:
        places = store.places(context.token // 34)
        own = int(places.ids[context.token % 34])
        assert context.ids[context.at] == own
        assert own % 100 == 8 * (context.row % 5) + context.position
        expected = [own + j for j in range(-2, 2) if 0 <= context.position + j < 8]
        assert context.ids == expected
    assert store.top_contexts(feature, n=0) == []
    assert len(store.top_contexts(feature, n=10**6)) == int(store.counts()[feature])


def test_ties_go_to_the_earlier_token(sae, tmp_path):
    class Same(Texts):
        def token_shard(self, i):
            return TokenShard(draw(1, D, seed=3).expand(9, D), None)

    encode_corpus(sae, Same(), tmp_path / "codes", progress=False)
    store = CodesStore.open(tmp_path / "codes")
    feature = int(store.counts().argmax())
    contexts = store.top_contexts(feature, n=20)
    assert [context.token for context in contexts] == list(range(20))
    assert contexts[0][2:] == ([], 0, None, None)


def test_a_store_of_activations(sae, tmp_path):
    store = ActivationStore.open(write_store(tmp_path / "acts"))
    encode_corpus(sae, StoredActivations(store), tmp_path / "codes", progress=False)
    codes = CodesStore.open(tmp_path / "codes")
    assert codes.tokens == store.tokens
    torch.testing.assert_close(codes.codes(1).to_dense(), sae.encode(store.shard(1)))
    assert codes.places(0) is None
    assert codes.manifest["model"] == "made"


def test_it_goes_on_where_it_stopped(sae, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    encode_corpus(sae, Texts(), whole, progress=False)
    with pytest.raises(RuntimeError, match="stopped"):
        encode_corpus(sae, Texts(fails=2), stopped, progress=False)
    with pytest.raises(ValueError, match="not finished; run the same encode command again"):
        CodesStore.open(stopped)
    assert encode_corpus(sae, Texts(), stopped, progress=False).tokens == 34
    assert contents(stopped) == contents(whole)
    assert encode_corpus(sae, Texts(), stopped, progress=False).tokens == 0
    damaged = stopped / "codes_00001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    assert encode_corpus(sae, Texts(), stopped, progress=False).tokens == 34
    assert contents(stopped) == contents(whole)


def encode_until(sae_folder, codes, n, renames):
    """In a process of its own, which the n-th file that is about to be seen, or just was, is the last to see."""
    be_quick()
    files, rename = itertools.count(1), os.replace

    def die(*paths):
        last = next(files) == n
        if renames or not last:
            rename(*paths)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = die
    encode_corpus(load_inference(sae_folder, say=silent), Texts(), codes, progress=False)


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGKILL")
def test_a_kill_at_any_file_loses_no_other(sae, tmp_path):
    whole = tmp_path / "whole"
    encode_corpus(sae, Texts(), whole, progress=False)
    n = 0
    while True:
        n += 1
        killed = tmp_path / f"killed_{n}"
        process = forked().Process(target=encode_until, args=(tmp_path / "sae", killed, n, n % 2 == 0))
        process.start()
        process.join()
        there = {name for name in names(killed) if name.startswith("codes_")}
        found = encode_corpus(sae, Texts(), killed, progress=False)
        assert contents(killed) == contents(whole)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        # a shard counts once the manifest lists it, which is written after it
        assert 3 - len(there) <= found.tokens // 34 <= 4 - len(there)
    assert n == 9  # the manifest at first, after each of three shards and at the end


def test_another_corpus_is_refused(sae, tmp_path):
    encode_corpus(sae, Texts(), tmp_path / "codes", progress=False)
    with pytest.raises(ValueError, match="was begun with name='texts', this call has name='others'"):
        encode_corpus(sae, Texts(name="others"), tmp_path / "codes", progress=False)
    sae.b_dec += 1
    with pytest.raises(ValueError, match="was begun with sae_crc32="):
        encode_corpus(sae, Texts(), tmp_path / "codes", progress=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="must be new or empty"):
        encode_corpus(sae, Texts(), tmp_path / "full", progress=False)
    with pytest.raises(ValueError, match="dtype='int8'"):
        encode_corpus(sae, Texts(), tmp_path / "new", dtype="int8", progress=False)
    wide = Texts()
    wide.d_in = 13
    with pytest.raises(ValueError, match="d_in=12, but the activations have 13"):
        encode_corpus(sae, wide, tmp_path / "new", progress=False)
    assert not (tmp_path / "new").exists()


def test_sixteen_bits(sae, tmp_path):
    encode_corpus(sae, Texts(), tmp_path / "codes", dtype="bfloat16", progress=False)
    values = CodesStore.open(tmp_path / "codes").codes(0)
    torch.testing.assert_close(values.to_dense().float(), sae.encode(Texts().token_shard(0).x), rtol=1e-2, atol=1e-2)

    class Large(Texts):
        def token_shard(self, i):
            x, places = super().token_shard(i)
            return TokenShard(1e6 * x, places)

    with pytest.raises(ValueError, match="dtype='float16' cannot hold these codes, which reach"):
        encode_corpus(sae, Large(), tmp_path / "large", dtype="float16", progress=False)


def test_nothing_active(sae, tmp_path):
    sae.threshold.fill_(1e30)
    encode_corpus(sae, Texts(), tmp_path / "codes", progress=False)
    store = CodesStore.open(tmp_path / "codes")
    assert (store.l0, int(store.counts().sum())) == (0, 0)
    assert store.top_contexts(5) == []
    assert store.codes(2).to_dense().shape == (34, F)


def test_verify_knows_the_folder(sae, tmp_path, capsys):
    codes = tmp_path / "codes"
    encode_corpus(sae, Texts(), codes, progress=False)
    assert main(["verify", str(codes)]) == 0
    assert capsys.readouterr().out.count(": ok\n") == 4
    shard = codes / "codes_00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    assert main(["verify", str(codes)]) == 1
    assert "codes_00001.safetensors: corrupt, checksum" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"corrupt, checksum .*; the same encode command writes it again"):
        CodesStore.open(codes).counts()
    manifest = json.loads((codes / MANIFEST).read_text())
    (codes / MANIFEST).write_text(json.dumps({**manifest, "complete": False}))
    assert main(["verify", str(codes)]) == 1
    assert "manifest.json: not finished" in capsys.readouterr().out
    (codes / MANIFEST).write_text(json.dumps({**manifest, "d_sae": "many"}))
    assert main(["verify", str(codes)]) == 1
    assert "d_sae='many': must be of type int" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("features", lambda t: t.flip(0), "features are not those of"),
        ("features", lambda t: t + F, "features are not those of"),
        ("counts", lambda t: t + 1, "features are not those of"),
        ("positions", lambda t: t + 8, "positions from 9 to 15: there are 8"),
        ("token_rows", lambda t: t.float(), "are not those of tokens"),
        ("values", None, "not a shard of codes"),
    ],
    ids=range(6),
)
def test_tensors_that_do_not_go_together(sae, tmp_path, name, value, message):
    codes = tmp_path / "codes"
    encode_corpus(sae, Texts(), codes, progress=False)
    shard = codes / "codes_00000.safetensors"
    tensors = load_file(shard)
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value(tensors[name]).contiguous()
    save_file(tensors, shard)
    manifest = json.loads((codes / MANIFEST).read_text())
    manifest["shards"][0] |= {"crc32": file_crc32(shard), "bytes": shard.stat().st_size}
    (codes / MANIFEST).write_text(json.dumps(manifest))
    store = CodesStore.open(codes)
    with pytest.raises(ValueError, match=f"codes_00000.safetensors: .*{message}"):
        [store.top_contexts(feature) for feature in range(F)]


def test_bad_questions(sae, tmp_path):
    encode_corpus(sae, Texts(), tmp_path / "codes", progress=False)
    store = CodesStore.open(tmp_path / "codes")
    with pytest.raises(ValueError, match="feature=96: must be below d_sae=96"):
        store.of_feature(F)
    with pytest.raises(ValueError, match=r"i=3: .* has 3 shards"):
        store.codes(3)
    with pytest.raises(ValueError, match="n=-1"):
        store.top_contexts(1, n=-1)
