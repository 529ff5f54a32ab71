// The greedy token: a logit and its place in the vocabulary.
#pragma once

#include "../cuda/device.cuh"

namespace cgpt {
namespace {

// NaN is the largest, as torch.argmax has it; of equals the first counts.
struct Candidate {
  float logit;
  int token;

  __device__ void take(const Candidate& other) {
    const bool nan = logit != logit, theirs = other.logit != other.logit;
    const bool equal = (nan && theirs) || logit == other.logit;
    const bool larger = (theirs && !nan) || other.logit > logit;
    if (larger || (equal && other.token < token)) *this = other;
  }
};

constexpr int kNoToken = 2147483647;  // of threads that saw none: any other is before it

__device__ inline Candidate best_of_warp(Candidate best) {
  for (int offset = cuda::kWarp / 2; offset > 0; offset /= 2) {
    const Candidate other{cuda::shuffle_xor(best.logit, offset),
                          cuda::shuffle_xor(best.token, offset)};
    best.take(other);
  }
  return best;
}

}  // namespace
}  // namespace cgpt
