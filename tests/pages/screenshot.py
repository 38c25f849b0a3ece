"""A screenshot of a page, as docs/look.png was made.

python tests/pages/screenshot.py runs/demo/sweep/batchtopk/look.html docs/look.png --feature 7
"""

from __future__ import annotations

import argparse
from io import BytesIO
from pathlib import Path

from browser import opened, until
from PIL import Image

WIDTH, HEIGHT, COLORS = 1300, 760, 128


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("page", type=Path)
    p.add_argument("out", type=Path)
    p.add_argument("--feature", type=int, default=0)
    args = p.parse_args()
    with opened(WIDTH, HEIGHT) as browser:
        browser.get(f"{args.page.resolve().as_uri()}#feature={args.feature}")
        until(browser, "return document.querySelector('#view .contexts') !== null")
        # what cannot be seen elsewhere: contexts and lens
        browser.execute_script("document.querySelector('#view .beside').scrollIntoView()")
        image = Image.open(BytesIO(browser.get_screenshot_as_png()))
    image.convert("RGB").quantize(COLORS).save(args.out, optimize=True)


if __name__ == "__main__":
    main()
