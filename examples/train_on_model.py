"""Harvest a layer of a language model, train an SAE on it, and measure what the SAE costs the model.

    pip install "sampled-sae[lm]"
    python examples/train_on_model.py --model EleutherAI/pythia-70m --layer 3 --texts my_texts.jsonl --out runs/pythia

Without --model and --texts: a model and texts that install through pip (the README says how). Started again with the
same arguments after a kill, it goes on from where it was.
"""

import argparse
from pathlib import Path

from sampled_sae import ActivationStore, SampledSAEConfig, TrainConfig, Trainer
from sampled_sae.lm import SpliceEvaluator, harvest, load_model, shuffled_texts, special_tokens, token_rows
from sampled_sae.training.evaluation import evaluate_activations, reconstruct_with


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the activations and the SAE")
    parser.add_argument("--model", default="smollm2-135m", help="bundled, of Hugging Face, or a folder")
    parser.add_argument("--texts", default="wiki-en", help="see sampled_sae.lm.load_texts")
    parser.add_argument("--layer", type=int, default=15, help="block whose output is read, from 0")
    parser.add_argument("--rows", type=int, default=256, help="rows of tokens to run the model on")
    parser.add_argument("--context", type=int, default=128, help="tokens a row")
    parser.add_argument("--holdout-rows", type=int, default=16, help="rows kept for evaluation")
    parser.add_argument("--features", type=int, default=4096)
    parser.add_argument("--k", type=float, default=32, help="average active features a token")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=1024)
    args = parser.parse_args()

    model, tokenizer = load_model(args.model)
    rows = token_rows(shuffled_texts(args.texts, seed=0), tokenizer, args.context, limit=args.rows)
    folder = args.out / "activations"
    special = special_tokens(tokenizer, model)
    harvest(model, rows, args.layer, folder, source=args.texts, drop_tokens=special, holdout_rows=args.holdout_rows)
    store = ActivationStore.open(folder)

    # Each batch is encoded by the k * l features that score highest on it; l=None is BatchTopK.
    config = SampledSAEConfig(d_in=store.d_in, d_sae=args.features, k=args.k, l=16.0)
    train = TrainConfig(steps=args.steps, batch_size=args.batch_size, lr=3e-3)
    sae = Trainer(config, train, store, args.out / "sae").run()

    held_out, _ = store.holdout()
    result = evaluate_activations(sae, held_out)
    for name in ("fvu", "l0", "dead_share"):
        print(f"{name}: {result[name]:.4g}")

    # The model runs on the held-out rows with the layer's output replaced by its reconstruction.
    evaluator = SpliceEvaluator.of_harvest(model, store.holdout_rows(), store.manifest)
    spliced = evaluator.evaluate(reconstruct_with(sae))
    for name in ("ce_clean", "ce_spliced", "ce_zero", "loss_recovered_zero"):
        print(f"{name}: {spliced[name]:.4g}")


if __name__ == "__main__":
    main()
