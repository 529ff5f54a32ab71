#include "sample.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

#include "../common/check.h"

namespace cgpt {
namespace {

struct Candidate {
  float logit;
  int32_t token;
};

bool likelier(const Candidate& a, const Candidate& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
}

// Leaves the likeliest candidates that hold `mass`, in order of likelihood. Few do in a trained
// model, so a growing part is sorted, not all.
void keep_mass(std::vector<Candidate>& c, double mass, float max, float temperature) {
  size_t sorted = 0;
  double before = 0.0;
  for (size_t part = 256; sorted < c.size(); part *= 8) {
    const size_t end = std::min(c.size(), sorted + part);
    if (end < c.size()) std::nth_element(c.begin() + sorted, c.begin() + end, c.end(), likelier);
    std::sort(c.begin() + sorted, c.begin() + end, likelier);
    for (; sorted < end; ++sorted) {
      if (before >= mass) return c.resize(sorted);
      before += std::exp((c[sorted].logit - max) / temperature);
    }
  }
}

// Of the V floats at p whose bits are those of an `Int` each. Bits compare as signed integers once
// those of a negative number's magnitude are flipped; 16 bytes at a time, on any processor.
template <class Int>
int64_t first_largest(const char* p, int64_t V) {
  constexpr int kLanes = 16 / sizeof(Int);
  typedef Int Vec __attribute__((vector_size(16)));
  constexpr Int kMagnitude = std::numeric_limits<Int>::max();
  constexpr Int kInfinity = static_cast<Int>(kMagnitude - (sizeof(Int) == 2 ? 0x7f : 0x7fffff));
  const auto key = [](auto bits) {
    return bits ^ ((bits >> (8 * static_cast<int>(sizeof(Int)) - 1)) & kMagnitude);
  };
  const auto bits_at = [&](int64_t i) {
    Int bits;
    std::memcpy(&bits, p + i * static_cast<int64_t>(sizeof(Int)), sizeof(bits));
    return bits;
  };
  Int largest = std::numeric_limits<Int>::min(), magnitude = 0;
  Vec largest_of = Vec{} + largest, magnitude_of{};
  int64_t i = 0;
  for (; i + kLanes <= V; i += kLanes) {
    Vec bits;
    std::memcpy(&bits, p + i * static_cast<int64_t>(sizeof(Int)), sizeof(bits));
    const Vec k = key(bits), m = bits & kMagnitude;
    largest_of = k > largest_of ? k : largest_of;
    magnitude_of = m > magnitude_of ? m : magnitude_of;
  }
  const auto take = [&](Int k, Int m) {
    largest = std::max(largest, k), magnitude = std::max(magnitude, m);
  };
  for (int lane = 0; lane < kLanes; ++lane) take(largest_of[lane], magnitude_of[lane]);
  for (; i < V; ++i) take(static_cast<Int>(key(bits_at(i))), bits_at(i) & kMagnitude);

  const bool nan = magnitude > kInfinity, zero = largest == 0;  // -0 equals 0
  for (i = 0; i < V; ++i) {
    const Int bits = bits_at(i), m = bits & kMagnitude;
    if (nan ? m > kInfinity : zero ? m == 0 : key(bits) == largest) break;
  }
  return i;
}

}  // namespace

int64_t sample(const float* logits, int64_t V, const SampleOptions& o, double u) {
  float max = -INFINITY;
  bool valid = true;
  for (int64_t i = 0; i < V; ++i) {
    valid &= !(std::isnan(logits[i]) || logits[i] == INFINITY);
    max = logits[i] > max ? logits[i] : max;
  }
  if (!valid || max == -INFINITY)
    fail("sample: logits must not hold NaN or +inf, and one must be finite");

  float least = -INFINITY;
  if (o.top_k > 0 && o.top_k < V) {
    std::vector<float> copy(logits, logits + V);
    std::nth_element(copy.begin(), copy.begin() + (o.top_k - 1), copy.end(), std::greater<>());
    least = copy[o.top_k - 1];
  }
  std::vector<Candidate> c;
  double total = 0.0;
  for (int64_t i = 0; i < V; ++i) {
    if (logits[i] < least || logits[i] == -INFINITY) continue;
    c.push_back({logits[i], static_cast<int32_t>(i)});
    total += std::exp((logits[i] - max) / o.temperature);
  }
  if (o.top_p < 1.0) {
    keep_mass(c, o.top_p * total, max, o.temperature);
    std::sort(c.begin(), c.end(),
              [](const Candidate& a, const Candidate& b) { return a.token < b.token; });
    total = 0.0;
    for (const Candidate& x : c) total += std::exp((x.logit - max) / o.temperature);
  }
  double left = u * total;
  for (const Candidate& x : c) {
    left -= std::exp((x.logit - max) / o.temperature);
    if (left < 0.0) return x.token;
  }
  return c.back().token;  // u so close to 1 that rounding passed the end
}

int64_t argmax(const float* logits, int64_t V) {
  return first_largest<int32_t>(reinterpret_cast<const char*>(logits), V);
}

int64_t argmax(const bf16* logits, int64_t V) {
  return first_largest<int16_t>(reinterpret_cast<const char*>(logits), V);
}

}  // namespace cgpt
