"""The live page in a real browser: the key, the measurements, answers alone and side by side."""

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


TEXTS = "[...document.querySelectorAll('.answer')].map((a) => a.textContent)"
# An answer with thinking, a character of two tokens, and the end of the turn.
WRITE = """
box = add("answer");
writer = new Writer(box);
writer.tokens([["<mm:think>", false], ["hm", true], ["</mm:think>", false], ["n", false]]
  .map(([text, drafted]) => ({ text, drafted })));
writer.think("hm");
writer.tokens([["\\ufffd", false], ["\\ufffd", true], ["e", false], ["[e~[", true]]
  .map(([text, drafted]) => ({ text, drafted })));
writer.write("née");
writer.passMarkers();
"""
DRAFTED = "[...box.querySelectorAll('.drafted')].map((d) => d.textContent)"


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
        assert note.startswith("60 tokens in 30 steps, ") and "acceptance length 2.00" in note
        # One draft accepted in each step of two tokens.
        assert page.run("document.querySelectorAll('.answer span').length") == 60
        assert page.run("document.querySelectorAll('.answer .drafted').length") == 30
        text = page.run("document.querySelector('.answer').textContent")
        assert len(text) == 60 and text[:26] * 2 in text

        # The numbers of this answer stand apart from those of all answers.
        tiles = page.run("[...document.querySelectorAll('#newest dd')].map((d) => d.textContent)")
        assert tiles[1:5] == ["2.00", "34.1 %", "60", "30"]

        page.wait_until("document.querySelectorAll('#positions meter').length === 3")
        page.wait_until("document.getElementById('length').textContent === '2.00'")
        rates = page.run("[...document.querySelectorAll('#positions meter')].map((m) => m.value)")
        assert rates == [1, 0, 0]
        assert page.run("document.getElementById('rate').textContent") == "34.1 %"
        page.wait_until("series.length.some((length) => length === 2)")
        assert page.run("document.querySelectorAll('canvas').length") == 3
        page.wait_until("charts[0][0].axes[0]._values?.length")
        assert page.run(
            "charts[0][0].axes[0]._values.every((v) => /^\\d\\d:\\d\\d:\\d\\d$/.test(v))"
        )
        assert page.run("Math.abs(series.time.at(-1) - Date.now() / 1000) < 60")
        page.screenshot(tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 10_000

        # Speculation off for one request.
        page.run("document.getElementById('clear').click()")
        page.run("document.getElementById('drafts').value = '0'")
        page.run(ASK)
        page.wait_until("document.querySelector('.note')")
        assert "without drafts" in page.run("document.querySelector('.note').textContent")
        assert page.run("document.querySelectorAll('.answer .drafted').length") == 0

        # The same question without drafts and with them.
        page.run("document.getElementById('clear').click()")
        page.run("document.getElementById('compare').checked = true")
        page.run(ASK)
        page.wait_until("document.querySelector('.verdict')")
        verdict = page.run("document.querySelector('.verdict').textContent")
        assert verdict.startswith("The texts are equal. With drafts: 30 steps instead of 60, ")
        assert "times as fast" in verdict
        titles = page.run("[...document.querySelectorAll('.title')].map((t) => t.textContent)")
        assert titles == ["without drafts", "with 3 drafts a step"]
        plain, drafted = page.run(TEXTS)
        assert plain == drafted and len(plain) == 60
        assert page.run("document.querySelectorAll('.answer .drafted').length") == 30
        page.run("showVerdict({}, {}, 'a cat', 'a dog')")
        verdict = page.run("[...document.querySelectorAll('.verdict.bad')].at(-1).textContent")
        assert verdict.startswith("The texts differ from character 3 on.")

        outside = [r for r in page.requests if not r.startswith((f"{url}/", "data:"))]
        assert outside == [] and page.complaints == []


@pytest.mark.skipif(chromium.PATH is None, reason="no Chromium is installed here")
def test_a_phone_shows_clean_text(tmp_path: Path):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    write_checkpoint(checkpoint)
    with (
        serving(checkpoint) as (_, url),
        chromium.browsing(url, tmp_path / "profile", width=360, height=740) as page,
    ):
        page.wait_until("document.getElementById('state').textContent === 'ready'")
        page.run(WRITE)
        # Markers are there for whoever asks; characters are whole.
        assert page.run("box.innerText") == "hm\nnée"
        assert page.run("box.querySelector('.thinking').innerText") == "hm"
        assert page.run(DRAFTED) == ["hm", "é", "[e~["]
        page.run("document.getElementById('markers').click()")
        assert page.run("box.innerText") == "<mm:think>hm\n</mm:think>née[e~["

        # Nothing sticks out to the side, and the chat comes before the measurements.
        page.run("document.getElementById('compare').checked = true")
        page.run(ASK)
        page.wait_until("document.querySelector('.verdict')")
        assert page.run("document.documentElement.scrollWidth") == 360
        assert page.run("by('talk').offsetTop < by('watch').offsetTop")
        left, right = page.run(
            "[...document.querySelectorAll('.side')].map((s) => s.getBoundingClientRect().left)"
        )
        assert left == right
        assert page.complaints == []
