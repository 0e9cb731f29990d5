#include "cpu/gated_mlp.h"

#include <omp.h>

#include "cpu/aligned_floats.h"
#include "cpu/matmul_tiles.h"
#include "cpu/swiglu.h"

namespace xrl::XRL_ISA {
namespace {

// A weight packed for one pass over all rows. The team packs it together; each of its threads must call `pack`.
class TeamWeight {
 public:
  TeamWeight(const StridedMatrix& b, int64_t depth, int64_t columns)
      : b_(b), packed_(make_floats(depth * round_up(columns, kPanel))), view_{packed_.get(), depth, columns, false} {}

  void pack() {
    const int64_t num_panels = this->num_panels();
#pragma omp for schedule(static)
    for (int64_t p = 0; p < num_panels; ++p) {
      pack_panel(b_.from(0, p * kPanel), panel_columns(p * kPanel, view_.columns), static_cast<int>(view_.depth),
                 packed_.get() + p * kPanel * view_.depth);
    }
  }

  // c[rows, columns] = a b, for one tile of rows.
  void multiply(const float* a, int64_t a_stride, int rows, float* c, int64_t c_stride, float* copy) const {
    product_of_panels({a, a_stride, 1}, view_, {nullptr, 0}, rows, 0, num_panels(), c, c_stride, copy);
  }

 private:
  int64_t num_panels() const { return (view_.columns + kPanel - 1) / kPanel; }

  StridedMatrix b_;
  Floats packed_;
  PackedWeight view_;
};

inline void swiglu_row(const float* hidden, int64_t ffn, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= ffn; i += kLanes) {
    store_lanes(out + i, swiglu(load_lanes(hidden + i), load_lanes(hidden + ffn + i)));
  }
  for (; i < ffn; ++i) out[i] = swiglu(hidden[i], hidden[ffn + i]);
}

}  // namespace

void gated_mlp_forward(const float* x, const GatedMlp& mlp, int64_t rows, float* hidden, float* out, int num_threads) {
  const int64_t width = 2 * mlp.ffn;
  TeamWeight gate_up({mlp.gate_up, 1, mlp.inputs}, mlp.inputs, width);
  TeamWeight down({mlp.down, 1, mlp.ffn}, mlp.ffn, mlp.outputs);
#pragma omp parallel num_threads(num_threads)
  {
    const Floats copy = make_floats(kCopySize);
    const Floats activated = make_floats(kTileRows * mlp.ffn);
    gate_up.pack();
    down.pack();
#pragma omp for schedule(dynamic)
    for (int64_t row = 0; row < rows; row += kTileRows) {
      const int count = tile_rows(row, rows);
      float* tile_hidden = hidden + row * width;
      gate_up.multiply(x + row * mlp.inputs, mlp.inputs, count, tile_hidden, width, copy.get());
      for (int i = 0; i < count; ++i) swiglu_row(tile_hidden + i * width, mlp.ffn, activated.get() + i * mlp.ffn);
      down.multiply(activated.get(), mlp.ffn, count, out + row * mlp.outputs, mlp.outputs, copy.get());
    }
  }
}

void gated_mlp_backward(const float* grad, const GatedMlp& mlp, int64_t rows, float* hidden, float* activated,
                        float* grad_x, int num_threads) {
  const int64_t width = 2 * mlp.ffn;
  TeamWeight down({mlp.down, mlp.ffn, 1}, mlp.outputs, mlp.ffn);
  TeamWeight gate_up({mlp.gate_up, mlp.inputs, 1}, grad_x == nullptr ? 0 : width, mlp.inputs);
#pragma omp parallel num_threads(num_threads)
  {
    const Floats copy = make_floats(kCopySize);
    down.pack();
    gate_up.pack();
#pragma omp for schedule(dynamic)
    for (int64_t row = 0; row < rows; row += kTileRows) {
      const int count = tile_rows(row, rows);
      float* tile_hidden = hidden + row * width;
      float* tile_activated = activated + row * mlp.ffn;  // its gradient, until the next lines
      down.multiply(grad + row * mlp.outputs, mlp.outputs, count, tile_activated, mlp.ffn, copy.get());
      for (int i = 0; i < count; ++i) {
        float* in = tile_hidden + i * width;
        float* place = tile_activated + i * mlp.ffn;
        swiglu_gradient_row<true>(in, place, mlp.ffn, in, place);
      }
      if (grad_x != nullptr) {
        gate_up.multiply(tile_hidden, width, count, grad_x + row * mlp.inputs, mlp.inputs, copy.get());
      }
    }
  }
}

}  // namespace xrl::XRL_ISA
