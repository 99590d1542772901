// Soft targets and cross-entropy of one row of logits, from sums over its classes; no torch.
//
// With d = z - max z of the student (s) and of a teacher (t), e = exp(d / T):
//
//   KL(p_t || p_s) = sum e_t (d_t - d_s) / (T sum e_t) - log(sum e_t / sum e_s)
//
// Differences to the row's maximum keep their digits where logits share a large offset, and sums
// are handed over in double: KL is a small difference of large terms at high temperatures.
#pragma once

#include <cstdint>

#include "arithmetic.h"
#include "exp.h"

namespace kdfast {

constexpr int64_t kMaxMembers = 128;

// What a launch computes: the mean over rows of gamma * CE + T^2 sum_j alpha[j] KL_j.
struct LogitsWeights {
  double gamma;
  double temperature;
  double smoothing;  // of the labels
  double unit;       // slopes are divided by it
  int64_t members;
  double alpha[kMaxMembers];

  KD_HD bool any_divergence() const {
    for (int64_t j = 0; j < members; ++j) {
      if (alpha[j] != 0) return true;
    }
    return false;
  }

  // Sum of alpha: the weight of the student's own softened probabilities.
  KD_HD double sum() const {
    double total = 0;
    for (int64_t j = 0; j < members; ++j) total += alpha[j];
    return total;
  }
};

// KL of one row; mean = sum e_t (d_t - d_s) / sum e_t, log_ratio = log(sum e_t / sum e_s).
KD_HD double divergence(double mean, double log_ratio, double temperature) {
  return mean / temperature - log_ratio;
}

// Whether rounding in the sums shows in a KL of this size, and it needs `excess` instead.
KD_HD bool needs_excess(double divergence, int64_t classes) {
  return divergence * std::sqrt(double(classes)) < 0.5;
}

// 1 - w/K (1 - w/(K + 1) (1 - ...)), so that exp(-w) - 1 + w = w^2/2 * excess_series<3>(w).
template <typename A, int K>
KD_HD A excess_series(A w) {
  if constexpr (K == (sizeof(A) == sizeof(float) ? 10 : 17)) {
    return A(1);
  } else {
    return A(1) - w * A(1.0 / K) * excess_series<A, K + 1>(w);
  }
}

// A class's share in sum e_t (exp(-w) - 1 + w), w = (d_t - d_s - mean) / T with the teacher's mean
// of d_t - d_s. The sum's terms are all positive and KL = log1p(sum / sum e_t), in which an error
// of `mean` is of second order. `level` = exp(mean / T): e_t exp(-w) = level * e_s.
template <typename A>
KD_HD A excess(A teacher_exp, A student_exp, A w, A level) {
  const A near = teacher_exp * (A(0.5) * w * w * excess_series<A, 3>(w));
  const A far = level * student_exp - (teacher_exp - teacher_exp * w);
  const A value = choose(std::abs(w) < A(0.5), near, far);
  return choose(teacher_exp == A(0), level * student_exp, value);
}

// Sums over the classes of a row's label distribution y and the student's d (at temperature 1).
struct LabelSums {
  double total;  // sum y
  double along;  // sum y d
  double all;    // sum d, for smoothing
};

// CE of one row: labels smoothed by `smoothing`, log_sum = log(sum exp d).
KD_HD double cross_entropy(const LabelSums& sums, double log_sum, double smoothing,
                           int64_t classes) {
  double loss = (1 - smoothing) * (sums.total * log_sum - sums.along);
  if (smoothing != 0) loss += smoothing * (log_sum - sums.all / double(classes));
  return loss;
}

// The student's slope at a class: hard * exp(d) + soft * exp(d / T) - base, less the label's share
// `label` * y and the teachers' probabilities.
template <typename A>
struct StudentSlope {
  A hard;
  A soft;
  A base;
  A label;
};

template <typename A>
KD_HD StudentSlope<A> student_slope(const LogitsWeights& weights, double alpha_sum, double hard_sum,
                                    double soft_sum, double label_total, int64_t classes) {
  const double gamma = weights.gamma / weights.unit, smoothing = weights.smoothing;
  const double mass = (1 - smoothing) * label_total + smoothing;
  return {A(gamma * mass / hard_sum), A(weights.temperature * alpha_sum / weights.unit / soft_sum),
          A(gamma * smoothing / double(classes)), A(gamma * (1 - smoothing))};
}

// Teacher j's share of the student's slope is `weight` * e_t; its own slope at a class is
// weight / T * e_t * (d_t - d_s - mean), mean = cross / teacher_sum.
KD_HD double member_weight(const LogitsWeights& weights, int64_t member, double teacher_sum) {
  return weights.temperature * weights.alpha[member] / weights.unit / teacher_sum;
}

}  // namespace kdfast
