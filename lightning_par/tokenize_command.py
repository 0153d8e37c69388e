"""The command `lightning-par tokenize`: texts to a folder of tokens, which `data=tokens` trains on.

    lightning-par tokenize corpus/ --tokenizer tokenizer.json --output tokens
    lightning-par tokenize 'src/**/*.py' docs.jsonl.gz --output tokens --processes 8
    lightning-par tokenize wiki/*.parquet --column text --tokenizer tokenizer.json --output tokens

Exit codes: 0 done, 2 what was typed cannot work, 1 anything else, Ctrl-C too. What is done by then is kept: the same words go on.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning_par.errors import ConfigurationError, ProcessError

_EPILOG = """\
inputs:
  a text file        is one document; so is each file that a pattern matches, as 'src/**/*.py'
  .jsonl, .jsonl.gz  a document on each line, in the field --column
  .parquet           a document in each row, in the column --column; needs pip install 'lightning-par[data]'
  a folder           all its .txt, .jsonl, .jsonl.gz and .parquet files

examples:
  lightning-par tokenize corpus --output tokens
  lightning-par tokenize corpus --tokenizer tokenizer.json --end-of-document '<|endoftext|>' --output tokens --processes 8
"""


def add_tokenize_command(commands: Any) -> None:
    """Add `tokenize` to the subcommands of a parser. Imports nothing that is slow."""
    parser = commands.add_parser(
        "tokenize",
        help="make tokens of texts, in a folder that data=tokens trains on",
        description="Make tokens of texts, with many processes. Stopped, it goes on when it is called again with the same words; "
        "what is there is checked, and made again where it is damaged or its input has changed. The folder has the same bytes "
        "however many processes write it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="files, folders and quoted patterns, in the order of the tokens")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="the folder of tokens")
    parser.add_argument(
        "--tokenizer", metavar="FILE", help="a tokenizer.json of the tokenizers library (default: the bytes of UTF-8)"
    )
    parser.add_argument(
        "--end-of-document", metavar="TOKEN", help="what stands after each document, or none (default: the usual one, or byte 0)"
    )
    parser.add_argument("--column", default="text", metavar="NAME", help="what holds the text in lines and tables (default: text)")
    parser.add_argument("--processes", type=_positive, metavar="N", help="how many work (default: one for each core)")
    parser.set_defaults(run=_tokenize)


def _tokenize(options: argparse.Namespace) -> None:
    from lightning_par.data.tokenize import plan_job, tokenize  # here, so that --help does not wait for numpy

    begun = time.monotonic()
    try:
        job = plan_job(options.inputs, options.output, options.tokenizer, options.end_of_document, options.column)
        with _progress(job.num_bytes) as advance:
            index = tokenize(job, options.processes or os.cpu_count() or 1, advance)
    except (ConfigurationError, ProcessError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(2 if isinstance(error, ConfigurationError) else 1) from None
    except KeyboardInterrupt:
        print(f"stopped: the same words go on, {options.output} keeps the shards that are done", file=sys.stderr)
        raise SystemExit(1) from None
    tokens, documents = (sum(getattr(shard, name) for shard in index.shards) for name in ("tokens", "documents"))
    print(
        f"{options.output}: {tokens:,} tokens ({index.dtype.name}, {index.tokenizer}, vocabulary {index.vocabulary}) of "
        f"{documents:,} documents in {len(index.shards)} shards, {time.monotonic() - begun:.0f} s"
    )


def _positive(word: str) -> int:
    if not word.isdecimal() or int(word) == 0:
        raise argparse.ArgumentTypeError(f"{word} is no number of processes: write 1 or more")
    return int(word)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A bar on the terminal, of which nothing stays; it is told bytes of input that are done."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = TextColumn("tokenize"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("tokenize", total=total)
        yield lambda size: progress.advance(task, size)
