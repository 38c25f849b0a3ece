r"""A screenshot of a page, as those in docs were made.

python tests/pages/screenshot.py runs/demo/sweep/batchtopk/look.html docs/look.png --feature 7
python tests/pages/screenshot.py runs/demo/sweep/look.html docs/look_sweep.png --height 1300
python tests/pages/screenshot.py runs/comparison/comparison.html docs/comparison.png --to "#charts" \
    --click "#pairs [data-column=active-A] button" --height 1300
"""

from __future__ import annotations

import argparse
from io import BytesIO
from pathlib import Path

from browser import opened, until
from PIL import Image

WIDTH, COLORS = 1300, 128


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("page", type=Path)
    p.add_argument("out", type=Path)
    p.add_argument("--feature", type=int, default=None, help="of the page of an SAE")
    p.add_argument("--to", default=None, help="selector of what stands at the top; a feature's lens and contexts")
    p.add_argument("--click", default=None, help="selector of what is clicked first")
    p.add_argument("--height", type=int, default=760)
    args = p.parse_args()
    address, to = args.page.resolve().as_uri(), args.to
    with opened(WIDTH, args.height) as browser:
        if args.feature is None:
            browser.get(address)
        else:
            browser.get(f"{address}#feature={args.feature}")
            until(browser, "return document.querySelector('#view .contexts') !== null")
            to = to or "#view .beside"
        if args.click:
            browser.execute_script("document.querySelector(arguments[0]).click()", args.click)
        browser.execute_script("document.querySelector(arguments[0] ?? 'body').scrollIntoView()", to)
        image = Image.open(BytesIO(browser.get_screenshot_as_png()))
    image.convert("RGB").quantize(COLORS).save(args.out, optimize=True)


if __name__ == "__main__":
    main()
