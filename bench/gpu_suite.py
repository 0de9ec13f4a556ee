"""Everything that wants a GPU, in one command: self-check, kernel tests, then benchmarks to JSON.

    python bench/gpu_suite.py --out DIR

It needs the source tree, PyTorch, Triton (and so a C compiler), NumPy and pytest; PEFT joins where
it can be imported. Forward, backward and both of query, key and value with LoRA on query and value,
dropout 0.1, with and without CUDA graphs; "frozen" is the projection without LoRA, the bound of all
others. Whole training steps of PEFT's models, unchanged and accelerated, come before them. Without
graphs, a time is that of a single call with the host's share in it. The JSON is written after the
tests and after each shape, so that what stops the suite costs only the rest.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("test_mask.py", "test_routes.py", "test_gpu.py")
TESTS_SECONDS = 240  # with the benchmarks', under eight minutes
ROWS, WIDTHS, RANKS = (256, 1024, 4096, 8192, 32768), (384, 768, 1024), (8, 32, 64)
FULL = (768, 32)  # width and rank of which torch.compile takes part: it compiles each shape
REPEATS, LEAST, WARMUP, SECONDS = 25, 5, 3, 0.15


def source_tree(folder: Path) -> Path:
    """A folder in which the package lies as it is installed, by links."""
    package = folder / "fastlora"
    package.mkdir()
    for path in (*(ROOT / "fastlora").iterdir(), ROOT / "kernels", ROOT / "bert"):
        (package / path.name).symlink_to(path)
    return folder


def run_tests(tree: Path, log: Path) -> dict:
    """The kernel tests in a process of their own, whose output is kept in `log`."""
    start = time.perf_counter()
    files = [str(ROOT / "tests" / "kernels" / name) for name in TESTS]
    # Not python -m pytest, which puts the top-level folder kernels on the path.
    command = [sys.executable, "-c", "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"]
    with log.open("w", encoding="utf-8") as out:
        tests = subprocess.Popen(
            [*command, "-v", "-p", "no:cacheprovider", "--rootdir", str(ROOT), *files],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": str(tree), "TRITON_INTERPRET": "0"},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        try:
            tests.wait(TESTS_SECONDS)
        except subprocess.TimeoutExpired:
            tests.kill()
            tests.wait()
    text = log.read_text(encoding="utf-8")
    print(text[-3000:], flush=True)
    return {
        "passed": tests.returncode == 0,
        "seconds": time.perf_counter() - start,
        "summary": text.strip().splitlines()[-1:],
        "failures": [line for line in text.splitlines() if line.startswith("FAILED")],
    }


def self_checks() -> dict[str, str]:
    """What fastlora's own check of its kernels says on this GPU, and its seconds, by dtype."""
    from fastlora.kernels import route

    found = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        start, answer = time.perf_counter(), route("cuda", dtype)
        found[str(dtype)] = "{} ({}), {:.1f} s".format(*answer, time.perf_counter() - start)
        print(f"self-check: {dtype} {found[str(dtype)]}", flush=True)
    return found


def times_of(run) -> list[float]:
    """Milliseconds of single calls, between CUDA events."""
    for _ in range(WARMUP):
        run()
    torch.cuda.synchronize()
    times, start = [], time.perf_counter()
    while len(times) < LEAST or (len(times) < REPEATS and time.perf_counter() - start < SECONDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return times


def graphed(run):
    """`run` as a replayed CUDA graph.

    Captured on the current stream, which must not be the default one: backward runs on the stream
    that its forward ran on, and no other may take part in a capture.
    """
    for _ in range(WARMUP):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        run()
    return graph.replay


def launches_of(run) -> dict[str, tuple[int, float]]:
    """How often a call launches each kernel, and its microseconds in all."""
    from torch.profiler import ProfilerActivity, profile

    run()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    # Not the host's calls, nor copies and fills.
    on_gpu = [e for e in found.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [e for e in on_gpu if not e.key.startswith(("Memcpy", "Memset"))]
    return {e.key: (e.count, e.self_device_time_total) for e in kernels}


def measure(problem, name: str, build) -> list[dict]:
    """All modes of one implementation on one problem."""
    from implementations import agrees

    facts = dict(name=name, M=problem.M, H=problem.H, r=problem.r)
    function = build(problem, problem.p)
    leaves = [problem.x] if name == "frozen" else problem.leaves
    if name not in ("frozen", "unfused"):
        facts["agrees"] = agrees(problem, build)

    def forward():
        return function(problem.x)

    y = forward()
    modes = {
        "forward": forward,
        "backward": lambda: problem.backward(y, leaves, keep=True),
        "both": lambda: problem.backward(forward(), leaves),
    }
    rows = []
    for mode, run in modes.items():
        for graphs in (False, True):
            row = dict(facts, mode=mode, graphs=graphs)
            try:
                torch.cuda.reset_peak_memory_stats()
                base = torch.cuda.memory_allocated()
                times = times_of(graphed(run) if graphs else run)
                quartiles = statistics.quantiles(times, n=4)
                row.update(
                    median_ms=statistics.median(times),
                    quartiles_ms=[quartiles[0], quartiles[2]],
                    repeats=len(times),
                    peak_bytes=torch.cuda.max_memory_allocated() - base,
                )
                if not graphs and problem.M == 4096:
                    row["kernels"] = launches_of(run)
                    row["launches"] = sum(count for count, _ in row["kernels"].values())
            # A contender that cannot be captured, or runs out of memory, is a result too; Triton's
            # errors have no common base.
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
            rows.append(row)
    return rows


def warm_up(seconds: float = 0.5) -> None:
    """Work until the GPU's clocks are up, so that who comes first is not the slowest."""
    a, start = torch.randn(4096, 4096, device="cuda", dtype=torch.float16), time.perf_counter()
    while time.perf_counter() - start < seconds:
        a @ a
        torch.cuda.synchronize()


def benchmarks(dtype: torch.dtype, budget: float) -> Iterator[list[dict]]:
    """All shapes, the most wanted first, until the budget of seconds is spent."""
    from implementations import Problem, contenders, frozen

    shapes = [(M, H, r) for H in WIDTHS for r in RANKS for M in ROWS]
    shapes.sort(key=lambda s: (s[1:] != FULL, s[1] != FULL[0], s[0] != 4096, s))
    start = time.perf_counter()
    for M, H, r in shapes:
        if time.perf_counter() - start > budget:
            print(f"budget of {budget:.0f} s spent before M={M} H={H} r={r}", flush=True)
            break
        rows, problem = [], Problem(M, H, r, 0.1, 3, (0, 2), "cuda", dtype)
        warm_up()
        for name, build in {"frozen": frozen, **contenders("cuda")}.items():
            if name == "compiled" and (H, r) != FULL:
                continue
            try:
                rows += measure(problem, name, build)
            except NotImplementedError as reason:
                rows.append(dict(name=name, M=M, H=H, r=r, skipped=str(reason)))
            except Exception as error:
                what = f"{type(error).__name__}: {error}".splitlines()[0]
                rows.append(dict(name=name, M=M, H=H, r=r, error=what))
        yield rows


def accelerated_steps(dtype: torch.dtype, device: str = "cuda", repeats: int = 20) -> list[dict]:
    """Training steps of PEFT's model, unchanged and accelerated, in turns: 32 random sentences.

    Of 5 to 60 tokens in random order, LoRA r = 32 on query and value, dropout 0.1, AdamW, autocast.
    Each time is that of finished work, and the first step is kept apart.
    """
    try:
        from peft import LoraConfig, get_peft_model
        from transformers import BertConfig, BertForSequenceClassification
    except ImportError as error:
        return [dict(skipped=str(error))]
    import fastlora

    lora = LoraConfig(
        r=32,
        lora_alpha=32,
        lora_dropout=0.1,
        target_modules=["query", "value"],
        task_type="SEQ_CLS",
    )
    rows = []
    for width, layers in ((384, 6), (768, 12)):
        config = BertConfig(
            hidden_size=width, num_hidden_layers=layers, intermediate_size=4 * width, num_labels=5
        )
        sides = {}
        for name in ("peft", "accelerated"):
            torch.manual_seed(0)
            model = get_peft_model(BertForSequenceClassification(config), lora).to(device).train()
            if name == "accelerated":
                fastlora.accelerate(model)
            trained = [p for p in model.parameters() if p.requires_grad]
            scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
            sides[name] = model, torch.optim.AdamW(trained, lr=1e-3), scaler, [], []
        for _ in range(repeats):
            lengths = torch.randint(5, 61, (32, 1))
            mask = (torch.arange(int(lengths.max())) < lengths).long()
            ids = torch.randint(1000, 2000, mask.shape) * mask
            batch = dict(input_ids=ids, attention_mask=mask, labels=torch.randint(0, 5, (32,)))
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            for model, optimizer, scaler, times, losses in sides.values():
                start = time.perf_counter()
                with torch.autocast(device, dtype):
                    loss = model(**batch).loss
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                losses.append(loss.item())
                if device == "cuda":
                    torch.cuda.synchronize()
                times.append(1e3 * (time.perf_counter() - start))
        for name, (*_, times, losses) in sides.items():
            row = dict(name=name, H=width, layers=layers, first_ms=times[0])
            row |= dict(median_ms=statistics.median(times[1:]), mean_loss=statistics.fmean(losses))
            print(row, flush=True)
            rows.append(row)
    return rows


def print_times(rows: list[dict]) -> None:
    """The times of who agrees with the reference, at the full shapes, forward and backward."""
    chosen = [r for r in rows if (r["H"], r["r"]) == FULL and r.get("mode") == "both"]
    for graphs in (False, True):
        switch = "on" if graphs else "off"
        print(f"\nforward + backward, H={FULL[0]} r={FULL[1]}, CUDA graphs {switch}")
        for M in ROWS:
            cells = {
                r["name"]: r.get("median_ms")
                for r in chosen
                if (r["M"], r["graphs"]) == (M, graphs) and r.get("agrees", True)
            }
            line = "  ".join(f"{n} {ms:.3f} ms" for n, ms in cells.items() if ms)
            print(f"M={M:<6} {line}")


def installed(package: str) -> str | None:
    """A package's version, if it is here."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main() -> int:
    """Run the suite; the exit code is 1 when a test failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON")
    parser.add_argument("--seconds", type=float, default=210, help="time for the benchmarks")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA GPU here: nothing measured", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name()
    file = options.out / f"{name.replace(' ', '-')}.json"
    with tempfile.TemporaryDirectory() as folder:
        tree = source_tree(Path(folder))
        sys.path[:0] = [str(tree), str(ROOT / "bench")]
        os.environ["FASTLORA_CACHE"] = folder  # so that no earlier self-check is believed
        result = {
            "device": name,
            "capability": torch.cuda.get_device_capability(),
            "python": platform.python_version(),
            "versions": {p: installed(p) for p in ("torch", "triton", "numpy", "peft")},
            "cuda": torch.version.cuda,
            "self-check": self_checks(),
            "tests": run_tests(tree, options.out / "tests.log"),
            "benchmarks": [],
        }
        modern = torch.cuda.get_device_capability() >= (8, 0)
        dtype = torch.bfloat16 if modern else torch.float16
        result["dtype"] = str(dtype)
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        try:
            result["accelerate"] = accelerated_steps(dtype)
        except Exception as error:  # the benchmarks that follow are wanted, too
            result["accelerate"] = [dict(error=f"{type(error).__name__}: {error}")]
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        with torch.cuda.stream(torch.cuda.Stream()):
            for rows in benchmarks(dtype, options.seconds):
                result["benchmarks"] += rows
                file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print_times(result["benchmarks"])
    print(f"\n{file}; tests {'passed' if result['tests']['passed'] else 'FAILED'}")
    return 0 if result["tests"]["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
