"""Take server-page.png and server-page-phone.png, of a server that runs and has nothing to do.

PYTHONPATH=tests python recipes/page_screenshots.py http://127.0.0.1:8000

Needs Chromium. The page is asked two questions, the second with *compare*.
"""

import argparse
import json
import tempfile
from pathlib import Path

import chromium

HERE = Path(__file__).parent
QUESTIONS = (
    ("Hello! Who are you?", False),
    (
        "Tom has 23 apples and buys 14 more. He gives 9 to Mia. How many apples does he have left?",
        True,
    ),
)
# Width and height of the window, and whether the picture is of the whole page.
SHOTS = {"server-page.png": (1280, 960, False), "server-page-phone.png": (390, 844, True)}


def ask(page: chromium.Page, question: str, compare: bool) -> None:
    page.run(f"document.getElementById('question').value = {json.dumps(question)}")
    page.run(f"document.getElementById('compare').checked = {json.dumps(compare)}")
    page.run("document.getElementById('chat').requestSubmit()")
    page.wait_until("!running")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--into", type=Path, default=HERE, help="folder of the pictures")
    flags = parser.parse_args()
    for name, (width, height, whole) in SHOTS.items():
        with (
            tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
            chromium.browsing(flags.url, Path(profile), width, height) as page,
        ):
            page.wait_until("document.getElementById('state').textContent === 'ready'")
            for question, compare in QUESTIONS:
                ask(page, question, compare)
            # The charts know of the answers once a sample was taken after their end.
            page.run("asked = last")
            page.wait_until("last > asked + 1")
            page.run("document.activeElement.blur()")
            page.screenshot(flags.into / name, whole)
            print(flags.into / name, page.run("document.querySelector('.verdict').textContent"))


if __name__ == "__main__":
    main()
