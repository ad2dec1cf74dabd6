"""Plant bugs in the CUDA kernels, one at a time, and show that the emulation tests catch each.

Run on demand: ``python tests/emulation/plant_bugs.py [NAME ...]`` from the checkout, in the project's environment.
Prints one line per bug; exits with the number of bugs that no test caught.
"""

# ruff: noqa: E501  (a bug is one line)

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch  # noqa: F401  (once, for all children)

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Bug:
    """Replace the `nth` occurrence of `old` in csrc/cuda/`file` by `new`."""

    name: str
    file: str
    old: str
    new: str
    nth: int = 0


BUGS = (
    Bug("ties: last index first", "cascade_exact.cuh", "fill_pairs(q.pairs, q.alive, alive, key);\n      sort_pairs", "fill_pairs(q.pairs, q.alive, alive, [&](uint32_t id) { return key(id) & ~uint64_t{0xFFF} | id; });\n      sort_pairs"),
    Bug("sort: index descending", "block.cuh", "id_b < id_a", "id_b > id_a"),
    Bug("sort: key ascending", "block.cuh", "key_b > key_a ||", "key_b < key_a ||"),
    Bug("sort: no barrier between strides", "block.cuh", "          pairs.id[b] = id_a;\n        }\n      }\n      __syncthreads();", "          pairs.id[b] = id_a;\n        }\n      }"),
    Bug("scan: inclusive instead of exclusive", "block.cuh", "return before + inclusive - value;", "return before + inclusive;"),
    Bug("scan: no barrier before the totals are read", "block.cuh", "    shared.warp_total[warp] = inclusive;\n  }\n  __syncthreads();", "    shared.warp_total[warp] = inclusive;\n  }"),
    Bug("scan: no barrier after the totals are read", "block.cuh", "    total += part;\n  }\n  __syncthreads();", "    total += part;\n  }"),
    Bug("scan: wrong lane writes the total", "block.cuh", "if (lane == 31)", "if (lane == 30)"),
    Bug("histogram: not cleared", "block.cuh", "    shared.histogram[thread] = 0;\n", ""),
    Bug("histogram: no barrier before counting", "block.cuh", "    shared.histogram[thread] = 0;\n    __syncthreads();", "    shared.histogram[thread] = 0;"),
    Bug("histogram: prefix not checked", "block.cuh", " || key >> (shift + 8) == prefix", " || true"),
    Bug("selection: rank off by one", "block.cuh", "before < wanted && wanted <= before + size", "before <= wanted && wanted < before + size"),
    Bug("compaction: tie limit ignored", "block.cuh", "(verdict[i] == Verdict::tied && my_tied < need)", "verdict[i] == Verdict::tied"),
    Bug("compaction: tail not guarded", "block.cuh", "if (first + i < count) {\n        id[i]", "if (first + i <= count) {\n        id[i]"),
    Bug("padding sorts first", "block.cuh", "pairs.key[i] = i < count ? key(id) : 0;", "pairs.key[i] = i < count ? key(id) : ~uint64_t{0};"),
    Bug("dot: lanes summed in plain order", "exact.cuh", "(step & 1) * 4 + (step & 2) + (step >> 2)", "step"),
    Bug("dot: tree in another order", "exact.cuh", "ops::add(ops::add(ops::add(s[0], s[4]), ops::add(s[2], s[6])),", "ops::add(ops::add(ops::add(s[0], s[2]), ops::add(s[4], s[6])),"),
    Bug("dot: half of the exchanges", "exact.cuh", "for (int lanes = 4; lanes > 0", "for (int lanes = 4; lanes > 1"),
    Bug("l2: sign of the product", "exact.cuh", "ops::add(query_norm, -2 * product)", "ops::add(query_norm, 2 * product)"),
    Bug("cosine: zero norms not guarded", "exact.cuh", "norms != 0 ? ops::divide(product, norms) : 0", "ops::divide(product, norms)"),
    Bug("scores: key tail not guarded", "exact.cuh", "    if (key0 + local < keys.rows) {", "    if (key0 + local <= keys.rows) {"),
    Bug("scores: no barrier between chunks", "exact.cuh", "  for (int64_t d0 = 0; d0 < queries.columns; d0 += kExactDepth) {\n    __syncthreads();", "  for (int64_t d0 = 0; d0 < queries.columns; d0 += kExactDepth) {"),
    Bug("exclusion forgotten", "cascade_exact.cuh", "  return exclude.query_video != nullptr &&", "  return exclude.mask != nullptr &&"),
    Bug("exclusion: mask of another query", "cascade_exact.cuh", "exclude.mask + query * keys + key", "exclude.mask + key"),
    Bug("@bank ranks the survivors", "cascade_exact.cuh", "const bool over_bank = stage.over_bank && s > 0;", "const bool over_bank = false;"),
    Bug("rrf: rank from 0", "cascade_exact.cuh", "static_cast<double>(i + 1)", "static_cast<double>(i)"),
    Bug("zsum: weight not rounded", "cascade_exact.cuh", "round_to_bfloat16(1 / deviation)", "1 / deviation"),
    Bug("wave: rows of the first wave again", "cascade_exact.cuh", "row = blockIdx.x, query = first_query + row;", "row = blockIdx.x, query = row;"),
    Bug("pack: residual not measured", "pack.cuh", "residual += off * off;", "residual += 0 * off;"),
    Bug("pack: largest residual not kept", "pack.cuh", "    atomicMax(&packed.range->residual, bits_of(found.residual));\n", ""),
    Bug("pack: padding left as it was", "pack.cuh", "d < pitch; d += 64", "d < matrix.columns; d += 64"),
    Bug("bound: tensor cores taken for exact", "bound.cuh", "constexpr double kMatrixError = 48;", "constexpr double kMatrixError = 0;"),
    Bug("bound: query's rounding forgotten", "bound.cuh", "query.residual * longest + (query.norm", "(query.norm"),
    Bug("bound: keys' rounding forgotten", "bound.cuh", "(query.norm + query.residual) * residual +", "0 +"),
    Bug("bound: rows and columns swapped", "bound.cuh", "lane % 8 + lane / 16 * 8", "lane % 8 + lane / 8 % 2 * 8"),
    Bug("bound: pipeline waits for one chunk too few", "bound.cuh", "ops::wait_copies<kPipeline - 2>();", "ops::wait_copies<kPipeline - 1>();"),
    Bug("bound: no barrier after the wait", "bound.cuh", "ops::wait_copies<kPipeline - 2>();\n    __syncthreads();", "ops::wait_copies<kPipeline - 2>();"),
    Bug("bound: fetch overwrites a chunk in use", "bound.cuh", "fetch(step + kPipeline - 1);", "fetch(step + kPipeline);"),
    Bug("bound: sums not cleared between tiles", "bound.cuh", "            sums[m][n][half * 2 + i] = 0;\n", ""),
    Bug("bound: squares of l2 left out", "bound.cuh", "value -= ops::load(packed.squares + key + i) * square[row];", "value -= 0 * square[row];"),
    Bug("bound: swizzle differs between writing and reading", "bound.cuh", "const int row = piece / 4, d = piece % 4 * 8;", "const int row = piece / 4, d = (piece % 4 ^ 1) * 8;"),
    Bug("band: half as wide", "cascade_bounded.cuh", "- 2 * shared.slack;\n  const int high", "- shared.slack / 2;\n  const int high"),
    Bug("band: upper edge too low", "cascade_bounded.cuh", "const int high = static_cast<int>(middle.prefix) + 2 * shared.slack;", "const int high = static_cast<int>(middle.prefix);"),
    Bug("band: held beyond its capacity", "cascade_bounded.cuh", "const bool held = band <= kBand;", "const bool held = true;"),
    Bug("band: min taken for max", "cascade_bounded.cuh", "value = (stage.fusion == Fusion::min) == (part < value) ? part : value;", "value = (stage.fusion == Fusion::max) == (part < value) ? part : value;"),
    Bug("stage: no barrier after its description", "cascade_bounded.cuh", "    shared.slack = static_cast<int>(slack < kAll ? slack : kAll) + 1;\n  }\n  __syncthreads();", "    shared.slack = static_cast<int>(slack < kAll ? slack : kAll) + 1;\n  }"),
    Bug("splits: ids not offset", "cascade_bounded.cuh", "shared.block, static_cast<uint32_t>(first));", "shared.block);"),
    Bug("splits: threshold without slack", "cascade_bounded.cuh", "const int low = static_cast<int>(least.prefix) - 2 * shared.slack;", "const int low = static_cast<int>(least.prefix) + 1;"),
    Bug("splits: last one dropped", "cascade_bounded.cuh", "split < splits; ++split", "split + 1 < splits; ++split"),
    Bug("workspace: pieces overlap", "planning.hpp", "static_cast<size_t>(count) * sizeof(T) + 255", "static_cast<size_t>(count) * sizeof(T) / 2 + 255"),
    Bug("workspace: a wave too long", "planning.hpp", "const int64_t rows = std::min(wave, p.queries - first);", "const int64_t rows = wave;", 1),
    Bug("grid: last tile of keys forgotten", "planning.hpp", "ceil_div(p.keys, kExactKeys)", "std::max<int64_t>(p.keys / kExactKeys, 1)"),
)  # fmt: skip


def plant(bug: Bug, csrc: Path) -> None:
    """Change the copied source; a bug whose text is gone is an error of this script."""
    path = csrc / "cuda" / bug.file
    parts = path.read_text().split(bug.old)
    if len(parts) < bug.nth + 2:
        raise SystemExit(f"{bug.name}: {bug.file} no longer holds the text to change")
    path.write_text(bug.old.join(parts[: bug.nth + 1]) + bug.new + bug.old.join(parts[bug.nth + 1 :]))


def verdict(bug: Bug) -> str:
    """What caught the bug: the first failing test, or the crash; empty where nothing did."""
    with tempfile.TemporaryDirectory() as folder:
        csrc, log = Path(folder) / "csrc", Path(folder) / "log"
        shutil.copytree(ROOT / "csrc", csrc)
        plant(bug, csrc)
        child = os.fork()  # torch is imported already, and a crash stays in the child
        if child == 0:
            os.environ["CASCADE_EMULATED_CSRC"] = str(csrc)
            with log.open("w") as out:
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
                tests = str(ROOT / "tests" / "test_cuda_emulation.py")
                os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-m", "not full", tests]))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        lines = log.read_text().splitlines()
    if status == 0:
        return ""
    if status < 0:
        return f"crash, signal {-status}"
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    reasons = [line.removeprefix("E   ").strip() for line in lines if line.startswith("E   ")]
    return f"{failed[0].split('::', 1)[-1].split(' - ')[0]}: {reasons[0] if reasons else 'failed'}"


def main(names: list[str]) -> int:
    """Plant all bugs, or those whose names contain one of `names`."""
    missed = 0
    for bug in BUGS:
        if names and not any(name in bug.name for name in names):
            continue
        caught = verdict(bug)
        missed += not caught
        print(f"{bug.name} | {bug.file} | {caught or 'NOT CAUGHT'}", flush=True)
    print(f"{missed} not caught")
    return missed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
