#include "sample.h"

#include <algorithm>
#include <cmath>
#include <functional>

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

}  // namespace cgpt
