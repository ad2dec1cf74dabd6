// The choice of an instruction set, once per process and outside every loop.
#include <array>
#include <stdexcept>

#include "cpu/isa.hpp"

namespace cascade::cpu {
namespace {

constexpr std::array table{
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
