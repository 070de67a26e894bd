"""Open every page of the built site in headless Chromium, and say what is wrong: `python docs/check_pages.py [HTML]`.

It serves the folder as GitHub Pages will, as /jfbfast/latest/ beside a versions.json, and looks at each page at the
width of a desktop in light, and of a phone in dark. It reports errors in the console, requests to other hosts, pictures
that do not load, formulas that were not rendered, pages that are wider than the screen, links to pages or anchors that
do not exist, a search that does not find `Anderson`, and a list of versions that does not work. It takes Playwright's
Chromium, or the one at the path in CHROMIUM, or `chromium` on the PATH.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from playwright.sync_api import Browser, Error, Page, Playwright, sync_playwright

# Of a page: LaTeX in its text outside of code, broken pictures, its excess width, its links within the site, its ids.
INSPECT = r"""() => {
  const prose = document.querySelector("article").cloneNode(true);
  prose.querySelectorAll("pre, code, script, style, annotation").forEach((node) => node.remove());
  const links = [...document.querySelectorAll("a[href]")].map((link) => link.href);
  return {
    formulas: prose.textContent.match(/\$[^$\n]+\$|\\(frac|top|lVert|begin|lambda)\b/g) ?? [],
    pictures: [...document.images].filter((image) => !image.naturalWidth).map((image) => image.src),
    excess: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    links: [...new Set(links.filter((link) => new URL(link).origin === location.origin))],
    anchors: [...document.querySelectorAll("[id]")].map((node) => node.id),
  };
}"""


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


def start_chromium(playwright: Playwright) -> Browser | None:
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    for path in (None, os.environ.get("CHROMIUM") or shutil.which("chromium")):
        try:
            return playwright.chromium.launch(executable_path=path, args=arguments)
        except Error:
            continue
    return None


class Check:
    """The pages of a site that is served at ``address``, and the faults found so far."""

    def __init__(self, browser: Browser, folder: Path, address: str) -> None:
        self.browser, self.folder, self.address = browser, folder, address
        self.faults: list[str] = []
        self.links: dict[str, set[str]] = {}  # of each page
        self.anchors: dict[str, set[str]] = {}

    def open(self, width: int, scheme: str) -> Page:
        context = self.browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
        page = context.new_page()
        page.on(
            "console", lambda message: message.type == "error" and self.faults.append(f"{page.url}: {message.text}")
        )
        page.on("pageerror", lambda error: self.faults.append(f"{page.url}: {error}"))
        page.on("request", lambda request: self.local(page, request.url))
        return page

    def local(self, page: Page, url: str) -> None:
        if not url.startswith(("http://127.0.0.1", "data:")):
            self.faults.append(f"{page.url}: loads {url}")

    def pages(self, width: int, scheme: str) -> None:
        page = self.open(width, scheme)
        for path in sorted(self.folder.rglob("*.html")):
            if "_static" in path.parts or "_downloads" in path.parts:
                continue
            url = f"{self.address}/latest/{path.relative_to(self.folder).as_posix()}"
            page.goto(url)
            found = page.evaluate(INSPECT)
            where = f"{url} ({width} pixels, {scheme})"
            self.faults += [f"{where}: not rendered: {text}" for text in found["formulas"]]
            self.faults += [f"{where}: broken picture {source}" for source in found["pictures"]]
            if found["excess"] > 0:
                self.faults.append(f"{where}: {found['excess']} pixels wider than the screen")
            self.links[url], self.anchors[url] = set(found["links"]), set(found["anchors"])
        page.context.close()

    def targets(self) -> None:
        """Links within the site, with their anchors."""
        for url, links in self.links.items():
            for link in sorted(links):
                target, _, anchor = link.partition("#")
                name = target.removeprefix(f"{self.address}/latest/")
                if not (self.folder / (name or "index.html")).exists():
                    self.faults.append(f"{url}: links to {target}, which does not exist")
                elif anchor and target in self.anchors and anchor not in self.anchors[target]:
                    self.faults.append(f"{url}: links to {link}, an anchor that does not exist")

    def search(self) -> None:
        page = self.open(1280, "light")
        page.goto(f"{self.address}/latest/search.html?q=Anderson")
        first = page.locator("#search-results li a").first
        first.wait_for(timeout=20_000)
        results = page.locator("#search-results li a").all_inner_texts()
        if not any(result.endswith("Anderson") for result in results):
            self.faults.append(f"the search for Anderson finds {results[:5]}")
        page.context.close()

    def versions(self) -> None:
        page = self.open(1280, "light")
        page.goto(f"{self.address}/latest/method.html")
        page.locator(".versions select").select_option("v0.0.1")
        page.wait_for_url(f"{self.address}/v0.0.1/method.html")
        page.locator(".versions select").select_option("v0.0.2")  # it does not have this page
        page.wait_for_url(f"{self.address}/v0.0.2/")
        page.context.close()


def check(browser: Browser, folder: Path) -> list[str]:
    with tempfile.TemporaryDirectory() as root:
        site = Path(root, "jfbfast")
        for name in ("latest", "v0.0.1"):
            shutil.copytree(folder, site / name)
        (site / "v0.0.2").mkdir()
        shutil.copy(folder / "index.html", site / "v0.0.2")
        (site / "versions.json").write_text(json.dumps(["latest", "v0.0.2", "v0.0.1"]))
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=root))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        run = Check(browser, site / "latest", f"http://127.0.0.1:{server.server_port}/jfbfast")
        for width, scheme in ((1280, "light"), (390, "dark")):
            run.pages(width, scheme)
        run.targets()
        run.search()
        faults = list(run.faults)
        run.versions()  # a page that does not exist is an error in the console: no fault
        server.shutdown()
    return faults


def main() -> int:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/_build/html")
    with sync_playwright() as playwright:
        browser = start_chromium(playwright)
        if browser is None:
            print("check_pages: skipped, since no Chromium was found; `playwright install chromium` gets one")
            return 0
        faults = check(browser, folder)
        browser.close()
    print("\n".join(dict.fromkeys(faults)) or "check_pages: every page is sound")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
