"""The page of two SAEs as a person uses it, in a headless Chromium; skipped where there is none."""

import pytest
from browser import CONTRASTS, LEAST_CONTRAST, fresh, keys, type_search, until
from page_makers import HOSTILE, N_FEATURES

from sampled_sae.pages.comparison_page import comparison_page
from sampled_sae.pages.look_link import LookLink

SHOWN = "return Array.from(paired.shown, (i) => [0, 1].map((side) => pairColumns.features[side][i]))"


@pytest.fixture(scope="module")
def address(found, looked):
    file = looked.parent / "comparison.html"
    looks = (LookLink.read(looked, file.parent), None)
    file.write_text(comparison_page(found, (HOSTILE, "two"), HOSTILE, looks), encoding="utf-8")
    return file.as_uri()


@pytest.fixture
def page(browser, address):
    with fresh(browser, address) as page:
        yield page


def counts(page):
    ids = ("pairs", "alone-0", "alone-1")
    return [page.execute_script("return byId(`${arguments[0]}-count`).textContent", one) for one in ids]


def test_all_is_drawn(page, found):
    captions = page.execute_script("return Array.from(document.querySelectorAll('figcaption'), (f) => f.textContent)")
    assert captions == [
        "Pairs by cosine",
        "Features of A by their nearest in B",
        "Features of B by their nearest in A",
        "Tokens that pairs share, by cosine: median and quartiles",
        "Shared pairs by the tokens of both",
        "Shared pairs by their activations",
    ]
    heights = """
        const height = (bar) => Number(bar.getAttribute('height'));
        const heights = (chart) => Array.from(chart.querySelectorAll('.bar'), height);
        return Array.from(document.querySelectorAll('#charts svg'), (chart) => Math.max(0, ...heights(chart)));
    """
    assert [height > 50 for height in page.execute_script(heights)] == [True] * 3 + [False] + [True] * 2
    alone = [len(found.alone(side)) for side in (0, 1)]
    assert counts(page) == [f"{n} of {n} {what}" for n, what in zip((N_FEATURES, *alone), ("pairs", *["features"] * 2))]
    cells = page.execute_script(
        "return Array.from(document.querySelectorAll('#figures td'), (cell) => cell.textContent)"
    )
    assert str(found.summary()["shared"]) in cells


@pytest.mark.parametrize("table", ["pairs", "alone-0", "alone-1"])
def test_every_header_sorts_and_sorts_back(page, table):
    columns = page.execute_script(
        "return Array.from(byId(arguments[0]).querySelectorAll('th'), (th) => th.dataset.column)", table
    )
    assert len(set(columns)) == len(columns) >= 3
    script = """
        const [id, column] = arguments, own = id === "pairs" ? paired : alone[Number(id.slice(-1))];
        const { value } = own.columns.find((one) => one.id === column);
        const head = byId(id).querySelector(`[data-column="${column}"]`);
        head.querySelector("button").click();
        return [Array.from(own.shown, value).filter((one) => !Number.isNaN(one)), head.ariaSort];
    """
    for column in columns:
        seen = {}
        for _ in range(2):
            values, direction = page.execute_script(script, table, column)
            seen[direction] = values
        assert seen["descending"] == sorted(seen["descending"], reverse=True), column
        assert seen["ascending"] == sorted(seen["ascending"]), column


def test_a_search_finds_numbers_of_both_and_tokens(page, found):
    m = found.matching
    everything = list(zip(m.a.tolist(), m.b.tolist()))
    type_search(page, "2")
    wanted = {pair for pair in everything if any(str(feature).startswith("2") for feature in pair)}
    shown = list(map(tuple, page.execute_script(SHOWN)))
    assert wanted <= set(shown)
    assert counts(page)[0] == f"{len(shown)} of {N_FEATURES} pairs"
    alone = [j for j in found.alone(1).tolist() if str(j).startswith("2")]
    assert counts(page)[2] == f"{len(alone)} of {len(found.alone(1))} features"
    word = page.execute_script("return looks[0].words[wordsOf(0, pairColumns.features[0][5])[0]].trim()")
    type_search(page, word.upper())
    has = "return features.map((j) => wordsOf(0, j).some((one) => looks[0].words[one].includes(arguments[0])))"
    of_a = page.execute_script(f"const features = Array.from({{length: {N_FEATURES}}}, (_, j) => j); {has}", word)
    shown = page.execute_script(SHOWN)
    assert 0 < len(shown) < N_FEATURES
    assert {a for a, _ in shown} == {j for j, there in enumerate(of_a) if there}
    assert page.current_url.endswith(f"#search={word.upper()}")
    type_search(page, "no such token")
    assert page.execute_script(SHOWN) == []


def test_a_link_keeps_the_search_and_the_choice(page, address, found):
    keys(page, "s")
    shared = found.matching.shared(found.same)
    assert counts(page)[0] == f"{int(shared.sum())} of {N_FEATURES} pairs"
    keys(page, "/", "1", "\ue00c")
    shown, link = page.execute_script(SHOWN), page.current_url
    assert link == f"{address}#search=1&shared=1"
    assert page.execute_script("return document.activeElement.tagName") == "BODY"
    page.get("about:blank")
    page.get(link)
    assert page.execute_script(SHOWN) == shown


def test_a_feature_leads_to_its_page(page, looked):
    feature = page.execute_script("return pairColumns.features[0][paired.shown[0]]")
    page.execute_script("document.querySelector('#pairs td a').click()")
    until(page, "return document.querySelector('#view h2')?.textContent === arguments[0]", f"Feature {feature}")
    assert page.current_url == f"{looked.as_uri()}#feature={feature}"


def test_names_and_tokens_of_others_are_text(page):
    assert page.execute_script("return document.title") == f"{HOSTILE} and two"
    type_search(page, "onerror")
    for place in ("#title", "#figures", "#about", "#pairs"):
        assert HOSTILE in page.execute_script("return document.querySelector(arguments[0]).textContent", place)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_is_readable(page, theme):
    page.execute_script(f"setTheme('{theme}')")
    contrasts = page.execute_script(CONTRASTS)
    assert len(contrasts) > 200
    assert [one for one in contrasts if one[0] < LEAST_CONTRAST] == []


def test_on_a_phone_nothing_is_cut_off(page):
    page.set_window_size(400, 800)
    try:
        width, scrolled = page.execute_script("return [innerWidth, document.documentElement.scrollWidth]")
        assert scrolled <= width
    finally:
        page.set_window_size(1280, 800)


def test_only_rows_in_sight_are_there(page):
    script = """
        const column = { id: "n", name: "n", help: "", value: (i) => i, cell: String };
        const many = new LongTable(byId("pairs"), [column], 200000);
        many.draw();
        return many.body.children.length;"""
    assert page.execute_script(script) < 100
