"""The report's page in a headless browser: no complaints, no requests, every picture has a size."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import browser
import pytest
import sample_results as sample
from stoker.mobile_bench.report import report

pytest.importorskip("matplotlib", reason="plots need matplotlib (stoker[bench])")

# Finds pictures without a size, text outside its picture, and a page wider than the window.
_LOOK = """(() => {
  const box = e => e.getBoundingClientRect();
  const pictures = [...document.querySelectorAll('svg, img')];
  const outside = [];
  for (const svg of document.querySelectorAll('svg')) {
    const all = box(svg);
    for (const text of svg.querySelectorAll('text')) {
      const t = box(text);
      if (t.left < all.left - 2 || t.right > all.right + 2 || t.top < all.top - 2 ||
          t.bottom > all.bottom + 2) outside.push(text.textContent);
    }
  }
  const scrolls = [...document.querySelectorAll('.scroll')].every(e => box(e).width <= innerWidth);
  return {
    pictures: pictures.length,
    sizeless: pictures.filter(e => box(e).width < 100 || box(e).height < 40).length,
    outside,
    width: document.documentElement.scrollWidth,
    scrolls,
    paper: getComputedStyle(document.body).backgroundColor,
    empty: [...document.querySelectorAll('h1, h2, h3, caption, figcaption')]
      .filter(e => !e.textContent.trim()).length,
    anchors: [...document.querySelectorAll('a')]
      .filter(a => !document.getElementById(a.getAttribute('href').slice(1))).length,
    unpainted: [...document.querySelectorAll('svg [style]')]
      .filter(e => /var\\(--/.test(e.getAttribute('style')))
      .filter(e => (e.getAttribute('style').match(/var\\((--[^)]*)\\)/g) || []).some(v =>
        !getComputedStyle(e).getPropertyValue(v.slice(4, -1)).trim())).length,
  };
})()"""

# Finds the least contrast of visible text with its background (WCAG 2), and that text.
_CONTRAST = """(() => {
  const part = c => { c /= 255; return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; };
  const light = c => 0.2126 * part(c[0]) + 0.7152 * part(c[1]) + 0.0722 * part(c[2]);
  const rgba = s => [...s.match(/[\\d.]+/g).map(Number), 1].slice(0, 4);
  const over = (top, below) => top.slice(0, 3).map((c, i) => c * top[3] + below[i] * (1 - top[3]));
  const behind = e => {
    const layers = [];
    for (let at = e; at; at = at.parentElement)
      layers.push(rgba(getComputedStyle(at).backgroundColor));
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255]);
  };
  let least = [99, ''];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, e = node.parentElement;
    if (!node.textContent.trim() || e.closest('title, desc, style')) continue;
    const inPicture = e.closest('svg');
    const style = getComputedStyle(e);
    const colour = rgba(inPicture ? style.fill : style.color);
    // Labels on bars are painted over them; the bars' colours are checked by eye.
    if (inPicture && /--(paper|on-wait)/.test(e.getAttribute('style') || '')) continue;
    const below = behind(e), a = light(over(colour, below)), b = light(below);
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < least[0]) least = [ratio, node.textContent.trim().slice(0, 40)];
  }
  return least;
})()"""


@pytest.fixture(scope="module")
def tab() -> Iterator[browser.Browser]:
    path = browser.find()
    if path is None:
        pytest.skip(f"needs a browser: one of {', '.join(browser.NAMES)}")
    with browser.Browser(path) as opened:
        yield opened


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from stoker.mobile_bench.report.page import page as as_page

    folder = tmp_path_factory.mktemp("report")
    file = folder / "report.html"
    file.write_text(as_page(sample.everything(folder)), encoding="utf-8")
    return file


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 820, 400])
def test_page_opens(tab: browser.Browser, page: Path, width: int, dark: bool) -> None:
    tab.open(page, width=width, dark=dark)
    found = tab.evaluate(_LOOK)
    assert tab.complaints == []
    assert [url for url in tab.requests if not url.startswith("data:")] == [page.resolve().as_uri()]
    assert found["pictures"] > 10
    assert found["sizeless"] == found["empty"] == found["anchors"] == found["unpainted"] == 0
    assert found["outside"] == []
    assert found["width"] <= width and found["scrolls"]
    assert (found["paper"] == "rgb(255, 255, 255)") == (not dark)
    least, text = tab.evaluate(_CONTRAST)
    assert least >= 4.5, text
    assert tab.picture().startswith(b"\x89PNG")


def test_hostile_names_run_nothing(tab: browser.Browser, tmp_path: Path) -> None:
    from stoker.mobile_bench.report.page import page as as_page

    evil = '"\'><img src=x onerror="window.ran=1"></svg><script>window.ran=1</script>'
    lines = sample.results(dense=False)
    for line in lines:
        if line["kind"] == "profile":
            line["name"] = evil
        elif line["kind"] == "run":
            line["model"] = line["model"] | {"name": evil}
            line["command"] = evil
    lines[2]["engine"] = evil
    made = report.build([sample.put(tmp_path / "a.jsonl", lines)], title=evil)
    file = tmp_path / "report.html"
    file.write_text(as_page(made), encoding="utf-8")
    tab.open(file)
    assert tab.evaluate("window.ran") is None
    assert tab.evaluate("document.querySelectorAll('img, script').length") == 0
    assert tab.complaints == []


def test_the_browser_would_complain(tab: browser.Browser, tmp_path: Path) -> None:
    file = tmp_path / "bad.html"
    file.write_text("<img src='missing.png'><script>nothing.here()</script>", encoding="utf-8")
    tab.open(file)
    assert len(tab.complaints) >= 2
    assert len(tab.requests) == 2
