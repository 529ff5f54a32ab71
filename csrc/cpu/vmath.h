// exp, tanh, erf and the GELUs on float vectors, a few units in the last place from exact.
#pragma once

#include "simd.h"

namespace cgpt::CGPT_TIER {

// e^x. Range reduction x = n ln 2 + r, |r| <= ln 2 / 2, degree-6 Taylor-like polynomial, then 2^n
// in the exponent. Below -87.3 the result is exactly 0 (so that masked logits vanish), above 88.7
// it is infinity; NaN stays NaN.
CGPT_INLINE VecF exp(VecF x) {
  const VecF kLog2e = set1(1.44269504088896341f);
  const VecF clamped = min(set1(88.8f), max(set1(-87.4f), x));
  // Adding and subtracting 1.5 * 2^23 rounds to the nearest integer.
  const VecF kRound = set1(12582912.0f);
  const VecF shifted = fmadd(clamped, kLog2e, kRound);
  const VecF n = shifted - kRound;
  VecF r = fmadd(n, set1(-0.693359375f), clamped);
  r = fmadd(n, set1(2.12194440e-4f), r);
  VecF p = set1(1.9875691500e-4f);
  p = fmadd(p, r, set1(1.3981999507e-3f));
  p = fmadd(p, r, set1(8.3334519073e-3f));
  p = fmadd(p, r, set1(4.1665795894e-2f));
  p = fmadd(p, r, set1(1.6666665459e-1f));
  p = fmadd(p, r, set1(5.0000001201e-1f));
  p = fmadd(p, r * r, r) + set1(1.0f);
  // 2^n in two halves: n reaches 128, which one exponent cannot hold.
  const VecI exponent = bit_cast<VecI>(shifted) - set1i(0x4b400000);
  const VecI half = exponent >> 1, rest = exponent - half;
  const VecF scaled =
      p * bit_cast<VecF>((half + set1i(127)) << 23) * bit_cast<VecF>((rest + set1i(127)) << 23);
  return select(x < set1(-87.3f), zero(), scaled);
}

CGPT_INLINE float exp(float x) { return exp(set1(x))[0]; }

// 1 / (1 + e^-x)
CGPT_INLINE VecF sigmoid(VecF x) { return set1(1.0f) / (set1(1.0f) + exp(-x)); }

// Odd rational minimax approximation on [-4, 4], where |erf| reaches 1 - 1.5e-8; clamped outside.
CGPT_INLINE VecF erf(VecF x) {
  const VecF c = min(set1(4.0f), max(set1(-4.0f), x));
  const VecF s = c * c;
  VecF p = set1(-2.72614225801306e-10f);
  p = fmadd(p, s, set1(2.77068142495902e-08f));
  p = fmadd(p, s, set1(-2.10102402082508e-06f));
  p = fmadd(p, s, set1(-5.69250639462346e-05f));
  p = fmadd(p, s, set1(-7.34990630326855e-04f));
  p = fmadd(p, s, set1(-2.95459980854025e-03f));
  p = fmadd(p, s, set1(-1.60960333262415e-02f));
  VecF q = set1(-1.45660718464996e-05f);
  q = fmadd(q, s, set1(-2.13374055278905e-04f));
  q = fmadd(q, s, set1(-1.68282697438203e-03f));
  q = fmadd(q, s, set1(-7.37332916720468e-03f));
  q = fmadd(q, s, set1(-1.42647390514189e-02f));
  return c * p / q;
}

// x Phi(x), Hendrycks & Gimpel 2016
CGPT_INLINE VecF gelu(VecF x) {
  const VecF half = x * set1(0.5f);
  return fmadd(half, erf(x * set1(0.70710678118654752f)), half);
}

// 0.5 x (1 + tanh(u)) = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3)
CGPT_INLINE VecF gelu_tanh(VecF x) {
  const VecF inner = fmadd(x * x * x, set1(0.044715f), x);
  return x * sigmoid(inner * set1(1.5957691216057308f));
}

// d gelu / dx = Phi(x) + x phi(x). Beyond 20 the second term is 0, which x exp(-x^2 / 2) would miss
// where x^2 overflows.
CGPT_INLINE VecF gelu_slope(VecF x) {
  const VecF c = min(set1(20.0f), max(set1(-20.0f), x));
  const VecF phi = exp(c * c * set1(-0.5f)) * set1(0.39894228040143268f);
  return fmadd(c, phi, fmadd(erf(c * set1(0.70710678118654752f)), set1(0.5f), set1(0.5f)));
}

// s + x s (1 - s) 2 u', s = sigmoid(2u), of x sigmoid(2u); s (1 - s) is 0 far before |x| = 20.
CGPT_INLINE VecF gelu_tanh_slope(VecF x) {
  const VecF c = min(set1(20.0f), max(set1(-20.0f), x)), square = c * c;
  const VecF u2 = c * fmadd(square, set1(0.044715f), set1(1.0f)) * set1(1.5957691216057308f);
  const VecF du2 = fmadd(square, set1(0.134145f), set1(1.0f)) * set1(1.5957691216057308f);
  const VecF s = sigmoid(u2);
  return fmadd(c * s * (set1(1.0f) - s), du2, s);
}

// NaN passes, as in torch.relu.
CGPT_INLINE VecF relu(VecF x) { return max(zero(), x); }

}  // namespace cgpt::CGPT_TIER
