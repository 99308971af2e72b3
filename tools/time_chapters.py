"""How long each chapter runs here: `python tools/time_chapters.py [--all] [CHAPTER...]`, at scale ci, one thread each.

Writes nbs/results/chapter_seconds.json, which the overview prints. Without --all only chapters that are new or whose code has
changed are run; the others keep their time. --machine NAME keeps several machines apart.
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "nbs" / "results" / "chapter_seconds.json"
WHAT = ("Processor seconds of each chapter at scale ci, from start to end of a fresh process with one thread, as make test runs it: "
        "what it takes on a core that does nothing else. code: a checksum of what ran.")  # fmt: skip
ONE = {k: "1" for k in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}


def chapters() -> dict[str, Path]:
    "Chapters and experiments, in the order of the book."
    paths = sorted((ROOT / "nbs").glob("[0-9]*.ipynb")) + sorted((ROOT / "nbs").glob("experiments/*.ipynb"))
    return {p.relative_to(ROOT / "nbs").with_suffix("").as_posix(): p for p in paths}


def checksum(path: Path) -> str:
    "Of the code that a run executes."
    cells = ["".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    ran = [s for s in cells if not re.search(r"^#\|\s*(slow|notest|eval:\s*false)", s, re.M)]
    return sha256("\n".join(ran).encode()).hexdigest()[:12]


def seconds(path: Path) -> float | None:
    "Of one run; None where it fails."
    code = f"from nbdev.test import nbdev_test; nbdev_test({str(path)!r}, n_workers=0)"
    env = os.environ | ONE | {"LLMFS_SCALE": "ci", "PYTHONHASHSEED": "0"}
    start = processor_seconds()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True)
    return round(processor_seconds() - start, 1) if done.returncode == 0 else None


def processor_seconds() -> float:
    "Of all finished children: other programs on the machine do not change it much."
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("chapters", nargs="*", help="names; none: what is new or changed")
    parser.add_argument("--all", action="store_true", help="measure every chapter again")
    parser.add_argument("--machine", default="One x86-64 core", help="what the overview calls this machine")
    args = parser.parse_args()
    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {"what": WHAT, "machines": []}
    machine = next((m for m in record["machines"] if m["name"] == args.machine), None)
    if machine is None:
        machine = {"name": args.machine, "seconds": {}, "code": {}}
        record["machines"].append(machine)
    every, failed = chapters(), []
    for name, path in every.items():
        code = checksum(path)
        if name in args.chapters or not args.chapters and (args.all or machine["code"].get(name) != code):
            took = seconds(path)
            print(f"{name}: {took if took is not None else 'failed'}", flush=True)
            if took is None:
                failed.append(name)
                continue
            machine["seconds"][name], machine["code"][name] = took, code
            for key in ("seconds", "code"):
                machine[key] = {n: machine[key][n] for n in every if n in machine[key]}
            RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
