"""`sampled-sae train`, `evaluate` and `sweep`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ..impl import inference_rule
from ..pages.html import PAGE
from ..pages.runs_page import read_runs, runs_page
from ..pretrained import EVALUATION
from ..sae import SampledSAE
from ..support.argument_checks import check_integer
from ..support.atomic_files import write_text
from ..support.even_slices import part_of
from ..support.output_folder import check_output_folder
from ..training.activations import Activations
from ..training.evaluation import closing_line
from ..training.feed import CALIBRATION_TOKENS
from ..training.sae_group import Opened, SAEGroup
from ..training.same_settings import identity, in_words
from ..training.sweep import run_sweep, variants
from ..training.sweep_plots import plot_sweep
from ..training.sweep_table import markdown_table
from ..training.trainer import Trainer
from ..training.training_loop import closed_logs, train_to_end
from ..training.training_run import TrainingRun
from .arguments import Command, can_plot, listed, model_arguments, pool_multiplier, seed
from .beginning import (
    activations_arguments,
    check_same_kind,
    initial_sae,
    open_activations,
    rule_arguments,
    rule_of,
)
from .closing import closing_splice, draw_layers, evaluate_at_end, evaluated
from .identity import SPLICE_ROWS, check_same_activations, splice_source
from .processes import add_rank_options
from .streaming import check_no_model, open_stream, open_swept_stream, stream_arguments, sweep_stream_arguments
from .training_options import log_place, sae_arguments, sae_config, train_arguments, train_config


def add(command: Command) -> None:
    p = command("train", train, "Train one SAE on stored activations, or one a layer on a language model at work.")
    activations_arguments(p)
    p.add_argument("out", type=Path, help="folder for checkpoint, metrics and the SAE")
    rule_arguments(p)
    sae_arguments(p)
    stream_arguments(p)
    train_arguments(p)
    p.add_argument(
        "--lanes",
        type=int,
        default=None,
        help="stretches that an epoch is cut into, for as many processes to read; those of the checkpoint, or one a "
        "process, when absent",
    )
    p.add_argument(
        "--splice-rows",
        type=int,
        default=None,
        help=f"held-out rows for the loss recovered at the end, 0 for none; {SPLICE_ROWS} when absent, where the "
        "harvested model is on this machine",
    )
    p.set_defaults(insist=False)

    p = command("evaluate", run_evaluate, "Evaluate a trained SAE on held-out activations and in the model.")
    p.add_argument("sae", type=Path, help="folder of a trained SAE; evaluation.json is written there")
    activations_arguments(p)
    p.add_argument("--batch-size", type=int, default=2048, help="tokens a batch")
    _splice_arguments(p)
    add_rank_options(p)

    p = command("sweep", sweep, "Train over l, scores and seeds at equal k, evaluate at equal L0, compare.")
    activations_arguments(p)
    p.add_argument("out", type=Path, help="folder for the runs, results.csv, results.md, report.md and plots")
    p.add_argument("--features", type=int, default=8192, help="d_sae")
    p.add_argument("--k", type=float, default=32, help="average active features a token")
    sae_arguments(p)
    p.add_argument("--ls", type=listed(pool_multiplier), default=[1.0, 4.0, 16.0, 64.0, None], help="comma-separated")
    p.add_argument("--scores", type=listed(str), default=["l2", "entropy"], help="comma-separated")
    p.add_argument("--seeds", type=listed(seed), default=[0], help="of the initial weights, comma-separated")
    p.add_argument("--order-seed", dest="seed", type=int, default=0, help="of the tokens' order, one for all SAEs")
    p.add_argument("--no-topk", action="store_true", help="leave the TopK baseline out")
    p.add_argument("--together", type=int, default=4, help="SAEs trained side by side, on the same batches")
    train_arguments(p)
    _splice_arguments(p)
    sweep_stream_arguments(p)


def _splice_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--splice-rows",
        type=int,
        default=None,
        help=f"held-out rows for spliced cross-entropy, 0 for none; {SPLICE_ROWS} when absent, none for activations "
        "without text",
    )
    model_arguments(p, None, "the one that was harvested when absent: ")
    p.add_argument("--insist", action="store_true", help="take another model, layer or source than was trained on")


def train(args: argparse.Namespace) -> None:
    """One SAE in args.out, or of several layers of a model one each in folders there."""
    mesh, on_model = args.ranks.mesh, args.model is not None
    with args.ranks.together():
        if not on_model:
            check_no_model(args)
        initial, how, log = initial_sae(args), train_config(args), log_place(args)
        parts: dict[str, Opened] = {**open_stream(args)} if on_model else {"": open_activations(args)}
        for part in parts.values():
            check_same_kind(args, initial, part)
        rule = {"seed": args.seed, **rule_of(args, initial)}
        configs = {name: sae_config(args, part, **rule) for name, part in parts.items()}
    splices = {name: closing_splice(args, part) for name, part in parts.items()}
    if len(parts) == 1:
        ((name, part),) = parts.items()
        trainer = Trainer(configs[name], how, part, args.out, args.device, mesh, args.lanes, initial, log)
        runs: dict[str, TrainingRun] = {name: trainer}
    else:
        runs = SAEGroup(configs, how, {**parts}, args.out, args.device, mesh).members
        for name, run in runs.items():
            run.show_in(log, name)
    for run in runs.values():
        print(f"{_begins(run)}: {run.sae}\nwrites to {run.folder}", flush=True)
    with closed_logs(runs.values()):
        train_to_end({str(run.folder): run for run in runs.values()}, not args.quiet)
        for name, run in runs.items():
            result = evaluate_at_end(run.sae, args, parts[name], splices[name], run.folder)
            run.log.result(result)
            draw_layers(run.sae, run.folder, parts[name], args.ranks)
            print(f"done: threshold {float(run.sae.threshold):.4g}, {closing_line(result, run.folder)}")


def _begins(run: TrainingRun) -> str:
    verb = f"Resumes at step {run.step}" if run.step else "Trains"
    return f"{verb} on {run.feed.store.where} in {run.config.precision}"


def run_evaluate(args: argparse.Namespace) -> None:
    ranks = args.ranks
    with ranks.together():
        store = open_activations(args)
        sae = SampledSAE.from_pretrained(args.sae)
        check_integer("batch_size", args.batch_size, 1)
        check_same_activations(args.sae, sae.cfg, store, args.insist)
        check_output_folder(args.sae)
        splice = splice_source(args, store)
    if not args.quiet:
        what = f"{args.sae} on the held-out part of {args.activations}"
        print(f"Evaluates {what}, writes {args.sae / EVALUATION}", flush=True)
    with ranks.together():
        held_out, _ = store.holdout()
    if ranks.mesh is not None:
        from ..distributed import parallelize  # which loads seconds of torch

        parallelize(sae, ranks.mesh)
    if inference_rule.missing(sae, sae.cfg) is not None:
        x = part_of(store.first(CALIBRATION_TOKENS)[:, : store.width_in], *ranks.data)
        found = sae.calibrate(x.to(sae.W_enc.dtype))
        print(f"The SAE has no threshold yet: {found:.4g}, calibrated to L0 = k on training activations, is used here")
    result = evaluated(sae, held_out, None if splice is None else splice.load(), args, args.sae)
    draw_layers(sae, args.sae, store, ranks)
    for name, value in result.items():
        print(f"{name}: {value}")


def sweep(args: argparse.Namespace) -> None:
    with args.ranks.together():
        if args.activations is not None:
            check_no_model(args)
        store = open_swept_stream(args) if args.activations is None else open_activations(args)
        base = sae_config(args, store, d_sae=args.features, k=args.k)
        configs = variants(base, args.ls, args.scores, args.seeds, not args.no_topk)
        how, log = train_config(args), log_place(args)
        splice = splice_source(args, store)
    name = args.activations or store.where
    print(f"Trains {len(configs)} SAEs on {name}, writes to {args.out}: {', '.join(configs)}", flush=True)
    with_plots = can_plot("plots")
    rows = run_sweep(
        configs,
        how,
        store,
        args.out,
        splice,
        progress=not args.quiet,
        say=lambda line: print(line, flush=True),
        together=args.together,
        device=args.device,
        mesh=args.ranks.mesh,
        log=log,
    )
    with args.ranks.together():
        if args.ranks.first:
            _write_report(rows, args, store, with_plots)


def _write_report(rows: list[dict[str, Any]], args: argparse.Namespace, store: Opened, with_plots: bool) -> None:
    plots = plot_sweep(rows, args.out) if with_plots else []
    report, page = args.out / "report.md", args.out / PAGE
    write_text(page, runs_page(args.out.name, read_runs(args.out), args.out))
    write_text(report, _report(rows, args, store, plots))
    print(markdown_table(rows))
    for path in (report, args.out / "results.csv", page, *plots):
        print(path)


def _report(rows: list[dict[str, Any]], args: argparse.Namespace, store: Opened, plots: list[Path]) -> str:
    about = store.manifest
    what = in_words(identity({**about, "settings": {}})) if "model" in about else "activations"
    where = about.get("source") or Path(store.where).name
    read = f"{sum(store.tokens)} distinct training tokens" if isinstance(store, Activations) else "a stream"
    heading = (
        f"# Sampled-SAE on {what}, {where}\n\n"
        f"d_in={store.d_in}, d_sae={args.features}, k={args.k:g}; {args.steps} steps of {args.batch_size} tokens from "
        f"{read}; evaluated on {rows[0]['tokens']} held-out tokens with the "
        f"threshold calibrated to L0 = k on training activations, so all rows are at equal L0.\n\n"
    )
    command = f"\nWritten by `sampled-sae {' '.join(map(str, sys.argv[1:]))}`.\n"
    return heading + markdown_table(rows) + "".join(f"\n![]({path.name})\n" for path in plots) + command
