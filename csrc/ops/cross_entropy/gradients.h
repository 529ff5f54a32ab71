// Losses and gradients in one pass over the vocabulary, some rows of x at a time:
//
//   g[v, i] = d[i] (p[v, i] - (1 - s) [v = target[i]] - s / V),   p = exp(z - lse)
//   dx = g^T W,   dweight = g x,   dbias = sum_i g
//
// The losses leave e = exp(z - shift) of every logit, in bf16 or fp32, and the shifts, so that p
// needs neither a second product nor a second exp: three products in all, 6 M V K operations.
// Then, a super-block of the vocabulary at a time: blocks of g are made from e, multiplied by x
// into rows of dweight, and laid down transposed; after a barrier dx gathers g^T W over the
// super-block. All sums have an order that depends on the shapes alone.
//
// Rows whose target is ignore_index take part in nothing: the others are gathered first.
//
// Extra memory is that of e, V x rows: `plan` says how many rows at once. dweight is summed over
// the groups of rows where it lies; in 16 bits that would round it once per group, so that from
// three groups on the sum is kept in fp32.
#pragma once

#include "../../cpu/pages.h"
#include "losses.h"

namespace cgpt::CGPT_TIER {
namespace {

constexpr int64_t kBlock = 2 * kVocabBlock;  // a multiple of 32, AMX's step along the vocabulary
constexpr int64_t kSuperBlock = 8 * kBlock;  // W of it, packed: 2.6 MB of bf16 at K = 768

constexpr int64_t kGather = kSuperBlock / 2;

// e of this many bytes needs no saving: below it all rows are one group.
constexpr int64_t kFreeBytes = int64_t{8} << 20;
// Beyond this many rows a group is no faster and blocks of g leave the L2 cache.
constexpr int64_t kMaxGroup = 1024;
constexpr int64_t kGroup = 512;

// From here on huge pages pay; below it they would be mapped and zeroed on every call for little.
constexpr int64_t kPagedBytes = int64_t{4} << 20;

struct Plan {
  int64_t group;  // rows at once
  bool wide;      // dweight is summed in fp32 beside it
};

// Half of the rows at once in 16 bits, a quarter in fp32: M * V bytes of e, where eager's fp32
// logits, their log-softmax and its gradient are 12 M * V.
template <class T>
Plan plan(int64_t M, int64_t V) {
  const int64_t bytes = V * static_cast<int64_t>(sizeof(typename Stored<T>::type));
  if (M * bytes <= kFreeBytes || M <= kNR) return {M, false};
  const bool narrow = sizeof(T) == 2;
  const int64_t share = round_up(narrow ? (M + 1) / 2 : (M + 3) / 4, kNR);
  if (narrow && share > kMaxGroup) return {kGroup, true};
  return {!narrow && share > kGroup ? kGroup : share, false};
}

class Pages {
 public:
  explicit Pages(int64_t bytes) : data(bytes > 0 ? allocate_pages(bytes) : nullptr) {}
  ~Pages() {
    if (data) free_pages(data);
  }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;
  void* const data;
};

// to[i][v] = g[v][i] for `rows` rows of g and `columns` columns, both whole squares.
#if CGPT_TIER_LEVEL >= 4
inline void transpose_block(const bf16* g, int64_t ldg, int64_t rows, int64_t columns, bf16* to,
                            int64_t ldt) {
  // Two rows of g interleaved make pairs of 32 bits, which the fp32 transposition moves whole.
  const __m512i pairs = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40,
                                         8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  for (int64_t v = 0; v < rows; v += 2 * kLanes)
    for (int64_t i = 0; i < columns; i += kLanes) {
      VecF square[kLanes];
      for (int r = 0; r < kLanes; ++r) {
        const bf16* p = g + (v + 2 * r) * ldg + i;
        const auto line = [](const bf16* q) {
          return _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(q)));
        };
        square[r] = bit_cast<VecF>(_mm512_permutex2var_epi16(line(p), pairs, line(p + ldg)));
      }
      transpose(square);
      for (int r = 0; r < kLanes; ++r)
        __builtin_memcpy(to + (i + r) * ldt + v, &square[r], sizeof(VecF));
    }
}
#endif
[[maybe_unused]] inline void transpose_block(const float* g, int64_t ldg, int64_t rows,
                                             int64_t columns, float* to, int64_t ldt) {
  for (int64_t v = 0; v < rows; v += kLanes)
    for (int64_t i = 0; i < columns; i += kLanes) {
      VecF square[kLanes];
      for (int r = 0; r < kLanes; ++r) square[r] = load(g + (v + r) * ldg + i);
      transpose(square);
      for (int r = 0; r < kLanes; ++r) store(to + (i + r) * ldt + v, square[r]);
    }
}

// The rows that count, one after the other.
template <class T>
struct Gathered {
  int64_t count = 0;
  int64_t* index = nullptr;   // [count], which row it is
  int64_t* target = nullptr;  // [count]
  float* d = nullptr;         // [count], gradient of its loss
  float* loss = nullptr;      // [count]
  const T* x = nullptr;       // [count, K]
  int64_t ldx = 0;
};

template <class T>
struct Gradients {
  using C = compute_t<T>;
  using S = typename Stored<T>::type;

  const LinearCrossEntropyArgs& a;
  const Gathered<T>& rows;
  const Plan cut;
  const T* const w = a.weight.as<const T>();
  const int64_t K = a.x.shape[1], V = a.weight.shape[0], ldw = a.weight.strides[0];
  const int64_t padded = round_up(cut.group, kNR), width = round_up(K, kNR);
  const int64_t ldg =
      padded + (conflicting(padded * sizeof(C)) ? kAlign / static_cast<int64_t>(sizeof(C)) : 0);
  const float per_class = a.label_smoothing / static_cast<float>(V);
  // Whole squares of the transposition.
  static constexpr int64_t kSquare = sizeof(C) == 2 ? 2 * kLanes : kLanes;

  const int64_t e_bytes = V * padded * static_cast<int64_t>(sizeof(S));
  const bool in_pages = e_bytes >= kPagedBytes;
  S* e = nullptr;            // [V, padded]
  float* shifts = nullptr;   // [V / kVocabBlock, padded]
  float* lse = nullptr;      // [padded]
  C* x_panels = nullptr;     // x of the group, for dweight
  C* w_panels = nullptr;     // W of the super-block, for dx
  C* transposed = nullptr;   // [padded, kSuperBlock], g^T
  float* dx = nullptr;       // [padded, width]
  float* dweight = nullptr;  // [V, K], where the plan is wide
  float* dbias = nullptr;    // [V]

  // One group's place among the rows, and whether it is the first and the last.
  int64_t begin = 0, count = 0, group_padded = 0;

  void lay_out(Arena* arena, int64_t& bytes) {
    const auto take = [&]<class E>(E*& to, int64_t n) {
      if (arena) to = arena->take<E>(n);
      else bytes += Arena::bytes<E>(n);
    };
    take(e, in_pages ? 0 : V * padded);
    take(shifts, (V + kVocabBlock - 1) / kVocabBlock * padded);
    take(lse, padded);
    take(x_panels, a.dweight ? packed_b_size<C>(padded, K) : 0);
    take(w_panels, a.dx ? kSuperBlock * width : 0);
    take(transposed, a.dx ? padded * kSuperBlock : 0);
    take(dx, a.dx ? padded * width : 0);
    take(dbias, a.dbias ? V : 0);
  }

  void losses() {
    LinearCrossEntropyArgs part = a;
    const auto rows_from = [&](TensorView& v, void* data, int64_t stride) {
      v.data = data, v.shape[0] = count, v.strides[0] = stride;
    };
    rows_from(part.x, const_cast<T*>(rows.x) + begin * rows.ldx, rows.ldx);
    rows_from(part.target, rows.target + begin, 1);
    rows_from(part.loss, rows.loss + begin, 1);
    part.lse = part.loss;
    part.lse.data = lse;
    Losses<T>{part, e, shifts}.run();
  }

  // g of vocabulary rows [v0, v0 + n), zeros below them up to whole squares of the transposition.
  void make_block(int64_t v0, int64_t n, C* g, float* factor, float* spread) const {
    const float* d = rows.d + begin;
    for (int64_t v = 0; v < n; v += kVocabBlock) {
      const float* shift = shifts + (v0 + v) / kVocabBlock * group_padded;
      for (int64_t j = 0; j < count; j += kLanes) {
        const VecF own = load_n(d + j, count - j);
        store(factor + j, exp(load(shift + j) - load(lse + j)) * own);
        store(spread + j, set1(-per_class) * own);
      }
      for (int64_t r = v; r < n && r < v + kVocabBlock; ++r) {
        VecF sum = zero();
        const S* from = e + (v0 + r) * group_padded;
        for (int64_t j = 0; j < count; j += kLanes) {
          const VecI there = iota() < set1i(static_cast<int32_t>(count - j));
          const VecF value = fmadd(load(from + j), load(factor + j), load(spread + j));
          const VecF kept = select(there, value, zero());
          store_stored(g + r * ldg + j, kept);
          sum += kept;
        }
        for (int64_t j = round_up(count, kLanes); j < group_padded; j += kLanes)
          store(g + r * ldg + j, zero());
        if (a.dbias) dbias[v0 + r] += reduce_add(sum);
      }
      for (int64_t i = 0; i < count; ++i) {
        const int64_t t = rows.target[begin + i] - v0;
        if (t < v || t >= n || t >= v + kVocabBlock) continue;
        const float p = to_float(e[(v0 + t) * group_padded + i]) * factor[i];
        const float hit = (1.0f - a.label_smoothing) * d[i];
        g[t * ldg + i] = from_float<C>(p + spread[i] - hit);
        if (a.dbias) dbias[v0 + t] -= hit;
      }
    }
    for (int64_t r = n; r < round_up(n, kSquare); ++r)
      for (int64_t j = 0; j < group_padded; j += kLanes) store(g + r * ldg + j, zero());
  }

  // Rows [v0, v0 + n) of dweight gain g x.
  void take_dweight(int64_t v0, int64_t n, const C* g) const {
    alignas(kAlign) float tile[kVocabBlock * kNR];
    const bool first = begin == 0, last = begin + count == rows.count;
    T* const out = a.dweight.as<T>();
    const int64_t ldo = a.dweight.strides[0], Mp = padded_k<C>(count);
    for (int64_t v = 0; v < n; v += kVocabBlock) {
      const int64_t height = n - v < kVocabBlock ? n - v : kVocabBlock;
      for (int64_t k = 0; k < K; k += kNR) {
        const int64_t columns = K - k < kNR ? K - k : kNR;
        T* const to = out + (v0 + v) * ldo + k;
        float* const wide = cut.wide ? dweight + (v0 + v) * K + k : nullptr;
        // One or two lines per row, a row apart: the hardware foresees none of them.
        for (int64_t r = 0; r < height; ++r) {
          const char* line = wide ? reinterpret_cast<const char*>(wide + r * K)
                                  : reinterpret_cast<const char*>(to + r * ldo);
          __builtin_prefetch(line, 1);
          if (wide || sizeof(T) == 4) __builtin_prefetch(line + 64, 1);
        }
        block_gemm(height, int64_t{kNR}, count, g + v * ldg, ldg, x_panels + k * Mp, tile,
                   int64_t{kNR}, false);
        for (int64_t r = 0; r < height; ++r)
          for (int64_t j = 0; j < columns; j += kLanes) {
            VecF value = load(tile + r * kNR + j);
            const int64_t left = columns - j;
            if (!first)
              value += wide ? load_n(wide + r * K + j, left) : load_n(to + r * ldo + j, left);
            if (wide && !last) store_n(wide + r * K + j, value, left);
            else store_n(to + r * ldo + j, value, left);
          }
      }
    }
  }

  void item(int64_t super, int64_t super_end, int64_t b) const {
    const int64_t v0 = super + b * kBlock, n = super_end - v0 < kBlock ? super_end - v0 : kBlock;
    const int64_t bytes = kBlock * ldg * static_cast<int64_t>(sizeof(C));
    char* const own = static_cast<char*>(
        thread_scratch(0, static_cast<size_t>(bytes) + 2 * padded * sizeof(float)));
    C* const g = reinterpret_cast<C*>(own);
    float* const factor = reinterpret_cast<float*>(own + bytes);
    make_block(v0, n, g, factor, factor + padded);
    if (a.dweight) take_dweight(v0, n, g);
    if (!a.dx) return;
    transpose_block(g, ldg, round_up(n, kSquare), group_padded, transposed + b * kBlock,
                    kSuperBlock);
    pack_b_rows(w + v0 * ldw, ldw, n, K, w_panels + b * kBlock * kNR,
                padded_k<C>(super_end - super) * kNR);
  }

  // Adds g^T W of the super-block's n words, kGather of them at a time: g^T of so many stays in L2
  // while the panels of W pass.
  void gather_dx(int64_t n, bool first) const {
    for (int64_t v = 0; v < n; v += kGather) {
      const int64_t depth = n - v < kGather ? n - v : kGather;
      parallel_items(width / kNR, count * depth * kNR, [&](int64_t k) {
        block_gemm(count, int64_t{kNR}, depth, transposed + v, kSuperBlock,
                   w_panels + k * kNR * padded_k<C>(n) + v * kNR, dx + k * kNR, width,
                   v > 0 || !first);
      });
    }
  }

  void store_dx() const {
    parallel_ranges(count, K, [&](int64_t first, int64_t end) {
      for (int64_t i = first; i < end; ++i) {
        T* to = a.dx.as<T>() + rows.index[begin + i] * a.dx.strides[0];
        for (int64_t k = 0; k < K; k += kLanes) store_n(to + k, load(dx + i * width + k), K - k);
      }
    });
  }

  void run_group() {
    losses();
    if (a.dweight) {
      const int64_t Mp = padded_k<C>(count);
      parallel_ranges(width / kNR, kNR * count, [&](int64_t first, int64_t end) {
        const int64_t k = first * kNR, k_end = end * kNR < K ? end * kNR : K;
        pack_b_rows(rows.x + begin * rows.ldx + k, rows.ldx, count, k_end - k, x_panels + k * Mp);
      });
    }
    for (int64_t super = 0; super < V; super += kSuperBlock) {
      const int64_t end = super + kSuperBlock < V ? super + kSuperBlock : V;
      parallel_items((end - super + kBlock - 1) / kBlock, kBlock * count * K,
                     [&](int64_t b) { item(super, end, b); });
      if (a.dx) gather_dx(end - super, super == 0);
    }
    if (a.dx) store_dx();
  }

  void run() {
    int64_t bytes = 0;
    lay_out(nullptr, bytes);
    Arena arena(bytes);
    lay_out(&arena, bytes);
    const Pages exponentials(in_pages ? e_bytes : 0);
    const Pages sums(cut.wide && a.dweight ? V * K * static_cast<int64_t>(sizeof(float)) : 0);
    if (in_pages) e = static_cast<S*>(exponentials.data);
    dweight = static_cast<float*>(sums.data);
    if (a.dweight && a.dweight.strides[0] == K)
      advise_huge_pages(a.dweight.data, static_cast<size_t>(V * K) * sizeof(T));
    if (a.dbias)
      for (int64_t v = 0; v < V; ++v) dbias[v] = 0.0f;
    for (begin = 0; begin < rows.count; begin += cut.group) {
      count = rows.count - begin < cut.group ? rows.count - begin : cut.group;
      group_padded = round_up(count, kNR);
      run_group();
    }
    if (!a.dbias) return;
    for (int64_t v = 0; v < V; ++v) {
      if (a.dbias.dtype == DType::f32) a.dbias.as<float>()[v] = dbias[v];
      else a.dbias.as<T>()[v] = from_float<T>(dbias[v]);
    }
  }
};

}  // namespace
}  // namespace cgpt::CGPT_TIER
