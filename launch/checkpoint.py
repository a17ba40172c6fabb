"""holdfast checkpoint: list, check, compare, convert and prune durable checkpoints, or ask a run for one.

    ls PATH                       the checkpoints of a run or directory
    show PATH                     what one holds
    verify PATH                   re-hash every byte; exit code 1 if anything is wrong
    diff A B                      the tensors and keys that differ, and by how much; exit code 1 if any
    export FORMAT PATH TARGET     as deepspeed, dcp, huggingface, or ranks (--table: framework/interop/ranks.py)
    import FORMAT SOURCE PATH     from one of these, as a checkpoint in the directory PATH
    reshape PATH TARGET           the same state in other files: --layout 2x2x1, or --files N
    prune PATH                    remove old checkpoints, and what was never committed
    save RUN                      ask a run that is going on to save now

PATH is a checkpoint, a directory of them (then its newest is meant), or a run directory; on a disk, or an fsspec URL.

Rule of this file: arguments in, lines and an exit code out.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fault_tolerance.checkpoints.checkpoint import INDEX, Checkpoint
from fault_tolerance.checkpoints.compare import changed_keys, differences
from fault_tolerance.checkpoints.reshape import pieces_of_files, pieces_of_layout, reshape
from fault_tolerance.checkpoints.retention import retain
from fault_tolerance.checkpoints.shelf import checkpoints, locate, remove, step_name, sweep, torn
from fault_tolerance.checkpoints.storage import StorageError, open_storage
from fault_tolerance.checkpoints.verify import DamageError
from framework import run_dir
from launch.byte_bar import byte_bar, readable
from parallel.layout import Layout

FORMATS = ("deepspeed", "dcp", "huggingface", "ranks")
REQUEST = "control/checkpoint"
OK, MISMATCH = 0, 1


def main(arguments: Sequence[str]) -> int:
    """Run one of the tools. Raises ValueError for what the user can mend."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except DamageError as error:
        for damage in error.damages:
            print(f"damaged: {damage}", file=sys.stderr)
        return MISMATCH
    except StorageError as error:
        raise ValueError(str(error)) from error


def list_(options: argparse.Namespace) -> int:
    """`ls`: one row for each checkpoint."""
    root = _shelf(options.path)
    table = Table("step", "saved", "size", "files", "layout", "path", box=None)
    for step, path in checkpoints(root).items():
        try:
            table.add_row(str(step), *_row(Checkpoint.open(path)), path)
        except ValueError as error:
            table.add_row(str(step), f"[red]damaged: {error}", "", "", "", path)
    for step, path in torn(root).items():
        table.add_row(str(step), "[dim]not committed", "", "", "", path)
    if not table.row_count:
        print(f"{root}: no checkpoints")
        return OK
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    return OK


def show(options: argparse.Namespace) -> int:
    """`show`: one checkpoint's other state, and its tensors in sum or one by one."""
    checkpoint = _open(options.path)
    if options.json:
        print(json.dumps(checkpoint.extra, indent=2))
        return OK
    size, files = checkpoint.index.num_bytes, len(checkpoint.index.shards)
    print(
        f"{checkpoint.path}: step {checkpoint.step}, {len(checkpoint.specs)} tensors, {readable(size)} in {files} files"
    )
    for key, value in checkpoint.extra.items():
        print(f"  {key}: {json.dumps(value) if not isinstance(value, dict) else f'{len(value)} keys (--json)'}")
    for spec in checkpoint.specs if options.tensors else ():
        pieces = len(checkpoint.index.extents[spec.name])
        print(f"  {spec.name}  {'x'.join(map(str, spec.shape)) or 'scalar'}  {spec.dtype}  in {pieces} pieces")
    if options.digest:
        with byte_bar("digest", size) as advance:
            print(f"  state_sha256: {checkpoint.state_sha256(progress=advance)}")
    return OK


def verify(options: argparse.Namespace) -> int:
    """`verify`: every byte of one checkpoint, or of all."""
    paths = list(checkpoints(_shelf(options.path)).values()) if options.all else [locate(options.path)]
    wrong = 0
    for path in paths:
        damages = _verify(path)
        wrong += bool(damages)
        print(f"{path}: {'intact' if not damages else 'DAMAGED'}")
        for damage in damages:
            print(f"  {damage}")
    return MISMATCH if wrong else OK


def diff(options: argparse.Namespace) -> int:
    """`diff`: what differs between two checkpoints."""
    a, b = _open(options.a), _open(options.b)
    with byte_bar("compare", a.index.num_bytes + b.index.num_bytes) as advance:
        tensors = list(differences(a, b, progress=advance))
    keys = [row for row in changed_keys(a.extra, b.extra) if row[0] != "saved_at"]
    for difference in tensors:
        print(difference)
    for key, one, other in keys:
        print(f"extra.{key}: {one!r} and {other!r}")
    if not tensors and not keys:
        print(f"equal: {len(a.specs)} tensors and all other state")
    return MISMATCH if tensors or (keys and not options.tensors_only) else OK


def export(options: argparse.Namespace) -> int:
    """`export`: to another tool's format."""
    checkpoint, target = _open(options.path), Path(options.target)
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"export: {target} must be new or empty; choose another directory")
    if options.format == "ranks" and options.table is None:
        raise ValueError("export: ranks must be given --table FILE, which says how its ranks hold the tensors")
    more = {"huggingface": {"dtype": options.dtype}, "ranks": {"table": options.table}}.get(options.format, {})
    with byte_bar("export", checkpoint.index.num_bytes // (3 if options.format == "huggingface" else 1)) as advance:
        _adaptor(options.format).export(checkpoint, target, progress=advance, **more)
    print(f"exported step {checkpoint.step} as {options.format}: {target}")
    return OK


def import_(options: argparse.Namespace) -> int:
    """`import`: from another tool's format."""
    foreign = _adaptor(options.format).read(Path(options.source))
    target = f"{options.path.rstrip('/')}/{step_name(foreign.extra['step'])}"
    if INDEX in open_storage(target).sizes():
        raise ValueError(f"import: {target} must be free, but holds a checkpoint; choose another directory")
    total = sum(lazy.num_bytes for lazy in foreign.tensors.values())
    from framework.interop.exchange import store

    with byte_bar("import", total) as advance:
        checkpoint = store(foreign, target, progress=advance)
    print(f"imported step {checkpoint.step}: {target}\ngo on from it with: holdfast train resume={target}")
    return OK


def reshape_(options: argparse.Namespace) -> int:
    """`reshape`: the same state in other files."""
    source = _open(options.path)
    if options.layout is not None:
        pieces = pieces_of_layout(source.specs, Layout.parse(options.layout), options.schedule)
    else:
        pieces = pieces_of_files(source.specs, options.files)
    target = f"{options.target.rstrip('/')}/{step_name(source.step)}"
    with byte_bar("reshape", source.index.num_bytes) as advance:
        reshape(source, target, pieces, layout=options.layout, progress=advance)
    print(f"reshaped into {len(pieces)} files: {target}")
    return OK


def prune(options: argparse.Namespace) -> int:
    """`prune`: retention on demand."""
    root = _shelf(options.path)
    losses = {step: loss for step, path in checkpoints(root).items() if (loss := _loss(path)) is not None}
    verdicts = retain(
        list(checkpoints(root)),
        keep_last=options.keep_last,
        keep_every=options.keep_every,
        keep_best=options.keep_best,
        losses=losses,
    )
    for verdict in verdicts:
        print(f"step {verdict.step}: {'kept' if verdict.keep else 'removed'}, {verdict.reason}")
    sweeps = options.torn or not _may_be_saving(options.path, root)
    for step in torn(root):
        print(f"step {step}: {'removed' if sweeps else 'left, the run may be writing it (--torn)'}, never committed")
    if options.dry_run:
        print("dry run: nothing was removed")
        return OK
    remove(root, [verdict.step for verdict in verdicts if not verdict.keep])
    if sweeps:
        sweep(root)
    return OK


def save(options: argparse.Namespace) -> int:
    """`save`: ask a run for a checkpoint now."""
    run = Path(options.run_path)
    run_dir.config(run)
    if run_dir.summary(run) is not None:
        raise ValueError(f"save: {run} must be going on, but it has ended; its checkpoints are in {_shelf(str(run))}")
    request = run / REQUEST
    request.parent.mkdir(exist_ok=True)
    request.write_text(json.dumps({"time": time.time()}))
    if not options.wait:
        print(f"asked; the run saves after the step it is in, see {_shelf(str(run))}")
        return OK
    before, deadline = set(checkpoints(_shelf(str(run)))), time.monotonic() + options.wait
    while time.monotonic() < deadline:
        if new := set(checkpoints(_shelf(str(run)))) - before:
            print(f"saved: {checkpoints(_shelf(str(run)))[max(new)]}")
            return OK
        time.sleep(0.2)
    print(f"no new checkpoint within {options.wait:g} s; is the run alive?", file=sys.stderr)
    return MISMATCH


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="holdfast checkpoint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tools = parser.add_subparsers(metavar="TOOL", required=True)

    def tool(name: str, run: Callable[[argparse.Namespace], int], *words: str) -> argparse.ArgumentParser:
        added = tools.add_parser(name, description=(run.__doc__ or "").partition(": ")[2])
        added.set_defaults(run=run)
        for word in words:
            added.add_argument(word, **({"choices": FORMATS} if word == "format" else {"metavar": word.upper()}))
        return added

    tool("ls", list_, "path")
    one = tool("show", show, "path")
    one.add_argument("--json", action="store_true", help="all other state, as JSON")
    one.add_argument("--tensors", action="store_true", help="one line for each tensor")
    one.add_argument("--digest", action="store_true", help="state_sha256, which takes a pass over all bytes")
    tool("verify", verify, "path").add_argument("--all", action="store_true", help="every checkpoint, not the newest")
    tool("diff", diff, "a", "b").add_argument("--tensors-only", action="store_true", help="exit by the tensors alone")
    one = tool("export", export, "format", "path", "target")
    one.add_argument("--dtype", default="float32", help="of a Hugging Face export: float32, bfloat16, float16")
    one.add_argument("--table", type=Path, help="of an export by ranks: a YAML file with patterns")
    tool("import", import_, "format", "source", "path")
    one = tool("reshape", reshape_, "path", "target")
    cut = one.add_mutually_exclusive_group(required=True)
    cut.add_argument("--layout", help="pp x dp x tp, as in 2x2x1")
    cut.add_argument("--files", type=int, help="number of files, whatever the layout")
    one.add_argument("--schedule", default="1f1b", help="of the pipeline, which deals out the layers")
    one = tool("prune", prune, "path")
    one.add_argument("--keep-last", type=int, default=2, help="the newest")
    one.add_argument("--keep-every", type=int, default=0, help="every step that this divides")
    one.add_argument("--keep-best", type=int, default=0, help="those with the lowest validation loss")
    one.add_argument("--torn", action="store_true", help="what was never committed too, though the run has not ended")
    one.add_argument("--dry-run", action="store_true", help="only say what would go")
    one = tool("save", save)
    one.add_argument("run_path", metavar="RUN")
    one.add_argument("--wait", type=float, default=0.0, metavar="S", help="until it is there, this long at most")
    return parser


def _open(path: str) -> Checkpoint:
    return Checkpoint.open(locate(_shelf(path) if Path(path, "config.yaml").is_file() else path))


def _shelf(path: str) -> str:
    """Where the checkpoints of a run or directory are; of a checkpoint, the directory it lies in."""
    if Path(path, "config.yaml").is_file():
        durable = run_dir.config(path).get("fault_tolerance", {}).get("durable", {}).get("dir")
        return str(durable or f"{path.rstrip('/')}/checkpoints")
    if INDEX in open_storage(path).sizes():
        return path.rstrip("/").rpartition("/")[0] or "."
    return path


def _may_be_saving(path: str, root: str) -> bool:
    """Whether these are the checkpoints of a run that did not say that it ended."""
    runs = [run for run in (Path(path), Path(root).parent) if (run / "config.yaml").is_file()]
    return any(run_dir.summary(run) is None for run in runs)


def _adaptor(name: str) -> Any:
    return importlib.import_module(f"framework.interop.{name}")


def _row(checkpoint: Checkpoint) -> tuple[str, str, str, str]:
    saved = checkpoint.extra.get("saved_at")
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(saved)) if saved is not None else ""
    size, files = readable(checkpoint.index.num_bytes), str(len(checkpoint.index.shards))
    return when, size, files, str(checkpoint.extra.get("layout", ""))


def _loss(path: str) -> float | None:
    try:
        loss = Checkpoint.open(path).extra.get("val_loss")
    except ValueError:
        return None
    return float(loss) if loss is not None else None


def _verify(path: str) -> list[Any]:
    try:
        checkpoint = Checkpoint.open(path)
    except ValueError as error:
        return [error]
    with byte_bar("verify", sum(shard.num_bytes for shard in checkpoint.index.shards)) as advance:
        return list(checkpoint.verify(progress=advance))
