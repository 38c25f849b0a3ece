"""Train an SAE on a tensor of activations that you already have.

    python examples/train_on_tensor.py --out runs/tensor

Started again with the same arguments after a kill, it goes on from the last checkpoint.
"""

import argparse
from pathlib import Path

import torch

from sampled_sae import ActivationStore, SampledSAEConfig, TrainConfig, Trainer
from sampled_sae.training.evaluation import evaluate_activations


def made_activations(n: int, d: int, directions: int = 128) -> torch.Tensor:
    """Stands for your own [n, d]: each token is a sum of few of many directions, and some noise."""
    generator = torch.Generator().manual_seed(0)
    dictionary = torch.randn(directions, d, generator=generator)
    strength = 1 + torch.rand(n, directions, generator=generator)
    active = torch.rand(n, directions, generator=generator) < 4 / directions
    return (strength * active) @ dictionary + 0.05 * torch.randn(n, d, generator=generator)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the activations and the SAE")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--holdout", type=int, default=4096, help="tokens kept for evaluation")
    parser.add_argument("--d", type=int, default=64, help="width of the activations")
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--k", type=float, default=6, help="average active features a token")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    # A generator of chunks works too, and is never held in memory whole.
    folder = args.out / "activations"
    if folder.exists():
        store = ActivationStore.open(folder)
    else:
        store = ActivationStore.write(folder, made_activations(args.tokens, args.d), holdout=args.holdout)

    # Each batch is encoded by the k * l features that score highest on it; l=None is BatchTopK.
    config = SampledSAEConfig(d_in=store.d_in, d_sae=args.features, k=args.k, l=32.0)
    train = TrainConfig(steps=args.steps, batch_size=args.batch_size, lr=1e-2)
    sae = Trainer(config, train, store, args.out / "sae", args.device).run()

    held_out, _ = store.holdout()  # as they were given: the SAE multiplies by its input_scale itself
    result = evaluate_activations(sae, held_out)
    for name in ("tokens", "fvu", "l0", "dead_share", "threshold"):
        print(f"{name}: {result[name]:.4g}")
    print(f"SAE in {args.out / 'sae'}: SampledSAE.from_pretrained reads it")


if __name__ == "__main__":
    main()
