"""Readable: what there is to read, looked up and not read, so that a path without a file is refused before anything starts.

    data=text data.path=books/   ->   text, 12 files, 3.4 MB        or ValueError

Rule of this file: it looks at names and sizes.
"""

from __future__ import annotations

from framework.data import sources
from framework.data.corpus import files
from framework.data.indexed_tokens import open_indexed


def read_from(source: sources.Source) -> str:
    """Data of this machine in a few words. Raises ValueError if there is none."""
    if isinstance(source, sources.MixtureSource):
        return "mixture of " + " and ".join(read_from(part.source) for part in source.sources)
    if isinstance(source, sources.MegatronSource):
        return f"{source.kind}, {len(open_indexed(source.path)):,} tokens"
    if isinstance(source, sources.SyntheticSource | sources.HuggingfaceSource):
        return source.kind
    found = [path for _, path in files(source)]
    return f"{source.kind}, {len(found)} file{'s' * (len(found) != 1)}, {sum(path.stat().st_size for path in found) / 1e6:.1f} MB"
