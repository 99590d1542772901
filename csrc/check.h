// What every op's glue needs from torch: checks, dtype switch, feature views. Stable ABI only.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>
#include <type_traits>
#include <vector>

#include "feature.h"

// The Python wrappers check arguments and raise ValueError or TypeError; this is the last line.
#define KD_CHECK(condition, ...) STD_TORCH_CHECK(condition, __VA_ARGS__)

namespace kdfast {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Storage storage_of_dtype(const char* op, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return Storage::kFloat;
    case ScalarType::Half:
      return Storage::kHalf;
    case ScalarType::BFloat16:
      return Storage::kBFloat16;
    case ScalarType::Double:
      return Storage::kDouble;
    default:
      KD_CHECK(false, op, ": expected float32, float64, float16 or bfloat16");
  }
}

inline Storage storage_of(const char* op, const Tensor& tensor) {
  return storage_of_dtype(op, tensor.scalar_type());
}

// float32 accumulates float32, float16 and bfloat16; float64 itself.
inline ScalarType accumulate_type(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Calls body(A{}) with the accumulation type A of `tensor`.
template <typename Body>
void with_accumulator(const Tensor& tensor, Body&& body) {
  if (accumulate_type(tensor) == ScalarType::Double) {
    body(double{});
  } else {
    body(float{});
  }
}

// Calls body(std::integral_constant<int, P>{}) with the P of `energy` (arithmetic.h).
template <typename Body>
void with_power(double power, Body&& body) {
  if (power == 2) {
    body(std::integral_constant<int, 2>{});
  } else if (power == 1) {
    body(std::integral_constant<int, 1>{});
  } else {
    body(std::integral_constant<int, 0>{});
  }
}

// Whether the last three of four dimensions lie in memory in the given order without gaps.
// A dimension of size 1 has no meaningful stride.
inline bool dense_in_order(const Tensor& tensor, int first, int second, int third) {
  int64_t expected = 1;
  for (int dimension : {third, second, first}) {
    const int64_t size = tensor.size(dimension);
    if (size != 1 && tensor.stride(dimension) != expected) return false;
    expected *= size;
  }
  return true;
}

// A [N, C, H, W] tensor whose samples are dense in NCHW or channels_last; anything else is copied
// to NCHW. `tensor` owns the memory that `view` points to.
struct DenseFeature {
  Tensor tensor;
  Feature view;

  DenseFeature(const char* op, const Tensor& source) : tensor(source) {
    KD_CHECK(source.dim() == 4, op, ": expected [N, C, H, W], got ", source.dim(), " dimensions");
    KD_CHECK(source.numel() > 0, op, ": expected a non-empty feature");
    const bool nchw = dense_in_order(source, 1, 2, 3);
    const bool channels_last = !nchw && dense_in_order(source, 2, 3, 1);
    if (!nchw && !channels_last) tensor = torch::stable::contiguous(source);
    view = {tensor.const_data_ptr(), tensor.size(0),
            tensor.size(1),          tensor.size(2) * tensor.size(3),
            tensor.stride(0),        storage_of(op, tensor),
            channels_last};
  }

  MemoryFormat format() const {
    return view.channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
  }
};

inline std::vector<DenseFeature> dense_features(const char* op, const std::vector<Tensor>& list) {
  std::vector<DenseFeature> features;
  features.reserve(list.size());
  for (const Tensor& tensor : list) features.emplace_back(op, tensor);
  return features;
}

// Student and teacher features pair by pair: one batch, equal positions, all or none float64.
inline void check_pairs(const char* op, const std::vector<DenseFeature>& students,
                        const std::vector<DenseFeature>& teachers) {
  KD_CHECK(!students.empty() && students.size() == teachers.size(), op,
           ": expected as many teacher as student features, at least one");
  const Feature& first = students[0].view;
  for (size_t i = 0; i < students.size(); ++i) {
    const Feature &s = students[i].view, &t = teachers[i].view;
    KD_CHECK(s.positions == t.positions, op, ": expected equal sizes in pair ", i);
    for (const Feature* feature : {&s, &t}) {
      KD_CHECK(feature->samples == first.samples, op, ": expected one batch size in pair ", i);
      KD_CHECK((feature->storage == Storage::kDouble) == (first.storage == Storage::kDouble), op,
               ": expected float64 for all features or none, pair ", i);
    }
  }
}

// A new tensor on the device of `like`.
inline Tensor empty_on(const Tensor& like, std::vector<int64_t> sizes, ScalarType dtype,
                       MemoryFormat format = MemoryFormat::Contiguous) {
  return torch::stable::empty(sizes, dtype, std::nullopt, like.device(), std::nullopt, format);
}

// An uninitialised gradient: shape, dtype and memory format of `feature`.
inline Tensor empty_gradient(const DenseFeature& feature) {
  const Tensor& like = feature.tensor;
  return empty_on(like, {like.size(0), like.size(1), like.size(2), like.size(3)},
                  like.scalar_type(), feature.format());
}

}  // namespace kdfast
