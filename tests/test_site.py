"""The site that ``make docs`` has built, in headless Chromium: every page, as wide as a desktop and as a phone.

Skipped where there is no site or no Chromium.
"""

import json
import queue
import shutil
import subprocess
import threading
from functools import cache
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

SITE = Path(__file__).parents[1] / "docs" / "_build" / "html"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PAGES = sorted(str(p.relative_to(SITE)) for p in SITE.rglob("*.html")) if (SITE / "index.html").exists() else []
WIDTHS = (1280, 390)
pytestmark = [pytest.mark.skipif(not PAGES, reason="no site: make docs"), pytest.mark.slow]

#: Before anything of a page: what it complains about is kept.
LISTENER = """<script>
  window.complaints = [];
  addEventListener("error", e => complaints.push(e.message || "not loaded: " + (e.target.src || e.target.href)), true);
  addEventListener("unhandledrejection", e => complaints.push(String(e.reason)));
  console.error = (...said) => complaints.push(said.join(" "));
</script>"""

#: The page that opens all others, a few at a time, each at one width after the other, and sends what it has seen.
OPENER = """<!doctype html><script>
  const todo = %s, widths = %s, seen = [];
  const fit = (frame, width) => new Promise(done => {
    frame.style.width = width + "px";
    setTimeout(() => {
      const inside = frame.contentDocument, root = inside.documentElement;
      const wide = Math.max(root.scrollWidth, inside.body.scrollWidth);
      const beyond = wide <= width ? [] : [...inside.body.querySelectorAll("*")]
        .filter(e => e.getBoundingClientRect().right > width + 1).slice(0, 3).map(e => e.tagName + "." + e.className);
      done({width, wide, beyond});
    }, 50);
  });
  const look = page => new Promise(done => {
    const frame = document.createElement("iframe");
    Object.assign(frame.style, {height: "900px", border: 0, visibility: "hidden"});  // not painted
    frame.onload = async () => {
      const inside = frame.contentDocument;
      for (const image of inside.images) image.loading = "eager";
      const fits = [];
      for (const width of widths) fits.push(await fit(frame, width));
      const broken = await Promise.all([...inside.images].map(image => image.decode().catch(() => image.src)));
      const complaints = frame.contentWindow.complaints;
      for (const one of fits) seen.push({page, ...one, broken: broken.filter(Boolean), complaints});
      frame.remove();
      done();
    };
    frame.src = "/" + page;
    document.body.append(frame);
  });
  const worker = async () => { while (todo.length) await look(todo.pop()); };
  const send = () => fetch("/", {method: "POST", body: JSON.stringify(seen)});
  onload = () => Promise.all([1, 2, 3, 4].map(worker)).then(send);
</script><body></body>"""


class Site(SimpleHTTPRequestHandler):
    """The files of the site, with a listener in each page, the page that opens them, and what it sends."""

    def __init__(self, *args, results, **options):
        self.results = results
        super().__init__(*args, directory=str(SITE), **options)

    def do_GET(self):
        name = unquote(urlsplit(self.path).path).lstrip("/")
        if name == "opener":
            self.answer(OPENER % (json.dumps(PAGES), json.dumps(WIDTHS)))
        elif name in PAGES:
            self.answer((SITE / name).read_text().replace("<head>", "<head>" + LISTENER, 1))
        elif name == "favicon.ico":
            self.send_error(204)
        else:
            super().do_GET()

    def do_POST(self):
        self.results.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.answer("")

    def answer(self, text):
        body = text.encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def opened(profile):
    """What Chromium has seen of each page at each width."""
    results = queue.Queue()
    server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *args, **options: Site(*args, results=results, **options))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    switches = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
    address = f"http://127.0.0.1:{server.server_port}/opener"
    browser = subprocess.Popen(
        [CHROMIUM, *switches, "--remote-debugging-port=0", "--window-size=1300,1000", address],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        return results.get(timeout=400)
    finally:
        browser.terminate()
        browser.wait()
        server.shutdown()
        server.server_close()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_every_page_fits_loads_its_pictures_and_does_not_complain(tmp_path):
    seen = opened(tmp_path)
    assert sorted((found["page"], found["width"]) for found in seen) == sorted((p, w) for p in PAGES for w in WIDTHS)
    wide = [(f["page"], f["width"], f["wide"], f["beyond"]) for f in seen if f["wide"] > f["width"]]
    assert not wide, f"scroll sideways: {wide}"
    broken = [(f["page"], f["broken"]) for f in seen if f["broken"]]
    assert not broken, f"pictures that do not load: {broken}"
    complaints = [(f["page"], f["complaints"]) for f in seen if f["complaints"]]
    assert not complaints, f"errors: {complaints}"


class Links(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.links, self.names = [], set()
        self.feed((SITE / page).read_text())

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.names.update(filter(None, (found.get("id"), found.get("name"))))
        self.links += filter(None, (found.get("href"), found.get("src")))


@cache
def place(folder, path):
    """The file of the site that a path leads to from a folder of it; none if there is no such file."""
    target = (folder / unquote(path)).resolve()
    inside = target.is_relative_to(SITE.resolve()) and target.exists()
    return str(target.relative_to(SITE.resolve())) if inside else None


def test_every_link_inside_leads_somewhere():
    parsed = {page: Links(page) for page in PAGES}
    lost = []
    for page, of in parsed.items():
        folder = (SITE / page).parent
        for link in of.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            name = place(folder, parts.path) if parts.path else page
            names = parsed[name].names if name in parsed and parts.fragment else {unquote(parts.fragment)}
            if name is None or unquote(parts.fragment) not in names:
                lost.append((page, link))
    assert not lost, lost


def test_nothing_is_loaded_from_elsewhere():
    """Links may lead away; scripts, styles and pictures are of the site."""
    for page in PAGES:
        text = (SITE / page).read_text()
        assert 'src="http' not in text, page
        assert 'rel="stylesheet" type="text/css" href="http' not in text, page
