// AMX (Sapphire Rapids and later): 16 x 16 tiles of sums over 64 dims of bytes, each a matrix product of 16 cycles, and
// AVX-512 for all the rest. A thread's tiles are eight registers of 16 rows of 64 bytes.
#include "cpu/amx_tiles16.hpp"
#include "cpu/amx_tiles8.hpp"

namespace cascade::cpu {
namespace {

struct alignas(64) Shapes {
  uint8_t palette = 1;
  uint8_t first_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

void enter() {
  static constexpr Shapes shapes{};
  _tile_loadconfig(&shapes);
}

void leave() { _tile_release(); }

}  // namespace

const Kernels& amx_kernels() noexcept {
  static const Kernels table = []() noexcept {
    Kernels made = avx512_kernels();
    made.name = "amx";
    made.enter = enter;
    made.leave = leave;
    made.tiles16 = amx::tiles16;
    made.queries16 = 3 * amx::rows;
    made.least16 = amx::rows;
    made.planes16 = true;
    made.tiles8 = amx::tiles8;
    made.queries8 = amx::rows;
    made.by_row8 = true;
    return made;
  }();
  return table;
}

}  // namespace cascade::cpu
