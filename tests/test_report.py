"""The page is whole by itself, and says what it could not compute."""

import base64
import re
import shutil
import subprocess
from collections import OrderedDict
from html.parser import HTMLParser

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from nngeometry import FIM, GGN, Hessian, LayerCollection, PMatDense, PMatImplicit, PMatKFAC, linalg
from nngeometry.report import report
from nngeometry.spectrum import spectral_density
from nngeometry.training import zoo

SECTIONS = [
    "Summary",
    "Layers",
    "Spectrum of the Hessian",
    "Extreme eigenvalues",
    "Noise of gradient and curvature",
    "Landscape",
    "Tangent kernel",
]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


#: How wide a page is in a frame, and how much of each of its tables is hidden.
_FRAME = """<body style="margin:0"><iframe id="f" src="p.html" width="{width}" height="900" style="border:0"></iframe>
<pre id="o"></pre><script>onload = () => {{
  const page = document.getElementById("f").contentDocument
  const hidden = [...page.querySelectorAll("table")].map(t => t.scrollWidth - t.clientWidth).join(" ")
  document.getElementById("o").textContent = `page ${{page.documentElement.scrollWidth}}, tables ${{hidden}}.`
}}</script></body>"""


class Page(HTMLParser):
    """Balanced tags, headings, and what is loaded."""

    def __init__(self, text):
        super().__init__()
        self.open, self.titles, self.sources, self.text = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.sources += [v for k, v in attrs if k in ("src", "href")]
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1] == "h2":
            self.titles.append(data)


def digits(n=256):
    of = load_digits()
    return torch.tensor(of.images[:n]).unsqueeze(1) / 16, torch.tensor(of.target[:n])


def written(path, model, loader, *args, **options):
    found = report(model, loader, *args, path=path, verbose=False, **options)
    text = found.read_text()
    page = Page(text)
    assert all(source.startswith("data:") for source in page.sources)
    assert not re.search(r"https?://|@import|<script", text)
    for source in page.sources:
        if source.startswith("data:image/png"):
            assert base64.b64decode(source.partition(",")[2]).startswith(b"\x89PNG")
    return page


def test_a_convnet_on_digits(tmp_path):
    x, y = digits()
    model = zoo.vgg(11, True, channels=1, size=8, width=0.04)
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    loader = list(zip(x.split(64), y.split(64), strict=True))
    page = written(tmp_path / "page.html", model, loader, test_loader=(x[:20], y[:20]), seconds=4.0)
    assert page.titles == SECTIONS
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(m.training for m in model.modules())
    assert sum(s.startswith("data:image/png") for s in page.sources) == 4
    assert "test data" in page.text
    assert "This could not be computed for the model." not in page.text


def test_numbers_are_those_of_the_hessian(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    batch = torch.randn(40, 4), torch.randint(3, (40,))
    page = written(tmp_path / "page.html", model, batch, seconds=60.0)
    l = Hessian(model, batch, PMatDense).eigenvalues()
    assert f"{float(l[0]):.4g}" in page.text
    assert f"{float(l[-1]):.4g}" in page.text
    assert page.titles == SECTIONS


def test_what_does_not_apply_is_said(tmp_path):
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
    batch = torch.randn(40, 4), torch.randn(40, 1)
    page = written(tmp_path / "page.html", model, batch, nn.MSELoss(), title="a <b> title", seconds=2.0)
    assert page.titles[:-1] == SECTIONS[:-1]
    assert "This could not be computed for the model." in page.text
    assert "a <b> title" in page.text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:grad and param do not obey the gradient layout contract")
def test_a_large_net_is_looked_at_on_few_examples(tmp_path):
    torch.manual_seed(0)
    model = zoo.resnet(18, width=0.25).float()
    x, y = torch.randn(64, 3, 32, 32, dtype=torch.float32), torch.randint(10, (64,))
    page = written(tmp_path / "page.html", model, [(x, y)], seconds=6.0)
    assert page.titles == SECTIONS
    assert "Curvature is that of 8 of the 64" in " ".join(page.text)


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_it_opens_in_a_browser(tmp_path, width):
    model = nn.Sequential(OrderedDict(a_module_with_a_long_name_in_it=nn.Linear(4, 5), norm=nn.BatchNorm1d(5)))
    model.add_module("head", nn.Linear(5, 3))
    batch = torch.randn(40, 4), torch.randint(3, (40,))
    path = report(model, batch, path=tmp_path / "p.html", seconds=1.0, title=60 * "long", verbose=False)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--window-size={width},900"]
    page = [path.as_uri(), f"--user-data-dir={tmp_path / 'profile'}"]

    def run(*more):
        return subprocess.run(
            [CHROMIUM, *options, *more, *page], capture_output=True, text=True, timeout=120, check=True
        )

    found = run("--dump-dom")
    assert "Tangent kernel" in found.stdout
    assert "CONSOLE" not in found.stderr
    page[0] = (tmp_path / "frame.html").as_uri()  # a window of Chromium is never as small as a telephone
    (tmp_path / "frame.html").write_text(_FRAME.format(width=width))
    measured = run("--allow-file-access-from-files", "--disable-web-security", "--dump-dom").stdout
    wide, tables = re.search(r"page (\d+), tables ([\d ]*)\.", measured).groups()
    assert int(wide) <= width
    assert all(int(hidden) == 0 for hidden in tables.split())
    shot = tmp_path / "shot.png"
    run("--allow-file-access-from-files", f"--screenshot={shot}")
    assert shot.stat().st_size > 10_000


def test_labels_of_one_class_and_no_curvature(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(40, 4)
    page = written(tmp_path / "page.html", model, (x, torch.zeros(40).long()), seconds=0.5)
    text = " ".join(page.text)
    assert "all are of one class" in text
    assert "nan" not in text.split()
    single = nn.Linear(4, 1)
    page = written(tmp_path / "page.html", single, (x, torch.zeros(40).long()), seconds=0.5)
    assert "The variance of the gradient is unknown times" in " ".join(page.text)


def test_bad_input_in_one_sentence(tmp_path):
    model = nn.Linear(4, 3)
    seen = []
    model.register_forward_hook(lambda *_: seen.append(1))
    for path, match in ((tmp_path, "is a folder"), (tmp_path / "nowhere" / "p.html", "there is no folder")):
        with pytest.raises(ValueError, match=match):
            report(model, (torch.randn(5, 4), torch.zeros(5).long()), path=path, verbose=False)
    assert seen == []
    with pytest.raises(ValueError, match="no labels"):
        report(model, (torch.randn(5, 4),), path=tmp_path / "p.html", verbose=False)
    with pytest.raises(TypeError, match="path: expected a path"):
        report(model, (torch.randn(5, 4), torch.zeros(5).long()), path=3, verbose=False)


def test_objects_show_themselves():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x = torch.randn(20, 4)
    lc = LayerCollection.from_model(model)
    F = FIM(model, (x,), PMatKFAC)
    G = GGN(model, (x, torch.randint(3, (20,))), PMatImplicit)
    spectrum = spectral_density(G, steps=43, outliers=2)
    estimate = linalg.hutchinson(G.matvec, 43, products=10, like=G.like)
    for shown, word in [(F, "PMatKFAC"), (G, "43"), (lc, "Linear"), (spectrum, "trace per parameter"), (estimate, "±")]:
        html = shown._repr_html_()
        Page(html)
        assert word in html
    table = spectrum.table()
    assert float(table["trace"].value) == pytest.approx(43 * float(table["trace per parameter"].value))
    assert float(spectrum.weights.sum(1)[0]) + 2 == pytest.approx(43)
    assert "log-determinant" not in table
    assert "log-determinant" in spectral_density(FIM(model, (x,), PMatKFAC).inv(1e-2), steps=43).table()
