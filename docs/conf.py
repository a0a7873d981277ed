"""How the documentation is built."""

import re
import sys
import warnings
from pathlib import Path

import nngeometry

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import of_benchmarks  # noqa: E402
import of_examples  # noqa: E402

(HERE / "_generated").mkdir(exist_ok=True)
(HERE / "_generated" / "peers.txt").write_text(of_benchmarks.peers(HERE / "benchmarks" / "results.json"))

project = "nngeometry"
copyright = "2026, the nngeometry authors"
author = "the nngeometry authors"
release = nngeometry.__version__
extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",  # for testsetup, which is run by tests/test_pages.py and not shown
    "mathml",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "myst_parser",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "gallery/*.ipynb"]

napoleon_numpy_docstring = False
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "show-inheritance": True}
python_maximum_signature_line_length = 80  # one argument a line

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

#: Every example runs at small size when the site is built; one that fails is an error of the build.
sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r"/(?!distributed)[a-z_]+\.py$",  # that one is started by torchrun: `make examples`
    "ignore_pattern": r"__init__\.py",
    "within_subsection_order": "FileNameSortKey",
    "image_scrapers": ("of_examples.pictures",),
    "reset_modules": ("of_examples.clean",),
    "reset_argv": "of_examples.arguments",
    "remove_config_comments": True,
    "first_notebook_cell": of_examples.FIRST_CELL,
    "ignore_repr_types": r"matplotlib\.figure",  # shown as pictures
    "download_all_examples": False,
    "show_signature": False,
    "min_reported_time": 1e9,
    "write_computation_times": False,
    "default_thumb_file": str(HERE / "pictures" / "matrices.png"),
}
warnings.filterwarnings("ignore", message=".*FigureCanvasAgg is non-interactive.*")

html_math_renderer = "mathml"
html_theme = "furo"
html_title = "nngeometry"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b6e99", "color-brand-content": "#0b6e99"},
    "dark_css_variables": {"color-brand-primary": "#6cc5e9", "color-brand-content": "#6cc5e9"},
}
html_copy_source = False
html_show_sourcelink = False


def _no_source_of_builtins(app, env):
    """Aliases of types are documented, whose source nobody has."""
    getattr(env, "_viewcode_modules", {}).pop("builtins", None)


def _links_of_sources(app, page, template, context, doctree):
    """A page of source links back to what the reference has under the name of its module, and to nothing else."""
    if page.startswith("_modules/") and "body" in context:
        known = {entry.node_id for entry in app.env.domains["py"].objects.values()}
        link = r'<a class="viewcode-back" href="[^"#]*#([^"]+)">\[docs\]</a>'
        context["body"] = re.sub(link, lambda m: m[0] if m[1] in known else "", context["body"])


def _executed_notebooks(app):
    """The gallery's notebooks are not run, but for the one of the longest work-flow."""
    of_examples.executed(HERE / "gallery" / "deep_curvature.ipynb")


def setup(app):
    app.connect("builder-inited", _executed_notebooks, priority=900)  # after the gallery
    app.connect("env-check-consistency", _no_source_of_builtins)
    app.connect("html-page-context", _links_of_sources)
