"""The pages as a person uses them, in a headless Chromium; skipped where there is none."""

import pytest
from browser import CONTRASTS, LEAST_CONTRAST, fresh, keys, type_search, until
from page_makers import HOSTILE, N_FEATURES, command

from sampled_sae.support.atomic_files import write_json

HEADING = "return document.querySelector('#view h2')?.textContent"
ROWS = "return Array.from(document.querySelectorAll('tr[data-row]'), (row) => Number(row.dataset.row))"
COUNT = "return document.getElementById('count').textContent"


@pytest.fixture(scope="module")
def address(root):
    command("look", root / "run", root / "acts", "--features top:40 --contexts 8")
    return (root / "run" / "look.html").as_uri()


@pytest.fixture
def page(browser, address):
    with fresh(browser, address, HEADING) as page:
        yield page


def heading(browser, expected):
    return until(browser, f"{HEADING} === arguments[0]", expected)


def searched(browser, text):
    type_search(browser, text)
    return browser.execute_script("return Array.from(table.shown)")


def test_the_overview_shows_what_was_measured(page):
    assert page.execute_script(HEADING) == "Overview"
    assert page.execute_script(COUNT) == f"{N_FEATURES} of {N_FEATURES} features"
    captions = page.execute_script("return Array.from(document.querySelectorAll('figcaption'), (f) => f.textContent)")
    assert captions == [
        "How often features are active",
        "loss",
        "FVU of the batch",
        "L0 of the batch",
        "share of dead features",
    ]
    heights = page.execute_script(
        "return Array.from(document.querySelectorAll('.bar'), (bar) => Number(bar.getAttribute('height')))"
    )
    assert max(heights) > 50
    assert min(heights) >= 0
    fits = "return ['table', 'view'].map(byId).every((place) => place.scrollWidth <= place.clientWidth)"
    assert page.execute_script(fits)


def test_densities_on_a_single_token_are_drawn(page):
    heights = page.execute_script("""
        data.measured.tokens = 1; columns.counts.fill(0); columns.counts.fill(1, 3, 8);
        return Array.from(densityChart().querySelectorAll('.bar'), (bar) => Number(bar.getAttribute('height')))""")
    assert len(heights) == 40
    assert heights[-1] > 50
    assert not any(heights[:-1])


def test_a_click_opens_a_feature_and_its_links_lead_on(page):
    first = page.execute_script(ROWS)[0]
    page.execute_script("document.querySelector('tr[data-row]').click()")
    heading(page, f"Feature {first}")
    assert page.current_url.endswith(f"#feature={first}")
    assert page.execute_script("return document.querySelectorAll('.contexts li .on').length") > 0
    assert page.execute_script("return document.querySelectorAll('.contexts').length") == 5
    link = "document.querySelector('#view .short a')"
    other = page.execute_script(f"return {link}.textContent")
    page.execute_script(f"{link}.click()")
    heading(page, f"Feature {other}")
    page.back()
    heading(page, f"Feature {first}")


def test_a_permanent_link_opens_its_feature_and_brings_its_row_into_sight(page, address):
    for feature in page.execute_script("return [7, ...table.shown.slice(30, 37)]"):
        page.get(f"{address}#feature={feature}")
        heading(page, f"Feature {feature}")
        assert page.execute_script("return document.querySelector('tr.selected').dataset.row") == str(feature)
    page.get(f"{address}#feature=640")
    until(page, "return document.querySelector('#view [role=alert]')?.textContent.includes('There is no feature 640')")


def test_a_search_finds_tokens_and_numbers(page):
    found = searched(page, "W12")
    by_hand = """return Array.from({length: nFeatures}, (_, j) => j).filter((j) => topWords(j, 99).concat(
        place.has(j) ? Array.from(lensKeys.slice(place.get(j) * lensWidth, (place.get(j) + 1) * lensWidth),
            (word) => token(wordText(word))) : []
        ).some((span) => span.textContent.includes("w12")))"""
    assert sorted(found) == page.execute_script(by_hand)
    assert 0 < len(found) < N_FEATURES
    assert {2, *range(20, 30)} <= set(searched(page, "2"))
    searched(page, "23")
    keys(page, "\ue007")
    heading(page, "Feature 23")
    assert searched(page, "no such token") == []
    assert page.execute_script(COUNT) == f"0 of {N_FEATURES} features"


def test_a_header_sorts_and_sorts_back(page):
    script = (
        "document.querySelector('th.density button').click(); return Array.from(table.shown, (j) => columns.counts[j])"
    )
    down, up = page.execute_script(script), page.execute_script(script)
    assert down == sorted(down, reverse=True)
    assert up == sorted(up)
    assert page.execute_script("return document.querySelector('th.density').getAttribute('aria-sort')") == "ascending"


def test_keys_do_what_the_mouse_does(page):
    first, second = page.execute_script(ROWS)[:2]
    keys(page, "j")
    heading(page, f"Feature {first}")
    keys(page, "j")
    heading(page, f"Feature {second}")
    keys(page, "k")
    heading(page, f"Feature {first}")
    keys(page, "\ue00c")
    heading(page, "Overview")
    keys(page, "/")
    assert page.execute_script("return document.activeElement.id") == "search"
    keys(page, "jt")
    assert page.execute_script("return document.getElementById('search').value") == "jt"
    page.execute_script("document.getElementById('search').blur()")
    keys(page, "t")
    assert page.execute_script("return document.documentElement.dataset.theme") == "dark"


def test_a_hostile_token_is_text(page):
    (feature,) = page.execute_script(
        "return Array.from(place.keys()).filter((j) => topWords(j, 1)[0].textContent.includes('onerror')).slice(0, 1)"
    )
    page.execute_script(f"go({feature})")
    heading(page, f"Feature {feature}")
    tokens = page.execute_script("return Array.from(document.querySelectorAll('.token'), (one) => one.textContent)")
    assert HOSTILE in tokens
    assert page.execute_script("return document.querySelectorAll('img, #view script').length") == 0
    assert page.title != "hacked"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_is_readable(page, theme):
    page.execute_script(f"setTheme('{theme}')")
    for place in ("", "feature=" + str(page.execute_script(ROWS)[0])):
        page.execute_script("location.hash = arguments[0]", place)
        heading(page, place.replace("feature=", "Feature ") or "Overview")
        found = page.execute_script(CONTRASTS)
        assert len(found) > 30
        assert [one for one in found if one[0] < LEAST_CONTRAST] == []


def test_on_a_phone_nothing_is_cut_off(page):
    page.set_window_size(400, 800)
    try:
        for place in ("", "feature=" + str(page.execute_script(ROWS)[0])):
            page.execute_script("location.hash = arguments[0]", place)
            heading(page, place.replace("feature=", "Feature ") or "Overview")
            width, scrolled = page.execute_script("return [innerWidth, document.documentElement.scrollWidth]")
            assert scrolled <= width
            shown = page.execute_script("return document.querySelector('.list').getClientRects().length > 0")
            assert shown == (place == "")
    finally:
        page.set_window_size(1280, 800)


@pytest.fixture(scope="module")
def runs_address(tmp_path_factory):
    rows = [
        {"name": f"l{l}_{score}_seed{seed}", "l": l, "score": score, "seed": seed, "fvu": 1 / l + 0.1 * seed, "l0": l}
        for l in (1, 4, 16)
        for score in ("l2", HOSTILE)
        for seed in (0, 1)
    ]
    baseline = {"name": "topk_seed0", "l": None, "score": None, "seed": 0, "fvu": 0.2, "l0": 4}
    folder = tmp_path_factory.mktemp("sweep")
    write_json(folder / "sweep.json", {"rows": [*rows, baseline], "train": {"lr": 0.1, "adam": HOSTILE}})
    command("look", folder)
    return (folder / "look.html").as_uri()


@pytest.fixture
def runs(browser, runs_address):
    with fresh(browser, runs_address) as page:
        yield page


def test_lines_are_means_over_seeds_and_can_be_switched_off(runs):
    lines = "return mainLines('l', 'fvu').map((line) => [line.name, line.points ?? null, line.level ?? null])"
    points = [[1, pytest.approx(1.05)], [4, pytest.approx(0.3)], [16, pytest.approx(0.1125)]]
    assert runs.execute_script(lines) == [["l2", points, None], [HOSTILE, points, None], ["topk", None, 0.2]]
    assert runs.execute_script("return document.querySelectorAll('#main-chart .band').length") == 3
    runs.execute_script("document.querySelectorAll('#series input')[1].click()")
    runs.execute_script("document.querySelector('[data-run=l16_l2_seed1] input').click()")
    left = [*points[:2], [16, pytest.approx(0.0625)]]
    assert runs.execute_script(lines) == [["l2", left, None], ["topk", None, 0.2]]
    assert runs.execute_script("return document.querySelector('#series input').indeterminate")
    keys(runs, "a")
    assert len(runs.execute_script(lines)) == 3


def test_any_metric_against_any_and_a_link_to_it(runs, runs_address):
    runs.get("about:blank")
    runs.get(f"{runs_address}#y=l0&x=fvu")
    assert runs.execute_script("return [byId('y').value, byId('x').value]") == ["l0", "fvu"]
    assert runs.execute_script("return document.querySelectorAll('#main-chart circle').length") == 13
    keys(runs, "j")  # behind the last metric comes the first
    order = runs.execute_script("return data.metrics.map(([name]) => name)")
    assert runs.execute_script("return byId('y').value") == order[(order.index("l0") + 1) % len(order)]
    assert f"y={runs.execute_script('return byId(arguments[0]).value', 'y')}&x=fvu" in runs.current_url


def test_runs_sort_by_any_column(runs):
    script = (
        "document.querySelector('[data-column=fvu] button').click(); return table.runs.map((run) => run.values.fvu)"
    )
    up, down = runs.execute_script(script), runs.execute_script(script)
    assert up == sorted(up)
    assert down == sorted(down, reverse=True)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_of_the_runs_is_readable(runs, theme):
    runs.execute_script(f"setTheme('{theme}')")
    found = runs.execute_script(CONTRASTS)
    assert len(found) > 60
    assert [one for one in found if one[0] < LEAST_CONTRAST] == []


def test_no_two_lines_of_a_chart_share_a_colour(runs):
    for n in (2, 9, 24):
        drawn = runs.execute_script("return Array.from({length: arguments[0]}, (_, i) => color(i, arguments[0]))", n)
        assert len(set(drawn)) == n
