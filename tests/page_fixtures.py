"""Shared by the tests of pages whose code is run."""

import re
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent


def code_blocks(page):
    """The code of each file on a page of docs/, by the path at the end of the paragraph before."""
    parts = re.split(r'```python\n(.*?)```\n', (REPOSITORY / 'docs' / page).read_text(), flags=re.S)
    paths = [re.findall(r'`([\w/]+\.py)`', text)[-1] for text in parts[:-1:2]]
    return dict(zip(paths, parts[1::2], strict=True))


def executed(code, name):
    """The names that a block defines."""
    namespace = {'__name__': name}
    exec(compile(code, name, 'exec'), namespace)
    return namespace
