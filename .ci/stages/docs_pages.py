"""Shows every page of a built site in Chromium, at the width of a desktop and of a phone.

    docs_pages.py FOLDER SHOTS

FOLDER holds the HTML of Sphinx. SHOTS gets a picture of each page and width. Every finding is one line, and the last
line counts what was checked. The exit status is 1 if there is a finding. The checks:

- no page scrolls sideways, also when its folds and tabs are open; a wide table or code block scrolls in its own frame;
- every link to a page of the site, and to a place in it, has a target;
- every page has a card: the picture that other sites show with a link to the page;
- every picture has a text for those who do not see it, and its own text is at least 8 pixels high on a phone;
- no script fails, and no file is missing;
- the search finds the words that users look for.
"""

import functools
import http.server
import shutil
import sys
import threading
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

from playwright.sync_api import sync_playwright

WIDTHS = {"desktop": 1280, "phone": 390}
WORDS = ("growable", "append", "pandas", "pyarrow", "torch", "numba", "asyncio", "tenant", "fuel", "epoch", "memray",
         "ulimit")
WITHOUT_CARD = ("genindex.html", "py-modindex.html", "search.html")     # Sphinx makes these pages, without a source
OPEN = "details > *, .sd-tab-content { display: block !important }"
LOOK = """() => {
    document.querySelectorAll("details").forEach(fold => fold.open = true);
    const root = document.documentElement;
    const wide = [...document.querySelectorAll("article *")].filter(part => {
        if (part.getBoundingClientRect().right <= root.clientWidth + 1) return false;
        for (let up = part.parentElement; up.tagName != "ARTICLE"; up = up.parentElement)
            if (getComputedStyle(up).overflowX != "visible") return false;
        return true;
    });
    const pictures = [...document.querySelectorAll("figure svg")];
    const sizes = pictures.map(svg => Math.min(...[...svg.querySelectorAll("text")].map(text => {
        const scale = text.getScreenCTM();
        return parseFloat(getComputedStyle(text).fontSize) * Math.hypot(scale.a, scale.b);
    })));
    return {
        sideways: root.scrollWidth - root.clientWidth,
        wide: wide.slice(0, 3).map(part => part.tagName + " " + part.textContent.trim().slice(0, 50)),
        silent: [...document.querySelectorAll("img:not([alt]), img[alt=''], svg[role=img]:not([aria-label])")]
            .map(picture => picture.outerHTML.slice(0, 80)),
        without: pictures.filter(svg => !svg.getAttribute("aria-label")).length,
        small: sizes.filter(size => size < 8).map(size => size.toFixed(1)),
        pictures: pictures.length,
        card: document.querySelector("meta[property='og:image']")?.content,
        links: [...document.querySelectorAll("a[href]")].map(link => link.href),
        places: [...document.querySelectorAll("[id], a[name]")].map(place => place.id || place.name),
    };
}"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def main(folder: Path, shots: Path) -> int:
    shutil.rmtree(shots, ignore_errors=True)
    shots.mkdir(parents=True)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    site = f"http://127.0.0.1:{server.server_port}/"
    pages = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.html")
                   if "_static" not in path.parts and "_modules" not in path.parts)
    found: list[str] = []
    links: set[tuple[str, str]] = set()
    places: dict[str, set[str]] = {}
    pictures = 0
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        tab = browser.new_page(reduced_motion="reduce")
        tab.on("pageerror", lambda error: found.append(f"{tab.url}: a script failed: {error}"))
        tab.on("response", lambda answer: answer.status < 400 or found.append(f"{answer.url}: {answer.status}"))
        tab.route(lambda url: not url.startswith(site), lambda route: route.abort())
        for name in pages:
            tab.goto(site + name)
            tab.add_style_tag(content=OPEN)
            for kind, width in WIDTHS.items():
                tab.set_viewport_size({"width": width, "height": 900})
                seen = tab.evaluate(LOOK)
                where = f"{name} ({kind})"
                if seen["sideways"] > 0:
                    found.append(f"{where}: scrolls {seen['sideways']} pixels sideways: {seen['wide']}")
                elif seen["wide"]:
                    found.append(f"{where}: is cut off at the right: {seen['wide']}")
                found += [f"{where}: a picture without a text: {picture}" for picture in seen["silent"]]
                if seen["without"]:
                    found.append(f"{where}: {seen['without']} pictures without a text")
                if seen["small"]:
                    found.append(f"{where}: text in pictures is only {seen['small']} pixels high")
                shot = f"{name.removesuffix('.html').replace('/', '-')}-{kind}.png"
                tab.screenshot(path=shots / shot, full_page=True)
            places[name] = set(seen["places"])
            links |= {(name, urljoin(site + name, link)) for link in seen["links"]}
            pictures += seen["pictures"]
            if name not in WITHOUT_CARD and not (folder / urlsplit(seen["card"] or "").path.lstrip("/")).is_file():
                found.append(f"{name}: has no card: {seen['card']}")
        inside = 0
        for name, link in sorted(links):
            target, place = urldefrag(link)
            if not target.startswith(site):
                continue
            inside += 1
            path = target.removeprefix(site).partition("?")[0] or "index.html"
            if not (folder / unquote(path)).is_file():
                found.append(f"{name}: links to {path}, which is missing")
            elif place and path in places and unquote(place) not in places[path]:
                found.append(f"{name}: links to {path}#{place}, but {path} has no element with this id")
        for word in WORDS:
            tab.goto(f"{site}search.html?q={word}")
            tab.wait_for_function("document.querySelector('#search-results .search-summary, #search-results p')"
                                  "?.textContent.match(/found|did not match/i)", timeout=20_000)
            if not tab.locator("#search-results li").count():
                found.append(f"the search finds no page for {word!r}")
        browser.close()
    for line in found:
        print(line)
    print(f"{len(pages)} pages at {' and '.join(map(str, WIDTHS.values()))} pixels, {inside} links,"
          f" {pictures} pictures, {len(WORDS)} words searched, {len(found)} findings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()))
