"""The build backend: setuptools', and a word where it is missing or too old.

``pip install --no-build-isolation`` brings nothing that a build needs, and Python 3.12 and later
have no setuptools in a fresh environment.
"""

import sys

_REMEDY = f"{sys.executable} -m pip install 'setuptools>=77' ninja"

try:
    import setuptools
except ImportError:
    raise SystemExit(
        f"fadiag-fast build: expected setuptools, got none. Install it: {_REMEDY}"
    ) from None
if int(setuptools.__version__.partition(".")[0]) < 77:
    raise SystemExit(
        f"fadiag-fast build: expected setuptools 77 or later, got {setuptools.__version__}. "
        f"Upgrade it: {_REMEDY}"
    )

from setuptools.build_meta import *  # noqa: E402, F403
