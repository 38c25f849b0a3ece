"""What fine-tuning changed: a crosscoder on two models that read the same texts, and the features that one lacks.

    pip install "sampled-sae[lm,plot]"
    python examples/model_diffing.py --base EleutherAI/pythia-70m --tuned me/pythia-70m-tuned --layer 3 --out runs/diff

Both need the same tokens and width. One set of features reads and reconstructs both models. The share of the tuned
model in a feature's decoder norms is 0 where only the base has it, 1 where only the tuned one has it, and about a half
where both do; then the cosine of the two rows says whether they write it alike.
"""

import argparse
from pathlib import Path

import torch

from sampled_sae import SampledSAEConfig, StackedActivations, TrainConfig, Trainer
from sampled_sae.lm import harvest_beside, load_model, shuffled_texts, special_tokens, token_rows
from sampled_sae.training.evaluation import evaluate_activations
from sampled_sae.training.layer_spread import layer_cosines, layer_shares

ALONE = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="a model bundled, of Hugging Face, or a folder")
    parser.add_argument("--tuned", required=True, help="what became of it")
    parser.add_argument("--out", type=Path, required=True, help="folder for the activations and the crosscoder")
    parser.add_argument("--texts", default="wiki-en", help="see sampled_sae.lm.load_texts")
    parser.add_argument("--layer", type=int, default=15, help="block whose output is read in both, from 0")
    parser.add_argument("--rows", type=int, default=256, help="rows of tokens to run the models on")
    parser.add_argument("--context", type=int, default=128, help="tokens a row")
    parser.add_argument("--holdout-rows", type=int, default=16, help="rows kept for evaluation")
    parser.add_argument("--features", type=int, default=4096)
    parser.add_argument("--k", type=float, default=32, help="average active features a token")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--shown", type=int, default=5, help="features of the tuned model alone that are shown")
    args = parser.parse_args()

    (base, tokenizer), (tuned, _) = load_model(args.base), load_model(args.tuned)
    rows = token_rows(shuffled_texts(args.texts, seed=0), tokenizer, args.context, limit=args.rows)
    special = special_tokens(tokenizer, base)
    how = {"source": args.texts, "drop_tokens": special, "holdout_rows": args.holdout_rows}
    # StackedActivations([...]) of stores that are there already would do as well.
    both = harvest_beside([base, tuned], rows, args.layer, args.out / "activations", **how)

    config = SampledSAEConfig(d_in=both.d_in, d_sae=args.features, k=args.k, l=None, layers=2)
    train = TrainConfig(steps=args.steps, batch_size=args.batch_size, lr=args.lr)
    sae = Trainer(config, train, both, args.out / "crosscoder").run()

    result = evaluate_activations(sae, both.holdout()[0])
    for name, fvu in zip(("fvu_base", "fvu_tuned"), result["fvu_layers"]):
        print(f"{name}: {fvu:.4g}")

    codes, ids = tokens_of(sae, both)
    counts = torch.bincount(codes.features, minlength=args.features)
    alive, share = counts > 0, layer_shares(sae)[:, 1]
    only = {"base_only": share < ALONE, "tuned_only": share > 1 - ALONE}
    shared = alive & ~only["base_only"] & ~only["tuned_only"]
    for name, mask in (*only.items(), ("shared", shared)):
        print(f"{name}: {int((mask & alive).sum())}")
    print(f"cosine_of_shared: {float(layer_cosines(sae, 0, 1)[shared].mean()):.3f}")

    found = torch.where(only["tuned_only"] & alive, counts, 0).sort(descending=True)
    for count, feature in list(zip(found.values.tolist(), found.indices.tolist()))[: args.shown]:
        if count == 0:
            break
        at = codes.features == feature
        strongest = codes.values[at].argsort(descending=True)[:50]
        words = ids[codes.tokens[at][strongest]].unique(return_counts=True)
        most = [words[0][i] for i in words[1].argsort(descending=True)[:8]]
        shown = " ".join(repr(tokenizer.decode([int(i)])) for i in most)
        print(f"feature {feature} of the tuned model: active on {count} tokens, most on {shown}")


def tokens_of(sae, both: StackedActivations):
    """(codes of the first shard, the token ids that they are of)."""
    places = both.parts[0].token_shard(0).places
    return sae.encode_sparse(both.shard(0)), places.ids


if __name__ == "__main__":
    main()
