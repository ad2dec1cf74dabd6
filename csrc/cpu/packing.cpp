#include "cpu/packing.hpp"

namespace cascade::cpu {

Extent measure_rows(const Embedding& embedding, int64_t rows, const Control& control, Shelf* shelf) {
  constexpr int64_t together = 1024;
  const int64_t dims = embedding.dims();
  std::vector<Extent> extents(std::max(1, control.threads));
  for (Extent& extent : extents) extent.stored.resize(embedding.views().size());
  run_parts(static_cast<int>(extents.size()), control, [&](int part, int parts) {
    Extent& extent = extents[part];
    std::vector<double> y(dims);
    for (int64_t row = rows * part / parts; row < rows * (part + 1) / parts; ++row) {
      if (row % together == 0) {
        if (should_stop()) return;
        passed(shelf, together, dims * 4);
      }
      embedding.key(row, y.data());
      embedding.raise_longest(row, extent.stored);
      extent.norm = std::max(extent.norm, length(y.data(), dims));
      extent.most = std::max(extent.most, largest(y.data(), dims));
    }
  });
  Extent all = extents.front();
  for (const Extent& extent : extents) {
    all.norm = std::max(all.norm, extent.norm);
    all.most = std::max(all.most, extent.most);
    for (size_t view = 0; view < all.stored.size(); ++view)
      all.stored[view] = std::max(all.stored[view], extent.stored[view]);
  }
  return all;
}

}  // namespace cascade::cpu
