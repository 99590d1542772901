// What the CPU and CUDA glue of the logit losses share: checked views of the arguments.
#pragma once

#include <optional>

#include "check.h"
#include "logits.h"

namespace kdfast {

// Asking first is ten times cheaper than a copy that turns out not to be needed.
inline Tensor contiguous_rows(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// `empty_on` without the dispatcher's boxed call, which takes longer than a small row of logits.
inline Tensor new_dense(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) {
    strides[i - 1] = strides[i] * (sizes[i] > 1 ? sizes[i] : 1);
  }
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  int32_t device_type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      int64_t(sizes.size()), sizes.data(), strides.data(), to<int32_t>(from(dtype)), device_type,
      like.get_device_index(), &handle));
  return Tensor(handle);
}

// Contiguous logits and labels with the outputs to fill. Labels are indices, probabilities in the
// accumulation type, or absent.
struct LogitsTask {
  Tensor student, teacher;
  std::optional<Tensor> labels;
  int64_t rows, classes;
  Storage storage;
  LogitsWeights weights;
  Tensor student_slope, teacher_slope;  // [0] where not wanted

  LogitsTask(const char* op, const Tensor& student_logits, const Tensor& teacher_logits,
             const std::optional<Tensor>& given_labels, const std::vector<double>& alpha,
             double gamma, double temperature, double label_smoothing, double unit,
             bool student_gradient, bool teacher_gradient)
      : student(contiguous_rows(student_logits)),
        teacher(contiguous_rows(teacher_logits)),
        rows(student.size(0)),
        classes(student.size(1)),
        storage(storage_of(op, student)),
        weights{gamma, temperature, label_smoothing, unit, int64_t(alpha.size()), {}} {
    KD_CHECK(rows > 0 && classes > 0 && classes < (int64_t(1) << 30), op,
             ": expected non-empty logits of less than 2^30 classes");
    KD_CHECK(weights.members >= 1 && weights.members <= kMaxMembers, op, ": expected 1 to ",
             kMaxMembers, " weights alpha, got ", weights.members);
    KD_CHECK(teacher.scalar_type() == student.scalar_type(), op, ": expected one dtype");
    KD_CHECK(teacher.numel() == weights.members * student.numel() &&
                 teacher.size(-1) == classes && teacher.size(-2) == rows,
             op, ": expected teacher logits of the student's shape, one for each weight");
    for (int64_t j = 0; j < weights.members; ++j) weights.alpha[j] = alpha[size_t(j)];
    if (given_labels) {
      labels = contiguous_rows(*given_labels);
      const bool indices = labels->scalar_type() == ScalarType::Long;
      KD_CHECK(indices || labels->scalar_type() == accumulate_type(student), op,
               ": expected int64 labels or probabilities in the accumulation type");
      KD_CHECK(labels->numel() == (indices ? rows : rows * classes), op,
               ": expected labels for every row");
    }
    KD_CHECK(labels || gamma == 0, op, ": cross-entropy needs labels");
    student_slope = slope_for(student, student_gradient);
    teacher_slope = slope_for(teacher, teacher_gradient);
  }

  const int64_t* indices() const {
    return labels && labels->scalar_type() == ScalarType::Long ? labels->const_data_ptr<int64_t>()
                                                               : nullptr;
  }

  template <typename A>
  const A* probabilities() const {
    return labels && labels->scalar_type() != ScalarType::Long ? labels->const_data_ptr<A>()
                                                               : nullptr;
  }

 private:
  static Tensor slope_for(const Tensor& logits, bool wanted) {
    std::vector<int64_t> sizes{0};
    if (wanted) {
      sizes.clear();
      for (int64_t i = 0; i < logits.dim(); ++i) sizes.push_back(logits.size(i));
    }
    return new_dense(logits, sizes, logits.scalar_type());
  }
};

}  // namespace kdfast
