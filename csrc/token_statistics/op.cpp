#include "token_statistics/op.h"

#include <utility>

#include "token_statistics/cpu.h"
#ifdef R1_WITH_CUDA
#include "token_statistics/cuda.h"
#endif

namespace r1 {

using torch::stable::new_empty;
using torch::stable::parallel_for;

// Elements that are worth a thread of their own.
static constexpr int64_t kGrain = 1 << 15;

static ScalarType arithmetic(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

static LogitShard check_shard(const char* op, const Tensor& logits, const Tensor& targets, int64_t vocab_start,
                              int64_t num_real, double temperature) {
  check_tensor(op, "logits", logits, logits, {-1, -1});
  check_tensor(op, "targets", targets, logits, {logits.size(0)});
  R1_CHECK(targets.scalar_type() == ScalarType::Long, op, ": targets must be int64, got ", describe(targets));
  R1_CHECK(num_real >= 0 && num_real <= logits.size(1), op, ": num_real must be in [0, ", logits.size(1), "], got ",
           num_real);
  R1_CHECK(temperature > 0, op, ": temperature must be positive, got ", temperature);
  return {logits.data_ptr(), targets.const_data_ptr<int64_t>(), logits.size(0), logits.size(1), vocab_start, num_real,
          temperature};
}

static Logits dtype_on_cpu(const char* op, const Tensor& logits) {
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      return Logits::float32;
    case ScalarType::BFloat16:
      return Logits::bfloat16;
    case ScalarType::Double:
      return Logits::float64;
    default:
      break;
  }
  R1_CHECK(false, op, ": logits must be float32, bfloat16 or float64, got ", describe(logits));
}

static void check_stats(const Tensor& stats) {
  check_tensor("combine_statistics", "stats", stats, stats, {-1, -1, 4});
  R1_CHECK(stats.size(0) > 0, "combine_statistics: at least one shard expected, got ", describe(stats));
}

// [num_tokens] of the arithmetic's dtype; null without a tensor.
static const void* check_per_token(const char* name, const std::optional<Tensor>& tensor, const Tensor& logits) {
  if (!tensor.has_value()) return nullptr;
  check_tensor("shard_gradient_", name, *tensor, logits, {logits.size(0)});
  R1_CHECK(tensor->scalar_type() == arithmetic(logits), "shard_gradient_: ", name, " must be ",
           name_of(arithmetic(logits)), " for logits ", describe(logits), ", got ", describe(*tensor));
  return tensor->const_data_ptr();
}

static TokenGradients check_gradients(const Tensor& logits, const std::optional<Tensor>& grad_logprobs,
                                      const std::optional<Tensor>& grad_entropy, const Tensor& entropy,
                                      const Tensor& max, const Tensor& log_sum) {
  return {check_per_token("grad_logprobs", grad_logprobs, logits),
          check_per_token("grad_entropy", grad_entropy, logits), check_per_token("entropy", entropy, logits),
          check_per_token("max", max, logits), check_per_token("log_sum", log_sum, logits)};
}

static FourTensors new_results(const Tensor& stats) {
  const auto result = [&] { return new_empty(stats, {stats.size(1)}); };
  return {result(), result(), result(), result()};
}

Tensor shard_statistics_cpu(const Tensor& logits, const Tensor& targets, int64_t vocab_start, int64_t num_real,
                            double temperature, bool need_entropy) {
  const auto shard = check_shard("shard_statistics", logits, targets, vocab_start, num_real, temperature);
  const auto dtype = dtype_on_cpu("shard_statistics", logits);
  Tensor stats = new_empty(logits, {shard.num_tokens, 4}, arithmetic(logits));
  void* out = stats.mutable_data_ptr();
  parallel_for(0, shard.num_tokens, kGrain / (shard.vocab + 1) + 1, [&](int64_t begin, int64_t end) {
    R1_CPU(shard_statistics)(dtype, shard, need_entropy, out, begin, end);
  });
  return stats;
}

FourTensors combine_statistics_cpu(const Tensor& stats) {
  check_stats(stats);
  const auto dtype = stats.scalar_type();
  R1_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
           "combine_statistics: stats must be float32 or float64, got ", describe(stats));
  FourTensors results = new_results(stats);
  void* const out[4] = {std::get<0>(results).mutable_data_ptr(), std::get<1>(results).mutable_data_ptr(),
                        std::get<2>(results).mutable_data_ptr(), std::get<3>(results).mutable_data_ptr()};
  const void* in = stats.const_data_ptr();
  parallel_for(0, stats.size(1), kGrain / (16 * stats.size(0)) + 1, [&](int64_t begin, int64_t end) {
    R1_CPU(combine_statistics)(dtype == ScalarType::Double, in, stats.size(0), stats.size(1), out, begin, end);
  });
  return results;
}

void shard_gradient_cpu(Tensor logits, const Tensor& targets, std::optional<Tensor> grad_logprobs,
                        std::optional<Tensor> grad_entropy, const Tensor& entropy, const Tensor& max,
                        const Tensor& log_sum, int64_t vocab_start, int64_t num_real, double temperature) {
  const auto shard = check_shard("shard_gradient_", logits, targets, vocab_start, num_real, temperature);
  const auto dtype = dtype_on_cpu("shard_gradient_", logits);
  const auto gradients = check_gradients(logits, grad_logprobs, grad_entropy, entropy, max, log_sum);
  parallel_for(0, shard.num_tokens, kGrain / (shard.vocab + 1) + 1,
               [&](int64_t begin, int64_t end) { R1_CPU(shard_gradient)(dtype, shard, gradients, begin, end); });
}

#ifdef R1_WITH_CUDA

static bool is_bfloat16_on_cuda(const char* op, const Tensor& logits) {
  const auto dtype = logits.scalar_type();
  R1_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, op,
           ": logits must be float32 or bfloat16 on CUDA, got ", describe(logits));
  return dtype == ScalarType::BFloat16;
}

Tensor shard_statistics_cuda(const Tensor& logits, const Tensor& targets, int64_t vocab_start, int64_t num_real,
                             double temperature, bool need_entropy) {
  const auto shard = check_shard("shard_statistics", logits, targets, vocab_start, num_real, temperature);
  const bool is_bfloat16 = is_bfloat16_on_cuda("shard_statistics", logits);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  Tensor stats = new_empty(logits, {shard.num_tokens, 4}, ScalarType::Float);
  check_cuda("shard_statistics", r1_shard_statistics_cuda(&shard, is_bfloat16, need_entropy,
                                                          stats.mutable_data_ptr<float>(), cuda_stream(logits)));
  return stats;
}

FourTensors combine_statistics_cuda(const Tensor& stats) {
  check_stats(stats);
  R1_CHECK(stats.scalar_type() == ScalarType::Float, "combine_statistics: stats must be float32 on CUDA, got ",
           describe(stats));
  const torch::stable::accelerator::DeviceGuard guard(stats.get_device_index());
  FourTensors results = new_results(stats);
  float* const out[4] = {std::get<0>(results).mutable_data_ptr<float>(), std::get<1>(results).mutable_data_ptr<float>(),
                         std::get<2>(results).mutable_data_ptr<float>(),
                         std::get<3>(results).mutable_data_ptr<float>()};
  check_cuda("combine_statistics", r1_combine_statistics_cuda(stats.const_data_ptr<float>(), stats.size(0),
                                                              stats.size(1), out, cuda_stream(stats)));
  return results;
}

void shard_gradient_cuda(Tensor logits, const Tensor& targets, std::optional<Tensor> grad_logprobs,
                         std::optional<Tensor> grad_entropy, const Tensor& entropy, const Tensor& max,
                         const Tensor& log_sum, int64_t vocab_start, int64_t num_real, double temperature) {
  const auto shard = check_shard("shard_gradient_", logits, targets, vocab_start, num_real, temperature);
  const bool is_bfloat16 = is_bfloat16_on_cuda("shard_gradient_", logits);
  const auto gradients = check_gradients(logits, grad_logprobs, grad_entropy, entropy, max, log_sum);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  const auto floats = [](const void* values) { return static_cast<const float*>(values); };
  check_cuda("shard_gradient_",
             r1_shard_gradient_cuda(&shard, is_bfloat16, floats(gradients.logprobs),
                                    floats(gradients.entropy_gradients), floats(gradients.entropy),
                                    floats(gradients.max), floats(gradients.log_sum), cuda_stream(logits)));
}

#endif

}  // namespace r1
