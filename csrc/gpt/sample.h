// One token drawn from a row of logits: temperature, the k likeliest, the fewest that hold
// probability p, as generation draws them. Costs a few passes over the vocabulary; sorting all of
// it, as torch's operations do for top-p, takes as long as a decode step of a 111M model.
#pragma once

#include <cstdint>
#include <vector>

#include "../common/dtype.h"

namespace cgpt {

struct SampleOptions {
  float temperature = 1.0f;  // > 0
  int64_t top_k = 0;         // 0: all; ties with the k-th stay in
  double top_p = 1.0;        // 1: all; what begins before probability p is reached stays in
};

// The token whose share of the cumulative distribution, in order of the token numbers, holds u in
// [0, 1). Throws std::invalid_argument where a logit is NaN or +infinity, or none is finite.
int64_t sample(const float* logits, int64_t V, const SampleOptions& options, double u);

// The first token with the largest logit, V >= 1; a NaN is larger than any number, as in
// torch.argmax.
int64_t argmax(const float* logits, int64_t V);
int64_t argmax(const bf16* logits, int64_t V);

}  // namespace cgpt
