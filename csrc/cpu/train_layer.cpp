#include "cpu/train_layer.h"

#include <algorithm>

#include "cpu/aligned_floats.h"
#include "cpu/gated_mlp.h"
#include "cpu/layer_ops.h"
#include "cpu/matmul.h"
#include "team.h"

namespace xrl::XRL_ISA {
namespace {

constexpr Addend kNothing{nullptr, 0};

Floats make_zeros(int64_t count) {
  Floats place = make_floats(count);
  std::fill(place.get(), place.get() + count, 0.0f);
  return place;
}

// The operations of a layer, with the sizes that they share.
class Operations {
 public:
  Operations(const TrainLayer& layer, int num_threads)
      : layer_(layer), shape_(layer.shape), num_threads_(num_threads) {}

  void normalise(const float* x, const float* weight, float* out, float* inverse_rms) const {
    rms_norm_forward<float>(x, weight, shape_.rows, shape_.hidden, shape_.eps, out, inverse_rms, num_threads_);
  }

  // grad_x = the norm's gradient of x + addend
  void normalise_backward(const float* x, const float* weight, const float* inverse_rms, const float* grad,
                          const float* addend, float* grad_x, float* grad_weight) const {
    const Floats sums = make_floats(num_threads_ * shape_.hidden);
    rms_norm_backward<float>(x, weight, inverse_rms, grad, addend, shape_.rows, shape_.hidden, grad_x, sums.get(),
                             num_threads_);
    add_sums(sums.get(), shape_.hidden, shape_.hidden, grad_weight);
  }

  // out[rows, outputs] = x[rows, inputs] weight[outputs, inputs]^T + addend
  void multiply(const float* x, int64_t inputs, const float* weight, int64_t outputs, const Addend& addend,
                float* out) const {
    matmul({x, inputs, 1}, {weight, 1, inputs}, addend, shape_.rows, outputs, inputs, out, outputs, num_threads_);
  }

  // grad_x = grad weight
  void multiply_backward(const float* grad, int64_t outputs, const float* weight, int64_t inputs,
                         float* grad_x) const {
    matmul({grad, outputs, 1}, {weight, inputs, 1}, kNothing, shape_.rows, inputs, outputs, grad_x, inputs,
           num_threads_);
  }

  // grad_weight += grad^T x
  void add_weight_gradient(const float* grad, int64_t outputs, const float* x, int64_t inputs,
                           float* grad_weight) const {
    if (grad_weight == nullptr) return;
    matmul({grad, 1, outputs}, {x, inputs, 1}, {grad_weight, inputs}, outputs, inputs, shape_.rows, grad_weight,
           inputs, num_threads_);
  }

  void add_bias_gradient(const float* grad, int64_t outputs, float* grad_bias) const {
    if (grad_bias == nullptr) return;
    constexpr int64_t kColumns = 64;
    for_ranges((outputs + kColumns - 1) / kColumns, num_threads_, [&](const Range& range) {
      const int64_t last = std::min(range.last * kColumns, outputs);
      for (int64_t row = 0; row < shape_.rows; ++row) {
        for (int64_t i = range.first * kColumns; i < last; ++i) grad_bias[i] += grad[row * outputs + i];
      }
    });
  }

  GatedMlp mlp() const {
    return {layer_.weights.gate_up, layer_.weights.down, shape_.hidden, shape_.ffn, shape_.hidden};
  }

  // Fills `attended` and `log_sums` of what is kept, from `mixed`.
  void attend(const KeptActivations& kept) const {
    const RotatedHeads rotated(*this, kept.mixed);
    const AttentionForward<float> tensors{
        queries<const float>(rotated.query.get()), keys<const float>(rotated.key.get()),
        values<const float>(kept.mixed), queries<float>(kept.attended), kept.log_sums};
    packed_attention_forward(tensors, layer_.sequences, attention(), num_threads_);
    clear_behind(kept.attended, shape_.query_width());
  }

  void attend_backward(const KeptActivations& kept, const float* grad, float* grad_mixed, float* grad_q_norm,
                       float* grad_k_norm) const {
    const RotatedHeads rotated(*this, kept.mixed), gradients(*this);
    const AttentionBackward<float> tensors{
        queries<const float>(rotated.query.get()), keys<const float>(rotated.key.get()),
        values<const float>(kept.mixed), queries<const float>(kept.attended), queries<const float>(grad),
        kept.log_sums, queries<float>(gradients.query.get()), keys<float>(gradients.key.get()),
        values<float>(grad_mixed)};
    packed_attention_backward(tensors, layer_.sequences, attention(), num_threads_);
    const int64_t dim = shape_.qkv.head_dim;
    const Floats sums = make_zeros(num_threads_ * 2 * dim);
    qkv_rope_backward<float>(kept.mixed, gradients.query.get(), gradients.key.get(), shape_.qkv, rope(), grad_mixed,
                             sums.get(), num_threads_);
    add_sums(sums.get(), 2 * dim, dim, grad_q_norm);
    add_sums(sums.get() + dim, 2 * dim, dim, grad_k_norm);
    clear_behind(grad_mixed, shape_.qkv_width());
  }

 private:
  // Queries and keys as the scores see them, or their gradients.
  struct RotatedHeads {
    Floats query, key;

    explicit RotatedHeads(const Operations& of)
        : query(make_floats(of.shape_.qkv.num_tokens * of.shape_.query_width())),
          key(make_floats(of.shape_.qkv.num_tokens * of.shape_.qkv.num_kv_heads * of.shape_.qkv.head_dim)) {}

    RotatedHeads(const Operations& of, const float* mixed) : RotatedHeads(of) {
      qkv_rope_forward<float>(mixed, of.shape_.qkv, of.rope(), query.get(), key.get(), of.num_threads_);
    }
  };

  QkvRope<float> rope() const {
    return {layer_.cosine, layer_.sine, layer_.weights.q_norm, layer_.weights.k_norm, shape_.eps};
  }

  AttentionShape attention() const { return attention_shape(shape_.qkv, shape_.scale); }

  template <typename T>
  TokenHeads<T> queries(T* place) const {
    return dense_heads(place, shape_.num_heads(), shape_.qkv.head_dim);
  }

  template <typename T>
  TokenHeads<T> keys(T* place) const {
    return dense_heads(place, shape_.qkv.num_kv_heads, shape_.qkv.head_dim);
  }

  template <typename T>
  TokenHeads<T> values(T* mixed) const {
    return values_of(mixed, shape_.qkv);
  }

  void clear_behind(float* rows, int64_t width) const {
    std::fill(rows + shape_.qkv.num_tokens * width, rows + shape_.rows * width, 0.0f);
  }

  // What each thread has summed up: sums[thread * stride + i].
  void add_sums(const float* sums, int64_t stride, int64_t size, float* out) const {
    if (out == nullptr) return;
    for (int64_t thread = 0; thread < num_threads_; ++thread) {
      for (int64_t i = 0; i < size; ++i) out[i] += sums[thread * stride + i];
    }
  }

  const TrainLayer& layer_;
  const TrainLayerShape& shape_;
  int num_threads_;
};

}  // namespace

void train_layer_forward(const TrainLayer& layer, const float* x, const KeptActivations& kept, float* out,
                         int num_threads) {
  const Operations run(layer, num_threads);
  const TrainLayerShape& shape = layer.shape;
  const LayerParameters<const float>& weights = layer.weights;
  const int64_t hidden = shape.hidden;
  run.normalise(x, weights.input_norm, kept.input_normed, kept.input_inverse_rms);
  run.multiply(kept.input_normed, hidden, weights.qkv, shape.qkv_width(), {weights.qkv_bias, 0}, kept.mixed);
  run.attend(kept);
  run.multiply(kept.attended, shape.query_width(), weights.attention_out, hidden, {x, hidden}, kept.between);
  run.normalise(kept.between, weights.mlp_norm, kept.mlp_normed, kept.mlp_inverse_rms);
  gated_mlp_forward(kept.mlp_normed, run.mlp(), {kept.between, hidden}, shape.rows, kept.gate_up, out, num_threads);
}

void train_layer_backward(const TrainLayer& layer, const float* x, const KeptActivations& kept, const float* grad,
                          const LayerParameters<float>& gradients, float* grad_x, int num_threads) {
  const Operations run(layer, num_threads);
  const TrainLayerShape& shape = layer.shape;
  const LayerParameters<const float>& weights = layer.weights;
  const int64_t hidden = shape.hidden, ffn = shape.ffn;
  const Floats grad_normed = make_floats(shape.rows * hidden), grad_between = make_floats(shape.rows * hidden);
  {
    const Floats activated = make_floats(shape.rows * ffn);
    gated_mlp_backward(grad, run.mlp(), shape.rows, kept.gate_up, activated.get(), grad_normed.get(), num_threads);
    run.add_weight_gradient(grad, hidden, activated.get(), ffn, gradients.down);
  }
  run.add_weight_gradient(kept.gate_up, 2 * ffn, kept.mlp_normed, hidden, gradients.gate_up);
  run.normalise_backward(kept.between, weights.mlp_norm, kept.mlp_inverse_rms, grad_normed.get(), grad,
                         grad_between.get(), gradients.mlp_norm);

  const Floats grad_mixed = make_floats(shape.rows * shape.qkv_width());
  {
    const Floats grad_attended = make_floats(shape.rows * shape.query_width());
    run.multiply_backward(grad_between.get(), hidden, weights.attention_out, shape.query_width(), grad_attended.get());
    run.add_weight_gradient(grad_between.get(), hidden, kept.attended, shape.query_width(), gradients.attention_out);
    run.attend_backward(kept, grad_attended.get(), grad_mixed.get(), gradients.q_norm, gradients.k_norm);
  }
  run.multiply_backward(grad_mixed.get(), shape.qkv_width(), weights.qkv, hidden, grad_normed.get());
  run.add_weight_gradient(grad_mixed.get(), shape.qkv_width(), kept.input_normed, hidden, gradients.qkv);
  run.add_bias_gradient(grad_mixed.get(), shape.qkv_width(), gradients.qkv_bias);
  run.normalise_backward(x, weights.input_norm, kept.input_inverse_rms, grad_normed.get(), grad_between.get(), grad_x,
                         gradients.input_norm);
}

}  // namespace xrl::XRL_ISA
