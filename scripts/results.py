#!/usr/bin/env python3
"""Four ways to pre-train, at equal compute: makes the numbers and the tables of docs/results.md.

    cargo build --release --bin maskalign
    python scripts/prepare_photographs.py photographs
    export PHOTOGRAPHS_DIR=$PWD/photographs
    python scripts/results.py measure       # processor time of a step, from which the epochs were fixed
    python scripts/results.py runs          # every recipe of recipes/results with five seeds
    python scripts/results.py table         # writes the tables

Standard library only. What is there already is not run again, so that `runs` goes on where it was stopped.
"""

import argparse
import json
import math
import os
import pathlib
import re
import resource
import statistics
import subprocess
import sys
import tempfile

from tables import rows_of, write_rows, write_tables

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "results.md"
STEPS = ROOT / "docs" / "results_steps.csv"
RUNS = ROOT / "docs" / "results_runs.csv"
SETS = {
    "sample": "the images in the program, teacher trained by this project",
    "photographs": "photographs, ViT-S/14 as teacher",
}
METHODS = {
    "maskalign": "MaskAlign",
    "random": "alignment, random masks",
    "mae": "MAE",
    "data2vec": "data2vec",
}
# Fixed beforehand.
SEEDS = range(5)
ROUNDS = 3
# Steps of a short and of a long run: their difference leaves out what comes before the first step.
SHORT, LONG = 6, 18


def names():
    return [f"{kind}_{method}" for kind in SETS for method in METHODS]


def file_of(name):
    return ROOT / "recipes" / "results" / f"{name}.yaml"


def epochs_of(name):
    """The epochs of pre-training that the recipe says."""
    text = file_of(name).read_text()
    found = re.search(r"^    epochs: (\S+)$", text.split("  knn:")[0], re.MULTILINE)
    # The random masks take the epochs of the attentive ones.
    return float(found[1]) if found else epochs_of(f"{name.split('_')[0]}_maskalign")


def run(options, name, out, *more):
    command = [options.maskalign, "run", file_of(name), "--threads", "1", "--quiet", "--out", out, *more]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def measure(options):
    """Processor seconds of a step of each recipe, in turn."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(ROUNDS):
            for name in names():
                alone = ["--set", "stages.knn=null", "--set", "stages.probe=null"]
                seconds = [run(options, name, f"{folder}/{name}-{turn}-{steps}", "--steps", str(steps), *alone) for steps in (SHORT, LONG)]
                rows.append(dict(recipe=name, round=turn, seconds=f"{(seconds[1] - seconds[0]) / (LONG - SHORT):.4f}"))
                print(*rows[-1].values(), flush=True)
    write_rows(options.steps_csv, rows)


def step_seconds():
    found = {}
    for row in rows_of(STEPS):
        found.setdefault(row["recipe"], []).append(float(row["seconds"]))
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def fixed_epochs(name, seconds):
    """As many half epochs as take the time of MaskAlign's."""
    first = f"{name.split('_')[0]}_maskalign"
    return max(0.5, round(2 * epochs_of(first) * seconds[first] / seconds[name]) / 2)


def runs(options):
    for seed in SEEDS:
        for name in options.only or names():
            if (name, str(seed)) in {(row["recipe"], row["seed"]) for row in rows_of(options.csv)}:
                continue
            with tempfile.TemporaryDirectory() as folder:
                out = pathlib.Path(folder) / "run"
                seconds = run(options, name, out, "--set", f"seed={seed}")
                summary = json.loads((out / "summary.json").read_text())
            measured = {f"knn of {what}": row["accuracy"] for what, row in summary["knn"].items()}
            measured["probe"] = summary["probe"]["accuracy"]
            # Read again: another process may add seeds of other recipes.
            rows = rows_of(options.csv)
            for what, accuracy in measured.items():
                rows.append(dict(recipe=name, seed=seed, measure=what, accuracy=f"{accuracy:.4f}"))
            write_rows(options.csv, rows)
            print(f"{name} seed {seed}, {seconds:.0f} s:", measured, flush=True)


def mean_and_error(values):
    mean = statistics.mean(values)
    return f"{mean:.1f} ± {statistics.stdev(values) / math.sqrt(len(values)):.1f}" if len(values) > 1 else f"{mean:.1f}"


def tables():
    seconds, measured = step_seconds(), {}
    for row in rows_of(RUNS):
        measured.setdefault((row["recipe"], row["measure"]), []).append(100 * float(row["accuracy"]))
    text = ""
    for kind, title in SETS.items():
        text += f"\n**{title[0].upper()}{title[1:]}**\n\n"
        text += "| method | time of a step, s | epochs | seeds | k-NN, % | linear probe, % |\n|---|---|---|---|---|---|\n"
        for method, title in METHODS.items():
            name = f"{kind}_{method}"
            neighbours, probe = (measured.get((name, what), []) for what in ("knn of student", "probe"))
            if not neighbours:
                continue
            cells = [title, f"{seconds[name]:.3f}", f"{epochs_of(name):g}", str(len(neighbours))]
            text += "| " + " | ".join([*cells, mean_and_error(neighbours), mean_and_error(probe)]) + " |\n"
        for what, title in (("untrained", "the student before training"), ("pixels", "pixels"), ("teacher", "the teacher")):
            values = measured.get((f"{kind}_maskalign", f"knn of {what}"), [])
            if values:
                # What no seed changes is one number.
                shown = mean_and_error(values if len(set(values)) > 1 else values[:1])
                text += f"| *{title}* | | | | {shown} | |\n"
    return text


def table(options):
    """Writes the tables between the page's two marks; with --check, fails where they or the epochs are other ones."""
    write_tables(PAGE, "results.py", tables(), options.check)
    seconds = step_seconds()
    for name in names():
        if epochs_of(name) != fixed_epochs(name, seconds):
            sys.exit(f"{name}: {epochs_of(name):g} epochs, but its time of a step gives {fixed_epochs(name, seconds):g}")


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    built = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release" / "maskalign"
    options.add_argument("command", choices=["measure", "runs", "table"])
    options.add_argument("--maskalign", default=built, help="the binary")
    options.add_argument("--only", nargs="+", choices=names(), help="recipes that `runs` runs")
    options.add_argument("--csv", type=pathlib.Path, default=RUNS, help="where `runs` adds its values")
    options.add_argument("--steps-csv", type=pathlib.Path, default=STEPS, help="where `measure` writes its values")
    options.add_argument("--check", action="store_true", help="with `table`: write nothing, fail where the page differs")
    options = options.parse_args()
    {"measure": measure, "runs": runs, "table": table}[options.command](options)


if __name__ == "__main__":
    main()
