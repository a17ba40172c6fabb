"""Data: from a source to samples by number.

    source  --corpus-->  documents  --tokenizer, cache-->  tokens  --windows-->  samples  --mixture-->  Data
    megatron  ----------- indexed_tokens ---------------->  tokens  --windows-->  samples
    synthetic  -------------------------------------------------------------->  samples

Every process that trains builds its own `Data`; what is costly is made once per machine, in the token cache.

Rule of this file: assembly only. It knows neither steps nor workers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from framework.data import corpus, sources
from framework.data.indexed_tokens import open_indexed
from framework.data.mixture import MixtureData, Pattern
from framework.data.order import digest_words
from framework.data.sources import MegatronSource, MixtureSource, Source, SyntheticSource
from framework.data.synthetic import SyntheticData
from framework.data.token_cache import cached_tokens, default_cache_dir
from framework.data.tokenizer import NumberTokenizer, Tokenizer, open_tokenizer
from framework.data.windows import Data, Stream, WindowData


def build(source: Source | Mapping[str, Any], *, seed: int) -> Data:
    """The data of a source, or of the plain values of one (`kind` and its keys), in the order of this seed.

    The first build of a corpus on a machine reads and tokenizes it; later ones map its cache. Raises ValueError for
    what the user can mend: a missing path, library or key, or a source that is too small.
    """
    if isinstance(source, Mapping):
        source = sources.decode(source)
    if isinstance(source, SyntheticSource):
        return SyntheticData.of(source, seed=seed)
    if isinstance(source, MixtureSource):
        return _mixture(source, seed)
    tokenizer = _tokenizer(source)
    return WindowData.of(
        _stream(source, tokenizer),
        tokenizer,
        name=_name(source),
        seq_len=source.seq_len,
        val_fraction=source.val_fraction,
        seed=seed,
    )


def vocab_size(source: Source | Mapping[str, Any]) -> int:
    """How many ids the source's tokens have, without building it: what `model.vocab_size=null` means."""
    if isinstance(source, Mapping):
        source = sources.decode(source)
    if isinstance(source, MixtureSource):
        return max(vocab_size(part.source) for part in source.sources)
    return source.vocab_size if isinstance(source, SyntheticSource) else _tokenizer(source).vocab_size


def _mixture(source: MixtureSource, seed: int) -> MixtureData:
    parts = []
    for i, part in enumerate(source.sources):
        try:
            parts.append(build(part.source, seed=digest_words(1, seed, i)[0]))
        except ValueError as error:
            raise ValueError(f"data.sources[{i}]{str(error).removeprefix('data')}") from error
    return MixtureData(tuple(parts), Pattern.of([part.weight for part in source.sources]))


def _tokenizer(source: Source) -> Tokenizer:
    if isinstance(source, MegatronSource) and source.vocab_size is not None and source.tokenizer == "bytes":
        return NumberTokenizer(source.vocab_size)
    return open_tokenizer(source.tokenizer)


def _stream(source: Source, tokenizer: Tokenizer) -> Stream:
    if isinstance(source, MegatronSource):
        return open_indexed(source.path)
    cache_dir = Path(source.cache_dir).expanduser() if source.cache_dir else default_cache_dir()
    return cached_tokens(corpus.signature(source), lambda: corpus.passages(source), tokenizer, cache_dir=cache_dir)


def _name(source: Source) -> str:
    path = getattr(source, "path", None)
    return f"{source.kind} {path}" if path else source.kind
