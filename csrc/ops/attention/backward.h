// Gradients of attention, after FlashAttention-2 (Dao, arXiv 2307.08691, algorithm 2): P is
// computed again, a tile at a time.
//
//   part   kPartN keys of one (batch, head), the unit of parallel work
//   block  kGradN keys: K^T, V^T and K packed once, dk^T and dv^T summed up in L2
//   strip  kGradM queries that see the block:
//            S = Q K^T,  G = dO V^T,  P and dS over them,
//            dv^T += dO^T P,  dk^T += Q^T dS,  dq += dS K
//
// dk and dv are kept transposed because then P and dS, which come in rows of queries, are packed
// operands without a transposition; Q^T and dO^T are made once per head.
//
// Sums have one order whatever the number of threads is: dq of a part over its blocks, then the
// parts in turn. FLOPs: 10 D per visible (query, key).
#pragma once

#include "backward_tile.h"

namespace cgpt::CGPT_TIER {

// Keys whose share of dq is summed up on its own. Adding a part to dq costs 1 / kPartN of it.
constexpr int64_t kPartN = 1024;

// dst[d][i] = src[i][d] for D columns and `rows` rows, zeros for i from `rows` on to a multiple of
// two vectors; dst has round_up(D, kLanes) rows. src may be read up to kLanes beyond its end.
template <class C>
inline void transpose_rows(const C* src, int64_t ld, int64_t rows, int64_t D, C* dst, int64_t ldd) {
  constexpr int step = 4 / sizeof(C);
  for (int64_t i = 0; i < round_up(rows, 2 * kLanes); i += kLanes * step)
    for (int64_t d = 0; d < D; d += kLanes) {
      VecF square[kLanes];
      for (int64_t e = 0; e < kLanes; ++e) {
        const int64_t row = i + e * step;
        const C* p = src + row * ld + d;
        square[e] = row < rows ? load(p) : zero();
        if constexpr (step == 2) {  // two rows in the halves of one 32-bit element
          const VecI even = bit_cast<VecI>(square[e]) >> 16 & set1i(0xffff);
          const VecI odd = bit_cast<VecI>(row + 1 < rows ? load(p + ld) : zero());
          square[e] = bit_cast<VecF>(even | odd);
        }
      }
      transpose(square);
      for (int e = 0; e < kLanes; ++e)
        __builtin_memcpy(dst + (d + e) * ldd + i, &square[e], sizeof(VecF));
    }
}

// dst[j * stride + d] = src[d][j] * factor; src has whole vectors of rows and columns.
template <class T>
inline void store_transposed(const float* src, int64_t ld, int64_t D, int64_t n, float factor,
                             T* dst, int64_t stride) {
  for (int64_t j = 0; j < n; j += kLanes)
    for (int64_t d = 0; d < D; d += kLanes) {
      VecF square[kLanes];
      for (int e = 0; e < kLanes; ++e) square[e] = load(src + (d + e) * ld + j) * set1(factor);
      transpose(square);
      for (int64_t e = 0; e < min64(kLanes, n - j); ++e)
        store_n(dst + (j + e) * stride + d, square[e], D - d);
    }
}

// One or two rows of kNR columns, the rows that a 32-bit element of a packed panel holds.
template <class C>
struct RowGroup {
  static constexpr int kRows = 4 / sizeof(C);
  VecF v[kRows][2];

  // Rows of A from p on, and the panel of B at `panel`.
  CGPT_INLINE void store_rows(C* p, int64_t ld) const {
    for (int u = 0; u < kRows; ++u) store_p(p + u * ld, v[u][0], v[u][1]);
  }
  CGPT_INLINE void store_panel(C* panel) const {
    if constexpr (kRows == 1) {
      store_p(panel, v[0][0], v[0][1]);
    } else {
#if CGPT_TIER_LEVEL >= 4
      const __m512i a = bit_cast<__m512i>(_mm512_cvtne2ps_pbh(v[0][1], v[0][0]));
      const __m512i b = bit_cast<__m512i>(_mm512_cvtne2ps_pbh(v[1][1], v[1][0]));
      // Element n of `low` takes column n of both rows.
      const VecI low = iota() | ((iota() + set1i(32)) << 16), high = low + set1i(0x100010);
      _mm512_storeu_si512(panel, _mm512_permutex2var_epi16(a, bit_cast<__m512i>(low), b));
      _mm512_storeu_si512(panel + kNR, _mm512_permutex2var_epi16(a, bit_cast<__m512i>(high), b));
#endif
    }
  }
};

template <class T>
struct HeadGradients : GradTile<T> {
  using Tile = GradTile<T>;
  using C = typename Tile::C;
  using Tile::D, Tile::Dp, Tile::g, Tile::s;

  int64_t S_q, ldo, ldt;
  C *qt, *dt;         // [D, ldt] Q^T, dO^T
  C* k;               // packed, K = kGradN, N = D
  T* k_near;          // [kGradN, D] K less its centre
  float* centre;      // [D]
  bool centred;       // whether it is not 0
  float *dkt, *dvt;   // [D, kGradN]
  C *p, *ds;          // packed, K = kGradM, N = kGradN
  float *sum, *part;  // [S_q, ldo] dq

  int64_t carve(char* base, int64_t queries, int64_t head_size) {
    Carver c(base);
    Tile::carve(c, queries, head_size);
    S_q = queries, ldo = row_stride(D);
    // A power of two would lay column i of all rows into the same few sets of the cache.
    ldt = round_up(S_q, 4 * kLanes) + 4 * kLanes;
    const int64_t wide = round_up(D, kLanes);
    qt = c.take<C>(wide * ldt);
    dt = c.take<C>(wide * ldt);
    k = c.take<C>(packed_b_size<C>(kGradN, D));
    k_near = c.take<T>(kGradN * D);
    centre = c.take<float>(wide);
    dkt = c.take<float>(wide * kGradN);
    dvt = c.take<float>(wide * kGradN);
    p = c.take<C>(packed_b_size<C>(kGradM, kGradN));
    ds = c.take<C>(packed_b_size<C>(kGradM, kGradN));
    sum = c.take<float>(S_q * ldo);
    part = c.take<float>(S_q * ldo);
    return c.used();
  }
  static int64_t row_stride(int64_t D) { return round_up(D, kLanes); }

  // First query that sees key j, on a strip's border.
  static int64_t first_row(const LogitRule& rule, int64_t j) {
    return rule.causal ? max64(0, j - rule.shift) / kGradUnitM * kGradUnitM : 0;
  }

  void load_head(const AttentionBwdArgs& a, const LogitRule& rule, int64_t b, int64_t h) {
    this->load_queries(a, b, h, 0, S_q);
    find_centre(a, rule, b, h);
    transpose_rows(this->q, Dp, S_q, D, qt, ldt);
    transpose_rows(this->dout, Dp, S_q, D, dt, ldt);
  }

  // P and dS of `strip` rows from query i on, against n keys from j0 on: packed in p and ds, dS
  // also as rows in s's place.
  void strip_gradients(const AttentionArgs& a, const LogitRule& rule, const Dropout& dropout,
                       const RowStats& rows, int64_t b, int64_t h, int64_t i, int64_t strip,
                       int64_t j0, int64_t n) {
    constexpr int step = RowGroup<C>::kRows;
    constexpr int64_t lds = kGradN * step;
    const int64_t room = round_up(n, kNR), Kp = padded_k<C>(strip);
    C* ds_rows = reinterpret_cast<C*>(s);
    for (int64_t r = 0; r < Kp; r += step) {
      RowTerms terms[step];
      for (int u = 0; u < step; ++u) {
        const int64_t at = r + u, row = i + at;
        if (at < strip) {
          this->apply_rules(rule, at, row, j0, n, room);
          if (dropout.on) this->draw(a, dropout, b, h, row, j0, n, this->keep + u * kGradN);
          terms[u] = RowTerms(rule, rows.top[row], rows.share[row], rows.delta[row]);
        } else {  // fills up the last step of k
          for (int64_t j = 0; j < room; ++j) s[at * kGradN + j] = -kInfinity;
          for (int64_t j = 0; j < room; ++j) g[at * kGradN + j] = 0.0f;
          terms[u] = RowTerms(rule, 0.0f, 0.0f, 0.0f);
        }
      }
      const float *s_row = s + r * kGradN, *g_row = g + r * kGradN;
      for (int64_t j = 0; j < room; j += kNR) {
        RowGroup<C> weights, gradient;
#pragma GCC unroll 2
        for (int u = 0; u < step; ++u)
#pragma GCC unroll 2
          for (int v = 0; v < 2; ++v) {
            const int64_t at = u * kGradN + j + v * kLanes;
            VecF weight = terms[u].template probability<kExpDegree<T>>(load(s_row + at));
            VecF dp = load(g_row + at);
            const VecF whole = weight;
            if (dropout.on) {
              const VecF factor = load(this->keep + at);
              weight = select(whole == zero(), zero(), whole * factor);
              dp = dropped(dp, factor);
            }
            weights.v[u][v] = weight;
            gradient.v[u][v] = terms[u].logit_gradient(whole, dp);
          }
        weights.store_panel(p + j * Kp + r * kNR);
        gradient.store_panel(ds + j * Kp + r * kNR);
        gradient.store_rows(ds_rows + r * lds + j, lds);
      }
    }
  }

  // dq += the share of keys j0 .. j0 + keys - 1; their dk and dv.
  void block(const AttentionBwdArgs& a, const LogitRule& rule, const Dropout& dropout,
             const RowStats& rows, int64_t b, int64_t h, int64_t j0, int64_t keys, float* dq) {
    const int64_t kp = padded_k<C>(keys), wide = round_up(D, kLanes);
    for (int64_t x = 0; x < wide * kGradN; x += kLanes) store(dkt + x, zero());
    for (int64_t x = 0; x < wide * kGradN; x += kLanes) store(dvt + x, zero());
    const bool any = this->load_keys(a, rule, b, h, j0, keys);
    if (any) pack_keys(a, rule, b, h, j0, keys);
    for (int64_t i = first_row(rule, j0), strip; any && i < S_q; i += strip) {
      const bool whole = rule.key_end(i, j0 + keys) == j0 + keys;
      strip = min64(whole ? kGradM : kGradUnitM, S_q - i);
      const int64_t n = rule.key_end(i + strip - 1, j0 + keys) - j0;
      if (n <= 0) continue;
      const int64_t columns = round_up(n, kLanes);
      this->multiply(i, strip, columns);
      strip_gradients(a.fwd, rule, dropout, rows, b, h, i, strip, j0, n);
      block_gemm<C>(D, columns, strip, dt + i, ldt, p, dvt, kGradN, true);
      block_gemm<C>(D, columns, strip, qt + i, ldt, ds, dkt, kGradN, true);
      // A panel at a time: K is packed for all keys of the block, of which n are multiplied.
      for (int64_t d = 0; d < D; d += kNR)
        block_gemm<C>(strip, min64(kNR, D - d), n, reinterpret_cast<const C*>(s),
                      kGradN * RowGroup<C>::kRows, k + d * kp, dq + i * ldo + d, ldo, true);
    }
    T* dk = const_cast<T*>(Tile::head_of(a.dk, b, h));
    T* dv = const_cast<T*>(Tile::head_of(a.dv, b, h));
    const int64_t k_stride = a.dk.strides[2], v_stride = a.dv.strides[2];
    store_transposed(dkt, kGradN, D, keys, rule.scale, dk + j0 * k_stride, k_stride);
    store_transposed(dvt, kGradN, D, keys, 1.0f, dv + j0 * v_stride, v_stride);
  }

  // What all keys of the head have in common, where that is most of them (mean beyond two standard
  // deviations), 0 elsewhere. Rows of dS sum to 0, so that dS K is dS (K - centre); but delta from
  // a rounded output and dS rounded to 16 bits leave sums that a large common part multiplies: 9
  // times eager's error in dq at keys and values of mean 10. Numbers that near to the centre lose
  // no digit when it is subtracted.
  void find_centre(const AttentionBwdArgs& a, const LogitRule& rule, int64_t b, int64_t h) {
    centred = false;
    each_moment(Tile::head_of(a.fwd.k, b, h), a.fwd.k.strides[2], a.fwd.k.shape[2], D, rule,
                [&](int64_t d, VecF mean, VecF variance) {
                  const VecF square = mean * mean;
                  for (int64_t l = 0; l < min64(kLanes, D - d); ++l) {
                    const bool common = square[l] > 4.0f * variance[l] && square[l] < kInfinity;
                    centre[d + l] = common ? to_float(from_float<T>(mean[l])) : 0.0f;
                    centred |= common;
                  }
                });
  }

  // K, less its centre, as the right operand of dS K; zeros for padding, since zero gradients times
  // what that holds could be NaN.
  void pack_keys(const AttentionBwdArgs& a, const LogitRule& rule, int64_t b, int64_t h, int64_t j0,
                 int64_t keys) {
    const int64_t stride = a.fwd.k.strides[2];
    const T* src = Tile::head_of(a.fwd.k, b, h) + j0 * stride;
    if (!rule.padding && !centred) return pack_b_rows<C>(src, stride, keys, D, k);
    for (int64_t j = 0; j < keys; ++j) {
      const bool ignored = rule.padding && rule.padding[(j0 + j) * rule.padding_stride];
      for (int64_t d = 0; d < D; d += kLanes) {
        const VecF x = load_n(src + j * stride + d, D - d) - load(centre + d);
        store_n(k_near + j * D + d, ignored ? zero() : x, D - d);
      }
    }
    pack_b_rows<C>(k_near, D, keys, D, k);
  }

  // Part number n of the loaded head; dq [S_q, ldo] is its share: all rows of part 0, to which
  // others are added, those from first_row on of others.
  void run_part(const AttentionBwdArgs& a, const LogitRule& rule, const Dropout& dropout,
                const RowStats& rows, int64_t b, int64_t h, int64_t n, float* dq) {
    const int64_t begin = n * kPartN, end = min64(a.fwd.k.shape[2], begin + kPartN);
    const int64_t from = n == 0 ? 0 : min64(S_q, first_row(rule, begin)) * ldo;
    for (int64_t x = from; x < S_q * ldo; x += kLanes) store(dq + x, zero());
    for (int64_t j = begin; j < end; j += kGradN)
      block(a, rule, dropout, rows, b, h, j, min64(kGradN, end - j), dq);
  }

  // to += the share of part n for rows begin .. end - 1.
  static void add_part(const LogitRule& rule, int64_t n, const float* from, int64_t begin,
                       int64_t end, int64_t ldo, float* to) {
    begin = max64(begin, first_row(rule, n * kPartN));
    for (int64_t x = begin * ldo; x < end * ldo; x += kLanes)
      store(to + x, load(to + x) + load(from + x));
  }

  static void write_dq(const AttentionBwdArgs& a, int64_t b, int64_t h, const float* from,
                       int64_t begin, int64_t end, int64_t ldo) {
    const int64_t D = a.dq.shape[3], stride = a.dq.strides[2];
    T* to = const_cast<T*>(Tile::head_of(a.dq, b, h));
    const VecF scale = set1(a.fwd.scale);
    for (int64_t i = begin; i < end; ++i)
      for (int64_t d = 0; d < D; d += kLanes)
        store_n(to + i * stride + d, load(from + i * ldo + d) * scale, D - d);
  }
};

}  // namespace cgpt::CGPT_TIER
