"""The live page in a real browser: the key, the measurements, and a tinted answer."""

import os
from pathlib import Path

import chromium
import pytest
from served import serving, write_checkpoint

ASK = """
document.getElementById("question").value = "What do you see?";
document.getElementById("max-tokens").value = 60;
document.getElementById("chat").requestSubmit();
"""


@pytest.mark.skipif(chromium.PATH is None, reason="no Chromium is installed here")
def test_the_page_shows_speculation(tmp_path: Path):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    write_checkpoint(checkpoint)
    env = os.environ | {"EAGLERUN_API_KEY": "sesame"}
    with (
        serving(checkpoint, env=env, engine="--pause-ms 10") as (_, url),
        chromium.browsing(url, tmp_path / "profile") as page,
    ):
        # Without the key it asks for one, and for nothing else.
        page.wait_until("!document.getElementById('key-form').hidden")
        page.run("document.getElementById('key').value = 'sesame'")
        page.run("document.getElementById('key-form').requestSubmit()")
        page.wait_until("document.getElementById('state').textContent === 'ready'")
        assert page.run("document.getElementById('key-form').hidden")
        assert "401" in page.complaints[0]
        page.complaints.clear()

        page.run(ASK)
        page.wait_until("document.querySelector('.note')")
        note = page.run("document.querySelector('.note').textContent")
        assert note.startswith("60 tokens in ") and "acceptance length 2.00" in note
        # One draft accepted in each step of two tokens.
        assert page.run("document.querySelectorAll('.answer span').length") == 60
        assert page.run("document.querySelectorAll('.answer .drafted').length") == 30
        text = page.run("document.querySelector('.answer').textContent")
        assert len(text) == 60 and text[:26] * 2 in text

        page.wait_until("document.querySelectorAll('#positions meter').length === 3")
        page.wait_until("document.getElementById('length').textContent === '2.00'")
        rates = page.run("[...document.querySelectorAll('#positions meter')].map((m) => m.value)")
        assert rates == [1, 0, 0]
        assert page.run("document.getElementById('rate').textContent") == "34.1 %"
        page.wait_until("series.length.some((length) => length === 2)")
        assert page.run("document.querySelectorAll('canvas').length") == 3
        page.screenshot(tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 10_000

        # Speculation off for one request.
        page.run("document.getElementById('clear').click()")
        page.run("document.getElementById('drafts').value = '0'")
        page.run(ASK)
        page.wait_until("document.querySelector('.note')")
        assert "without drafts" in page.run("document.querySelector('.note').textContent")
        assert page.run("document.querySelectorAll('.answer .drafted').length") == 0

        outside = [r for r in page.requests if not r.startswith((f"{url}/", "data:"))]
        assert outside == [] and page.complaints == []
