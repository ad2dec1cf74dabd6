// The choice of an instruction set, once per process and outside every loop.
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <array>
#include <stdexcept>

#include "cpu/isa.hpp"

namespace cascade::cpu {
namespace {

#if defined(__x86_64__)
bool runs_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vnni");
}

// Linux gives tiles to a process that asks for them: the state of its threads grows by 8 KiB.
bool runs_amx() {
#if defined(__linux__)
  constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  if (!runs_avx512() || !__builtin_cpu_supports("amx-tile") || !__builtin_cpu_supports("amx-int8")) return false;
  static const bool granted = syscall(SYS_arch_prctl, request, tile_data) == 0;
  return granted;
#else
  return false;
#endif
}
#endif

constexpr std::array table{
#if defined(__x86_64__)
    Isa{"amx", "AMX with 8-bit integers, and AVX-512", runs_amx, amx_kernels},
    Isa{"avx512", "AVX-512 with BW, VL, DQ, VBMI2 and VNNI", runs_avx512, avx512_kernels},
    Isa{"avx2", "AVX2 with FMA and F16C",
        [] {
          return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
        },
        avx2_kernels},
#elif defined(__aarch64__)
    Isa{"neon", "AArch64", [] { return true; }, neon_kernels},
#endif
    Isa{"portable", "any machine", [] { return true; }, portable_kernels},
};

}  // namespace

std::span<const Isa> isas() { return table; }

const Kernels& choose(const std::string& name) {
  std::string known;
  for (const Isa& isa : table) {
    if (name.empty() && isa.runs_here()) return isa.kernels();
    if (name == isa.name) {
      if (!isa.runs_here()) throw std::runtime_error("this machine lacks " + std::string(isa.needs));
      return isa.kernels();
    }
    known += (known.empty() ? "" : ", ") + std::string(isa.name);
  }
  throw std::invalid_argument("expected one of " + known + ", got '" + name + "'");
}

}  // namespace cascade::cpu
