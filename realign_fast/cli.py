"""The command `realign`: each command a few lines over the public API.

Progress and words go to stderr; the last line of stdout is one JSON object. Exit codes: 0 done, 1 the data or the
files are wrong, 2 wrong usage, 143 stopped by SIGTERM.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from ._extras import import_extra
from ._progress import say
from ._stop import EXIT_CODE, Stopped, ignore, stoppable
from ._version import __version__

# What --device says, as the calls name it.
_BACKENDS = {"cpu": "cpu", "cuda": "triton"}

# Of the processes that torchrun starts only the first has a summary.
Handler = Callable[[argparse.Namespace], dict[str, Any] | None]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and not arguments.takes_more:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.rest = rest
    with ExitStack() as stack:
        stack.enter_context(stoppable())
        if arguments.log_file is None:
            return _run(arguments)
        try:
            file = stack.enter_context(open(arguments.log_file, "a", encoding="utf-8", buffering=1))
        except OSError as error:
            say(f"realign {arguments.command}: --log-file: {_one_line(error)}")
            return 1
        log = _Log(file, arguments.command)
        stack.enter_context(redirect_stderr(_Tee(sys.stderr, log)))
        began = time.monotonic()
        code = _run(arguments, log)
        log.add("end", exit_code=code, seconds=round(time.monotonic() - began, 3))
        return code


def _run(arguments: argparse.Namespace, log: _Log | None = None) -> int:
    handler: Handler = arguments.handler
    try:
        try:
            summary = handler(arguments)
        finally:
            ignore()  # it ends
    except (OSError, ValueError, TypeError, OverflowError, ImportError, MemoryError) as error:
        say(f"realign {arguments.command}: {_one_line(error)}")
        return 1
    except KeyboardInterrupt:
        say(f"realign {arguments.command}: interrupted")
        return 130
    except Stopped as stopped:
        say(f"realign {arguments.command}: {stopped}")
        return EXIT_CODE
    if summary is None:
        return 0
    if log is not None:
        log.add("summary", summary=summary)
    print(json.dumps(summary))
    return 0 if summary.get("ok", True) else 1


class _Log:
    """A file of JSON objects, one a line: `time` (UTC), `command`, `rank` if there are several, `event` and its fields.

    Events are "message", a line that was said, "summary" and "end". Several processes may append to one file.
    """

    def __init__(self, file: TextIO, command: str) -> None:
        self._file = file
        self._fields: dict[str, Any] = {"command": command}
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            self._fields["rank"] = int(os.environ.get("RANK", "0"))

    def add(self, event: str, **fields: Any) -> None:
        """Append an event."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._file.write(json.dumps({"time": now, **self._fields, "event": event, **fields}) + "\n")


class _Tee(io.TextIOBase):
    """Stderr, and a log of its lines; no terminal, so that progress comes in lines and not as a bar."""

    def __init__(self, stderr: TextIO, log: _Log) -> None:
        self._stderr, self._log = stderr, log
        self._line = ""

    def write(self, text: str) -> int:
        self._stderr.write(text)
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            self._log.add("message", message=line)
        return len(text)

    def flush(self) -> None:
        self._stderr.flush()


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text or type(error).__name__


def _fit(arguments: argparse.Namespace) -> dict[str, Any] | None:
    from ._ranks import connected
    from .alignment import fit

    names = ("refine", "sigma", "shrinkage", "strength", "kind", "energy", "k")
    options = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    with connected() as ranks:
        _check_output_file(arguments.output)
        _say_where_it_begins(arguments, ranks.first)
        alignment = fit(
            arguments.text,
            arguments.image,
            method=arguments.method,
            on_bad_rows=arguments.on_bad_rows,
            backend=_BACKENDS[arguments.device],
            num_threads=ranks.threads(arguments.threads),
            text_column=arguments.text_column or arguments.embedding_column,
            image_column=arguments.image_column or arguments.embedding_column,
            limit=arguments.limit,
            encoder=arguments.encoder,
            progress=ranks.first,
            ranks=ranks,
            output=arguments.output,
            resume=arguments.resume,
            **options,
        )
        if not ranks.first:
            return None
    report = alignment.report
    if "selection" in report:
        chosen, selection = report["options"], report["selection"]
        known = selection["reliability"]
        say(
            f"chose strength {chosen['strength']:g}, shrinkage {chosen['shrinkage']:g}: the covariances differ by "
            f"{selection['difference']:.2g} of the target's"
            + ("" if known is None else f", the map is known to {known:.0%}")
        )
    before, held_out = report["gap"]["before"], report["held_out"]
    if held_out is None:
        say(f"gap before {before:.4g}; too few rows for a held-out check")
    else:
        after = list(held_out["gap"].values())[-1]
        say(f"gap before {before:.4g}, after {after:.4g} on held-out rows (noise floor {held_out['noise_floor']:.2g})")
    return {"command": "fit", "output": str(arguments.output), **report}


def _stats(arguments: argparse.Namespace) -> dict[str, Any] | None:
    from ._ranks import connected
    from .alignment import gather_moments

    with connected() as ranks:
        _check_output_file(arguments.output)
        _say_where_it_begins(arguments, ranks.first)
        moments = gather_moments(
            arguments.path,
            name="path",
            on_bad_rows=arguments.on_bad_rows,
            backend=_BACKENDS[arguments.device],
            num_threads=ranks.threads(arguments.threads),
            column=arguments.embedding_column,
            limit=arguments.limit,
            progress=ranks.first,
            covariance=arguments.covariance,
            precision=arguments.precision,
            ranks=ranks,
            output=arguments.output,
            resume=arguments.resume,
        )
        if not ranks.first:
            return None
    return {"command": "stats", "output": str(arguments.output), **_describe_moments(moments)}


def _merge(arguments: argparse.Namespace) -> dict[str, Any]:
    from .moments import Moments

    _check_output_file(arguments.output)
    merged = Moments.load(arguments.parts[0])
    for path in arguments.parts[1:]:
        part = Moments.load(path)
        with _naming(path):
            merged.merge(part)
    for path in arguments.subtract:
        part = Moments.load(path)
        with _naming(path):
            merged = merged - part
    if merged.count == 0:
        raise ValueError(f"nothing is left for {arguments.output}")
    merged.save(arguments.output)
    return {"command": "merge", "output": str(arguments.output), **_describe_moments(merged)}


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Say of which file a ValueError speaks."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _apply(arguments: argparse.Namespace) -> dict[str, Any] | None:
    from ._ranks import connected
    from .alignment import Alignment, apply_files

    with connected() as ranks:
        summary = apply_files(
            Alignment.load(arguments.alignment),
            arguments.text,
            arguments.output,
            dtype=arguments.dtype,
            format=arguments.format,
            side=arguments.side,
            noise_std=arguments.noise_std,
            seed=arguments.seed,
            on_bad_rows=arguments.on_bad_rows,
            column=arguments.text_column or arguments.embedding_column,
            id_column=arguments.id_column,
            resume=arguments.resume,
            overwrite=arguments.overwrite,
            backend=_BACKENDS[arguments.device],
            num_threads=ranks.threads(arguments.threads),
            progress=ranks.first,
            ranks=ranks,
        )
        if not ranks.first:
            return None
    return {"command": "apply", "output": str(arguments.output), **summary}


def _convert(arguments: argparse.Namespace) -> dict[str, Any]:
    from .io.writer import convert

    summary = convert(
        arguments.input,
        arguments.output,
        format=arguments.format,
        column=arguments.embedding_column,
        id_column=arguments.id_column,
        resume=arguments.resume,
        overwrite=arguments.overwrite,
        progress=True,
    )
    return {"command": "convert", "output": str(arguments.output), **summary}


def _inspect(arguments: argparse.Namespace) -> dict[str, Any]:
    from . import _files
    from .alignment import Alignment
    from .io.sources import open_source
    from .moments import Moments
    from .whitening import Whitener
    from .window import MomentsWindow

    path = Path(arguments.file)
    kind = _files.kind_of(path) if path.is_file() and path.suffix == ".safetensors" else None
    if kind == "alignment":
        described = _describe_alignment(Alignment.load(path))
    elif kind == "moments":
        described = {"kind": kind, **_describe_moments(Moments.load(path))}
    elif kind == "window":
        window = MomentsWindow.load(path)
        described = {"kind": kind, "size": window.size, "parts": len(window), "names": window.names}
        total = window.total
        described |= _describe_moments(total) if total.count else {"dim": total.dim}
    elif kind == "whitener":
        whitener = Whitener.load(path)
        described = {"kind": kind, "whitening": whitener.kind, "dim": whitener.dim, "out_dim": len(whitener.matrix)}
        described |= {"rows": whitener.count, "shrinkage": whitener.shrinkage}
    else:
        source = open_source(path, name="file", column=arguments.embedding_column)
        described = {"kind": "embeddings", "rows": source.num_rows, "dim": source.dim, "dtype": source.dtype}
    for name, value in described.items():
        say(f"{name}: {json.dumps(value)}")
    return {"command": "inspect", "file": str(path), **described}


def _verify(arguments: argparse.Namespace) -> dict[str, Any]:
    from .io.writer import verify

    summary = verify(arguments.directory)
    for problem in summary["problems"]:
        say(f"realign verify: {problem}")
    return {"command": "verify", "directory": str(arguments.directory), **summary}


def _bench(arguments: argparse.Namespace) -> dict[str, Any]:
    from .benchmark import run

    if arguments.json is not None:
        _check_output_file(arguments.json)
    result = run(quick=arguments.quick)
    if arguments.json is not None:
        Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n")
    return {"command": "bench", **result}


def _report(arguments: argparse.Namespace) -> dict[str, Any]:
    from .geometry.report import report

    names = [name for name, _, _ in arguments.domain]
    if len(set(names)) < len(names):
        raise ValueError(f"--domain: each needs a name of its own, got {', '.join(names)}")
    found = report(
        arguments.text,
        arguments.image,
        arguments.output,
        alignment=arguments.alignment,
        methods=arguments.methods,
        paired=arguments.paired,
        domains={name: (text, image) for name, text, image in arguments.domain},
        num_rows=arguments.rows,
        k=arguments.k,
        num_centroids=arguments.centroids,
        seed=arguments.seed,
        on_bad_rows=arguments.on_bad_rows,
        num_threads=arguments.threads,
        text_column=arguments.text_column or arguments.embedding_column,
        image_column=arguments.image_column or arguments.embedding_column,
        limit=arguments.limit,
        overwrite=arguments.overwrite,
        progress=True,
    )
    for part in found["verdict"]:
        say(f"{part['title']}: {part['text']}")
    for note in found["notes"]:
        say(f"realign report: {note}")
    methods = {
        entry["name"]: {"gap": entry["gap"]["value"], **{name: entry[name]["value"] for name in ("mixing", "overlap")}}
        for entry in found["methods"]
    }
    page = str(Path(arguments.output) / "report.html")
    verdict = {part["title"]: part["level"] for part in found["verdict"]}
    return {"command": "report", "output": page, "verdict": verdict, "methods": methods}


def _export(arguments: argparse.Namespace) -> dict[str, Any]:
    from .alignment import Alignment
    from .export import save

    _check_output_file(arguments.output)
    alignment = Alignment.load(arguments.alignment)
    save(alignment, arguments.output, arguments.to, side=arguments.side)
    size = Path(arguments.output).stat().st_size
    return {"command": "export", "output": str(arguments.output), "to": arguments.to, "bytes": size}


def _embed(arguments: argparse.Namespace) -> dict[str, Any]:
    from .encode import ImageEncoder, TextEncoder, embed_images, embed_texts

    if not sys.stderr.isatty():
        import_extra("transformers", "embedding", "train").utils.logging.disable_progress_bar()
    encoder_options = {
        "device": arguments.device,
        "trust_remote_code": arguments.trust_remote_code,
        "batch_size": arguments.batch_size,
    }
    options = {
        "dtype": arguments.dtype,
        "shard_rows": arguments.shard_rows,
        "on_bad_rows": arguments.on_bad_rows,
        "resume": arguments.resume,
        "overwrite": arguments.overwrite,
        "progress": True,
    }
    if arguments.texts is not None:
        columns = {"id_column": arguments.id_column, "text_column": arguments.text_column}
        text_encoder = TextEncoder(arguments.model, **encoder_options)
        summary = embed_texts(text_encoder, arguments.texts, arguments.output, **columns, **options)
    else:
        image_encoder = ImageEncoder(arguments.model, **encoder_options)
        summary = embed_images(image_encoder, arguments.images, arguments.output, **options)
    for line in summary["left_out"]:
        say(f"realign embed: left out {line}")
    return {"command": "embed", "output": str(arguments.output), **summary}


def _demo(arguments: argparse.Namespace) -> dict[str, Any]:
    from .demo.run import run

    summary = run(arguments.output, overwrite=arguments.overwrite)
    return {"command": "demo", "output": str(arguments.output), **summary}


def _stage(arguments: argparse.Namespace) -> dict[str, Any] | None:
    import_extra("transformers", f"realign {arguments.command}", extra="train")
    from .revision.training import run_stage

    summary = run_stage(arguments.command, arguments.rest)
    return None if summary is None else {"command": arguments.command, **summary}


def _generate(arguments: argparse.Namespace) -> dict[str, Any]:
    import_extra("transformers", "realign generate", extra="train")
    from .revision.generation import generate

    _check_output_file(arguments.output)
    names = ["embeddings", "images", "encoder", "index", "alignment", "prompt", "chat_template", "batch_size"]
    names += ["device", "dtype", "trust_remote_code", "max_new_tokens", "num_beams"]
    options = {name: getattr(arguments, name) for name in names}
    summary = generate(arguments.model, arguments.output, progress=True, **options)
    return {"command": "generate", "output": str(arguments.output), **summary}


def _say_where_it_begins(arguments: argparse.Namespace, first: bool) -> None:
    from ._checkpoint import path_beside

    path = path_beside(arguments.output)
    if first and arguments.resume and not path.exists():
        say(f"there is no {path} to go on from: {arguments.command} begins at the start")


def _check_output_file(path: str) -> None:
    """Refuse, before hours of reading, an output that could not be written after them."""
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(f"output {path} is a directory, expected a file name")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"output {path}: there is no directory {target.parent}")


def _describe_moments(moments: Any) -> dict[str, Any]:
    return {
        "dim": moments.dim,
        "rows": moments.count,
        "bad_rows": moments.num_zero + moments.num_skipped,
        "trace": moments.trace,
        "covariance": moments.has_covariance,
    }


def _describe_alignment(alignment: Any) -> dict[str, Any]:
    return {
        "kind": "alignment",
        "dim": alignment.dim,
        "matrix": alignment.parameters.affine is not None,
        "scale": alignment.parameters.scale,
        "encoder": alignment.encoder,
        "fingerprint": alignment.fingerprint,
        **alignment.report,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="realign",
        description="Close the modality gap: fit an alignment of text embeddings to image embeddings, and apply it.",
    )
    parser.add_argument("--version", action="version", version=f"realign-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, handler: Handler, text: str, *, takes_more: bool = False) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name, help=text, description=text, add_help=not takes_more, allow_abbrev=not takes_more
        )
        added.set_defaults(handler=handler, takes_more=takes_more)
        added.add_argument(
            "--log-file", metavar="FILE", help="append messages, progress and the summary there too, as lines of JSON"
        )
        return added

    fit = command("fit", _fit, "fit an alignment of TEXT to IMAGE")
    fit.add_argument("text", metavar="TEXT", help="file, directory or glob of text embeddings")
    fit.add_argument("image", metavar="IMAGE", help="file, directory or glob of image embeddings")
    fit.add_argument("-o", "--output", required=True, metavar="FILE", help="alignment to write (.safetensors)")
    fit.add_argument(
        "--method",
        default="realign",
        help="realign (default), anchor, anchor_trace, c3, center, whiten, debias, coral, bca or ot",
    )
    fit.add_argument("--refine", type=_count, metavar="K", help="Newton steps on the centroid, each reads TEXT again")
    fit.add_argument("--sigma", type=float, metavar="STD", help="c3: noise of an element of a row of length one")
    fit.add_argument(
        "--shrinkage",
        type=_number_or_name,
        metavar="S",
        help="whiten, coral, bca, ot: weight of the identity in the covariances, from 0 to 1, ledoit_wolf or oas",
    )
    fit.add_argument(
        "--strength", type=_number_or_name, metavar="S", help="ot: from 0, the trace scale, to 1, or auto (default)"
    )
    fit.add_argument("--kind", help="whiten: zca (default), pca or cholesky")
    fit.add_argument("--energy", type=float, metavar="E", help="bca: share of variance in its first block")
    fit.add_argument("-k", type=_positive, metavar="K", help="debias: directions to leave out")
    fit.add_argument("--encoder", help="name of the encoder, kept in the file")
    _add_resume(fit)
    _add_bad_rows(fit, ("raise", "skip", "zero"))
    _add_limit(fit)
    _add_columns(fit, text=True, image=True)
    _add_threads(fit)

    stats = command("stats", _stats, "gather the moments of PATH")
    stats.add_argument("path", metavar="PATH", help="file, directory or glob of embeddings")
    stats.add_argument("-o", "--output", required=True, metavar="FILE", help="moments to write (.safetensors)")
    stats.add_argument("--covariance", action="store_true", help="for whitening and the maps with a matrix")
    stats.add_argument("--precision", choices=("exact", "high", "fast"), default="high", help="of the covariance")
    _add_resume(stats)
    _add_bad_rows(stats, ("raise", "skip", "zero"))
    _add_limit(stats)
    _add_columns(stats)
    _add_threads(stats)

    merge = command("merge", _merge, "add up moments gathered apart, and take some out")
    merge.add_argument("parts", nargs="+", metavar="MOMENTS")
    merge.add_argument(
        "--subtract", nargs="+", default=[], metavar="MOMENTS", help="take these parts out again: rows that have gone"
    )
    merge.add_argument("-o", "--output", required=True, metavar="FILE")

    apply = command("apply", _apply, "map every file of TEXT into a directory")
    apply.add_argument("alignment", metavar="ALIGNMENT")
    apply.add_argument("text", metavar="TEXT", help="file, directory or glob of embeddings")
    apply.add_argument("-o", "--output", required=True, metavar="DIR")
    apply.add_argument("--dtype", choices=("float16", "bfloat16", "float32", "float64"), help="default: as the input")
    apply.add_argument("--side", choices=("source", "target"), default="source", help="map text rows, or image rows")
    apply.add_argument("--noise-std", type=float, metavar="STD", help="Gaussian noise; default: the map's own (c3)")
    apply.add_argument("--seed", type=_count, default=0, help="of the noise (default: 0)")
    _add_bad_rows(apply, ("raise", "zero"))
    _add_format(apply, ("same", "npy", "parquet", "safetensors", "pickle"), "same")
    _add_existing(apply)
    _add_columns(apply, text=True)
    _add_id_column(apply)
    _add_threads(apply)

    convert = command("convert", _convert, "write embeddings in another format")
    convert.add_argument("input", metavar="IN", help="file, directory or glob of embeddings")
    convert.add_argument("-o", "--output", required=True, metavar="DIR")
    _add_format(convert, ("npy", "parquet", "safetensors", "pickle"), None)
    _add_existing(convert)
    _add_columns(convert)
    _add_id_column(convert)

    inspect = command("inspect", _inspect, "say what an alignment, moments, a window, a whitener or a shard holds")
    inspect.add_argument("file", metavar="FILE")
    _add_columns(inspect)

    verify = command("verify", _verify, "check an output directory against its manifest")
    verify.add_argument("directory", metavar="DIR")

    report = command("report", _report, "measure an alignment on rows it was not fitted on, and write a page")
    report.add_argument("text", metavar="TEXT", help="file, directory or glob of embeddings")
    report.add_argument("image", metavar="IMAGE")
    report.add_argument("-o", "--output", required=True, metavar="DIR", help="gets report.html, report.json and plots")
    report.add_argument("--alignment", metavar="FILE", help="one fitted elsewhere, to be measured too")
    report.add_argument(
        "--methods", type=_names, default=["realign"], metavar="A,B", help="to fit and compare (default: realign)"
    )
    report.add_argument("--paired", action="store_true", help="row i of TEXT belongs to row i of IMAGE")
    report.add_argument(
        "--domain", nargs=3, action="append", default=[], metavar=("NAME", "TEXT", "IMAGE"),
        help="further sets: does a fit here hold there",
    )  # fmt: skip
    report.add_argument(
        "--rows", type=_positive, default=20_000, metavar="N", help="a side, for neighbours and tests (default: 20000)"
    )
    report.add_argument("--k", type=_positive, default=20, help="neighbours for the mixing (default: 20)")
    report.add_argument("--centroids", type=_positive, default=64, metavar="N", help="of the images (default: 64)")
    report.add_argument("--seed", type=_count, default=0, help="of all draws (default: 0)")
    report.add_argument("--overwrite", action="store_true", help="write into a directory that is not empty")
    _add_bad_rows(report, ("raise", "skip"))
    _add_limit(report)
    _add_columns(report, text=True, image=True)
    report.add_argument("--threads", type=_positive, metavar="N", help="default: the cores this process may use")

    bench = command("bench", _bench, "time the kernels against this machine's read and copy speed")
    bench.add_argument("--json", metavar="FILE", help="also write the result there")
    bench.add_argument("--quick", action="store_true", help="one dimension and small sizes, for a first look")

    export = command("export", _export, "write an alignment for FAISS or ONNX")
    export.add_argument("alignment", metavar="ALIGNMENT")
    export.add_argument("--to", required=True, choices=("faiss", "onnx"))
    export.add_argument("-o", "--output", required=True, metavar="FILE")
    export.add_argument("--side", choices=("source", "target"), default="source", help="the map of text, or of images")

    embed = command("embed", _embed, "embed texts or images by a dual encoder, such as CLIP or SigLIP, into shards")
    embed.add_argument("--model", required=True, metavar="NAME", help="of a model of transformers, or its directory")
    items = embed.add_mutually_exclusive_group(required=True)
    items.add_argument("--texts", metavar="FILE", help=".txt (one a line), .jsonl, .json, .csv or .parquet")
    items.add_argument("--images", metavar="DIR", help="with images in it and below it")
    embed.add_argument("-o", "--output", required=True, metavar="DIR")
    embed.add_argument("--batch-size", type=_positive, default=64, metavar="N", help="at once (default: 64)")
    embed.add_argument("--dtype", choices=("float16", "float32"), default="float32", help="of the rows written")
    embed.add_argument("--shard-rows", type=_positive, default=10_000, metavar="N", help="default: 10000")
    _add_device(embed)
    embed.add_argument("--trust-remote-code", action="store_true", help="run code from the model's repository")
    embed.add_argument(
        "--text-column", metavar="NAME", help="default: caption, or the first answer in conversations, or text"
    )
    embed.add_argument(
        "--on-bad-rows",
        choices=("raise", "skip"),
        default="raise",
        help="empty texts, broken images, embeddings that are zero or not finite",
    )
    _add_id_column(embed)
    _add_existing(embed)

    # Their flags, and what --help says, are those of transformers' TrainingArguments and ours: known once it is loaded.
    command("pretrain", _stage, "stage 1: train a projector on aligned text, before a frozen model", takes_more=True)
    command("finetune", _stage, "stage 2: train projector and language model on real images", takes_more=True)

    generate = command("generate", _generate, "what a trained model says of images, as lines of JSON")
    generate.add_argument("--model", required=True, metavar="DIR", help="that a stage has written")
    images = generate.add_mutually_exclusive_group(required=True)
    images.add_argument("--embeddings", metavar="PATH", help="of images: file, directory, glob or URL")
    images.add_argument("--images", metavar="DIR", help="images, for --encoder")
    generate.add_argument("--encoder", metavar="MODEL", help="the dual encoder the projector was trained on")
    generate.add_argument("-o", "--output", required=True, metavar="FILE", help="gets a line for each image: id, text")
    generate.add_argument("--index", metavar="FILE", help="holds, or will hold, the ids of the embeddings")
    generate.add_argument("--alignment", metavar="FILE", help="default: the one beside the model, if any")
    generate.add_argument("--prompt", default="", help="asked after the image")
    generate.add_argument("--chat-template", metavar="FILE", help="or plain; default: the tokenizer's own")
    generate.add_argument("--max-new-tokens", type=_positive, default=64, metavar="N", help="default: 64")
    generate.add_argument("--num-beams", type=_positive, default=1, metavar="N", help="default: 1")
    generate.add_argument("--batch-size", type=_positive, default=16, metavar="N", help="default: 16")
    generate.add_argument("--device", default="cpu", help="default: cpu")
    generate.add_argument("--dtype", default="auto", help="of the model; default: as it is stored")
    generate.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the encoder")

    demo = command("demo", _demo, "the whole job on embeddings it makes itself, in about two minutes")
    demo.add_argument("-o", "--output", default="realign-demo", metavar="DIR", help="default: realign-demo")
    demo.add_argument("--overwrite", action="store_true", help="replace what an earlier demo wrote")
    return parser


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {value}")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _number_or_name(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _add_bad_rows(parser: argparse.ArgumentParser, choices: Sequence[str]) -> None:
    parser.add_argument("--on-bad-rows", choices=choices, default="raise", help="rows with NaN, infinity or norm zero")


def _add_limit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--limit", type=_positive, metavar="ROWS", help="read at most so many rows of each side")


def _add_columns(parser: argparse.ArgumentParser, *, text: bool = False, image: bool = False) -> None:
    parser.add_argument(
        "--embedding-column", metavar="NAME", help="default: embedding (embed in pickles, the only .npy in tars)"
    )
    if text:
        parser.add_argument("--text-column", metavar="NAME", help="the same, for TEXT alone")
    if image:
        parser.add_argument("--image-column", metavar="NAME", help="the same, for IMAGE alone")


def _add_id_column(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--id-column", default="id", metavar="NAME", help="default: id")


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=tuple(_BACKENDS), default="cpu", help="where to compute; cuda: also ROCm")


def _add_threads(parser: argparse.ArgumentParser) -> None:
    _add_device(parser)
    parser.add_argument("--threads", type=_positive, metavar="N", help="default: the cores this process may use")


def _add_format(parser: argparse.ArgumentParser, choices: Sequence[str], default: str | None) -> None:
    parser.add_argument("--format", choices=choices, default=default, required=default is None)


def _add_resume(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--resume", action="store_true", help="go on where an earlier run ended")


def _add_existing(parser: argparse.ArgumentParser) -> None:
    existing = parser.add_mutually_exclusive_group()
    _add_resume(existing)
    existing.add_argument("--overwrite", action="store_true", help="replace what an earlier run wrote")
