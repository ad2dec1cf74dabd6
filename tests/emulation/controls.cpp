// The emulation's schedule and counters, for ctypes.
#include "emulation.hpp"

#define CASCADE_CONTROL extern "C" __attribute__((visibility("default")))

CASCADE_CONTROL void emulation_schedule(uint64_t seed, bool perturb) {
  emulation::settings().seed = seed;
  emulation::settings().perturb = perturb;
}

// The shared memory that a block may ask for.
CASCADE_CONTROL void emulation_shared_limit(uint64_t bytes) { emulation::settings().shared_limit = bytes; }

CASCADE_CONTROL void emulation_reset_counters() {
  emulation::counters() = {};
  emulation::phases().clear();
}

// The phases launched since then, separated by blanks.
CASCADE_CONTROL const char* emulation_phases() { return emulation::phases().c_str(); }

// Launches, blocks, barriers, bytes read, bytes written, bytes copied asynchronously, matrix operations, matrix loads,
// float64 multiply-adds.
CASCADE_CONTROL void emulation_counters(uint64_t* nine) {
  const emulation::Counters& c = emulation::counters();
  const uint64_t values[] = {c.launches,    c.blocks,     c.barriers,     c.bytes_read,   c.bytes_written,
                             c.async_bytes, c.matrix_ops, c.matrix_loads, c.multiply_adds};
  std::copy(std::begin(values), std::end(values), nine);
}
