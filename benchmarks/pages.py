"""The pages of SAEs: what they take to make, their size, and how soon a browser shows, searches and sorts them.

    python -m benchmarks.pages --look SAE ACTIVATIONS --out benchmarks/results/pages.json

One of 16,384 features on random activations, with 1,000 of them in full and with all; and `sampled-sae look SAE
ACTIVATIONS` with 1,000 in full, command and start of the model included. Needs selenium (extra `test`) and Chromium.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import ROOT, Row
from benchmarks.record import Record, parser, table_of
from sampled_sae import CodesStore
from sampled_sae.inference.config import InferenceConfig
from sampled_sae.inference.encode_corpus import encode_corpus
from sampled_sae.inference.inference_sae import InferenceSAE
from sampled_sae.pages.choice import FeatureChoice
from sampled_sae.pages.feature_page import LanguageModel, PageSettings, feature_page
from sampled_sae.support.token_places import TokenPlaces, TokenShard

N_FEATURES, D, N_ROWS, CONTEXT, VOCABULARY = 16_384, 16, 80, 64, 20_000
FEW = "top:1000"
TIMED = """
const start = performance.now();
byId("search").value = arguments[0];
byId("search").dispatchEvent(new Event("input"));
document.body.getBoundingClientRect();
return [performance.now() - start, table.shown.length];
"""


COLUMNS = {"page": "{page}", "in full": "{in full}", "made in, s": "{made_s:.1f}", "MB": "{megabytes:.1f}"}
COLUMNS |= {"first paint, ms": "{first_paint_ms:.0f}", "slowest search, ms": "{search_ms:.0f}"}
COLUMNS |= {"sort, ms": "{sort_ms:.0f}"}
markdown_table = table_of(COLUMNS)


class Texts:
    """Random activations of random rows of text."""

    def __init__(self) -> None:
        self.d_in, self.n_shards = D, 1
        self.about: dict[str, Any] = {}
        self.settings: dict[str, Any] = {}

    def token_shard(self, i: int) -> TokenShard:
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(0, VOCABULARY, (N_ROWS, CONTEXT), generator=generator)
        x = torch.randn(N_ROWS * CONTEXT, D, generator=generator)
        return TokenShard(x, TokenPlaces.of_rows(rows, torch.ones(N_ROWS, CONTEXT, dtype=torch.bool)))


def large_page(folder: Path, features: str) -> Path:
    """look.html in the folder, with so many features in full."""
    generator = torch.Generator().manual_seed(1)
    W = torch.nn.functional.normalize(torch.randn(N_FEATURES, D, generator=generator), dim=1)
    config = InferenceConfig(d_in=D, d_sae=N_FEATURES, rule="topk", k=32)
    tensors = {"W_enc": W.t(), "W_dec": W, "b_enc": torch.zeros(N_FEATURES), "b_dec": torch.zeros(D)}
    sae = InferenceSAE(config, tensors)
    encode_corpus(sae, Texts(), folder / "codes", progress=False)
    model = LanguageModel(lambda ids: [f" word{i}" for i in ids], None)
    overview = {"name": "large", "line": "", "corpus": {}, "settings": {}, "evaluation": {}, "curves": {}}
    settings = PageSettings(FeatureChoice.parse(features), contexts=8)
    html = feature_page(sae, CodesStore.open(folder / "codes"), None, model, settings, overview, progress=False)
    (folder / "look.html").write_text(html, encoding="utf-8")
    return folder / "look.html"


def measured(browser: Any, file: Path) -> Row:
    """Milliseconds: first paint, the slowest of several searches, and a sort; megabytes of the file."""
    from browser import until

    browser.get("about:blank")
    browser.get(file.as_uri())
    until(browser, "return performance.getEntriesByName('first-contentful-paint').length")
    paint = browser.execute_script("return performance.getEntriesByName('first-contentful-paint')[0].startTime")
    searches = [browser.execute_script(TIMED, text)[0] for text in ("word1", "4", "word19999", "o", "")]
    sort = "const start = performance.now(); table.sort('max'); return performance.now() - start"
    found = {"first_paint_ms": paint, "search_ms": max(searches), "sort_ms": browser.execute_script(sort)}
    return {**found, "megabytes": file.stat().st_size / 1e6}


def look(sae: Path, activations: Path, folder: Path) -> Path:
    """What the command makes of an SAE."""
    command = [sys.executable, "-m", "sampled_sae", "--quiet", "look", str(sae), str(activations)]
    options = ["--features", FEW, "--out", str(folder / "look.html")]
    subprocess.run([*command, *options], cwd=ROOT, check=True)
    return folder / "look.html"


def timed(same: Row, make: Callable[[Path], Path]) -> Iterator[Row]:
    """A page that `make` writes into a folder."""
    from browser import opened

    with tempfile.TemporaryDirectory() as folder, opened() as browser:
        start = time.perf_counter()
        file = make(Path(folder))
        yield {**same, "made_s": time.perf_counter() - start, **measured(browser, file)}


def main() -> None:
    p = parser(__doc__, "--out")
    p.add_argument("--look", type=Path, nargs=2, metavar=("SAE", "ACTIVATIONS"), help="a page of this SAE besides")
    args = p.parse_args()
    # how the tests start a browser
    sys.path.insert(1, str(ROOT / "tests" / "pages"))
    record = Record(args, markdown_table)
    makers = {(f"{N_FEATURES} features", n): partial(large_page, features=n) for n in (FEW, "all")}
    if args.look:
        makers[(f"`look` of {args.look[0].name}", FEW)] = partial(look, *args.look)
    for (page, features), make in makers.items():
        row = {"page": page, "in full": features}
        record.attempt([row], partial(timed, row, make))


if __name__ == "__main__":
    main()
