"""The peers' own tests, as they are and on our step: how many pass, and what passes only as it is.

`python tests/peers/suites.py sparsify=FOLDER saelens@RELEASE=FOLDER`, each the folder that holds the peer's `tests`,
writes benchmarks/results/peer_suites.json and .md. Run it with the Python of .venv/peers. `make test` gets sparsify's
tests from its source distribution. SAELens' has none: check a release out, and say which if it is not the installed
one. Without a GPU sparsify's tests run with "cuda" replaced by "cpu". What needs the network or a GPU fails in both.
"""

from __future__ import annotations

import collections
import json
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "peer_suites.json"
# distribution, files of tests that concern what is replaced
SUITES = {
    "saelens": (
        "sae-lens",
        [
            *(
                f"tests/saes/test_{name}.py"
                for name in ("topk_sae", "batchtopk_sae", "matryoshka_batchtopk_sae", "sae")
            ),
            *(f"tests/training/test_{name}.py" for name in ("sae_trainer", "activation_scaler")),
            "tests/test_registry.py",
        ],
    ),
    # test_encode multiplies 8192 x 1024 x 131072
    "sparsify": (
        "eai-sparsify",
        [f"tests/test_{name}.py" for name in ("auxk_loss", "decode", "micro_acc_steps", "multiple_saes")],
    ),
}
# why a test that passes as it is does not on our step, by the end of its name
LARGE_K = "constructs a TopK SAE with k=100 and 10 features, which is refused at once and not in the first step"
DIFFERENCES = {
    "test_TopKSAE_fold_W_dec_norm_works_when_rescale_acts_by_decoder_norm_is_True": LARGE_K,
    "test_TopKSAE_fold_W_dec_norm_errors_when_rescale_acts_by_decoder_norm_is_False": LARGE_K,
    "test_BatchTopKTrainingSAE_save_and_load_inference_sae": "compares to the last bit at the threshold, the smallest "
    "kept activation of a step, which is summed in another order",
    "test_MatryoshkaBatchTopKTrainingSAE_matches_dictionary_learning": "asks for dense feature_acts; they are COO",
}


def outcomes(suite: str, folder: Path, ours: bool) -> dict[str, str]:
    """{test: "passed", "failed" or "skipped"} of one run in a copy of the folder."""
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copytree(folder / "tests", Path(scratch) / "tests")
        if suite == "sparsify":
            for path in Path(scratch).rglob("*.py"):
                path.write_text(path.read_text().replace('"cuda"', '"cpu"'))
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "--junitxml=out.xml",
            "--continue-on-collection-errors",
        ]
        command += ["-p", "suite_plugin"] if ours else []
        command += [name for name in SUITES[suite][1] if (folder / name).exists()]
        environment = {**os.environ, "SUITE": suite, "HF_HUB_OFFLINE": "1", "SPARSIFY_DISABLE_TRITON": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(Path(__file__).parent), str(Path(__file__).parents[2]), scratch]
        )
        environment.pop("TRITON_INTERPRET", None)
        run = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True, check=False)
        found = Path(scratch) / "out.xml"
        if not found.exists():
            raise RuntimeError(f"{suite}: no results\n{run.stdout[-2000:]}{run.stderr[-2000:]}")
        cases = ElementTree.parse(found).getroot().iter("testcase")
        return {f"{case.get('classname')}::{case.get('name')}": outcome_of(case) for case in cases}


def outcome_of(case: ElementTree.Element) -> str:
    kinds = {child.tag for child in case}
    return "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"


def compare(suite: str, folder: Path, release: str = "") -> dict[str, Any]:
    """What stands in the results for one suite; `release`: that of the tests, if not the installed one."""
    plain, ours = outcomes(suite, folder, False), outcomes(suite, folder, True)
    lost = [name for name, outcome in plain.items() if outcome == "passed" and ours.get(name) != "passed"]
    gained = [name for name, outcome in ours.items() if outcome == "passed" and plain.get(name) != "passed"]
    return {
        "package": SUITES[suite][0],
        "version": version(SUITES[suite][0]),
        "tests of": release or version(SUITES[suite][0]),
        "files": [name for name in SUITES[suite][1] if (folder / name).exists()],
        "as it is": collections.Counter(plain.values()),
        "on our step": collections.Counter(ours.values()),
        "passes as it is alone": {name: DIFFERENCES.get(name.split("::")[1].split("[")[0]) for name in lost},
        "passes on our step alone": gained,
    }


def markdown_table(results: dict[str, Any]) -> str:
    """Counts, and under them what passes as it is alone, with its reason."""
    lines = [
        "| tests of | run with | passed as they are | passed on our step | failed in both |",
        "|---|---|---|---|---|",
    ]
    reasons = []
    for found in results.values():
        counts = [found[column] for column in ("as it is", "on our step")]
        package = f"{found['package']} {found['tests of']}"
        both = counts[1].get("failed", 0) - len(found["passes as it is alone"])
        lines.append(f"| {package} | {found['version']} | {counts[0]['passed']} | {counts[1]['passed']} | {both} |")
        for test, reason in found["passes as it is alone"].items():
            reasons.append(f"- `{test.split('::')[1]}` {reason}.")
    return "\n".join([*lines, "", *reasons]) + "\n"


def main(arguments: list[str]) -> None:
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for argument in arguments:
        name, _, folder = argument.partition("=")
        suite, _, release = name.partition("@")
        results[suite] = compare(suite, Path(folder), release)
        print(suite, json.dumps(results[suite], indent=1))
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(markdown_table(results))


if __name__ == "__main__":
    main(sys.argv[1:])
