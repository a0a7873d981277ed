"""How the documentation is built."""

import nngeometry

project = "nngeometry"
copyright = "2026, the nngeometry authors"
author = "the nngeometry authors"
release = nngeometry.__version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "myst_parser"]
napoleon_numpy_docstring = False
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_default_options = {"members": True, "show-inheritance": True}
html_theme = "alabaster"
html_theme_options = {"description": nngeometry.__doc__, "page_width": "1100px"}
exclude_patterns = ["_build"]
