/* The machine's int8 peak: independent 8-bit dot products on registers alone, nothing read from memory.
 *
 * Compiled by the mining benchmark with -O2 -march=native where there is a compiler; 0 where the processor has
 * neither matrix units that the system grants, nor a 512-bit dot product, nor AVX2, whose products of pairs are summed
 * in 16 bits, which is as far as it takes one instruction to add them. */
#include <stdint.h>

#if defined(__AVX512VNNI__)
#include <immintrin.h>

#if defined(__AMX_INT8__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

/* As int8_operations below, on matrix units; 0 where the system does not grant them. */
static int64_t matrix_operations(int64_t rounds) {
  enum { TILES = 4, OPERATIONS = 16 * 16 * 64 * 2, TILE_DATA = 18, REQUEST = 0x1023 };
  if (syscall(SYS_arch_prctl, REQUEST, TILE_DATA) != 0) return 0;
  struct {
    uint8_t palette, first_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  } __attribute__((aligned(64))) shapes = {1, 0, {0}, {64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16}};
  _tile_loadconfig(&shapes);
  for (int64_t round = 0; round < rounds; ++round) {
    _tile_dpbssd(0, 4, 5);
    _tile_dpbssd(1, 4, 5);
    _tile_dpbssd(2, 4, 5);
    _tile_dpbssd(3, 4, 5);
  }
  _tile_release();
  return rounds * TILES * OPERATIONS;
}
#else
static int64_t matrix_operations(int64_t rounds) {
  (void)rounds;
  return 0;
}
#endif

enum { ACCUMULATORS = 16, OPERATIONS = 64 * 2 }; /* 64 products and 64 sums an instruction */

/* Runs `rounds` rounds and returns the operations done; `sink` keeps the sums from being thrown away. */
int64_t int8_operations(int64_t rounds, int32_t* sink) {
  const int64_t done = matrix_operations(rounds / 8); /* four take 64 cycles, a round of the below 8 or 16 */
  *sink = 0;
  if (done != 0) return done;
  __m512i sums[ACCUMULATORS];
  for (int i = 0; i < ACCUMULATORS; ++i) sums[i] = _mm512_set1_epi32(i);
  __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(5);
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 16
    for (int i = 0; i < ACCUMULATORS; ++i) sums[i] = _mm512_dpbusd_epi32(sums[i], a, b);
    __asm__ volatile("" : "+v"(a), "+v"(b)); /* what is multiplied may have changed: the loop cannot be folded */
  }
  __m512i all = sums[0];
  for (int i = 1; i < ACCUMULATORS; ++i) all = _mm512_add_epi32(all, sums[i]);
  *sink = _mm512_reduce_add_epi32(all);
  return rounds * ACCUMULATORS * OPERATIONS;
}
#elif defined(__AVX2__)
#include <immintrin.h>

enum { ACCUMULATORS = 12, OPERATIONS = 32 * 2 }; /* 32 products, 16 sums of pairs and 16 sums of those */

int64_t int8_operations(int64_t rounds, int32_t* sink) {
  const __m256i a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(5);
  for (int64_t round = 0; round < rounds; ++round) /* registers by name: GCC 12 kept an array of sums in memory */
    __asm__ volatile(
        ".irp sum, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11\n\t"
        "vpmaddubsw %1, %0, %%ymm15\n\t"
        "vpaddw %%ymm15, %%ymm\\sum, %%ymm\\sum\n\t"
        ".endr"
        :
        : "x"(a), "x"(b)
        : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm15");
  *sink = 0;
  return rounds * ACCUMULATORS * OPERATIONS;
}
#else
int64_t int8_operations(int64_t rounds, int32_t* sink) {
  (void)rounds;
  *sink = 0;
  return 0;
}
#endif
