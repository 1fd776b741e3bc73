#include "draw/op.h"

#include <algorithm>
#include <cmath>

#include "draw/cpu.h"

namespace r1 {

static constexpr const char* kOp = "draw_tokens";
// Logits that are worth a thread of their own.
static constexpr int64_t kGrain = 1 << 13;

Tensor draw_tokens_cpu(const Tensor& logits, const Tensor& keys, int64_t vocab_start, int64_t vocab_size,
                       double temperature) {
  check_tensor(kOp, "logits", logits, logits, {-1, -1});
  const int64_t rows = logits.size(0), columns = logits.size(1);
  R1_CHECK(columns > 0, kOp, ": logits need at least one column, got ", describe(logits));
  check_tensor(kOp, "keys", keys, logits, {rows});
  R1_CHECK(keys.scalar_type() == ScalarType::Long, kOp, ": keys must be int64, got ", describe(keys));
  R1_CHECK(vocab_start >= 0, kOp, ": vocab_start must be at least 0, got ", vocab_start);
  R1_CHECK(std::isfinite(temperature) && temperature >= 0, kOp, ": temperature must be a finite number >= 0, got ",
           temperature);
  const Element element = element_of(kOp, logits);
  Tensor out = torch::stable::new_empty(logits, {rows, 5}, ScalarType::Double);
  const Draw draw{
      .logits = logits.const_data_ptr(),
      .keys = static_cast<const int64_t*>(keys.const_data_ptr()),
      .out = static_cast<double*>(out.mutable_data_ptr()),
      .columns = columns,
      .num_real = std::clamp<int64_t>(vocab_size - vocab_start, 0, columns),
      .vocab_start = vocab_start,
      .temperature = static_cast<float>(temperature),
  };
  torch::stable::parallel_for(0, rows, kGrain / columns + 1,
                              [&](int64_t begin, int64_t end) { R1_CPU(draw_rows)(draw, element, begin, end); });
  return out;
}

}  // namespace r1
