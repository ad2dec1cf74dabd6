// What the threads of a block do together: prefix sums, the n-th largest of many keys, compaction in order, sorting.
#pragma once

#include <cstdint>

#include "cuda/ops.cuh"

namespace cascade::cuda {

constexpr int kThreads = 256;  // of a selecting block, one for each bin of a digit
constexpr int kWarps = kThreads / 32;
constexpr int kItems = 2;  // list entries a thread takes per round of a compaction
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

struct BlockShared {
  uint64_t warp_total[kWarps];
  uint32_t histogram[kThreads];
  uint64_t digit, before, equal;  // the bin that holds the wanted rank, what lies above it, what lies in it
};

// The sum of `value` over the threads before this one; `total` is that over all.
__device__ inline uint64_t exclusive_sum(uint64_t value, uint64_t& total, BlockShared& shared) {
  const int lane = static_cast<int>(threadIdx.x & 31), warp = static_cast<int>(threadIdx.x >> 5);
  uint64_t inclusive = value;
  for (int offset = 1; offset < 32; offset *= 2) {
    const uint64_t up = __shfl_up_sync(kAllLanes, inclusive, offset);
    inclusive += lane >= offset ? up : 0;
  }
  if (lane == 31) {
    shared.warp_total[warp] = inclusive;
  }
  __syncthreads();
  uint64_t before = 0;
  total = 0;
  for (int w = 0; w < kWarps; ++w) {
    const uint64_t part = shared.warp_total[w];
    before += w < warp ? part : 0;
    total += part;
  }
  __syncthreads();
  return before + inclusive - value;
}

// Where the n-th largest key lies: keys with a larger `key >> shift` than `prefix` are in, `need` of the `equal` keys
// that share it are in too.
struct Threshold {
  uint64_t prefix;
  int shift;
  int64_t need, equal;

  __device__ bool above(uint64_t key) const { return key >> shift > prefix; }
  __device__ bool tied(uint64_t key) const { return key >> shift == prefix; }
};

// The n-th largest of the keys of items 0 to count - 1, digit by digit from the top. `get(item, key)` says whether an
// item takes part. With `kExactKey` the whole key is found; without, the search stops once all ties are needed anyway.
template <int kBits, bool kExactKey, class Get>
__device__ Threshold nth_largest(int64_t count, int64_t n, Get get, BlockShared& shared) {
  const int thread = static_cast<int>(threadIdx.x);
  uint64_t prefix = 0;
  int64_t need = n, equal = 0;
  int shift = kBits - 8;
  for (;; shift -= 8) {
    shared.histogram[thread] = 0;
    __syncthreads();
    for (int64_t item = thread; item < count; item += kThreads) {
      uint64_t key = 0;
      if (get(item, key) && (shift == kBits - 8 || key >> (shift + 8) == prefix)) {
        atomicAdd(&shared.histogram[key >> shift & 255], 1u);
      }
    }
    __syncthreads();
    const uint64_t size = shared.histogram[255 - thread];
    uint64_t total = 0;
    const uint64_t before = exclusive_sum(size, total, shared);
    const auto wanted = static_cast<uint64_t>(need);
    if (before < wanted && wanted <= before + size) {
      shared.digit = static_cast<uint64_t>(255 - thread);
      shared.before = before;
      shared.equal = size;
    }
    __syncthreads();
    prefix = prefix << 8 | shared.digit;
    need -= static_cast<int64_t>(shared.before);
    equal = static_cast<int64_t>(shared.equal);
    __syncthreads();
    if (shift == 0 || (!kExactKey && need == equal)) {
      return {prefix, shift, need, equal};
    }
  }
}

enum class Verdict : int { out, in, tied };

// Keeps of `source` (where null: the ids from `first_id` on) what `judge(position, id)` finds in, and the first `need`
// that are tied, in order. Source and `kept` may be the same array: a round's reads come before its writes, which never
// overtake.
template <class Judge>
__device__ int64_t compact(const uint32_t* source, uint32_t* kept, int64_t count, int64_t need, Judge judge,
                           BlockShared& shared, uint32_t first_id = 0) {
  int64_t in = 0, tied = 0;
  for (int64_t base = 0; base < count; base += kThreads * kItems) {
    uint32_t id[kItems];
    Verdict verdict[kItems];
    uint64_t mine = 0;
    const int64_t first = base + static_cast<int64_t>(threadIdx.x) * kItems;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      verdict[i] = Verdict::out;
      id[i] = 0;
      if (first + i < count) {
        id[i] = source != nullptr ? ops::load(source + first + i) : first_id + static_cast<uint32_t>(first + i);
        verdict[i] = judge(first + i, id[i]);
      }
      mine += verdict[i] == Verdict::in ? 1 : verdict[i] == Verdict::tied ? uint64_t{1} << 32 : 0;
    }
    uint64_t total = 0;
    const uint64_t before = exclusive_sum(mine, total, shared);
    int64_t my_in = in + static_cast<int64_t>(before & 0xFFFFFFFFu),
            my_tied = tied + static_cast<int64_t>(before >> 32);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const bool keeps = verdict[i] == Verdict::in || (verdict[i] == Verdict::tied && my_tied < need);
      if (keeps) {
        ops::store(kept + my_in + (my_tied < need ? my_tied : need), id[i]);
      }
      my_in += verdict[i] == Verdict::in;
      my_tied += verdict[i] == Verdict::tied;
    }
    in += static_cast<int64_t>(total & 0xFFFFFFFFu);
    tied += static_cast<int64_t>(total >> 32);
  }
  __syncthreads();
  return in + (tied < need ? tied : need);
}

// The first place in the ascending list whose id is not under `id`.
__device__ inline int64_t position(const uint32_t* list, int64_t count, uint32_t id) {
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (ops::load(list + middle) < id) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Whether the ascending list holds `id`.
__device__ inline bool holds(const uint32_t* list, int64_t count, uint32_t id) {
  const int64_t at = position(list, count, id);
  return at < count && ops::load(list + at) == id;
}

// Keys and ids to sort, in shared or global memory.
struct Pairs {
  uint64_t* key;
  uint32_t* id;
};

__device__ inline int64_t next_power_of_two(int64_t n) {
  int64_t power = 1;
  while (power < n) {
    power *= 2;
  }
  return power;
}

// Fills entries 0 to count - 1 with `key(id)` of the listed ids and pads to a power of two with what sorts last.
template <class Key>
__device__ void fill_pairs(Pairs pairs, const uint32_t* list, int64_t count, Key key) {
  const int64_t size = next_power_of_two(count);
  for (int64_t i = threadIdx.x; i < size; i += kThreads) {
    const uint32_t id = i < count ? ops::load(list + i) : 0xFFFFFFFFu;
    pairs.id[i] = id;
    pairs.key[i] = i < count ? key(id) : 0;
  }
  __syncthreads();
}

// Sorts by key descending, then id ascending: a bitonic network over the padded size.
__device__ inline void sort_pairs(Pairs pairs, int64_t count) {
  const int64_t size = next_power_of_two(count);
  for (int64_t run = 2; run <= size; run *= 2) {
    for (int64_t stride = run / 2; stride > 0; stride /= 2) {
      for (int64_t i = threadIdx.x; i < size / 2; i += kThreads) {
        const int64_t a = 2 * i - (i & (stride - 1)), b = a + stride;
        const uint64_t key_a = pairs.key[a], key_b = pairs.key[b];
        const uint32_t id_a = pairs.id[a], id_b = pairs.id[b];
        const bool b_first = key_b > key_a || (key_b == key_a && id_b < id_a);
        if (b_first == ((a & run) == 0)) {
          pairs.key[a] = key_b;
          pairs.key[b] = key_a;
          pairs.id[a] = id_b;
          pairs.id[b] = id_a;
        }
      }
      __syncthreads();
    }
  }
}

}  // namespace cascade::cuda
