"""A headless Chromium on a page from disk, and what a person would see in it."""

from __future__ import annotations

import shutil
from contextlib import contextmanager

import pytest

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
# WCAG 2, level AA, for text of any size
LEAST_CONTRAST = 4.5
# of each element with text of its own: WCAG's contrast of that text with what lies behind it
CONTRASTS = """
const paint = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
function rgba(color) {
  paint.clearRect(0, 0, 1, 1); paint.fillStyle = color; paint.fillRect(0, 0, 1, 1);
  return Array.from(paint.getImageData(0, 0, 1, 1).data).map((part) => part / 255);
}
function over([r, g, b, a], below) { return [r, g, b].map((part, i) => part * a + below[i] * (1 - a)); }
function light(parts) {
  const [r, g, b] = parts.map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
const found = [];
for (const element of document.body.querySelectorAll("*")) {
  const own = Array.from(element.childNodes).filter((node) => node.nodeType === 3);
  const text = own.map((node) => node.data).join("").trim();
  if (!text || !element.getClientRects().length || element.closest("dialog:not([open]), script, title")) continue;
  const chain = [];
  for (let at = element; at; at = at.parentElement) chain.unshift(at);
  const behind = chain.reduce((below, at) => over(rgba(getComputedStyle(at).backgroundColor), below), [1, 1, 1]);
  const style = getComputedStyle(element), ink = element.namespaceURI.endsWith("svg") ? style.fill : style.color;
  const [one, other] = [light(over(rgba(ink), behind)), light(behind)].sort((a, b) => b - a);
  found.push([(one + 0.05) / (other + 0.05), element.tagName + "." + element.getAttribute("class"), text.slice(0, 40)]);
}
return found;
"""


@contextmanager
def opened(width=1280, height=800):
    """A driver of Selenium's; skips where there is no Chromium, or it does not start."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium drives the browser; it is not installed")
    chromium = next(filter(None, map(shutil.which, CHROMIUM)), None)
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no chromium with chromedriver on this machine (Debian's packages chromium and chromium-driver)")
    from selenium.common.exceptions import WebDriverException

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    # a root user, as in a container, has no sandbox
    for argument in (
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "disable-dev-shm-usage",
        f"window-size={width},{height}",
    ):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    try:
        browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    except WebDriverException as error:
        pytest.skip(f"{chromium} does not start here: {(error.msg or '').partition(chr(10))[0]}")
    try:
        yield browser
    finally:
        browser.quit()


@contextmanager
def fresh(browser, address, ready="return true"):
    """The page in the light theme, once the script `ready` says so; nothing may be logged or run of what it shows."""
    browser.get("about:blank")
    browser.get(address)
    until(browser, ready)
    browser.execute_script("setTheme('light')")
    yield browser
    assert logged(browser) == []
    assert browser.title != "hacked"
    assert browser.execute_script("return document.querySelectorAll('img').length") == 0


def until(browser, script, *arguments):
    """Waits for a script to return something true, and returns it."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 600).until(lambda b: b.execute_script(script, *arguments))


def logged(browser):
    """What the page has logged since it was last asked, errors and breaches of its policy among them."""
    return [entry["message"] for entry in browser.get_log("browser")]


def keys(browser, *pressed):
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(browser).send_keys(*pressed).perform()


def type_search(browser, text):
    """Into the empty field of a page's search."""
    from selenium.webdriver.common.by import By

    field = browser.find_element(By.ID, "search")
    field.clear()
    field.send_keys(text)
