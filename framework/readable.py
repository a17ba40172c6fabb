"""Readable: what there is to read, looked up and not read, so that a path without a file is refused before anything starts.

    data=text data.path=books/   ->   text, 12 files, 3.4 MB        or ValueError

On a cluster that is joined the files may lie on its nodes alone; there the first process that opens them will tell.

Rule of this file: it looks at names and sizes.
"""

from __future__ import annotations

from framework import sources
from framework.config import Config
from framework.corpus import files
from framework.indexed_tokens import open_indexed


def read_from(config: Config) -> str:
    """The run's data in a few words. Raises ValueError if there is none here, and has to be."""
    return _told(config.data) if config.cluster.address == "local" else config.data.kind


def _told(source: sources.Source) -> str:
    if isinstance(source, sources.MixtureSource):
        return "mixture of " + " and ".join(_told(part.source) for part in source.sources)
    if isinstance(source, sources.MegatronSource):
        return f"{source.kind}, {len(open_indexed(source.path)):,} tokens"
    if isinstance(source, sources.SyntheticSource | sources.HuggingfaceSource):
        return source.kind
    found = [path for _, path in files(source)]
    return f"{source.kind}, {len(found)} file{'s' * (len(found) != 1)}, {sum(path.stat().st_size for path in found) / 1e6:.1f} MB"
