"""The operations alone: in a layer of your own, trained by any torch optimizer, checked against the specification.

    python examples/kernels_alone.py --device cuda

On a GPU the operations are Triton kernels, elsewhere PyTorch. Neither makes the dense activations [B, F].
"""

import argparse

import torch
from torch import Tensor, nn

from sampled_sae import SparseCodes, reference, testing
from sampled_sae import functional as F


class MyLayer(nn.Module):
    """A sparse autoencoder without anything else of this package."""

    def __init__(self, d: int, features: int, **rule: object) -> None:
        super().__init__()
        self.rule = rule
        self.W_enc = nn.Parameter(torch.randn(d, features) / d**0.5)
        self.b_enc = nn.Parameter(torch.zeros(features))
        self.W_dec = nn.Parameter(self.W_enc.detach().t().clone())
        self.b_dec = nn.Parameter(torch.zeros(d))

    def forward(self, x: Tensor) -> tuple[SparseCodes, Tensor]:
        codes = F.sampled_topk(x - self.b_dec, self.W_enc, self.b_enc, **self.rule)
        return codes, F.decode(codes, self.W_dec, self.b_dec)


def check(layer: MyLayer, device: str) -> None:
    """Codes, output and all gradients against float64, at awkward shapes; an AssertionError says what differs."""

    def step(x: Tensor, *parameters: Tensor) -> tuple[SparseCodes, Tensor]:
        named = dict(zip(("W_enc", "b_enc", "W_dec", "b_dec"), parameters))
        return torch.func.functional_call(layer, named, (x,))

    for shape in testing.ODD_SHAPES:
        problem = testing.separated(testing.normal, shape, torch.float32, **layer.rule)
        tensors = {name: t.to(device) for name, t in problem.items()}
        testing.assert_matches_reference(step, tensors, **layer.rule)
        encoder = (tensors["x"] - tensors["b_dec"], tensors["W_enc"], tensors["b_enc"])
        expected = reference.column_scores(reference.encode(*(t.double() for t in encoder)), "entropy")
        torch.testing.assert_close(F.column_scores(*encoder, "entropy").double(), expected, rtol=1e-4, atol=1e-4)
        print(f"B, d, F = {shape}: as specified")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d", type=int, default=64)
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    layer = MyLayer(args.d, args.features, k=4, l=32.0).to(args.device)
    check(layer, args.device)

    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    directions = torch.randn(2 * args.d, args.d, device=args.device)
    for step in range(args.steps):
        strength = torch.rand(args.batch_size, len(directions), device=args.device)
        x = (strength * (strength > 1 - 4 / len(directions))) @ directions
        codes, x_hat = layer(x)
        loss = reference.reconstruction_loss(x, x_hat)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == args.steps - 1:
            used = F.column_scores(x - layer.b_dec, layer.W_enc, layer.b_enc, "uniform").mean()
            share = float(loss.detach() / x.square().sum(1).mean())
            print(f"step {step}: share of ||x||^2 lost {share:.3f}, L0 {codes.l0():.1f}, features used {used:.0%}")


if __name__ == "__main__":
    main()
