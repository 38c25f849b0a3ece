"""A page of 16,384 features stays usable. What it took is recorded with the test, and judged by nobody."""

import pytest
import torch
from browser import logged, opened, until

from sampled_sae import CodesStore
from sampled_sae.corpus.encode import encode_corpus
from sampled_sae.corpus.token_places import TokenPlaces, TokenShard
from sampled_sae.inference.config import InferenceConfig
from sampled_sae.inference.inference_sae import InferenceSAE
from sampled_sae.pages.choice import FeatureChoice
from sampled_sae.pages.feature_page import LanguageModel, Settings, feature_page

N_FEATURES, D, N_ROWS, CONTEXT, VOCABULARY = 16_384, 16, 80, 64, 20_000
TIMED = """
const start = performance.now();
byId("search").value = arguments[0];
byId("search").dispatchEvent(new Event("input"));
document.body.getBoundingClientRect();
return [performance.now() - start, table.shown.length];
"""


class Texts:
    """Random activations of random rows of text."""

    d_in, n_shards, about, settings = D, 1, {}, {}

    def token_shard(self, i):
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(0, VOCABULARY, (N_ROWS, CONTEXT), generator=generator)
        x = torch.randn(N_ROWS * CONTEXT, D, generator=generator)
        return TokenShard(x, TokenPlaces.of_rows(rows, torch.ones(N_ROWS, CONTEXT, dtype=torch.bool)))


def large_page(folder, features):
    generator = torch.Generator().manual_seed(1)
    W = torch.nn.functional.normalize(torch.randn(N_FEATURES, D, generator=generator), dim=1)
    config = InferenceConfig(d_in=D, d_sae=N_FEATURES, rule="topk", k=32)
    tensors = {"W_enc": W.t(), "W_dec": W, "b_enc": torch.zeros(N_FEATURES), "b_dec": torch.zeros(D)}
    sae = InferenceSAE(config, tensors)
    encode_corpus(sae, Texts(), folder / "codes", progress=False)
    model = LanguageModel(lambda ids: [f" word{i}" for i in ids], None)
    overview = {"name": "large", "line": "", "corpus": {}, "settings": {}, "evaluation": {}, "curves": {}}
    settings = Settings(FeatureChoice.parse(features), contexts=8)
    html = feature_page(sae, CodesStore.open(folder / "codes"), None, model, settings, overview, progress=False)
    (folder / "look.html").write_text(html, encoding="utf-8")
    return folder / "look.html"


def measured(browser, file):
    """Milliseconds: first paint, the slowest of several searches, and a sort; megabytes of the file."""
    browser.get("about:blank")
    browser.get(file.as_uri())
    until(browser, "return performance.getEntriesByName('first-contentful-paint').length")
    paint = browser.execute_script("return performance.getEntriesByName('first-contentful-paint')[0].startTime")
    searches = [browser.execute_script(TIMED, text)[0] for text in ("word1", "4", "word19999", "o", "")]
    sort = "const start = performance.now(); table.sort('max'); return performance.now() - start"
    found = {"first_paint_ms": paint, "search_ms": max(searches), "sort_ms": browser.execute_script(sort)}
    return {**found, "megabytes": file.stat().st_size / 1e6}


@pytest.mark.slow
def test_a_large_table_has_few_rows_in_the_page_and_finds_all(tmp_path, record_property):
    file = large_page(tmp_path, "top:200")
    with opened() as browser:
        for name, value in measured(browser, file).items():
            record_property(name, value)
        assert browser.execute_script(TIMED, "")[1] == N_FEATURES
        browser.execute_script("document.getElementById('table').scrollTop = 30 * 12000")
        until(browser, "return document.querySelector('tr[data-row]').ariaRowIndex > 11000")
        assert browser.execute_script("return document.querySelectorAll('tr[data-row]').length") < 100
        last = browser.execute_script("table.sort('feature', true); table.select(3); return table.shown[0]")
        assert last == N_FEATURES - 1
        assert browser.execute_script("return document.querySelector('tr.selected').ariaRowIndex") == str(
            N_FEATURES - 3
        )
        assert browser.execute_script(TIMED, "16383")[1] == 1
        assert logged(browser) == []


def main():
    """Prints what a page takes with 1,000 features in full, and with all of them."""
    import tempfile
    import time
    from pathlib import Path

    for features in ("top:1000", "all"):
        with tempfile.TemporaryDirectory() as folder, opened() as browser:
            start = time.perf_counter()
            file = large_page(Path(folder), features)
            print(features, {"made_s": time.perf_counter() - start, **measured(browser, file)})


if __name__ == "__main__":
    main()
