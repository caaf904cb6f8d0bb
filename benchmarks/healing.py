"""What minutes of healing win back: perplexity of allocated points before and after, and the order of the points.

    python benchmarks/healing.py --text wikitext2_valid.txt --test wikitext2_test.txt [--other lambada.txt]
        [--reductions 0.09 0.2 0.4] [--minutes 15] [--tokens 65536] [--rates 3e-4 1e-3]

Points are allocated as in `benchmarks/forms.py`, calibrated and trained on the first two thirds of the text. Held-out
text of the package decides when to stop; the test text and the other texts play no part in training. Prints a row for
each point and rate, then one JSON document as the last line.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from calibration_mix import text_windows
from factorisation import perplexity, windows_of
from forms import CONTESTANTS, WINDOW

from dse import FactorBank, load_model, point_cost
from dse.config import CalibrationConfig, CalibrationSource
from dse.decomposition import apply_point, expected_divergence
from dse.evaluation.divergence import DenseDivergence
from dse.healing import HealingSettings, Teacher, apply_healed, heal, healing_windows, windows_of_other_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="a UTF-8 text; WikiText-2 in the published figures")
    parser.add_argument("--test", type=Path, help="a text to score; default: the last third of --text")
    parser.add_argument("--other", type=Path, nargs="*", default=[], help="texts of other sources to score")
    parser.add_argument("--model", default="demo:smollm2-135m-instruct")
    parser.add_argument("--forms", default="rank and width", choices=CONTESTANTS)
    parser.add_argument("--reductions", type=float, nargs="+", default=[0.09, 0.2, 0.4])
    parser.add_argument("--calibration-tokens", type=int, default=12288)
    parser.add_argument("--minutes", type=float, default=15.0, help="limit for each point")
    parser.add_argument("--tokens", type=int, default=65536, help="tokens to train on")
    parser.add_argument("--batch-tokens", type=int, default=512)
    parser.add_argument("--rates", type=float, nargs="*", help="learning rates; default: found on the first steps")
    parser.add_argument("--window", type=int, default=256, help="tokens of a training window")
    arguments = parser.parse_args()
    loaded = load_model(arguments.model, dtype="float32")
    content = arguments.text.read_text("utf-8")
    cut = len(content) * 2 // 3
    test = content[cut:] if arguments.test is None else arguments.test.read_text("utf-8")
    texts = {"test": text_windows(loaded, test, 20480, WINDOW)}
    for file in arguments.other:
        texts[file.stem] = text_windows(loaded, file.read_text("utf-8"), 4096, WINDOW)
    dense = {name: perplexity(loaded, token_ids) for name, token_ids in texts.items()}
    print("dense: " + ", ".join(f"{name} {value:.2f}" for name, value in dense.items()), flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "head.txt").write_text(content[:cut], encoding="utf-8")
        windows = windows_of(loaded, folder / "head.txt", arguments.calibration_tokens, 0)
        curves = expected_divergence(loaded, windows, with_widths=True, folder=folder)
        make = CONTESTANTS[arguments.forms]
        points = {reduction: make(loaded.topology, curves, reduction) for reduction in arguments.reductions}
        bank = FactorBank.build(loaded, points.values(), windows, folder=folder)
        text = CalibrationConfig(sources=[CalibrationSource(file=str(folder / "head.txt"))], window=arguments.window)
        teacher = Teacher(loaded.model, healing_windows(loaded.tokenizer, text, arguments.tokens), folder)
        other = DenseDivergence(loaded.model, windows_of_other_text(loaded.tokenizer, 4096))
        print(f"training text: {teacher.windows.description}", flush=True)
        for point in points.values():
            applied = apply_point(loaded.model, loaded.topology, point, bank)
            before = {name: perplexity(loaded, ids) / dense[name] for name, ids in texts.items()}
            applied.undo()
            for rate in arguments.rates or [None]:
                settings = HealingSettings(arguments.tokens, arguments.minutes, arguments.batch_tokens, rate)
                applied = apply_point(loaded.model, loaded.topology, point, bank)
                found = heal(loaded, applied, teacher, other, settings)
                apply_healed(applied, loaded.model, found.weights)
                after = {name: perplexity(loaded, ids) / dense[name] for name, ids in texts.items()}
                applied.undo()
                row = {
                    "reduction": round(point_cost(loaded.topology, point).reduction, 4),
                    **{name: [round(value, 3), round(after[name], 3)] for name, value in before.items()},
                    **found.report.to_json(),
                }
                rows.append(row)
                shown = ("learning_rate", "tokens", "best_tokens", "seconds", "kl_before", "kl_after", "rates_tried")
                print(row["reduction"], {name: row[name] for name in (*texts, *shown)}, flush=True)
    print(json.dumps({"dense": dense, "rows": rows}))


if __name__ == "__main__":
    main()
