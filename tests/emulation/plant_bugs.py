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
MODULES = ("bounds", "push", "emulation", "contrast")  # of tests, all of which every bug meets
FIRST = {
    "contrast.cuh": ("contrast",),
    "contrast_members.cuh": ("contrast",),
    "push.cuh": ("push",),
}  # where a file's bugs are looked for first
DOES_NOT_COMPILE = "DOES NOT COMPILE"  # which shows nothing


@dataclass(frozen=True)
class Bug:
    """Replace the `nth` occurrence of `old` in csrc/cuda/`file` by `new`."""

    name: str
    file: str
    old: str
    new: str
    nth: int = 0


BUGS = (
    Bug("ties: last index first", "cascade_exact.cuh", "fill_pairs(q.pairs, q.alive, alive, key);\n      sort_pairs", "fill_pairs(q.pairs, q.alive, alive, [&](uint32_t id) { return (key(id) & ~uint64_t{0xFFF}) | id; });\n      sort_pairs"),
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
    Bug("selection: one rank too high", "block.cuh", "const auto wanted = static_cast<uint64_t>(need);", "const auto wanted = static_cast<uint64_t>(need) - 1;"),
    Bug("selection: one tie too few", "block.cuh", "need -= static_cast<int64_t>(shared.before);", "need -= static_cast<int64_t>(shared.before) + (shift == 0);"),
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
    Bug("exclusion: mask of another query", "cascade_exact.cuh", "exclude.mask + query * keys + key", "exclude.mask + query * 0 * keys + key"),
    Bug("@bank ranks the survivors", "cascade_exact.cuh", "const bool over_bank = stage.over_bank && s > 0;", "const bool over_bank = false;"),
    Bug("rrf: rank from 0", "cascade_exact.cuh", "static_cast<double>(i + 1)", "static_cast<double>(i)"),
    Bug("zsum: weight not rounded", "cascade_exact.cuh", "round_to_bfloat16(1 / deviation)", "1 / deviation"),
    Bug("wave: rows of the first wave again", "cascade_exact.cuh", "row = blockIdx.x, query = first_query + row;", "row = blockIdx.x, query = first_query * 0 + row;"),
    Bug("pack: residual not measured", "pack.cuh", "residual += off * off;", "residual += 0 * off;"),
    Bug("pack: largest residual not kept", "pack.cuh", "    atomicMax(&packed.range->residual, bits_of(found.residual));\n", ""),
    Bug("pack: padding left as it was", "pack.cuh", "d < pitch; d += 64", "d < (pitch < matrix.columns ? pitch : matrix.columns); d += 64"),
    Bug("bound: tensor cores taken for exact", "bound.cuh", "constexpr double kMatrixError = 48;", "constexpr double kMatrixError = 0;"),
    Bug("bound: query's rounding forgotten", "bound.cuh", "query.residual * longest + (query.norm", "(query.norm"),
    Bug("bound: keys' rounding forgotten", "bound.cuh", "(query.norm + query.residual) * residual +", "0 +"),
    Bug("bound: rows and columns swapped", "bound.cuh", "lane % 8 + lane / 16 * 8", "lane % 8 + lane / 8 % 2 * 8"),
    Bug("bound: pipeline waits for one chunk too few", "bound.cuh", "ops::wait_copies<kPipeline - 2>();", "ops::wait_copies<kPipeline - 1>();"),
    Bug("bound: no barrier after the wait", "bound.cuh", "ops::wait_copies<kPipeline - 2>();\n    __syncthreads();", "ops::wait_copies<kPipeline - 2>();"),
    Bug("bound: fetch overwrites a chunk in use", "bound.cuh", "fetch(step + kPipeline - 1);", "fetch(step + kPipeline);"),
    Bug("bound: sums not cleared between tiles", "bound.cuh", "            sums[m][n][half * 2 + i] = 0;\n", ""),
    Bug("bound: squared lengths taken for exact", "bound.cuh", "(depth + 32) * 0x1p-51 * (shift / unit + reach)", "0x1p-50 * (shift / unit + reach)"),
    Bug("bound: squares of l2 left out", "bound.cuh", "value -= ops::load(packed.squares + key + i) * square[row];", "value -= 0 * square[row];"),
    Bug("bound: swizzle differs between writing and reading", "bound.cuh", "to + swizzled(kBoundKeys, row, d), packed", "to + swizzled(kBoundKeys, row, d ^ 8), packed"),
    Bug("band: half as wide", "cascade_bounded.cuh", "- 2 * shared.slack;\n  const int high", "- shared.slack / 2;\n  const int high"),
    Bug("band: upper edge too low", "cascade_bounded.cuh", "const int high = static_cast<int>(middle.prefix) + 2 * shared.slack;", "const int high = static_cast<int>(middle.prefix);"),
    Bug("band: held beyond its capacity", "cascade_bounded.cuh", "const bool held = band <= kBand;", "const bool held = true;"),
    Bug("band: min taken for max", "cascade_bounded.cuh", "value = (stage.fusion == Fusion::min) == (part < value) ? part : value;", "value = (stage.fusion == Fusion::max) == (part < value) ? part : value;"),
    Bug("stage: no barrier after its description", "cascade_bounded.cuh", "    __syncthreads();\n    const int64_t left =", "    const int64_t left ="),
    Bug("splits: ids not offset", "cascade_bounded.cuh", "shared.block, static_cast<uint32_t>(first));", "shared.block);"),
    Bug("splits: threshold without slack", "cascade_bounded.cuh", "const int low = static_cast<int>(least.prefix) - 2 * shared.slack;", "const int low = static_cast<int>(least.prefix) + 1;"),
    Bug("splits: last one dropped", "cascade_bounded.cuh", "split < splits; ++split", "split + 1 < splits; ++split"),
    Bug("workspace: pieces overlap", "planning.hpp", "static_cast<size_t>(count) * sizeof(T) + 255", "static_cast<size_t>(count) * sizeof(T) / 2 + 255"),
    Bug("workspace: a wave too long", "planning.hpp", "const int64_t rows = std::min(wave, p.queries - first);", "const int64_t rows = wave;", 1),
    Bug("grid: last tile of keys forgotten", "planning.hpp", "ceil_div(p.keys, kExactKeys)", "std::max<int64_t>(p.keys / kExactKeys, 1)"),
    Bug("loss: own key in no sum where it leaves P", "contrast.cuh", "kept ? -INFINITY : own);", "-INFINITY);"),
    Bug("loss: own key in both sums", "contrast.cuh", "log_add(top + log(sum), kept ? -INFINITY : own)", "log_add(top + log(sum), own)"),
    Bug("loss: own key leaves a P that it alone makes", "contrast.cuh", "inside.count > 0 && ops::load(p.drop + query)", "ops::load(p.drop + query)"),
    Bug("loss: P of nobody counts", "contrast.cuh", "const bool counted = size > 0;", "const bool counted = true;"),
    Bug("loss: keys past the last summed", "contrast.cuh", "key0 + key < p.keys.rows ? 0 : kAllLanes", "0"),
    Bug("loss: columns past the last multiplied", "contrast.cuh", "row < side.rows && d0 + d < side.columns", "row < side.rows"),
    Bug("loss: a run misses its last tile", "contrast.cuh", "last_tile = tiles * (blockIdx.y + 1) / gridDim.y;", "last_tile = tiles * (blockIdx.y + 1) / gridDim.y - (blockIdx.y > 0);"),
    Bug("loss: runs merged without their tops", "contrast.cuh", "query) * exp(other - top);", "query) * exp(0 * (other - top));"),
    Bug("loss: sums not shrunk to a new top", "contrast.cuh", "sum[i] * shrink +", "sum[i] +"),
    Bug("loss: directions not shrunk to a new top", "contrast.cuh", "ops::load(at) * shared.shrink[first + i]", "ops::load(at)"),
    Bug("loss: a run's first direction added to what was there", "contrast.cuh", "fresh ? sums[i] :", "fresh && first < 0 ? sums[i] :"),
    Bug("loss: directions of the tail's keys", "contrast.cuh", "const int count = inside < kNceKeys ? static_cast<int>(inside) : kNceKeys;", "const int count = inside < kNceKeys ? static_cast<int>(inside) - 1 : kNceKeys;"),
    Bug("loss: columns past a block's threads missed", "contrast.cuh", "d < columns; d += kNceColumns", "d < kNceColumns && d < columns; d += kNceColumns"),
    Bug("loss: no barrier between chunks of columns", "contrast.cuh", "d0 += kNceDepth) {\n    __syncthreads();", "d0 += kNceDepth) {"),
    Bug("loss: no barrier before the products", "contrast.cuh", "value;\n    }\n    __syncthreads();\n    float part", "value;\n    }\n    float part"),
    Bug("loss: no barrier between clearing and marking", "contrast.cuh", "kAllLanes;\n    }\n    __syncthreads();", "kAllLanes;\n    }"),
    Bug("loss: no barrier before the directions", "contrast.cuh", "      }\n    }\n    __syncthreads();\n    if (direction != nullptr)", "      }\n    }\n    if (direction != nullptr)"),
    Bug("loss: no barrier before the last block is asked for", "contrast.cuh", "gridDim.y - 1;\n  }\n  __syncthreads();", "gridDim.y - 1;\n  }"),
    Bug("loss: the first block merges", "contrast.cuh", "== gridDim.y - 1;", "== 0;"),
    Bug("loss: temperature left out of the gradient", "contrast.cuh", "exp(other - all) / p.temperature", "exp(other - all)"),
    Bug("loss: temperature left out of members' gradients", "contrast.cuh", "return of_member(score) / p.temperature;", "return of_member(score);"),
    Bug("loss: members' mass not their share of P", "contrast.cuh", "-exp(score - in) * share", "-exp(score - all) * share"),
    Bug("loss: mean over members alone", "contrast.cuh", "(inside.total + (kept ? own : 0)) / size", "inside.total / size"),
    Bug("loss: last tile of queries forgotten", "planning.hpp", "query_tiles = ceil_div(p.queries.rows, kNceQueries)", "query_tiles = std::max<int64_t>(p.queries.rows / kNceQueries, 1)"),
    Bug("loss: mark of the next query", "contrast_members.cuh", "1u << (at / p.width)", "1u << ((at / p.width) ^ 1)"),
    Bug("loss: members summed with the rest", "contrast_members.cuh", "if (key >= 0 && key < kNceKeys) {", "if (key >= 0 && key < 0) {"),
    Bug("loss: members that are a tile's first key missed", "contrast_members.cuh", "if (key >= 0 && key < kNceKeys) {", "if (key > 0 && key < kNceKeys) {"),
    Bug("loss: members past the first warpful missed", "contrast_members.cuh", "for (int64_t first = 0; first < p.width; first += 32)", "for (int64_t first = 0; first < 32 && first < p.width; first += 32)"),
    Bug("loss: members of the first query", "contrast_members.cuh", "ops::load(p.members + query * p.width + first + lane)", "ops::load(p.members + first + lane)"),
    Bug("loss: siblings summed with the rest", "contrast_members.cuh", "    atomicOr(shared.skip + key, 1u << query);\n", ""),
    Bug("loss: sibling of the next query", "contrast_members.cuh", "shared.skip + key, 1u << query);", "shared.skip + key, 1u << (query ^ 1));"),
    Bug("loss: siblings of every other query", "contrast_members.cuh", "query += kThreadsPerKey) {", "query += 2 * kThreadsPerKey) {"),
    Bug("loss: ignored siblings are members", "contrast_members.cuh", "if (p.siblings == Siblings::positive) {", "if (p.siblings != Siblings::negative) {"),
    Bug("loss: list of siblings outgrown", "contrast_members.cuh", "if (count <= kNceSiblings) {", "if (count <= 2 * kNceSiblings) {"),
    Bug("loss: list of siblings written past its end", "contrast_members.cuh", "if (place < kNceSiblings) {", "if (place < 4 * kNceSiblings) {"),
    Bug("loss: siblings in the order in which they were found", "contrast_members.cuh", "      visit(next);\n", "      visit(__shfl_sync(kAllLanes, mine, static_cast<int>(n)));\n"),
    Bug("loss: last sibling missed", "contrast_members.cuh", "for (int64_t n = 0; n < count; ++n) {", "for (int64_t n = 0; n + 1 < count; ++n) {"),
    Bug("loss: arrivals and siblings not cleared", "planning.hpp", "  launcher.clear(space.counts, static_cast<size_t>(query_tiles + space.rows) * sizeof(uint32_t));\n", ""),
    Bug("loss: only arrivals cleared", "planning.hpp", "static_cast<size_t>(query_tiles + space.rows) * sizeof(uint32_t)", "static_cast<size_t>(query_tiles) * sizeof(uint32_t)"),
    Bug("loss: everybody said to count", "contrast.cuh", "ops::store(p.counted + query, counted);", "ops::store(p.counted + query, true);"),
    Bug("push: oldest keys of a long batch", "planning.hpp", "kPushThreads, 0, p, rows - taken);", "kPushThreads, 0, p, (rows - taken) * 0);"),
    Bug("push: cursor forgotten", "push.cuh", "(p.cursor + row) % view.ring.rows", "row % view.ring.rows"),
    Bug("push: last keys forgotten", "planning.hpp", "ceil_div(taken, kPushThreads / 32)", "std::max<int64_t>(taken / (kPushThreads / 32), 1)"),
    Bug("push: columns past a warp's lanes", "push.cuh", "d < view.batch.columns; d += 32", "d < 32 && d < view.batch.columns; d += 32"),
    Bug("push: rows taken for contiguous", "push.cuh", "row * view.batch.stride", "row * view.batch.columns"),
    Bug("push: missing ids 0", "push.cuh", "int64_t{-1}", "int64_t{0}"),
    Bug("push: bfloat16 truncated", "push.cuh", "(bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16", "bits >> 16"),
    Bug("push: bfloat16's ties upwards", "push.cuh", "bits + 0x7FFFu + (bits >> 16 & 1u)", "bits + 0x8000u"),
    Bug("push: lengths in another order of summation", "push.cuh", "ops::root(dot_by_eight(view.batch, row, view.batch, row))", "row_norm(view.batch, row)"),
    Bug("push: reciprocal of the length", "push.cuh", "ops::divide(given, length)", "given * (1 / length)"),
    Bug("push: zeros divided by zero", "push.cuh", "length = norm > 0 ? norm : 1;", "length = norm;"),
    Bug("push: packs before the warp has written", "push.cuh", "    __syncwarp();", "    "),
    Bug("push: packs the key before it is rounded", "push.cuh", "pack_stored_row(view.ring, view.packed, p.metric, slot);", "Matrix given = view.batch;\n    given.data = static_cast<const char*>(given.data) + (row - slot) * given.stride * (given.dtype == DType::float32 ? 4 : 2);\n    pack_stored_row(given, view.packed, p.metric, slot);"),
    Bug("push: packs the first view alone", "push.cuh", "if (view.packed.rows != nullptr) {", "if (view.packed.rows != nullptr && blockIdx.y < 2) {"),
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
                tests = sorted(MODULES, key=lambda name: name not in FIRST.get(bug.file, ()))
                paths = [str(ROOT / "tests" / f"test_cuda_{name}.py") for name in tests]
                os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-m", "not full", *paths]))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        lines = log.read_text().splitlines()
    if status == 0:
        return ""
    if any(": error:" in line for line in lines):
        return DOES_NOT_COMPILE
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
        missed += caught in ("", DOES_NOT_COMPILE)
        print(f"{bug.name} | {bug.file} | {caught or 'NOT CAUGHT'}", flush=True)
    print(f"{missed} not caught")
    return missed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
