// Attention of many queries, after FlashAttention-2 (Dao, arXiv 2307.08691): softmax over blocks of
// keys with a running maximum and sum, S_q x S_k never held.
//
//   item   some query rows of one (batch, head); items run in parallel, long ones first
//   block  kBlockN keys: K^T and V of the block are packed once for all rows of the item
//   strip  kStripM rows: S = Q K^T in L1, P over S in place, O = O 2^(m_old - m) + P V
//
// A strip meets only the keys its last row may see, rounded up to a panel: near the diagonal the
// extra work is half a strip. Nothing depends on which item or strip a row is in, so outputs have
// the same bits whatever the batch, the number of threads and the rows beside it are.
//
// FLOPs: 4 D per visible (query, key). Traffic: K and V once per item of up to kItemRows rows.
#pragma once

#include "../../cpu/scratch.h"
#include "int8_rows.h"
#include "scores.h"

namespace cgpt::CGPT_TIER {

// Whole register tiles of rows: 32 for AMX's tiles, two of kMR otherwise; S of a strip is at most
// 32 KB.
constexpr int64_t kStripM = kHasAmx ? 32 : 2 * kMR;
// Near the diagonal strips are one tile high, which wastes less on keys that only their last row
// sees.
constexpr int64_t kUnitM = kHasAmx ? 32 : kMR;
constexpr int64_t kBlockN = 256;
// Packing a key block costs a few operations per element, multiplying 2 * rows: 512 rows make it 1
// %. O of so many rows (128 KB for D = 64) stays in L2.
constexpr int64_t kItemRows = 512;

template <class T>
struct Prefill {
  using C = compute_t<T>;

  int64_t D, Dp, ldo;
  C* q;            // [rows, Dp]
  C* k;            // packed, K = D, N = kBlockN
  C* v;            // packed, K = kBlockN, N = D
  float* s;        // [kStripM, kBlockN] logits; the probabilities take their place
  float* o;        // [rows, ldo] sums of P V
  float* m;        // [rows] largest logit so far
  float* l;        // [rows, kLanes] lane sums of P
  float* add;      // [kBlockN] bias and mask of a row
  uint8_t* begun;  // [units] whether o, m, l of kUnitM rows hold anything
  T* v_finite;     // [kBlockN, D] V with zeros for infinities and NaN
  uint8_t* v_bad;  // [kBlockN] keys where V has such
  uint32_t* random;
  T *k_plain, *v_plain;  // [kBlockN, D] of keys and values that are stored in int8

  // Takes its arrays from memory for items of `rows` rows; with a null base only counts bytes.
  int64_t carve(char* base, int64_t rows, int64_t head_size, int64_t quantized) {
    Carver c(base);
    D = head_size, Dp = padded_k<C>(D), ldo = round_up(D, kLanes);
    rows = round_up(rows, kStripM);
    q = c.take<C>(rows * Dp);
    k = c.take<C>(packed_b_size<C>(D, kBlockN));
    v = c.take<C>(packed_b_size<C>(kBlockN, D));
    s = c.take<float>(kStripM * kBlockN);
    o = c.take<float>(rows * ldo);
    m = c.take<float>(rows);
    l = c.take<float>(rows * kLanes);
    add = c.take<float>(kBlockN);
    begun = c.take<uint8_t>(rows / kUnitM);
    v_finite = c.take<T>(kBlockN * D);
    v_bad = c.take<uint8_t>(kBlockN);
    random = c.take<uint32_t>(philox_room(kBlockN));
    k_plain = c.take<T>(quantized * kBlockN * D);
    v_plain = c.take<T>(quantized * kBlockN * D);
    return c.used();
  }

  // Copies n rows of V to v_finite with zeros for what is not finite; false if all was finite.
  // Zero probabilities times such values would be NaN.
  bool clean_v(const T* rows, int64_t stride, int64_t n) {
    // 0 * x is NaN for what is not finite. Four sums hide the latency.
    VecF poison[4] = {};
    for (int64_t j = 0; j < n; ++j) {
      const T* row = rows + j * stride;
      int64_t d = 0;
      for (; d + 4 * kLanes <= D; d += 4 * kLanes)
        for (int u = 0; u < 4; ++u)
          poison[u] = fmadd(load(row + d + u * kLanes), zero(), poison[u]);
      for (; d < D; d += kLanes) poison[0] = fmadd(load_n(row + d, D - d), zero(), poison[0]);
    }
    if (reduce_add((poison[0] + poison[1]) + (poison[2] + poison[3])) == 0.0f) return false;
    for (int64_t j = 0; j < n; ++j) {
      v_bad[j] = 0;
      for (int64_t d = 0; d < D; ++d) {
        const T x = rows[j * stride + d];
        const bool finite = to_float(x) - to_float(x) == 0.0f;
        v_finite[j * D + d] = finite ? x : T{};
        if (!finite) v_bad[j] = 1;
      }
    }
    return true;
  }

  // Adds to o what clean_v left out, for the queries that see it.
  void add_bad_v(const LogitRule& rule, int64_t i0, int64_t rows, int64_t j0, int64_t n,
                 const T* v_rows, int64_t stride, const C* p, int64_t ldp, float* o_rows) {
    for (int64_t j = 0; j < n; ++j) {
      if (!v_bad[j]) continue;
      for (int64_t i = 0; i < rows; ++i) {
        if (!rule.visible(i0 + i, j0 + j)) continue;
        for (int64_t d = 0; d < D; ++d) {
          const float x = to_float(v_rows[j * stride + d]);
          if (x - x != 0.0f) o_rows[i * ldo + d] += to_float(p[i * ldp + j]) * x;
        }
      }
    }
  }

  // S to P for `rows` rows from query i0 on, against keys j0 .. j0 + n - 1; o, m and l brought to
  // the new maximum. p has `room` columns to fill.
  template <bool rewritten>
  void strip_softmax(const LogitRule& rule, bool masked, bool shared_add, int64_t i0, int64_t rows,
                     int64_t j0, int64_t n, int64_t room, bool first, float* o_rows, float* m_rows,
                     float* l_rows) {
    constexpr int64_t kRoom = (kStripM + kLanes - 1) / kLanes * kLanes;
    float fresh[kRoom], alpha[kRoom];
    for (int64_t i = 0; i < rows; i += kLanes) {
      VecF largest[kLanes];
      for (int64_t r = i; r < i + kLanes; ++r) {
        float* row = s + r * kBlockN;
        const int64_t end = r < rows ? rule.key_end(i0 + r, j0 + n) - j0 : 0;
        if (end > 0 && masked && !shared_add) row_addends(rule, i0 + r, j0, end, add);
        if (end > 0 && rewritten) rewrite_logits(rule, i0 + r, j0, end, add, row);
        else if (end > 0 && masked) mask_logits(end, add, row);
        largest[r - i] = row_max(row, end);
      }
      store(fresh + i, rule.kept(reduce_each(largest, kMax)));
    }
    if (first) {
      for (int64_t i = 0; i < rows; ++i) m_rows[i] = fresh[i];
    } else {
      const VecF to_log2 = set1(rule.kept_to_log2());
      for (int64_t i = 0; i < rows; i += kLanes) {
        const int64_t left = rows - i;
        const VecF old = load_n(m_rows + i, left);
        const VecF now = max(old, load_n(fresh + i, left));
        // A row that has seen nothing has -inf on both sides, whose difference would be NaN.
        store(alpha + i, select(old == now, set1(1.0f), exp2<6>((old - now) * to_log2)));
        store_n(m_rows + i, now, left);
      }
      for (int64_t i = 0; i < rows; ++i) {
        if (alpha[i] == 1.0f) continue;
        const VecF factor = set1(alpha[i]);
        store(l_rows + i * kLanes, load(l_rows + i * kLanes) * factor);
        for (int64_t d = 0; d < ldo; d += kLanes)
          store(o_rows + i * ldo + d, load(o_rows + i * ldo + d) * factor);
      }
    }
    const float c = rule.scale * kLog2e;
    for (int64_t i = 0; i < rows; ++i) {
      float* row = s + i * kBlockN;
      const int64_t end = max64(0, rule.key_end(i0 + i, j0 + n) - j0);
      const float top = m_rows[i] == -kInfinity ? 0.0f : m_rows[i];
      VecF sum =
          row_exp<kExpDegree<T>, rewritten>(row, end, room, top, c, reinterpret_cast<C*>(row));
      if (!first) sum += load(l_rows + i * kLanes);
      store(l_rows + i * kLanes, sum);
    }
  }

  void write(const AttentionArgs& a, const Dropout& dropout, const LogitRule& rule, int64_t b,
             int64_t h, int64_t i0, int64_t rows) {
    for (int64_t i = 0; i < rows; i += kLanes) {
      VecF sums[kLanes];
      for (int r = 0; r < kLanes; ++r)
        sums[r] = i + r < rows && begun[(i + r) / kUnitM] ? load(l + (i + r) * kLanes) : zero();
      write_rows<T>(a, rule, b, h, i0 + i, min64(kLanes, rows - i), o + i * ldo, ldo, m + i,
                    reduce_each(sums, kSum), dropout.rescale);
    }
  }

  // Queries i0 .. i0 + rows - 1 of (b, h).
  void run(const AttentionArgs& a, const Dropout& dropout, int64_t b, int64_t h, int64_t i0,
           int64_t rows) {
    const LogitRule rule = logit_rule(a, b, h);
    const int64_t H = a.q.shape[1], S_q = a.q.shape[2], S_k = a.k.shape[2];
    const int64_t q_stride = a.q.strides[2], k_stride = a.k_scale ? D : a.k.strides[2];
    const int64_t v_stride = a.v_scale ? D : a.v.strides[2];
    const int64_t k_head = b * a.k.strides[0] + h * a.k.strides[1];
    const int64_t v_head = b * a.v.strides[0] + h * a.v.strides[1];
    pack_a<C>(a.q.as<const T>() + b * a.q.strides[0] + h * a.q.strides[1] + i0 * q_stride, q_stride,
              rows, D, q);
    for (int64_t i = 0; i < rows; i += kUnitM) begun[i / kUnitM] = 0;

    int64_t key_begin = 0, key_end = rule.key_end(i0 + rows - 1, S_k);
    if (rule.padding) {
      const auto ignored = [&](int64_t j) { return rule.padding[j * rule.padding_stride] != 0; };
      while (key_end > 0 && ignored(key_end - 1)) --key_end;
      while (key_begin < key_end && ignored(key_begin)) ++key_begin;
    }
    for (int64_t j0 = key_begin / kBlockN * kBlockN; j0 < key_end; j0 += kBlockN) {
      const int64_t keys = min64(kBlockN, key_end - j0), kp = padded_k<C>(keys);
      bool masked = rule.bias != nullptr;
      bool all_masked = false;
      if (rule.padding) {
        int64_t count = 0;
        for (int64_t j = j0; j < j0 + keys; ++j)
          count += rule.padding[j * rule.padding_stride] != 0;
        masked |= count > 0;
        all_masked = count == keys;
      }
      if (all_masked) continue;
      // Bias and mask that are the same for all rows are looked up once.
      const bool shared_add = !rule.bias || rule.bias_row == 0;
      if (shared_add && (masked || rule.rewrites())) row_addends(rule, 0, j0, keys, add);

      const auto block = [&](const TensorView& t, int64_t head, const TensorView& scale, T* plain) {
        const int64_t at = head + j0 * t.strides[2];
        if (!scale) return t.as<const T>() + at;
        dequantize_rows(t.as<const int8_t>() + at, t.strides[2], scales_of(scale, b, h, j0), keys,
                        D, plain);
        return static_cast<const T*>(plain);
      };
      const T* v_block = block(a.v, v_head, a.v_scale, v_plain);
      pack_b<C>(block(a.k, k_head, a.k_scale, k_plain), int64_t{1}, k_stride, D, keys, k);
      const bool partly = masked || rule.key_end(i0, S_k) < j0 + keys;
      const bool bad = partly && clean_v(v_block, v_stride, keys);
      if (bad) pack_b<C>(v_finite, D, int64_t{1}, keys, D, v);
      else pack_b<C>(v_block, v_stride, int64_t{1}, keys, D, v);

      for (int64_t r = 0, strip; r < rows; r += strip) {
        const int64_t first_row = i0 + r;
        // Units of a strip that sees the whole block have all begun or all not.
        const bool whole = rule.key_end(first_row, j0 + keys) == j0 + keys;
        strip = min64(whole ? kStripM : kUnitM, rows - r);
        const int64_t n = rule.key_end(first_row + strip - 1, j0 + keys) - j0;
        if (n <= 0) continue;
        const int64_t room = round_up(n, kNR);
        const bool first = !begun[r / kUnitM];
        for (int64_t i = r; i < r + strip; i += kUnitM) begun[i / kUnitM] = 1;
        float* o_rows = o + r * ldo;
        scores<C>(strip, round_up(n, kLanes), D, q + r * Dp, Dp, k, s, kBlockN);
        if (rule.rewrites())
          strip_softmax<true>(rule, true, shared_add, first_row, strip, j0, n, room, first, o_rows,
                              m + r, l + r * kLanes);
        else
          strip_softmax<false>(rule, masked, shared_add, first_row, strip, j0, n, room, first,
                               o_rows, m + r, l + r * kLanes);
        const C* p = reinterpret_cast<const C*>(s);
        constexpr int64_t ldp = kBlockN * 4 / static_cast<int64_t>(sizeof(C));
        if (dropout.on)
          for (int64_t i = 0; i < strip; ++i)
            row_dropout(dropout,
                        static_cast<uint64_t>(((b * H + h) * S_q + first_row + i) * S_k + j0), n,
                        random, reinterpret_cast<C*>(s) + i * ldp);
        // A panel at a time: V is packed for all keys of the block, of which n are multiplied.
        for (int64_t d = 0; d < D; d += kNR)
          block_gemm<C>(strip, min64(kNR, D - d), n, p, ldp, v + d * kp, o_rows + d, ldo, !first);
        if (bad) add_bad_v(rule, first_row, strip, j0, n, v_block, v_stride, p, ldp, o_rows);
      }
    }
    write(a, dropout, rule, b, h, i0, rows);
  }
};

}  // namespace cgpt::CGPT_TIER
