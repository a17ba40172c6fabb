"""Sources: what the data of a run may be, one frozen value per kind.

    kind          what it reads                                              needs
    stdlib        the source text of Python's own standard library           nothing
    text          files, folders or globs of plain text                      path
    jsonl         one JSON object per line (also .gz)                        path, text_key
    parquet       a column of Parquet files                                  path, text_key, pyarrow
    megatron      Megatron-LM's tokenized .bin/.idx pairs                    path, tokenizer or vocab_size
    huggingface   a data set of the `datasets` library, local or by name     path, text_key, datasets
    synthetic     a seeded closed form without files, for tests              nothing
    mixture       several of these, by weight                                sources

Rule of this file: values and their validation. It opens nothing; `samples.py` builds data from a source.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, ClassVar

from framework import decoding
from framework.decoding import Below1, Fraction, PositiveFloat, PositiveInt, Rule

Name = Annotated[str, Rule("not empty", lambda v: v != "", "corpus/")]
VocabSize = Annotated[int, Rule("an integer from 2 to 2^31", lambda v: 2 <= v <= 2**31, 256)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What every kind has. A sample is `seq_len` + 1 tokens; `val_fraction` of the data is held out at its end."""

    kind: ClassVar[str]
    seq_len: PositiveInt
    val_fraction: Below1 = 0.02
    tokenizer: Name = "bytes"
    cache_dir: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StdlibSource(Source):
    """Python files of the running interpreter's standard library, tests left out: about 12 MB on any machine."""

    kind: ClassVar[str] = "stdlib"


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSource(Source):
    """Plain text: each file is a document. `path` is a file, a folder (all files below it) or a glob."""

    kind: ClassVar[str] = "text"
    path: Name


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonlSource(TextSource):
    """JSON lines: each line is an object whose `text_key` is a document."""

    kind: ClassVar[str] = "jsonl"
    text_key: str = "text"


@dataclass(frozen=True, slots=True, kw_only=True)
class ParquetSource(JsonlSource):
    """Parquet: each row's column `text_key` is a document."""

    kind: ClassVar[str] = "parquet"


@dataclass(frozen=True, slots=True, kw_only=True)
class HuggingfaceSource(JsonlSource):
    """A data set of the `datasets` library: a folder written by `save_to_disk`, or what `load_dataset` takes."""

    kind: ClassVar[str] = "huggingface"
    name: str | None = None
    split: str = "train"
    revision: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MegatronSource(TextSource):
    """Megatron-LM's indexed data: `path` is the common prefix of the .bin and .idx files, or either file.

    The tokens are final, so the tokenizer only turns them back into text. `vocab_size` None: the tokenizer's.
    """

    kind: ClassVar[str] = "megatron"
    vocab_size: VocabSize | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticSource(Source):
    """Samples that are a closed form of (seed, index): a noisy linear congruence over `vocab_size` tokens.

    With probability `noise` a token is drawn afresh, else it follows from the one before it.
    """

    kind: ClassVar[str] = "synthetic"
    vocab_size: VocabSize = 256
    num_samples: PositiveInt = 65536
    noise: Fraction = 0.125


@dataclass(frozen=True, slots=True)
class WeightedSource:
    """A part of a mixture. Weights are relative to each other."""

    weight: PositiveFloat
    source: Source


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureSource(Source):
    """Several sources, interleaved by weight. Sequence length, tokenizer, held-out share and cache are the mixture's."""

    kind: ClassVar[str] = "mixture"
    sources: tuple[WeightedSource, ...]


KINDS: dict[str, type[Source]] = {
    cls.kind: cls
    for cls in (
        StdlibSource,
        TextSource,
        JsonlSource,
        ParquetSource,
        MegatronSource,
        HuggingfaceSource,
        SyntheticSource,
        MixtureSource,
    )
}


def decode(values: Mapping[str, Any], *, where: str = "data") -> Source:
    """The source that plain values (of a YAML file) describe: `kind`, and the keys of that kind.

    Raises ValueError, whose text starts with the key, for an unknown kind or key, or a wrong or missing value.
    """
    rest = dict(values)
    kind = rest.pop("kind", None)
    if kind not in KINDS:
        raise ValueError(f"{where}.kind: must be one of {', '.join(KINDS)}, got {kind!r}; choose one, as in data=text")
    return _mixture(rest, where) if kind == MixtureSource.kind else decoding.decode(KINDS[kind], rest, where)


def encode(source: Source) -> dict[str, Any]:
    """The inverse of `decode`."""
    if isinstance(source, MixtureSource):
        shared = {field.name: getattr(source, field.name) for field in fields(Source)}
        parts = [{"weight": part.weight, **_own(part.source)} for part in source.sources]
        return {"kind": source.kind, **shared, "sources": parts}
    return {"kind": source.kind, **asdict(source)}


def _mixture(values: dict[str, Any], where: str) -> MixtureSource:
    parts = values.pop("sources", None)
    if not isinstance(parts, list | tuple) or not parts:
        raise ValueError(
            f"{where}.sources: must list the parts, got {parts!r}; e.g. [{{kind: text, path: a, weight: 2}}]"
        )
    shared = decoding.decode(Source, values, where)
    common = {field.name: getattr(shared, field.name) for field in fields(Source)}
    return MixtureSource(
        **common, sources=tuple(_part(part, common, f"{where}.sources[{i}]") for i, part in enumerate(parts))
    )


def _part(values: Any, common: dict[str, Any], where: str) -> WeightedSource:
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: must be a group of keys, got {values!r}; give kind, weight and its keys")  # noqa: TRY004
    twice = sorted(common.keys() & values.keys())
    if twice:
        raise ValueError(f"{where}.{twice[0]}: must be set for the mixture as a whole, got it in a part; move it up")
    rest = dict(values)
    weight = decoding.decode(_Weight, {"weight": rest.pop("weight", 1.0)}, where).weight
    return WeightedSource(weight, decode({**common, **rest}, where=where))


def _own(source: Source) -> dict[str, Any]:
    shared = {field.name for field in fields(Source)}
    return {key: value for key, value in encode(source).items() if key not in shared}


@dataclass(frozen=True, slots=True)
class _Weight:
    weight: PositiveFloat
