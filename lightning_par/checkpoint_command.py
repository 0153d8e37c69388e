"""The command `lightning-par checkpoint`: everything that reads or makes a checkpoint outside of a run.

    lightning-par checkpoint show outputs/run/checkpoints/last.ckpt            # what is in it
    lightning-par checkpoint verify outputs/run/checkpoints/*.ckpt             # is every byte what was written?
    lightning-par checkpoint export last.ckpt model --format transformers      # a folder for from_pretrained
    lightning-par checkpoint import plain.ckpt here.ckpt                       # from Lightning, transformers, DeepSpeed
    lightning-par checkpoint prune outputs/run/checkpoints --keep 3 --dry-run

Exit codes: 0 done, 1 a checkpoint is damaged or cannot be read, 2 what was typed cannot work.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_par.errors import CheckpointError, ConfigurationError

if TYPE_CHECKING:
    from lightning_par.checkpoint import Checkpoint

Run = Callable[[argparse.Namespace], int | None]  # gives an exit code, or None for 0
FORMATS = ("safetensors", "transformers", "lightning")


def add_checkpoint_command(commands: Any) -> None:
    """Add `checkpoint` to the subcommands of a parser. Imports nothing that is slow."""
    about = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    inner = commands.add_parser("checkpoint", help="show, verify, export, import and prune checkpoints", **about)
    verbs = inner.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_show(verbs)
    _add_verify(verbs)
    _add_export(verbs)
    _add_import(verbs)
    _add_prune(verbs)


def _add(verbs: Any, run: Run, name: str, about: str, examples: str) -> argparse.ArgumentParser:
    """One command, with its help."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=about[0].lower() + about[1:].partition(". ")[0].rstrip("."),
        description=about,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=lambda options: _exit(run, options))
    return parser


def _exit(run: Run, options: argparse.Namespace) -> None:
    try:
        code = run(options)
    except (CheckpointError, ConfigurationError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(2 if isinstance(error, ConfigurationError) else 1) from None
    if code:
        raise SystemExit(code)


def _add_show(verbs: Any) -> None:
    about = "Show what is in a checkpoint: which layout wrote it, where the run was, and every tensor. No weight is read."
    examples = "  lightning-par checkpoint show last.ckpt\n  lightning-par checkpoint show last.ckpt --json | jq .step"
    parser = _add(verbs, _show, "show", about, examples)
    parser.add_argument("path", type=Path, metavar="PATH", help="the folder")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _show(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    from lightning_par.checkpoint import Checkpoint
    from lightning_par.checkpoint.inspection import describe

    found = describe(Checkpoint(options.path))
    if options.json:
        print(json.dumps(found, indent=2))
        return
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)  # names are whole in a file
    console.print(f"{found['folder']}: written by parallel={found['layout']}", soft_wrap=True, markup=False)
    facts = {key: found[key] for key in ("epoch", "step", "precision") if found[key] is not None}
    console.print(", ".join(f"{key} {value}" for key, value in facts.items()), markup=False)
    table = Table(Column("tensor", overflow="fold"), "shape", "dtype", "values", "bytes", "pieces", box=None)
    for tensor in found["tensors"]:
        values = tensor["values"].values()
        names = "\n= ".join([tensor["name"], *tensor["aliases"]])
        kinds = ", ".join(
            what if each["dtype"] == tensor["dtype"] else f"{what} ({each['dtype']})" for what, each in tensor["values"].items()
        )
        sizes = _size(sum(each["bytes"] for each in values)), str(sum(each["pieces"] for each in values))
        table.add_row(names, str(tensor["shape"]), tensor["dtype"], kinds, *sizes)
    console.print(table)
    totals = ", ".join(f"{what} {_size(size)}" for what, size in found["bytes_by_kind"].items())
    files = found["files"]
    console.print(f"{len(found['tensors'])} tensors: {totals}; {len(files)} files with {_size(sum(files.values()))}", markup=False)
    if found["pickled"]:
        console.print(f"pickled, read only with trust: {', '.join(found['pickled'])}", soft_wrap=True, markup=False)


def _add_verify(verbs: Any) -> None:
    about = "Read every byte of checkpoints and compare it with its checksum. Damaged files are named, with the tensors they held."
    parser = _add(verbs, _verify, "verify", about, "  lightning-par checkpoint verify outputs/run/checkpoints/*.ckpt")
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="the folders")


def _verify(options: argparse.Namespace) -> int:
    from lightning_par.checkpoint.inspection import find_damage

    is_damaged = False
    for path in options.paths:
        with _progress(f"verify {path.name}") as advance:
            faults = find_damage(path, advance)
        for fault in faults:
            print(fault, file=sys.stderr)
        print(f"{path}: {'damaged' if faults else 'whole'}")
        is_damaged = is_damaged or bool(faults)
    return int(is_damaged)


def _add_export(verbs: Any) -> None:
    about = (
        "Write a checkpoint for other programs, in the dtype that the module has in training.\n\n"
        "  safetensors    a folder with whole weights, one file or several with their index; one tensor in memory at a time\n"
        "  transformers   a folder that from_pretrained loads, with the model's config\n"
        "  lightning      a .ckpt that a Trainer without our strategy resumes from"
    )
    examples = (
        "  lightning-par checkpoint export last.ckpt weights --format safetensors --max-shard-size 2GB\n"
        "  lightning-par checkpoint export last.ckpt model --format transformers --config gpt2/config.json --prefix model.\n"
        "  lightning-par checkpoint export last.ckpt plain.ckpt --format lightning"
    )
    parser = _add(verbs, _export, "export", about, examples)
    parser.add_argument("path", type=Path, metavar="PATH", help="the checkpoint")
    parser.add_argument("out", type=Path, metavar="OUT", help="what to write; nothing may be there")
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a file, as 5GB or 500MB (default: 5GB)")
    parser.add_argument(
        "--config", type=Path, metavar="PATH", help="transformers: the model's folder or config.json (default: saved)"
    )
    parser.add_argument("--prefix", help="transformers: what the model's names begin with, as model. (default: found)")
    parser.add_argument("--trust", action="store_true", help="lightning: also what is pickled, which may run any code")


def _export(options: argparse.Namespace) -> None:
    from lightning_par.checkpoint import Checkpoint
    from lightning_par.checkpoint.export import write_lightning, write_out, write_safetensors
    from lightning_par.checkpoint.transformers_folder import write_transformers

    checkpoint, limit = Checkpoint(options.path), _bytes_in(options.max_shard_size)
    notes: list[str] = []
    with _weights_progress(checkpoint, f"export {options.path.name}") as advance:
        if options.format == "safetensors":
            write_out(options.out, lambda folder: write_safetensors(checkpoint, folder, limit, advance))
        elif options.format == "transformers":
            chosen = options.config, options.prefix
            write_out(options.out, lambda folder: write_transformers(checkpoint, folder, limit, advance, *chosen))
        else:
            write_out(options.out, lambda file: notes.extend(write_lightning(checkpoint, file, options.trust)), is_file=True)
    for note in notes:
        print(note, file=sys.stderr)
    print(f"written: {options.out}")


def _add_import(verbs: Any) -> None:
    about = (
        "Make a checkpoint of what another program wrote. What the source is, is found:\n\n"
        "  a folder of transformers, or safetensors     weights\n"
        "  a .ckpt of Lightning                         all of it; optimizer states where their parameters follow from the shapes\n"
        "  a folder of DeepSpeed's ZeRO                 weights, as float32; its files are pickles, so --trust is needed"
    )
    examples = (
        "  lightning-par checkpoint import plain.ckpt here.ckpt\n"
        "  lightning-par checkpoint import ./llama here.ckpt --prefix model.\n"
        "  lightning-par checkpoint import deepspeed.ckpt here.ckpt --trust"
    )
    parser = _add(verbs, _import, "import", about, examples)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="the folder or file")
    parser.add_argument("out", type=Path, metavar="OUT", help="the checkpoint to write; nothing may be there")
    parser.add_argument("--prefix", default="", help="put before all names, as model. for a module with self.model = ...")
    parser.add_argument("--trust", action="store_true", help="unpickle the source, which may run any code")


def _import(options: argparse.Namespace) -> None:
    from lightning_par.checkpoint.intake import import_checkpoint

    with _progress(f"import {options.source.name}"):
        found = import_checkpoint(options.source, options.out, options.prefix, options.trust)
    for note in found.notes:
        print(note, file=sys.stderr)
    print(f"written: {options.out}, {len(found.tensors)} tensors from {found.kind}")


def _add_prune(verbs: Any) -> None:
    about = (
        "Remove what killed saves have left in a folder and, with --keep, all but its newest checkpoints. Asks nothing. "
        "Not while a run saves into the folder."
    )
    examples = "  lightning-par checkpoint prune outputs/run/checkpoints --keep 3 --dry-run"
    parser = _add(verbs, _prune, "prune", about, examples)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="with checkpoints in it")
    parser.add_argument("--keep", type=int, metavar="N", help="how many checkpoints stay, the newest by when they were written")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be removed")


def _prune(options: argparse.Namespace) -> None:
    from lightning_par.checkpoint.prune import find_prunable
    from lightning_par.checkpoint.publish import remove

    found = find_prunable(options.folder, options.keep)
    for error in found.damaged:
        print(f"left: {error}", file=sys.stderr)
    for path in (*found.leftovers, *found.outdated):
        print(f"{'would remove' if options.dry_run else 'removed'}: {path}")
        if not options.dry_run:
            try:
                remove(path)
            except OSError as error:
                raise ConfigurationError(f"{path} cannot be removed ({error.strerror}): make the folder writable") from None
    print(f"kept: {', '.join(path.name for path in found.kept) or 'nothing'}")


def _size(size: float) -> str:
    """Bytes in words, as 1.5 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _bytes_in(words: str) -> int:
    """``5GB`` as bytes, in powers of 1000 as transformers reads it."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B", words.strip(), re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise ConfigurationError(f"--max-shard-size {words} is no size: write 5GB or 500MB")
    return int(float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " "))


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on the terminal, of which nothing stays; it is told bytes done and in all."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def _weights_progress(checkpoint: Checkpoint, what: str) -> Iterator[Callable[[int], None]]:
    """A bar for reading all weights; it is told the bytes of each."""
    from lightning_par.checkpoint.export import weight_bytes

    total, done = sum(weight_bytes(checkpoint, name) for name in checkpoint.index.entries), 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        show(done, total)

    with _progress(what) as show:
        yield advance
