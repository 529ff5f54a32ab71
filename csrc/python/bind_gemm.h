#pragma once

#include <memory>

#include "../cpu/pages.h"
#include "../ops/gemm/gemm.h"
#include "../ops/gemm/packed.h"
#include "dlpack.h"
#include "gil.h"

namespace cgpt::python {
namespace {

// A transposed view of a weight is the other layout, in place; whether it was one.
bool read_as_other_layout(TensorView& w) {
  if (w.ndim != 2 || w.strides[1] == 1 || w.strides[0] != 1) return false;
  std::swap(w.shape[0], w.shape[1]);
  std::swap(w.strides[0], w.strides[1]);
  return true;
}

void check_and_run(GemmArgs args, Tensor x, Tensor residual) {
  const Checker c{"gemm"};
  c.require(!residual || same_leading(x, residual, 1, 1), [&] {
    return "residual must have x's leading dimensions, got " + shape_text(residual);
  });
  if (read_as_other_layout(args.weight)) args.weight_kn = !args.weight_kn;
  gemm_check(args);
  const ReleaseGil release(args.y.numel() * args.x.shape[1]);
  gemm_fwd_cpu(args);
}

// y, or a new one [..., N] like x where it is None.
py::object gemm(Tensor x, Tensor weight, Tensor bias, Tensor residual, py::object out,
                const std::string& activation, bool weight_kn, const LowRankTerm& low_rank,
                const TensorView& pre) {
  if (out.is_none()) {
    if (!x || x.ndim == 0 || !weight || weight.ndim != 2)
      fail("gemm: x must have shape (..., K) and weight 2 dimensions");
    out = new_empty(x, weight.shape[weight_kn]);
  }
  py::detail::make_caster<BorrowedTensor> caster;
  caster.load(out, true);
  const BorrowedTensor& y = caster;
  check_and_run({rows_of(x), weight, bias, rows_of(residual), rows_of(y), activation_of(activation),
                 weight_kn, low_rank, pre},
                x, residual);
  return out;
}

py::object gemm_fwd(Tensor x, Tensor weight, Tensor bias, Tensor residual, py::object out,
                    const std::string& activation, bool weight_kn) {
  return gemm(x, weight, bias, residual, std::move(out), activation, weight_kn, {}, {});
}

// gemm_fwd with scale u v^T; u [..., r], v [N, r]. pre: [..., N] T or None, as in GemmArgs.
py::object gemm_low_rank_fwd(Tensor x, Tensor weight, Tensor bias, Tensor residual, py::object out,
                             const std::string& activation, bool weight_kn, Tensor u, Tensor v,
                             float scale, Tensor pre) {
  return gemm(x, weight, bias, residual, std::move(out), activation, weight_kn,
              {rows_of(u), v, scale}, rows_of(pre));
}

// pre: [M, N] T or None, as in GemmArgs. dropout_p: in [0, 1).
void gemm_fwd_training(Tensor x, Tensor weight, Tensor bias, Tensor residual, Tensor y, Tensor pre,
                       const std::string& activation, bool weight_kn, double dropout_p,
                       uint64_t seed) {
  check_and_run({rows_of(x),
                 weight,
                 bias,
                 rows_of(residual),
                 rows_of(y),
                 activation_of(activation),
                 weight_kn,
                 {},
                 rows_of(pre),
                 dropout_p,
                 seed},
                x, residual);
}

// g: [M, N] T, working memory; needed with an activation or dropout. dx, dweight, dbias: None where
// not wanted.
void gemm_bwd(Tensor dy, Tensor x, Tensor weight, Tensor pre, Tensor g, Tensor dx, Tensor dweight,
              Tensor dbias, const std::string& activation, bool weight_kn, double dropout_p,
              uint64_t seed) {
  GemmBwdArgs args{rows_of(dy),  rows_of(x), weight,
                   rows_of(pre), rows_of(g), rows_of(dx),
                   dweight,      dbias,      activation_of(activation),
                   weight_kn,    weight_kn,  dropout_p,
                   seed};
  if (read_as_other_layout(args.weight)) args.weight_kn = !weight_kn;
  gemm_bwd_check(args);
  const ReleaseGil release(args.dy.numel() * args.x.shape[1]);
  gemm_bwd_cpu(args);
}

// `bytes` zeroed bytes in huge pages, as a DLPack capsule that torch.from_dlpack takes over.
py::capsule allocate_buffer(int64_t bytes) {
  if (bytes < 0) fail("allocate_buffer: bytes must not be negative, got " + std::to_string(bytes));
  struct Owned {
    DLManagedTensor tensor{};
    int64_t shape = 0, stride = 1;
  };
  auto owned = std::make_unique<Owned>();
  owned->shape = bytes;
  DLTensor& t = owned->tensor.dl_tensor;
  t.data = allocate_pages(static_cast<size_t>(bytes));
  t.device = {kDLCPU, 0};
  t.ndim = 1;
  t.dtype = {kDLUInt, 8, 1};
  t.shape = &owned->shape;
  t.strides = &owned->stride;
  owned->tensor.manager_ctx = owned.get();
  owned->tensor.deleter = [](DLManagedTensor* self) {
    free_pages(self->dl_tensor.data);
    delete static_cast<Owned*>(self->manager_ctx);
  };
  // A taker renames the capsule and frees the tensor itself.
  return py::capsule(&owned.release()->tensor, "dltensor", [](PyObject* capsule) {
    if (!PyCapsule_IsValid(capsule, "dltensor")) return;
    auto* t = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
    t->deleter(t);
  });
}

int64_t packed_bytes_of(const std::string& format, int64_t n, int64_t k, int64_t group) {
  const PackedWeight w{weight_format_of(format), n, k, group, nullptr};
  packed_weight_check({"packed_bytes"}, w);
  return packed_bytes(w.format, n, k, group);
}

void pack_weight(Tensor weight, Tensor packed, bool weight_kn, const std::string& format,
                 int64_t group) {
  const PackWeightArgs args{weight, weight_kn, weight_format_of(format), group, packed.data};
  packed_buffer_check({"pack_weight"}, packed, packed_weight_of(args));
  py::gil_scoped_release release;
  pack_weight_cpu(args);
}

void unpack_weight(Tensor packed, Tensor out, bool weight_kn, const std::string& format,
                   int64_t group) {
  if (!out || out.ndim != 2) fail("unpack_weight: out must have 2 dimensions");
  const PackedWeight weight{weight_format_of(format), out.shape[weight_kn], out.shape[!weight_kn],
                            group, packed.data};
  const UnpackWeightArgs args{weight, out, weight_kn};
  unpack_weight_check(args);
  packed_buffer_check({"unpack_weight"}, packed, weight);
  py::gil_scoped_release release;
  unpack_weight_cpu(args);
}

// packed_gemm_fwd with scale u v^T; u [..., r], v [N, r].
py::object packed_gemm_low_rank_fwd(Tensor x, Tensor packed, int64_t n, int64_t k,
                                    const std::string& format, int64_t group, Tensor bias,
                                    Tensor residual, py::object out, const std::string& activation,
                                    Tensor u, Tensor v, float scale) {
  if (out.is_none()) {
    if (!x || x.ndim == 0) fail("packed_gemm: x must have shape (..., K)");
    out = new_empty(x, n);
  }
  py::detail::make_caster<BorrowedTensor> caster;
  caster.load(out, true);
  const BorrowedTensor& y = caster;
  const PackedWeight weight{weight_format_of(format), n, k, group, packed.data};
  PackedGemmArgs args{rows_of(x),        weight,     bias,
                      rows_of(residual), rows_of(y), activation_of(activation)};
  args.low_rank = {rows_of(u), v, scale};
  packed_gemm_check(args);
  packed_buffer_check({"packed_gemm"}, packed, weight);
  const ReleaseGil release(args.y.numel() * k);
  packed_gemm_fwd_cpu(args);
  return out;
}

// y, or a new one [..., N] like x where it is None.
py::object packed_gemm_fwd(Tensor x, Tensor packed, int64_t n, int64_t k, const std::string& format,
                           int64_t group, Tensor bias, Tensor residual, py::object out,
                           const std::string& activation) {
  return packed_gemm_low_rank_fwd(x, packed, n, k, format, group, bias, residual, std::move(out),
                                  activation, {}, {}, 1.0f);
}

}  // namespace

inline void bind_gemm(py::module_& m) {
  m.def("gemm_fwd", &gemm_fwd);
  m.def("gemm_low_rank_fwd", &gemm_low_rank_fwd);
  m.def("gemm_fwd_training", &gemm_fwd_training);
  m.def("gemm_bwd", &gemm_bwd);
  m.def("allocate_buffer", &allocate_buffer);
  m.def("packed_bytes", &packed_bytes_of);
  m.def("pack_weight", &pack_weight);
  m.def("unpack_weight", &unpack_weight);
  m.def("packed_gemm_fwd", &packed_gemm_fwd);
  m.def("packed_gemm_low_rank_fwd", &packed_gemm_low_rank_fwd);
}

}  // namespace cgpt::python
