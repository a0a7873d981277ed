"""Runs the first example of a page as a doctest, with the installed package: ``python -I first_lines.py README.md``."""

import doctest
import sys
from pathlib import Path

import nngeometry

text = Path(sys.argv[1]).read_text()
first = text.split("```python\n", 1)[1].split("```", 1)[0]
test = doctest.DocTestParser().get_doctest(first, {}, sys.argv[1], sys.argv[1], 0)
runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
failed, tried = runner.run(test)
print(f"{tried} lines of {sys.argv[1]} with nngeometry {nngeometry.__version__} of {Path(nngeometry.__file__).parent}")
sys.exit(bool(failed or not tried))
