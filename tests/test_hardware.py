"""The hardware module: what is loaded when, and what is said when something is missing."""

import itertools
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import llmfs
from llmfs import hardware as hw

import pytest

needs_help = pytest.mark.skipif(
    hw._bundled_blas() is None, reason="only MLX's CPU wheel for Linux brings a slow BLAS")


def fresh(code, *flags, **env):
    "Run `code` in a new interpreter without the variables that steer llmfs."
    clean = {k: v for k, v in os.environ.items()
             if k not in ("LLMFS_BLAS", "LLMFS_COMPILE", "PYTHONWARNINGS", "LD_PRELOAD")}
    return subprocess.run([sys.executable, *flags, "-c", textwrap.dedent(code)],
                          capture_output=True, text=True, env=clean | env, timeout=120)


# Which BLAS ------------------------------------------------------------------------------

@needs_help
def test_the_linker_binds_mlx_to_the_loaded_blas():
    "Ask the linker: the global scope, which it searches first, holds a fast BLAS."
    code = "import llmfs; print(llmfs.hardware._blas_in_scope()); import mlx.core"
    file = fresh(code).stdout.strip()
    assert any(name in file for name in ("mkl", "blas")) and "mlx_cpu.libs" not in file
    assert fresh("import llmfs; print(llmfs.hardware._blas_in_scope())",
                 LLMFS_BLAS="none").stdout.strip() == ""


@needs_help
def test_products_are_several_times_faster():
    "And it is used: a 768 x 768 product, best of several, against an unhelped process."
    code = """
        import time, mlx.core as mx
        a = mx.random.normal((768, 768)); mx.eval(a, a @ a)
        best = 9e9
        for _ in range(4):
            start = time.perf_counter(); mx.eval(a @ a)
            best = min(best, time.perf_counter() - start)
        print(best)"""
    slow = float(fresh(code).stdout)
    fast = min(float(fresh("import llmfs" + textwrap.dedent(code)).stdout) for _ in range(2))
    assert slow > 4 * fast


@needs_help
def test_freed_memory_is_used_again():
    "No page of a large array is cleared twice: some 16,000 pages of 4 KiB, in the second round none."
    code = """
        import resource, llmfs, mlx.core as mx
        a = mx.zeros(1 << 24); mx.eval(a)
        faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(2):
            before = faults(); mx.eval(a + 1); after = faults()
        print(after - before)"""
    assert int(fresh(code).stdout) < 2000


@needs_help
def test_both_blas_give_the_same_numbers():
    code = """
        import llmfs, mlx.core as mx
        a = mx.random.normal((64, 96), key=mx.random.key(1))
        b = mx.random.normal((96, 32), key=mx.random.key(2))
        print((a @ b).reshape(-1).tolist())"""
    fast, slow = (eval(fresh(code, LLMFS_BLAS=v).stdout) for v in ("", "none"))
    assert max(abs(x - y) for x, y in zip(fast, slow, strict=True)) < 1e-4


@needs_help
def test_products_repeat_bit_for_bit():
    code = """
        import llmfs, hashlib, numpy as np, mlx.core as mx
        a = mx.random.normal((300, 513), key=mx.random.key(1))
        digests = {hashlib.md5(np.array(a @ a.T)).hexdigest() for _ in range(20)}
        print(*digests)"""
    first, second = fresh(code).stdout.split(), fresh(code).stdout.split()
    assert len(first) == 1 and first == second


@needs_help
def test_64_bit_interface_in_the_environment_does_no_harm():
    "MKL reads 64-bit indices where MLX passes 32-bit ones if the wrong layer is loaded."
    code = """
        import llmfs, mlx.core as mx
        print(llmfs.hardware.load_blas(), float((mx.ones((8, 16)) @ mx.ones((16, 4))).sum()))
        print("libmkl_intel_ilp64" in open("/proc/self/maps").read())"""
    name, total, wrong_layer = fresh(code, MKL_INTERFACE_LAYER="ILP64").stdout.split()
    assert total == "512.0" and wrong_layer == "False"


@needs_help
def test_mkl_without_its_openmp_uses_one_thread(tmp_path):
    "MKL alone would end the process: undefined symbol omp_get_num_procs."
    found = list(Path(sys.prefix).glob("lib/libmkl*.so.*"))
    if not found:
        pytest.skip("MKL is not installed in this environment")
    for lib in found:
        (tmp_path / lib.name).symlink_to(lib)
    (rt,) = tmp_path.glob("libmkl_rt.so.*")
    code = """
        import llmfs, mlx.core as mx
        print(float((mx.ones((300, 300)) @ mx.ones((300, 300))).sum()))"""
    assert fresh(code, LLMFS_BLAS=str(rt)).stdout.strip() == "27000000.0"


def test_a_torch_that_is_already_there_does_no_harm():
    pytest.importorskip("torch")
    code = """
        import torch, llmfs, mlx.core as mx
        print(float((mx.ones((8, 16)) @ mx.ones((16, 4))).sum()),
              float((torch.ones(8, 16) @ torch.ones(16, 4)).sum()))"""
    assert fresh(code).stdout.split() == ["512.0", "512.0"]


# What is said ----------------------------------------------------------------------------

@needs_help
def test_mlx_first_warns_exactly_once():
    done = fresh("""
        import mlx.core
        import llmfs
        llmfs.hardware.load_blas(); llmfs.hardware.hardware()
        print(llmfs.hardware.load_blas())""")
    assert done.stdout.strip() == "reference"
    assert done.stderr.count("RuntimeWarning") == 1
    assert "put `import llmfs` above the first mlx import" in done.stderr


@needs_help
def test_llmfs_first_is_silent():
    done = fresh("import llmfs, mlx.core, mlx.nn; llmfs.hardware.hardware()", "-W", "error")
    assert done.returncode == 0 and done.stderr == ""


@needs_help
def test_no_blas_at_all_warns_with_what_to_install():
    code = """
        import ctypes
        def no_library(name, *args, real=ctypes.CDLL, **kwargs):
            if name: raise OSError(name)
            return real(name, *args, **kwargs)
        ctypes.CDLL = no_library
        import llmfs
        print(llmfs.hardware.load_blas())"""
    done = fresh(code)
    assert done.stdout.strip() == "reference" and done.stderr.count("RuntimeWarning") == 1
    assert "libopenblas0" in done.stderr


@needs_help
def test_a_wrong_blas_path_is_one_line():
    done = fresh("import llmfs", LLMFS_BLAS="/no/such/lib.so")
    assert "OSError: LLMFS_BLAS=/no/such/lib.so cannot be loaded" in done.stderr


no_mlx = "import sys; sys.modules['mlx'] = sys.modules['mlx.core'] = None\n"


def test_without_mlx_everything_imports_and_one_line_names_the_extra():
    done = fresh(no_mlx + textwrap.dedent("""
        import llmfs
        from llmfs.hardware import MLXMissing, hardware, pick_precision, require_mlx
        assert hardware().backend == "cpu" and pick_precision() == "float32"
        try: require_mlx()
        except MLXMissing as e: print(e)"""))
    assert done.stderr == "" and len(done.stdout.splitlines()) == 1
    assert "MLX cannot be imported" in done.stdout
    if sys.platform.startswith("linux"):
        assert 'pip install "llmfs-mlx[cpu]"' in done.stdout
        assert "cuda12" in done.stdout and "cuda13" in done.stdout


def test_import_is_light():
    "No MLX, no NumPy: `import llmfs` is what every command waits for."
    code = "import sys, llmfs; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = set(fresh(code).stdout.split())
    assert not loaded & {"mlx", "numpy", "matplotlib", "torch", "tqdm", "tyro", "fastcore"}


# The machine -----------------------------------------------------------------------------

def test_hardware_agrees_with_mlx_and_the_system():
    mx = pytest.importorskip("mlx.core")
    here = hw.hardware()
    assert (here.backend == "cpu") == (mx.default_device() == mx.cpu)
    assert 1 <= here.n_cores <= os.cpu_count()
    assert 2**28 < here.memory_bytes < 2**50 and here.chip
    assert here.chip in str(here) and here.backend in str(here)


def test_cores_follow_the_affinity_mask():
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system has no affinity masks")
    code = """
        import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        import llmfs; print(llmfs.hardware.hardware().n_cores)"""
    assert fresh(code).stdout.strip() == "1"


@pytest.mark.parametrize("backend, chip, info, expected", [
    ("metal", "Apple M1", {}, False), ("metal", "Apple M1 Max", {}, False),
    ("metal", "Apple M2 Ultra", {}, False), ("metal", "Apple M10", {}, True), ("metal", "Apple M3 Pro", {}, True),
    ("cuda", "V100", {"compute_capability_major": 7}, False),
    ("cuda", "A100", {"compute_capability_major": 8}, True)])
def test_which_chips_have_bfloat16(backend, chip, info, expected):
    assert hw._has_bfloat16(backend, chip, info) is expected


@pytest.mark.parametrize("backend, bf16, expected", [
    ("cpu", False, "float32"), ("metal", True, "bfloat16"),
    ("metal", False, "float16"), ("cuda", True, "bfloat16")])
def test_auto_precision(monkeypatch, backend, bf16, expected):
    machine = hw.Hardware(backend, "chip", 1, 2**30, "own", "", bf16)
    monkeypatch.setattr(hw, "hardware", lambda: machine)
    assert hw.pick_precision() == expected
    assert hw.pick_precision("float16") == "float16"


def test_unknown_precision_is_one_line():
    with pytest.raises(ValueError, match="'fp8' is unknown: choose one of auto, float32"):
        hw.pick_precision("fp8")


@pytest.mark.parametrize("backend, compiler, wanted, expected, warns", [
    ("cpu", "/usr/bin/g++", "", False, 0), ("cpu", "/usr/bin/g++", "1", True, 0),
    ("cpu", "", "1", False, 1), ("cpu", "", "", False, 0),
    ("metal", "", "", True, 0), ("cuda", "", "0", False, 0)])
def test_compile_pays(monkeypatch, recwarn, backend, compiler, wanted, expected, warns):
    machine = hw.Hardware(backend, "chip", 1, 2**30, "own", compiler, False)
    monkeypatch.setattr(hw, "hardware", lambda: machine)
    monkeypatch.setenv("LLMFS_COMPILE", wanted)
    assert hw.compile_pays() is expected
    assert len(recwarn) == warns


def test_matmul_flops_counts_two_for_each_multiply_add(monkeypatch):
    "On a clock that ticks once a look, each product takes one second."
    pytest.importorskip("mlx.core")
    ticks = itertools.count()
    monkeypatch.setattr(hw.time, "perf_counter", lambda: next(ticks))
    assert hw.matmul_flops(32, seconds=0) == 2 * 32 * 32 * 32


def test_matmul_flops_is_plausible():
    pytest.importorskip("mlx.core")
    assert 1e8 < hw.matmul_flops(256, seconds=.05) < 1e16


def test_version():
    from importlib.metadata import version
    assert llmfs.__version__ == version("llmfs-mlx")


def test_kernels_one_by_one_unless_somebody_chose(monkeypatch):
    monkeypatch.delenv("MLX_USE_CUDA_GRAPHS", raising=False)
    hw.launch_plainly()
    assert os.environ["MLX_USE_CUDA_GRAPHS"] == "0"
    monkeypatch.setenv("MLX_USE_CUDA_GRAPHS", "1")
    hw.launch_plainly()
    assert os.environ["MLX_USE_CUDA_GRAPHS"] == "1"
    assert hw.on_cuda() == (hw.hardware().backend == "cuda")


@pytest.mark.parametrize("kind,plain", [("gpt", False), ("moe", True)])
def test_mixtures_start_kernels_one_by_one(kind, plain, monkeypatch):
    import llmfs.model.moe  # noqa: F401  makes mixtures known
    from llmfs.model.block import GPTConfig
    from llmfs.model.transformer import GPT
    from llmfs.training.optimizer import make_optimizer
    from llmfs.training.step import TrainConfig, TrainStep

    monkeypatch.delenv("MLX_USE_CUDA_GRAPHS", raising=False)
    model = GPT(GPTConfig.from_dict(dict(kind=kind, vocab_size=8, n_layers=1, d_model=16, n_heads=2, d_ff=32)))
    TrainStep(model, make_optimizer("adamw", model), TrainConfig())
    assert ("MLX_USE_CUDA_GRAPHS" in os.environ) == plain == model.cfg.one_by_one
    monkeypatch.delenv("MLX_USE_CUDA_GRAPHS", raising=False)
