"""Bridges to other libraries; what is missing of them, or unknown, is said as they are imported."""

import re
from importlib.metadata import PackageNotFoundError, version

from fewlines.errors import FewlinesError

OLDEST, UNKNOWN = (5, 24), (6, 0)  # of transformers: models take `cache`; nobody has looked
WANTED = "pip install 'fewlines[transformers]'"

try:
    installed = version("transformers")
except PackageNotFoundError:
    raise FewlinesError(f"transformers is not installed: {WANTED}") from None
if not OLDEST <= (*map(int, re.findall(r"\d+", installed)), 0)[:2] < UNKNOWN:
    raise FewlinesError(
        f"transformers {installed} is installed, and fewlines knows it from 5.24 to before 6.0, "
        f"whose models take an argument 'cache': {WANTED}"
    )
