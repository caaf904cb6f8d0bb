"""How close `dse plan` comes: the forecast of a study beside the run of it, phase by phase.

    python benchmarks/plan.py [--model quickstart | 1.1] [--trials 3] [--tokens 2048] [--limit 40]

Forecasts the shipped quickstart study, or the same study on a random model of 1.1 billion parameters, with fewer
calibration tokens and documents so that it ends in minutes. Then runs it with an empty cache, and forecasts it once
more: the two forecasts show what the load of the machine does to timings. Forecasts and run are processes of their own.
Prints seconds and peak resident bytes of each phase and their ratios, then one JSON document as the last line.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scaling import SHAPES, write_model

PHASE_OF = {
    "calibrate": "bank",
    "gradients": "bank",
    "decompose": "bank",
    "kl_divergence": "divergence",
    "sensitivity": "profile",
}
"""What a study reports while it is set up, to the phase of the forecast. Other names are listed under their own."""

TRIAL_PHASES = {"evaluate": "trial: evaluate", "latency": "trial: latency", "divergence": "trial: divergence"}
SAMPLE_S = 0.002


def study_of(arguments: argparse.Namespace, folder: Path) -> Any:
    """The study, smaller; the 1.1B model is written to `folder` if it is not there yet."""
    from dse.config import load_study
    from dse.shipped_files import find_yaml

    config = load_study(find_yaml(Path("quickstart"), "studies"))
    changes: dict[str, Any] = {
        "calibration": config.calibration.model_copy(update={"tokens": arguments.tokens}),
        "tasks": [task.model_copy(update={"limit": arguments.limit}) for task in config.tasks],
        "budget": config.budget.model_copy(update={"trials": arguments.trials}),
    }
    if arguments.model != "quickstart":
        path = folder / "model"
        if not path.exists():
            write_model(path, SHAPES[arguments.model])
        changes["model"] = config.model.model_copy(update={"ref": str(path), "dtype": "float32"})
        changes["calibration"] = changes["calibration"].model_copy(update={"window": 256})
    return config.model_copy(update=changes)


def forecast(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from dse.standalone.study_plan import plan_study

    start = time.perf_counter()
    plan = plan_study(study_of(arguments, folder))
    return {"took_s": time.perf_counter() - start, "phases": {phase["phase"]: phase for phase in plan["phases"]}}


def run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run the study with an empty cache; seconds and peak bytes of each phase."""
    from dse.models.demo import demo_model_folder
    from dse.study import StudyListener, StudyProgress
    from dse.study.run import run_study
    from dse.trial_record import TrialRecord

    if arguments.model == "quickstart":
        demo_model_folder("smollm2-135m-instruct")  # unpacked before the clock starts, as for the forecast
    config = study_of(arguments, folder)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        models = Path(temporary, "cache", "dse")
        models.mkdir(parents=True)
        (models / "models").symlink_to(Path(os.environ.get("DSE_CACHE", Path.home() / ".cache/dse")) / "models")
        os.environ["DSE_CACHE"] = str(models)

        class Watch(StudyListener):
            """Notes when each phase starts."""

            def __init__(self) -> None:
                self.phase, self.since = "load", time.perf_counter()
                self.seconds: dict[str, float] = {}
                self.peak_bytes: dict[str, int] = {}
                self.trials: list[Mapping[str, float]] = []

            def enter(self, phase: str) -> None:
                now = time.perf_counter()
                self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + now - self.since
                self.phase, self.since = phase, now

            def on_phase(self, phase: str, done: int, total: int) -> None:
                is_trial = self.phase.startswith("trial")
                self.enter(f"trial: {phase}" if is_trial else PHASE_OF.get(phase, phase))

            def on_trial_start(self, progress: StudyProgress, record: TrialRecord) -> None:
                self.enter("trial")

            def on_trial_end(self, progress: StudyProgress, record: TrialRecord) -> None:
                self.enter("trial")
                self.trials.append(dict(record.seconds))

        watch = Watch()
        ended = threading.Event()

        def sample() -> None:
            from dse.standalone.plan_meters import resident_bytes

            while not ended.wait(SAMPLE_S):
                watch.peak_bytes[watch.phase] = max(watch.peak_bytes.get(watch.phase, 0), resident_bytes())

        sampler = threading.Thread(target=sample, daemon=True)
        sampler.start()
        run_study(config, out=Path(temporary, "run"), listener=watch)
        watch.enter("end")
        ended.set()
        sampler.join()
        banks = sum(p.stat().st_size for p in models.rglob("factor_banks/**/*") if p.is_file())
    seconds = {phase: s for phase, s in watch.seconds.items() if not phase.startswith("trial")}
    for key in {key for trial in watch.trials for key in trial}:
        values = [trial[key] for trial in watch.trials if key in trial]
        seconds[TRIAL_PHASES.get(key, f"trial: {key}")] = statistics.mean(values)
    return {"seconds": seconds, "peak_bytes": watch.peak_bytes, "bank_disk_bytes": banks}


def in_a_process(work: Any, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(work, (arguments, folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="quickstart", choices=["quickstart", *SHAPES])
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=2048, help="calibration tokens")
    parser.add_argument("--limit", type=int, default=40, help="documents of each task")
    parser.add_argument("--folder", type=Path, default=None, help="where models and banks are written")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        folder = Path(temporary)
        before = in_a_process(forecast, arguments, folder)
        found = in_a_process(run, arguments, folder)
        after = in_a_process(forecast, arguments, folder)
    print(f"forecasts took {before['took_s']:.0f} s and {after['took_s']:.0f} s")
    print(f"{'phase':<20}{'forecast s':>16}{'run s':>9}{'ratio':>7}{'forecast MB':>13}{'run MB':>9}{'ratio':>7}")
    for phase, first in before["phases"].items():
        second = after["phases"][phase]
        seconds, peak = (found[key].get(phase) for key in ("seconds", "peak_bytes"))
        mean_s = (first["seconds"] + second["seconds"]) / 2
        row = f"{phase:<20}{first['seconds']:>8.1f}{second['seconds']:>8.1f}"
        row += f"{seconds:>9.1f}{mean_s / seconds:>7.2f}" if seconds else f"{'':>16}"
        row += f"{first['host_bytes'] / 1e6:>13.0f}"
        print(row + (f"{peak / 1e6:>9.0f}{first['host_bytes'] / peak:>7.2f}" if peak else ""))
    print("not in the forecast:", {k: round(v, 1) for k, v in found["seconds"].items() if k not in before["phases"]})
    print(f"bank on disk: {before['phases'].get('bank', {}).get('disk_bytes', 0)} forecast, {found['bank_disk_bytes']}")
    print(json.dumps({"before": before, "run": found, "after": after}))


if __name__ == "__main__":
    main()
