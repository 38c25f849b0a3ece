"""`sampled-sae train`, `evaluate` and `sweep`."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..config import SCREENS, SampledSAEConfig
from ..distributed import parallelize
from ..impl import inference_rule
from ..pages.html import PAGE
from ..pages.runs_page import read_runs, runs_page
from ..pretrained import EVALUATION
from ..sae import SampledSAE
from ..support.argument_checks import check_integer
from ..support.atomic_files import write_json, write_text
from ..support.output_folder import check_output_folder
from ..training.activation_stream import StreamedActivations
from ..training.activations import Activations
from ..training.batches import CALIBRATION_TOKENS
from ..training.closing_line import closing_line
from ..training.evaluation import part_of
from ..training.sae_group import SAEGroup
from ..training.same_settings import identity, in_words
from ..training.sweep import evaluate, run_sweep, variants
from ..training.sweep_plots import plot_sweep
from ..training.sweep_table import markdown_table
from ..training.train_config import TrainConfig
from ..training.trainer import Trainer
from ..training.training_loop import closed_logs, train_to_end
from ..training.training_run import TrainingRun
from .arguments import Command, listed, model_arguments, pool_multiplier, seed, whole_number
from .beginning import activations_arguments, initial_sae, open_activations, rule_arguments, rule_of
from .closing import closing_splice, draw_layers, evaluate_at_end
from .identity import SPLICE_ROWS, check_same_activations, splice_source
from .logs import add_log_options, log_place
from .processes import add_rank_options
from .streaming import check_no_model, evaluate_streamed, open_stream, stream_arguments


def add(command: Command) -> None:
    p = command("train", train, "Train one SAE on stored activations, or one a layer on a language model at work.")
    activations_arguments(p)
    p.add_argument("out", type=Path, help="folder for checkpoint, metrics and the SAE")
    rule_arguments(p)
    _sae_arguments(p)
    stream_arguments(p)
    _train_arguments(p)
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
    _sae_arguments(p)
    p.add_argument("--ls", type=listed(pool_multiplier), default=[1.0, 4.0, 16.0, 64.0, None], help="comma-separated")
    p.add_argument("--scores", type=listed(str), default=["l2", "entropy"], help="comma-separated")
    p.add_argument("--seeds", type=listed(seed), default=[0], help="of the initial weights, comma-separated")
    p.add_argument("--order-seed", dest="seed", type=int, default=0, help="of the tokens' order, one for all SAEs")
    p.add_argument("--no-topk", action="store_true", help="leave the TopK baseline out")
    p.add_argument("--together", type=int, default=4, help="SAEs trained side by side, on the same batches")
    _train_arguments(p)
    _splice_arguments(p)


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


def _sae_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--aux-coefficient", type=float, default=1 / 32, help="weight of the dead-feature loss")
    p.add_argument("--pool-every", type=int, default=1, help="steps for which a candidate pool is kept")
    p.add_argument("--score-tokens", type=float, default=1.0, help="share of the tokens that the scores look at")
    p.add_argument("--dead-after", type=int, default=10_000_000, help="tokens unselected that make a feature dead")
    p.add_argument(
        "--groups",
        type=listed(whole_number),
        default=None,
        help="a Matryoshka SAE: numbers of features, ascending, comma-separated, that each reconstruct on their own; "
        "all of them come last",
    )
    p.add_argument("--skip", action="store_true", help="a transcoder adds a linear function of what it reads")
    p.add_argument("--screen", choices=SCREENS, default="auto", help="look through bfloat16 products; same results")
    p.add_argument("--impl", default="auto", help="auto, triton, torch or reference")


def _train_arguments(p: argparse.ArgumentParser) -> None:
    text = {
        "steps": "batches to train on",
        "batch_size": "tokens a batch",
        "lr": "peak learning rate",
        "warmup": "share of the steps over which lr rises",
        "decay": "share of the steps over which lr falls at the end",
        "clip": "largest gradient norm",
        "adam": "rows without gradient: dense (they move on, as in torch), lazy or decayed (they stand still)",
        "moments": "dtype of Adam's moments, float32 or bfloat16",
        "precision": "of the operands of products: bf16, tf32, fp32, or auto: bf16 on a GPU, fp32 without one",
        "seed": "of weights and token order",
        "checkpoint_every": "steps between checkpoints",
        "log_every": "steps between lines of metrics.jsonl",
        "k_start": "k of the first step, which goes linearly to --k; --k itself when absent",
        "l_start": "l of the first step, which goes linearly to --l; --l itself when absent",
        "schedule_steps": "steps until k and l are those of the SAE, with --k-start or --l-start",
    }
    for field in fields(TrainConfig):
        if field.name == "seed" and p.prog.endswith("sweep"):
            continue
        name = "--" + field.name.replace("_", "-")
        kind = type(field.default) if field.default is not None else int if field.name == "schedule_steps" else float
        p.add_argument(name, type=kind, default=field.default, help=text[field.name])
    add_log_options(p)
    p.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N; of several processes, cuda gives each its own")
    add_rank_options(p)


def _sae_config(args: argparse.Namespace, store: Activations | StreamedActivations, **rule: Any) -> SampledSAEConfig:
    if args.groups is not None:
        everything = rule["d_sae"]
        rule["groups"] = args.groups if everything in args.groups[-1:] else [*args.groups, everything]
    return SampledSAEConfig(
        d_in=store.d_in,
        d_out=store.d_out,
        layers=store.layers,
        skip=args.skip or rule.pop("skip", False),
        aux_coefficient=args.aux_coefficient,
        pool_every=args.pool_every,
        score_tokens=args.score_tokens,
        dead_after=args.dead_after,
        screen=args.screen,
        impl=args.impl,
        **rule,
    )


def _train_config(args: argparse.Namespace) -> TrainConfig:
    values: dict[str, Any] = {f.name: getattr(args, f.name, f.default) for f in fields(TrainConfig)}
    return TrainConfig(**values)


def train(args: argparse.Namespace) -> None:
    if args.model is not None:
        return _train_on_model(args)
    with args.ranks.together():
        check_no_model(args)
        store, initial = open_activations(args), initial_sae(args)
        config = _sae_config(args, store, seed=args.seed, **rule_of(args, initial))
        how, log, source = _train_config(args), log_place(args), closing_splice(args, store)
    trainer = Trainer(config, how, store, args.out, args.device, args.ranks.mesh, args.lanes, initial, log)
    print(f"{_begins(trainer)}: {trainer.sae}\nwrites to {args.out}", flush=True)
    with closed_logs([trainer]):
        sae = trainer.run(progress=not args.quiet)
        result = evaluate_at_end(sae, args, store, source)
        trainer.log.result(result)
    draw_layers(sae, args.out, store, args.ranks)
    print(f"done: threshold {float(sae.threshold):.4g}, {closing_line(result, args.out)}")


def _train_on_model(args: argparse.Namespace) -> None:
    """One SAE in args.out, or one a layer in folders there."""
    initial, how, log = initial_sae(args), _train_config(args), log_place(args)
    parts = open_stream(args)
    rule = {"seed": args.seed, **rule_of(args, initial)}
    configs = {name: _sae_config(args, part, **rule) for name, part in parts.items()}
    if len(parts) == 1:
        ((name, part),) = parts.items()
        runs: dict[Path, TrainingRun] = {
            args.out: Trainer(configs[name], how, part, args.out, args.device, None, args.lanes, initial, log)
        }
    else:
        group = SAEGroup(configs, how, {**parts}, args.out, args.device)
        runs = {args.out / name: run for name, run in group.members.items()}
        for name, run in group.members.items():
            run.show_in(log, name)
    for folder, run in runs.items():
        print(f"{_begins(run)}: {run.sae}\nwrites to {folder}", flush=True)
    with closed_logs(runs.values()):
        train_to_end({str(folder): run for folder, run in runs.items()}, not args.quiet)
        for (folder, run), part in zip(runs.items(), parts.values()):
            result = evaluate_streamed(run.sae, args, part, folder)
            run.log.result(result)
            print(f"done: threshold {float(run.sae.threshold):.4g}, {closing_line(result, folder)}")


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
    target = args.sae / EVALUATION
    if not args.quiet:
        print(f"Evaluates {args.sae} on the held-out part of {args.activations}, writes {target}", flush=True)
    with ranks.together():
        held_out, _ = store.holdout()
    if ranks.mesh is not None:
        parallelize(sae, ranks.mesh)
    if inference_rule.missing(sae, sae.cfg) is not None:
        found = sae.calibrate(part_of(store.first(CALIBRATION_TOKENS)[:, : store.width_in], ranks).to(sae.W_enc.dtype))
        print(f"The SAE has no threshold yet: {found:.4g}, calibrated to L0 = k on training activations, is used here")
    result = evaluate(sae, held_out, args.batch_size, None if splice is None else splice.load())
    with ranks.together():
        if ranks.first:
            write_json(target, result)
    draw_layers(sae, args.sae, store, ranks)
    for name, value in result.items():
        print(f"{name}: {value}")


def sweep(args: argparse.Namespace) -> None:
    with args.ranks.together():
        store = open_activations(args)
        base = _sae_config(args, store, d_sae=args.features, k=args.k)
        configs = variants(base, args.ls, args.scores, args.seeds, not args.no_topk)
        how, log = _train_config(args), log_place(args)
        splice = splice_source(args, store)
    print(
        f"Trains {len(configs)} SAEs on {args.activations}, writes to {args.out}: {', '.join(configs)}",
        flush=True,
    )
    with_plots = importlib.util.find_spec("matplotlib") is not None
    if not with_plots:
        print('No plots without matplotlib: pip install "sampled-sae[plot]"', flush=True)
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


def _write_report(rows: list[dict[str, Any]], args: argparse.Namespace, store: Activations, with_plots: bool) -> None:
    plots = plot_sweep(rows, args.out) if with_plots else []
    report, page = args.out / "report.md", args.out / PAGE
    write_text(page, runs_page(args.out.name, read_runs(args.out), args.out))
    write_text(report, _report(rows, args, store, plots))
    print(markdown_table(rows))
    for path in (report, args.out / "results.csv", page, *plots):
        print(path)


def _report(rows: list[dict[str, Any]], args: argparse.Namespace, store: Activations, plots: list[Path]) -> str:
    about = store.manifest
    what = in_words(identity({**about, "settings": {}})) if "model" in about else "activations"
    where = about.get("source") or Path(store.where).name
    heading = (
        f"# Sampled-SAE on {what}, {where}\n\n"
        f"d_in={store.d_in}, d_sae={args.features}, k={args.k:g}; {args.steps} steps of {args.batch_size} tokens from "
        f"{sum(store.tokens)} distinct training tokens; evaluated on {rows[0]['tokens']} held-out tokens with the "
        f"threshold calibrated to L0 = k on training activations, so all rows are at equal L0.\n\n"
    )
    command = f"\nWritten by `sampled-sae {' '.join(map(str, sys.argv[1:]))}`.\n"
    return heading + markdown_table(rows) + "".join(f"\n![]({path.name})\n" for path in plots) + command
