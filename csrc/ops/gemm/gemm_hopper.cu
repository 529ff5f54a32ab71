// gemm on Hopper: bf16 and fp16 tiles by wgmma and TMA, on the collectives of CUTLASS's headers.
// It uses instructions that sm_90a alone has, so it has no host implementation; gemm_cuda.cu takes
// every call that this file leaves.
//
// A persistent block has one warp group that fetches slices of both factors by TMA and two that
// multiply and finish a tile of 128 x 128 each in turn: while one adds bias, activation and
// residual, the other multiplies ("pingpong"). Two blocks side by side along M share a slice of b.
//
// One kernel per dtype and strides; bias, activation, residual and the values before the activation
// are switched at run time: each instance takes nvcc six seconds.
#include "../../cuda/hopper.h"
#include "gemm_cuda.h"

#ifdef CGPT_CUTLASS  // the headers were found

  #include <cutlass/gemm/device/gemm_universal_adapter.h>

  #include <cutlass/epilogue/collective/collective_builder.hpp>
  #include <cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp>
  #include <cutlass/gemm/collective/collective_builder.hpp>
  #include <cutlass/gemm/kernel/gemm_universal.hpp>

  #include "gemm_epilogue.cuh"

namespace cgpt {
namespace {

using namespace cute;
namespace fusion = cutlass::epilogue::fusion;
namespace collective = cutlass::epilogue::collective;
constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;

// ---- the epilogue: y = activation(sums + bias) + residual ---------------------------------------

template <class A>
struct AddBoth {
  CUTLASS_DEVICE A operator()(A sums, const A& bias, const A& bias_f32) const {
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < A::kElements; ++i) sums[i] += bias[i] + bias_f32[i];
    return sums;
  }
};

enum class Rounded : uint8_t { no, bf16, f16 };  // the dtype of `pre`, where that is kept

struct FinishArguments {
  Activation activation;
  Rounded rounded;
  bool residual;
};

template <class A>
struct Finish {
  using Arguments = FinishArguments;
  CUTLASS_DEVICE A operator()(A x, const A& residual, const Arguments& args) const {
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < A::kElements; ++i) {
      if (args.rounded == Rounded::bf16) x[i] = to_float(from_float<bf16>(x[i]));
      if (args.rounded == Rounded::f16) x[i] = to_float(from_float<f16>(x[i]));
      x[i] = activate(x[i], args.activation);
      if (args.residual) x[i] += residual[i];
    }
    return x;
  }
};

// The residual, which is fetched only where there is one.
template <class T>
struct Residual : fusion::Sm90SrcFetch<T> {
  using Base = fusion::Sm90SrcFetch<T>;
  struct Arguments {
    bool there;
  };
  using Params = Arguments;
  template <class Shape>
  static constexpr Params to_underlying_arguments(const Shape&, const Arguments& args, void*) {
    return args;
  }
  template <class Shape>
  static bool can_implement(const Shape&, const Arguments&) {
    return true;
  }
  template <class Shape>
  static size_t get_workspace_size(const Shape&, const Arguments&) {
    return 0;
  }
  template <class Shape>
  static cutlass::Status initialize_workspace(const Shape&, const Arguments&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }

  bool there = false;
  CUTLASS_HOST_DEVICE Residual() {}
  CUTLASS_HOST_DEVICE Residual(const Params& params, const typename Base::SharedStorage&)
      : there(params.there) {}
  CUTLASS_DEVICE bool is_producer_load_needed() const { return there; }
  CUTLASS_DEVICE bool is_C_load_needed() const { return there; }
  CUTLASS_DEVICE bool is_zero() const { return !there; }
};

// ---- the kernel ---------------------------------------------------------------------------------

template <class T, bool kDenseA, bool kDenseB>
struct Parts {
  using Tile = Shape<_128, _128, _64>;
  using Cluster = Shape<_2, _1, _1>;
  using RowMajor = cutlass::layout::RowMajor;
  using ColumnMajor = cutlass::layout::ColumnMajor;
  static constexpr int kAlign = 8;  // values in 16 bytes, what TMA asks of strides

  using Schedule = cutlass::epilogue::TmaWarpSpecialized;
  using Descriptor =
      collective::detail::EpilogueDescriptor<Tile, collective::EpilogueTileAuto, T, T, Schedule>;
  using Pre = collective::detail::AuxStoreDescriptor<Descriptor, RowMajor, T>;
  template <class B>
  using Bias = fusion::Sm90RowBroadcast<0, Tile, B, float>;
  using Sums = fusion::Sm90EVT<fusion::Sm90Compute<AddBoth, float, float, kRound>,
                               fusion::Sm90AccFetch, Bias<T>, Bias<float>>;
  using Kept = fusion::Sm90EVT<
      fusion::Sm90AuxStore<Pre::Stages, typename Pre::EpilogueTile, T, kRound, typename Pre::Stride,
                           typename Pre::SmemLayoutAtom, typename Pre::CopyOpR2S>,
      Sums>;
  using Tree = fusion::Sm90EVT<fusion::Sm90Compute<Finish, T, float, kRound>, Kept, Residual<T>>;

  using Epilogue =
      typename collective::CollectiveBuilder<cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp,
                                             Tile, Cluster, collective::EpilogueTileAuto, float,
                                             float, T, RowMajor, kAlign, T, RowMajor, kAlign,
                                             Schedule, Tree>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, T,
      conditional_t<kDenseA, RowMajor, ColumnMajor>, kAlign, T,
      conditional_t<kDenseB, ColumnMajor, RowMajor>, kAlign, float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename Epilogue::SharedStorage))>,
      cutlass::gemm::KernelTmaWarpSpecializedPingpong>::CollectiveOp;
  using Kernel =
      cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue>;
};

// A short name for profilers and budgets.
template <class T, bool kDenseA, bool kDenseB>
struct HopperGemm : Parts<T, kDenseA, kDenseB>::Kernel {};

// Strides of CUTLASS's matrices: (rows, columns, batch), the dense one static.
template <class S>
S stride_of(int64_t line) {
  S s{};
  if constexpr (is_same_v<remove_cvref_t<decltype(get<0>(s))>, int64_t>) get<0>(s) = line;
  else get<1>(s) = line;
  return s;
}

void require(cutlass::Status status) {
  if (status != cutlass::Status::kSuccess)
    throw std::runtime_error(std::string("gemm: CUTLASS: ") + cutlassGetStatusString(status));
}

template <class T, bool kDenseA, bool kDenseB>
void product(const GemmProductArgs& p, Rounded rounded) {
  using Kernel = HopperGemm<T, kDenseA, kDenseB>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
  const cuda::DeviceGuard guard(p.a.device_index, "gemm");
  typename Gemm::Arguments args{};
  args.mode = cutlass::gemm::GemmUniversalMode::kGemm;
  args.problem_shape = {static_cast<int>(p.a.shape[0]), static_cast<int>(p.b.shape[0]),
                        static_cast<int>(p.a.shape[1]), 1};
  args.mainloop.ptr_A = p.a.as<const T>();
  args.mainloop.dA = stride_of<typename Kernel::StrideA>(p.a.strides[kDenseA ? 0 : 1]);
  args.mainloop.ptr_B = p.b.as<const T>();
  args.mainloop.dB = stride_of<typename Kernel::StrideB>(p.b.strides[kDenseB ? 0 : 1]);
  args.epilogue.ptr_D = p.y.as<T>();
  args.epilogue.dD = stride_of<typename Kernel::StrideD>(p.y.strides[0]);
  // A descriptor is made of it in any case.
  const TensorView& residual = p.residual ? p.residual : p.y;
  args.epilogue.ptr_C = residual.as<const T>();
  args.epilogue.dC = stride_of<typename Kernel::StrideC>(residual.strides[0]);

  // Arguments lie as the tree does, children before their parent.
  auto& [kept, there, finish] = args.epilogue.thread;
  auto& [sums, pre] = kept;
  auto& [none, bias, bias_f32, none_either] = sums;
  if (p.bias && p.bias.dtype == DType::f32) bias_f32.ptr_row = p.bias.as<const float>();
  else if (p.bias) bias.ptr_row = p.bias.as<const T>();
  if (p.pre) {
    pre.ptr_aux = p.pre.as<T>();
    pre.dAux = stride_of<typename Parts<T, kDenseA, kDenseB>::Pre::Stride>(p.pre.strides[0]);
  }
  const bool has_residual = static_cast<bool>(p.residual);
  there = {has_residual};
  finish = {p.activation, p.pre ? rounded : Rounded::no, has_residual};

  args.hw_info.device_id = p.a.device_index;
  args.hw_info.sm_count =
      cutlass::KernelHardwareInfo::query_device_multiprocessor_count(p.a.device_index);
  Gemm gemm;
  require(gemm.can_implement(args));
  // Asks for no workspace: nothing is allocated, and a CUDA graph may hold the launch.
  require(gemm.run(args, nullptr, static_cast<cudaStream_t>(p.a.stream)));
  ++cuda::hopper_launches;
}

template <class T>
void with_strides(const GemmProductArgs& p, bool dense_a, bool dense_b, Rounded rounded) {
  if (dense_a && dense_b) product<T, true, true>(p, rounded);
  else if (dense_a) product<T, true, false>(p, rounded);
  else product<T, false, false>(p, rounded);
}

}  // namespace

bool gemm_product_hopper(const GemmProductArgs& p, bool dense_a, bool dense_b) {
  // TMA takes no lines on top of each other.
  const auto apart = [](const TensorView& v, bool dense_k) {
    return v.strides[dense_k ? 0 : 1] > 0;
  };
  if (!cuda::hopper_wanted(p.a.device_index) || p.a.shape[1] == 0 || !apart(p.a, dense_a) ||
      !apart(p.b, dense_b))
    return false;
  if (p.a.dtype == DType::bf16)
    with_strides<cutlass::bfloat16_t>(p, dense_a, dense_b, Rounded::bf16);
  else with_strides<cutlass::half_t>(p, dense_a, dense_b, Rounded::f16);
  return true;
}

}  // namespace cgpt

#endif
