#include "cpu/gated_mlp.h"

#include "cpu/aligned_floats.h"
#include "cpu/matmul_tiles.h"
#include "cpu/swiglu.h"
#include "team.h"

namespace xrl::XRL_ISA {
namespace {

constexpr Addend kNothing{nullptr, 0};

// A weight as the panels of a product: where it stands, or packed for one pass over all rows.
class TeamWeight {
 public:
  TeamWeight(const StridedMatrix& b, int64_t depth, int64_t columns)
      : b_(b), depth_(depth), columns_(columns), packed_(has_panels(b, columns) ? nullptr : packed_room()) {}

  void pack(int num_threads) {
    if (packed_ == nullptr) return;
    for_ranges((columns_ + kPanel - 1) / kPanel, num_threads, [this](const Range& panels) {
      for (int64_t column = panels.first * kPanel; column < panels.last * kPanel; column += kPanel) {
        pack_panel(b_.from(0, column), panel_columns(column, columns_), static_cast<int>(depth_),
                   packed_.get() + column * depth_);
      }
    });
  }

  // c[rows, columns] = a b + addend
  void multiply(const float* a, int64_t a_stride, const Addend& addend, int64_t rows, float* c, int64_t c_stride,
                float* copies) const {
    const Panels panels = packed_ == nullptr ? panels_in_place(b_) : panels_packed(packed_.get(), depth_);
    chunk_times_deep_panels({a, a_stride, 1}, panels, addend, rows, columns_, depth_, c, c_stride, copies);
  }

 private:
  Floats packed_room() const { return make_floats(depth_ * round_up(columns_, kPanel)); }

  StridedMatrix b_;
  int64_t depth_;
  int64_t columns_;
  Floats packed_;
};

inline void swiglu_row(const float* hidden, int64_t ffn, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= ffn; i += kLanes) {
    store_lanes(out + i, swiglu(load_lanes(hidden + i), load_lanes(hidden + ffn + i)));
  }
  for (; i < ffn; ++i) out[i] = swiglu(hidden[i], hidden[ffn + i]);
}

}  // namespace

void gated_mlp_forward(const float* x, const GatedMlp& mlp, const Addend& addend, int64_t rows, float* hidden,
                       float* out, int num_threads) {
  const int64_t width = 2 * mlp.ffn;
  TeamWeight gate_up({mlp.gate_up, 1, mlp.inputs}, mlp.inputs, width);
  TeamWeight down({mlp.down, 1, mlp.ffn}, mlp.ffn, mlp.outputs);
  gate_up.pack(num_threads);
  down.pack(num_threads);
  const Split split(rows, 1, std::max(num_threads, 1));
  Turns turns(split, kTileRows);
  run_on_team(num_threads, [&](int thread) {
    const Floats copies = make_floats(kChunkTiles * kCopySize);
    const Floats activated = make_floats(kTileRows * mlp.ffn);
    for (Turn turn; turns.take(thread, turn);) {
      const int64_t row = turn.rows.first;
      const int count = static_cast<int>(turn.rows.size());
      float* tile_hidden = hidden + row * width;
      gate_up.multiply(x + row * mlp.inputs, mlp.inputs, kNothing, count, tile_hidden, width, copies.get());
      for (int i = 0; i < count; ++i) swiglu_row(tile_hidden + i * width, mlp.ffn, activated.get() + i * mlp.ffn);
      down.multiply(activated.get(), mlp.ffn, addend.from(row, 0), count, out + row * mlp.outputs, mlp.outputs,
                    copies.get());
    }
  });
}

void gated_mlp_backward(const float* grad, const GatedMlp& mlp, int64_t rows, float* hidden, float* activated,
                        float* grad_x, int num_threads) {
  const int64_t width = 2 * mlp.ffn;
  TeamWeight down({mlp.down, mlp.ffn, 1}, mlp.outputs, mlp.ffn);
  TeamWeight gate_up({mlp.gate_up, mlp.inputs, 1}, grad_x == nullptr ? 0 : width, mlp.inputs);
  down.pack(num_threads);
  gate_up.pack(num_threads);
  const Split split(rows, 1, std::max(num_threads, 1));
  Turns turns(split, kTileRows);
  run_on_team(num_threads, [&](int thread) {
    const Floats copies = make_floats(kChunkTiles * kCopySize);
    for (Turn turn; turns.take(thread, turn);) {
      const int64_t row = turn.rows.first;
      const int count = static_cast<int>(turn.rows.size());
      float* tile_hidden = hidden + row * width;
      float* tile_activated = activated + row * mlp.ffn;  // its gradient, until the next lines
      down.multiply(grad + row * mlp.outputs, mlp.outputs, kNothing, count, tile_activated, mlp.ffn, copies.get());
      for (int i = 0; i < count; ++i) {
        float* in = tile_hidden + i * width;
        float* place = tile_activated + i * mlp.ffn;
        swiglu_gradient_row<true>(in, place, mlp.ffn, in, place);
      }
      if (grad_x != nullptr) {
        gate_up.multiply(tile_hidden, width, kNothing, count, grad_x + row * mlp.inputs, mlp.inputs, copies.get());
      }
    }
  });
}

}  // namespace xrl::XRL_ISA
