// The GRPO loss of a row in one pass: a cluster of thread blocks holds the row in its shared memory between the sums of
// the softmax and the gradient, which needs them all. From memory a row is read once, and written once.
//
// Each block holds a slice of the row, brought there by one bulk copy. Two blocks of different clusters share a
// multiprocessor, so that one's copy runs beside the other's arithmetic.
#include "cuda/grpo_cluster.h"

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "cuda/grpo_token.cuh"
#include "cuda/softmax.cuh"

namespace xrl::cuda {
namespace {

// A multiprocessor has 228 KiB, for two blocks and 1 KiB more each.
constexpr int kMaxSliceBytes = 100 << 10;
// The largest that every device allows.
constexpr int kMaxBlocks = 8;
constexpr int kBlocksTogether = 2;
constexpr int kOldestDevice = 90;

#if __CUDA_ARCH__ >= 900

namespace cg = cooperative_groups;

// Logits in shared memory, from a multiple of 16 bytes on.
template <typename T>
struct FromShared {
  using Type = T;
  const T* data;

  __device__ __forceinline__ Pack<T> pack(int column) const {
    return {*reinterpret_cast<const uint4*>(data + column)};
  }
};

// What a block tells the others of its cluster about its slice of a row.
struct alignas(16) SliceSums {
  float maximum;
  float exp;
  float shifted;
  float target;  // the chosen token's logit, where it is in this slice
};

// The columns of a row that a block holds.
struct Slice {
  int first;
  int num_columns;
  int num_written;  // with the padding behind the row, which the last block clears

  __device__ __forceinline__ Slice(int block, int num_blocks, int width, int num_columns, int num_out_columns)
      : first(min(block * width, num_columns)),
        num_columns(min(width, num_columns - first)),
        num_written(block == num_blocks - 1 ? num_out_columns - first : this->num_columns) {}
};

// The softmax of the whole row, from the sums of its slices in the order of the blocks.
static __device__ __forceinline__ Sums combine(const cg::cluster_group& cluster, SliceSums* mine, int target_block,
                                               float scale, float& target) {
  Sums row;
  const int num_blocks = static_cast<int>(cluster.num_blocks());
  for (int block = 0; block < num_blocks; ++block) {
    const SliceSums slice = *cluster.map_shared_rank(mine, block);
    Sums sums;
    sums.maximum = slice.maximum, sums.exp = slice.exp, sums.shifted = slice.shifted;
    row.raise_maximum(sums.maximum, scale);
    sums.raise_maximum(row.maximum, scale);
    row.exp += sums.exp;
    row.shifted += sums.shifted;
    if (block == target_block) target = slice.target;
  }
  return row;
}

#endif

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksTogether)
    grpo_cluster_kernel([[maybe_unused]] LogitRows<T> logits, [[maybe_unused]] ChosenTokens tokens,
                        [[maybe_unused]] GrpoInputs inputs, [[maybe_unused]] GrpoRowParams params,
                        [[maybe_unused]] float factor, [[maybe_unused]] OutputRows<T> gradient,
                        [[maybe_unused]] SinglePassOutputs out, [[maybe_unused]] int slice_width) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) unsigned char shared_memory[];
  __shared__ BytesBarrier arrival;
  __shared__ WarpValues maxima, sums_exp, sums_shifted;
  __shared__ SliceSums exchange[2];  // by turns: a block may still read a row's when another writes the next one's
  __shared__ float row_values[5];

  const cg::cluster_group cluster = cg::this_cluster();
  const int block = static_cast<int>(cluster.block_rank());
  const int num_blocks = static_cast<int>(cluster.num_blocks());
  const Slice slice(block, num_blocks, slice_width, static_cast<int>(logits.num_columns),
                    static_cast<int>(gradient.num_columns));
  T* held = reinterpret_cast<T*>(shared_memory);
  const int num_copied = slice.num_columns / kPackColumns<T> * kPackColumns<T>;  // the rest, less than a pack, by hand
  const float scale = tokens.inverse_temperature * kLog2E;
  const GrpoOutputs token_out{out.data + 2 * out.num_rows, out.num_rows};
  const bool is_writer = block == 0 && threadIdx.x == 0;

  if (threadIdx.x == 0) arrival.init();
  uint32_t phase = 0;
  int turn = 0;
  for (int64_t row = blockIdx.x / num_blocks; row < logits.num_rows; row += gridDim.x / num_blocks) {
    T* row_out = gradient.data == nullptr ? nullptr : gradient.data + row * gradient.row_stride + slice.first;
    if (inputs.shares[row] == 0.0f) {  // the same for the whole cluster
      if (is_writer) {
        out.data[row] = out.data[out.num_rows + row] = 0.0f;
        write(token_out, row, GrpoRowOut{});
      }
      if (row_out != nullptr) write_zeros(row_out, slice.num_written);
      continue;
    }

    __syncthreads();  // the row before is no longer read, and the barrier is there
    const T* x = logits.data + row * logits.row_stride + slice.first;
    if (threadIdx.x == 0 && num_copied > 0) {
      arrival.copy(held, x, static_cast<uint32_t>(num_copied * sizeof(T)));
    }
    const int rest = num_copied + static_cast<int>(threadIdx.x);
    if (rest < slice.num_columns) held[rest] = x[rest];
    if (num_copied > 0) {
      arrival.wait(phase);
      phase ^= 1;
    }
    __syncthreads();

    const FromShared<T> source{held};
    Sums sums = thread_sums(source, slice.num_columns, scale);
    maxima.put(warp_max(sums.maximum));
    __syncthreads();
    sums.raise_maximum(maxima.max(), scale);
    sums_exp.put(warp_sum(sums.exp));
    sums_shifted.put(warp_sum(sums.shifted));
    __syncthreads();

    const int target = target_column(tokens, row, logits.num_columns);  // -1: none
    const int target_block = target < 0 ? -1 : target / slice_width;
    if (threadIdx.x == 0) {
      const float logit = target_block == block ? load(held + (target - slice.first)) : 0.0f;
      exchange[turn] = {sums.maximum, sums_exp.sum(), sums_shifted.sum(), logit};
    }
    cluster.sync();

    if (threadIdx.x == 0) {
      float target_logit = 0.0f;
      const Sums total = combine(cluster, &exchange[turn], target_block, scale, target_logit);
      const float maximum = total.exp == 0.0f ? kMinusInfinity : total.maximum;
      const float log_sum = logf(total.exp);
      const float entropy = log_sum - total.shifted * kLn2 / total.exp;
      // -inf - -inf would be NaN, where a row holds nothing: so is this, as its log_sum is -inf.
      const float shifted_target =
          total.exp == 0.0f ? kMinusInfinity : (target_logit - total.maximum) * tokens.inverse_temperature;
      const float logprob = target < 0 ? kNotANumber : shifted_target - log_sum;
      const GrpoRowOut token =
          grpo_token(read(inputs, row, logprob, entropy, params.importance_from_current), params);
      if (is_writer) {
        out.data[row] = logprob;
        out.data[out.num_rows + row] = entropy;
        write(token_out, row, token);
      }
      row_values[0] = maximum;
      row_values[1] = log_sum;
      row_values[2] = entropy;
      row_values[3] = token.grad_logprob * factor;
      row_values[4] = params.entropy_coef == 0.0f ? 0.0f : token.grad_entropy * factor;
    }
    turn ^= 1;
    __syncthreads();

    if (row_out == nullptr) continue;
    const RowSlopes slopes(row_values[0], row_values[1], row_values[2], row_values[3], row_values[4],
                           tokens.inverse_temperature, target < 0 ? -1 : target - slice.first);
    int num_written = 0;
    if (!slopes.are_zero()) {
      num_written = slice.num_columns;
      write_gradient(source, num_written, slopes, row_out);
    }
    write_zeros(row_out + num_written, slice.num_written - num_written);
  }
  cluster.sync();  // no block ends while another reads its sums
#endif
}

bool is_aligned(const void* data, int64_t row_stride, size_t element_size) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && row_stride * element_size % 16 == 0;
}

// Blocks of a cluster, as few as hold the row; 0 where too few can.
template <typename T>
int blocks_for(int64_t num_columns) {
  for (int num_blocks = 1; num_blocks <= kMaxBlocks; num_blocks *= 2) {
    if (num_columns * static_cast<int64_t>(sizeof(T)) <= static_cast<int64_t>(num_blocks) * kMaxSliceBytes) {
      return num_blocks;
    }
  }
  return 0;
}

// Whether the code that is loaded on this device is the code above; older devices get an empty kernel.
template <typename T>
bool is_compiled_for_device() {
  cudaFuncAttributes attributes;
  if (cudaFuncGetAttributes(&attributes, grpo_cluster_kernel<T>) == cudaSuccess) {
    return attributes.ptxVersion >= kOldestDevice;
  }
  cudaGetLastError();  // takes the error back: it was a question
  return false;
}

}  // namespace

template <typename T>
bool grpo_cluster(const LogitRows<T>& logits, const ChosenTokens& tokens, const GrpoInputs& inputs,
                  const GrpoRowParams& params, float factor, const OutputRows<T>& gradient,
                  const SinglePassOutputs& out, Stream stream) {
  if (!is_aligned(logits.data, logits.row_stride, sizeof(T))) return false;
  if (gradient.data != nullptr && !is_aligned(gradient.data, gradient.row_stride, sizeof(T))) return false;
  const int num_blocks = blocks_for<T>(logits.num_columns);
  if (num_blocks == 0 || !is_compiled_for_device<T>()) return false;
  if (logits.num_rows == 0) return true;

  const int64_t num_packs = (logits.num_columns + kPackColumns<T> - 1) / kPackColumns<T>;
  const int slice_width = static_cast<int>(std::max<int64_t>(1, (num_packs + num_blocks - 1) / num_blocks)) *
                          kPackColumns<T>;
  const size_t slice_bytes = slice_width * sizeof(T);
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = num_blocks;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(num_blocks);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = slice_bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  // As many clusters as run at once; each takes further rows in turns.
  int num_clusters = 0;
  if (cudaFuncSetAttribute(grpo_cluster_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           static_cast<int>(slice_bytes)) != cudaSuccess ||
      cudaOccupancyMaxActiveClusters(&num_clusters, grpo_cluster_kernel<T>, &config) != cudaSuccess ||
      num_clusters == 0) {
    cudaGetLastError();  // takes the error back: a device that is cut into parts may not hold a cluster
    return false;
  }
  config.gridDim.x = static_cast<unsigned int>(std::min<int64_t>(logits.num_rows, num_clusters) * num_blocks);
  cudaLaunchKernelEx(&config, grpo_cluster_kernel<T>, logits, tokens, inputs, params, factor, gradient, out,
                     slice_width);
  check_launch("grpo_cluster");
  return true;
}

#define XRL_INSTANTIATE(T)                                                                                       \
  template bool grpo_cluster<T>(const LogitRows<T>&, const ChosenTokens&, const GrpoInputs&, const GrpoRowParams&, \
                                float, const OutputRows<T>&, const SinglePassOutputs&, Stream);

XRL_INSTANTIATE(float)
XRL_INSTANTIATE(Bfloat16)

}  // namespace xrl::cuda
